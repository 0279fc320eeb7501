"""Prepared data, memory-mapped: opened at once whatever its size, micro-batches without a copy before they are stacked.

`prepare` writes it and shows the files. Groups of several sizes lie in one store: each belongs to a bucket, which is a
size in pixels with a shape of latents, and a micro-batch has groups of one bucket.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from t2i_align.data.media import time_ids
from t2i_align.data.schema import COLUMNS, Batch, Column, Conditioning, Media
from t2i_align.errors import UserError
from t2i_align.utils.files import read_json

LAYOUT = 4  # raise when a folder written before can no longer be read
MANIFEST, FINGERPRINT, INDEX, SKIPPED = "manifest.json", "fingerprint.json", "index.arrow", "skipped.jsonl"
GROUPS, TEXTS, STATE = "groups.arrow", "texts.arrow", "state.json"
INDEX_TYPES = {"k": pa.int32(), "best": pa.float64(), "worst": pa.float64(), "bucket": pa.int32()}
EVERY = slice(None)

Position = tuple[int, int]  # (epoch, group)
Item = dict[str, Any]  # a micro-batch as the loader's workers hand it over: fields of `Batch`


def column_types() -> dict[str, pa.DataType]:
    """What all groups have, by name, and the optional columns."""

    def optional(column: Column) -> pa.DataType:
        one = pa.type_for_alias(column.type)
        return pa.list_(one) if column.per_candidate else one

    common = {"id": pa.string(), "prompt": pa.string(), "scores": pa.list_(pa.float64())}
    return {**common, **{name: optional(column) for name, column in COLUMNS.items()}}


def is_store(path: Path) -> bool:
    """Whether a folder holds prepared data, finished or not."""
    return (path / MANIFEST).is_file() or (path / FINGERPRINT).is_file()


def is_complete(path: Path) -> bool:
    """Whether prepared data is finished and none of its shards is lost."""
    if not (path / MANIFEST).is_file():
        return False
    shards = read_json(path / MANIFEST)["shards"]
    return all((path / shard_name(number)).is_dir() for number in range(len(shards)))


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def read_table(file: Path) -> pa.RecordBatch:
    """The record batch of an Arrow file, memory-mapped; the file descriptor is closed, the mapping stays.

    Such a file is a stream behind 8 bytes. Read as one it opens in a fraction of the time, as no other thread is asked
    for the index at its end.
    """
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source.read_buffer().slice(8)) as stream:
        return stream.read_next_batch()


class Ragged:
    """Rows of different lengths over one array; `ragged[row]` is a view."""

    def __init__(self, starts: np.ndarray, values: np.ndarray) -> None:
        self.starts, self.values = starts, values

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.starts[row] : self.starts[row + 1]]

    @classmethod
    def of_lists(cls, column: pa.ListArray) -> Ragged:
        # DLPack, because pyarrow's `to_numpy` would import pandas.
        return cls(np.from_dlpack(column.offsets), np.from_dlpack(column.values))

    @classmethod
    def of_bytes(cls, column: pa.LargeBinaryArray, dtype: str) -> Ragged:
        """The numbers that a binary column holds."""
        if not len(column):
            return cls(np.zeros(1, np.int64), np.empty(0, dtype))
        _, offsets, values = column.buffers()
        starts = np.frombuffer(offsets, np.int64, len(column) + 1) // np.dtype(dtype).itemsize
        return cls(starts, np.frombuffer(values, dtype, starts[-1]))


class Shard:
    """One shard's tables, as arrays over the mapped files.

    scores: [k]. latents: flat. sizes: height and width of each candidate in turn. texts: of each conditioning tensor
    the rows, flat.
    """

    def __init__(self, folder: Path, layout: Mapping[str, Mapping[str, Any]]) -> None:
        self.groups = read_table(folder / GROUPS)
        self.ids = self.groups["id"]
        self.scores = Ragged.of_lists(self.groups["scores"])
        names = self.groups.schema.names
        self.latents = Ragged.of_bytes(self.groups["latents"], "float16") if "latents" in names else None
        self.sizes = Ragged.of_lists(self.groups["sizes"]) if "sizes" in names else None
        texts = read_table(folder / TEXTS) if layout else {}
        self.texts = {
            name: Ragged.of_bytes(texts[f"embedding:{name}"], storage_dtype(entry["dtype"]))
            for name, entry in layout.items()
        }


class Store:
    """A finished folder: its manifest, a small index of all groups, and shards on demand.

    k, best, worst, bucket: of each group the number of candidates, the scores of the first and the last of these, and
    the number of its bucket. tie: whether the two scores are equal.

    Raises:
        UserError: no prepared data there, unfinished, from another version, or a shard missing or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        for number, shard in enumerate(self.manifest["shards"]):
            for name, size in shard["files"].items():
                _check_file(path / shard_name(number) / name, size)
        index = read_table(path / INDEX)
        self.k: np.ndarray = np.from_dlpack(index["k"])
        self.best: np.ndarray = np.from_dlpack(index["best"])
        self.worst: np.ndarray = np.from_dlpack(index["worst"])
        self.bucket: np.ndarray = np.from_dlpack(index["bucket"])
        self.tie: np.ndarray = (self.k > 1) & (self.best == self.worst)
        self.texts: dict[str, Any] = {
            name: Ragged.of_lists(index[name]) if pa.types.is_list(index[name].type) else np.from_dlpack(index[name])
            for name in index.schema.names
            if name not in INDEX_TYPES
        }
        self._buckets: list[dict[str, Any]] = self.manifest["buckets"]
        self._layout: dict[str, dict[str, Any]] = self.manifest.get("conditioning", {})
        self._group_starts = [0, *accumulate(shard["groups"] for shard in self.manifest["shards"])]
        self._text_starts = [0, *accumulate(shard["texts"] for shard in self.manifest["shards"])]
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return len(self.k)

    def __reduce__(self) -> Any:
        return Store, (self.path,)  # a worker process maps the files itself

    def group(self, number: int) -> tuple[Shard, int]:
        """The shard of a group, and its row there."""
        shard = bisect_right(self._group_starts, number) - 1
        return self.shard(shard), number - self._group_starts[shard]

    def shard(self, number: int) -> Shard:
        """A shard, mapped when it is first touched."""
        if number not in self._shards:
            self._shards[number] = Shard(self.path / shard_name(number), self._layout)
        return self._shards[number]

    def media(self, number: int) -> list[Media]:
        """A group's images or clips, best first, where they are not encoded (see `encode.Undecoded`)."""
        shard, row = self.group(number)
        paths, contents = shard.groups["paths"][row].as_py(), shard.groups["bytes"][row].as_py()
        return [
            content if path is None else Path(os.fsdecode(path)) for path, content in zip(paths, contents, strict=True)
        ]

    def latents(self, number: int) -> np.ndarray:
        """A group's latents [k, *latent shape], float16, best first, over the mapped file."""
        shard, row = self.group(number)
        return self._latents(shard, row, self._buckets[self.bucket[number]]["shape"])

    def fetch(self, positions: Sequence[Position], pairs: bool = False, columns: Sequence[str] = ()) -> Item:
        """The fields of a micro-batch, on the CPU and in the dtypes that are stored; its groups are of one bucket.

        pairs: only the best and the worst candidate of each group. columns: the optional columns to add.
        """
        numbers = [number for _, number in positions]
        bucket = self._buckets[self.bucket[numbers[0]]]
        keys, scores, latents, sizes, cuts = [], [], [], [], []
        for epoch, number in positions:
            shard, row = self.group(number)
            cut = pair(self.k[number]) if pairs else EVERY
            cuts.append(cut)
            keys.append(f"{epoch}/{shard.ids[row].as_py()}")
            scores.append(shard.scores[row][cut])
            latents.append(self._latents(shard, row, bucket["shape"])[cut])
            if shard.sizes is not None:
                own = shard.sizes[row].reshape(-1, 2)[cut].tolist()
                sizes.append([time_ids((height, width), *bucket["size"]) for height, width in own])
        texts = {"conditioning": self.texts["prompt"][numbers]}
        values: dict[str, Any] = {}
        for name in columns:
            if isinstance(of := self.texts.get(name), Ragged):
                texts[name] = np.stack([of[number][cut] for number, cut in zip(numbers, cuts, strict=True)])
            elif of is not None:
                texts[name] = of[numbers]
            elif name in COLUMNS:
                own = [shard.groups[name][row].as_py() for shard, row in map(self.group, numbers)]
                lists = COLUMNS[name].per_candidate
                values[name] = [one[cut] for one, cut in zip(own, cuts, strict=True)] if lists else own
        encoded = self._conditioning(texts)
        return {
            "keys": keys,
            "scores": torch.from_numpy(np.stack(scores)).float(),
            "latents": torch.from_numpy(np.stack(latents)),
            "sizes": torch.tensor(sizes).float() if sizes else None,
            "conditioning": encoded.pop("conditioning"),
            "columns": {**encoded, **values},
        }

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        """The micro-batch on its device, in float32."""
        return Batch(**{**widened(item, device), "keys": tuple(item["keys"])})

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...], float32."""
        conditioning: Conditioning = widened(self._conditioning({"empty": np.zeros(1, np.int64)})["empty"], device)
        return conditioning

    def _latents(self, shard: Shard, row: int, shape: Sequence[int]) -> np.ndarray:
        assert shard.latents is not None, "checked by `open_dataset`"
        return shard.latents[row].reshape(-1, *shape)

    def _conditioning(self, texts: Mapping[str, np.ndarray]) -> dict[str, Conditioning]:
        """The conditioning [*numbers.shape, ...] of texts by their numbers; sequences are padded to the longest of all.

        0 is the number of the empty text.
        """
        numbers = [number for field in texts.values() for number in field.ravel().tolist()]
        places = [bisect_right(self._text_starts, number) - 1 for number in numbers]
        rows = [
            (self.shard(place), number - self._text_starts[place])
            for place, number in zip(places, numbers, strict=True)
        ]
        stacked: Conditioning = {}
        for name, entry in self._layout.items():
            values = [shard.texts[name][row] for shard, row in rows]
            if "mask" in entry:
                lengths = [len(value) // math.prod(entry["shape"][1:]) for value in values]
                stacked[entry["mask"]] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
                values = [np.pad(value, (0, max(map(len, values)) - len(value))) for value in values]
            array = torch.from_numpy(np.stack(values).reshape(len(values), *entry["shape"]))
            stacked[name] = array.view(torch.bfloat16) if entry["dtype"] == "bfloat16" else array
        if len(texts) == 1 and next(iter(texts.values())).ndim == 1:  # mostly: the prompts alone
            return dict.fromkeys(texts, stacked)
        parts = {name: tensor.split([field.size for field in texts.values()]) for name, tensor in stacked.items()}
        return {
            field: {name: part[place].unflatten(0, texts[field].shape) for name, part in parts.items()}
            for place, field in enumerate(texts)
        }


def pair(k: int) -> slice:
    """The best and the worst of k candidates that are sorted; of one, this one."""
    return slice(None, None, max(1, int(k) - 1))


def storage_dtype(dtype: str) -> str:
    """The NumPy type under which numbers of a PyTorch type are stored."""
    return "int16" if dtype == "bfloat16" else dtype


def widened(value: Any, device: torch.device) -> Any:
    """Tensors, also those in a dict, on the device; floats cross to it as they are and become float32 there."""
    if isinstance(value, dict):
        return {name: widened(one, device) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device, non_blocking=True)
    return moved.float() if moved.is_floating_point() else moved


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        if is_store(path):
            raise UserError(f"{path}: this prepared data is unfinished; run the same prepare again to continue it")
        raise UserError(f"{path}: no prepared data in this folder ({MANIFEST} is missing)")
    manifest = read_json(file)
    if manifest.get("layout") != LAYOUT:
        raise UserError(
            f"{path}: prepared with layout {manifest.get('layout')!r}, this version reads {LAYOUT}; prepare it again"
        )
    return manifest


def _check_file(file: Path, size: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes instead of {size}"
        raise UserError(f"{file}: this part of the prepared data {state}; delete the folder and prepare it again")
