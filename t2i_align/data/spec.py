"""Dataset spec (YAML): where preference data lie, what their columns hold, which part is used.

    path: votes.csv                  # relative to this file, or hub:owner/name
    format: auto
    columns: {candidates: [left, right], votes: [votes_left, votes_right], prompt: text}
    pairs: all                       # every pair of a ranking is a group of its own
    ties: false                      # groups without a preference are skipped
    part: {of: train, held_out: 0.1, by: [prompt], seed: 0}

The file's name stands for the source everywhere: in `data.path`, and for every command that takes a source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import yaml

from t2i_align.data import hub
from t2i_align.data.columns import exists
from t2i_align.data.layouts import Columns
from t2i_align.data.schema import COLUMNS, Group, Items, Skipped
from t2i_align.data.splits import By, Part
from t2i_align.errors import UserError
from t2i_align.utils.settings import Bool, build, read_yaml, settings

SUFFIXES = (".yaml", ".yml")


def _gathered(values: Any) -> Any:
    """Optional columns stand beside the others in a file."""
    if not isinstance(values, dict):
        return values
    optional = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    rest = {name: value for name, value in values.items() if name not in COLUMNS}
    return {**rest, "columns": optional} if optional else rest


@settings
class DatasetSpec:
    """See the module.

    pairs: `all` makes every two candidates of a group a pair; `best_worst` keeps only these two; null leaves groups as
    they are, from which an objective on pairs takes the best and the worst.
    """

    path: str
    format: str = "auto"
    columns: Columns | None = None
    pairs: Literal["all", "best_worst"] | None = None
    ties: Bool = True
    part: Part | None = None


def detects(path: Path) -> bool:
    """A file that ends in .yaml or .yml."""
    return path.is_file() and path.suffix in SUFFIXES


def load(file: Path) -> DatasetSpec:
    """Parse and check a spec. Raises UserError naming the file and the keys that are wrong."""
    values = read_yaml(file)
    if isinstance(values, dict) and "columns" in values:
        values = {**values, "columns": _gathered(values["columns"])}
    try:
        return build(DatasetSpec, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def source_of(file: Path, spec: DatasetSpec) -> Path:
    """The file or folder that a spec describes."""
    if spec.path.startswith(hub.PREFIX):
        return hub.folder(spec.path)
    source = (file.parent / Path(spec.path).expanduser()).resolve()
    if not exists(source):
        raise UserError(f"{file}: path: no such file or folder: {source}")
    if source == file.resolve() or detects(source):
        raise UserError(f"{file}: path: {source} is a dataset spec itself; name what it describes")
    return source


def selected(items: Items, spec: DatasetSpec) -> Items:
    """The groups of the part that a spec selects, as pairs and without ties where it says so."""
    for item in items:
        if isinstance(item, Skipped):
            yield item
            continue
        belongs = spec.part.belongs(item) if spec.part else True
        if belongs is None:
            reason = "its prompt and its user are on two sides of the split"
            yield Skipped(id=item.id, origin=item.origin, reason=reason)
        elif belongs:
            yield from _pairs(item, spec)


def _pairs(group: Group, spec: DatasetSpec) -> Iterator[Group | Skipped]:
    """Expand rankings to pairs and drop ties, as configured."""
    groups = [group]
    if spec.pairs and len(group.candidates) > 2:
        places = list(combinations(range(len(group.candidates)), 2))
        if spec.pairs == "best_worst":
            order = sorted(range(len(group.scores)), key=lambda i: -group.scores[i])
            places = [(order[0], order[-1])]
        groups = [replace(group.take(pair), id=f"{group.id}#{pair[0]}-{pair[1]}") for pair in places]
    for one in groups:
        if not spec.ties and one.is_tie:
            yield Skipped(id=one.id, origin=one.origin, reason="a tie")
        else:
            yield one


def split(
    source: str | Path,
    out: str | Path,
    *,
    held_out: float = 0.1,
    by: Sequence[By] = ("prompt",),
    seed: int = 0,
    format: str = "auto",
) -> dict[str, int]:
    """Write `train.yaml`, `held_out.yaml` and `held_out_prompts.txt`; returns how many groups and prompts are in each.

    No group is copied: the files say by which rule a group belongs to them (`splits.Part`).

    Args:
        source: preference data: file, folder, dataset spec, `hub:owner/name`, or `testbed:pairs`.
        out: folder to write them to.
        held_out: share of prompts or users that is held out.
        by: what is kept apart: `prompt`, `user` or both.
        seed: selects which are held out.
        format: format of the source; `auto` detects it.

    Raises:
        UserError: a source that cannot be read, is a part already, or leaves one side empty.
    """
    from t2i_align.data import readers  # which reads specs

    path = readers.resolve(source).absolute()
    values: dict[str, Any] = {"path": str(path), "format": readers.detect(path, format)}
    if detects(path):
        if load(path).part:
            raise UserError(f"{source}: this is one part of a split already; split what it describes")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not values["path"].startswith(hub.PREFIX):
            values["path"] = str(source_of(path, load(path)))
    part = {"held_out": held_out, "by": list(by), "seed": seed}
    sides = {name: Part(of=name, **part) for name in ("train", "held_out")}  # type: ignore[arg-type]
    counts = dict.fromkeys([*sides, "on_neither_side", "skipped"], 0)
    prompts: dict[str, None] = {}
    for item in readers.read(path, format, images=False):
        if isinstance(item, Skipped):
            counts["skipped"] += 1
            continue
        belongs = {name: side.belongs(item) for name, side in sides.items()}
        counts[next((name for name, on in belongs.items() if on), "on_neither_side")] += 1
        if belongs["held_out"]:
            prompts[" ".join(item.prompt.split())] = None
    if empty := [name for name in sides if not counts[name]]:
        raise UserError(f"{source}: with held_out={held_out:g} and seed={seed}, {empty[0]} is empty; choose others")
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name in sides:
        text = yaml.safe_dump({**values, "part": {"of": name, **part}}, sort_keys=False, allow_unicode=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "held_out_prompts.txt").write_text("".join(f"{text}\n" for text in prompts), encoding="utf-8")
    return {**counts, "held_out_prompts": len(prompts)}
