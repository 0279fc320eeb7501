"""From a parquet file to the loss, a pair passes through few files, so that a reader can follow it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from t2i_align import data
from t2i_align.data import readers
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import pick_rows, write_parquet
from tests.data.test_loader import opened

FOLDER = str(Path(data.__file__).parent)


def files_of(run: Callable[[], Any]) -> set[str]:
    """Files of `data` with a function that is entered, in any thread."""
    files: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(FOLDER):
            files.add(Path(frame.f_code.co_filename).name)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return files


def test_preparing_and_loading_a_pair_enters_few_files(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", pick_rows(1))

    def first_batch() -> None:
        dataset = opened(tmp_path, source, needs=Requirements(candidates=2, ties=False))
        item = next(dataset.loader(seed=0, start_step=0, batch_size=1))
        assert dataset.to_batch(item, torch.device("cpu")).latents.shape == (1, 2, 3, 4, 4)

    files = files_of(first_batch)
    way = ["opening", "readers", "tables", "schema", "media", "encode", "store", "loader"]
    assert files == {f"{name}.py" for name in way}, sorted(files)
    assert len(way) <= 8


def test_a_parquet_file_is_recognised_by_its_columns_alone(tmp_path: Path) -> None:
    """Neither folders nor specs nor annotations are asked about it."""
    source = write_parquet(tmp_path / "a.parquet", pick_rows(1))
    assert files_of(lambda: readers.detect(source)) == {"readers.py", "tables.py", "schema.py"}
