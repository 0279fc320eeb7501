"""Find the shapes in an image: the eyes of the oracle, independent of any model.

Mixing a colour with white, gray or black changes its chroma (largest minus smallest channel) linearly
and leaves its hue alone. So chroma divided by its peak within an object is the object's coverage of a
pixel, whatever the background, and stays so when an image is blurred or faded.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
from scipy import ndimage

from t2i_align.testbed.scenes import COLOURS, SHAPES, SIDE, signed_distance

MIN_AREA = 30.0  # pixels of coverage: under a third of the smallest shape that scenes hold
MIN_OVERLAP = 0.93  # cosine between an object's coverage and its best template; below it, no known shape
# The geometric mean of the largest small and the smallest large radius, in pixels.
SIZE_THRESHOLD = 8.16
_CROP = 36  # pixels, holds the largest shape
_NAMES = tuple(COLOURS)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One object: names as in scenes (shape None: none of them), centre and radius in pixels.

    `chroma` is the peak chroma over the nominal one of its colour; `edge` the edge's width measure, the
    integral of coverage (1 - coverage) per pixel of outline: 1/6 for a perfect edge, 0.56 sigma when blurred.
    """

    colour: str
    shape: str | None
    size: str
    x: float
    y: float
    radius: float
    chroma: float
    edge: float


@dataclasses.dataclass(frozen=True)
class View:
    """What an image shows: its objects, its background's name (None: none of them) and roughness."""

    objects: tuple[Seen, ...]
    background: str | None
    roughness: float


def _hue(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """Hue as an angle in radians, independent of brightness and saturation."""
    return np.arctan2(np.sqrt(3.0) * (green - blue), 2.0 * red - green - blue)


_HUES = _hue(*np.asarray(list(COLOURS.values())).T)
_CHROMA = np.ptp(np.asarray(list(COLOURS.values())), axis=1)


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm coverages [T, 36 * 36] of every shape at several radii, subpixel offsets and blurs, and its index [T].

    In float64: in float32 the winner of two near templates would depend on the number of threads.
    """
    grid = np.arange(_CROP) + 0.5 - _CROP / 2
    bank, shapes = [], []
    for index, shape in enumerate(SHAPES):
        for radius in np.arange(4.5, 13.1, 0.5):
            for dx, dy in itertools.product((-0.33, 0.0, 0.33), repeat=2):
                sharp = np.clip(0.5 - signed_distance(shape, grid[None] - dx, grid[:, None] - dy, radius), 0, 1)
                for sigma in (0.0, 1.0, 1.8):
                    soft = ndimage.gaussian_filter(sharp, sigma) if sigma else sharp
                    bank.append((soft / np.linalg.norm(soft)).ravel())
                    shapes.append(index)
    return np.asarray(bank, np.float64), np.asarray(shapes)


@functools.cache
def _geometry(shape: str) -> tuple[float, float]:
    """Area in radius^2 and outline in radius units, measured on a fine grid."""
    grid = (np.arange(1024) + 0.5) / 256 - 2
    inside = signed_distance(shape, grid[None], grid[:, None], 1.0)
    band = 0.02
    return float((inside < 0).mean() * 16), float((np.abs(inside) < band).mean() * 16 / (2 * band))


def _components(chroma: np.ndarray, hue: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Regions of one hue: (image, colour index, labelled mask [64, 64])."""
    # A threshold relative to the image's own strongest colour also finds faded objects.
    peak = np.percentile(chroma, 99, axis=(1, 2))[:, None, None]
    mask = chroma > np.maximum(0.12, 0.4 * peak)
    gap = np.abs((hue[..., None] - _HUES + np.pi) % (2 * np.pi) - np.pi)
    nearest = gap.argmin(-1)
    layers = mask[:, None] & (nearest[:, None] == np.arange(len(_HUES))[None, :, None, None])
    structure = np.zeros((3, 3, 3, 3), int)
    structure[1, 1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(layers, structure)
    regions = []
    for label, where in enumerate(ndimage.find_objects(labels), start=1):
        b, c, rows, columns = where
        region = labels[b.start, c.start][rows, columns] == label
        if region.sum() >= 0.6 * MIN_AREA:
            whole = np.zeros(chroma.shape[1:], bool)
            whole[rows, columns] = region
            regions.append((b.start, c.start, whole))
    return regions


def _crop(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """A 36 x 36 window whose middle is the pixel corner nearest to (x, y), zero outside the image."""
    padded, left, top = np.pad(image.astype(np.float32), _CROP // 2), round(x), round(y)
    return padded[top : top + _CROP, left : left + _CROP]


def look(pixels: np.ndarray) -> list[View]:
    """Describe images [B, 64, 64, 3] with values in [0, 1]."""
    chroma = np.ptp(pixels, axis=-1)
    smooth = ndimage.uniform_filter(pixels, (0, 3, 3, 0), mode="nearest")
    hue = _hue(smooth[..., 0], smooth[..., 1], smooth[..., 2])
    grid = np.arange(SIDE) + 0.5
    blobs: list[tuple[int, int, float, float, float, float, np.ndarray]] = []
    covered = np.zeros(chroma.shape, bool)
    for b, c, region in _components(chroma, hue):
        # Two pixels more than the region hold its soft edge, and no other object's (gaps are wider).
        around = ndimage.binary_dilation(region, iterations=2)
        covered[b] |= around
        peak = float(np.percentile(chroma[b][region], 80))
        coverage = np.clip(chroma[b] / peak, 0.0, 1.0) * around
        area = float(coverage.sum())
        if area >= MIN_AREA:
            x, y = (float((coverage.sum(axis) * grid).sum() / area) for axis in (0, 1))
            blobs.append((b, c, x, y, area, peak, _crop(coverage, x, y)))
    objects: list[list[Seen]] = [[] for _ in pixels]
    matches = _match([blob[-1] for blob in blobs])
    for (b, c, x, y, area, peak, coverage), best, overlap in zip(blobs, *matches, strict=True):
        shape = SHAPES[best]
        unit_area, unit_outline = _geometry(shape)
        radius = float(np.sqrt(area / unit_area))
        ramp = np.clip((coverage - 0.1) / 0.8, 0.0, 1.0)
        edge = float((ramp * (1.0 - ramp)).sum() / (unit_outline * radius))
        size = "small" if radius < SIZE_THRESHOLD else "large"
        known = shape if overlap >= MIN_OVERLAP else None
        objects[b].append(Seen(_NAMES[c], known, size, x, y, radius, peak / float(_CHROMA[c]), edge))
    # The background is measured away from every edge, where blur and the decoder's ringing end.
    clear = ~ndimage.binary_dilation(covered, ndimage.generate_binary_structure(2, 1)[None], iterations=2)
    return [View(tuple(seen), *_background(pixels[b][clear[b]])) for b, seen in enumerate(objects)]


def _match(coverages: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Shape index and overlap (cosine in [0, 1]) of each coverage's best template."""
    if not coverages:
        return np.zeros(0, int), np.zeros(0)
    flat = np.asarray(coverages, np.float64).reshape(len(coverages), -1)
    bank, shapes = _templates()
    cosine = (flat @ bank.T) / np.linalg.norm(flat, axis=1, keepdims=True)
    winner = cosine.argmax(1)
    return shapes[winner], cosine[np.arange(len(winner)), winner]


def _background(pixels: np.ndarray) -> tuple[str | None, float]:
    """Name and roughness (root mean squared deviation from the median) of background pixels [N, 3]."""
    if len(pixels) < 64:
        return None, 1.0
    middle = np.median(pixels, axis=0)
    roughness = float(np.sqrt(np.square(pixels - middle).mean()))
    if np.ptp(middle) > 0.12:
        return None, roughness
    value = float(middle.mean())
    # Fading pulls white down to 0.75 and black up to 0.25; gray stays where it is.
    return ("black" if value < 0.36 else "white" if value > 0.65 else "gray"), roughness
