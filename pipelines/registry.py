"""Find the family of a checkpoint and load it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from pipelines.base import PipelineError, TrainablePipeline
from pipelines.sd import StableDiffusion

FAMILIES: dict[str, type[TrainablePipeline]] = {family.family: family for family in (StableDiffusion,)}

# Names that diffusers gives to the layouts of single-file checkpoints.
SINGLE_FILE_TYPES = {"v1": "StableDiffusionPipeline", "v2": "StableDiffusionPipeline"}
SINGLE_FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".bin")
WEIGHT_ENDINGS = (".safetensors", ".bin")  # in the order in which they are preferred
CONFIG_ENDINGS = (".json", ".txt", ".model")  # of configurations and tokenizers


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    denoiser_dtype: torch.dtype | None = None,
    encoders: bool = True,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
) -> TrainablePipeline:
    """Load a diffusers folder, a Hub id or a single-file checkpoint; its own files say which family it is.

    Args:
        path: local folder, local single file, or "owner/name" on the Hub.
        dtype: of every network's weights. denoiser_dtype: of the denoiser's, where it differs (what a model must
            keep in float32 stays there).
        encoders: False leaves out VAE and text encoders (training from a cache needs neither).
        revision, variant: as in diffusers' `from_pretrained`.
        single_file_config: for single files, a folder or Hub id with the matching diffusers configuration;
            without it diffusers asks the Hub.

    Raises:
        PipelineError: nothing there, not a pipeline, a family that is not known, a component missing.
    """
    if Path(path).is_file():
        return _load_single_file(Path(path), dtype, denoiser_dtype or dtype, single_file_config)
    index = _model_index(path, revision)
    family = _family_of(str(index.get("_class_name")), str(path))
    dtypes = {"default": dtype, family.denoiser_name: denoiser_dtype or dtype}

    def read(**replaced: Any) -> DiffusionPipeline:
        try:
            return getattr(diffusers, index["_class_name"]).from_pretrained(
                str(path), dtype=dtypes, revision=revision, variant=variant, **_no_safety_checker(index), **replaced
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise PipelineError(f"{path}: the checkpoint could not be loaded: {error}") from error

    # Without its encoders a pipeline still loads; diffusers wants each missing one named.
    without = {} if encoders else {name: None for name in family.encoder_names if name in index}
    vae_config = None if encoders else AutoencoderKL.load_config(str(path), subfolder="vae", revision=revision)
    pipeline = family(read(**without), str(path), vae_config)
    pipeline.read_around = lambda denoiser: read(**{family.denoiser_name: denoiser})
    return pipeline


def encoder_fingerprint(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
) -> str:
    """A hash of all that turns pictures and prompts into a cache: VAE, text encoders, tokenizers, as `load` has them.

    Two checkpoints that differ only in their denoiser share it, so a cache made with one serves the other.
    """
    if (file := Path(path)).is_file():
        files = {file.name: file}
        if single_file_config is not None:
            files |= _encoder_files(single_file_config, weights=False)
    else:
        files = _encoder_files(path, revision, variant)
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _encoder_files(
    path: str | Path, revision: str | None = None, variant: str | None = None, *, weights: bool = True
) -> dict[str, Path]:
    """What diffusers reads of a pipeline's encoders, by name; a Hub id's are fetched, and no more than these."""
    index = _model_index(path, revision)
    names = _family_of(str(index.get("_class_name")), str(path)).encoder_names
    root = Path(path)
    if not root.is_dir() and weights:
        others: dict[str, Any] = {name: None for name in index if name not in names and not name.startswith("_")}
        root = Path(DiffusionPipeline.download(str(path), revision=revision, variant=variant, **others))
    elif not root.is_dir():
        wanted = [f"{name}/*{ending}" for name in names for ending in CONFIG_ENDINGS]
        root = Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    files: list[Path] = []
    for name in names:
        found = [file for file in (root / name).glob("*") if file.is_file()]
        files += [file for file in found if file.suffix in CONFIG_ENDINGS and ".index." not in file.name]
        files += _weights(found, variant) if weights else []
    return {f"{file.parent.name}/{file.name}": file for file in files}


def _weights(files: list[Path], variant: str | None) -> list[Path]:
    """Of a component's files those that `from_pretrained` loads: the variant's, or where it has none the default."""

    def of(file: Path) -> str:  # model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
        return file.stem.partition(".")[2].partition("-")[0]

    found = [file for file in files if file.suffix in WEIGHT_ENDINGS]
    found = [file for file in found if of(file) == variant] or [file for file in found if not of(file)]
    return [file for file in found if file.suffix == WEIGHT_ENDINGS[0]] or found


def _model_index(path: str | Path, revision: str | None) -> dict[str, Any]:
    local = Path(path)
    if local.is_dir():
        index = local / "model_index.json"
        if not index.is_file():
            raise PipelineError(f"{path}: no model_index.json in this folder, so it is not a diffusers pipeline")
        return json.loads(index.read_text())
    if local.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
        raise PipelineError(f"{path}: no such file or folder (a Hub id has the form owner/name)")
    try:
        return dict(DiffusionPipeline.load_config(str(path), revision=revision))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: neither a local path nor a Hub pipeline that can be reached: {error}") from error


def _no_safety_checker(index: dict[str, Any]) -> dict[str, Any]:
    """SD1.5 checkpoints carry a picture filter that training has no use for; the caller's own use is unaffected."""
    return {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}


def _family_of(class_name: str, source: str) -> type[TrainablePipeline]:
    for family in FAMILIES.values():
        if class_name in family.pipeline_classes:
            return family
    known = ", ".join(sorted(name for family in FAMILIES.values() for name in family.pipeline_classes))
    raise PipelineError(f"{source}: pipelines of class {class_name!r} are not known here. Known classes: {known}.")


def _load_single_file(
    path: Path, dtype: torch.dtype, denoiser_dtype: torch.dtype, config: str | None
) -> TrainablePipeline:
    if path.suffix not in SINGLE_FILE_ENDINGS:
        raise PipelineError(f"{path}: a single-file checkpoint ends in one of {', '.join(SINGLE_FILE_ENDINGS)}")
    try:
        model_type = infer_diffusers_model_type(load_single_file_checkpoint(str(path)))
    except Exception as error:  # diffusers, safetensors and torch each raise their own for a damaged file
        raise PipelineError(f"{path}: not a readable checkpoint: {error}") from error
    if model_type not in SINGLE_FILE_TYPES:
        known = ", ".join(sorted(SINGLE_FILE_TYPES))
        raise PipelineError(f"{path}: single-file layout {model_type!r} is not known here. Known layouts: {known}.")
    class_name = SINGLE_FILE_TYPES[model_type]
    try:
        pipe = getattr(diffusers, class_name).from_single_file(
            str(path), dtype=dtype, safety_checker=None, **({"config": config} if config else {})
        )
    except (OSError, ValueError, KeyError) as error:
        raise PipelineError(f"{path}: the checkpoint could not be loaded: {error}") from error
    pipeline = _family_of(class_name, str(path))(pipe, str(path))
    if denoiser_dtype != dtype:
        pipeline.denoiser.to(dtype=denoiser_dtype)
    return pipeline
