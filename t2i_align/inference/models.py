"""Resolve user-supplied models and adapters, and load them.

The checks open as little as they can, so that a wrong name fails before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from t2i_align.conditioning import personal, t5
from t2i_align.conditioning.adapter import ADAPTERS, LORA_FILE, TRAINED, Kind, LoRA
from t2i_align.conditioning.config import SegmentsConfig
from t2i_align.config import ModelConfig
from t2i_align.errors import UserError
from t2i_align.inference.options import TESTBED, bundled, check_options, pick_device, use_precision
from t2i_align.plugins import load as load_plugin
from t2i_align.plugins import load_installed
from t2i_align.training import checkpoint
from t2i_align.training.output import RUN_FILE, read_settings
from t2i_align.utils.files import read_json
from t2i_align.utils.settings import build

if TYPE_CHECKING:
    from pipelines import TrainablePipeline

LORA_ENDING = ".safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Aligned:
    """The model to compare with its base: a whole model, or an adapter for the base (a local file)."""

    kind: Kind
    path: str


def resolve_model(path: str | Path, what: str = "model") -> str:
    """A path or Hub id that `pipelines.load` takes, from a path, a Hub id or `testbed:sd`; does not ask the Hub.

    Raises:
        UserError: an unknown bundled model, or neither an existing path nor a Hub id; `what` is the noun in messages.
    """
    text = str(path)
    if text.startswith(TESTBED):
        from t2i_align.testbed import base_path

        return str(bundled(base_path, text))
    local = Path(text).expanduser()
    if local.exists():
        if run := _run(local):
            _recorded(run / RUN_FILE)
        return _whole(local)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or text.endswith("/"):
        raise UserError(f"{text}: no such {what}: no such file or folder, and a Hub id has the form owner/name")
    if local.parent.exists():  # a mistyped path rather than the id of a Hub owner with a folder's name
        raise UserError(f"{text}: no such {what}: no such file or folder (in {local.parent}/, so this is no Hub id)")
    return text


def _whole(local: Path) -> str:
    """The place of a whole model that is there; of a run, its `model/` or its newest checkpoint.

    Raises:
        UserError: an adapter, or a run that trains one.
    """
    if local.is_file() and local.suffix != LORA_ENDING:
        return str(local)
    if local.is_file() or (_is_run(local) and not (local / "model_index.json").is_file()):
        aligned = resolve_aligned(local)
        if aligned.kind != "model":
            what, kind = "a training run" if local.is_dir() else "a file", aligned.kind.replace("_", " ")
            raise UserError(
                f"{local}: this is {what} with {'a LoRA' if aligned.kind == 'lora' else kind}, which needs its base "
                "model; give that as the model, and this as the LoRA (--lora, --aligned, or lora.init to train on)"
            )
        return aligned.path
    return str(local)


def _is_run(folder: Path) -> bool:
    """Whether it is the folder of a run, or of a checkpoint or a kept step."""
    return (folder / RUN_FILE).is_file() or (checkpoint.run_of(folder) is not None and folder.is_dir())


def resolve_aligned(path: str | Path, what: str = "model") -> Aligned:
    """Whether a path or Hub id is an adapter or a whole model.

    Of a run's, a checkpoint's or a kept step's folder it is `lora/`, `soft_tokens/` or `model/`; of a run that has none
    of these its newest checkpoint, and of a checkpoint without any the denoiser in it (see `open_model`).

    Raises:
        UserError: nothing there, several, or neither; `what` is the noun in messages.
    """
    local = Path(path).expanduser()
    if not local.exists():
        name = resolve_model(path, what)
        return Aligned("model", name) if Path(name).exists() else _on_the_hub(name, what)
    if local.is_file():
        return Aligned(_kind_of_file(local), str(local))
    if (local / "model_index.json").is_file():
        _check_whole(local)
        return Aligned("model", str(local))
    for kind, file in (("personal", local / personal.FILE), ("t5", local / t5.FILE)):
        if file.is_file():  # a LoRA beside it belongs to it
            return Aligned(kind, str(file))  # type: ignore[arg-type]
    candidates = [local / name for name in TRAINED if (local / name).is_dir()]
    if not candidates and (local / checkpoint.STATE).is_file() and (run := checkpoint.run_of(local.absolute())):
        if _recorded(run / RUN_FILE).get("lora") or _recorded(run / RUN_FILE).get("soft_tokens"):
            raise UserError(f"{path}: nothing is trained yet in this checkpoint; take a later one")
        return Aligned("model", str(local))
    if not candidates and (local / RUN_FILE).is_file() and (steps := checkpoint.all_steps(local)):
        return resolve_aligned(steps[-1])
    if not candidates:
        candidates = [file for file in sorted(local.glob(f"*{LORA_ENDING}")) if _kind_of_file(file) != "model"]
    if not candidates:
        raise UserError(f"{path}: neither a LoRA, nor a model (model_index.json), nor a run's folder (lora/ or model/)")
    if len(candidates) > 1:
        names = ", ".join(f"{candidate.name}{'/' * candidate.is_dir()}" for candidate in candidates)
        raise UserError(f"{path}: holds {len(candidates)} models or LoRAs; name one: {names}")
    return resolve_aligned(candidates[0])


def resolve_adapter(path: str | Path) -> Aligned:
    """A LoRA or soft tokens from its file, its folder, a training run's folder or a Hub id.

    Raises:
        UserError: nothing there, or a whole model.
    """
    adapter = resolve_aligned(path, "LoRA")
    if adapter.kind == "model":
        raise UserError(f"{path}: this is a whole model, not a LoRA; give it as the model")
    return adapter


def resolve_base(
    model: str | Path | None, aligned: Aligned | None = None, segments: int | None = None, **version: str | None
) -> ModelConfig:
    """The base model and its version; what is None is taken from the training run of `aligned`, or of `model` itself.

    A run's revision, variant, single-file configuration and expert apply where `model` is that run's or None; its
    segments always, with `segments` as their number of tokens where this is given.

    Raises:
        UserError: no such model, or None and `aligned` is not a training run's.
    """
    run = None
    weights = aligned or Aligned("model", str(model or ""))
    if values := run_of(weights):
        run = build(ModelConfig, values["model"], where=f"{RUN_FILE} of {weights.path}: model")
    if model is None and run is None:
        raise UserError("no base model given, and there is no run.yaml with the aligned weights that names one")
    if run is None or (model is not None and Path(model) != Path(run.path)):
        # Another model; what the LoRA was trained to read stays.
        run = ModelConfig(path=str(model), segments=run.segments if run else None)
    resolve_model(run.path)
    given: dict[str, Any] = {key: value for key, value in version.items() if value is not None}
    if segments is not None:
        given["segments"] = replace(run.segments or SegmentsConfig(), tokens=segments)
    return replace(run, **given)


def run_of(aligned: Aligned) -> dict[str, Any] | None:
    """The configuration of the training run that left these weights, if one did; its plugins are loaded."""
    run = _run(Path(aligned.path))
    return _recorded(run / RUN_FILE) if run else None


def _run(weights: Path) -> Path | None:
    """The folder of the run that left these weights."""
    folder = (weights.parent if weights.is_file() else weights).absolute()
    run = checkpoint.run_of(folder) or (folder.parent if folder.name in TRAINED else None)
    return run if run and (run / RUN_FILE).is_file() else None


def with_base(model: str | Path | None, lora: str | Path | None) -> tuple[str | Path | None, Aligned | None]:
    """A model and the adapter for it, where the model may be a run that trains an adapter: then it is that run's base.

    Raises:
        UserError: such a run and another adapter.
    """
    adapter = None if lora is None else resolve_adapter(lora)
    if isinstance(model, str | Path) and _is_run(Path(model).expanduser()):
        trained = resolve_aligned(model)
        if trained.kind != "model" and adapter:
            raise UserError(f"{model}: this run has a {trained.kind.replace('_', ' ')} of its own; leave out {lora}")
        if trained.kind != "model":
            return None, trained
    return model, adapter


def load_pipeline(
    model: str | Path | ModelConfig, precision: str = "fp32", device: str | None = None, *, encoders: bool = True
) -> TrainablePipeline:
    """A model on `device` (default: the GPU if there is one) with its weights in `precision`."""
    load_installed()
    check_options(precision)
    place = pick_device(device)
    config = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
    # Large text encoders overflow half precision.
    large = torch.bfloat16 if precision == "fp16" else None
    dtype = use_precision(precision) or torch.float32
    return open_model(config, dtype=dtype, large_encoder_dtype=large, encoders=encoders).to(place)


def open_model(config: ModelConfig, **options: Any) -> TrainablePipeline:
    """The model of a configuration, with its way to encode prompts. options: more of `pipelines.load`."""
    import pipelines

    folder = Path(resolve_model(config.path))
    if is_checkpoint(folder) and (run := _run(folder)):
        base = build(ModelConfig, _recorded(run / RUN_FILE)["model"], where=f"{run / RUN_FILE}: model")
        pipeline = open_model(base, **options)
        with torch.no_grad():
            parameters = dict(pipeline.denoiser.named_parameters())
            for name, tensor in checkpoint.result(folder).items():
                parameters[name].copy_(tensor)
        pipeline.source = str(folder)
        return pipeline
    pipeline = pipelines.load(**checkpoint_options(config), **options)
    if config.segments:
        from t2i_align.conditioning import segments

        segments.install(pipeline, config.segments)
    return pipeline


def is_checkpoint(path: str | Path) -> bool:
    """Whether a model is a checkpoint of a run that trains all of the denoiser's weights."""
    return (Path(path) / checkpoint.STATE).is_file()


def checkpoint_options(config: ModelConfig) -> dict[str, Any]:
    """The arguments of `pipelines.load` that say which checkpoint."""
    return {key: value for key, value in vars(config).items() if key != "segments"} | {
        "path": resolve_model(config.path)
    }


@contextmanager
def adapter_on(pipeline: TrainablePipeline, adapter: Aligned | None, scale: float = 1.0) -> Iterator[None]:
    """Put a LoRA or soft tokens, or nothing, on a pipeline inside the block; afterwards the pipeline is as before.

    Raises:
        UserError: the pipeline already carries an adapter, or these weights do not fit it.
    """
    if adapter is None:
        yield
        return
    if any(kind.installed(pipeline) for kind in ADAPTERS.values()):
        raise UserError(f"{pipeline.source}: this pipeline already carries an adapter; save it and give its path")
    kind = ADAPTERS[adapter.kind]
    try:
        kind.load(pipeline, adapter.path, scale=scale)
    except ValueError as error:  # PipelineError or UserError
        raise UserError(str(error)) from error
    try:
        yield
    finally:
        kind.remove(pipeline)


def _recorded(file: Path) -> dict[str, Any]:
    """A run's settings from its run.yaml; the plugins that they name are loaded.

    Raises:
        UserError: a plugin lies in the run's own folder: a run from elsewhere must not bring code.
    """
    values: dict[str, Any] = read_settings(file)
    for place in values.get("plugins", ()):
        if Path(place).resolve().is_relative_to(file.parent.resolve()):
            raise UserError(f"{file}: plugins: {place} lies in the run's own folder; to run it, give it with --plugin")
        load_plugin(place)
    return values


def _on_the_hub(repository: str, what: str) -> Aligned:
    """A Hub repository by the first file that identifies it; a LoRA is fetched, of a model only its index."""
    from transformers.utils import cached_file

    from pipelines.hub import reason

    kinds: dict[str, Kind] = {"model_index.json": "model", LORA_FILE: "lora", PEFT_CONFIG: "lora"}
    for name, kind in kinds.items():
        try:
            file = cached_file(repository, name)
            if name == PEFT_CONFIG:
                file = cached_file(repository, PEFT_FILE)
        except OSError as error:  # not there, no access, or no connection
            why = reason(repository, error)
        else:
            return Aligned(kind, repository if kind == "model" else str(file))
    raise UserError(f"{repository}: no such {what}: no such file or folder, nor on the Hub: {why}")


def _check_whole(folder: Path) -> None:
    """Refuse a half-copied model now rather than after the base has been sampled."""
    for name, part in read_json(folder / "model_index.json").items():
        if isinstance(part, list) and part and part[0] and not (folder / name).is_dir():
            raise UserError(f"{folder}: model_index.json names {name!r}, but there is no such folder")


def _kind_of_file(file: Path) -> Kind:
    """Adapters are recognised by their keys; any other file is a single-file checkpoint."""
    if file.suffix != LORA_ENDING:
        try:
            pickled = set(torch.load(file, map_location="meta", mmap=True, weights_only=True))
        except Exception:  # of no format that torch maps, or with more than tensors: `pipelines.load` has the words
            return "model"
        if LoRA().recognises({key for key in pickled if isinstance(key, str)}):
            raise UserError(f"{file}: a LoRA in a pickle; only LoRAs in {LORA_ENDING} are loaded: convert it")
        return "model"
    try:
        with safe_open(file, framework="pt") as weights:
            keys = set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from error
    return next((kind for kind, adapter in ADAPTERS.items() if adapter.recognises(keys)), "model")
