"""Winner and loser folders: images or clips of the same name form a pair. And folders of captioned images or clips.

    data/chosen/fox.png   data/rejected/fox.png   data/chosen/fox.txt
    data/fox.mp4          data/fox.txt

A clip is a video file, or a folder with its frames. The two folders lie in the source itself or, as kohya's trainers
have them, in each of several folders below it (`1_foxes/w`, `1_foxes/l`; kohya's repeat
count is ignored).

The caption is `<name>.txt` or `.caption` beside the winner, or in `captions/`, or an entry of `metadata.jsonl`, `.csv`
or `.parquet` (columns `file_name` and `prompt`, `caption` or `text`) beside the winners or in the folder itself. There,
the entry of the winner (`chosen/fox.png`) comes before one without a folder (`fox.png`), and that before the loser's.

Without winners and losers, each image or clip with its caption is a group of its own that was liked.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

from t2i_align.data import tables
from t2i_align.data.media import MEDIA_SUFFIXES, frame_files
from t2i_align.data.paths import inside, spellings
from t2i_align.data.schema import Group, Items, Row, Skipped
from t2i_align.data.shards import of_split
from t2i_align.errors import UserError

SIDES = {
    "winner": ("winner", "winners", "win", "chosen", "preferred", "good", "w", "image_w"),
    "loser": ("loser", "losers", "lose", "rejected", "bad", "l", "image_l"),
}
CAPTIONS, CAPTION_SUFFIXES = "captions", (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def detects(path: Path) -> bool:
    """A folder with a winner and a loser folder in it, or in a folder of it."""
    return all(all(_named(folder)) for folder in _sets(path))


def read(path: Path) -> Items:
    """Pairs of images with the same stem, by name; what has no counterpart or no caption is skipped.

    Raises:
        UserError: no winner or loser folder, or several; a link that leads outside; broken captions.
    """
    others: list[Path] = []
    sets = {folder.name: folder for folder in _sets(path)}
    kept = of_split([*sets])
    for folder in (sets[name] for name in sets if name in kept):
        winner_folder, loser_folder = _sides(folder)
        captions = _listed(folder, winner_folder, loser_folder)
        winners, losers = _by_stem(winner_folder, others), _by_stem(loser_folder, others)
        for stem in sorted(winners.keys() | losers.keys()):
            files = winners.get(stem, []), losers.get(stem, [])
            item = _pair(folder, winner_folder, stem, *files, captions)
            yield item if folder == path else replace(item, id=f"{folder.name}/{stem}")
    # Last, because the source's identity ignores them: one more must not shift the pairs of an interrupted prepare.
    for name in sets.keys() - {*kept}:
        reason = "it belongs to another split than `train`; to read it, give this folder itself"
        yield Skipped(id=name, origin=str(path / name), reason=reason)
    yield from (_unknown(path, file) for file in others)


def _unknown(path: Path, file: Path) -> Skipped:
    kind = "a folder without frames" if file.is_dir() else "no image or clip"
    reason = f"{kind} (known endings: {' '.join(MEDIA_SUFFIXES)})"
    return Skipped(id=str(file.relative_to(path)), origin=str(file), reason=reason)


def detects_captioned(path: Path) -> bool:
    """A folder with images or clips of which one at least has a caption."""
    if not path.is_dir():
        return False
    listed = (file.stem for file, _ in _metadata(path))
    return any(_by_stem(path, []).keys() & {*listed, *_texts(path)})


def read_captioned(path: Path) -> Items:
    """Captioned images or clips by name; one without a caption, or a file that is neither, is skipped."""
    others: list[Path] = []
    listed = {_nfc(name.stem): text for name, text in _metadata(path)}
    for stem, files in sorted(_by_stem(path, others).items()):
        origin = f"{path}, {stem}"
        try:
            if len(files) > 1:
                raise ValueError(f"several of this name: {', '.join(file.name for file in files)}")
            prompt = _captioned(path, path, stem, listed)
            candidates = (inside(path, files[0].name, origin),)
            yield Group(id=stem, prompt=prompt, candidates=candidates, scores=(1.0,), origin=origin)
        except UserError:
            raise
        except ValueError as error:
            yield Skipped(id=stem, origin=origin, reason=str(error))
    yield from (_unknown(path, file) for file in others)


def _texts(folder: Path) -> set[str]:
    """The names of the captions in a folder or in its `captions/`."""
    places = [place for place in (folder, folder / CAPTIONS) if place.is_dir()]
    return {_nfc(f.stem) for place in places for f in place.iterdir() if f.suffix in CAPTION_SUFFIXES}


def _pair(
    root: Path, winner_folder: Path, stem: str, winners: list[Path], losers: list[Path], listed: Mapping[str, str]
) -> Group | Skipped:
    origin = f"{root}, {stem}"
    try:
        for side, files in (("winner", winners), ("loser", losers)):
            if len(files) != 1:
                names = ", ".join(file.name for file in files)
                raise ValueError(f"several {side} images: {names}" if files else f"no {side} image of this name")
        candidates = tuple(inside(root, str(file.relative_to(root)), origin) for file in (*winners, *losers))
        caption = _captioned(root, winner_folder, stem, listed)
    except UserError:
        raise
    except ValueError as error:
        return Skipped(id=stem, origin=origin, reason=str(error))
    return Group(id=stem, prompt=caption, candidates=candidates, scores=(1.0, 0.0), origin=origin)


def _captioned(root: Path, beside: Path, stem: str, listed: Mapping[str, str]) -> str:
    """The caption of that name. Raises ValueError where there is none."""
    caption = _caption(root, beside, stem) or listed.get(stem)
    if caption is None:
        raise ValueError(f"no caption: neither {stem}.txt beside it or in captions/, nor in {METADATA[0]}")
    return caption


def _caption(root: Path, winner_folder: Path, stem: str) -> str | None:
    """The text beside the winner or in captions/. Raises ValueError where it is not UTF-8."""
    for place, suffix, name in product((winner_folder, root / CAPTIONS), CAPTION_SUFFIXES, spellings(stem)):
        file = place / f"{name}{suffix}"
        if os.path.isfile(file):
            try:
                text = inside(root, str(file.relative_to(root)), str(file)).read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file.name} must be UTF-8 text: {error}") from error
            return text.strip()
    return None


def _listed(root: Path, winner_folder: Path, loser_folder: Path) -> dict[str, str]:
    """Captions in metadata.jsonl by the pair's name."""
    captions: dict[str, str] = {}
    entries = _metadata(root)
    for folder in (loser_folder.name, "", winner_folder.name):  # the later wins
        captions |= {_nfc(name.stem): text for name, text in entries if name.parent.name.lower() == folder.lower()}
    return captions | {_nfc(name.stem): text for name, text in _metadata(winner_folder)}


def _metadata(folder: Path) -> list[tuple[Path, str]]:
    """The entries of a folder's metadata: file name and caption."""
    captions = []
    for file in filter(Path.is_file, (folder / name for name in METADATA)):
        for row in tables.rows(file, ["file_name", *tables.PROMPT_KEYS]):
            texts = [row.values[key] for key in tables.PROMPT_KEYS if isinstance(row, Row) and row.values.get(key)]
            name = row.values.get("file_name") if isinstance(row, Row) else None
            if not (texts and isinstance(texts[0], str) and isinstance(name, str)):
                raise UserError(f"{row.origin}: expected 'file_name' and one of {', '.join(tables.PROMPT_KEYS)}")
            captions.append((Path(name.replace("\\", "/")), texts[0]))
    return captions


def _by_stem(folder: Path, others: list[Path]) -> dict[str, list[Path]]:
    """Images, clips and folders of frames by their stems; what is neither that nor a caption goes to `others`."""
    media: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name == CAPTIONS:
            continue
        if frame_files(file) if file.is_dir() else file.is_file() and file.suffix.lower() in MEDIA_SUFFIXES:
            media.setdefault(_nfc(file.name if file.is_dir() else file.stem), []).append(file)
        elif file.name not in METADATA and file.suffix.lower() not in CAPTION_SUFFIXES:
            others.append(file)
    return media


def _nfc(name: str) -> str:
    """A name with accents in one of the ways that Unicode has for them."""
    return unicodedata.normalize("NFC", name)


def _sets(path: Path) -> list[Path]:
    """The folders that have a winner and a loser folder: the source itself, or those in it."""
    if path.is_dir() and not any(_named(path)):
        return [folder for folder in sorted(path.iterdir()) if folder.is_dir() and all(_named(folder))] or [path]
    return [path]


def _named(path: Path) -> tuple[list[Path], list[Path]]:
    """The winner and the loser folders in a folder, by their names."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    winners, losers = ([folder for folder in folders if folder.name.lower() in names] for names in SIDES.values())
    return winners, losers


def _sides(path: Path) -> tuple[Path, Path]:
    """The winner and the loser folder in a folder. Raises UserError unless there is one of each."""
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with a winner and a loser folder in it, found a file")
    for (side, names), folders in zip(SIDES.items(), _named(path), strict=True):
        if len(folders) != 1:
            have = ", ".join(folder.name for folder in folders) or "none"
            raise UserError(f"{path}: expected one {side} folder named {' or '.join(names)}, found {have}")
    (winner,), (loser,) = _named(path)
    return winner, loser
