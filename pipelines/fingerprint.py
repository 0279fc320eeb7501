"""A hash of a checkpoint's encoders, by which a latent and embedding cache knows its model."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from pipelines.load import family_of, model_index

WEIGHT_ENDINGS = (".safetensors", ".bin")  # in order of preference
CONFIG_ENDINGS = (".json", ".txt", ".model")  # of configurations and tokenizers


def encoder_fingerprint(
    path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    single_file_config: str | None = None,
) -> str:
    """A hash of all that turns images and prompts into a cache: VAE, text encoders, tokenizers, as `load` has them.

    Two checkpoints that differ only in their denoiser share it, so a cache made with one serves the other.
    """
    if (file := Path(path)).is_file():
        files = {file.name: file}
        if single_file_config is not None:
            files |= _encoder_files(single_file_config, weights=False)
    else:
        files = _encoder_files(path, revision, variant)
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _encoder_files(
    path: str | Path, revision: str | None = None, variant: str | None = None, *, weights: bool = True
) -> dict[str, Path]:
    """The files that diffusers reads for a pipeline's encoders, by name; of a Hub id, only these are fetched."""
    family, root = family_of(path, revision), Path(path)
    names = family.encoder_names if family else ()
    if not root.is_dir() and weights:
        others = [name for name in model_index(path, revision) if name not in names and not name.startswith("_")]
        root = Path(DiffusionPipeline.download(str(path), revision=revision, variant=variant, **dict.fromkeys(others)))
    elif not root.is_dir():
        wanted = [f"{name}/*{ending}" for name in names for ending in CONFIG_ENDINGS]
        root = Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
    files: list[Path] = []
    for name in names:
        present = [file for file in (root / name).glob("*") if file.is_file()]
        files += [file for file in present if file.suffix in CONFIG_ENDINGS and ".index." not in file.name]
        files += _weights(present, variant) if weights else []
    return {f"{file.parent.name}/{file.name}": file for file in files}


def _weights(files: list[Path], variant: str | None) -> list[Path]:
    """A component's files that `from_pretrained` loads: the variant's, or where it has none the default.

    Named model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors.
    """
    by_variant: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        if file.suffix in WEIGHT_ENDINGS:
            by_variant[file.stem.partition(".")[2].partition("-")[0]].append(file)
    weights = by_variant.get(variant or "") or by_variant[""]
    return [file for file in weights if file.suffix == WEIGHT_ENDINGS[0]] or weights
