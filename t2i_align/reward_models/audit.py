"""`t2i-align audit-scorer`: how far scorers can be trusted, before anything is optimised against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import expit

from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.evaluation.result import plain
from t2i_align.inference.generate import TOTAL, judge
from t2i_align.inference.options import (
    build_scorers,
    check_options,
    memory_for,
    pick_device,
    resolve_prompts,
    unscorable,
)
from t2i_align.reward_models.losses import Accuracy, measure, winner_gaps
from t2i_align.reward_models.optimise import Curve, curves, draw_pool
from t2i_align.reward_models.preferences import NO_USER, Preferences, open_preferences
from t2i_align.testbed.captions import CaptionError, parse
from t2i_align.utils import html
from t2i_align.utils.files import check_own, json_text, output_lock, write_files
from t2i_align.utils.logging import silent

if TYPE_CHECKING:
    from reward_scorers import Scorer

REPORT, AUDIT = "report.html", "audit.json"
BINS = 8  # of calibration
FEWEST = 20  # pairs; a smaller slice is not shown
MOST_USERS = 12  # annotators shown, those with the most pairs
Scores = dict[str, list[torch.Tensor]]  # by scorer: of each group's candidates [k]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """P(first preferred) = σ(s Δ), s fitted on half of the prompts and evaluated on the others.

    bins: (mean predicted, share right, pairs) from the predicted winner's side, so in [0.5, 1]. error: the expected
    calibration error. loss: log loss in nats; log 2 is that of a constant ½.
    """

    scale: float
    bins: list[tuple[float, float, int]]
    error: float
    loss: float

    def __str__(self) -> str:
        if not self.bins:
            return f"calibration unknown (fewer than {FEWEST} pairs in a half)"
        return f"calibration error {self.error:.3f}, log loss {self.loss:.3f}"


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Content of `audit.json` and the report, by scorer. agreement: of names with names, shares of pairs."""

    out: Path
    versions: dict[str, str]
    accuracy: dict[str, Accuracy]
    slices: dict[str, dict[str, dict[str, Accuracy]]]
    calibration: dict[str, Calibration]
    names: list[str]
    agreement: list[list[float]]
    curves: dict[str, list[Curve]]

    def __repr__(self) -> str:
        return f"Audit({', '.join(f'{name}: {accuracy}' for name, accuracy in self.accuracy.items())}, {self.out})"

    def _repr_html_(self) -> str:
        return html.page((self.out / REPORT).read_text(encoding="utf-8"))

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = []
        for name, accuracy in self.accuracy.items():
            lines.append(f"{name}: {accuracy}; {self.calibration[name]}")
            for curve in self.curves.get(name, []):
                oracle = f"oracle {curve.oracle[0]:.3f} -> {curve.oracle[-1]:.3f}, best {max(curve.oracle):.3f}"
                gained = curve.proxy[-1] - curve.proxy[0]
                lines.append(f"  {curve.kind}: {oracle}; proxy {gained:+.2f} spreads, gap {curve.gap[-1]:.2f}")
        return "\n".join([*lines, f"report: {self.out / REPORT}"])


@silent
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
    """Evaluate scorers on preferences that they were not trained on; write audit.json and report.html.

    Args:
        source: preference data of any format that the scorers were not trained on, or `testbed:pairs`.
        scorers: their specs, such as `pickscore` or `trained:FOLDER`.
        out: folder for audit.json and report.html.
        format: format of the source; `auto` detects it.
        limit: use only the first so many groups.
        optimise: on the testbed, optimise each scorer over drawn images of `prompt_count` of the `prompts`, and by its
            gradient where it has one, and let the oracle judge the results.
        prompts, prompt_count: what `optimise` draws images of: a file or `testbed:dev`, and how many of its
            prompts.
        seed: seed of the drawn images.
        batch_size: images at a time.
        device: such as cpu or cuda:1 (default: the GPU if there is one).

    Raises:
        UserError: data, scorers or prompts that cannot be used.
    """
    check_options(batch_size=batch_size, prompt_count=prompt_count, limit=limit)
    place, folder = pick_device(device), Path(out).expanduser()
    drawn = resolve_prompts(prompts)[:prompt_count] if optimise else []
    for prompt in drawn:
        _kind(prompt, strict=True)
    if folder.is_file():
        raise UserError(f"{out}: is a file; expected a folder")
    check_own("audit-scorer", folder / REPORT, folder / AUDIT)
    built = [scorer.to(place) for scorer in build_scorers(scorers)]
    with output_lock(folder):
        data = open_preferences(str(source), folder, format=format, limit=limit, progress=progress)
        if not any(_pairs(data)):
            raise UserError(f"{source}: only ties in it; an audit needs candidates of which one is preferred")
        if reason := next(filter(None, (unscorable(built, prompt) for prompt in data.prompts)), None):
            raise UserError(f"{source}: {reason}")
        scores, sharpness = _score(data, built, batch_size, progress)
        kinds, pool = slices(data, sharpness), draw_pool(drawn, seed=seed) if optimise else None

        def accuracy(name: str, rows: Sequence[int] = range(len(data))) -> Accuracy:
            labels, texts = [data.labels[row] for row in rows], [data.prompts[row] for row in rows]
            return measure([scores[name][row] for row in rows], labels, texts)

        result = Audit(
            out=folder,
            versions={scorer.name: scorer.version for scorer in built},
            accuracy={name: accuracy(name) for name in scores},
            slices={
                name: {
                    kind: {value: accuracy(name, rows) for value, rows in by_value.items()}
                    for kind, by_value in kinds.items()
                }
                for name in scores
            },
            calibration={name: calibrate(groups, data.labels, data.prompts) for name, groups in scores.items()},
            names=[*scores, "labels"],
            agreement=agreement([*scores.values(), data.labels]),
            curves={scorer.name: curves(scorer, pool, batch_size) for scorer in built} if pool else {},
        )
        template = html.ENVIRONMENT.get_template("evaluation/audit.html.jinja")
        page = template.render(result=result, source=str(source), groups=len(data), enumerate=enumerate)
        write_files(folder, {REPORT: page, AUDIT: json_text(plain(result))})
        return result


def slices(data: Preferences, sharpness: NDArray) -> dict[str, dict[str, list[int]]]:
    """Rows by value of each property that may matter; slices of too few pairs are left out."""
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
    pairs = np.array(_pairs(data))
    large = {}
    for kind, values in kinds.items():
        rows = {value: np.flatnonzero(np.array(values) == value).tolist() for value in sorted(set(values))}
        large[kind] = {value: chosen for value, chosen in rows.items() if pairs[chosen].sum() >= FEWEST}
    return {kind: by_value for kind, by_value in large.items() if len(by_value) > 1}


def calibrate(scores: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], prompts: Sequence[str]) -> Calibration:
    """Fit the one scale of Bradley-Terry on half of the prompts and evaluate its probabilities on the others."""
    halves: tuple[list[float], list[float]] = ([], [])
    for r, label, prompt in zip(scores, labels, prompts, strict=True):
        halves[stable_seed("calibration", prompt) % 2].extend(winner_gaps(r, label).tolist())
    fitted, tested = map(np.array, halves)
    if len(fitted) < FEWEST or len(tested) < FEWEST:
        return Calibration(scale=float("nan"), bins=[], error=float("nan"), loss=float("nan"))
    spread = max(float(np.abs(fitted).mean()), 1e-12)

    def loss(log_scale: float) -> float:
        return float(np.logaddexp(0, -np.exp(log_scale) * fitted / spread).mean())

    scale = float(np.exp(minimize_scalar(loss, bounds=(-8, 8), method="bounded").x)) / spread
    chance = expit(scale * tested)
    sure, right = np.maximum(chance, 1 - chance), (tested > 0) + 0.5 * (tested == 0)
    edges = np.linspace(0.5, 1, BINS + 1)
    which = np.clip(np.digitize(sure, edges) - 1, 0, BINS - 1)
    bins = [
        (float(sure[which == b].mean()), float(right[which == b].mean()), int((which == b).sum()))
        for b in range(BINS)
        if (which == b).any()
    ]
    error = sum(abs(p - share) * count for p, share, count in bins) / len(tested)
    return Calibration(scale=scale, bins=bins, error=error, loss=float(np.logaddexp(0, -scale * tested).mean()))


def agreement(judges: Sequence[Sequence[torch.Tensor]]) -> list[list[float]]:
    """The share of pairs without a draw that two judges order alike, judge by judge: scores [k] of each group."""
    signs = []
    for groups in judges:
        pairs = torch.cat([torch.combinations(values) for values in groups])  # [pairs, 2]
        signs.append((pairs[:, 0] - pairs[:, 1]).sign())
    decided = [[(one != 0) & (other != 0) for other in signs] for one in signs]
    return [
        [float((one[both] == other[both]).float().mean()) for other, both in zip(signs, row, strict=True)]
        for one, row in zip(signs, decided, strict=True)
    ]


def _score(data: Preferences, scorers: Sequence[Scorer], batch_size: int, progress: bool) -> tuple[Scores, NDArray]:
    """Scores of each group's candidates, and the mean sharpness of each group's images."""
    counts = [len(label) for label in data.labels]
    flat: dict[str, list[float]] = {scorer.name: [] for scorer in scorers}
    sharpness: list[float] = []
    for rows, images in data.batches(batch_size, "audit", progress):
        texts = [data.prompts[row] for row in rows for _ in range(counts[row])]
        for scorer in scorers:
            with memory_for(len(images)):
                flat[scorer.name] += (parts[TOTAL] for _, parts in judge(scorer, images, texts))
        sharpness += map(_sharpness, images)
    scores = {name: list(torch.tensor(values, dtype=torch.float64).split(counts)) for name, values in flat.items()}
    for name, groups in scores.items():
        for row, values in enumerate(groups):
            if not bool(values.isfinite().all()):
                raise UserError(f"{name}: group {data.ids[row]}: scores are not finite: {values.tolist()}")
    return scores, np.array([values.mean() for values in np.split(sharpness, np.cumsum(counts)[:-1])])


def _sharpness(image: Image.Image) -> float:
    """Mean absolute second difference of the grey image at 256 pixels: low where it is blurred or empty."""
    grey = np.asarray(image.convert("L").resize((256, 256), Image.Resampling.BILINEAR), float) / 255
    return float(np.abs(np.diff(grey, 2, axis=0)).mean() + np.abs(np.diff(grey, 2, axis=1)).mean())


def _thirds(values: NDArray, unit: str) -> list[str]:
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    names = [f"low (to {low:.3g} {unit})", f"middle (to {high:.3g} {unit})", f"upper (above {high:.3g} {unit})"]
    return [names[int(value > low) + int(value > high)] for value in values]


def _kind(prompt: str, strict: bool = False) -> str:
    """On the testbed what the prompt states; elsewhere there is one kind, or when `strict` a UserError."""
    try:
        statement = parse(prompt)
    except CaptionError as error:
        if strict:
            raise UserError(f"optimise: the truth is known on the testbed only: {error}") from error
        return "any"
    return "relation" if statement.relation else {1: "single"}.get(statement.count, "several")


def _pairs(data: Preferences) -> list[int]:
    """How many pairs of each group have a winner."""
    return [len(winner_gaps(label, label)) for label in data.labels]
