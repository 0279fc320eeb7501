"""A command line or configuration of another trainer as one of ours, by the table `assets/foreign_keys.yaml`."""

from __future__ import annotations

import os
import re
import shlex
import string
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from t2i_align import config as configuration
from t2i_align.errors import UserError
from t2i_align.utils.files import write_text
from t2i_align.utils.settings import elsewhere, parse_yaml

Value = Any  # text, True for a flag, or a list of texts
BETA = 2  # diffusers' `beta_dpo` multiplies what ours halves first (docs/training.md)
OPTIMIZERS = {
    "adamw8bit": "adamw8bit",
    "adamw": "adamw",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
    "lion": "lion",
}
LORA = ("network_dim", "network_module", "rank", "lora_rank", "lora_r", "use_lora", "lora_type")


def import_command(command: str, *, out: str | Path | None = None) -> str:
    """A configuration for `train` from a command line of kohya's sd-scripts or diffusers' examples.

    Args:
        command: the command in quotes, or a file with it (.sh, .txt), or a configuration (.toml, .json, .yaml).
        out: YAML file to write (default: print it).

    Returns:
        The YAML, or where it was written. Comments name what was not carried over.

    Raises:
        UserError: nothing in it that can be imported, a value that its key does not take, an `out` that exists.
    """
    if out is not None and Path(out).expanduser().exists():
        raise UserError(f"{out}: exists already; choose another file to write")
    file = Path(command).expanduser()
    script, options = _of_file(file) if os.path.isfile(file) else _of_command(command)  # False for what is no path
    if not options:
        raise UserError(f"{command[:80]!r}: no option such as --learning_rate in it")
    values, notes = translated(script, options)
    try:
        configuration.from_mapping(values)
    except UserError as error:
        raise UserError(f"what was imported does not make a run: {error}") from error
    head = "".join(f"# {line}\n" for line in [f"Imported from {script or 'options'}.", *notes])
    text = head + yaml.safe_dump(values, sort_keys=False)
    if out is None:
        return text
    write_text(Path(out).expanduser(), text)
    return f"written to {out}\n{head}next: t2i-align train {out} data.path=my_pairs.jsonl"


def translated(script: str, options: Mapping[str, Value]) -> tuple[dict[str, Any], list[str]]:
    """A run's keys from another trainer's, and what a reader should know of it."""
    known = elsewhere()
    preferences = "dpo" in script or any("dpo" in name or "mapo" in name for name in options)
    objective = "mapo" if "mapo" in script else "diffusion_dpo" if preferences else "sft"
    lora = "lora" in script or "network" in script or "dpo" in script or any(name in LORA for name in options)
    values: dict[str, Any] = {"output_dir": "runs/imported", "objective": {"name": objective}}
    values |= {} if lora else {"lora": None}
    notes, rest = [], []
    if objective == "sft":
        notes.append("This trains on the better images alone; for preference pairs: objective=diffusion_dpo")
    for name, value in options.items():
        key = known.get(name)
        if key is None:
            rest.append(name if value is True else f"{name} {value}")
        elif " " in key:
            notes.append(f"{name} ({value}): {key}")
        else:
            for ours, own in _converted(name, key, value, options).items():
                if ours.startswith("objective.") and objective == "sft":
                    rest.append(f"{name} {value}")
                else:
                    _put(values, ours, own)
    if isinstance(values.get("output_dir"), str) and "output_name" in options:
        values["output_dir"] = f"{values['output_dir']}/{options['output_name']}"
    rest = [one for one in rest if not one.startswith(("output_name", "network_module"))]
    notes += [f"Not carried over: {', '.join(rest)}"] if rest else []
    return values, notes


def _converted(name: str, key: str, value: Value, options: Mapping[str, Value]) -> dict[str, Any]:
    """Our keys and values for one of theirs."""
    text = value if isinstance(value, str) else ""
    special: dict[str, Callable[[], dict[str, Any]]] = {
        "train.precision": lambda: {key: name.removeprefix("allow_") if value is True or text.lower() == "true"
                                    else {"no": "fp32", "false": "fp32"}.get(text.lower(), text)},
        "optim.optimizer": lambda: {key: _optimizer(name if value is True else text)},
        "optim.betas": lambda: {key: [float(options.get("adam_beta1", 0.9)), float(options.get("adam_beta2", 0.999))]},
        "data.resolution": lambda: {key: _resolution(text)},
        "data.path": lambda: {key: f"hub:{text}" if name in ("dataset_name", "dataset") and "/" in text else text},
        "train.attention": lambda: {key: "xformers"},
        "log.trackers": lambda: {key: [one for one in re.split(r"[ ,]+", text) if one in ("tensorboard", "wandb")]},
        "objective.beta": lambda: {key: float(text) * (BETA if name == "beta_dpo" else 1)},
        "model.prediction_type": lambda: {key: "v_prediction" if value is True else text},
        "train.steps": lambda: {key: int(float(text))},
        "lora.alpha": lambda: {key: float(text)},
        "resume": lambda: {key: True},
    }  # fmt: skip
    if key in special:
        return special[key]()
    if key == "optim.schedule" and text == "constant" and float(options.get("lr_warmup_steps", 0) or 0):
        return {key: "constant_with_warmup"}
    if isinstance(value, list):
        return {key: value}
    return {key: True if value is True else parse_yaml(text, name)}


def _optimizer(text: str) -> str:
    plain = text.lower().replace("_", "").replace("use", "").replace("8bitadam", "adamw8bit").replace("torch", "")
    found = next((ours for ours in OPTIMIZERS if plain.startswith(ours)), None)
    if found is None:
        raise UserError(f"optimizer {text!r}: expected one of {', '.join(OPTIMIZERS)}")
    return found


def _resolution(text: str) -> int | list[int]:
    """kohya's is `side` or `width,height`; ours a side or [height, width]."""
    numbers = [int(float(part)) for part in re.split(r"[x, ]+", text.strip())]
    return numbers[0] if len(set(numbers)) == 1 else numbers[::-1]


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node[parent] = node = node.get(parent) or {}
    node[last] = value


def _of_file(file: Path) -> tuple[str, dict[str, Value]]:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() == ".toml":
        try:
            return file.name, _flat(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{file}: not valid TOML: {error}") from error
    if file.suffix.lower() in (".json", ".yaml", ".yml"):
        parsed = parse_yaml(text, str(file))
        return file.name, _flat(parsed) if isinstance(parsed, dict) else {}
    return _of_command(text)


def _flat(values: Mapping[str, Any]) -> dict[str, Value]:
    """Options of a configuration, whatever sections they are in; SimpleTuner's keys begin with dashes."""
    out: dict[str, Value] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value)
        elif value not in (None, False):
            out[key.lstrip("-")] = (
                value if value is True else [*map(str, value)] if isinstance(value, list) else str(value)
            )
    return out


def _of_command(text: str) -> tuple[str, dict[str, Value]]:
    """The script of a command and its options; variables that the text sets are put in."""
    text = re.sub(r"[\\^`]\s*\n", " ", text)  # continued lines of sh, cmd and PowerShell
    variables = {name: value.strip("'\"") for name, value in
                 re.findall(r"^\s*(?:export\s+|set\s+)?(\w+)=(\"[^\"]*\"|'[^']*'|\S+)", text, re.M)}  # fmt: skip
    text = string.Template(text).safe_substitute(variables)
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise UserError(f"the command cannot be read: {error}") from error
    script = next((word for word in words if word.endswith(".py")), "")
    options: dict[str, Value] = {}
    name = ""
    for word in words:
        if re.match(r"--?[a-zA-Z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            options[name] = value if equals else True
        elif word == script:
            name = ""  # what follows are the script's own options
        elif name:
            options[name] = word if options[name] is True else [*([options[name]] if isinstance(options[name], str)
                                                                  else options[name]), word]  # fmt: skip
    for launcher in ("num_processes", "multi_gpu", "num_cpu_threads_per_process", "config_file", "main_process_port"):
        options.pop(launcher, None)
    return Path(script).name, options
