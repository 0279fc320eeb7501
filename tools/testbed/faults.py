"""Planted faults of clips and of their captions, which bases are trained with.

Faults in time (flicker, a changed shape, a jump) sit in a segment of the frames and last longer where the motion is
quick; the faults of images (`scenes.degrade`) cover the whole clip.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from t2i_align.testbed.captions import wrong_phrase
from t2i_align.testbed.clips import FRAMES, SPEEDS, Clip, ClipStatement
from t2i_align.testbed.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, choose_other, degrade, fits, render, to_uint8

TIME_FAULTS = ("flicker", "shape", "teleport")
LENGTHS = {None: 2, "slowly": 2, "quickly": 4}  # frames of a faulty segment
JUMPS = {None: (6.0, 8.0), "slowly": (6.0, 8.0), "quickly": (10.0, 13.0)}  # pixels
FAULT_RATES = {None: 0.1, "slowly": 0.15, "quickly": 0.9}  # how many clips of a faulty pool get a fault of time
OTHER_WAY = {"right": "left", "up": "down", "clockwise": "anticlockwise", "sideways": "vertically"}
OTHER_WAY |= {b: a for a, b in OTHER_WAY.items()}
CAPTION_FAULTS = ("path", "speed", "background", "size", "colour", "shape")


def spoil(clip: Clip, rng: np.random.Generator, kind: str | None = None) -> tuple[list[Scene], range]:
    """The frames with one fault in time (at random when None) in the mover, and the segment of the fault.

    flicker: it has another colour, or the image another background; shape: it has another shape; teleport: it is
    elsewhere. The first frame is never faulty, and at least five of nine are as they should be.

    Raises:
        ValueError: an unknown kind, or there is no room for the jump.
    """
    mover, scenes = clip.movers[0], clip.scenes
    length = LENGTHS[mover.speed]
    first = int(rng.integers(1, FRAMES - length + 1))
    segment = range(first, first + length)
    jump = _jump(clip, segment, rng) if kind in (None, "teleport") else None
    if kind is None:
        kind = str(rng.choice([k for k in TIME_FAULTS if k != "teleport" or jump]))
    if kind not in TIME_FAULTS:
        raise ValueError(f"unknown fault {kind!r}; the choices are {', '.join(TIME_FAULTS)}")
    if kind == "teleport" and jump is None:
        raise ValueError("no room for a jump")
    background, change = clip.background, {}
    if kind == "flicker" and rng.random() < 0.3:
        background = choose_other(rng, BACKGROUNDS, background)
    elif kind == "flicker":
        change = {"colour": choose_other(rng, COLOURS, *(m.item.colour for m in clip.movers))}
    elif kind == "shape":
        change = {"shape": choose_other(rng, SHAPES, *(m.item.shape for m in clip.movers))}
    dx, dy = jump if kind == "teleport" and jump else (0.0, 0.0)
    for f in segment:
        x, y = mover.track[f]
        item = dataclasses.replace(mover.item.at(x + dx, y + dy), **change)  # type: ignore[arg-type]
        scenes[f] = dataclasses.replace(scenes[f], background=background, objects=(item, *scenes[f].objects[1:]))
    return scenes, segment


def _jump(clip: Clip, segment: range, rng: np.random.Generator) -> tuple[float, float] | None:
    """An offset to a free place, across the way, so that both jumps are longer than any step; None if there is none."""
    mover, others = clip.movers[0], [other.item for other in clip.movers[1:]]
    steps = np.diff(np.array(mover.track), axis=0)
    longest = np.hypot(*steps.T).max()
    for _ in range(200):
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(*JUMPS[mover.speed])
        jump = length * np.array([np.cos(angle), np.sin(angle)])
        if not all(fits(mover.item.at(*(mover.track[f] + jump)), others) for f in segment):
            continue
        back = [steps[segment.stop - 1] - jump] if segment.stop < FRAMES else []
        if min(np.hypot(*step) for step in [steps[segment.start - 1] + jump, *back]) >= longest + 5.0:
            return float(jump[0]), float(jump[1])
    return None


def render_clip(scenes: list[Scene]) -> np.ndarray:
    """Draw frames: float32 [F, 64, 64, 3] in [0, 1]."""
    return np.stack([render(scene) for scene in scenes])


def to_clip(scenes: list[Scene], rng: np.random.Generator, degraded: bool = False) -> np.ndarray:
    """Frames drawn as uint8 [F, 64, 64, 3], all with the same blur, fade or mottle where `degraded`."""
    frames, seed = render_clip(scenes), rng.integers(2**32)
    return to_uint8(np.stack([degrade(f, np.random.default_rng(seed)) for f in frames]) if degraded else frames)


def corrupt(statement: ClipStatement, fault: str, rng: np.random.Generator) -> ClipStatement | None:
    """The statement with one attribute of what moves (or of the background) wrong; None where it is not stated."""
    part, background = statement.parts[0], statement.background
    match fault:
        case "background" if background:
            return dataclasses.replace(statement, background=choose_other(rng, BACKGROUNDS, background))
        case "path" if part.path != "still":
            part = dataclasses.replace(part, path=OTHER_WAY[part.path])
        case "speed" if part.speed:
            part = dataclasses.replace(part, speed=choose_other(rng, SPEEDS, part.speed))
        case "colour" | "shape" | "size" if fault != "size" or part.phrase.size:
            phrases = [other.phrase for other in statement.parts]
            part = dataclasses.replace(part, phrase=wrong_phrase(part.phrase, fault, phrases, rng))
        case _ if fault in CAPTION_FAULTS:
            return None
        case _:
            raise ValueError(f"unknown fault {fault!r}; the choices are {', '.join(CAPTION_FAULTS)}")
    return dataclasses.replace(statement, parts=(part, *statement.parts[1:]))
