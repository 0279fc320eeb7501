"""A small world with known ground truth: drawn scenes and clips, captions, oracles, tiny bases."""

from __future__ import annotations

from pathlib import Path

from t2i_align.testbed.world import ASSETS, prompts

BASES = ("sd", "sd-eps", "sdxl", "sd3", "wan")

__all__ = ["BASES", "base_path", "pairs_path", "prompts"]


def base_path(name: str = "sd") -> Path:
    """Folder of a shipped base in diffusers format: "sd" (v-prediction), "sd-eps" (epsilon), "sdxl", "sd3" (flow) or
    "wan" (clips).

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the installation lacks the weights.
    """
    if name not in BASES:
        raise ValueError(f"unknown base {name!r}; the bases are {', '.join(BASES)}")
    return _present(ASSETS / f"tiny-{name}", "pretrain-video" if name == "wan" else "pretrain")


def pairs_path() -> Path:
    """The shipped preference pairs, a parquet file with Pick-a-Pic v2's columns.

    Raises:
        FileNotFoundError: the installation lacks the file.
    """
    return _present(ASSETS / "pairs.parquet", "pairs")


def _present(path: Path, command: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; in a clone, `python -m tools.testbed {command}` makes it")
    return path
