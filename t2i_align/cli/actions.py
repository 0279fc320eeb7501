"""What a command does beside calling the library: the functions of `prepare` and `objectives`, and what is printed."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from t2i_align.errors import UserError


def prepare(config: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Encode a run's data into its cache; returns counts and places.

    Args:
        config: path of a YAML file such as those under configs/.
        overrides: `key=value` changes to the file: train.steps=200 objective.beta=500 lora=null ...
    """
    from accelerate import Accelerator

    from t2i_align import config as configuration
    from t2i_align.data.store import SKIPPED, Store
    from t2i_align.training.run import load_data, load_model

    run = configuration.load(config, overrides)
    if not run.data.cache:
        raise UserError("data.cache is false in this configuration, so there is nothing to prepare")
    if run.data.stream:
        raise UserError("data.stream encodes each batch as it comes, so there is nothing to prepare")
    accelerator = Accelerator()
    source = load_data(run, accelerator, load_model(run, accelerator.device), progress=True)
    assert isinstance(source.groups, Store)  # on the fly was refused above
    skipped = {"why_skipped": source.groups.path / SKIPPED} if source.counts["skipped"] else {}
    return {**source.counts, "cache": source.groups.path, **skipped}


def objectives(name: str | None = None) -> str:
    """What objectives there are, as a table; or one of them, explained.

    Args:
        name: explain this one.
    """
    from t2i_align import objectives as registry
    from t2i_align.utils.settings import expected

    if name:
        cls = registry.get(name)
        needs = f"Needs {cls.needs}. A complete run: configs/{cls.config}"
        keys = [f"  objective.{f.name} = {f.default!r}  ({expected(cls, f.name)})" for f in fields(cls)]  # type: ignore[arg-type]
        texts = [inspect.getdoc(sys.modules[cls.__module__]), inspect.getdoc(cls), needs, "Hyper-parameters:"]
        return "\n\n".join([*map(str, texts), "\n".join(keys)])
    classes = sorted((name, registry.get(name)) for name in registry.CLASSES)
    rows = [("name", "paper", "needs", "in configs/")]
    rows += [(name, cls.paper, str(cls.needs), cls.config) for name, cls in classes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# What is printed of a result ----------------------------------------------------------------------------------------


def rows(values: dict[str, Any], options: dict[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name.replace('_', ' '):<{width}} {value}")


def summary(result: Any, options: dict[str, Any]) -> None:
    print(result.summary())


def quickstart(result: Any, options: dict[str, Any]) -> None:
    print(f"\naligned against base, same prompts and seeds:\n{result.summary()}")
    print(f"{result.settings['seconds']:.0f} seconds in all")


def trained(result: Any, options: dict[str, Any]) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"trained {result.steps} steps; weights in {result.weights}")


def trained_scorer(result: Any, options: dict[str, Any]) -> None:
    if os.environ.get("RANK", "0") == "0":
        rows(result.accuracy, options)
        print(f"trained {result.steps} steps; the scorer is trained:{result.folder}")


def annotated(result: Any, options: dict[str, Any]) -> None:
    print(f"{result.groups} groups annotated in {result.out}")
    if result.why_skipped:
        print(f"{result.skipped} skipped; why: {result.why_skipped}")


def synthesized(result: Any, options: dict[str, Any]) -> None:
    if result.missing:
        print(f"{result.missing} prompts are left to other processes; the last one to finish writes {result.out}")
    else:
        print(f"{result.groups} groups in {result.out}, {result.skipped} skipped")


def inspected(result: Any, options: dict[str, Any]) -> None:
    print(f"{result.summary()}\nreport in {options['out']}")
