"""The outcome of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.training.loop import METRICS_FILE
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
