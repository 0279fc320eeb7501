"""Which groups come when, and how their texts become the fields of a batch.

The order is a function of the seed alone, whatever the batch size, the processes and the history.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from t2i_align.data.schema import COLUMNS, Column, Conditioning
from t2i_align.diffusion.randomness import permutation

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline
    from t2i_align.data.store import Store

logger = logging.getLogger(__name__)


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


def warn_of_cut_texts(pipeline: TrainablePipeline, texts: Sequence[str]) -> None:
    """Log how many texts are longer than the encoders read."""
    names: dict[tuple[int, int], list[str]] = {}
    for (name, limit), tokens in pipeline.tokenize(texts).items():
        names.setdefault((sum(len(ids) > limit for ids in tokens), limit), []).append(name)
    for (longer, limit), tokenizers in names.items():
        if longer:
            message = "%d of %d texts are longer than %d tokens (%s); what is beyond is not read"
            logger.warning(message, longer, len(texts), limit, ", ".join(tokenizers))


def texts_alike(store: Store, columns: Sequence[Column]) -> np.ndarray:
    """Which groups have texts that the encoder cannot tell apart.

    columns: of texts, each compared with the prompt, or those of the best and of the worst candidate.
    """
    alike = np.zeros(len(store), bool)
    for column in columns:
        numbers = store.index[column.name]
        if not column.per_candidate:
            alike |= np.from_dlpack(numbers) == np.from_dlpack(store.index["prompt"])
            continue
        lengths = np.from_dlpack(numbers.value_lengths())
        ends, several = np.cumsum(lengths), lengths > 1
        flat = np.from_dlpack(numbers.flatten())
        alike[several] |= flat[(ends - lengths)[several]] == flat[(ends - 1)[several]]
        for number in np.flatnonzero(alike & several).tolist():  # candidates may share a text
            group, row = store.locate(number)
            texts = group[column.name][row].as_py()
            alike[number] = texts[0] != texts[-1]
    return alike


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


def latent_times(pipeline: TrainablePipeline, frames: int | None, fps: float | None) -> list[float]:
    """The times of a clip's latent frames; an image is a clip of one frame."""
    return [0.0] if frames is None else pipeline.latent_times(frames, fps)  # type: ignore[attr-defined]
