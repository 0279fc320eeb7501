"""From any source to groups. One function a format, registered by name; `read` finds the right one.

Your own format is a function from a path to groups:

    @register("votes")
    def read_votes(path: Path) -> Iterator[Group | Skipped]:
        ...

What holds for all formats is done here, once: groups come best first, ids are unique, prompts are usable text.
"""

from __future__ import annotations

import hashlib
import logging
import runpy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from t2i_align.data import folders, hub, jsonl, layouts, pickapic, spec, tables
from t2i_align.data.annotations import NONE, Annotations
from t2i_align.data.formats import EVERYTHING, Selection, Survey, exists
from t2i_align.data.media import MEDIA_SUFFIXES, frame_files
from t2i_align.data.schema import Group, Items, Skipped
from t2i_align.errors import UserError, unknown

logger = logging.getLogger(__name__)
Read = Callable[[Path], Items]
CONTENT_HASHED_UP_TO = 256 << 20  # bytes; a larger source is identified by its files' names, sizes and times


def _never(path: Path) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A format.

    read: its groups and skipped rows, in a stable order. detects: whether a path looks like this format.
    outline: the same items with images left out, where reading them is costly. files: all files that make up the
    source and the folders with a clip's frames, where these are not simply those below its path.
    """

    read: Read
    detects: Callable[[Path], bool] = _never
    outline: Read | None = None
    files: Callable[[Path], Iterable[Path]] | None = None


READERS: dict[str, Reader] = {}


def register(
    name: str,
    *,
    detects: Callable[[Path], bool] = _never,
    outline: Read | None = None,
    files: Callable[[Path], Iterable[Path]] | None = None,
) -> Callable[[Read], Read]:
    """Make a reading function known under `name`; see `Reader` for the options."""

    def add(function: Read) -> Read:
        if name in READERS or name == "auto":
            raise ValueError(f"there is a reader named {name!r} already")
        READERS[name] = Reader(read=function, detects=detects, outline=outline, files=files)
        return function

    return add


register("described", detects=spec.detects, files=spec.files, outline=spec.outline)(spec.read)
register("folders", detects=folders.detects, files=folders.files)(folders.read_folders)
register("webdataset", detects=layouts.is_webdataset, outline=partial(layouts.read_webdataset, images=False),
         files=tables.files)(layouts.read_webdataset)  # fmt: skip
for _name in layouts.LAYOUTS:
    register(
        _name,
        detects=partial(layouts.detects, name=_name),
        outline=partial(layouts.read, name=_name, images=False),
        files=partial(layouts.files, name=_name),
    )(partial(layouts.read, name=_name))
register("jsonl", detects=jsonl.detects, files=jsonl.files)(jsonl.read_jsonl)
register("pickapic", detects=pickapic.detects, outline=pickapic.outline, files=pickapic.files)(pickapic.read_pickapic)


def read(
    path: str | Path,
    format: str = "auto",
    annotations: Annotations = NONE,
    *,
    best_first: bool = True,
    images: bool = True,
) -> Items:
    """The groups of a source, best first, and its rows that cannot be used.

    Args:
        path: file or folder, `testbed:pairs` for the bundled preferences, or `hub:owner/name`.
        format: a name in READERS, or `auto`.
        annotations: what sidecar files add; see `Annotations.load`.
        best_first: false leaves candidates in the source's order, which is what annotations are written in.
        images: false leaves them out where reading them is costly.

    Raises:
        UserError: nothing there, an unknown or undetectable format, a source that is broken as a whole, annotations
            that do not fit it.
    """
    file = resolve(path)
    reader = READERS[detect(file, format)]
    items = _checked((reader.read if images else reader.outline or reader.read)(file), file, annotations)
    return (item.best_first() if best_first and isinstance(item, Group) else item for item in items)


def survey(
    path: str | Path, format: str = "auto", annotations: Annotations = NONE, selection: Selection = EVERYTHING
) -> Survey:
    """What a source holds, without opening its images. Raises UserError as `read` does.

    A limit of the selection ends the reading. Annotations that belong to nothing in the source are reported as a
    warning, unless a limit left some of it unread.
    """
    file = resolve(path)
    reader = READERS[detect(file, format)]
    unmatched = dict.fromkeys(annotations.entries)
    items = _without(unmatched, _checked((reader.outline or reader.read)(file), file, annotations))
    found = Survey.of(items, selection)
    if unmatched and selection.limit is None:
        logger.warning("%s: %d of %d annotations belong to no group of this source, such as that of id %r",
                       path, len(unmatched), len(annotations.entries), next(iter(unmatched)))  # fmt: skip
    return found


def resolve(path: str | Path) -> Path:
    """The file or folder that `path` names."""
    if str(path).startswith("testbed:"):
        if str(path) != "testbed:pairs":
            raise unknown("bundled data", str(path), ["testbed:pairs"])
        from t2i_align.testbed import pairs_path

        return Path(pairs_path())
    if str(path).startswith(hub.PREFIX):
        return hub.folder(str(path))
    file = Path(path).expanduser()
    if not exists(file):
        raise UserError(f"{path}: no such file or folder")
    return file


def detect(path: Path, format: str = "auto") -> str:
    """The name of the reader for `path`; `format` unless that is `auto`.

    `formats.py:votes` runs a Python file, in which a reader of that name is registered.
    """
    file, separator, name = format.rpartition(".py:")
    if separator:
        _run_once(f"{file}.py")
        format = name
    if format != "auto":
        if format not in READERS:
            raise unknown("data format", format, [*READERS, "auto"])
        return format
    for name, reader in READERS.items():
        if reader.detects(path):
            return name
    found = tables.columns(path)
    columns = f" Its columns: {', '.join(found)}; a source file can say what they hold (docs/data.md)." if found else ""
    raise UserError(
        f"{path}: no reader recognises this {'folder' if path.is_dir() else 'file'}. Name its format with data.format; "
        f"there are: {', '.join(sorted(READERS))}.{columns}"
    )


@lru_cache
def _run_once(file: str) -> None:
    if not Path(file).is_file():
        raise UserError(f"data.format: {file}: no such file with a format of your own")
    runpy.run_path(file)


def identity(path: Path, format: str) -> str:
    """A hash of a source: of its files' contents, or where these are large, of their names, sizes and times."""
    root = path if path.is_dir() else path.parent
    entries = [
        (str(file.relative_to(root)) if file.is_relative_to(root) else str(file), file)
        for file in dict.fromkeys(files_of(path, format))
    ]
    stats = [file.stat() for _, file in entries if exists(file)]
    small = sum(stat.st_size for stat in stats) <= CONTENT_HASHED_UP_TO
    digest = hashlib.sha256()
    for name, file in sorted(entries):
        digest.update(f"{name}\x1f".encode(errors="surrogateescape"))
        if not exists(file):
            digest.update(b"missing")
        elif small:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        else:
            digest.update(f"{file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def embedded_bytes(path: Path, format: str) -> int:
    """An upper bound for media that a source holds inside its own files: the size of those that are no media."""
    files = files_of(path, format)
    return sum(file.stat().st_size for file in files if exists(file) and file.suffix.lower() not in MEDIA_SUFFIXES)


def files_of(path: Path, format: str) -> Iterator[Path]:
    """All files that make up a source, each once; of a candidate that is a folder of frames, these."""
    for file in dict.fromkeys((READERS[detect(path, format)].files or _files_below)(path)):
        yield from frame_files(file) if exists(file) and file.is_dir() else [file]


def _files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _checked(items: Items, source: Path, annotations: Annotations) -> Items:
    seen: set[str] = set()
    empty = True
    for item in items:
        empty = False
        if isinstance(item, Group) and item.id not in seen:
            item = annotations.annotated(item)
        if isinstance(item, Skipped):
            yield item
        elif reason := _unusable(item, seen):
            yield Skipped(id=item.id, origin=item.origin, reason=reason)
        else:
            seen.add(item.id)
            yield item
    if empty:
        raise UserError(f"{source}: no rows in it")


def _without(ids: dict[str, None], items: Items) -> Items:
    """The items, whose ids are taken out of `ids` on the way."""
    for item in items:
        ids.pop(item.id, None)
        yield item


def _unusable(group: Group, seen: set[str]) -> str | None:
    if group.id in seen:
        return f"duplicate id {group.id!r}; the first group with it was kept"
    if any(has_lone_surrogate(text) for text in (group.id, group.user or "", *group.texts)):
        return "its id, prompt or captions are not valid Unicode text"
    if not group.prompt.strip():
        return "the prompt is empty"
    return None if all(text.strip() for text in group.texts) else "a caption is empty"


def has_lone_surrogate(text: str) -> bool:
    """Whether a string is no valid Unicode, which neither tokenizers nor files take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
