"""What a store keeps of groups: candidates and texts through a pipeline's encoders, or candidates as they are."""

from __future__ import annotations

import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor
from tqdm.auto import tqdm

from t2i_align.data.batch import Conditioning
from t2i_align.data.media import ImageError, Loaded, MediaSize, decode, load, measure
from t2i_align.data.schema import Group, Media
from t2i_align.data.segments import unlabelled
from t2i_align.errors import UserError

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline
    from t2i_align.data.opening import Survey  # which builds on this module

SHARD_BYTES = 256 << 20  # what a shard may hold in memory while it is written
MAX_ROWS_PER_SHARD = 1024
BATCHES_AT_ONCE = 8  # between the last of these and the next ones, the encoder waits for images; clips go one by one
LEAST_AREA = 0.9  # of an aspect-ratio bucket, relative to the square's
Size = tuple[int, int]  # (height, width) in pixels
Row = dict[str, Any]


class Encoder(ABC):
    """What is stored of a group's candidates and texts, beside the columns that all groups have.

    columns: names and types of what `encode` adds to a row. text_columns: of a text, and of what `encode_texts` adds.
    rows_per_shard, rows_at_once: source rows in a shard, and of these, how many are encoded together.
    description: entries of the manifest.
    """

    columns: dict[str, pa.DataType]
    text_columns: dict[str, pa.DataType] = {"text": pa.string()}
    rows_per_shard: int
    rows_at_once: int
    description: dict[str, Any] = {}

    @abstractmethod
    def encode(self, groups: Sequence[Group]) -> list[Row | str]:
        """A row of `columns` for each group, or the reasons why there is none."""

    def encode_texts(self, texts: Sequence[str]) -> list[Row | None]:
        """A row of `text_columns` for each text; None where its encoding is not finite."""
        return [{"text": text} for text in texts]

    def text_keys(self, texts: Sequence[str]) -> Sequence[Hashable]:
        """A key for each text; equal where the encoder cannot tell two of them apart."""
        return texts


class Latents(Encoder):
    """Latents of candidates and conditioning of texts; see `Encoder`.

    Latents are float16; so are floats of the conditioning, unless the family asks for another dtype. Sequences whose
    length differs between prompts are kept at their own length, without their padding.

    Args:
        sizes: the (height, width) of the aspect-ratio buckets, or the only one.
        frames, fps: of clips; see `MediaSize`.
        batch_size: images that the VAE encodes at once; clips go one by one.
        texts_per_group: how many texts a group has at most, to estimate a row's size.

    Raises:
        PipelineError: the pipeline cannot take images or clips of such a size.
        UserError: the encoding of even the empty prompt is not finite in half precision.
    """

    def __init__(
        self,
        pipeline: TrainablePipeline,
        sizes: Sequence[Size],
        frames: int | None = None,
        fps: float | None = None,
        batch_size: int = 8,
        texts_per_group: int = 1,
    ) -> None:
        for size in sizes:
            pipeline.check_size(*size, frames)
        self.pipeline, self.sizes, self.frames, self.fps, self.batch_size = pipeline, sizes, frames, fps, batch_size
        largest = max(sizes, key=math.prod)
        blank = torch.zeros(1, *(() if frames is None else (frames,)), 3, *largest)
        self.latent_bytes = 2 * pipeline.encode_pixels(blank)[0].numel()
        (empty,) = self.encode_texts([""])
        if empty is None:
            raise UserError("the text encoder's output for the empty prompt is not finite in half precision")
        self.text_bytes = sum(map(len, empty.values()))
        self.columns = {"latents": pa.large_binary(), "shape": pa.list_(pa.int32()), "size": pa.list_(pa.int32())}
        if pipeline.size_conditioned:
            self.columns["sizes"] = pa.list_(pa.int32())  # height and width of each candidate in turn
        self.text_columns = {**dict.fromkeys(empty, pa.large_binary()), "text": pa.string()}
        row_bytes = 2 * self.latent_bytes + texts_per_group * self.text_bytes
        self.rows_per_shard = max(1, min(MAX_ROWS_PER_SHARD, SHARD_BYTES // row_bytes))
        self.rows_at_once = max(1, batch_size) * (BATCHES_AT_ONCE if frames is None else 1)
        self.times = latent_times(pipeline, frames, fps)
        self.description = {"frames": frames, "fps": fps, "conditioning": self.layout, "latent_times": self.times}
        self._threads = ThreadPoolExecutor(os.cpu_count())

    def check_space(self, out: Path, survey: Survey) -> None:
        """Raise UserError where a store at `out`, less what is there of it, is not expected to fit on the disk."""
        needed = sum(k * count for k, count in survey.candidates.items()) * self.latent_bytes
        needed += (min(len(survey.texts), survey.groups * survey.texts_per_group) + 1) * self.text_bytes
        stored = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.exists() else 0
        check_space(out, needed - stored, "Choose another folder with data.cache_dir, a smaller data.limit or "
                    "data.resolution, or data.cache=false.")  # fmt: skip

    def encode(self, groups: Sequence[Group]) -> list[Row | str]:
        """Each group at the size of its bucket, or the reasons why it cannot be used."""
        sizes = list(self._threads.map(self._size, groups))
        results = iter(self._encode_media([
            (media, size) for group, size in zip(groups, sizes, strict=True) for media in group.candidates
        ]))  # fmt: skip
        return [
            # One result per candidate, good or bad: an image that fails cannot shift its neighbours.
            self._row(group, size, list(islice(results, len(group.candidates))))
            for group, size in zip(groups, sizes, strict=True)
        ]

    def encode_texts(self, texts: Sequence[str]) -> list[Row | None]:
        """The stored bytes of each text's conditioning by column; None where it is not finite in its dtype."""
        parts = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        return [row for part in parts for row in self._text_rows(part)]

    def text_keys(self, texts: Sequence[str]) -> Sequence[Hashable]:
        return self.pipeline.tokens_read(texts)

    def _row(self, group: Group, size: MediaSize, results: Sequence[tuple[Tensor, Size] | str]) -> Row | str:
        if reasons := _reasons(results) or (unlabelled(group, self.times) if group.segment_scores else ""):
            return reasons
        latents, originals = zip(*results, strict=True)
        content = b"".join(one.numpy().tobytes() for one in latents)
        row: Row = {"latents": content, "size": size[:2], "shape": latents[0].shape}
        if "sizes" in self.columns:
            row["sizes"] = [side for original in originals for side in original]
        return row

    def _size(self, group: Group) -> MediaSize:
        """That of the bucket nearest to the images' aspect ratios; a square where one of them cannot be measured."""
        bucket = 0
        if len(self.sizes) > 1:
            measured = [size for media in group.candidates if (size := measure(media))]
            bucket = nearest(measured if len(measured) == len(group.candidates) else [(1, 1)], self.sizes)
        return MediaSize(*self.sizes[bucket], self.frames, self.fps)

    def _encode_media(self, media: Sequence[tuple[Media, MediaSize]]) -> list[tuple[Tensor, Size] | str]:
        """The latents and original size of each image or clip, or the reason why there are none."""
        by_size: dict[MediaSize, list[int]] = {}
        for place, (_, size) in enumerate(media):
            by_size.setdefault(size, []).append(place)
        step = self.batch_size if self.frames is None else 1
        chunks = [places[start : start + step] for places in by_size.values() for start in range(0, len(places), step)]
        out: dict[int, tuple[Tensor, Size] | str] = {}
        decoded = self._decoded([[media[place] for place in places] for places in chunks])
        for places, results in zip(chunks, decoded, strict=True):
            pixels = [result.pixels for result in results if isinstance(result, Loaded)]
            latents = iter(self.pipeline.encode_pixels(torch.stack(pixels)).half().cpu() if pixels else ())
            for place, result in zip(places, results, strict=True):
                if isinstance(result, str):
                    out[place] = result
                else:
                    encoded = next(latents)
                    out[place] = (encoded, result.size) if encoded.isfinite().all() else "its latents are not finite"
        return [out[place] for place in range(len(media))]

    def _decoded(self, chunks: Sequence[Sequence[tuple[Media, MediaSize]]]) -> Iterator[list[Loaded | str]]:
        """The chunks' images and clips; while one chunk is encoded, the next is decoded."""
        started = (self._threads.map(lambda item: _or_reason(load, *item), chunk) for chunk in chunks)
        coming = next(started, None)
        while coming is not None:
            loaded, coming = list(coming), next(started, None)  # in this order: `map` begins at once
            yield loaded

    def _text_rows(self, texts: Sequence[str]) -> list[Row | None]:
        dtype, masks = self.pipeline.conditioning_dtype, self.pipeline.conditioning_masks
        encoded = self.pipeline.encode_prompts(texts)
        check_conditioning(encoded, texts, masks)
        conditioning = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu()
            for name, tensor in encoded.items()
        }
        stored = {name: tensor for name, tensor in sorted(conditioning.items()) if name not in masks.values()}
        before = getattr(self, "layout", {})
        self.layout = {
            name: {
                "shape": [-1, *tensor.shape[2:]] if name in masks else list(tensor.shape[1:]),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                **({"mask": masks[name]} if name in masks else {}),
            }
            for name, tensor in stored.items()
        }
        for name, entry in before.items():
            if (found := self.layout.get(name)) != entry:
                raise UserError(
                    f"the conditioning {name!r} of prompt {texts[0]!r} has shape {found and found['shape']}, that of "
                    f"earlier ones {entry['shape']}: where lengths differ between prompts, a family names the mask in "
                    "`conditioning_masks`"
                )
        rows: list[Row | None] = []
        for number, text in enumerate(texts):
            own = {name: tensor[number] for name, tensor in stored.items()}
            for name in own.keys() & masks.keys():
                own[name] = own[name][conditioning[masks[name]][number].bool()]
            finite = all(bool(tensor.isfinite().all()) for tensor in own.values())
            columns = {f"embedding:{name}": _to_bytes(tensor) for name, tensor in own.items()}
            rows.append({"text": text, **columns} if finite else None)
        return rows


def check_conditioning(conditioning: Conditioning, texts: Sequence[str], masks: Mapping[str, str]) -> None:
    """Raise UserError unless a family's conditioning of texts is tensors [B, ...], with the masks that it names."""
    for name, tensor in conditioning.items():
        if not isinstance(tensor, Tensor) or not tensor.ndim or len(tensor) != len(texts):
            kind = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(
                f"the conditioning {name!r} of {len(texts)} prompts, the first {texts[0]!r}, must be a tensor "
                f"[{len(texts)}, ...], found {kind}"
            )
    for name, mask in masks.items():
        if name not in conditioning:
            continue
        shape = list(conditioning[name].shape)
        found = list(conditioning[mask].shape) if mask in conditioning else None
        if found != shape[:2]:
            raise UserError(
                f"the mask {mask!r} of the conditioning {name!r} {shape} must be {shape[:2]}, found {found}, "
                f"for prompt {texts[0]!r}"
            )


class Undecoded(Encoder):
    """Candidates as they are, by path or in their encoded bytes; see `Encoder`.

    Each is decoded once, so that a damaged one is skipped and recorded now, and not met in the middle of a run.
    """

    columns = {"paths": pa.list_(pa.binary()), "bytes": pa.list_(pa.large_binary())}  # paths need not be UTF-8
    rows_per_shard, rows_at_once = 256, 16

    def encode(self, groups: Sequence[Group]) -> list[Row | str]:
        """The groups' candidates, best first."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self._row, groups))

    def _row(self, group: Group) -> Row | str:
        return _reasons([_or_reason(decode, media) for media in group.candidates]) or {
            "paths": [os.fsencode(media) if isinstance(media, Path) else None for media in group.candidates],
            "bytes": [media if isinstance(media, bytes) else None for media in group.candidates],
        }

    @staticmethod
    def media(columns: Mapping[str, pa.Array], row: int) -> list[Media]:
        """A stored group's images or clips, best first."""
        stored = zip(columns["paths"][row].as_py(), columns["bytes"][row].as_py(), strict=True)
        return [content if path is None else Path(os.fsdecode(path)) for path, content in stored]


class Texts:
    """Encodes each text when it is met for the first time.

    known: those met before, which this or another process stores. unusable: those whose encoding is not finite.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.known, self.unusable = set[str](), set[str]()

    def encode_new(self, texts: Sequence[str]) -> list[Row]:
        """Rows of the texts that are new and can be encoded."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known and text not in self.unusable]
        rows = dict(zip(new, self.encoder.encode_texts(new), strict=True))
        self.unusable.update(text for text, row in rows.items() if row is None)
        self.known.update(rows.keys() - self.unusable)
        return [row for row in rows.values() if row is not None]

    def checked(self, group: Group, row: Row | str) -> Row | str:
        """The row of a group, or all reasons why it cannot be used."""
        bad = [text for text in group.texts if text in self.unusable]
        reasons = [f"the embedding of {text!r} is not finite in half precision" for text in bad]
        return "; ".join([*([row] if isinstance(row, str) else []), *reasons]) or row


def check_space(out: Path, needed: float, advice: str = "Choose another folder.") -> None:
    """Raise UserError where so many bytes are not free on the disk of the folder `out`, which may be missing yet."""
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        shown = (f"{tqdm.format_sizeof(size, 'B', 1024)}" for size in (needed, free))
        raise UserError("{}: the cache needs about {}, but only {} are free there. {}".format(out, *shown, advice))


@lru_cache
def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """The sizes of aspect-ratio buckets; at 1024, from 512 x 2048 to 2048 x 512 in steps of 64.

    They are those of SDXL's training (arXiv 2307.01952, appendix I): both sides are multiples of a sixteenth of the
    resolution, from half of it to twice, and the area is at least 0.9 of the square's and not above it. At 1024 that
    gives the 40 of the paper and 1344 x 704, which it lists the other way round only. SD3 (arXiv 2403.03206) buckets
    by area as well, and lists no sizes.
    """
    step = max(8, 16 * round(resolution / 256))  # what VAE and patches can divide, whatever the resolution
    sides = range(step * (resolution // 2 // step), 2 * resolution + 1, step)
    area = resolution**2
    of_ratio = {h / w: (h, w) for h, w in product(sides, sides) if LEAST_AREA * area <= h * w <= area}  # the largest
    return tuple(size for _, size in sorted(of_ratio.items()))


def nearest(measured: Sequence[Size], sizes: Sequence[Size]) -> int:
    """The number of the size whose aspect ratio is nearest to the (geometric) mean of those of some images."""
    ratio = sum(math.log(height / width) for height, width in measured) / len(measured)
    return min(range(len(sizes)), key=lambda n: abs(ratio - math.log(sizes[n][0] / sizes[n][1])))


def _to_bytes(tensor: Tensor) -> bytes:
    # NumPy has no bfloat16.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy().tobytes()


def _or_reason(function: Callable[..., Any], *arguments: Any) -> Any:
    """A decoder's result, or the reason why there is none."""
    try:
        return function(*arguments)
    except ImageError as error:
        return str(error)


def _reasons(results: Sequence[Any]) -> str:
    """Why some of a group's candidates cannot be used; "" where all can."""
    reasons = [(place, result) for place, result in enumerate(results, 1) if isinstance(result, str)]
    return "; ".join(f"candidate {place} (best first): {reason}" for place, reason in reasons)


def latent_times(pipeline: TrainablePipeline, frames: int | None, fps: float | None) -> list[float]:
    """The times of a clip's latent frames; an image is a clip of one frame."""
    return [0.0] if frames is None else pipeline.latent_times(frames, fps)  # type: ignore[attr-defined]
