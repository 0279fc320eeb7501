// Votes by key: the buttons do the rest. Not while something is typed, and not where the buttons cannot be seen.
const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowUp: "tie", 3: "tie",
  ArrowDown: "neither", 4: "neither", Backspace: "undo", z: "undo",
};
document.addEventListener("keydown", (event) => {
  const name = KEYS[event.key];
  const typing = event.target.closest("input, textarea, select, [contenteditable]");
  if (!name || typing || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const button = document.getElementById(`vote-${name}`);
  if (!button || button.disabled || button.offsetParent === null) return;
  event.preventDefault();
  button.click();
});
