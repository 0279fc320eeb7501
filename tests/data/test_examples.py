"""Small preference sources made in place, and a stand-in for a pipeline's encoders; shared by the tests of data."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from t2i_align.utils.files import LOCK


class StandIn:
    """Encodes like a family does, but so that an image can be recognised in its latents and a prompt in its embedding.

    Latents are 2 x 2 means of the pixels; an embedding holds the prompt's length and its first bytes.
    """

    def __init__(self, delay: float = 0.0, fail_after: int | None = None) -> None:
        self.delay, self.fail_after = delay, fail_after
        self.images = 0
        self.prompts: list[str] = []

    family, size_conditioned, video = "stand-in", False, False
    conditioning_dtype: torch.dtype = torch.float16
    conditioning_masks: Mapping[str, str] = {}

    def check_size(self, height: int, width: int, frames: int | None = None) -> None:
        if height % 2 or width % 2:
            from pipelines import PipelineError  # heavy, and the processes that a test kills do without

            raise PipelineError(f"{height} x {width}: both sides must be multiples of 2")

    def tokenize(self, texts: Sequence[str]) -> dict[tuple[str, int], list[list[int]]]:
        return {("tokenizer", 77): [[*text.encode()] for text in texts]}

    def tokens_read(self, texts: Sequence[str]) -> list[str]:
        return [text[:77] for text in texts]

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        time.sleep(self.delay)
        self.images += len(pixels)
        if self.fail_after is not None and self.images > self.fail_after:
            raise RuntimeError("stopped in the middle")
        return avg_pool2d(pixels, 2)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.prompts += prompts
        texts = [prompt.encode()[:8].ljust(8, b"\0") for prompt in prompts]
        return {
            "embeds": torch.stack([torch.tensor([len(p), *t]).float() for p, t in zip(prompts, texts, strict=True)]),
            "mask": torch.tensor([[byte > 0 for byte in text] for text in texts]),
        }


def colour(number: int) -> tuple[int, int, int]:
    """A colour by which image `number` is known again."""
    return (number * 37 % 256, number * 11 % 256, 255 - number % 256)


def jpeg(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A one-coloured image; lossless up to a unit or two."""
    stream = io.BytesIO()
    Image.new("RGB", size, colour(number)).save(stream, "JPEG", quality=100, subsampling=0)
    return stream.getvalue()


def noise_jpeg(seed: int, side: int = 32) -> bytes:
    """An image with detail everywhere."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def pick_rows(count: int) -> dict[str, list[Any]]:
    """Columns as Pick-a-Pic v2 has them. Images of row i are numbers 2i (preferred) and 2i + 1, in turns."""
    swapped = [row % 2 == 1 for row in range(count)]
    return {
        "jpg_0": [jpeg(2 * row + swap) for row, swap in enumerate(swapped)],
        "jpg_1": [jpeg(2 * row + 1 - swap) for row, swap in enumerate(swapped)],
        "caption": [f"caption {row % 5}" for row in range(count)],
        "label_0": [0.0 if swap else 1.0 for swap in swapped],
        "label_1": [1.0 if swap else 0.0 for swap in swapped],
        "has_label": [True] * count,
        "user_id": list(range(count)),
        "ranking_id": [1000 + row for row in range(count)],
    }


def write_parquet(file: Path, rows: dict[str, list[Any]], row_group_size: int = 4) -> Path:
    pq.write_table(pa.table(rows), file, row_group_size=row_group_size)
    return file


def write_jsonl(file: Path, entries: list[Any]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def write_images(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file below a folder, by name; two equal caches have equal contents."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != LOCK
    }


def test_example_images_are_distinguishable() -> None:
    """The mispairing tests recognise an image by its colour, so 100 of them must differ by more than JPEG's error."""
    colours = np.array([colour(number) for number in range(100)])
    distance = np.abs(colours[:, None] - colours[None]).max(-1) + 99 * np.eye(100)
    assert distance.min() > 8
