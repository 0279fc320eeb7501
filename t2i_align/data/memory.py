"""Preference data that are in memory, and batches for training loops of one's own."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from torch import nn

from t2i_align.conditioning import segments
from t2i_align.config import DataConfig, ModelConfig
from t2i_align.data.batch import Batch
from t2i_align.data.loader import digest
from t2i_align.data.opening import open_dataset
from t2i_align.data.spec import is_spec
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError
from t2i_align.objectives.base import Requirements
from t2i_align.utils.files import atomic_file, write_text
from t2i_align.utils.tensors import tensors_hash

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline

PAIRS = Requirements(candidates=2, ties=False)
MEDIA = ("chosen", "rejected", "images", "videos")  # keys of a row that hold images or clips
Data = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def source_path(data: Data, folder: Path) -> str:
    """The path of preference data: itself, or of a file in `folder` with what is in memory, named by its content.

    Args:
        data: a path; the keys of a dataset spec; or rows with the keys of JSON Lines (`prompt`, `chosen` and
            `rejected`, or `images` and `scores`), whose images are PIL images, encoded bytes or paths.

    Raises:
        UserError: rows that are none, or lack an image; names the row and the key.
    """
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, Mapping):
        values = dict(data)
        if not str(values.get("path", "")).startswith(("hub:", "testbed:")):
            values["path"] = str(Path(str(values.get("path", ""))).expanduser().absolute())
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        file = folder / f"spec-{hashlib.sha256(text.encode()).hexdigest()[:16]}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
        return str(file)
    if not data:
        raise UserError("data: a list without rows")
    rows = [_row(row, f"data[{number}]") for number, row in enumerate(data)]
    table = pa.Table.from_pylist(rows)
    content = io.BytesIO()
    pq.write_table(table, content)
    file = folder / f"rows-{hashlib.sha256(content.getbuffer()).hexdigest()[:16]}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_bytes(content.getbuffer())
    return str(file)


def with_root(data: DataConfig, folder: Path) -> DataConfig:
    """The same data, described by a dataset spec in `folder` where they have a `root`.

    Raises:
        UserError: a dataset spec, which has a `root` of its own.
    """
    if data.root is None:
        return data
    if is_spec(Path(data.path)):
        raise UserError(f"data.root: {data.path} is a dataset spec; give `root` in it instead")
    described = {"path": data.path, "format": data.format, "root": str(Path(data.root).absolute())}
    return replace(data, path=source_path(described, folder), format="auto", root=None)


def _row(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a mapping with keys such as 'prompt', found {type(row).__name__}")
    out = dict(row)
    for key in MEDIA:
        if key in row:
            one = not isinstance(row[key], list | tuple)
            media = [_media(value, f"{where}[{key!r}]") for value in ([row[key]] if one else row[key])]
            out["images" if key == "videos" else key] = media[0] if one else media
    out.pop("videos", None)
    return out


def _media(value: Any, where: str) -> dict[str, Any]:
    """An image or clip as the Image feature of `datasets` holds it."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    try:
        if isinstance(value, Image.Image):
            content = io.BytesIO()
            value.save(content, format="PNG", exif=value.getexif())
            return {"bytes": content.getvalue(), "path": None}
        if isinstance(value, str | Path):
            return {"bytes": Path(value).expanduser().read_bytes(), "path": None}
    except OSError as error:  # no such file, or a mode that PNG lacks
        raise UserError(f"{where}: {error}") from error
    raise UserError(f"{where}: expected a PIL image, encoded bytes or a path, found {type(value).__name__}")


def batches(
    data: Data,
    pipeline: TrainablePipeline,
    *,
    batch_size: int = 8,
    needs: Requirements = PAIRS,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    limit: int | None = None,
    cache: str | Path = "cache",
    progress: bool = True,
) -> Iterator[tuple[Batch, SampleRNG]]:
    """Endless batches of preferences, encoded by a pipeline, with the random numbers of their samples.

    Args:
        data: a path, the keys of a dataset spec, or rows with PIL images; see `source_path`.
        pipeline: with its encoders; batches are on its device.
        needs: of an objective, as `DiffusionDPO.needs`: how many candidates, which columns.
        seed: decides order, noise and times.
        size: (height, width) in pixels, and frames of a clip (default: the model's own).
        limit: use only the first so many groups.
        cache: folder in which the data are encoded once.

    Raises:
        UserError: data that cannot be used.
    """
    folder = Path(cache)
    source = open_dataset(
        DataConfig(path=source_path(data, folder), limit=limit),
        ModelConfig(path=pipeline.source),
        needs=needs,
        pipeline=lambda: pipeline,
        encoder_fingerprint=lambda: encoders_digest(pipeline),
        size=size or pipeline.default_size,
        frames=frames or pipeline.default_frames,
        cache_root=folder,
        progress=progress,
    )
    for item in source.loader(seed=seed, start_step=0, batch_size=batch_size):
        batch = source.to_batch(item, pipeline.device)
        yield batch, SampleRNG(seed, batch.keys, pipeline.process, device=pipeline.device)


def encoders_digest(pipeline: TrainablePipeline) -> str:
    """A fingerprint of the encoders that a pipeline has in memory."""
    parts = {name: getattr(pipeline.pipe, name) for name in pipeline.encoder_names}
    networks = {name: part.state_dict() for name, part in parts.items() if isinstance(part, nn.Module)}
    tensors = {f"{name}.{key}": tensor for name, state in networks.items() for key, tensor in state.items()}
    return digest([pipeline.family, segments.fingerprint(pipeline), tensors_hash(tensors)])
