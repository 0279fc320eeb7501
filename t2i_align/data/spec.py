"""A source file: YAML that says where preference data lie, what their columns hold, and which part of them is meant.

    path: votes.csv                  # relative to this file, or hub:owner/name
    format: auto
    columns: {candidates: [left, right], votes: [votes_left, votes_right], prompt: text}
    pairs: all                       # every pair of a ranking is a group of its own
    ties: false                      # groups without a preference are skipped
    part: {of: train, held_out: 0.1, by: [prompt], seed: 0}

Its name stands for the source everywhere: in `data.path`, and for every command that takes a source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from t2i_align.data import columns, hub
from t2i_align.data.columns import Columns
from t2i_align.data.formats import exists
from t2i_align.data.schema import Group, Items, Skipped
from t2i_align.data.splits import By, Part
from t2i_align.errors import UserError
from t2i_align.utils.settings import Bool, build, settings

if TYPE_CHECKING:
    from t2i_align.data.readers import Reader

SUFFIXES = (".yaml", ".yml")


@settings
class DatasetSpec:
    """What a source file says; see the module.

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
    """What a source file says. Raises UserError where it is no such file, with the keys that there are."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {error}") from error
    try:
        return build(DatasetSpec, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def read(path: Path) -> Items:
    """The groups of the source that a file describes."""
    return _items(path, images=True)


def outline(path: Path) -> Items:
    """The same items with images left out, where reading them is costly."""
    return _items(path, images=False)


def files(path: Path) -> Iterator[Path]:
    """The source file and the files of what it describes."""
    from t2i_align.data.readers import files_of

    description = load(path)
    inner = _resolve(path, description)
    yield path
    if description.columns:
        yield from columns.files(inner, description.columns)
    else:
        yield from files_of(inner, description.format)


def _items(path: Path, images: bool) -> Items:
    description = load(path)
    inner = _resolve(path, description)
    if description.columns:
        items = columns.read(inner, description.columns, images=images)
    else:
        reader = _reader(inner, description.format)
        items = (reader.read if images else reader.outline or reader.read)(inner)
    for item in items:
        if isinstance(item, Skipped):
            yield item
            continue
        found = description.part.belongs(item) if description.part else True
        if found is None:
            yield Skipped(
                id=item.id, origin=item.origin, reason="its prompt and its user are on two sides of the split"
            )
        elif found:
            yield from _expanded(item, description)


def _resolve(file: Path, description: DatasetSpec) -> Path:
    if description.path.startswith(hub.PREFIX):
        return hub.folder(description.path)
    inner = (file.parent / Path(description.path).expanduser()).resolve()
    if not exists(inner):
        raise UserError(f"{file}: path: no such file or folder: {inner}")
    if inner == file.resolve() or detects(inner):
        raise UserError(f"{file}: path: {inner} is a source file itself; name what it describes")
    return inner


def _reader(inner: Path, format: str) -> Reader:
    from t2i_align.data.readers import READERS, detect

    return READERS[detect(inner, format)]


def _expanded(group: Group, description: DatasetSpec) -> Iterator[Group | Skipped]:
    """The group, or its pairs, without those that a person does not want."""
    made = [group]
    if description.pairs and len(group.candidates) > 2:
        chosen = list(combinations(range(len(group.candidates)), 2))
        if description.pairs == "best_worst":
            order = sorted(range(len(group.scores)), key=lambda i: -group.scores[i])
            chosen = [(order[0], order[-1])]
        made = [replace(group.take(pair), id=f"{group.id}#{pair[0]}-{pair[1]}") for pair in chosen]
    for item in made:
        if not description.ties and item.is_tie:
            yield Skipped(id=item.id, origin=item.origin, reason="a tie")
        else:
            yield item


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

    Raises:
        UserError: a source that cannot be read, is a part already, or leaves one side empty.
    """
    from t2i_align.data import readers

    path = readers.resolve(source).absolute()
    values: dict[str, Any] = {"path": str(path), "format": readers.detect(path, format)}
    if detects(path):
        if load(path).part:
            raise UserError(f"{source}: this is one part of a split already; split what it describes")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not values["path"].startswith(hub.PREFIX):
            values["path"] = str(_resolve(path, load(path)))
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
