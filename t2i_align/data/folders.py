"""Winner and loser folders: pictures of the same name form a pair.

    data/chosen/fox.png   data/rejected/fox.png   data/chosen/fox.txt

The caption is `<name>.txt` beside the winner, or in `captions/`, or an entry of `metadata.jsonl` (keys `file_name`
and `prompt`, `caption` or `text`) in the folder itself or beside the winners.
"""

from __future__ import annotations

import json
from pathlib import Path

from t2i_align.data.formats import PICTURE_SUFFIXES, Items, inside
from t2i_align.data.schema import Group, Skipped
from t2i_align.errors import UserError

WINNERS = ("winner", "winners", "chosen", "preferred", "good", "w")
LOSERS = ("loser", "losers", "rejected", "bad", "l")
CAPTION_SUFFIXES = (".txt", ".jsonl")
CAPTION_KEYS = ("prompt", "caption", "text")


def detects(path: Path) -> bool:
    """A folder with a winner and a loser folder in it."""
    return path.is_dir() and bool(_named(path, WINNERS)) and bool(_named(path, LOSERS))


def read_folders(path: Path) -> Items:
    """Pairs of pictures with the same stem, by name; what has no counterpart or no caption is skipped.

    Raises:
        UserError: no winner or loser folder, or several; a link that leads outside; broken captions.
    """
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with a winner and a loser folder in it, found a file")
    winner_folder, loser_folder = _one(path, WINNERS, "winner"), _one(path, LOSERS, "loser")
    captions = _metadata(path) | _metadata(winner_folder)
    yield from _not_pictures(winner_folder, path)
    yield from _not_pictures(loser_folder, path)
    winners, losers = _pictures(winner_folder), _pictures(loser_folder)
    for stem in sorted(winners.keys() | losers.keys()):
        yield _pair(path, winner_folder, stem, winners.get(stem, []), losers.get(stem, []), captions.get(stem))


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
    for folder in (winner_folder, root / "captions"):
        file = folder / f"{stem}.txt"
        if file.is_file():
            file = inside(root, str(file.relative_to(root)), str(file))
            try:
                return file.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: captions must be UTF-8 text: {error}") from error
    return None


def _metadata(folder: Path) -> dict[str, str]:
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return {}
    captions = {}
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
        captions[Path(entry["file_name"]).stem] = found[0]
    return captions


def _pictures(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in PICTURE_SUFFIXES and not file.name.startswith("."):
            found.setdefault(file.stem, []).append(file)
    return found


def _not_pictures(folder: Path, root: Path) -> Items:
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in (*PICTURE_SUFFIXES, *CAPTION_SUFFIXES) and not file.name.startswith("."):
            kind = "a folder; pictures lie directly in the winner and loser folders" if file.is_dir() else "no picture"
            yield Skipped(id=str(file.relative_to(root)), origin=str(file), reason=f"{kind} (known endings: "
                          f"{' '.join(PICTURE_SUFFIXES)})")  # fmt: skip


def _named(path: Path, names: tuple[str, ...]) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and folder.name.lower() in names)


def _one(path: Path, names: tuple[str, ...], what: str) -> Path:
    found = _named(path, names)
    if len(found) != 1:
        have = ", ".join(folder.name for folder in found) or "none"
        raise UserError(f"{path}: expected one {what} folder named {' or '.join(names)}, found {have}")
    return found[0]
