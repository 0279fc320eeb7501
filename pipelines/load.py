"""Find the family of a checkpoint, load it, and hash its encoders, by which a cache knows its model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download

from pipelines.base import PipelineError
from pipelines.blank import blank_component
from pipelines.cogvideox import CogVideoX
from pipelines.files import CONFIG_ENDINGS, WEIGHT_ENDINGS, component_files, files_digest, variant_of
from pipelines.flux import Flux
from pipelines.hub import reason
from pipelines.ltx import LTXVideo
from pipelines.pipeline import TrainablePipeline
from pipelines.quantize import quantisation
from pipelines.sd import StableDiffusion
from pipelines.sd3 import StableDiffusion3
from pipelines.sdxl import StableDiffusionXL
from pipelines.wan import Wan

FAMILIES: dict[str, type[TrainablePipeline]] = {
    family.family: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Wan, CogVideoX, LTXVideo)
}
AnyFamily = TypeVar("AnyFamily", bound=type[TrainablePipeline])


def register(family: AnyFamily) -> AnyFamily:
    """Class decorator: `load` and `wrap` know the family by its `pipeline_classes`.

    Defined again, as when a notebook's cell runs again, a family replaces itself.

    Raises:
        PipelineError: another one has that name or serves that class, or it does not say which it serves.
    """
    where = f"{family.__module__}.{family.__qualname__}"
    for key in ("family", "pipeline_classes", "encoder_names", "lora_presets"):
        if not hasattr(family, key):
            raise PipelineError(f"{where}: the family sets no {key}")
    for known in FAMILIES.values():
        if f"{known.__module__}.{known.__qualname__}" == where:
            continue
        if known.family == family.family or set(known.pipeline_classes) & set(family.pipeline_classes):
            raise PipelineError(f"{where}: the family {known.family!r} has that name or serves that class already")
    FAMILIES[family.family] = family
    return family


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    denoiser_dtype: torch.dtype | None = None,
    large_encoder_dtype: torch.dtype | None = None,
    encoders: bool = True,
    weights: bool = True,
    expert: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    prediction_type: Literal["epsilon", "v_prediction"] | None = None,
    quantize: str | None = None,
) -> TrainablePipeline:
    """Load a diffusers folder, a Hub id or a single-file checkpoint; its own files say which family it is.

    Args:
        path: local folder, local single file, or "owner/name" on the Hub.
        dtype: of every network's weights. denoiser_dtype: of the denoiser's, where it differs (what a model must
            keep in float32 stays there). large_encoder_dtype: of text encoders of the size of T5-XXL.
        encoders: False leaves out VAE and text encoders (training from a cache needs neither).
        weights: False leaves out the encoders and puts the denoiser on torch's `meta` device, from its configuration.
        expert: the denoiser to train where noise levels have their own: "high" (default) or "low". The others are left
            out with the encoders.
        revision, variant: as in diffusers' `from_pretrained`.
        single_file_config: for single files, a folder or Hub id with the matching diffusers configuration, and with
            the weights that the file lacks; without it diffusers asks the Hub.
        prediction_type: what the denoiser predicts, where the checkpoint's scheduler does not know. A single file's own
            marks (`v_pred`, and `ztsnr` for a schedule that ends without signal) are followed.
        quantize: how the denoiser's weights are stored, for a LoRA on them (see `pipelines.quantize`).

    Raises:
        PipelineError: nothing there, not a pipeline, an unknown family, a component missing, a prediction type that
            contradicts a mark or the family, a single file of SD2 without any.
    """
    denoiser_dtype, large_encoder_dtype = denoiser_dtype or dtype, large_encoder_dtype or dtype
    if Path(path).is_file():
        what = f"expert {expert!r}" if expert else quantize or ("" if weights else "a model without weights")
        if what:
            raise PipelineError(f"{path}: {what} was asked for, but a single file has one denoiser, with its weights")
        pipeline = _load_single_file(Path(path), dtype, single_file_config, prediction_type)
        pipeline.denoiser.to(dtype=denoiser_dtype)
        for name in pipeline.modules().keys() & pipeline.large_encoders:
            pipeline.modules()[name].to(dtype=large_encoder_dtype)
        return pipeline
    index = model_index(path, revision)
    family = _family(index.get("_class_name"), path)
    present = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    denoiser, *others = _denoisers(family, present, expert, path)
    left_out = [] if encoders and weights else [name for name in (*family.encoder_names, *others) if name in index]
    if not weights:  # the tokenizers tell the texts' lengths
        left_out = [name for name in left_out if name[:9] != "tokenizer" or not (Path(path) / name).is_dir()]
    absent = [name for name in family.optional_encoders if name not in present]
    for name in (denoiser, *others, "scheduler", *family.encoder_names):
        if name != "vae" and name in (*left_out, *absent):  # the VAE's configuration is always read
            continue
        reason = "model_index.json has none" if name not in present else "there is no such folder"
        if name not in present or (Path(path).is_dir() and not (Path(path) / name).is_dir()):
            raise PipelineError(f"{path}: the checkpoint lacks its component {name!r}: {reason}")
        files = [file for file in (Path(path) / name).glob("*") if file.is_file()] if name not in left_out else []
        variants = {variant_of(file) for file in files if file.suffix in WEIGHT_ENDINGS}
        if variants and not variants & {"", variant}:
            only = " and ".join(sorted(variants))
            raise PipelineError(f"{path}: the weights of {name!r} are of the variant {only}; give it as model.variant")
    if prediction_type and family.flow:
        raise PipelineError(f"{path}: {family.family} is of rectified flow, found prediction_type {prediction_type!r}")
    dtypes = {
        "default": dtype,
        **dict.fromkeys((denoiser, *others), denoiser_dtype),
        **dict.fromkeys(family.large_encoders, large_encoder_dtype),
    }

    def read(**components: Any) -> DiffusionPipeline:
        options = {**family.load_options, **dict.fromkeys(absent), **components}
        options |= quantisation(quantize if weights else None, denoiser) | {
            "dtype": dtypes,
            "revision": revision,
            "variant": variant,
        }
        with _readable(path):
            pipe = getattr(diffusers, index["_class_name"]).from_pretrained(str(path), **options)
        return _with_scheduler(pipe, {"prediction_type": prediction_type} if prediction_type else {})

    vae_config = None
    if "vae" in left_out:  # with its class's defaults for what the file leaves out
        if (vae := getattr(diffusers, str(present["vae"][1]), None)) is None:
            raise PipelineError(f"{path}: model_index.json: the vae is of an unknown class {present['vae'][1]!r}")
        defaults = {name: parameter.default for name, parameter in inspect.signature(vae.__init__).parameters.items()}
        vae_config = {**defaults, **vae.load_config(str(path), subfolder="vae", revision=revision)}
    choice: dict[str, Any] = {"expert": expert} if family.experts else {}
    blank = {} if weights else {denoiser: blank_component(path, denoiser, present[denoiser], denoiser_dtype, revision)}
    pipeline = family(read(**dict.fromkeys(left_out), **blank), str(path), vae_config, **choice)
    pipeline.reload = lambda trained: read(**{denoiser: trained})
    return pipeline


def family_of(path: str | Path, revision: str | None = None) -> type[TrainablePipeline] | None:
    """The family of a folder or Hub id, without loading it; None for a single file, which would have to be opened."""
    return None if Path(path).is_file() else _family(model_index(path, revision).get("_class_name"), path)


def wrap(pipe: DiffusionPipeline, source: str = "memory") -> TrainablePipeline:
    """The family around a diffusers pipeline that is loaded already; its networks are frozen.

    Raises:
        PipelineError: an unknown family, or a component missing.
    """
    return _family(type(pipe).__name__, source)(pipe, source)


def model_index(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The content of `model_index.json` in a folder or a Hub repository."""
    local = Path(path)
    if local.is_dir():
        index = local / "model_index.json"
        if not index.is_file():
            raise PipelineError(f"{path}: no model_index.json in this folder, so it is not a diffusers pipeline")
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PipelineError(f"{index}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise PipelineError(f"{index}: expected a mapping of components, found {type(content).__name__}")
        return content
    if str(path).startswith("testbed:"):
        raise PipelineError(f"{path}: a model bundled with t2i-align; write t2i_align.load_pipeline({str(path)!r})")
    if local.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
        raise PipelineError(f"{path}: no such file or folder (a Hub id has the form owner/name)")
    try:
        return dict(DiffusionPipeline.load_config(str(path), revision=revision))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path}: no such path, nor a pipeline on the Hub: {reason(str(path), error)}") from error


def _family(
    name: Any, source: str | Path, kind: Literal["pipeline_classes", "single_file_layouts"] = "pipeline_classes"
) -> type[TrainablePipeline]:
    """The family of a pipeline's class in `model_index.json`, or of a layout of single files."""
    choices = {choice: family for family in FAMILIES.values() for choice in getattr(family, kind)}
    if name not in choices:
        what = "pipeline class" if kind == "pipeline_classes" else "single-file layout"
        raise PipelineError(f"{source}: {what} {name!r} is not supported. Supported: {', '.join(sorted(choices))}.")
    return choices[name]


def _denoisers(
    family: type[TrainablePipeline], present: Collection[str], expert: str | None, path: str | Path
) -> list[str]:
    """The names of the checkpoint's denoisers, the one to train first."""
    names = [name for name in family.experts.values() if name in present] or [family.denoiser_name]
    if expert is None:
        return names
    if len(names) == 1:
        raise PipelineError(f"{path}: expert {expert!r} was asked for, but this model has a single denoiser")
    if expert not in family.experts:
        raise PipelineError(f"{path}: unknown expert {expert!r}. Choices: {', '.join(family.experts)}.")
    return sorted(names, key=lambda name: name != family.experts[expert])


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # diffusers, transformers, torch and safetensors each raise their own for damage
        why = error if Path(path).exists() else reason(str(path), error)
        raise PipelineError(f"{path}: the checkpoint could not be loaded: {why}") from error


def _with_scheduler(pipe: Any, changes: dict[str, Any]) -> Any:
    """The pipeline with these entries in its scheduler's configuration."""
    if changes and any(pipe.scheduler.config.get(key) != value for key, value in changes.items()):
        kind = type(pipe.scheduler)
        if not changes.keys() <= inspect.signature(kind.__init__).parameters.keys():
            kind = diffusers.DDIMScheduler  # which has them all
        pipe.register_modules(scheduler=kind.from_config(pipe.scheduler.config, **changes))
    return pipe


def _scheduler_of_file(
    path: Path, keys: Collection[str], layout: str, given: str | None, config: str | None
) -> dict[str, Any]:
    """What a single file's marks, or else the user, say of its scheduler."""
    changes: dict[str, Any] = {"prediction_type": given} if given else {}
    if "v_pred" in keys:
        if given == "epsilon":
            raise PipelineError(f"{path}: marked as v_pred, but prediction_type is 'epsilon'")
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if layout == "v2" and config is None and "prediction_type" not in changes:
        raise PipelineError(
            f"{path}: a single file of SD2 does not say what it predicts; give prediction_type 'epsilon' (base, 512 "
            "pixels) or 'v_prediction' (768 pixels), or a single_file_config"
        )
    return changes


def _load_single_file(
    path: Path, dtype: torch.dtype, config: str | None, prediction_type: str | None
) -> TrainablePipeline:
    try:
        state = load_single_file_checkpoint(str(path))
        keys, layout = set(state), infer_diffusers_model_type(state)
        del state
    except Exception as error:  # diffusers, safetensors and torch each raise their own for a damaged file
        raise PipelineError(f"{path}: not a readable checkpoint (.safetensors, .ckpt, .pt, .bin): {error}") from error
    family = _family(layout, path, "single_file_layouts")
    changes = _scheduler_of_file(path, keys, layout, prediction_type, config)
    if changes and family.flow:
        raise PipelineError(f"{path}: {family.family} is of rectified flow, found {changes}")
    pipeline_class = getattr(diffusers, family.pipeline_classes[0])
    options = {"dtype": dtype, **family.load_options, **({"config": config} if config else {})}
    with _readable(path):
        try:
            pipe = pipeline_class.from_single_file(str(path), **options)
        except SingleFileComponentError as error:
            if config is None:
                raise PipelineError(
                    f"{path}: the file holds only some of the pipeline's components; give single_file_config, a folder "
                    "or Hub id with the whole pipeline, from which the others are taken"
                ) from error
            # Most files of the large models hold the denoiser alone.
            name = family.denoiser_name
            denoiser_class = getattr(diffusers, model_index(config)[name][1])
            denoiser = denoiser_class.from_single_file(str(path), config=config, subfolder=name, dtype=dtype)
            pipe = pipeline_class.from_pretrained(config, dtype=dtype, **{name: denoiser})
    return family(_with_scheduler(pipe, changes), str(path))


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
    return files_digest(files)


def _encoder_files(
    path: str | Path, revision: str | None = None, variant: str | None = None, *, weights: bool = True
) -> dict[str, Path]:
    """The files that diffusers reads for a pipeline's encoders, by name; of a Hub id, only these are fetched."""
    family, root = family_of(path, revision), Path(path)
    names = family.encoder_names if family else ()
    if not root.is_dir() and weights:
        others = [name for name in model_index(path, revision) if name not in names and not name.startswith("_")]
        root = Path(DiffusionPipeline.download(str(path), revision=revision, variant=variant, **dict.fromkeys(others)))
    elif not root.is_dir():
        wanted = [f"{name}/*{ending}" for name in names for ending in CONFIG_ENDINGS]
        root = Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    files = [file for name in names for file in component_files(root / name, variant, weights=weights)]
    return {f"{file.parent.name}/{file.name}": file for file in files}
