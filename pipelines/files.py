"""Files of a checkpoint's component: variants and weights."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

WEIGHT_ENDINGS = (".safetensors", ".bin")  # in order of preference
CONFIG_ENDINGS = (".json", ".txt", ".model")  # of configurations and tokenizers


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


def component_files(folder: Path, variant: str | None = None, *, weights: bool = True) -> list[Path]:
    """What `from_pretrained` reads of a component: its configuration or tokenizer, and its weights."""
    present = [file for file in folder.glob("*") if file.is_file()]
    configs = [file for file in present if file.suffix in CONFIG_ENDINGS and ".index." not in file.name]
    return configs + (weights_of(present, variant) if weights else [])


def files_digest(files: Mapping[str, Path]) -> str:
    """A hash of files by name, and of what is in them."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
