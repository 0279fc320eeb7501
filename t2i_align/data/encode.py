"""What a store keeps of groups: candidates and texts through a pipeline's encoders, or candidates as they are."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from t2i_align.data.buckets import nearest
from t2i_align.data.media import ImageError, Loaded, MediaSize, decode, load, measure
from t2i_align.data.prepare import Encoder, Row
from t2i_align.data.schema import Group, Media, Survey
from t2i_align.errors import UserError

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

SHARD_BYTES = 256 << 20  # what a shard may hold in memory while it is written
MAX_ROWS_PER_SHARD = 1024
BATCHES_AT_ONCE = 8  # between the last of these and the next ones, the encoder waits for images; clips go one by one
Size = tuple[int, int]  # (height, width) in pixels
Place = tuple[int, int]  # (group, candidate)


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
        (empty,) = self._text_rows([""])
        if empty is None:
            raise UserError("the text encoder's output for the empty prompt is not finite in half precision")
        self.text_bytes = sum(map(len, empty.values()))
        self.columns = {"latents": pa.large_binary(), "shape": pa.list_(pa.int32()), "size": pa.list_(pa.int32())}
        if pipeline.size_conditioned:
            self.columns["sizes"] = pa.list_(pa.int32())  # height and width of each candidate in turn
        self.text_columns = dict.fromkeys(empty, pa.large_binary())
        row_bytes = 2 * self.latent_bytes + texts_per_group * self.text_bytes
        self.rows_per_shard = max(1, min(MAX_ROWS_PER_SHARD, SHARD_BYTES // row_bytes))
        self.rows_at_once = max(1, batch_size) * (BATCHES_AT_ONCE if frames is None else 1)
        self.description = {"frames": frames, "fps": fps, "conditioning": self.layout}
        self._known, self._unusable = {""}, set[str]()
        self._new: list[Row] = [{"text": "", **empty}]
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
        results = self._encode_candidates(groups, sizes)
        self._encode_new_texts([text for group in groups for text in group.texts])
        out: list[Row | str] = []
        for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
            # One result per candidate, good or bad: an image that fails cannot shift its neighbours.
            own = [results[number, place] for place in range(len(group.candidates))]
            good = [result for result in own if not isinstance(result, str)]
            reasons = [
                f"candidate {place + 1} (best first): {result}"
                for place, result in enumerate(own)
                if isinstance(result, str)
            ]
            reasons += [
                f"the embedding of {text!r} is not finite in half precision"
                for text in group.texts
                if text in self._unusable
            ]
            if reasons:
                out.append("; ".join(reasons))
                continue
            row: Row = {"latents": b"".join(latents.numpy().tobytes() for latents, _ in good), "size": size,
                        "shape": good[0][0].shape}  # fmt: skip
            if self.pipeline.size_conditioned:
                row["sizes"] = [side for _, original in good for side in original]
            out.append(row)
        return out

    def take_texts(self) -> list[Row]:
        """Rows of the texts encoded since the last call."""
        texts, self._new = self._new, []
        return texts

    def know_texts(self, texts: Iterable[str]) -> None:
        """Note texts that are stored already, or by another process."""
        self._known.update(texts)
        self._new = []  # the empty text, which the first shard has

    def _size(self, group: Group) -> Size:
        """That of the bucket nearest to the images' aspect ratios; a square where one of them cannot be measured."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        measured = [size for media in group.candidates if (size := measure(media))]
        return self.sizes[nearest(measured if len(measured) == len(group.candidates) else [(1, 1)], self.sizes)]

    def _encode_candidates(
        self, groups: Sequence[Group], sizes: Sequence[Size]
    ) -> dict[Place, tuple[Tensor, Size] | str]:
        """The latents and original size of each candidate, or the reason why there are none."""
        by_size: dict[Size, list[Place]] = {}
        for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
            by_size.setdefault(size, []).extend((number, place) for place in range(len(group.candidates)))
        step = self.batch_size if self.frames is None else 1
        chunks = [
            (size, places[start : start + step])
            for size, places in by_size.items()
            for start in range(0, len(places), step)
        ]
        out: dict[Place, tuple[Tensor, Size] | str] = {}
        for (_, places), loaded in zip(chunks, self._loaded(groups, chunks), strict=True):
            pixels = [one.pixels for one in loaded if isinstance(one, Loaded)]
            latents = iter(self.pipeline.encode_pixels(torch.stack(pixels)).half().cpu() if pixels else ())
            for place, one in zip(places, loaded, strict=True):
                if isinstance(one, str):
                    out[place] = one
                else:
                    encoded = next(latents)
                    out[place] = (encoded, one.size) if encoded.isfinite().all() else "its latents are not finite"
        return out

    def _loaded(self, groups: Sequence[Group], chunks: Sequence[tuple[Size, Sequence[Place]]]) -> Iterator[Any]:
        """The chunks' candidates, decoded; while one chunk is encoded, the next is decoded."""

        def load_one(media: Media, size: MediaSize) -> Loaded | str:
            try:
                return load(media, size)
            except ImageError as error:
                return str(error)

        started = (
            self._threads.map(
                load_one,
                [groups[number].candidates[place] for number, place in places],
                [MediaSize(*size, self.frames, self.fps)] * len(places),
            )
            for size, places in chunks
        )
        coming = next(started, None)
        while coming is not None:
            loaded, coming = list(coming), next(started, None)  # in this order: `map` begins at once
            yield loaded

    def _encode_new_texts(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._known and text not in self._unusable]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            for text, row in zip(part, self._text_rows(part), strict=True):
                if row is None:
                    self._unusable.add(text)
                else:
                    self._known.add(text)
                    self._new.append({"text": text, **row})

    def _text_rows(self, texts: Sequence[str]) -> list[dict[str, bytes] | None]:
        """The stored bytes of each text's conditioning by column; None where it is not finite in its dtype."""
        dtype, masks = self.pipeline.conditioning_dtype, self.pipeline.conditioning_masks
        conditioning = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu()
            for name, tensor in self.pipeline.encode_prompts(texts).items()
        }
        stored = {name: tensor for name, tensor in sorted(conditioning.items()) if name not in masks.values()}
        self.layout = {
            name: {
                "shape": [-1, *tensor.shape[2:]] if name in masks else list(tensor.shape[1:]),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                **({"mask": masks[name]} if name in masks else {}),
            }
            for name, tensor in stored.items()
        }
        rows: list[dict[str, bytes] | None] = []
        for number in range(len(texts)):
            own = {name: tensor[number] for name, tensor in stored.items()}
            for name in own.keys() & masks.keys():
                own[name] = own[name][conditioning[masks[name]][number].bool()]
            finite = all(bool(tensor.isfinite().all()) for tensor in own.values())
            rows.append({f"embedding:{name}": _to_bytes(tensor) for name, tensor in own.items()} if finite else None)
        return rows


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
        for place, media in enumerate(group.candidates):
            try:
                decode(media)
            except ImageError as error:
                return f"candidate {place + 1} (best first): {error}"
        return {
            "paths": [os.fsencode(media) if isinstance(media, Path) else None for media in group.candidates],
            "bytes": [media if isinstance(media, bytes) else None for media in group.candidates],
        }


def check_space(out: Path, needed: float, advice: str = "Choose another folder.") -> None:
    """Raise UserError where so many bytes are not free on the disk of the folder `out`, which may be missing yet."""
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        shown = (f"{tqdm.format_sizeof(size, 'B', 1024)}" for size in (needed, free))
        raise UserError("{}: the cache needs about {}, but only {} are free there. {}".format(out, *shown, advice))


def _to_bytes(tensor: Tensor) -> bytes:
    # NumPy has no bfloat16; see `store.storage_dtype`.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy().tobytes()
