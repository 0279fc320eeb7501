"""Winner and loser folders: pictures of the same name form a pair.

    data/chosen/fox.png   data/rejected/fox.png   data/chosen/fox.txt

The caption is `<name>.txt` beside the winner, or in `captions/`, or an entry of `metadata.jsonl` (keys `file_name`
and `prompt`, `caption` or `text`) beside the winners or in the folder itself. There, the entry of the winner
(`chosen/fox.png`) comes before one without a folder (`fox.png`), and that before the loser's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from t2i_align.data.formats import PICTURE_SUFFIXES, Items, inside
from t2i_align.data.schema import Group, Skipped
from t2i_align.errors import UserError

WINNERS = ("winner", "winners", "chosen", "preferred", "good", "w")
LOSERS = ("loser", "losers", "rejected", "bad", "l")
CAPTIONS, CAPTION_SUFFIXES = "captions", (".txt", ".jsonl")
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("prompt", "caption", "text")


def detects(path: Path) -> bool:
    """A folder with a winner and a loser folder in it."""
    return path.is_dir() and bool(_named(path, WINNERS)) and bool(_named(path, LOSERS))


def files(path: Path) -> Iterator[Path]:
    """The pictures and captions; whatever else lies there, such as a run's output, does not make another source."""
    winner_folder, loser_folder = _sides(path)
    listings = [path / METADATA, winner_folder / METADATA]
    pictures = [*_files(winner_folder, PICTURE_SUFFIXES), *_files(loser_folder, PICTURE_SUFFIXES)]
    texts = [file for folder in (winner_folder, path / CAPTIONS) for file in _files(folder, CAPTION_SUFFIXES[:1])]
    yield from (file for file in (*pictures, *texts, *listings) if file.is_file())


def read_folders(path: Path) -> Items:
    """Pairs of pictures with the same stem, by name; what has no counterpart or no caption is skipped.

    Raises:
        UserError: no winner or loser folder, or several; a link that leads outside; broken captions.
    """
    winner_folder, loser_folder = _sides(path)
    captions = _listed(path, winner_folder, loser_folder)
    winners, losers = _pictures(winner_folder), _pictures(loser_folder)
    for stem in sorted(winners.keys() | losers.keys()):
        yield _pair(path, winner_folder, stem, winners.get(stem, []), losers.get(stem, []), captions.get(stem))
    # Last, because they are no part of `files`: one more of them must not shift the pairs of an interrupted prepare.
    yield from _not_pictures(winner_folder, path)
    yield from _not_pictures(loser_folder, path)


def _pair(
    root: Path, winner_folder: Path, stem: str, winners: list[Path], losers: list[Path], listed: str | None
) -> Group | Skipped:
    origin = f"{root}, {stem}"
    for side, found in (("winner", winners), ("loser", losers)):
        if len(found) != 1:
            names = ", ".join(file.name for file in found)
            reason = f"several {side} pictures: {names}" if found else f"no {side} picture of this name"
            return Skipped(id=stem, origin=origin, reason=reason)
    candidates = tuple(inside(root, str(file.relative_to(root)), origin) for file in (*winners, *losers))
    caption = _caption(root, winner_folder, stem) or listed
    if caption is None:
        reason = f"no caption: neither {stem}.txt beside the winner or in captions/, nor in metadata.jsonl"
        return Skipped(id=stem, origin=origin, reason=reason)
    return Group(id=stem, prompt=caption, candidates=candidates, scores=(1.0, 0.0), origin=origin)


def _caption(root: Path, winner_folder: Path, stem: str) -> str | None:
    for folder in (winner_folder, root / CAPTIONS):
        file = folder / f"{stem}.txt"
        if file.is_file():
            file = inside(root, str(file.relative_to(root)), str(file))
            try:
                return file.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: captions must be UTF-8 text: {error}") from error
    return None


def _listed(root: Path, winner_folder: Path, loser_folder: Path) -> dict[str, str]:
    """Captions in metadata.jsonl by the pair's name."""
    captions: dict[str, str] = {}
    entries = _metadata(root)
    for folder in (loser_folder.name, "", winner_folder.name):  # the later wins
        captions |= {name.stem: text for name, text in entries if name.parent.name.lower() == folder.lower()}
    return captions | {name.stem: text for name, text in _metadata(winner_folder)}


def _metadata(folder: Path) -> list[tuple[Path, str]]:
    """The entries of a folder's metadata.jsonl: file name and caption."""
    file = folder / METADATA
    if not file.is_file():
        return []
    captions = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not valid JSON: {error}") from error
        found = [entry[key] for key in CAPTION_KEYS if isinstance(entry, dict) and isinstance(entry.get(key), str)]
        if not found or not isinstance(entry.get("file_name"), str):
            raise UserError(
                f"{file}, line {number}: expected an object with 'file_name' and one of {', '.join(CAPTION_KEYS)}"
            )
        captions.append((Path(entry["file_name"]), found[0]))
    return captions


def _pictures(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in _files(folder, PICTURE_SUFFIXES):
        found.setdefault(file.stem, []).append(file)
    return found


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in entries if file.suffix.lower() in endings and not file.name.startswith(".")]


def _not_pictures(folder: Path, root: Path) -> Items:
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in (*PICTURE_SUFFIXES, *CAPTION_SUFFIXES) and not file.name.startswith("."):
            kind = "a folder; pictures lie directly in the winner and loser folders" if file.is_dir() else "no picture"
            yield Skipped(id=str(file.relative_to(root)), origin=str(file), reason=f"{kind} (known endings: "
                          f"{' '.join(PICTURE_SUFFIXES)})")  # fmt: skip


def _sides(path: Path) -> tuple[Path, Path]:
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with a winner and a loser folder in it, found a file")
    return _one(path, WINNERS, "winner"), _one(path, LOSERS, "loser")


def _named(path: Path, names: tuple[str, ...]) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name.lower() in names)


def _one(path: Path, names: tuple[str, ...], what: str) -> Path:
    found = _named(path, names)
    if len(found) != 1:
        have = ", ".join(folder.name for folder in found) or "none"
        raise UserError(f"{path}: expected one {what} folder named {' or '.join(names)}, found {have}")
    return found[0]
