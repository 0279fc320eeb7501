"""The contract of a scorer: images and their prompts in, one number per image out."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from reward_scorers.errors import ScorerError
from reward_scorers.images import DECODER, in_threads, to_pixels, to_rgb

logger = logging.getLogger(__name__)
Judgement = tuple[Tensor, dict[str, Tensor]]  # scores [B], and their parts by name, [B] each
Media = Tensor | Sequence[Image.Image]  # pixels [B, 3, H, W], clips [B, F, 3, H, W], or PIL images
AnyScorer = TypeVar("AnyScorer", bound="Scorer")

# Interpolation and autocast leave a decoded image slightly outside of [0, 1]; an image in [-1, 1] is far outside.
RANGE_TOLERANCE = 1e-3
FRAME_BATCH = 32  # frames of clips that are preprocessed, and go through an image's network, at a time


class Scorer(ABC):
    """Scores images or clips against prompts; a subclass fills in `rate`, everything else is derived.

    Attributes:
        name: unique among scorers that are used together; recorded with every score.
        version: changes whenever the numbers do (weights, code, preprocessing); see `recorded_version`.
        differentiable: whether gradients of `score` reach the pixels.
        tie_margin: differences up to this size are no preference (in units of the score).
        token_limit: to which prompts are cut, if they are.
        takes: what `rate` gets at once: images (of a clip each frame, and the clip's score is their mean), whole
            clips of at least `min_frames`, or, where other scorers do the work, the media as given.
        preprocess: to the input of `rate`: an RGB image to [C, h, w], or pixels [B, 3, H, W] to [B, C, h, w]
            differentiably. Default: 8 bits to [0, 1], without resizing.
    """

    name: str
    version: str
    differentiable: bool = False
    tie_margin: float = 0.0
    token_limit: int | None = None
    takes: ClassVar[Literal["images", "clips", "media"]] = "images"
    min_frames: ClassVar[int] = 1
    preprocess: Callable[[Any], Tensor] = staticmethod(to_pixels)

    # What a scorer fills in -------------------------------------------------------------------------------------

    @abstractmethod
    def rate(self, inputs: Any, prompts: Sequence[str]) -> Tensor | Judgement:
        """Scores [B], with parts where there are any (NaN where one does not apply).

        Args:
            inputs: what `preprocess` returned, [B, C, h, w] on `device`; for a scorer of clips [B, F, C, h, w].
            prompts: one per image or clip.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027  (most scorers take any text)
        """Raise ScorerError for a prompt that this scorer cannot judge; called before images are generated for it."""

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts are longer than `token_limit`."""
        return [False] * len(prompts)

    @property
    def networks(self) -> list[nn.Module | Scorer]:
        """What `to` moves. Default: the modules and scorers among the attributes, and in lists of them."""
        attributes = [item for value in vars(self).values() for item in (value if isinstance(value, list) else [value])]
        return [item for item in attributes if isinstance(item, nn.Module | Scorer)]

    # What is derived --------------------------------------------------------------------------------------------

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] float32 of pixels [B, 3, H, W] in [0, 1]; clips [B, F, 3, H, W] get the mean over their frames.

        Raises:
            ScorerError: shapes, lengths, range or prompts that cannot be scored.
        """
        return self.judge(pixels, prompts)[0]

    def frame_scores(self, clips: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B, F] of the frames of clips [B, F, 3, H, W], each judged as an image.

        Raises:
            ScorerError: as `score`; or a scorer whose scores are of whole clips.
        """
        check_pixels(clips, prompts)
        if clips.ndim != 5 or self.takes != "images":
            whole = f"{self.name} judges whole clips" if self.takes != "images" else f"found {list(clips.shape)}"
            raise ScorerError(f"scores of frames: expected clips [B, F, 3, H, W] and a scorer of images; {whole}")
        self._note_cut(prompts)
        return self._judge_frames(clips, prompts)[0]

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores [B] of PIL images of any sizes and modes, through the original's exact preprocessing."""
        return self.judge(images, prompts)[0]

    def judge(self, media: Media, prompts: Sequence[str]) -> Judgement:
        """Scores and their parts of pixels, clips or PIL images; gradients flow to pixels and clips."""
        if isinstance(media, Tensor):
            check_pixels(media, prompts)
            self._note_cut(prompts)
            return self._judge_pixels(media, prompts)
        images = rgb_images(media, prompts)
        self._note_cut(prompts)
        with torch.no_grad():
            return self._judge_images(images, prompts)

    @cached_property
    def cut(self) -> set[str]:
        """The prompts so far that were longer than `token_limit`, so that their ends did not count."""
        return set()

    def _note_cut(self, prompts: Sequence[str]) -> None:
        if self.token_limit is None:
            return
        # A token is a byte at least, and two mark beginning and end.
        long = [p for p in dict.fromkeys(prompts) if len(p.encode()) + 2 > self.token_limit and p not in self.cut]
        new = [prompt for prompt, cut in zip(long, self.is_cut(long) if long else [], strict=True) if cut]
        if new and not self.cut:
            logger.warning(
                "%s: prompts of more than %d tokens are cut, such as %.60r", self.name, self.token_limit, new[0]
            )
        self.cut.update(new)

    @property
    def recorded_version(self) -> str:
        """`version`, and what else decides the numbers: autocast where it is on, and how images are decoded."""
        kinds = (kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(kind))
        rounding = "".join(f", {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')} autocast" for kind in kinds)
        return f"{self.version}{rounding}, {DECODER}"

    @property
    def device(self) -> torch.device:
        """Where the networks are; the CPU where there are none."""
        return torch.device("cpu") if self._parameter is None else self._parameter.device

    def to(self: AnyScorer, device: torch.device | str) -> AnyScorer:
        """Move the networks, if there are any. Returns itself."""
        for network in self.networks:
            network.to(device)
        return self

    @property
    def _parameter(self) -> Tensor | None:
        """A parameter of the first network, whose device and precision the inputs take."""
        for network in self.networks:
            return network._parameter if isinstance(network, Scorer) else next(network.parameters())
        return None

    def _placed(self, inputs: Tensor) -> Tensor:
        """On the networks' device, in single precision or the networks' own if that is higher."""
        like = inputs if self._parameter is None else self._parameter
        return inputs.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def _judge_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Judgement:
        if self.takes == "media":
            return self._judgement(pixels, prompts)
        if self.takes == "clips" and (pixels.ndim != 5 or pixels.shape[1] < self.min_frames):
            wanted = f"clips [B, F, 3, H, W] of {self.min_frames} frames or more"
            raise ScorerError(f"{self.name}: expected {wanted}, found {list(pixels.shape)}")
        if self.takes == "clips":
            parts = pixels.flatten(0, 1).split(FRAME_BATCH)
            inputs = torch.cat([self.preprocess(self._placed(part)) for part in parts])
            return self._judgement(inputs.unflatten(0, pixels.shape[:2]), prompts)
        if pixels.ndim == 4:
            return self._judgement(self.preprocess(self._placed(pixels)), prompts)
        total, columns = self._judge_frames(pixels, prompts)
        # A part may apply to some frames only, hence nanmean; a NaN score has to stay one.
        return total.mean(1), {name: part.nanmean(1) for name, part in columns.items()}

    def _judge_frames(self, clips: Tensor, prompts: Sequence[str]) -> Judgement:
        """Scores [B, F] and parts [B, F] of the frames of clips, of which `FRAME_BATCH` are in memory at a time."""
        frames, texts = clips.flatten(0, 1), [prompt for prompt in prompts for _ in range(clips.shape[1])]
        judged = [
            self._judgement(self.preprocess(self._placed(part)), texts[start : start + FRAME_BATCH])
            for start, part in zip(range(0, len(frames), FRAME_BATCH), frames.split(FRAME_BATCH), strict=True)
        ]
        total, columns = joined(judged)
        return total.unflatten(0, clips.shape[:2]), {
            n: part.unflatten(0, clips.shape[:2]) for n, part in columns.items()
        }

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        if self.takes == "media":
            return self._judgement(images, prompts)
        if self.takes == "clips":
            raise ScorerError(f"{self.name}: judges clips, found single images")
        inputs = in_threads(self.preprocess, images)
        order = sorted(range(len(inputs)), key=lambda row: inputs[row].shape)
        judged = []
        for _, same_shape in groupby(order, key=lambda row: inputs[row].shape):
            rows = list(same_shape)
            batch = self._placed(torch.stack([inputs[row] for row in rows]))
            judged.append(self._judgement(batch, [prompts[row] for row in rows]))
        place = torch.tensor(order).argsort()
        total, columns = joined(judged)
        return total[place], {name: part[place] for name, part in columns.items()}

    def _judgement(self, inputs: Any, prompts: Sequence[str]) -> Judgement:
        """`rate`, with parts, in single precision at least, its shapes checked."""
        scores = self.rate(inputs, list(prompts))
        if not isinstance(scores, Tensor | tuple):
            kind = type(scores).__name__
            raise ScorerError(
                f"{self.name}: `rate` must return a tensor [{len(prompts)}], or that and parts, found {kind}"
            )
        total, parts = (scores, {}) if isinstance(scores, Tensor) else scores
        for name, values in {"the score": total, **parts}.items():
            if values.shape != (len(prompts),):
                raise ScorerError(f"{self.name}: {name}: expected shape [{len(prompts)}], found {list(values.shape)}")
        return single(total), {name: single(part) for name, part in parts.items()}


def joined(judged: Sequence[Judgement]) -> Judgement:
    """Judgements of batches as one; a part that a batch does not have is NaN there."""
    names = dict.fromkeys(name for _, parts in judged for name in parts)
    columns = {
        name: torch.cat([parts.get(name, torch.full_like(total, math.nan)) for total, parts in judged])
        for name in names
    }
    return torch.cat([total for total, _ in judged]), columns


def single(values: Tensor) -> Tensor:
    """In single precision, or in double where it was that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_pixels(pixels: Tensor, prompts: Sequence[str]) -> None:
    """Raise ScorerError unless pixels [B, 3, H, W] or clips [B, F, 3, H, W] in [0, 1] and prompts can be scored."""
    if not pixels.is_floating_point():
        raise ScorerError(f"pixels: expected a floating-point tensor in [0, 1], found {pixels.dtype}")
    if pixels.ndim not in (4, 5) or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ScorerError(f"pixels: expected [B, 3, H, W] or [B, F, 3, H, W], found {list(pixels.shape)}")
    check_texts(prompts, len(pixels))
    low, high = (float(value) for value in torch.stack(pixels.detach().aminmax()).float())
    if math.isnan(low) or math.isnan(high):  # aminmax hands a NaN on
        bad = [row for row, image in enumerate(pixels.detach().flatten(1)) if not image.isfinite().all()]
        raise ScorerError(f"pixels: rows {bad} hold NaN or infinite values")
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ScorerError(f"pixels: expected values in [0, 1], found [{low:.4g}, {high:.4g}]")


def rgb_images(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    """`to_rgb` of each; raises ScorerError naming the image or prompt that cannot be scored."""
    kind = "none" if hasattr(images, "__len__") else type(images).__name__
    if kind != "none" or not len(images):
        raise ScorerError(f"images: expected a list of PIL images, found {kind}")
    check_texts(prompts, len(images))

    def decoded(row: int) -> Image.Image:
        if not isinstance(images[row], Image.Image):
            raise ScorerError(f"images[{row}]: expected a PIL image, found {type(images[row]).__name__}")
        try:
            return to_rgb(images[row])
        except ScorerError as error:
            raise ScorerError(f"images[{row}]: {error}") from error

    return in_threads(decoded, range(len(images)))


def check_texts(prompts: Sequence[str], count: int) -> None:
    """Raise ScorerError unless there are `count` prompts, each a string with something in it."""
    listed = hasattr(prompts, "__len__") and not isinstance(prompts, str)
    if not listed or len(prompts) != count:
        kind = f"{len(prompts)} prompts" if listed else repr(prompts)
        raise ScorerError(f"prompts: expected a list of {count}, one per image, found {kind}")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ScorerError(f"prompts[{row}]: expected text, found {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # which tokenizers refuse
            raise ScorerError(f"prompts[{row}]: not valid Unicode text: {prompt!r}") from error
