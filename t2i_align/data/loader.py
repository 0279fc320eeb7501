"""From a path in the configuration to an endless stream of batches: which groups, in which order, on which device."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data import batches, readers
from t2i_align.data.annotations import NONE, Annotations, sidecar_identity
from t2i_align.data.encode import Latents, bucket_sizes
from t2i_align.data.flips import flipped, warn_of_sides
from t2i_align.data.media import CROP, MediaSize
from t2i_align.data.schema import COLUMNS, Batch, Conditioning
from t2i_align.data.segments import by_latent_frame
from t2i_align.data.store import LAYOUT, TEXTS, Store, is_complete, is_store, write
from t2i_align.data.survey import Selection, Survey, counted
from t2i_align.errors import UserError
from t2i_align.objectives.base import DataStats, Requirements
from t2i_align.utils.files import differences

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline
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
            batch_sampler=batches.micro_batches(ordered, batch_size, accumulate, rank, world),
            collate_fn=batches.identity_collate,
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
        return batches.steps(self.numbers, buckets, seed=seed, size=size, start=start)

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
                sizes.append([batches.time_ids(one, *bucket["size"]) for one in own_sizes])
            for name, values in columns.items():  # of texts, their numbers
                value = self.store.index[name][number] if COLUMNS[name].text else group[name][row]
                values.append(COLUMNS[name].take(value.as_py(), places))
        if "segment_scores" in columns:
            columns = by_latent_frame(columns, self.store.manifest.get("latent_times", [0.0]))
        encoded = batches.encode_fields(self._conditioning, prompts, columns)
        return {
            "keys": keys,
            "scores": torch.from_numpy(np.array(scores, np.float32)),
            "latents": _joined(latents, torch.float16, len(keys), -1, *bucket["shape"]),
            "sizes": torch.tensor(sizes).float() if sizes else None,
            **encoded,
        }

    def to_batch(self, item: Item, device: torch.device) -> Batch:
        batch = Batch(**{**batches.widened(item, device), "keys": tuple(item["keys"])})
        return self.users.attached(batch) if self.users else batch

    def some_prompts(self, count: int) -> list[str]:
        texts = list(dict.fromkeys(self.store.index["prompt"][number].as_py() for number in self.numbers))
        evenly = [texts[place * len(texts) // min(count, len(texts))] for place in range(min(count, len(texts)))]
        places = [self.store.locate(text, TEXTS) for text in evenly]
        return [columns["text"][row].as_py() for columns, row in places]

    def empty_conditioning(self, device: torch.device) -> Conditioning:
        conditioning: Conditioning = batches.widened(self._conditioning([0]), device)
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
        batches.warn_of_cut_texts(encoder.pipeline, [*survey.texts])
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
        UserError: nothing there, of no known format, or broken.
    """
    annotations = Annotations.load(data.annotations) if data.annotations else NONE
    path = readers.resolve(data.path)
    format = readers.detect(path, data.format)
    return path, format, annotations, readers.survey(path, format, annotations, selection_of(data, needs))


def check_source(data: DataConfig, needs: Requirements) -> None:
    """Raise UserError where the objective cannot learn from a source, as opening it would, but without a model."""
    if data.stream or (not data.path.startswith("testbed:") and is_store(Path(data.path))):
        return  # a stream is looked at as it is opened, and a cache was
    *_, survey = examined(data, needs)
    needs.check(survey, data.path, alike=data.limit is None)


def choose(store: Store, needs: Requirements, data: DataConfig) -> PreparedDataset:
    """The groups of prepared data that serve the objective, the first so many of them."""
    disliked = (store.k == 1) & (store.best <= 0)
    survey = Survey(
        candidates=counted(store.k),
        ties=counted(store.k[store.tie]),
        disliked=int(disliked.sum()),
        columns=Counter(store.manifest["counts"]["columns"]),
    )
    needs.check(survey, data.path, alike=False)
    fitting = (store.k >= needs.candidates) & (needs.ties | ~store.tie) & ~(disliked & needs.likes_only)
    alike = fitting & batches.texts_alike(store, needs.compared_texts)
    usable = np.flatnonzero(fitting & ~alike)
    if not len(usable):
        raise UserError(f"{data.path}: no group is left: the encoder reads the same tokens of both texts of each group")
    chosen = usable[: data.limit]
    needs.check_alike(counted(store.k[chosen]), data.path)
    left_out = {**needs.left_out(survey), "texts_alike_left_out": int(alike.sum())}
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


def digest(values: Any) -> str:
    """A short name for JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _leave_signals_to_the_run(worker: int) -> None:
    # They reach the workers too; the run saves a checkpoint first, for which it still needs them.
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # Windows has two of them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
