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

// Who votes: what is typed in the box, what it was the last time, or a guest, so that two people's votes do not mix.
const VOTER = "t2i-align-name";
let guest = "";  // also where the browser keeps nothing
function keepVoter(typed) {
  try { localStorage.setItem(VOTER, typed.trim()); } catch { guest = typed.trim(); }
}
document.addEventListener("input", (event) => {
  if (event.target.closest("#user")) keepVoter(event.target.value);
});
function voter(typed) {
  let kept = guest;
  try { kept = localStorage.getItem(VOTER) || ""; } catch { /* a private window */ }
  const random = () => Array.from(crypto.getRandomValues(new Uint8Array(3)), (byte) => byte.toString(16).padStart(2, "0"));
  const name = (typed || "").trim() || kept || `guest-${random().join("")}`;
  keepVoter(name);
  return name;
}
// A name is not filled in under the hands of whoever is typing one: the box is settled when they leave it.
function settled(typed) {
  const box = document.activeElement;
  return box && box.closest("#user") ? box.value : voter(typed);
}
