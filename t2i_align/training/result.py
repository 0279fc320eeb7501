"""The outcome of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.data.splits import PROMPTS
from t2i_align.training.loop import METRICS_FILE
from t2i_align.training.output import RUN_FILE, read_settings
from t2i_align.training.report import curves
from t2i_align.utils import html
from t2i_align.utils.files import whole_lines


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """weights: the LoRA's or soft tokens' file, or the folder of the whole pipeline. metrics: the last logged ones."""

    output_dir: Path
    weights: Path
    steps: int
    metrics: dict[str, float]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The logged metrics, a line per logged step, with its "step"."""
        return whole_lines(self.output_dir / METRICS_FILE, repair=False)

    @property
    def next(self) -> str:
        """The commands that a user is likely to want now."""
        settings, run = read_settings(self.output_dir / RUN_FILE), self.output_dir
        prompts = Path(settings["validation"]["data"] or "").parent / PROMPTS  # of `data split`
        how = f"--prompts {prompts if prompts.is_file() else 'held_out_prompts.txt'} --scorers pickscore"
        prompt, base = "a red fox", str(settings["model"]["path"])
        if base.startswith("testbed:"):
            how, prompt = "--prompts testbed:test --scorers oracle", "a red circle above a blue square"
            if base == "testbed:wan":
                how, prompt = "--prompts testbed:video-test --scorers motion_oracle", "a red circle moving to the left"
            how += " --steps 20 --guidance 1"
        lines = [
            f"to measure it: t2i-align evaluate --aligned {run} {how} --out {run / 'evaluation'}",
            f"to look at it: t2i-align generate {run} --prompt '{prompt}' --out {run}-images",
        ]
        if settings.get("lora"):
            lines.append(f"for ComfyUI and others: t2i-align export-lora {run} --out {run.name}.safetensors")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"RunResult({self.steps} steps, loss {self.metrics.get('loss', float('nan')):.4g}, {self.weights})"

    def _repr_html_(self) -> str:
        """For notebooks: plots of the history, the last metrics, and the newest validation's images."""
        rows = [(name, f"{value:.4g}") for name, value in self.metrics.items() if "/t" not in name]
        images = sorted((self.output_dir / "validation").glob("step_*.png"))[-1:]
        return "".join([
            f"<p>{self.steps} steps, weights in <code>{self.weights}</code></p>",
            html.charts(curves(self.history)),
            f"<details><summary>last metrics</summary>{html.table(['metric', 'value'], rows)}</details>",
            *map(html.image, images),
        ])  # fmt: skip
