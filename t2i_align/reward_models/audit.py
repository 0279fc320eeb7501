"""`t2i-align audit-scorer`: how far scorers can be trusted, before anything is optimised against them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import minimize_scalar

from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.evaluation.result import number
from t2i_align.inference.options import (
    build_scorers,
    check_options,
    memory_for,
    pick_device,
    resolve_prompts,
    unscorable,
)
from t2i_align.reward_models.plots import line_plot, reliability_plot
from t2i_align.reward_models.preferences import NO_USER, Preferences, open_preferences
from t2i_align.reward_models.train import Accuracy, measure, pairs
from t2i_align.utils.files import output_lock, write_json, write_text

if TYPE_CHECKING:
    from reward_scorers import Scorer

BINS = 8  # of calibration
FEWEST = 20  # pairs; a smaller slice is not shown
MOST_USERS = 12  # annotators shown, those with the most pairs
Slices = dict[str, dict[str, list[int]]]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """P(first preferred) = σ(s Δ), s fitted on half of the prompts and tried on the others.

    bins: (mean predicted, share right, pairs) from the predicted winner's side, so in [0.5, 1]. error: the expected
    calibration error. loss: log loss in nats; log 2 is what knowing nothing gives.
    """

    scale: float
    bins: list[tuple[float, float, int]]
    error: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `audit.json` and the report hold, by scorer. agreement: of names with names, shares of pairs."""

    out: Path
    versions: dict[str, str]
    accuracy: dict[str, Accuracy]
    slices: dict[str, dict[str, dict[str, Accuracy]]]
    calibration: dict[str, Calibration]
    names: list[str]
    agreement: list[list[float]]
    curves: dict[str, list[Any]]

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = []
        for name, accuracy in self.accuracy.items():
            calibrated = self.calibration[name]
            lines.append(
                f"{name}: {accuracy}; calibration error {calibrated.error:.3f}, log loss {calibrated.loss:.3f}"
            )
            for curve in self.curves.get(name, []):
                oracle = f"oracle {curve.oracle[0]:.3f} -> {curve.oracle[-1]:.3f}, best {max(curve.oracle):.3f}"
                gained = curve.proxy[-1] - curve.proxy[0]
                lines.append(f"  {curve.kind}: {oracle}; proxy {gained:+.2f} spreads, gap {curve.gap[-1]:.2f}")
        return "\n".join([*lines, f"report: {self.out / 'report.html'}"])


def audit(
    source: str | Path,
    scorers: str | Sequence[str | Scorer],
    out: str | Path,
    *,
    format: str = "auto",
    limit: int | None = None,
    optimise: bool = False,
    prompts: str | Path | Sequence[str] = "testbed:dev",
    prompt_count: int = 32,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    progress: bool = True,
) -> Audit:
    """Try scorers on preferences that they were not trained on; write audit.json and report.html.

    Args:
        source: preference data of any format that the scorers were not trained on, or `testbed:pairs`.
        scorers: their specs, such as `pickscore` or `trained:FOLDER`.
        out: folder for audit.json and report.html.
        format: format of the source; `auto` detects it.
        limit: use only the first so many groups.
        optimise: on the testbed, optimise each scorer over drawn images of `prompt_count` of the `prompts`, and by its
            gradient where it has one, and ask the oracle what became of them.
        prompts, prompt_count: what `optimise` draws images of: a text file or `testbed:dev`, and how many of its
            prompts.
        seed: seed of the drawn images.
        batch_size: images at a time.
        device: such as cpu or cuda:1 (default: the GPU if there is one).

    Raises:
        UserError: data, scorers or prompts that cannot be used.
    """
    check_options(batch_size=batch_size, prompt_count=prompt_count, limit=limit)
    place, folder = pick_device(device), Path(out).expanduser()
    asked = resolve_prompts(prompts)[:prompt_count] if optimise else []
    for prompt in asked:
        _kind(prompt, strict=True)
    if folder.is_file():
        raise UserError(f"{out}: is a file; expected a folder")
    built = [scorer.to(place) for scorer in build_scorers(scorers)]
    with output_lock(folder):
        data = open_preferences(str(source), folder, format=format, limit=limit, progress=progress)
        if not any(_pairs(data, row) for row in range(len(data))):
            raise UserError(f"{source}: only ties in it; an audit needs candidates of which one is preferred")
        if reason := next(filter(None, (unscorable(built, prompt) for prompt in data.prompts)), None):
            raise UserError(f"{source}: {reason}")
        scores, sharpness = _score(data, built, batch_size, progress)
        rows = list(range(len(data)))
        kinds = slices(data, sharpness)
        labels, texts = list(data.labels), list(data.prompts)

        def accuracy_of(name: str, chosen: Sequence[int]) -> Accuracy:
            return measure(torch.cat([scores[name][row] for row in chosen]), [labels[row] for row in chosen],
                           [texts[row] for row in chosen])  # fmt: skip

        names = [scorer.name for scorer in built]
        curves = {scorer.name: _curves(scorer, asked, seed, batch_size) for scorer in built} if optimise else {}
        result = Audit(
            out=folder,
            versions={scorer.name: scorer.version for scorer in built},
            accuracy={name: accuracy_of(name, rows) for name in names},
            slices={
                name: {
                    kind: {value: accuracy_of(name, chosen) for value, chosen in by_value.items()}
                    for kind, by_value in kinds.items()
                }
                for name in names
            },
            calibration={name: calibrate(scores[name], labels, texts) for name in names},
            names=[*names, "labels"],
            agreement=agreement([*(scores[name] for name in names), labels]),
            curves=curves,
        )
        write_json(folder / "audit.json", _plain(dataclasses.asdict(dataclasses.replace(result, out=folder))))
        write_text(folder / "report.html", _render(result, str(source), len(data)))
        return result


def slices(data: Preferences, sharpness: NDArray) -> Slices:
    """Rows by what may make a difference; slices of too few pairs are left out."""
    words = np.array([len(prompt.split()) for prompt in data.prompts])
    kinds: dict[str, list[str]] = {
        "prompt length": _thirds(words, "words"),
        "image quality": _thirds(sharpness, "sharpness"),
        "prompt kind": [_kind(prompt) for prompt in data.prompts],
        "candidates": [str(len(label)) for label in data.labels],
    }
    if any(user != NO_USER for user in data.users):
        known, counts = np.unique(list(data.users), return_counts=True)
        shown = set(known[np.argsort(-counts)][:MOST_USERS])
        kinds["annotator"] = [user if user in shown else "others" for user in data.users]
    shown_slices: Slices = {}
    for kind, values in kinds.items():
        of: dict[str, list[int]] = {}
        for row, value in enumerate(values):
            of.setdefault(value, []).append(row)
        large = {v: rows for v, rows in sorted(of.items()) if sum(_pairs(data, row) for row in rows) >= FEWEST}
        if len(large) > 1:
            shown_slices[kind] = large
    return shown_slices


def calibrate(scores: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], prompts: Sequence[str]) -> Calibration:
    """Fit the one scale of Bradley-Terry on half of the prompts and see what its chances are worth on the others."""
    gaps: dict[bool, list[float]] = {True: [], False: []}
    for r, label, prompt in zip(scores, labels, prompts, strict=True):
        side = stable_seed("calibration", prompt) % 2 == 0
        gaps[side] += [float(r[i] - r[j]) for i, j in pairs(label)]
    fitted, tried = (np.array(gaps[side]) for side in (True, False))
    if len(fitted) < FEWEST or len(tried) < FEWEST:
        return Calibration(scale=float("nan"), bins=[], error=float("nan"), loss=float("nan"))
    spread = max(float(np.abs(fitted).mean()), 1e-12)

    def loss(log_scale: float) -> float:
        return float(np.logaddexp(0, -np.exp(log_scale) * fitted / spread).mean())

    scale = float(np.exp(minimize_scalar(loss, bounds=(-8, 8), method="bounded").x)) / spread
    chance = 1 / (1 + np.exp(-np.clip(scale * tried, -50, 50)))
    sure, right = np.maximum(chance, 1 - chance), (tried > 0) + 0.5 * (tried == 0)
    edges = np.linspace(0.5, 1, BINS + 1)
    which = np.clip(np.digitize(sure, edges) - 1, 0, BINS - 1)
    bins = [
        (float(sure[which == b].mean()), float(right[which == b].mean()), int((which == b).sum()))
        for b in range(BINS)
        if (which == b).any()
    ]
    error = sum(abs(p - share) * count for p, share, count in bins) / len(tried)
    return Calibration(scale=scale, bins=bins, error=error, loss=float(np.logaddexp(0, -scale * tried).mean()))


def agreement(judges: Sequence[Sequence[torch.Tensor]]) -> list[list[float]]:
    """Of the pairs that both tell apart, the share that two judges order alike, by judge and judge."""
    signs = []
    for judge in judges:
        pairs_of_groups = [torch.combinations(values) for values in judge]  # [pairs, 2] each
        signs.append(torch.cat([pair[:, 0] - pair[:, 1] for pair in pairs_of_groups]).sign())
    decided = [[(one != 0) & (other != 0) for other in signs] for one in signs]
    return [
        [float((one[both] == other[both]).float().mean()) for other, both in zip(signs, row, strict=True)]
        for one, row in zip(signs, decided, strict=True)
    ]


def _score(
    data: Preferences, scorers: Sequence[Scorer], batch_size: int, progress: bool
) -> tuple[dict[str, list[torch.Tensor]], NDArray]:
    """Scores of each group's candidates by scorer, and the sharpness of each group's images."""
    counts = [len(label) for label in data.labels]
    flat: dict[str, list[torch.Tensor]] = {scorer.name: [] for scorer in scorers}
    sharpness: list[float] = []
    for rows, images in data.batches(batch_size, "audit", progress):
        texts = [data.prompts[row] for row in rows for _ in range(counts[row])]
        for scorer in scorers:
            with memory_for(len(images)):
                flat[scorer.name].append(scorer.score_images(images, texts).cpu())
        sharpness += map(_sharpness, images)
    scores = {name: list(torch.cat(parts).split(counts)) for name, parts in flat.items()}
    for name, groups in scores.items():
        bad = next((row for row, values in enumerate(groups) if not bool(values.isfinite().all())), None)
        if bad is not None:
            raise UserError(f"{name}: group {data.ids[bad]}: scores are not finite: {groups[bad].tolist()}")
    return scores, np.array([values.mean() for values in np.split(sharpness, np.cumsum(counts)[:-1])])


def _curves(scorer: Scorer, prompts: Sequence[str], seed: int, batch_size: int) -> list[Any]:
    from t2i_align.reward_models import optimise

    pool = optimise.draw_pool(prompts, seed=seed)
    curves = [optimise.best_of_n_curve(scorer, pool, max(batch_size, 64))]
    if scorer.differentiable:
        curves.append(optimise.ascent_curve(scorer, pool, max(batch_size, 32)))
    return curves


def _sharpness(image: Image.Image) -> float:
    """Mean absolute second difference of the grey image at 256 pixels: low where it is blurred or empty."""
    grey = np.asarray(image.convert("L").resize((256, 256), Image.Resampling.BILINEAR), float) / 255
    return float(np.abs(np.diff(grey, 2, axis=0)).mean() + np.abs(np.diff(grey, 2, axis=1)).mean())


def _thirds(values: NDArray, unit: str) -> list[str]:
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    shown: Callable[[float], str] = "{:.3g}".format
    names = [
        f"low (to {shown(low)} {unit})",
        f"middle (to {shown(high)} {unit})",
        f"upper (above {shown(high)} {unit})",
    ]
    return [names[int(value > low) + int(value > high)] for value in values]


def _kind(prompt: str, strict: bool = False) -> str:
    """On the testbed what the prompt is about; elsewhere there is one kind, or when `strict` a UserError."""
    from t2i_align.testbed.captions import CaptionError, parse

    try:
        statement = parse(prompt)
    except CaptionError as error:
        if strict:
            raise UserError(f"optimise: the truth is known on the testbed only: {error}") from error
        return "any"
    return "relation" if statement.relation else {1: "single"}.get(statement.count, "several")


def _pairs(data: Preferences, row: int) -> int:
    return len(list(pairs(data.labels[row])))


def _plain(value: Any) -> Any:
    """As JSON holds it: NaN is null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return number(value) if isinstance(value, float) else str(value) if isinstance(value, Path) else value


def _render(result: Audit, source: str, groups: int) -> str:
    from t2i_align.evaluation.report import ENVIRONMENT

    plots = {}
    for name in result.accuracy:
        curves = result.curves.get(name, [])
        plots[name] = {
            "calibration": reliability_plot(result.calibration[name].bins),
            "curves": [(curve, line_plot(curve)) for curve in curves],
        }
    template = ENVIRONMENT.get_template("audit.html.jinja")
    return template.render(result=result, source=source, groups=groups, plots=plots)
