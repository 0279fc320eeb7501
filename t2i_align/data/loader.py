"""From a path in the configuration to an endless stream of batches: which groups, in which order, on which device."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data import readers
from t2i_align.data.annotations import Annotations, sidecar_identity
from t2i_align.data.buckets import bucket_sizes
from t2i_align.data.encode import Latents
from t2i_align.data.media import CROP, MediaSize
from t2i_align.data.prepare import write
from t2i_align.data.requirements import (
    check_alike,
    check_candidates,
    check_columns,
    check_requirements,
    nothing_left,
    wants_pairs,
)
from t2i_align.data.schema import Batch, Conditioning, Selection
from t2i_align.data.store import LAYOUT, Item, Store, is_complete, is_store
from t2i_align.data.stream import Shards, Stream
from t2i_align.diffusion.randomness import permutation
from t2i_align.errors import UserError
from t2i_align.objectives.base import DataStats, Requirements
from t2i_align.utils.files import differences

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

logger = logging.getLogger(__name__)
ENCODE_BATCH = 8


class PreferenceDataset(Dataset[Item]):
    """The groups that a run trains on, in micro-batches.

    Args:
        groups: prepared data, or shards that are encoded on the fly.
        order: gives the positions of each optimiser step from `seed`, `size` and `start` (see `steps`).
        counts: groups, skipped, and where there are any, ties_left_out, disliked_left_out, too_few_candidates,
            beyond_the_limit.
        score_range: the least and the greatest score.
        fingerprint: equal for two datasets that give the same samples at the same positions.
        pairs: whether only the best and the worst candidate of each group are taken.
        columns: optional columns of batches (see `Requirements.columns`).
    """

    def __init__(
        self,
        groups: Store | Stream,
        order: Callable[..., Iterator[list[Any]]],
        *,
        counts: Mapping[str, int],
        score_range: tuple[float, float],
        fingerprint: str,
        needs: Requirements,
    ) -> None:
        self.groups, self.order, self.counts, self.fingerprint = groups, order, dict(counts), fingerprint
        self.score_range = score_range
        self.pairs, self.columns = wants_pairs(needs), needs.columns

    def loader(
        self, *, seed: int, start_step: int, batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1,
        workers: int = 0,
    ) -> Iterator[Item]:  # fmt: skip
        """Endless micro-batches of this process, from an optimiser step on.

        A step takes batch_size * accumulate * world groups; micro-batch m of process r has the batch_size of these
        from (m * world + r) * batch_size on. So neither accumulation nor processes nor a restart change the samples.
        """
        ordered = self.order(seed=seed, size=batch_size * accumulate * world, start=start_step)
        loader: DataLoader[Item] = DataLoader(
            self,
            batch_sampler=micro_batches(ordered, batch_size, accumulate, rank, world),
            collate_fn=identity_collate,
            num_workers=workers,
            worker_init_fn=_ignore_sigint,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would draw from the global one
        )
        return iter(loader)

    @property
    def stats(self) -> DataStats:
        """What an objective may be fitted to."""
        return DataStats(score_range=self.score_range)

    def __getitems__(self, positions: Sequence[Any]) -> Item:
        return self.groups.fetch(positions, self.pairs, self.columns)

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        """A micro-batch on its device, in float32; on the fly, this is where it is encoded."""
        return self.groups.to_batch(item, device)

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...]."""
        return self.groups.empty_conditioning(device)


def steps(
    numbers: np.ndarray, buckets: np.ndarray | None = None, *, seed: int, size: int, start: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """(epoch, number) of the `size` groups of each optimiser step, from a step on; endless. buckets: of each group.

    An endless stream of epochs, each a permutation of the groups, is dealt out to their buckets; a bucket that has
    `size` groups makes the next step. With one bucket these are consecutive slices, which may straddle epochs.
    """
    order = lru_cache(maxsize=2)(lambda epoch: permutation(len(numbers), seed, "order", epoch))

    def at(position: int) -> tuple[tuple[int, int], int]:
        epoch, place = divmod(position, len(numbers))
        index = int(order(epoch)[place])
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


def open_dataset(
    data: DataConfig,
    model: ModelConfig,
    *,
    needs: Requirements,
    pipeline: Callable[[], TrainablePipeline],
    encoder_fingerprint: Callable[[], str],
    size: tuple[int, int],
    frames: int | None = None,
    cache_root: Path,
    progress: bool = True,
) -> PreferenceDataset:
    """Open the configured data, preparing it first where that was not done yet.

    Args:
        needs: what the objective wants; checked before anything is encoded.
        pipeline: gives the pipeline with its encoders; called only when something must be encoded.
        encoder_fingerprint: of the model's VAE and text encoders, and how they run.
        size: (height, width) in pixels. frames: of a clip; None for images.
        cache_root: the folder of the caches, one per fingerprint.

    Raises:
        UserError: the source, the cache or what the objective needs do not fit, with what was expected and found.
        PipelineError: a size that the model cannot take.
    """
    wanted = MediaSize(*size, frames, data.fps)
    selection = Selection(candidates=needs.candidates, ties=needs.ties, likes_only=needs.likes_only, limit=data.limit)
    if not data.path.startswith("testbed:") and is_store(Path(data.path)):
        if data.annotations:
            raise UserError(
                f"{data.path}: data.annotations are added to a source before it is encoded, and this is a finished "
                "cache. Name the source itself in data.path."
            )
        return _choose(_fitting_store(Path(data.path), model, encoder_fingerprint(), wanted), needs, data)
    annotations = Annotations.load(data.annotations)
    if data.stream or not data.cache:
        return _on_the_fly(data, needs, pipeline, wanted, selection, annotations, cache_root)
    path = readers.resolve(data.path)
    format = readers.detect(path, data.format)
    fingerprint = {
        **source_fingerprint(path, format, selection, data.annotations),
        **wanted._asdict(),
        "buckets": data.buckets,
        "crop": CROP,
        "dtype": "float16",
        "encoders": encoder_fingerprint(),
    }
    folder = cache_root / digest(fingerprint)
    if not is_complete(folder):
        survey = readers.survey(path, format, annotations, selection)
        check_requirements(needs, survey, data.path, selection.limit)
        sizes = bucket_sizes(math.isqrt(math.prod(size))) if data.buckets else [size]
        encoder = Latents(pipeline(), sizes, frames, data.fps, ENCODE_BATCH, survey.texts_per_group)
        encoder.check_space(folder, survey)
        write(readers.read(path, format, annotations), encoder, folder, fingerprint=fingerprint, total=survey.rows,
              selection=selection, progress=progress)  # fmt: skip
    return _choose(Store(folder), needs, data)


def source_fingerprint(
    path: Path, format: str, selection: Selection, annotations: Sequence[str] = ()
) -> dict[str, Any]:
    """What decides which groups are read."""
    return {
        "source": readers.identity(path, format, selection),
        "annotations": sidecar_identity(annotations),
        "reader": format,
        "selection": None if selection.limit is None else vars(selection),
        "layout": LAYOUT,
    }


def digest(values: Any) -> str:
    """A short name for JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def identity_collate(item: Any) -> Any:
    """For datasets whose `__getitems__` returns a whole micro-batch."""
    return item


def _ignore_sigint(worker: int) -> None:
    # Ctrl-C reaches the workers too; the run saves a checkpoint first, for which it still needs them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fitting_store(path: Path, model: ModelConfig, encoders: str, wanted: MediaSize) -> Store:
    store = Store(path)
    if "conditioning" not in store.manifest:
        raise UserError(f"{path}: this folder holds images that are not encoded, expected latents")
    expected = {"encoders": encoders, **wanted._asdict()}
    stored = {name: store.manifest["fingerprint"].get(name) for name in expected}
    if differing := differences(stored, expected):
        raise UserError(f"{path}: this cache does not fit model {model.path}: {'; '.join(differing)}")
    return store


def _on_the_fly(
    data: DataConfig,
    needs: Requirements,
    pipeline: Callable[[], TrainablePipeline],
    wanted: MediaSize,
    selection: Selection,
    annotations: Annotations,
    cache_root: Path,
) -> PreferenceDataset:
    shards = Shards.of(data.path, data.format, cache_root / "stream-shards", annotations)
    stream = Stream(shards, wanted, selection, data.stream)
    source = shards.file(0) if data.stream else data.path
    survey = readers.survey(source, shards.format, annotations, selection)
    check_requirements(needs, survey, data.path, selection.limit)
    if survey.reasons:
        logger.warning("%s: %d rows cannot be used, such as %s", data.path, survey.rows - survey.groups,
                       "; ".join(survey.reasons))  # fmt: skip
    stream.encode_with(pipeline())
    fingerprint = {
        "source": shards.identity(selection),
        "annotations": sidecar_identity(data.annotations),
        "reader": shards.format,
        "window": data.stream,
        "selection": vars(selection),
        "frames": wanted.frames,
        "fps": wanted.fps,
    }
    if data.stream:
        counts = {"groups in the first shard": survey.accepted, "shards": len(shards.names)}
    else:
        left_out = {
            "ties_left_out": sum(n for k, n in survey.ties.items() if k >= needs.candidates and not needs.ties),
            "disliked_left_out": survey.disliked if needs.likes_only else 0,
            "too_few_candidates": sum(n for k, n in survey.candidates.items() if k < needs.candidates),
        }
        counts = _counts(data.path, survey.accepted, survey.rows - survey.groups, left_out)
    return PreferenceDataset(
        stream,
        stream.steps,
        counts=counts,
        score_range=survey.score_range,
        fingerprint=digest(fingerprint),
        needs=needs,
    )


def _choose(store: Store, needs: Requirements, data: DataConfig) -> PreferenceDataset:
    """The groups of prepared data that serve the objective, the first so many of them."""
    stored: dict[str, Any] = store.manifest["counts"]
    check_candidates(needs, {int(k): count for k, count in stored["candidates"].items()}, data.path)
    check_columns(needs, stored["columns"], stored["groups"], data.path)
    enough = store.k >= needs.candidates
    disliked = (store.k == 1) & (store.best <= 0) & needs.likes_only
    usable = np.flatnonzero(enough & ~disliked & (needs.ties | ~store.tie))
    chosen = usable[: data.limit]
    if not len(chosen):
        raise nothing_left(needs, data.path, len(store), *(int(of.sum()) for of in (store.tie, disliked, ~enough)))
    check_alike(needs, Counter(store.k[chosen].tolist()), data.path)
    left_out = {
        "ties_left_out": int((enough & store.tie).sum()) if not needs.ties else 0,
        "disliked_left_out": int((enough & disliked).sum()),
        "too_few_candidates": int((~enough).sum()),
        "beyond_the_limit": len(usable) - len(chosen),
    }
    chosen = chosen[np.argsort(store.bucket[chosen], kind="stable")]
    fingerprint = {
        "parts": store.manifest["fingerprint"],
        "chosen": hashlib.sha256(chosen.astype(np.int64).tobytes()).hexdigest(),
        "pairs": wants_pairs(needs) and int(store.k[chosen].max()) > 2,
    }
    return PreferenceDataset(
        store,
        partial(steps, chosen, store.bucket[chosen]),
        counts=_counts(data.path, len(chosen), stored["skipped"], left_out),
        score_range=(float(store.worst[chosen].min()), float(store.best[chosen].max())),
        fingerprint=digest(fingerprint),
        needs=needs,
    )


def _counts(path: str, groups: int, skipped: int, left_out: Mapping[str, int]) -> dict[str, int]:
    reported = {name: count for name, count in left_out.items() if count}
    if reported:
        logger.info("%s: %s", path, ", ".join(f"{count} {name}" for name, count in reported.items()))
    return {"groups": groups, "skipped": skipped, **reported}
