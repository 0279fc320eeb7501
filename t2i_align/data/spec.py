"""Dataset spec (YAML): where preference data lie, what their columns hold, which part is used.

    path: votes.csv                  # relative to this file, or hub:owner/name
    format: auto
    root: /mnt/images                # paths are relative to it, or below it; default: the folder of the table
    columns: {candidates: [left, right], votes: [votes_left, votes_right], prompt: text}
    pairs: all                       # every pair of a ranking is a group of its own
    ties: false                      # groups without a preference are skipped
    split: test                      # of a folder with several; default: train
    part: {of: train, held_out: 0.1, by: [prompt], seed: 0}

The file's name stands for the source everywhere: in `data.path`, and for every command that takes a source.

What is held out is a function of (seed, kind, normalised text) and of nothing else. So a prompt stays on its side when
data are added, reordered or read from another format, and whoever splits by the same seed and share (`data split`,
`train-scorer`) holds out the same prompts.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from t2i_align.data import hub
from t2i_align.data.schema import COLUMNS, Columns, Group, Items, Skipped
from t2i_align.data.shards import TRAIN
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError, shown, unknown
from t2i_align.utils.settings import Bool, Float, Int, UserPath, build, read_yaml, settings

# What `columns` of a file may name beside optional columns. Other fields of Columns are for readers of fixed layouts.
COLUMN_KEYS = {f.name for f in fields(Columns)} - {"columns", "id_if_unique", "own_names"}
SUFFIXES = (".yaml", ".yml")
By = Literal["prompt", "user"]


def is_held_out(kind: By, text: str, *, share: float, seed: int) -> bool:
    """Whether a prompt or user is among the `share` (0 … 1) of all texts that training does not see."""
    text = normalise(text) if kind == "prompt" else text
    text = text.encode(errors="backslashreplace").decode()  # lone surrogates stay distinct
    return stable_seed(seed, kind, text) < share * 2**63


def normalise(prompt: str) -> str:
    """Normalise a prompt for comparison: NFKC, case-folded, whitespace collapsed."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


@settings
class Part:
    """One side of a split.

    of: which side. held_out: the share of prompts (or users) that training does not see. by: what is kept apart; with
    both, a group whose prompt is on one side and whose user is on the other belongs to neither. Prompts are compared
    normalised. A group without a user counts by its prompt alone.
    """

    of: Literal["train", "held_out"]
    held_out: Annotated[Float, Field(gt=0, lt=1, description="a number in (0, 1)")] = 0.1
    by: Annotated[list[By], Field(min_length=1)] = field(default_factory=lambda: ["prompt"])
    seed: Int = 0

    def belongs(self, group: Group) -> bool | None:
        """Whether a group is on this side; None where it is on neither."""
        sides = set()
        if "prompt" in self.by or group.user is None:
            sides.add(is_held_out("prompt", group.prompt, share=self.held_out, seed=self.seed))
        if "user" in self.by and group.user is not None:
            sides.add(is_held_out("user", group.user, share=self.held_out, seed=self.seed))
        return None if len(sides) > 1 else sides.pop() == (self.of == "held_out")


@settings
class DatasetSpec:
    """See the module.

    pairs: `all` makes every two candidates of a group a pair; `best_worst` keeps only these two; null leaves groups as
    they are, from which an objective on pairs takes the best and the worst.
    split: of a folder with files of several (see `shards`), or `all`.
    """

    path: str
    format: str = "auto"
    root: UserPath | None = None
    columns: Columns | None = None
    pairs: Literal["all", "best_worst"] | None = None
    ties: Bool = True
    split: str = TRAIN
    part: Part | None = None

    def select(self, items: Items) -> Items:
        """The groups of the part, as pairs and without ties where the spec says so."""
        for item in items:
            belongs = self.part.belongs(item) if self.part and isinstance(item, Group) else True
            if isinstance(item, Skipped):
                yield item
            elif belongs is None:
                yield item.skipped("its prompt and its user are on two sides of the split")
            elif belongs:
                yield from self._pairs(item)

    def _pairs(self, group: Group) -> Iterator[Group | Skipped]:
        """Expand rankings to pairs and drop ties, as configured."""
        groups = [group]
        if self.pairs and len(group.candidates) > 2:
            places = list(combinations(range(len(group.candidates)), 2))
            if self.pairs == "best_worst":
                order = sorted(range(len(group.scores)), key=lambda i: -group.scores[i])
                places = [(order[0], order[-1])]
            groups = [replace(group.take(pair), id=f"{group.id}#{pair[0]}-{pair[1]}") for pair in places]
        for one in groups:
            yield one if self.ties or not one.is_tie else one.skipped("a tie")


def is_spec(path: Path) -> bool:
    """Whether it is a file that ends in .yaml or .yml."""
    return path.suffix in SUFFIXES and path.is_file()


def load(file: Path) -> tuple[DatasetSpec, Path]:
    """Parse and check a spec; the file or folder that it describes is found.

    Raises:
        UserError: names the file and the keys that are wrong.
    """
    values = read_yaml(file)
    if isinstance(values, dict) and isinstance(columns := values.get("columns"), dict):
        known = COLUMN_KEYS | COLUMNS.keys()
        if unknown_keys := [name for name in columns if name not in known]:
            raise UserError(f"{file}: {unknown('key in columns', str(unknown_keys[0]), known)}")
        optional = {name: columns[name] for name in COLUMNS if columns.get(name) is not None}
        others = {name: value for name, value in columns.items() if name not in COLUMNS}
        # In the file, the optional columns stand beside the others.
        values = {**values, "columns": {**others, "columns": optional} if optional else others}
    try:
        spec = build(DatasetSpec, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    if spec.path.startswith(hub.PREFIX):
        return spec, hub.folder(spec.path)
    try:
        source = (file.parent / os.path.expanduser(spec.path)).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null byte
        raise UserError(f"{file}: path: {shown(spec.path)} is not a usable path: {error}") from error
    if not os.path.exists(source):
        raise UserError(f"{file}: path: no such file or folder: {source}")
    if source == file.resolve() or is_spec(source):
        raise UserError(f"{file}: path: {source} is a dataset spec itself; name what it describes")
    return spec, source
