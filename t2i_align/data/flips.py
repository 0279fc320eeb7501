"""Each group once more with its images mirrored, all of a group alike."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Collection
from dataclasses import replace

from PIL import ImageOps

from t2i_align.data.media import ImageError, decode
from t2i_align.data.schema import Group, Items, Media

logger = logging.getLogger(__name__)
SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
FLIPPED = "#flipped"  # at the end of the ids of mirrored groups


def flipped(items: Items) -> Items:
    """The items, and after each group its mirror image, which is skipped where one cannot be decoded."""
    for item in items:
        yield item
        if isinstance(item, Group):
            try:
                yield replace(item, id=f"{item.id}{FLIPPED}", candidates=tuple(map(_mirrored, item.candidates)))
            except ImageError as error:
                yield replace(item, id=f"{item.id}{FLIPPED}").skipped(str(error))


def _mirrored(media: Media) -> bytes:
    content = io.BytesIO()
    ImageOps.mirror(decode(media)).save(content, format="PNG", compress_level=1)
    return content.getvalue()


def warn_of_sides(texts: Collection[str]) -> None:
    """Say how many prompts and captions name a side, which their mirrored images contradict."""
    if found := [text for text in texts if SIDES.search(text)]:
        logger.warning(
            "data.flip: %d of %d texts speak of left or right, as %r; their mirrored images contradict them",
            len(found), len(texts), min(found)[:80],
        )  # fmt: skip
