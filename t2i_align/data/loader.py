"""What the trainer sees of the data: a path in the configuration becomes an endless stream of batches."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data import readers
from t2i_align.data.annotations import Annotations, sidecar_identity
from t2i_align.data.buckets import BucketedGroups, is_bucketed, prepare_buckets
from t2i_align.data.cache import CachedGroups, Item, open_cache, prepare
from t2i_align.data.layout import LAYOUT, MANIFEST, differences
from t2i_align.data.live import LiveGroups, LiveItem, index_images
from t2i_align.data.media import CROP, MediaSize
from t2i_align.data.readers import Limit
from t2i_align.data.sampling import BucketSampler, Position, StreamSampler
from t2i_align.data.schema import Batch, Conditioning
from t2i_align.data.stored import is_store
from t2i_align.data.stream import Pieces, StreamedSource
from t2i_align.data.survey import Survey
from t2i_align.errors import UserError
from t2i_align.objectives.base import DataStats, Requirements

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

logger = logging.getLogger(__name__)
ENCODE_BATCH = 8
AnyGroups = CachedGroups | BucketedGroups | LiveGroups
MAKES = {"captions": "caption", "negative_caption": "perturb", "scores": "relabel"}  # the command for each column


class Source:
    """The groups that a run trains on; with `pairs`, the best and the worst candidate of each.

    columns: what batches have beside latents, scores and the prompt (see `Requirements.columns`).
    counts: groups, skipped, and where there are any, ties_left_out, disliked_left_out, too_few_candidates,
    beyond_the_limit.
    fingerprint: equal for two sources that give the same samples under the same numbers.
    """

    def __init__(
        self,
        groups: AnyGroups,
        numbers: np.ndarray,
        counts: dict[str, int],
        pairs: bool,
        columns: Sequence[str] = (),
    ) -> None:
        self.groups, self.numbers, self.counts, self.pairs, self.columns = groups, numbers, counts, pairs, columns
        parts = {"parts": groups.manifest["fingerprint"]}
        parts["chosen"] = hashlib.sha256(numbers.astype(np.int64).tobytes()).hexdigest()
        if pairs and groups.k[numbers].max() > 2:
            parts["taken"] = "best and worst"
        self.fingerprint = _digest(parts)

    def __len__(self) -> int:
        return len(self.numbers)

    def loader(
        self, *, seed: int, start_step: int, batch_size: int, accumulate: int, rank: int, world: int, workers: int
    ) -> Iterator[Item | LiveItem]:
        """Endless micro-batches of this process, from an optimiser step on; see `sampling.StreamSampler`."""
        cut = (seed, start_step, batch_size, rank, world, accumulate)
        sampler = StreamSampler(len(self), *cut)
        if isinstance(self.groups, BucketedGroups):
            sampler = BucketSampler(self.groups.bucket[self.numbers].tolist(), *cut)
        loader: DataLoader[Any] = DataLoader(
            _Chosen(self.groups, self.numbers, self.pairs, self.columns),
            batch_sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=workers,
            worker_init_fn=_leave_interrupts_to_the_run,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would draw from the global one
        )
        return iter(loader)

    def to_batch(self, item: Any, device: torch.device) -> Batch:
        """A micro-batch on its device, in float32; on the fly, this is where it is encoded."""
        return self.groups.to_batch(item, device)

    def facts(self) -> DataStats:
        """What an objective may be fitted to."""
        least, greatest = self.groups.worst[self.numbers].min(), self.groups.best[self.numbers].max()
        return DataStats(score_range=(float(least), float(greatest)))

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        """The empty prompt's conditioning, [1, ...]."""
        return self.groups.empty_conditioning(device)


AnySource = Source | StreamedSource


def open_source(
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
) -> AnySource:
    """Open the configured data, preparing it first where that was not done yet.

    Args:
        needs: what the objective wants; checked before anything is encoded.
        pipeline: gives the pipeline with its encoders; called only when something must be encoded.
        encoder_fingerprint: of the model's VAE and text encoders, and how they run.
        size: (height, width) in pixels. frames: of a clip; None for images.
        cache_root: the folder in which caches are kept, one a fingerprint.

    Raises:
        UserError: the source, the cache or what the objective needs do not fit, with what was expected and found.
        PipelineError: a size that the model cannot take.
    """
    extent = MediaSize(*size, frames, data.fps)
    if not data.path.startswith("testbed:") and is_store(Path(data.path)):
        if data.annotations:
            raise UserError(
                f"{data.path}: data.annotations are added to a source before it is encoded, and this is a finished "
                "cache. Name the source itself in data.path."
            )
        cached = _open(Path(data.path))
        _check_encoders(cached, model, encoder_fingerprint(), extent)
        groups: AnyGroups = cached
    elif data.stream:
        return _streamed(data, needs, pipeline, extent, cache_root)
    else:
        path = readers.resolve(data.path)
        name = readers.detect(path, data.format)
        limit = None
        if data.limit is not None:
            limit = Limit(groups=data.limit, candidates=needs.candidates, ties=needs.ties, likes_only=needs.likes_only)
        if data.buckets:
            groups = _bucketed(path, name, data, needs, pipeline, encoder_fingerprint(), extent, cache_root, limit,
                               progress)  # fmt: skip
        elif data.cache:
            parts = fingerprint_parts(path, name, encoder_fingerprint(), extent, limit, data.annotations)
            folder = cache_root / _digest(parts)
            if not (folder / MANIFEST).exists():
                added = Annotations.load(data.annotations)
                survey = readers.survey(path, name, added, limit)
                check_needs(needs, survey, data.path, limit)
                prepare(readers.read(path, name, added, limit=limit), pipeline(), folder, fingerprint=parts,
                        **extent._asdict(), batch_size=ENCODE_BATCH, progress=progress, survey=survey,
                        limit=limit)  # fmt: skip
            groups = open_cache(folder)
        else:
            groups = _live(path, name, data.annotations, needs, pipeline, extent, cache_root, limit, progress)
    return _select(groups, needs, data)


def fingerprint_parts(
    path: Path,
    reader: str,
    encoders: str,
    extent: MediaSize,
    limit: Limit | None = None,
    sidecars: Sequence[str] = (),
) -> dict[str, Any]:
    """All that decides what a latent cache holds, by name."""
    return {
        **_source_parts(path, reader, limit, sidecars),
        **extent._asdict(),
        "crop": CROP,
        "dtype": "float16",
        "encoders": encoders,
    }


def _source_parts(path: Path, reader: str, limit: Limit | None, sidecars: Sequence[str]) -> dict[str, Any]:
    return {
        "source": readers.identity(path, reader, limit),
        "annotations": sidecar_identity(sidecars),
        "reader": reader,
        "limit": None if limit is None else vars(limit),
        "layout": LAYOUT,
    }


def check_needs(needs: Requirements, survey: Survey, path: str, limit: Limit | None = None) -> None:
    """Raise UserError unless some group of the source can serve the objective, and all that can make one batch."""
    if not survey.groups:
        raise UserError(f"{path}: no usable group among {survey.rows} rows. First reasons: {'; '.join(survey.reasons)}")
    _check_candidates(needs, survey.candidates, path)
    _check_columns(needs, survey.columns, survey.groups, path)
    if not needs.ties and survey.ties == survey.candidates:
        raise UserError(f"{path}: all {survey.groups} groups are ties, from which this objective learns nothing")
    disliked = survey.disliked if needs.likes_only else 0
    usable = Counter(survey.candidates) - Counter({} if needs.ties else survey.ties) - Counter({1: disliked})
    enough = {k: count for k, count in usable.items() if k >= needs.candidates}
    if not enough:
        few = sum(count for k, count in survey.candidates.items() if k < needs.candidates)
        raise _nothing_left(needs, path, survey.groups, sum(survey.ties.values()), disliked, few)
    if limit is None:  # else the first ones may well be alike
        _check_alike(needs, enough, path)


def _check_candidates(needs: Requirements, candidates: dict[int, int], path: str) -> None:
    if candidates and max(candidates) < needs.candidates:
        raise UserError(
            f"{path}: the objective compares {needs.candidates} candidates of a prompt, "
            f"but the groups here have {_listed(candidates)}"
        )


def _check_alike(needs: Requirements, candidates: dict[int, int], path: str) -> None:
    if len(candidates) > 1 and not _wants_pairs(needs):
        raise UserError(
            f"{path}: for this objective, groups must have the same number of candidates, found {_listed(candidates)}"
        )


def _wants_pairs(needs: Requirements) -> bool:
    return needs.candidates == 2 and not needs.lists  # groups of any size then give their best and their worst


def _check_columns(needs: Requirements, columns: dict[str, int], groups: int, path: str) -> None:
    for name in needs.columns:
        found = columns.get(name, 0)
        if name == "scores" and found:  # a scorer's numbers may happen to be 0 and 1 in some of the groups
            continue
        if found < groups:
            what = f"{name!r} that are more than labels" if name == "scores" else repr(name)
            hint = f" `t2i-align {MAKES[name]}` makes it: name its file in data.annotations." if name in MAKES else ""
            raise UserError(
                f"{path}: the objective needs {what} with each group, but only {found} of {groups} groups have it."
                f"{hint}"
            )


def _check_encoders(
    cached: CachedGroups | BucketedGroups, model: ModelConfig, encoders: str, extent: MediaSize
) -> None:
    wanted = {"encoders": encoders, **extent._asdict()}
    found = {name: cached.manifest["fingerprint"].get(name) for name in wanted}
    if differing := differences(found, wanted, "the cache has", f"model {model.path} wants"):
        raise UserError(f"{cached.path}: this cache does not fit the run. {differing}.")


def _live(
    path: Path,
    reader: str,
    sidecars: Sequence[str],
    needs: Requirements,
    pipeline: Callable[[], TrainablePipeline],
    extent: MediaSize,
    cache_root: Path,
    limit: Limit | None,
    progress: bool,
) -> LiveGroups:
    parts = {**_source_parts(path, reader, limit, sidecars), "content": "images", "root": str(path.resolve())}
    parts |= {"frames": extent.frames, "fps": extent.fps}  # which decide what can be used
    folder = cache_root / f"images-{_digest(parts)}"
    encoder: TrainablePipeline | None = None
    if not (folder / MANIFEST).exists():
        added = Annotations.load(sidecars)
        survey = readers.survey(path, reader, added, limit)
        check_needs(needs, survey, str(path), limit)
        encoder = pipeline()
        encoder.check_size(extent.height, extent.width, extent.frames)
        index_images(readers.read(path, reader, added, limit=limit), folder, fingerprint=parts, extent=extent,
                       survey=survey,
                       limit=limit, source_bytes=readers.embedded_bytes(path, reader), progress=progress)  # fmt: skip
    encoder = encoder or pipeline()
    encoder.check_size(extent.height, extent.width, extent.frames)
    return LiveGroups(folder).encode_with(encoder, extent)


def _open(folder: Path) -> CachedGroups | BucketedGroups:
    return BucketedGroups(folder) if is_bucketed(folder) else open_cache(folder)


def _bucketed(
    path: Path,
    reader: str,
    data: DataConfig,
    needs: Requirements,
    pipeline: Callable[[], TrainablePipeline],
    encoders: str,
    extent: MediaSize,
    cache_root: Path,
    limit: Limit | None,
    progress: bool,
) -> BucketedGroups:
    parts = fingerprint_parts(path, reader, encoders, extent, limit, data.annotations) | {"buckets": True}
    folder = cache_root / _digest(parts)
    if not (folder / MANIFEST).exists():
        added = Annotations.load(data.annotations)
        survey = readers.survey(path, reader, added, limit)
        check_needs(needs, survey, data.path, limit)
        prepare_buckets(partial(readers.read, path, reader, added, limit=limit), pipeline(), folder, fingerprint=parts,
                        resolution=math.isqrt(extent.height * extent.width), batch_size=ENCODE_BATCH, survey=survey,
                        limit=limit, progress=progress)  # fmt: skip
    return BucketedGroups(folder)


def _streamed(
    data: DataConfig,
    needs: Requirements,
    pipeline: Callable[[], TrainablePipeline],
    extent: MediaSize,
    cache_root: Path,
) -> StreamedSource:
    """Windows of `data.stream` rows, each an index of images like that of data without a cache."""
    encoder = pipeline()
    encoder.check_size(extent.height, extent.width, extent.frames)
    pieces = Pieces.of(data.path, data.format, cache_root / "stream-pieces")
    parts: dict[str, Any] = {"source": pieces.identity, "reader": pieces.format, "rows": data.stream, "layout": LAYOUT}
    parts |= {"frames": extent.frames, "fps": extent.fps}
    return StreamedSource(
        pieces,
        rows=data.stream or 0,
        folder=cache_root / f"stream-{_digest(parts)}",
        index=partial(index_images, fingerprint=parts, extent=extent, survey=Survey(), source_bytes=0, progress=False),
        open_window=lambda folder: LiveGroups(folder).encode_with(encoder, extent),
        usable=partial(usable, needs=needs),
        pairs=_wants_pairs(needs),
        columns=needs.columns,
        fingerprint=_digest({**parts, "needs": str(vars(needs))}),
    )


def _select(groups: AnyGroups, needs: Requirements, data: DataConfig) -> Source:
    counts: dict[str, Any] = groups.manifest["counts"]
    _check_candidates(needs, {int(k): count for k, count in counts["candidates"].items()}, data.path)
    _check_columns(needs, counts["columns"], counts["groups"], data.path)
    enough = groups.k >= needs.candidates
    disliked = (groups.k == 1) & (groups.best <= 0) & needs.likes_only
    numbers = usable(groups, needs)
    chosen = numbers[: data.limit]
    if not len(chosen):
        totals = (int(of.sum()) for of in (groups.tie, disliked, ~enough))
        raise _nothing_left(needs, data.path, len(groups), *totals)
    _check_alike(needs, Counter(groups.k[chosen].tolist()), data.path)
    left_out = {
        "ties_left_out": int((enough & groups.tie).sum()) if not needs.ties else 0,
        "disliked_left_out": int((enough & disliked).sum()),
        "too_few_candidates": int((~enough).sum()),
        "beyond_the_limit": len(numbers) - len(chosen),
    }
    reported = {name: count for name, count in left_out.items() if count}
    if reported:
        logger.info("%s: %s", data.path, ", ".join(f"{count} {name}" for name, count in reported.items()))
    counted = {"groups": len(chosen), "skipped": counts["skipped"], **reported}
    return Source(groups, chosen, counted, pairs=_wants_pairs(needs), columns=needs.columns)


def usable(groups: AnyGroups, needs: Requirements) -> np.ndarray:
    """The numbers of the groups that serve an objective."""
    disliked = (groups.k == 1) & (groups.best <= 0) & needs.likes_only
    return np.flatnonzero((groups.k >= needs.candidates) & ~disliked & (needs.ties | ~groups.tie))


def _nothing_left(needs: Requirements, path: str, groups: int, ties: int, disliked: int, few: int) -> UserError:
    return UserError(
        f"{path}: no group is left: of {groups}, {ties} are ties, {disliked} are disliked, "
        f"{few} have fewer than {needs.candidates} candidates"
    )


class _Chosen(Dataset[Any]):
    """The chosen groups, a whole micro-batch at a time."""

    def __init__(self, groups: AnyGroups, numbers: np.ndarray, pairs: bool, columns: Sequence[str]) -> None:
        self.groups, self.numbers, self.pairs, self.columns = groups, numbers, pairs, columns

    def __getitem__(self, position: Position) -> Any:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[Position]) -> Any:
        rows = [(epoch, int(self.numbers[index])) for epoch, index in positions]
        return self.groups.fetch(rows, self.pairs, self.columns)


def _leave_interrupts_to_the_run(worker: int) -> None:
    # Ctrl-C reaches the workers too; the run saves a checkpoint first, for which it still needs them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(item: Any) -> Any:
    return item  # `__getitems__` has collated it


def _listed(candidates: dict[Any, Any]) -> str:
    return ", ".join(f"{k} candidate{'s' * (int(k) > 1)} ({count} groups)" for k, count in sorted(candidates.items()))


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
