"""The outcome of a comparison and its JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_align.evaluation.stats import Comparison, Interval
from t2i_align.utils import html


@dataclass(frozen=True, kw_only=True)
class ScorerResult:
    """One scorer's comparison, of the score itself and of each of its parts."""

    version: str
    tie_margin: float
    total: Comparison
    parts: dict[str, Comparison]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The comparison's outcome. `settings`: of models, prompts and sampling, as JSON values."""

    out: Path
    scorers: dict[str, ScorerResult]
    settings: dict[str, Any]

    @property
    def headline(self) -> ScorerResult:
        """The first scorer's result."""
        return next(iter(self.scorers.values()))

    @property
    def win_rate(self) -> float:
        """The first scorer's win rate of aligned against base."""
        return self.headline.total.win_rate

    @property
    def win_rate_ci(self) -> tuple[float, float]:
        """Its 95 % interval over prompts."""
        return self.headline.total.win_rate_ci

    def to_json(self) -> dict[str, Any]:
        """What `result.json` holds: the first scorer's numbers on top, everything under `scorers`; NaN is null."""
        top: dict[str, Any] = plain(self.headline.total)
        for name, part in self.headline.parts.items():
            top |= {f"{name}_{key}": value for key, value in plain(part).items()}
        scorers = {}
        for name, result in self.scorers.items():
            values = plain(result)
            scorers[name] = {**values.pop("total"), **values}
        return top | {"scorer": next(iter(self.scorers)), **self.settings, "scorers": scorers}

    def __repr__(self) -> str:
        name, result = next(iter(self.scorers.items()))
        rate = shown(self.win_rate, self.win_rate_ci).strip()
        return f"Evaluation(win rate {rate} by {name}, n {result.total.n}, {self.out})"

    def _repr_html_(self) -> str:
        """For notebooks: the table, and the report with its images."""
        rows = [
            (label, shown(c.win_rate, c.win_rate_ci), f"{c.mean_before:.3f}", f"{c.mean_after:.3f}", str(c.n))
            if c.n
            else (label, "no pair could be scored", "", "", "0")
            for label, c in self._comparisons()
        ]
        report = self.out / "report.html"
        page = html.page(report.read_text(encoding="utf-8")) if report.is_file() else ""
        return html.table(["scorer", "win rate [95 % interval]", "base", "aligned", "n"], rows) + page

    def _comparisons(self) -> list[tuple[str, Comparison]]:
        """Each scorer's comparison, followed by its parts'."""
        return [
            each
            for name, result in self.scorers.items()
            for each in [(name, result.total), *((f"  {part}", c) for part, c in result.parts.items())]
        ]

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = []
        for label, c in self._comparisons():
            if c.n:
                rate, means = shown(c.win_rate, c.win_rate_ci), f"{c.mean_before:.3f} -> {c.mean_after:.3f}"
                lines.append(f"{label:<24} win rate {rate}  mean {means}  n {c.n}")
            else:
                lines.append(f"{label:<24} no pair could be scored")
        prompts, different = self.settings["prompts"], self.settings["different_prompts"]
        if different < prompts:
            lines.append(f"{different} of the {prompts} prompts are different; the intervals are over these")
        if same := self.settings["identical_pairs"]:
            count = f"all {same}" if same == self.settings["samples"] else f"{same} of {self.settings['samples']}"
            lines.append(f"{count} pairs are byte-identical: the aligned model changes nothing there")
        return "\n".join([*lines, f"report: {self.out / 'report.html'}"])


def shown(rate: float, interval: Interval) -> str:
    """A rate with its interval, where there are any."""
    if math.isnan(rate):
        return "unknown (nothing but ties)"
    low, high = interval
    return f"{rate:6.1%} " + ("(too few prompts for an interval)" if math.isnan(low) else f"[{low:.1%}, {high:.1%}]")


def plain(value: Any) -> Any:
    """A result as JSON values: dataclasses as mappings, paths as text, and null for numbers that JSON lacks."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return number(value) if isinstance(value, float) else str(value) if isinstance(value, Path) else value


def number(value: float) -> float | None:
    """JSON has no NaN: null stands for a number that is not known or does not apply."""
    return float(value) if math.isfinite(value) else None
