"""The files of a table: which of a folder's are read, in which order, and which are missing.

Of a folder whose files are named after splits (`train-00000-of-00003.parquet`, `data/test/0.tar`), or whose README
declares them as the Hub's do, one split is read: `train`, unless a dataset spec names another.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import count, islice
from pathlib import Path
from typing import Any

import yaml

from t2i_align.data.paths import natural
from t2i_align.data.schema import Skipped
from t2i_align.errors import UserError

SHARDED = (".parquet", ".tar")  # kinds that come as a folder of numbered files
NUMBERED = re.compile(r"(.*?)(\d{3,})(?:-of-(\d+))?(\.\w+)$")
LISTED = 10  # so many missing shards of a series are named one by one
TRAIN, ALL = "train", "all"
SPLITS = {
    "training": "train", "train": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def files(path: Path, split: str = TRAIN) -> list[Path]:
    """The files below a folder that make up a table: all parquet files, or all webdataset shards.

    Raises:
        UserError: no file of a split other than `train`.
    """
    return [path / name for name in of_split(_names(path), split, _declared(path))]


def left_out(path: Path, split: str = TRAIN) -> Iterator[Skipped]:
    """The splits of a folder that nobody asked for, and the shards that its numbers say should be there and are not."""
    names, declared = _names(path), _declared(path)
    kept = of_split(names, split, declared)
    others = {*names} - {*kept} if split == TRAIN else set()
    for name, number in sorted(Counter(max(_splits(name, declared), key=len) for name in others).items()):
        reason = f"files of another split than `train`: {number}; `split: {name}` in a dataset spec reads them"
        yield Skipped(id=name, origin=str(path), reason=reason)
    yield from _missing(path, kept)


def of_split(names: Sequence[str], split: str = TRAIN, declared: Sequence[tuple[str, str]] = ()) -> list[str]:
    """The files of a split, in natural order. Without any of `train`, all of them; files of no split belong to it.

    declared: file patterns and their splits.
    """
    splits = {name: _splits(name, declared) for name in names}
    known = set().union(*splits.values())
    if split not in known | {TRAIN, ALL}:
        raise UserError(f"split: no file of {split!r}; there are: {', '.join(sorted(known)) or 'none'}")
    if split in known:
        splits = {name: own for name, own in splits.items() if split in own or (split == TRAIN and not own)}
    return sorted(splits, key=lambda name: [natural(part) for part in name.split("/")])


def _names(folder: Path) -> list[str]:
    """The shards below a folder, of the first kind of which there are any, by their names in it."""
    # Some programs write a folder named like a file, with the files in it.
    below = [file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir()]
    shown = [file for file in below if not any(part[0] == "." for part in file.parts)]
    kinds = ([file.as_posix() for file in shown if file.suffix.lower() == suffix] for suffix in SHARDED)
    return next(filter(None, kinds), [])


def _splits(name: str, declared: Sequence[tuple[str, str]]) -> set[str]:
    """The split of a file: declared, or by the first word of its name that is one; and the name that it has there."""
    if own := {split for pattern, split in declared if fnmatch(name, pattern)}:
        return own
    word = next((SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), None)
    full = re.match(r"(\w+)-\d+-of-\d+\.", name.rpartition("/")[2])
    return set() if word is None else {word, full[1] if full else word}


def declared(header: Any) -> list[tuple[str, str]]:
    """The patterns of files and their splits in the header of a data set's README; none where it has another form."""
    try:
        pairs = [(pattern, entry["split"]) for entry in _entries(header) for pattern in _list(entry["path"])]
    except (LookupError, TypeError, AttributeError):
        return []
    return [(str(pattern), str(split)) for pattern, split in pairs]


def _declared(folder: Path) -> list[tuple[str, str]]:
    file = folder / "README.md"
    header = re.match(rb"---\n(.*?)\n---", file.read_bytes(), re.DOTALL) if file.is_file() else None
    try:
        return declared(yaml.safe_load(header[1])) if header else []
    except (yaml.YAMLError, RecursionError, UnicodeError):
        return []  # it is written for people


def _entries(values: Any) -> Iterator[dict[str, Any]]:
    for config in (values or {}).get("configs", ()):
        yield from (entry for entry in _list(config["data_files"]) if isinstance(entry, dict))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _missing(folder: Path, names: Iterable[str]) -> Iterator[Skipped]:
    """Shards up to N of `-of-N`; of a series without N, gaps, if it has more files than gaps (dates are no series)."""
    series: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        if match := NUMBERED.match(name):
            start, number, total, suffix = match.groups()
            series[start, total or "", suffix].add(number)
    for (start, total, suffix), texts in series.items():
        numbers = {int(text) for text in texts}
        first = min(numbers) if not total else int(0 not in numbers and int(total) in numbers)
        gaps = (int(total) if total else max(numbers) - first + 1) - len(numbers)
        if gaps <= 0 or (not total and gaps >= len(numbers)):
            continue
        absent = (number for number in count(first) if number not in numbers)
        width, of = min(map(len, texts)), f"-of-{total}" if total else ""
        reason = "this shard is missing; none of its rows is used"
        if gaps > LISTED:
            reason, gaps = f"{gaps} shards are missing, this one first; none of their rows is used", 1
        for number in islice(absent, gaps):
            name = f"{start}{number:0{width}d}{of}{suffix}"
            yield Skipped(id=name, origin=str(folder / name), reason=reason)
