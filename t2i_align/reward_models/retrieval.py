"""`t2i-align retrieval`: does a CLIP-style scorer find a long caption's image, with and without the common direction?

    whole        the text tower's own encoding of the caption, cut where it is too long
    sentences    P, the mean of the unit features of its sentences
    without V    P - (P V) V, what of P is relevant to the text (Denscore; LongAlign, arXiv 2410.11817)

R@1: of all images the caption's own fits it best (`to image`), of all captions the image's own (`to text`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from t2i_align.errors import UserError
from t2i_align.evaluation.result import plain
from t2i_align.evaluation.stats import Interval, interval
from t2i_align.inference.options import build_scorers, check_options, memory_for, pick_device
from t2i_align.labeling.score import candidates
from t2i_align.utils.files import check_own, json_text, mark, write_text

if TYPE_CHECKING:
    from reward_scorers import Scorer
    from reward_scorers.towers import TwoTowers


@dataclass(frozen=True, kw_only=True)
class Recall:
    """A share of captions or images that find their own, with its 95 % interval over other ones."""

    recall: float
    interval: Interval

    def __str__(self) -> str:
        return f"{self.recall:.1%} [{self.interval[0]:.1%}, {self.interval[1]:.1%}]"


def retrieval(
    images: str | Path,
    scorers: str | Sequence[str | Scorer],
    out: str | Path | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Recall]:
    """Measure R@1 of captions and images; returns it by scorer, kind of text feature and direction.

    Args:
        images: what `score` takes; of preference data the best image of each prompt. A caption that occurs again is
            left out.
        scorers: CLIP-style ones, such as `pickscore`; `denscore:FILE.yaml` brings its own V, others take that of the
            captions.
        out: JSON file for the figures.
        limit: use only the first so many captions.
        batch_size: images at a time.
        device: such as cpu or cuda:1 (default: the GPU if there is one).

    Raises:
        UserError: a source, image or scorer that cannot be used, or fewer than two captions.
    """
    check_options(batch_size=batch_size, limit=limit)
    place, file = pick_device(device), out and Path(out).expanduser()
    if file:
        check_own("retrieval", file)
    built = [_towers(scorer.to(place)) for scorer in build_scorers(scorers)]
    found = list(candidates(images, best_first=True)[0])
    if errors := [candidate for candidate in found if candidate.error]:
        print(f"left out {len(errors)} that cannot be used, such as {errors[0].image}: {errors[0].error}")
    first = {candidate.prompt: candidate for candidate in reversed(found) if not candidate.error}
    chosen = list(islice(reversed(first.values()), limit))  # in the source's order
    if len(chosen) < 2:
        raise UserError(f"{images}: retrieval needs at least two captions with an image, found {len(chosen)}")
    captions, seen = [candidate.prompt for candidate in chosen], [list[Tensor]() for _ in built]
    with torch.no_grad(), memory_for(batch_size), tqdm(total=len(chosen), unit="img", disable=not progress) as bar:
        for start in range(0, len(chosen), batch_size):
            batch = [(candidate.image, candidate.load()) for candidate in chosen[start : start + batch_size]]
            for name, loaded in batch:
                if not isinstance(loaded, Image.Image):
                    why = loaded if isinstance(loaded, str) else "expected an image, found a clip"
                    raise UserError(f"{name}: {why}")
            for (_, towers, _), rows in zip(built, seen, strict=True):
                rows.append(towers.image_features([loaded for _, loaded in batch if isinstance(loaded, Image.Image)]))
            bar.update(len(batch))
        recalls = {}
        for (name, towers, direction), rows in zip(built, seen, strict=True):
            for kind, texts in text_kinds(towers, captions, direction).items():
                similar = (texts @ torch.cat(rows).T).double().cpu().numpy()
                for way, matrix in (("to image", similar), ("to text", similar.T)):
                    recalls[f"{name}, {kind}, {way}"] = recall(matrix)
    if file:
        settings = {"images": str(images), "captions": len(captions), "versions": {n: t.version for n, t, _ in built}}
        write_text(file, json_text({"": mark("retrieval"), **settings, "recall": plain(recalls)}))
    return recalls


def text_kinds(towers: TwoTowers, captions: Sequence[str], direction: Tensor | None) -> dict[str, Tensor]:
    """The kinds of text features (see the module), [N, D] each. direction: V; None is that of the captions."""
    from reward_scorers.denscore import text_features

    mean = text_features(towers, captions)
    common = normalize(mean.mean(0), dim=0) if direction is None else direction.to(mean)
    relevant = mean - (mean * common).sum(-1, keepdim=True) * common
    return {"whole": towers.text_features(captions), "sentences": mean, "without V": relevant}


def recall(similarities: np.ndarray) -> Recall:
    """R@1 of similarities [N, N] whose diagonal is right; of several that are best alike, one is drawn."""
    best = similarities == similarities.max(1, keepdims=True)
    hits = best.diagonal() / best.sum(1)
    own = np.arange(len(hits))
    return Recall(recall=float(hits.mean()), interval=interval(own, hits, np.ones_like(hits), share=True))


def _towers(scorer: Scorer) -> tuple[str, TwoTowers, Tensor | None]:
    """A scorer's name, its towers, and its V."""
    from reward_scorers.denscore import Denscore
    from reward_scorers.towers import TwoTowers

    towers, direction = (scorer.scorer, scorer.direction) if isinstance(scorer, Denscore) else (scorer, None)
    if not isinstance(towers, TwoTowers):
        raise UserError(f"scorers: retrieval takes CLIP-style scorers such as pickscore, found {scorer.name}")
    return scorer.name, towers, direction
