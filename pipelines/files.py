"""Files of a checkpoint's component: variants and weights."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

WEIGHT_ENDINGS = (".safetensors", ".bin")  # in order of preference


def variant_of(file: Path) -> str:
    """model.safetensors is of no variant; model.fp16.safetensors and model.fp16-00001-of-00002.safetensors of fp16."""
    return file.stem.partition(".")[2].partition("-")[0]


def weights_of(files: list[Path], variant: str | None) -> list[Path]:
    """A component's files that `from_pretrained` loads: the variant's, or where it has none the default."""
    by_variant: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        if file.suffix in WEIGHT_ENDINGS:
            by_variant[variant_of(file)].append(file)
    weights = by_variant.get(variant or "") or by_variant[""]
    return [file for file in weights if file.suffix == WEIGHT_ENDINGS[0]] or weights
