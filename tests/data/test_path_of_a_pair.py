"""From a parquet file to the loss, a pair passes through few files, so that a reader can follow it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from t2i_align import data
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import pick_rows, write_parquet
from tests.data.test_loader import opened

FOLDER = str(Path(data.__file__).parent)


def test_preparing_and_loading_a_pair_enters_few_files(tmp_path: Path) -> None:
    """All files of `data` with a function that is called, in any thread, from opening a source to the first batch."""
    source = write_parquet(tmp_path / "a.parquet", pick_rows(1))
    files: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(FOLDER):
            files.add(Path(frame.f_code.co_filename).name)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        dataset = opened(tmp_path, source, needs=Requirements(candidates=2, ties=False))
        item = next(dataset.loader(seed=0, start_step=0, batch_size=1))
        batch = dataset.to_batch(item, torch.device("cpu"))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert batch.latents.shape == (1, 2, 3, 4, 4)
    assert len(files) <= 8, sorted(files)
