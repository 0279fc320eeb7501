"""Pairs and the votes on them, in a folder.

    demo.json       marks the folder as a demo's
    pairs.jsonl     a line per pair that was drawn or uploaded
    votes.jsonl     a line per vote; preference data that `train` reads
    images/         what the pairs consist of

    {"id": "…", "prompt": "a red fox", "left": "images/1f….png", "right": "images/9a….png", "vote": "left",
     "user": "anna", "left_model": "base", "right_model": "foxes", "pair": "…", "time": "2026-01-31T12:00:00+00:00"}

A vote is on disk before the click is answered. All methods may be called from several threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from t2i_align.data.media import ImageError
from t2i_align.data.schema import Media
from t2i_align.data.segments import ROUNDING
from t2i_align.demo.media import MediaFolder, is_shown_clip
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError, printable, shown, unknown
from t2i_align.utils.files import append_line, claim, json_lines, output_lock, sync_file, whole_lines, write_text

SETTINGS, PAIRS, VOTES, IMAGES = "demo.json", "pairs.jsonl", "votes.jsonl", "images"
CHOICES = ("left", "right", "tie", "neither")
MAX_SEGMENTS = 10  # of a pair of clips
MAX_NAME = 64  # characters of a user's name


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two candidates for a prompt. media: names in `images/`, or what is copied there when the pair is first shown.

    models: where they come from, "" where that is not known. id: stable, so that votes on it are known again.
    """

    id: str
    prompt: str
    media: tuple[Media | str, Media | str]
    models: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Shown:
    """A pair as a user sees it.

    left, right: names in `images/`. models: the left one's and the right one's. segments: of clips, that can be voted
    on by themselves, of `segment_seconds` each.
    """

    id: str
    prompt: str
    left: str
    right: str
    models: tuple[str, str]
    segments: int = 0
    segment_seconds: float = 0.0

    @property
    def key(self) -> str:
        """What a page sends back with a vote: the pair and which candidate was on the left."""
        return f"{self.id} {self.left}"


class Votes:
    """The votes in `folder`, which this process alone writes; see `opened`."""

    def __init__(self, folder: Path, segment_seconds: float = 1.0) -> None:
        self.segment_seconds = segment_seconds
        self.folder, self.images = folder, MediaFolder(folder / IMAGES)
        self.rows = whole_lines(folder / VOTES)
        self.unusable: dict[str, str] = {}  # pairs whose media cannot be shown, with the reason
        self._voted: dict[str, set[str]] = {}  # the pairs on which each user has voted
        self._pairs: dict[str, Pair] = {}
        self._names: dict[str, tuple[str, str]] = {}  # of what was copied to images/
        self._lock = threading.RLock()
        for row in self.rows:
            self._voted.setdefault(str(row.get("user")), set()).add(str(row.get("pair")))
        for line in whole_lines(folder / PAIRS):
            left, right = (self.images.check(str(name)) for name in line["media"])
            models = str(line["models"][0]), str(line["models"][1])
            pair = Pair(id=str(line["id"]), prompt=str(line["prompt"]), media=(left, right), models=models)
            self._pairs[pair.id] = pair

    @classmethod
    @contextmanager
    def opened(cls, folder: str | Path, segment_seconds: float = 1.0) -> Iterator[Self]:
        """The votes in a folder, new or an earlier demo's, held until the block ends.

        Raises:
            UserError: the folder holds something else, or another demo is running in it.
        """
        path = Path(folder).expanduser()
        with output_lock(path):
            claim(path / SETTINGS, {"version": 1}, content="demo's votes")
            yield cls(path, segment_seconds)

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self._pairs)

    def offer(self, pairs: Iterable[Pair], *, store: bool = False) -> int:
        """Add pairs to vote on; returns how many are new. store: also for the next demo in this folder."""
        with self._lock:
            new = {pair.id: pair for pair in pairs if pair.id not in self._pairs}
            if store:
                append_line(self.folder / PAIRS, *map(asdict, new.values()))
            self._pairs |= new
        return len(new)

    def next(self, user: str) -> Shown | None:
        """The next pair for a user; None when all are done."""
        return next(iter(self.upcoming(user, 1)), None)

    def upcoming(self, user: str, count: int) -> list[Shown]:
        """The next so many pairs for a user, whose order and sides are their own."""
        found: list[Shown] = []
        with self._lock:
            waiting = [key for key in self._pairs if key not in self._voted.get(user, ()) and key not in self.unusable]
            for key in sorted(waiting, key=lambda key: stable_seed("order", user, key)):
                try:
                    found.append(self._shown(self._pairs[key], swapped=stable_seed("side", user, key) % 2 == 1))
                except (ImageError, OSError) as error:
                    self.unusable[key] = str(error)
                    continue
                if len(found) == count:
                    break
        return found

    def shown(self, key: str) -> Shown:
        """The pair that a page shows, by its `Shown.key`.

        Raises:
            UserError: there is no such pair.
        """
        name, _, left = key.partition(" ")
        with self._lock:
            if name in self._pairs:
                sides = [self._shown(self._pairs[name], swapped=swapped) for swapped in (False, True)]
                if found := next((one for one in sides if one.left == left), None):
                    return found
        raise UserError(f"no pair {shown(key)} to vote on")

    def vote(self, user: str, pair: Shown, choice: str, columns: Mapping[str, Any] | None = None) -> bool:
        """Record a vote; False where this user has voted on the pair already, as from two windows.

        Args:
            columns: more of the row.

        Raises:
            UserError: no such choice, pair or user name. OSError: it could not be written, and is not recorded.
        """
        if choice not in CHOICES:
            raise unknown("vote", choice, CHOICES)
        name = user_name(user)
        with self._lock:
            if pair.id not in self._pairs:
                raise UserError(f"no pair {shown(pair.id)} to vote on")
            if pair.id in self._voted.get(name, ()):
                return False
            row = {
                "id": f"{pair.id}-{stable_seed(name):016x}",
                "prompt": pair.prompt,
                "left": f"{IMAGES}/{pair.left}",
                "right": f"{IMAGES}/{pair.right}",
                "vote": choice,
                "user": name,
                "left_model": pair.models[0],
                "right_model": pair.models[1],
                "pair": pair.id,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **(columns or {}),
            }
            self._append(row)
            self.rows.append(row)
            self._voted.setdefault(name, set()).add(pair.id)
        return True

    def undo(self, user: str) -> bool:
        """Take back a user's last vote; False where there is none."""
        with self._lock:
            place = next((i for i in reversed(range(len(self.rows))) if self.rows[i].get("user") == user), None)
            if place is None:
                return False
            rows = [*self.rows[:place], *self.rows[place + 1 :]]
            write_text(self.folder / VOTES, json_lines(rows))
            self._voted[user].discard(str(self.rows[place].get("pair")))
            self.rows = rows
        return True

    def progress(self, user: str) -> tuple[int, int]:
        """How many of the pairs a user has voted on, and how many there are."""
        with self._lock:
            usable = self._pairs.keys() - self.unusable.keys()
            return len(usable & self._voted.get(user, set())), len(usable)

    def snapshot(self) -> Sequence[Mapping[str, Any]]:
        """The votes so far."""
        with self._lock:
            return list(self.rows)

    def _shown(self, pair: Pair, *, swapped: bool) -> Shown:
        """A pair with its second candidate on the left where it is swapped."""
        if pair.id not in self._names:
            left, right = (m if isinstance(m, str) else self.images.add(m) for m in pair.media)
            self._names[pair.id] = left, right
        names, models = self._names[pair.id], pair.models
        if swapped:
            names, models = names[::-1], models[::-1]
        return Shown(pair.id, pair.prompt, *names, models, *self._segments(*names))

    def _segments(self, left: str, right: str) -> tuple[int, float]:
        """How many segments a pair's clips have, and their length, which grows where they would be too many."""
        clips = [name for name in (left, right) if is_shown_clip(name)]
        seconds, length = max(map(self.images.seconds, clips), default=0.0), self.segment_seconds
        while (count := math.ceil(seconds / length - ROUNDING)) > MAX_SEGMENTS:
            length *= 2
        return (count, length) if count > 1 else (0, length)

    def _append(self, row: Mapping[str, Any]) -> None:
        file = self.folder / VOTES
        size = file.stat().st_size if file.exists() else 0
        try:
            append_line(file, row)
            sync_file(file)
        except OSError:  # a full disk: half a line would spoil the next one
            if file.exists():
                os.truncate(file, size)
            raise


def segment_columns(labels: Sequence[str | None], seconds: float) -> dict[str, Any]:
    """The columns of a vote on segments (`schema.COLUMNS`), of a choice or None each; none where all are None."""
    if not any(labels):
        return {}
    shares = [{"left": 1.0, "right": 0.0}.get(label or "", 0.5) for label in labels]
    return {"segment_scores": [shares, [1 - share for share in shares]], "segment_seconds": seconds}


def user_name(text: str) -> str:
    """A user's name as it is recorded.

    Raises:
        UserError: empty, too long, or with characters that cannot be printed.
    """
    name = " ".join(text.split())
    if not name or len(name) > MAX_NAME or printable(name) != name:
        raise UserError(f"a user name has 1 to {MAX_NAME} printable characters, found {shown(text)}")
    return name
