"""Endless batches of groups: which come when, their fields, on which device.

The order is a function of the seed alone, whatever the batch size, the processes and the history.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2i_align.data.batch import Batch, Conditioning
from t2i_align.data.schema import COLUMNS
from t2i_align.data.segments import by_latent_frame
from t2i_align.data.store import TEXTS, Store
from t2i_align.diffusion.randomness import permutation
from t2i_align.objectives.base import DataStats, Requirements

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from t2i_align.data.users import Users  # which builds on this module

logger = logging.getLogger(__name__)
Position = tuple[int, ...]  # epoch first; then what names a group: its number in a store, or its shard and row
Item = dict[str, Any]  # a micro-batch as the loader's workers hand it over


class PreferenceDataset(Dataset[Item]):
    """The groups that a run trains on, in micro-batches.

    Args:
        counts: groups, skipped, and where there are any, ties_left_out, disliked_left_out, too_few_candidates,
            texts_alike_left_out, beyond_the_limit.
        score_range: the least and the greatest score.
        fingerprint: decides which samples come at which positions.
        needs: what the objective wants of batches.
    """

    def __init__(
        self,
        needs: Requirements,
        *,
        counts: Mapping[str, int],
        score_range: tuple[float, float],
        fingerprint: Mapping[str, Any],
    ) -> None:
        self.needs = needs
        self.counts = {name: value for name, value in counts.items() if value or name in ("groups", "skipped")}
        self.stats, self.fingerprint = DataStats(score_range=score_range), digest(fingerprint)

    def loader(
        self, *, seed: int, start_step: int, batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1,
        workers: int = 0,
    ) -> Iterator[Item]:  # fmt: skip
        """Endless micro-batches of this process, from an optimiser step on.

        A step takes batch_size * accumulate * world groups; micro-batch m of process r has the batch_size of these
        from (m * world + r) * batch_size on. So neither accumulation nor processes nor a restart change the samples.
        """
        ordered = self.steps(seed=seed, size=batch_size * accumulate * world, start=start_step)
        loader: DataLoader[Item] = DataLoader(
            self,
            batch_sampler=micro_batches(ordered, batch_size, accumulate, rank, world),
            collate_fn=identity_collate,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would draw from the global one
        )
        return iter(loader)

    @abstractmethod
    def steps(self, *, seed: int, size: int, start: int) -> Iterator[list[Any]]:
        """The positions of the `size` groups of each optimiser step, from a step on; endless."""

    @abstractmethod
    def __getitems__(self, positions: Sequence[Any]) -> Item:
        """The micro-batch of groups at some positions."""

    @abstractmethod
    def to_batch(self, item: Item, device: torch.device) -> Batch:
        """A micro-batch on its device, in float32; on the fly, this is where it is encoded."""

    @abstractmethod
    def some_prompts(self, count: int) -> list[str]:
        """So many different prompts of the groups, if there are as many; always the same."""

    @abstractmethod
    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...], float32."""


class PreparedDataset(PreferenceDataset):
    """Chosen groups of prepared data. numbers: theirs in the store, those of one bucket together."""

    def __init__(
        self, store: Store, numbers: np.ndarray, needs: Requirements, counts: Mapping[str, int],
        users: Users | None = None,
    ) -> None:  # fmt: skip
        fingerprint = {
            "parts": store.manifest["fingerprint"],
            "chosen": hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest(),
            "pairs": needs.pairs and int(store.k[numbers].max()) > 2,
            **({"users": users.fingerprint} if users else {}),
        }
        scores = float(store.worst[numbers].min()), float(store.best[numbers].max())
        super().__init__(needs, counts=counts, score_range=scores, fingerprint=fingerprint)
        self.store, self.numbers, self.users = store, numbers, users

    def steps(self, *, seed: int, size: int, start: int) -> Iterator[list[Any]]:
        buckets = self.store.bucket[self.numbers]
        for bucket, groups in zip(*np.unique(buckets, return_counts=True), strict=True):
            if groups < min(size, len(buckets)):
                height, width = self.store.manifest["buckets"][bucket]["size"]
                few = "bucket %d x %d: %d groups, fewer than a step's %d; they wait for some epochs, then come together"
                logger.warning(few, height, width, groups, size)
        return steps(self.numbers, buckets, seed=seed, size=size, start=start)

    def __getitems__(self, positions: Sequence[tuple[int, int]]) -> Item:
        """The fields of a `Batch`, on the CPU and in the dtypes that are stored; its groups are of one bucket."""
        bucket = self.store.manifest["buckets"][self.store.bucket[positions[0][1]]]
        keys, prompts, scores, latents, sizes = [], [], [], [], []
        columns: dict[str, Any] = {name: [] for name in self.needs.columns if name in COLUMNS}
        for epoch, number in positions:
            group, row = self.store.locate(number)
            own = group["scores"][row].as_py()
            places = self.needs.places(len(own))
            keys.append(f"{epoch}/{group['id'][row].as_py()}")
            prompts.append(self.store.index["prompt"][number].as_py())
            scores.append([own[place] for place in places])
            content = memoryview(group["latents"][row].as_buffer())
            size = len(content) // len(own)
            latents += [content[place * size : (place + 1) * size] for place in places]
            if "sizes" in group:
                originals = group["sizes"][row].as_py()
                own_sizes = [originals[2 * place : 2 * place + 2] for place in places]
                sizes.append([time_ids(one, *bucket["size"]) for one in own_sizes])
            for name, values in columns.items():  # of texts, their numbers
                value = self.store.index[name][number] if COLUMNS[name].text else group[name][row]
                values.append(COLUMNS[name].take(value.as_py(), places))
        if "segment_scores" in columns:
            columns = by_latent_frame(columns, self.store.manifest.get("latent_times", [0.0]))
        encoded = encode_fields(self._conditioning, prompts, columns)
        return {
            "keys": keys,
            "scores": torch.from_numpy(np.array(scores, np.float32)),
            "latents": _joined(latents, torch.float16, len(keys), -1, *bucket["shape"]),
            "sizes": torch.tensor(sizes).float() if sizes else None,
            **encoded,
        }

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        batch = Batch(**{**widened(item, device), "keys": tuple(item["keys"])})
        return self.users.attached(batch) if self.users else batch

    def some_prompts(self, count: int) -> list[str]:
        texts = list(dict.fromkeys(self.store.index["prompt"][number].as_py() for number in self.numbers))
        evenly = [texts[place * len(texts) // min(count, len(texts))] for place in range(min(count, len(texts)))]
        places = [self.store.locate(text, TEXTS) for text in evenly]
        return [columns["text"][row].as_py() for columns, row in places]

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        conditioning: Conditioning = widened(self._conditioning([0]), device)
        return conditioning

    def _conditioning(self, numbers: Sequence[int]) -> Conditioning:
        """The stored conditioning of texts by their numbers, [B, ...]; sequences are padded to the longest of all."""
        rows = [self.store.locate(number, TEXTS) for number in numbers]
        conditioning: Conditioning = {}
        for name, entry in self.store.manifest["conditioning"].items():
            dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
            values = [text[f"embedding:{name}"][row].as_buffer() for text, row in rows]
            if "mask" in entry:
                width = dtype.itemsize * math.prod(shape[1:])
                longest = max(width, *map(len, values))
                lengths = torch.tensor([len(value) // width for value in values])
                conditioning[entry["mask"]] = torch.arange(longest // width) < lengths[:, None]
                values = [part for value in values for part in (value, bytes(longest - len(value)))]
            conditioning[name] = _joined(values, dtype, len(rows), *shape)
        return conditioning


def _joined(parts: Sequence[Any], dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.frombuffer(bytearray().join(parts), dtype=dtype).reshape(shape)


def steps(
    numbers: np.ndarray, buckets: np.ndarray | None = None, *, seed: int, size: int, start: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """(epoch, number) of the `size` groups of each optimiser step, from a step on; endless. buckets: of each group.

    An endless stream of epochs, each a permutation of the groups, is dealt out to their buckets; a bucket that has
    `size` groups makes the next step. With one bucket these are consecutive slices, which may straddle epochs.
    """
    order = lru_cache(maxsize=2)(lambda epoch: permutation(len(numbers), seed, "order", epoch).numpy())

    def at(position: int) -> tuple[tuple[int, int], int]:
        epoch, place = divmod(position, len(numbers))
        index = order(epoch)[place]
        return (epoch, int(numbers[index])), 0 if buckets is None else int(buckets[index])

    if buckets is None or (buckets == buckets[0]).all():
        for step in count(start):
            yield [at(position)[0] for position in range(step * size, (step + 1) * size)]
    waiting: dict[int, list[tuple[int, int]]] = {}
    for position in count():
        group, bucket = at(position)
        waiting.setdefault(bucket, []).append(group)
        if len(waiting[bucket]) == size:
            ready = waiting.pop(bucket)
            if start == 0:
                yield ready
            start = max(0, start - 1)


def micro_batches(
    ordered: Iterator[list[Any]], batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1
) -> Iterator[list[Any]]:
    """Each step's positions, cut for a process; see `PreferenceDataset.loader`."""
    for step in ordered:
        for micro in range(accumulate):
            yield step[(micro * world + rank) * batch_size :][:batch_size]


def identity_collate(item: Any) -> Any:
    """For datasets whose `__getitems__` returns a whole micro-batch."""
    return item


def encode_fields(
    encode: Callable[[Sequence[Any]], Conditioning], prompts: Sequence[Any], columns: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields `conditioning` and `columns` of a batch: texts, [B] or [B][k], become their conditioning.

    All are encoded together, so that their sequences are padded alike.
    """
    texts = {name: values for name, values in columns.items() if COLUMNS[name].text}
    if not texts:
        return {"conditioning": encode(prompts), "columns": columns}
    shapes = [np.shape(values) for values in (prompts, *texts.values())]
    encoded = encode([text for values in (prompts, *texts.values()) for text in np.ravel(values).tolist()])
    parts = {name: tensor.split([math.prod(shape) for shape in shapes]) for name, tensor in encoded.items()}
    fields = [
        {name: part[place].unflatten(0, shape) for name, part in parts.items()} for place, shape in enumerate(shapes)
    ]
    return {"conditioning": fields[0], "columns": {**columns, **dict(zip(texts, fields[1:], strict=True))}}


def widened(value: Any, device: torch.device) -> Any:
    """Tensors, also those in a dict, on the device; floats cross to it as they are and become float32 there."""
    if isinstance(value, dict):
        return {name: widened(one, device) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device, non_blocking=True)
    return moved.float() if moved.is_floating_point() else moved


def time_ids(size: tuple[int, int], height: int, width: int) -> list[int]:
    """SDXL micro-conditioning for an image of `size` (height, width) that `to_pixels` fitted (arXiv 2307.01952, 2.2).

    Its own height and width, the top and left of the crop in pixels of the scaled image, and the target's size.
    """
    scale = max(height / size[0], width / size[1])
    top, left = round((size[0] * scale - height) / 2), round((size[1] * scale - width) / 2)
    return [*size, top, left, height, width]


def digest(values: Any) -> str:
    """A short name for JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _leave_signals_to_the_run(worker: int) -> None:
    # They reach the workers too; the run saves a checkpoint first, for which it still needs them.
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # Windows has two of them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
