"""Files that are there to their end, and cut ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i_align.data.media import save_clip
from t2i_align.utils.whole import is_whole
from tests.runs import image, moving_clip


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_file_that_lacks_its_last_byte_is_not_whole(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    assert not is_whole(file)
    if name == "a.png":
        image(0).save(file)
    else:
        save_clip(moving_clip(0, 5), file, 16)
    data = file.read_bytes()
    assert is_whole(file)
    for keep in (0, 7, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:keep])
        assert not is_whole(file)


def test_long_boxes_have_their_length_behind_their_name(tmp_path: Path) -> None:
    """As in a clip of more than 4 GB; `moov` must be there, without which no player finds a frame."""
    file, long = tmp_path / "a.mp4", b"\0\0\0\1mdat" + (20).to_bytes(8, "big") + b"1234"
    file.write_bytes(long + b"\0\0\0\x08moov")
    assert is_whole(file)
    file.write_bytes(long)
    assert not is_whole(file)
    file.write_bytes(b"\0\0\0\0moov")
    assert not is_whole(file)
