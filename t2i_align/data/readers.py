"""From any source to groups: `read` finds the format, and does what holds for all formats.

Your own format is a function from a path to groups:

    @register("votes")
    def read_votes(path: Path) -> Iterator[Group | Skipped]:
        ...

Groups come best first, ids are unique, prompts are usable text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from t2i_align import plugins
from t2i_align.data import folders, hub, sheets, spec, tables
from t2i_align.data.annotations import NONE, Annotations
from t2i_align.data.layouts import KINDS, PUBLISHED
from t2i_align.data.schema import EVERYTHING, Columns, Group, Items, Selection, Skipped
from t2i_align.data.shards import TRAIN
from t2i_align.errors import UserError, unknown

Read = Callable[[Path], Items]
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _all_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A format.

    read: a path's groups and skipped rows, in a stable order; without `images`, those that are costly to read are left
    out; of a table, with a third argument, only those of this file. detects: whether a path looks like this format.
    files: the files that hold the rows. function: of a format from outside, what it is made of.
    """

    read: Callable[..., Items]
    detects: Callable[[Path], bool] = lambda path: False
    files: Callable[[Path], Iterable[Path]] = _all_files
    function: Read | None = None


def _table(
    maps: Callable[[Path], Sequence[Columns]], detects: Callable[[Path], bool] = lambda path: False, split: str = TRAIN
) -> Reader:
    """The format of tables with column maps."""

    def read(path: Path, images: bool, part: Path | None = None) -> Items:
        return tables.groups(path, maps(path), images, part, split)

    return Reader(read=read, detects=detects, files=partial(tables.files, split=split))


def _recognised(name: str, path: Path) -> bool:
    """Whether a table looks like the layout `name`."""
    file = next(iter(tables.files(path)), None)
    if file is None or name in KINDS:
        return file is not None and tables.kind(file) in KINDS[name]
    if tables.kind(file) == ".tar" or (name == "pairs" and tables.kind(file) in sheets.JSON):
        return False
    names = tables.header(file)
    return any(not maps.missing(names) for maps in PUBLISHED[name])


def _maps(name: str, path: Path) -> Sequence[Columns]:
    """The column maps of the layout `name`, for a table at `path`."""
    if name == "hpdv2" and (path.parent / path.stem).is_dir():  # the images lie in `train/` or `test/` beside the file
        return [replace(maps, folder=path.stem) for maps in PUBLISHED[name]]
    return PUBLISHED[name]


def _described(path: Path) -> tuple[spec.DatasetSpec, Path, Reader]:
    description, source = spec.load(path)
    root = {"folder": str((path.parent / description.root).resolve())} if description.root else {}

    def rooted(maps: Sequence[Columns]) -> Sequence[Columns]:
        return [replace(columns, **root) for columns in maps]  # type: ignore[arg-type]

    if (own := description.columns) is not None:
        return description, source, _table(lambda path: rooted([own]), split=description.split)
    if not plugins.has_run(description.format):
        raise UserError(
            f"{path}: format: a dataset spec may come with data from anywhere and runs no code. To use "
            f"{description.format}, name its file among the plugins (plugins=[...], --plugin)."
        )
    name = detect(source, description.format)
    if name in PUBLISHED:
        return description, source, _table(lambda path: rooted(_maps(name, path)), split=description.split)
    if description.root is not None:
        raise UserError(f"{path}: root: {source} is no table with paths")
    if description.split != TRAIN:
        raise UserError(f"{path}: split: {source} is no table in several files, of which one could be chosen")
    return description, source, reader_of(name)


def _read_described(path: Path, images: bool) -> Items:
    description, source, reader = _described(path)
    return description.select(reader.read(source, images))


def _files_described(path: Path) -> list[Path]:
    _, source, reader = _described(path)
    return [path, *reader.files(source)]


READERS: dict[str, Reader] = {
    "described": Reader(
        read=_read_described,
        detects=lambda path: path.suffix in spec.SUFFIXES and path.is_file(),
        files=_files_described,
    ),
    "folders": Reader(
        read=lambda path, images: folders.read(path),
        detects=lambda path: path.is_dir() and folders.detects(path),
        files=lambda path: (),
    ),
    **{name: _table(partial(_maps, name), partial(_recognised, name)) for name in PUBLISHED},
    "captioned": Reader(
        read=lambda path, images: folders.read_captioned(path),
        detects=folders.detects_captioned,
        files=lambda path: (),
    ),
}


def register(
    name: str, *, detects: Callable[[Path], bool] = lambda path: False, outline: Read | None = None
) -> Callable[[Read], Read]:
    """Make a reading function known under `name`. Raises UserError where another one has that name.

    detects: whether a path looks like this format. outline: the same items without images that are costly to read.
    """

    def add(function: Read) -> Read:
        if name == "auto":
            raise UserError("a data format cannot be named 'auto'")
        plugins.register(READERS, name, _outside(function, outline, detects=detects), "data format")
        return function

    return add


def read(
    path: str | Path,
    format: str = "auto",
    annotations: Annotations = NONE,
    *,
    best_first: bool = True,
    images: bool = True,
    selection: Selection = EVERYTHING,
    part: Path | None = None,
    seen: Callable[[Group], None] = lambda group: None,
) -> Items:
    """The groups of a source, best first, and its rows that cannot be used.

    Args:
        path: file or folder, `testbed:pairs` for the bundled preferences, or `hub:owner/name`.
        format: a name in READERS, or `auto`.
        annotations: what sidecar files add; see `Annotations.load`.
        best_first: false leaves candidates in the source's order, which is what annotations are written in.
        images: false leaves them out where reading them is costly.
        selection: its limit is where to stop; no row beyond is read.
        part: one file of a table; only its groups, with the ids and paths that they have in the whole.
        seen: called with each group that can be used as the source has it, without annotations.

    Raises:
        UserError: nothing there, an unknown or undetectable format, a source that is broken as a whole, annotations
            that do not fit it.
    """
    file = resolve(path)
    reader = reader_of(detect(file, format))
    items = reader.read(file, images, part) if part else reader.read(file, images)
    items = selection.first(_checked(items, part or file, annotations, seen))
    return (item.best_first() if best_first and isinstance(item, Group) else item for item in items)


def resolve(path: str | Path) -> Path:
    """The file or folder that `path` names."""
    if str(path).startswith("testbed:"):
        if str(path) != "testbed:pairs":
            raise unknown("bundled data", str(path), ["testbed:pairs"])
        from t2i_align.testbed import pairs_path

        return Path(pairs_path())
    if str(path).startswith(hub.PREFIX):
        return hub.folder(str(path))
    file = Path(os.path.expanduser(path))
    if not os.path.exists(file):  # `Path.exists` raises where a name is too long to be one
        raise UserError(f"{path}: no such file or folder")
    return file


def detect(path: Path, format: str = "auto") -> str:
    """The name of the reader for `path`; `format` unless that is `auto`.

    One from outside is named by its place, `formats.py:votes`.
    """
    if format != "auto":
        reader_of(format)
        return plugins.located(format)
    for _ in range(2):
        for name, reader in READERS.items():
            if reader.detects(path):
                return (reader.function and plugins.place_of(reader.function)) or name
        plugins.load_installed()
    raise UserError(
        f"{path}: no reader recognises this {'folder' if path.is_dir() else 'file'}. Name its format with data.format; "
        f"there are: {', '.join(sorted(READERS))}.{_hint(path)}"
    )


def reader_of(format: str) -> Reader:
    """The reader of a format that is named, or lies at `formats.py:votes` or `package.module:votes`."""
    found = plugins.find("data format", format, READERS)
    if isinstance(found, Reader):
        return found
    return next((reader for reader in READERS.values() if reader.function is found), None) or _outside(found)


def _outside(function: Read, outline: Read | None = None, **options: Any) -> Reader:
    """The reader of a function from outside."""
    return Reader(
        read=lambda path, images: (function if images else outline or function)(path), function=function, **options
    )


def _hint(path: Path) -> str:
    """How a source that no reader recognises could be read."""
    if path.is_file() and _is_compressed(path):
        return " It is compressed: unpack it first."
    if names := [name for file in tables.files(path)[:1] for name in tables.header(file)]:
        return f" Its columns: {', '.join(names)}; a dataset spec can say what they hold (docs/data.md)."
    below = [*path.rglob("*")] if path.is_dir() else []
    if any(file.name == "dataset_info.json" for file in below) and any(file.suffix == ".arrow" for file in below):
        return " It was written by save_to_disk of `datasets`: load it there and write it with to_parquet."
    listed = sorted(file.name for file in below if file.parent == path and tables.kind(file) in tables.SUFFIXES)
    if listed:
        return f" It holds {', '.join(listed[:3])}: name that file."
    return " Its files are compressed: unpack them first." if any(map(_is_compressed, below)) else ""


def _is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def _checked(items: Items, source: Path, annotations: Annotations, seen: Callable[[Group], None]) -> Items:
    ids: set[str] = set()
    empty = True
    for item in items:
        empty = False
        if isinstance(item, Group) and not _unusable(item, ids):
            seen(item)
        if annotations.entries and isinstance(item, Group) and item.id not in ids:
            item = annotations.annotated(item)
        if isinstance(item, Skipped):
            yield item
        elif reason := _unusable(item, ids):
            yield item.skipped(reason)
        else:
            ids.add(item.id)
            yield item
    if empty:
        raise UserError(f"{source}: no rows in it")


def _unusable(group: Group, ids: set[str]) -> str | None:
    if group.id in ids:
        return f"duplicate id {group.id!r}; the first group with it was kept"
    if any(has_lone_surrogate(text) for text in (group.id, group.user or "", *group.texts)):
        return "its id, prompt or captions are not valid Unicode text"
    if not group.prompt.strip():
        return "the prompt is empty"
    return None if all(text.strip() for text in group.texts) else "a caption is empty"


def has_lone_surrogate(text: str) -> bool:
    """Whether a string is not valid Unicode, which neither tokenizers nor files take."""
    return LONE_SURROGATE.search(text) is not None
