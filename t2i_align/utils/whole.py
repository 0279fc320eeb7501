"""Whether a file that was saved is there to its end: where the power fails, one that was not synced may be cut."""

from __future__ import annotations

import os
from pathlib import Path

PNG_END = b"IEND\xaeB`\x82"


def is_whole(file: Path) -> bool:
    """Whether a saved image or clip is there; a PNG and an MP4 to their end."""
    if not file.is_file() or file.suffix not in (".png", ".mp4"):
        return file.exists()
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if file.suffix == ".png":
            stream.seek(max(0, size - len(PNG_END)))
            return stream.read() == PNG_END
        names = []
        while head := stream.read(8):  # each box begins with its length, 1 where that is the 8 bytes after its name
            length, read = int.from_bytes(head[:4], "big"), 8
            if length == 1:
                length, read = int.from_bytes(stream.read(8), "big"), 16
            if length < read or stream.tell() - read + length > size:
                return False
            names.append(head[4:])
            stream.seek(length - read, os.SEEK_CUR)
    return b"moov" in names
