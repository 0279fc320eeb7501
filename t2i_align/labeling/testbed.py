"""The testbed's captioner: describes drawn scenes from their pixels alone."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from t2i_align.testbed.captions import Phrase, Statement, write
from t2i_align.testbed.scenes import SIDE
from t2i_align.testbed.vision import Seen, View, look

MOST = 3  # objects that a caption of the testbed can hold


class DrawnCaptioner:
    """Describes drawn scenes through the oracle's vision, in the testbed's language; "" for an image without objects.

    The three largest objects are described. Two objects on a diagonal get the nearer of the two relations. The phrasing
    is drawn by the image's pixels.
    """

    name = "testbed:captioner"

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        sized = (image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images)
        arrays = [np.asarray(image, np.uint8) for image in sized]
        views = look(np.stack(arrays).astype(np.float32) / 255)
        return [_describe(view, zlib.crc32(array.tobytes())) for view, array in zip(views, arrays, strict=True)]


def _describe(view: View, seed: int) -> str:
    known = sorted((seen for seen in view.objects if seen.shape), key=lambda seen: -seen.radius)[:MOST]
    if not known:
        return ""
    relation = _relation(known[0], known[1]) if len(known) == 2 else None
    phrases = tuple(Phrase(str(seen.shape), seen.colour, seen.size) for seen in known)
    if len(known) > 1 and len({(phrase.shape, phrase.colour) for phrase in phrases}) == 1:
        size = phrases[0].size if len(set(phrases)) == 1 else None
        phrases, relation = (Phrase(phrases[0].shape, phrases[0].colour, size, len(known)),), None
    return write(Statement(phrases, relation, view.background), np.random.default_rng(seed))


def _relation(one: Seen, other: Seen) -> str:
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"
