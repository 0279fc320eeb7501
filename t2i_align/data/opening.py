"""From the data of a configuration to a dataset: what the source holds, whether it serves, and preparing it once."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data import readers
from t2i_align.data.annotations import NONE, Annotations, sidecar_identity
from t2i_align.data.encode import Latents, bucket_sizes
from t2i_align.data.flips import flipped, warn_of_sides
from t2i_align.data.loader import PreferenceDataset, PreparedDataset, digest
from t2i_align.data.media import CROP, MediaSize, frame_files
from t2i_align.data.schema import COLUMNS, EVERYTHING, Column, Counts, Group, Selection, Skipped
from t2i_align.data.store import LAYOUT, REASONS_SHOWN, Store, is_complete, is_store, write
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from t2i_align.utils.files import differences

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

logger = logging.getLogger(__name__)
CONTENT_HASHED_UP_TO = 256 << 20  # bytes


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
    if not data.path.startswith("testbed:") and is_store(Path(data.path)):
        if data.annotations:
            raise UserError(
                f"{data.path}: data.annotations are added to a source before it is encoded, and this is a finished "
                "cache. Name the source itself in data.path."
            )
        store = Store(Path(data.path))
        if "conditioning" not in store.manifest:
            raise UserError(f"{data.path}: this folder holds images that are not encoded, expected latents")
        expected = {"encoders": encoder_fingerprint(), **wanted._asdict()}
        stored = {name: store.manifest["fingerprint"].get(name) for name in expected}
        if differing := differences(stored, expected):
            raise UserError(f"{data.path}: this cache does not fit model {model.path}: {'; '.join(differing)}")
        return choose(store, needs, data)
    if data.stream or not data.cache:
        from t2i_align.data.stream import open_stream  # which builds on this module

        annotations = Annotations.load(data.annotations) if data.annotations else NONE
        selection = selection_of(data, needs)
        return open_stream(data, needs, pipeline, encoder_fingerprint(), wanted, selection, annotations, cache_root)
    path, format, annotations, survey = examined(data, needs)
    fingerprint = {
        **source_fingerprint(survey, format, data.annotations),
        **wanted._asdict(),
        "buckets": data.buckets,
        **({"flip": True} if data.flip else {}),
        "crop": CROP,
        "dtype": "float16",
        "encoders": encoder_fingerprint(),
    }
    folder = cache_root / digest(fingerprint)
    if not is_complete(folder):
        needs.check(survey, data.path, alike=data.limit is None)
        sizes = bucket_sizes(math.isqrt(math.prod(size))) if data.buckets else [size]
        encoder = Latents(pipeline(), sizes, frames, data.fps, data.encode_batch, survey.texts_per_group)
        warn_of_cut_texts(encoder.pipeline, [*survey.texts])
        encoder.check_space(folder, survey)
        items, total = readers.read(path, format, annotations), survey.rows
        if data.flip:
            if frames is not None:
                raise UserError("data.flip is for images")
            warn_of_sides(survey.texts)
            items, total = flipped(items), 2 * total
        write(items, encoder, folder, fingerprint=fingerprint, total=total, selection=survey.selection,
              progress=progress)  # fmt: skip
    return choose(Store(folder), needs, data)


def selection_of(data: DataConfig, needs: Requirements) -> Selection:
    """Which groups of the data the objective learns from."""
    return Selection(candidates=needs.candidates, ties=needs.ties, likes_only=needs.likes_only, limit=data.limit)


def examined(data: DataConfig, needs: Requirements) -> tuple[Path, str, Annotations, Survey]:
    """The source's path, its format, its annotations and what it holds.

    Raises:
        UserError: nothing there that can be used, of no known format, or broken.
    """
    annotations = Annotations.load(data.annotations) if data.annotations else NONE
    path = readers.resolve(data.path)
    format = readers.detect(path, data.format)
    found = survey(path, format, annotations, selection_of(data, needs))
    found.check_usable(data.path)
    return path, format, annotations, found


def check_source(data: DataConfig, needs: Requirements) -> None:
    """Raise UserError where the objective cannot learn from a source, as opening it would, but without a model."""
    if data.stream or (not data.path.startswith("testbed:") and is_store(Path(data.path))):
        return  # a stream is looked at as it is opened, and a cache was
    *_, survey = examined(data, needs)
    needs.check(survey, data.path, alike=data.limit is None)


def choose(store: Store, needs: Requirements, data: DataConfig) -> PreparedDataset:
    """The groups of prepared data that serve the objective, the first so many of them."""
    disliked = (store.k == 1) & (store.best <= 0)
    found = Counts(
        candidates=counted(store.k),
        ties=counted(store.k[store.tie]),
        disliked=int(disliked.sum()),
        columns=Counter(store.manifest["counts"]["columns"]),
    )
    needs.check(found, data.path, alike=False)
    fitting = (store.k >= needs.candidates) & (needs.ties | ~store.tie) & ~(disliked & needs.likes_only)
    alike = fitting & _texts_alike(store, needs.compared_texts)
    usable = np.flatnonzero(fitting & ~alike)
    if not len(usable):
        raise UserError(f"{data.path}: no group is left: the encoder reads the same tokens of both texts of each group")
    chosen = usable[: data.limit]
    needs.check_alike(counted(store.k[chosen]), data.path)
    left_out = {**needs.left_out(found), "texts_alike_left_out": int(alike.sum())}
    left_out["beyond_the_limit"] = len(usable) - len(chosen)
    counts = {"groups": len(chosen), "skipped": store.manifest["counts"]["skipped"], **left_out}
    return PreparedDataset(store, chosen[np.argsort(store.bucket[chosen], kind="stable")], needs, counts)


def source_fingerprint(survey: Survey, format: str, annotations: Sequence[str] = ()) -> dict[str, Any]:
    """What decides which groups are read."""
    return {
        "source": survey.identity,
        "annotations": sidecar_identity(annotations) if annotations else [],
        "reader": format,
        "selection": None if survey.selection.limit is None else vars(survey.selection),
        "layout": LAYOUT,
    }


def _texts_alike(store: Store, columns: Sequence[Column]) -> np.ndarray:
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


@dataclass
class Survey(Counts):
    """What a source holds, without opening its images.

    texts: prompts and captions. skips: rows that cannot be used by their reasons. reasons: the first of these with
    their origin. accepted, score_range: number of groups that the selection accepts, and their least and greatest
    score. identity: a hash of all groups and their images. embedded_bytes: an upper bound for images inside the
    source's own files.
    """

    selection: Selection = EVERYTHING
    texts: set[str] = field(default_factory=set)
    skips: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    accepted: int = 0
    score_range: tuple[float, float] = (math.inf, -math.inf)
    identity: str = ""
    embedded_bytes: int = 0

    @property
    def rows(self) -> int:
        """Groups and skipped rows."""
        return self.groups + self.skips.total()

    @property
    def texts_per_group(self) -> int:
        """How many texts are encoded of a group at most: its prompt and those of the columns."""
        texts = [column for column in COLUMNS.values() if column.text and self.columns.get(column.name)]
        return 1 + sum(max(self.candidates) if column.per_candidate else 1 for column in texts)

    def check_usable(self, source: str | Path) -> None:
        """Raise UserError with the first reasons where no row can be used."""
        if not self.groups:
            reasons = "; ".join(self.reasons)
            raise UserError(f"{source}: no usable group among {self.rows} rows. First reasons: {reasons}")

    def add(self, item: Group | Skipped) -> None:
        """Count an item of the source."""
        if isinstance(item, Skipped):
            self.skips[item.reason] += 1
            self.reasons += [f"{item.origin}: {item.reason}"] if len(self.reasons) < REASONS_SHOWN else []
            return
        k = len(item.candidates)
        self.candidates[k] += 1
        self.ties.update([k] if item.is_tie else [])
        self.disliked += item.is_disliked
        self.texts.update(item.texts)
        self.columns.update(item.present)
        if self.selection.accepts(item):
            least, greatest = self.score_range
            self.accepted += 1
            self.score_range = min(least, *item.scores), max(greatest, *item.scores)


def counted(k: np.ndarray) -> Counter[int]:
    """How many groups there are of each number of candidates, from all groups' numbers."""
    return +Counter(dict(enumerate(np.bincount(k).tolist())))  # without zeros


class Contents:
    """A hash of groups and their images; beyond CONTENT_HASHED_UP_TO, sizes and times of files stand for their content.

    embedded: whether images lie in the source's own files, which then count instead.
    """

    def __init__(self) -> None:
        self.digest, self.hashed, self.embedded = hashlib.sha256(), 0, False

    def add(self, group: Group) -> None:
        paths = [media for media in group.candidates if isinstance(media, Path)]
        self.embedded |= len(paths) < len(group.candidates)
        names = [os.fsencode(media.name).hex() for media in paths]
        row = [group.id, group.prompt, group.scores, dict(group.columns), names]
        self.digest.update(json.dumps(row, sort_keys=True).encode())
        for media in paths:
            if media.is_dir():
                for file in frame_files(media):
                    self.add_file(file)
            else:
                self.add_file(media)

    def add_file(self, file: Path) -> None:
        stat = file.stat()
        self.hashed += stat.st_size
        large = f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape")
        self.digest.update(large if self.hashed > CONTENT_HASHED_UP_TO else hashlib.sha256(file.read_bytes()).digest())


def survey(
    path: str | Path,
    format: str = "auto",
    annotations: Annotations = NONE,
    selection: Selection = EVERYTHING,
    part: Path | None = None,
) -> Survey:
    """What a source, or a part of it, holds, as far as the limit lets it be read, without decoding its images.

    Annotations that belong to nothing in the source are reported as a warning, unless a limit ends it early.

    Raises:
        UserError: as `read` does.
    """
    source = readers.resolve(path)
    format = readers.detect(source, format)
    unmatched = dict.fromkeys(annotations.entries)
    result, contents = Survey(selection=selection), Contents()
    items = readers.read(source, format, annotations, best_first=False, images=False, selection=selection, part=part,
                         seen=contents.add)  # fmt: skip
    for item in items:
        unmatched.pop(item.id, None)
        result.add(item)
    for file in ([part] if part else sorted(readers.reader_of(format).files(source))) if contents.embedded else ():
        contents.add_file(file)
        result.embedded_bytes += file.stat().st_size
    result.identity = contents.digest.hexdigest()[:16]
    if unmatched and selection.limit is None:
        logger.warning("%s: %d of %d annotations belong to no group of this source, such as that of id %r",
                       path, len(unmatched), len(annotations.entries), next(iter(unmatched)))  # fmt: skip
    return result


def warn_of_cut_texts(pipeline: TrainablePipeline, texts: Sequence[str]) -> None:
    """Log how many texts are longer than the encoders read."""
    names: dict[tuple[int, int], list[str]] = {}
    for (name, limit), tokens in pipeline.tokenize(texts).items():
        names.setdefault((sum(len(ids) > limit for ids in tokens), limit), []).append(name)
    for (longer, limit), tokenizers in names.items():
        if longer:
            message = "%d of %d texts are longer than %d tokens (%s); what is beyond is not read"
            logger.warning(message, longer, len(texts), limit, ", ".join(tokenizers))
