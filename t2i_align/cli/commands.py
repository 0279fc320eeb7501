"""The commands (`assets/commands.yaml`): how they run and report, and the functions that only they have."""

from __future__ import annotations

import errno
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from t2i_align.cli.streams import safe_streams
from t2i_align.errors import UserError
from t2i_align.plugins import load as load_plugin
from t2i_align.plugins import load_installed

if TYPE_CHECKING:
    from pipelines.check import Report
    from t2i_align.training.result import RunResult

TABLE = Path(__file__).parents[1] / "assets" / "commands.yaml"
# System errors whose message says it all; a traceback adds nothing.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOENT, errno.ENOTDIR,
                 errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)  # fmt: skip
# Options that name what is read: files and folders, bundled names (testbed:sd), Hub ids (owner/name, hub:owner/name).
INPUTS = ("source", "images", "prompts", "annotations", "model", "models", "base", "aligned", "lora")
GROUPS = {
    "data": "inspect preference data, or hold some prompts or users out",
    "video": "pairs of clips from real ones, and labels of their segments",
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One sub-command; the head of `assets/commands.yaml` explains the fields."""

    function: str
    summary: str
    examples: Sequence[str]
    check: str = ""
    report: str = ""
    interrupted: str = "Nothing needs cleaning up; run the same command again."
    single: Sequence[str] = ()
    every_process: bool = False
    engines: bool = False
    silent: bool = True

    def run(self, options: dict[str, Any], *, plugins: Sequence[str] = (), debug: bool = False) -> int:
        """Call the command's function with the options that were given; returns the exit status."""
        with safe_streams(sys.stdout, sys.stderr):
            return self._run(options, plugins, debug)

    def _run(self, options: dict[str, Any], plugins: Sequence[str], debug: bool) -> int:
        try:
            for place in plugins:
                load_plugin(place)
            if plugins and self.check:  # recorded with the run
                options["overrides"] = [*options.get("overrides", ()), *(f"plugins+={place}" for place in plugins)]
            if isinstance(options.get("scorers"), list):
                options["scorers"] = [spec for listed in options["scorers"] for spec in listed.split(",") if spec]
            if self.check:  # a wrong key is answered before torch is imported
                load(self.check)(options["config"], options.get("overrides", ()))
            check_inputs(options)  # and so is a wrong path
            engine, workers = options.pop("engine", None), options.pop("workers", None)
            if engine:
                from t2i_align.utils.ray_engine import run

                result = run(self.function, options, workers=workers, plugins=plugins, silent=self.silent)
            else:
                function = load(self.function)
                if self.silent:
                    from t2i_align.utils.logging import silence_libraries

                    silence_libraries()
                result = function(**options)
            self.print_report(result, options)
            return 0
        except KeyboardInterrupt as interrupt:
            after = f": {interrupt}" if str(interrupt) else "."
            print(f"\ninterrupted{after}\n{self.interrupted}", file=sys.stderr)
            return 130
        except Exception as error:
            expected = is_user_error(error)
            if debug or not expected:
                traceback.print_exc()
            else:
                print(f"error: {error}", file=sys.stderr)
            return 2 if expected else 1

    def print_report(self, result: Any, options: dict[str, Any]) -> None:
        """Print what came of it, from one of several processes unless each has its own."""
        if self.report and (self.every_process or os.environ.get("RANK", "0") == "0"):
            values = result if isinstance(result, dict) else getattr(result, "accuracy", {})
            rows = values if isinstance(values, dict) else {}
            width = max(map(len, rows), default=0)
            text = "\n".join(f"{name.replace('_', ' '):<{width}} {value}" for name, value in rows.items())
            summary = result.summary() if hasattr(result, "summary") else ""
            print(self.report.format(result=result, rows=text, summary=summary, **options))


LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C, where it is there: ten times as fast
COMMANDS = {name: Command(**values) for name, values in yaml.load(TABLE.read_text(encoding="utf-8"), LOADER).items()}


def load(path: str) -> Any:
    """The function at `module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def check_inputs(options: Mapping[str, Any]) -> None:
    """Raise UserError for an input that can only be a local path, where there is none."""
    for name in INPUTS:
        value = options.get(name)
        for text in value if isinstance(value, list) else [value] if isinstance(value, str) else []:
            local = Path(text).expanduser()
            certain = local.is_absolute() or text.startswith((".", "~")) or not {"/", ":"} & {*text}
            if certain and not os.path.lexists(local):
                raise UserError(f"{text}: no such file or folder (--{name})")


def is_user_error(error: BaseException) -> bool:
    """Whether the message alone tells a user what to do: bad input, or a system error such as a full disk."""
    # Looked up, not imported: whichever module raised one of these is loaded.
    for module, name in (
        ("t2i_align.errors", "UserError"),
        ("pipelines.base", "PipelineError"),
        ("reward_scorers.errors", "ScorerError"),
    ):
        if isinstance(error, getattr(sys.modules.get(module), name, ())):
            return True
    return isinstance(error, OSError) and error.errno in SYSTEM_ERRORS


def train(config: str | Path, overrides: Sequence[str] = ()) -> RunResult:
    """Run a configuration.

    Args:
        config: path of a YAML file such as those under configs/.
        overrides: `key=value` changes to the file: train.steps=200 objective.beta=500 lora=null ...
    """
    from t2i_align.training.run import align

    return align(config, overrides)


def check_model(
    model: str | Path,
    *,
    expert: str | None = None,
    precision: str = "fp32",
    device: str | None = None,
    quick: bool = False,
) -> Report:
    """Check a model's family against the genuine diffusers pipeline (`pipelines.check`).

    Args:
        model: diffusers folder, single file, Hub id, or `testbed:sd`.
        expert: denoiser to check, `high` or `low`, where a model has two.
        precision: `fp32`, `bf16` or `fp16`; differences are seen best in fp32.
        device: such as cpu or cuda:1 (default: the GPU if there is one).
        quick: do not write the whole model to a temporary folder and load it from there.

    Raises:
        UserError: a check failed; the message lists them all.
    """
    import pipelines
    from t2i_align.config import ModelConfig
    from t2i_align.inference.models import load_pipeline

    config = ModelConfig(path=str(model), expert=expert)  # type: ignore[arg-type]
    report = pipelines.check(load_pipeline(config, precision, device), whole=not quick)
    if not report.ok:
        raise UserError(str(report))
    return report


def prepare(config: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Encode a run's data into its cache; returns counts and places.

    Args:
        config: path of a YAML file such as those under configs/.
        overrides: `key=value` changes to the file: train.steps=200 objective.beta=500 lora=null ...
    """
    from accelerate import Accelerator

    from t2i_align import config as configuration
    from t2i_align.data.loader import PreparedDataset
    from t2i_align.data.store import SKIPPED
    from t2i_align.training.run import load_data, load_model

    run = configuration.load(config, overrides)
    if not run.data.cache:
        raise UserError("data.cache is false in this configuration, so there is nothing to prepare")
    if run.data.stream:
        raise UserError("data.stream encodes each batch as it comes, so there is nothing to prepare")
    accelerator = Accelerator()
    source = load_data(run, accelerator, load_model(run, accelerator.device), progress=True)
    assert isinstance(source, PreparedDataset)  # on the fly was refused above
    skipped = {"why_skipped": source.store.path / SKIPPED} if source.counts["skipped"] else {}
    return {**source.counts, "cache": source.store.path, **skipped}


def objectives(name: str | None = None) -> str:
    """What objectives there are, as a table; or one of them, explained.

    Args:
        name: explain this one.
    """
    from t2i_align import objectives as registry
    from t2i_align.utils.settings import expected

    if name:
        cls = registry.get(name)
        needs = f"Needs {cls.needs}." + (f" A complete run: configs/{cls.config}" if cls.config else "")
        keys = [f"  objective.{f.name} = {f.default!r}  ({expected(cls, f.name)})" for f in fields(cls)]  # type: ignore[arg-type]
        texts = [inspect.getdoc(sys.modules[cls.__module__]), inspect.getdoc(cls), needs, "Hyper-parameters:"]
        return "\n\n".join([*map(str, texts), "\n".join(keys)])
    load_installed()
    classes = sorted((name, registry.get(name)) for name in registry.CLASSES)
    rows = [("name", "paper", "needs", "in configs/")]
    rows += [(name, cls.paper, str(cls.needs), cls.config) for name, cls in classes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
