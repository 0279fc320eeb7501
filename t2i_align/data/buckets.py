"""Sizes for aspect-ratio buckets: images are cropped to the nearest of several sizes of one area, not all to a square.

The sizes are those of SDXL's training (arXiv 2307.01952, appendix I): both sides are multiples of a sixteenth of the
resolution, from half of it to twice, and the area is at least 0.9 of the square's and not above it. At 1024 that gives
the 40 of the paper and 1344 x 704, which it lists the other way round only. SD3 (arXiv 2403.03206) buckets by area as
well, and lists no sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

LEAST_AREA = 0.9  # of the square's
Size = tuple[int, int]  # (height, width) in pixels


@lru_cache
def bucket_sizes(resolution: int) -> tuple[Size, ...]:
    """The sizes for a resolution, by aspect ratio; at 1024, from 512 x 2048 to 2048 x 512 in steps of 64."""
    step = max(8, 16 * round(resolution / 256))  # what VAE and patches can divide, whatever the resolution
    sides = range(step * (resolution // 2 // step), 2 * resolution + 1, step)
    area = resolution**2
    of_ratio = {h / w: (h, w) for h, w in product(sides, sides) if LEAST_AREA * area <= h * w <= area}  # the largest
    return tuple(size for _, size in sorted(of_ratio.items()))


def nearest(measured: Sequence[Size], sizes: Sequence[Size]) -> int:
    """The number of the size whose aspect ratio is nearest to the (geometric) mean of those of some images."""
    ratio = sum(math.log(height / width) for height, width in measured) / len(measured)
    return min(range(len(sizes)), key=lambda n: abs(ratio - math.log(sizes[n][0] / sizes[n][1])))
