"""The page of a run, rewritten while it trains: curves, samples over time, and what to do next.

It is made of what the run's folder holds (`run.yaml`, `metrics.jsonl`, `validation/`), and of nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from t2i_align.training.loop import METRICS_FILE
from t2i_align.training.output import RUN_FILE
from t2i_align.utils import html
from t2i_align.utils.files import whole_lines, write_text
from t2i_align.utils.settings import read_yaml

REPORT = "report.html"
SHOWN = 6  # validations whose samples are in the page: the first, the last and some between
REFRESH = 30  # seconds after which an open page is read again, while the run trains
Line = Mapping[str, Any]  # of metrics.jsonl
# Lines by chart; a chart whose metrics are not logged is not drawn.
CURVES = {
    "Loss": {"training": "loss", "held out": "held_out/loss"},
    "Pairs ordered as labelled": {"training": "rewards/accuracies", "held out": "held_out/rewards/accuracies"},
    "Error against the reference": {
        "winner": "error/chosen_minus_reference",
        "loser": "error/rejected_minus_reference",
    },
    "Implicit reward": {"winner": "rewards/chosen", "loser": "rewards/rejected"},
    "Denoising error": {"winner": "error/chosen", "loser": "error/rejected"},
    "Reward": {"reward": "reward", "relevant": "reward/relevant", "irrelevant": "reward/irrelevant"},
    "Drift from the reference": {"drift": "drift"},
    "Winners' error against the initial model": {"rise": "winners/rise"},
}
TECHNICAL = {"Gradient norm": {"norm": "grad_norm"}, "Learning rate": {"lr": "lr"}}
BY_TIME, VALIDATED = "rewards/margins/", "validation/"


def write_report(run: Path) -> Path:
    """Write or replace `report.html` in a run's folder; returns the file."""
    settings, history = read_yaml(run / RUN_FILE), whole_lines(run / METRICS_FILE, repair=False)
    steps = settings["train"]["steps"]
    step = max((line["step"] for line in history), default=0)
    page = html.ENVIRONMENT.get_template("training/report.html.jinja").render(
        run=run.name,
        settings=settings,
        step=step,
        finished=step >= steps or any("ended" in line for line in history),
        steps=steps,
        refresh=REFRESH,
        facts=facts(history),
        advice=advice(history),
        charts=html.charts(curves(history)),
        technical=html.charts({title: lines(history, names) for title, names in TECHNICAL.items()}),
        samples=[_sample(file) for file in shown(sorted((run / "validation").glob("step_*.png")))],
    )
    write_text(run / REPORT, page)
    return run / REPORT


def curves(history: Sequence[Line]) -> dict[str, dict[str, html.Points]]:
    """What a run is judged by: the lines of each chart, by title and label."""
    metrics = sorted({name for line in history for name in line})
    by_time = [name for name in metrics if name.startswith(BY_TIME)]
    charts = {
        **CURVES,
        "Margin by timestep (1000: noise)": {name.removeprefix(f"{BY_TIME}t"): name for name in by_time},
    }
    for name in (name for name in metrics if name.startswith(VALIDATED)):
        scorer, _, part = name.removeprefix(VALIDATED).partition("/")
        charts.setdefault(f"{'Parts' if part else 'Samples'} by {scorer}", {})[part or "score"] = name
    return {title: lines(history, names) for title, names in charts.items()}


def validated(history: Sequence[Line]) -> list[str]:
    """The scores of validations, without their parts."""
    names = {name for line in history for name in line}
    return sorted(name for name in names if name.startswith(VALIDATED) and name.count("/") == 1)


def lines(history: Sequence[Line], names: Mapping[str, str]) -> dict[str, html.Points]:
    """The points (step, value) of each metric, by its label."""
    return {label: [(line["step"], line[name]) for line in history if name in line] for label, name in names.items()}


def shown(files: Sequence[Path]) -> Sequence[Path]:
    """The first, the last, and evenly between."""
    if len(files) <= SHOWN:
        return files
    return [files[round(i * (len(files) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def facts(history: Sequence[Line]) -> dict[str, str]:
    """The newest value of what says most."""
    newest = {name: value for line in history for name, value in line.items()}
    named = {"loss": "loss", "rewards/accuracies": "of the pairs ordered as labelled",
             "held_out/rewards/accuracies": "of the held-out pairs", "rewards/margins": "margin",
             "winners/rise": "rise of the winners' error"}  # fmt: skip
    named |= {name: f"{name.removeprefix(VALIDATED)} of the samples" for name in validated(history)}
    return {label: f"{newest[name]:.0%}" if "accuracies" in name else f"{newest[name]:.4g}"
            for name, label in named.items() if name in newest}  # fmt: skip


def advice(history: Sequence[Line]) -> list[str]:
    """What the metrics say about the run, a sentence each; the last quarter of the logged lines against the rest."""
    found = []
    if rollbacks := [line for line in history if "rollback" in line]:
        found.append(
            f"The run diverged and went back to a checkpoint {len(rollbacks)} times, last from step "
            f"{rollbacks[-1]['diverged_at']}: a smaller optim.lr or a larger objective.beta."
        )
    rise, fall, error = (
        late(history, name)
        for name in ("error/chosen_minus_reference", "error/rejected_minus_reference", "error/chosen")
    )
    if rise > 0.02 * error and fall > 0:
        found.append(
            f"Winners are denoised {rise / (error - rise):.0%} worse than by the reference, and losers worse still: "
            "the loss falls although the samples degrade. A smaller optim.lr, a larger objective.beta, or an earlier "
            "checkpoint."
        )
    accuracy = late(history, "rewards/accuracies")
    if accuracy > 0.95:
        found.append(f"{accuracy:.0%} of the training pairs are ordered as labelled: the run may learn them by heart. "
                     "Held-out scores or samples decide whether to stop.")  # fmt: skip
    elif len(history) >= 8 and accuracy < 0.53:
        found.append(f"Only {accuracy:.0%} of the pairs are ordered as labelled, and chance is 50 %: more train.steps, "
                     "a larger optim.lr, or less noisy pairs.")  # fmt: skip
    found += [f"The run ended early: {line['ended']}." for line in history if "ended" in line]
    watched = [*((name, 1) for name in validated(history)), ("held_out/loss", -1)]  # a loss is best where it is least
    for name, sign in watched:
        points = [(sign * line[name], line["step"]) for line in history if name in line] or [(0, 0)]
        (first, _), (best, at), (last, end) = points[0], max(points), points[-1]
        if best - last > max(abs(best - first) / 2, abs(best) / 50) and at < end:
            found.append(f"{name} was best at step {at} ({sign * best:.4g}) and is {sign * last:.4g} at step {end}: "
                         "compare a checkpoint from there.")  # fmt: skip
    return found


def late(history: Sequence[Line], name: str) -> float:
    """The mean of a metric over the last quarter of the lines that have it; NaN if there are none."""
    values = [line[name] for line in history if name in line]
    values = values[-max(1, len(values) // 4) :]
    return sum(values) / len(values) if values else math.nan


def _sample(file: Path) -> dict[str, Any]:
    with Image.open(file) as opened:
        uri = html.data_uri(opened)
    clip = file.with_suffix(".mp4")
    return {"uri": uri, "step": int(file.stem.removeprefix("step_")), "clip": clip.name if clip.exists() else ""}
