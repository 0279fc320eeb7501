"""The oracle: does the image show what its prompt states, and is it well made?

It sees pixels and the prompt only. Faithfulness is the share of stated attributes that hold; quality is sharpness x
contrast x smoothness; the reward is their weighted sum. It is the ground truth that aligned models are judged by, so
it is versioned and depends on no model. `clip_oracle` extends it to clips.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from t2i_align.testbed.captions import CHOICES, Phrase, Statement, parse
from t2i_align.testbed.scenes import SIDE, relation_between
from t2i_align.testbed.vision import Seen, View, look


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Float arrays [B] in [0, 1]; an attribute is NaN where the prompt does not state it.

    `strict` is 1 where every stated attribute holds. `views` is what the oracle saw of images.
    """

    reward: np.ndarray
    faithfulness: np.ndarray
    strict: np.ndarray
    quality: np.ndarray
    attributes: dict[str, np.ndarray]
    views: tuple[View, ...] = dataclasses.field(repr=False, default=())

    def columns(self) -> dict[str, np.ndarray]:
        """Everything that makes up the reward, by name."""
        return {"faithfulness": self.faithfulness, "quality": self.quality, "strict": self.strict, **self.attributes}


class Oracle:
    """Judges images against the prompts of this world."""

    version = "1.0"
    faithfulness_weight = 0.6  # in the reward; quality has the rest
    attributes: tuple[str, ...] = ("colour", "shape", "size", "relation", "count", "background")

    def judge(self, pixels: Tensor | np.ndarray, prompts: Sequence[str]) -> Verdict:
        """Judge images.

        Args:
            pixels: [B, 3, H, W] in [0, 1]; squares of another side are resized to 64.
            prompts: B captions of the testbed.

        Raises:
            ValueError: wrong shape, values outside [0, 1] or not finite, or another number of prompts than images.
            CaptionError: a prompt is not of this world.
        """
        statements = [parse(prompt) for prompt in prompts]
        views = views_of(pixels, len(statements))
        rows = [_check(view, statement) for view, statement in zip(views, statements, strict=True)]
        return Verdict(**self._grades(rows, qualities(views)), views=views)

    def _grades(self, rows: Sequence[Sequence[float]], quality: np.ndarray) -> dict[str, Any]:
        """The fields of a verdict, from the share [0, 1] to which each attribute holds and the quality [B]."""
        held = np.array(rows, float).reshape(-1, len(self.attributes))
        faithfulness = np.nanmean(held, axis=1) if len(held) else np.zeros(0)
        weight = self.faithfulness_weight
        return {
            "reward": weight * faithfulness + (1.0 - weight) * quality,
            "faithfulness": faithfulness,
            "strict": np.where(np.isnan(held), 1.0, held == 1.0).min(axis=1, initial=1.0),
            "quality": quality,
            "attributes": dict(zip(self.attributes, held.T, strict=True)),
        }


def views_of(pixels: Tensor | np.ndarray, number: int) -> tuple[View, ...]:
    """What so many images [B, 3, H, W] show; ValueError as of `Oracle.judge`."""
    images = to_images(pixels, number)
    return tuple(view for start in range(0, number, 64) for view in look(images[start : start + 64]))


def qualities(views: Sequence[View]) -> np.ndarray:
    """`image_quality` of each, [B]."""
    return np.array([image_quality(view) for view in views], float)


def to_images(pixels: Tensor | np.ndarray, number: int) -> np.ndarray:
    """Checked float32 [B, 64, 64, 3]."""
    images = torch.as_tensor(pixels).detach().cpu()
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"pixels must be square images [B, 3, H, H], not {tuple(images.shape)}")
    if len(images) != number:
        raise ValueError(f"{len(images)} images but {number} prompts")
    if not images.is_floating_point():
        raise ValueError(f"pixels must be floats in [0, 1], not {images.dtype}")
    images = images.float()
    if not bool(torch.isfinite(images).all()) or (images.numel() and (images.min() < -1e-3 or images.max() > 1.001)):
        raise ValueError("pixels must be finite and lie in [0, 1]")
    if images.shape[-1] != SIDE:
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    return images.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()


def likeness(phrase: Phrase, item: Seen) -> float:
    """How much of a phrase's colour, shape and size an object has; shape decides ties."""
    size = phrase.size in (None, item.size)
    return (phrase.colour == item.colour) + 1.1 * (phrase.shape == item.shape) + 0.5 * size


def assign(
    objects: Sequence[Seen], number: int, most: int, score: Callable[[Sequence[Seen | None]], float]
) -> tuple[Seen | None, ...]:
    """The choice of objects for `number` stated ones with the best score; None for a stated one without an object.

    The biggest `most` are tried: more objects than that are wrong in any case.
    """
    candidates: list[Seen | None] = [*sorted(objects, key=lambda o: -o.radius)[:most]]
    candidates += [None] * (number - len(candidates))
    return max(itertools.permutations(candidates, number), key=score)


def relation_holds(statement: Statement, chosen: Sequence[Seen | None]) -> bool:
    """Whether the first two of the chosen objects are there and stand to each other as stated."""
    if statement.relation is None or chosen[0] is None or chosen[1] is None:
        return False
    return relation_between(chosen[0].x - chosen[1].x, chosen[0].y - chosen[1].y) == statement.relation


def _check(view: View, statement: Statement) -> list[float]:
    """One value per attribute: the share of phrases for which it holds, NaN where nothing is stated.

    Objects are assigned to phrases so that most of colour, shape, size and relation hold. A phrase is judged on its
    objects; a phrase without any holds in nothing. Of "three circles" with one missing only the count is wrong.
    """
    wanted = [phrase for phrase in statement.phrases for _ in range(phrase.number)]

    def score(chosen: Sequence[Seen | None]) -> float:
        looks = sum(likeness(phrase, item) for phrase, item in zip(wanted, chosen, strict=True) if item is not None)
        # Where exchanged colours leave it open which object is meant, relation and shape decide.
        return looks + 0.5 * relation_holds(statement, chosen)

    chosen = assign(view.objects, len(wanted), 6, score)
    held: list[tuple[str, float]] = [("count", len(view.objects) == statement.count)]
    for phrase in statement.phrases:
        seen = [item for other, item in zip(wanted, chosen, strict=True) if other is phrase and item is not None]
        for name in CHOICES:
            if stated := getattr(phrase, name):
                held.append((name, float(np.mean([getattr(o, name) == stated for o in seen])) if seen else 0.0))
    if statement.relation:
        held.append(("relation", relation_holds(statement, chosen)))
    if statement.background:
        held.append(("background", view.background == statement.background))
    return shares(Oracle.attributes, held)


def shares(attributes: Sequence[str], held: Sequence[tuple[str, float]]) -> list[float]:
    """The mean of the values of each attribute, NaN where it has none."""
    values = {name: [value for other, value in held if other == name] for name in attributes}
    return [float(np.mean(values[name])) if values[name] else np.nan for name in attributes]


def fall(value: float, good: float, bad: float) -> float:
    """1 up to `good`, falling linearly to 0 at `bad`."""
    return float(np.clip((bad - value) / (bad - good), 0.0, 1.0))


def image_quality(view: View) -> float:
    """Sharpness x contrast x smoothness, 0 for an image without objects.

    The limits leave the autoencoder's own softness (edge up to 0.30, roughness under 0.01) unpunished.
    """
    if not view.objects:
        return 0.0
    sharpness = float(np.mean([fall(o.edge, 0.30, 0.80) for o in view.objects]))
    contrast = float(np.mean([fall(-o.chroma, -0.90, -0.30) for o in view.objects]))
    return sharpness * contrast * fall(view.roughness, 0.02, 0.12)
