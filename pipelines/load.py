"""Find the family of a checkpoint and load it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from pipelines.base import PipelineError, TrainablePipeline
from pipelines.cogvideox import CogVideoX
from pipelines.flux import Flux
from pipelines.ltx import LTXVideo
from pipelines.sd import StableDiffusion
from pipelines.sd3 import StableDiffusion3
from pipelines.sdxl import StableDiffusionXL
from pipelines.wan import Wan

FAMILIES: dict[str, type[TrainablePipeline]] = {
    family.family: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Wan, CogVideoX, LTXVideo)
}

# Names that diffusers gives to the layouts of single-file checkpoints.
SINGLE_FILE_TYPES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "ltx-video": "LTXPipeline",
    "ltx-video-0.9.1": "LTXPipeline",
}
SINGLE_FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".bin")
WEIGHT_ENDINGS = (".safetensors", ".bin")  # in the order in which they are preferred
CONFIG_ENDINGS = (".json", ".txt", ".model")  # of configurations and tokenizers


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    denoiser_dtype: torch.dtype | None = None,
    large_encoder_dtype: torch.dtype | None = None,
    encoders: bool = True,
    expert: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
) -> TrainablePipeline:
    """Load a diffusers folder, a Hub id or a single-file checkpoint; its own files say which family it is.

    Args:
        path: local folder, local single file, or "owner/name" on the Hub.
        dtype: of every network's weights. denoiser_dtype: of the denoiser's, where it differs (what a model must
            keep in float32 stays there). large_encoder_dtype: of text encoders of the size of T5-XXL.
        encoders: False leaves out VAE and text encoders (training from a cache needs neither).
        expert: which denoiser is meant where a model has several for parts of the way: "high" (noise; the default) or
            "low". The others are left out with the encoders.
        revision, variant: as in diffusers' `from_pretrained`.
        single_file_config: for single files, a folder or Hub id with the matching diffusers configuration, and with
            the weights of what the file lacks; without it diffusers asks the Hub.

    Raises:
        PipelineError: nothing there, not a pipeline, a family that is not known, a component missing.
    """
    if Path(path).is_file():
        if expert is not None:
            raise PipelineError(f"{path}: expert {expert!r} was asked for, but a single file has one denoiser")
        return _load_single_file(
            Path(path), dtype, denoiser_dtype or dtype, large_encoder_dtype or dtype, single_file_config
        )
    index = _model_index(path, revision)
    family = _family_of(str(index.get("_class_name")), str(path))
    denoisers = _denoisers(family, index, expert, str(path))  # the one that is meant comes first
    # A pipeline still loads without its encoders; diffusers wants each missing one named, also those it never had.
    spare = [name for name in (*family.encoder_names, *denoisers[1:]) if name in index]
    without = {} if encoders else {name: None for name in spare}
    absent = {name: None for name in family.optional_encoders if not _has(index, name)}
    _check_components(path, index, [*denoisers, "scheduler", *family.encoder_names], family.optional_encoders, without)
    dtypes = {
        "default": dtype,
        **{name: denoiser_dtype or dtype for name in denoisers},
        **{name: large_encoder_dtype or dtype for name in family.large_encoders},
    }

    def read(**replaced: Any) -> DiffusionPipeline:
        try:
            return getattr(diffusers, index["_class_name"]).from_pretrained(
                str(path),
                dtype=dtypes,
                revision=revision,
                variant=variant,
                **_no_safety_checker(index["_class_name"]),
                **{**absent, **replaced},
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise PipelineError(f"{path}: the checkpoint could not be loaded: {error}") from error

    vae_config = None if encoders else _vae_config(index, path, revision)
    choice: dict[str, Any] = {"expert": expert} if family.experts else {}
    pipeline = family(read(**without), str(path), vae_config, **choice)
    pipeline.read_around = lambda denoiser: read(**{denoisers[0]: denoiser})
    return pipeline


def family_of(path: str | Path, revision: str | None = None) -> type[TrainablePipeline] | None:
    """The family of a folder or Hub id, without loading it; None for a single file, which has to be opened for that.

    Raises:
        PipelineError: nothing there, not a pipeline, a family that is not known.
    """
    if Path(path).is_file():
        return None
    return _family_of(str(_model_index(path, revision).get("_class_name")), str(path))


def wrap(pipe: DiffusionPipeline, source: str = "memory") -> TrainablePipeline:
    """The family around a diffusers pipeline that is loaded already; its networks are frozen.

    Raises:
        PipelineError: a family that is not known, or a component missing.
    """
    return _family_of(type(pipe).__name__, source)(pipe, source)


def encoder_fingerprint(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
) -> str:
    """A hash of all that turns images and prompts into a cache: VAE, text encoders, tokenizers, as `load` has them.

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


def _denoisers(family: type[TrainablePipeline], index: Mapping[str, Any], expert: str | None, path: str) -> list[str]:
    """The names of the checkpoint's denoisers, the one that `expert` means first."""
    found = [name for name in family.experts.values() if _has(index, name)] or [family.denoiser_name]
    if expert is None:
        return found
    if len(found) == 1:
        raise PipelineError(f"{path}: expert {expert!r} was asked for, but this model has a single denoiser")
    if expert not in family.experts:
        raise PipelineError(f"{path}: unknown expert {expert!r}. Choices: {', '.join(family.experts)}.")
    return sorted(found, key=lambda name: name != family.experts[expert])


def _check_components(
    path: str | Path,
    index: Mapping[str, Any],
    names: Sequence[str],
    optional: Sequence[str],
    without: Collection[str],
) -> None:
    """Raise PipelineError for components that the checkpoint must have and has not, before any is loaded."""
    for name in names:
        if name in without and name != "vae":  # its configuration is read even then
            continue
        if not _has(index, name):
            if name not in optional:
                raise PipelineError(f"{path}: the checkpoint lacks its component {name!r}: model_index.json has none")
        elif Path(path).is_dir() and not (Path(path) / name).is_dir():
            raise PipelineError(f"{path}: the checkpoint lacks its component {name!r}: there is no such folder")


def _has(index: Mapping[str, Any], name: str) -> bool:
    return (index.get(name) or [None])[0] is not None


def _vae_config(index: Mapping[str, Any], path: str | Path, revision: str | None) -> dict[str, Any]:
    """The configuration of a VAE that is not loaded, with its class's defaults where the file says nothing."""
    vae = getattr(diffusers, index["vae"][1])
    defaults = {name: parameter.default for name, parameter in inspect.signature(vae.__init__).parameters.items()}
    return {**defaults, **vae.load_config(str(path), subfolder="vae", revision=revision)}


def _no_safety_checker(class_name: str) -> dict[str, Any]:
    """SD1.5 checkpoints carry an image filter that training has no use for; the caller's own use is unaffected."""
    return {"safety_checker": None, "requires_safety_checker": False} if class_name == "StableDiffusionPipeline" else {}


def _family_of(class_name: str, source: str) -> type[TrainablePipeline]:
    for family in FAMILIES.values():
        if class_name in family.pipeline_classes:
            return family
    known = ", ".join(sorted(name for family in FAMILIES.values() for name in family.pipeline_classes))
    raise PipelineError(f"{source}: pipelines of class {class_name!r} are not known here. Known classes: {known}.")


def _load_single_file(
    path: Path, dtype: torch.dtype, denoiser_dtype: torch.dtype, large_encoder_dtype: torch.dtype, config: str | None
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
    family = _family_of(class_name, str(path))
    options = {"dtype": dtype, **({"config": config} if config else {})}
    try:
        try:
            pipe = getattr(diffusers, class_name).from_single_file(
                str(path), **options, **_no_safety_checker(class_name)
            )
        except SingleFileComponentError as error:
            if config is None:
                raise PipelineError(
                    f"{path}: the file holds only some of the pipeline's parts; give single_file_config, a folder or "
                    "Hub id with the whole pipeline, from which the rest is taken"
                ) from error
            pipe = _around_single_file(path, config, class_name, family.denoiser_name, dtype)
    except PipelineError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PipelineError(f"{path}: the checkpoint could not be loaded: {error}") from error
    pipeline = family(pipe, str(path))
    if denoiser_dtype != dtype:
        pipeline.denoiser.to(dtype=denoiser_dtype)
    for name in pipeline.large_encoders:
        if (encoder := pipeline.modules().get(name)) is not None:
            encoder.to(dtype=large_encoder_dtype)
    return pipeline


def _around_single_file(path: Path, config: str, class_name: str, denoiser_name: str, dtype: torch.dtype) -> Any:
    """The diffusers pipeline in `config` with the denoiser of `path`: most files of the large models are no more."""
    denoiser_class = getattr(diffusers, _model_index(config, None)[denoiser_name][1])
    denoiser = denoiser_class.from_single_file(str(path), config=config, subfolder=denoiser_name, dtype=dtype)
    return getattr(diffusers, class_name).from_pretrained(config, dtype=dtype, **{denoiser_name: denoiser})
