"""What a person writes for a model, a list of prompts or a scorer, made into the thing itself or into a clear error.

The checks open as little as they can, so that a wrong name fails before anything is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from t2i_align.conditioning import soft_tokens
from t2i_align.config import ModelConfig, build
from t2i_align.errors import UserError, unknown

if TYPE_CHECKING:  # loaded only by the functions that need them
    from pipelines import TrainablePipeline
    from reward_scorers import Scorer

TESTBED = "testbed:"
HPSV2 = "hpsv2:"
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark, 800 prompts each (arXiv 2306.09341)
LORA_ENDING = ".safetensors"
HUB_KINDS: dict[str, Literal["lora", "model"]] = {  # the file by which a Hub repository is told
    "model_index.json": "model",
    "pytorch_lora_weights.safetensors": "lora",
}
ADAPTERS_AND_MODEL = ("lora", "soft_tokens", "model")  # what a run leaves one of
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Aligned:
    """What stands against the base model: a whole model, or a LoRA or soft tokens on top of it (always a file here)."""

    kind: Literal["lora", "soft_tokens", "model"]
    path: str


def resolve_model(path: str | Path, what: str = "model") -> str:
    """A path or Hub id that `pipelines.load` takes, from a path, a Hub id or `testbed:sd`; asks no Hub.

    Raises:
        UserError: an unknown bundled model, or neither an existing path nor a Hub id.
    """
    text = str(path)
    if text.startswith(TESTBED):
        from t2i_align.testbed import base_path

        return str(_bundled(base_path, text))
    local = Path(text).expanduser()
    if local.exists():
        return str(local)
    if text.startswith((".", "/", "~")) or text.count("/") != 1 or text.endswith("/"):
        raise UserError(f"{text}: no such {what}: no such file or folder, and a Hub id has the form owner/name")
    if local.parent.exists():  # a mistyped path: nobody keeps a folder with the name of a Hub's owner
        raise UserError(f"{text}: no such {what}: no such file or folder (in {local.parent}/, so this is no Hub id)")
    return text


def resolve_aligned(path: str | Path, what: str = "model") -> Aligned:
    """Whether a path or Hub id is a LoRA or a whole model; a training run's folder holds either as `lora/` or `model/`.

    Raises:
        UserError: nothing there (`what` says what was wanted), or something that is neither.
    """
    local = Path(path).expanduser()
    if not local.exists():
        found = resolve_model(path, what)
        return Aligned("model", found) if Path(found).exists() else _on_the_hub(found, what)
    if local.is_file():
        return Aligned(_kind_of_file(local), str(local))
    if (local / "model_index.json").is_file():
        _check_whole(local)
        return Aligned("model", str(local))
    inner = [local / name for name in ADAPTERS_AND_MODEL if (local / name).is_dir()]
    if len(inner) == 1:
        return resolve_aligned(inner[0])
    if len(inner) > 1:
        raise UserError(
            f"{path}: holds {' and '.join(f'{folder.name}/' for folder in inner)}; name the one to evaluate"
        )
    adapters = [file for file in sorted(local.glob(f"*{LORA_ENDING}")) if _kind_of_file(file) != "model"]
    if len(adapters) == 1:
        return Aligned(_kind_of_file(adapters[0]), str(adapters[0]))
    if adapters:
        raise UserError(f"{path}: {len(adapters)} LoRA files here; name one: {', '.join(f.name for f in adapters)}")
    raise UserError(f"{path}: neither a LoRA, nor a model (model_index.json), nor a run's folder (lora/ or model/)")


def resolve_adapter(path: str | Path) -> Aligned:
    """A LoRA or soft tokens from its file, its folder, a training run's folder or a Hub id.

    Raises:
        UserError: nothing there, or a whole model.
    """
    found = resolve_aligned(path, "LoRA")
    if found.kind == "model":
        raise UserError(f"{path}: this is a whole model, not a LoRA; give it as the model")
    return found


def resolve_base(model: str | Path | None, aligned: Aligned | None = None, **told: str | None) -> ModelConfig:
    """The base model and how to load it: as told, and where not told, as the training run of `aligned` had it.

    A run's revision, variant, single-file configuration and expert hold where `model` is that run's or None.

    Raises:
        UserError: no such model, or none told and `aligned` is not a training run's.
    """
    run = trained_from(aligned) if aligned else None
    if model is None and run is None:
        raise UserError("no base model told, and there is no run.yaml with the aligned weights that names one")
    if run is None or (model is not None and Path(model) != Path(run.path)):
        run = ModelConfig(path=str(model))
    resolve_model(run.path)
    found: dict[str, Any] = {key: value for key, value in told.items() if value is not None}
    return replace(run, **found)


def trained_from(aligned: Aligned) -> ModelConfig | None:
    """The model section of the training run that left these weights in its folder for them; None if none did."""
    from t2i_align.training.run import RUN_FILE  # there it is written, with much imported

    weights = Path(aligned.path)
    folder = weights.parent if weights.is_file() else weights
    file = folder.absolute().parent / RUN_FILE
    if folder.name not in ADAPTERS_AND_MODEL or not file.is_file():
        return None
    return build(ModelConfig, yaml.safe_load(file.read_text())["model"], where=f"{file}: model")


def resolve_prompts(source: str | Path | Sequence[str]) -> list[str]:
    """Prompts from a text file (UTF-8, one per line, blank lines skipped), `testbed:dev`, `hpsv2:photo`, or a list.

    Raises:
        UserError: no such file, split or style, not text, no prompt in it, or an empty one in a list.
    """
    if not isinstance(source, str | Path):
        prompts = list(source)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"prompts[{row}]: expected text, found {prompt!r}")
    elif str(source).startswith(TESTBED):
        from t2i_align.testbed.prompts import prompts as testbed_prompts

        prompts = list(_bundled(testbed_prompts, str(source)))
    elif str(source).startswith(HPSV2):
        prompts = _benchmark(str(source).removeprefix(HPSV2))
    else:
        file = Path(source).expanduser()
        if not file.is_file():
            raise UserError(
                f"{source}: no such prompt file (one prompt per line; to give prompts directly, use a list)"
            )
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8 text (byte {error.start})") from error
        prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{source if isinstance(source, str | Path) else 'prompts'}: no prompt in it")
    return prompts


def load_pipeline(
    path: str | Path,
    precision: str = "fp32",
    device: str | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
    expert: str | None = None,
) -> TrainablePipeline:
    """A model on `device` (default: the GPU if there is one), its weights in `precision`; else as `pipelines.load`."""
    import pipelines

    check_precision(precision)
    place = pick_device(device)
    return pipelines.load(
        resolve_model(path),
        dtype=PRECISIONS[precision],
        large_encoder_dtype=torch.bfloat16 if precision == "fp16" else None,  # which overflow half precision
        revision=revision,
        variant=variant,
        single_file_config=single_file_config,
        expert=expert,
    ).to(place)


def pick_device(name: str | None) -> str:
    """The device of this name, or without one the GPU if there is one.

    Raises:
        UserError: no such device in this machine.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # a word that is no device; torch built without it; no such number
        raise UserError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return name


@contextmanager
def memory_for(batch_size: int) -> Iterator[None]:
    """Say which option to lower when the GPU's memory does not do for `batch_size` images."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory does not do for {batch_size} images at a time; lower batch_size (--batch-size)"
        ) from error


@contextmanager
def adapter_on(pipeline: TrainablePipeline, adapter: Aligned, scale: float = 1.0) -> Iterator[None]:
    """A LoRA or soft tokens on a pipeline for as long as the block runs; afterwards the pipeline is as it was.

    Raises:
        UserError: the pipeline already carries an adapter, or these weights do not fit it.
    """
    if getattr(pipeline.denoiser, "peft_config", None) or hasattr(pipeline.denoiser, soft_tokens.NAME):
        raise UserError(f"{pipeline.source}: this pipeline already carries an adapter; save it and give its path")
    path = adapter.path
    if adapter.kind == "soft_tokens":
        soft_tokens.load(pipeline.denoiser, path)
        try:
            yield
        finally:
            soft_tokens.remove(pipeline.denoiser)
        return
    try:
        try:
            pipeline.load_lora(path, scale=scale)
        except Exception as error:  # diffusers, peft and torch each raise their own for keys and shapes that do not fit
            reason = " ".join("; ".join(str(error).split("\n")[:2]).split())
            raise UserError(f"{path}: this LoRA does not fit {pipeline.source}: {reason[:300]}") from error
        yield
    finally:
        pipeline.pipe.unload_lora_weights()


def check_precision(precision: str) -> None:
    """Raise UserError for a name that is no precision."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)


def build_scorers(specs: str | Sequence[str | Scorer]) -> list[Scorer]:
    """Scorers from their specs, each name checked before the first is built; the testbed's oracles are among them.

    Raises:
        UserError: none given, an unknown name, weights that cannot be used, or two scorers of one name.
    """
    import reward_scorers
    import t2i_align.testbed.scorer  # noqa: F401  (registers `oracle` and `motion_oracle`)

    given: list[Any] = [specs] if isinstance(specs, str | reward_scorers.Scorer) else list(specs)
    if not given:
        raise UserError(f"scorers: none given. Choices: {', '.join(reward_scorers.names())}.")
    try:
        for spec in given:
            if not isinstance(spec, reward_scorers.Scorer):
                reward_scorers.check_spec(spec)
        built = [spec if isinstance(spec, reward_scorers.Scorer) else reward_scorers.build(spec) for spec in given]
    except reward_scorers.ScorerError as error:
        raise UserError(str(error)) from error
    names = [scorer.name for scorer in built]
    if len(set(names)) < len(names):
        raise UserError(f"scorers: two of the same name among {', '.join(names)}")
    return built


def not_for(scorers: Sequence[Scorer], prompt: str) -> str:
    """Why one of the scorers cannot judge images of a prompt, or nothing."""
    from reward_scorers import ScorerError

    try:
        for scorer in scorers:
            scorer.check_prompts([prompt])
    except ScorerError as error:
        return str(error)
    return ""


def _benchmark(style: str) -> list[str]:
    """A style of HPSv2's benchmark, from where its own package fetches it."""
    from huggingface_hub import hf_hub_download

    if style not in STYLES:
        raise unknown("style", style, STYLES)
    try:
        file = hf_hub_download("zhwang/HPDv2", f"{style}.json", subfolder="benchmark", repo_type="dataset")
    except Exception as error:  # no connection, no access: the Hub's own kinds
        raise UserError(f"{HPSV2}{style}: could not be fetched: {_first_line(error)}") from error
    return list(json.loads(Path(file).read_text(encoding="utf-8")))


def _bundled(find: Callable[[Any], Any], spec: str) -> Any:
    try:
        return find(spec.removeprefix(TESTBED))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{spec}: {error}") from error


def _on_the_hub(repository: str, what: str) -> Aligned:
    """What a Hub repository is by the first of HUB_KINDS that it has; a LoRA is fetched, of a model only its index."""
    from transformers.utils import cached_file

    for name, kind in HUB_KINDS.items():
        try:
            file = cached_file(repository, name)
        except OSError as error:  # not there, no access, or no connection
            reason = _first_line(error)
        else:
            return Aligned(kind, repository if kind == "model" else str(file))
    raise UserError(f"{repository}: no such {what}: no such file or folder, nor on the Hub: {reason}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _check_whole(folder: Path) -> None:
    """A model that is half copied should fail before the other side has been sampled, not after."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'model_index.json'}: not JSON: {error}") from error
    for name, part in index.items():
        if isinstance(part, list) and part and part[0] and not (folder / name).is_dir():
            raise UserError(f"{folder}: model_index.json names {name!r}, but there is no such folder")


def _kind_of_file(file: Path) -> Literal["lora", "soft_tokens", "model"]:
    """Adapters tell themselves by their keys; a single-file checkpoint has none of these."""
    if file.suffix != LORA_ENDING:
        return "model"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            keys = set(weights.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from error
    if keys == soft_tokens.KEYS:
        return "soft_tokens"
    return "lora" if any("lora" in key.lower() for key in keys) else "model"
