"""What a source is known by: a hash of its groups and their images."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from t2i_align.data.media import frame_files
from t2i_align.data.schema import Group

CONTENT_HASHED_UP_TO = 256 << 20  # bytes


class Contents:
    """A hash of groups and their images; beyond CONTENT_HASHED_UP_TO, sizes and times of files stand for their content.

    embedded: whether images lie in the source's own files, which then count instead.
    """

    def __init__(self) -> None:
        self.digest, self.hashed, self.embedded = hashlib.sha256(), 0, False

    def add(self, group: Group) -> None:
        paths = [media for media in group.candidates if isinstance(media, Path)]
        self.embedded |= len(paths) < len(group.candidates)
        names = [os.fsencode(media.name).hex() for media in paths]
        row = [group.id, group.prompt, group.scores, dict(group.columns), names]
        self.digest.update(json.dumps(row, sort_keys=True).encode())
        for media in paths:
            for file in frame_files(media) if media.is_dir() else [media]:
                self.add_file(file)

    def add_file(self, file: Path) -> None:
        stat = file.stat()
        self.hashed += stat.st_size
        large = f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode(errors="surrogateescape")
        self.digest.update(large if self.hashed > CONTENT_HASHED_UP_TO else hashlib.sha256(file.read_bytes()).digest())
