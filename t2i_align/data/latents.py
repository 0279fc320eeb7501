"""What a latent cache stores of a group: its images or clips and its texts, encoded, in half precision."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from t2i_align.data.layout import PROMPTS, read_table
from t2i_align.data.media import ImageError, Loaded, MediaSize, load
from t2i_align.data.schema import Conditioning, Group, Media, Skipped
from t2i_align.data.shards import Row
from t2i_align.errors import UserError

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

CONTENT = "latents"


class Latents:
    """What a latent cache stores: encodes candidates, prompts and captions with a pipeline. See `shards.Payload`.

    at_once: how many candidates are encoded together, and as many are decoded meanwhile; clips go one by one.

    Raises:
        PipelineError: the pipeline cannot take images or clips of this size; raised at once.
        UserError: the encoders give numbers that are not finite in half precision even for the empty prompt.
    """

    def __init__(self, pipeline: TrainablePipeline, extent: MediaSize, batch_size: int) -> None:
        height, width, frames, _ = extent
        pipeline.check_size(height, width, frames)
        self.pipeline, self.extent, self.batch_size = pipeline, extent, batch_size
        self.at_once = batch_size if frames is None else 1
        blank = torch.zeros(1, *(() if frames is None else (frames,)), 3, height, width)
        self.shape = tuple(pipeline.encode_pixels(blank).shape[1:])
        empty = _halved(pipeline.encode_prompts([""]))
        if not all(_finite(tensor) for tensor in empty.values()):
            raise UserError("the text encoder's output for the empty prompt is not finite in half precision")
        self.layout = {name: (tuple(tensor.shape[1:]), tensor.numpy().dtype) for name, tensor in empty.items()}
        self.columns: list[tuple[str, pa.DataType]] = [("latents", pa.list_(pa.binary(self.latent_bytes)))]
        if pipeline.size_conditioned:
            self.columns.append(("sizes", pa.list_(pa.int32())))  # height and width of each candidate in turn
        self.known = {""}
        self.unusable: set[str] = set()
        self.new: list[Row] = [{"prompt": "", **_as_bytes(empty, 0)}]
        self.executor = ThreadPoolExecutor(os.cpu_count())

    @property
    def latent_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    @property
    def prompt_bytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.layout.values())

    def encode(self, groups: Sequence[Group]) -> list[Row | Skipped]:
        encoded = iter(self._encoded([candidate for group in groups for candidate in group.candidates]))
        self._meet([text for group in groups for text in group.texts])
        out: list[Row | Skipped] = []
        for group in groups:
            # One result a candidate, good or bad: an image that fails cannot shift its neighbours.
            results = [next(encoded) for _ in group.candidates]
            reasons = [
                f"candidate {place + 1} (best first): {result}"
                for place, result in enumerate(results)
                if isinstance(result, str)
            ]
            reasons += [
                f"the embedding of {text!r} is not finite in half precision"
                for text in group.texts
                if text in self.unusable
            ]
            if reasons:
                out.append(Skipped(id=group.id, origin=group.origin, reason="; ".join(reasons)))
            else:
                good = [result for result in results if not isinstance(result, str)]
                row: Row = {"latents": [latents for latents, _ in good]}
                if self.pipeline.size_conditioned:
                    row["sizes"] = [side for _, size in good for side in size]
                out.append(row)
        return out

    def tables(self) -> dict[str, pa.Table]:
        schema = pa.schema(
            [("prompt", pa.string())]
            + [
                (f"embedding:{name}", pa.binary(int(np.prod(shape)) * dtype.itemsize))
                for name, (shape, dtype) in sorted(self.layout.items())
            ]
        )
        table = pa.Table.from_pylist(self.new, schema)
        self.new = []
        return {PROMPTS: table}

    def resume(self, shard: Path) -> None:
        self.new = []  # the empty prompt is in the first shard
        self.known.update(read_table(shard / PROMPTS)["prompt"].to_pylist())

    def pass_over(self, groups: Sequence[Group]) -> None:
        self.new = []
        self.known.update(text for group in groups for text in group.texts)

    def describe(self) -> dict[str, Any]:
        self.executor.shutdown()
        return {
            "content": CONTENT,
            "extent": self.extent._asdict(),
            "latent_shape": list(self.shape),
            "conditioning": {name: {"shape": list(shape), "dtype": dtype.name} for name, (shape, dtype) in
                             sorted(self.layout.items())},
        }  # fmt: skip

    def _encoded(self, media: Sequence[Media]) -> list[tuple[bytes, tuple[int, int]] | str]:
        """The latents and original size of each candidate, or why there are none."""
        out: list[tuple[bytes, tuple[int, int]] | str] = []
        for loaded in self._loaded(media):
            pixels = [found.pixels for found in loaded if isinstance(found, Loaded)]
            latents = iter(self.pipeline.encode_pixels(torch.stack(pixels)).half().cpu() if pixels else ())
            for found in loaded:
                out.append(found if isinstance(found, str) else self._stored(next(latents), found.size))
        return out

    def _loaded(self, media: Sequence[Media]) -> Iterator[list[Loaded | str]]:
        """Batches of images; while one is encoded, the next is decoded."""
        starts = range(0, len(media), self.at_once)
        batches = (self.executor.map(self._load, media[start : start + self.at_once]) for start in starts)
        coming = next(batches, None)
        while coming is not None:
            loaded, coming = list(coming), next(batches, None)  # in this order: `map` begins at once
            yield loaded

    def _load(self, media: Media) -> Loaded | str:
        try:
            return load(media, self.extent)
        except ImageError as error:
            return str(error)

    def _stored(self, latents: Tensor, size: tuple[int, int]) -> tuple[bytes, tuple[int, int]] | str:
        return (latents.numpy().tobytes(), size) if _finite(latents) else "its latents are not finite"

    def _meet(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.known and text not in self.unusable]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            conditioning = _halved(self.pipeline.encode_prompts(part))
            for row, text in enumerate(part):
                if all(_finite(tensor[row]) for tensor in conditioning.values()):
                    self.known.add(text)
                    self.new.append({"prompt": text, **_as_bytes(conditioning, row)})
                else:
                    self.unusable.add(text)


def _halved(conditioning: Conditioning) -> Conditioning:
    return {
        name: (tensor.half() if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in conditioning.items()
    }


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _as_bytes(conditioning: Conditioning, row: int) -> Row:
    return {f"embedding:{name}": tensor[row].numpy().tobytes() for name, tensor in conditioning.items()}
