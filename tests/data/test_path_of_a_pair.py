"""From a parquet file to the loss, a pair passes through few files, so that a reader can follow it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from t2i_align import data
from t2i_align.data import readers
from t2i_align.data.schema import Group
from t2i_align.objectives.base import Requirements
from tests.data.test_examples import pick_rows, write_parquet
from tests.data.test_loader import opened

FOLDER = str(Path(data.__file__).parent)
PROMPT = pick_rows(1)["caption"][0]


def carries(value: Any) -> bool:
    """Whether a local variable is the pair: its group, a row or an item with its prompt, or its encoded images."""
    if isinstance(value, dict):
        return "latents" in value or any(isinstance(one, str) and one == PROMPT for one in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(one, Group | dict) and carries(one) for one in value)
    return isinstance(value, Group) or (isinstance(value, str) and value == PROMPT)


def files_of(run: Callable[[], Any], counts: Callable[[FrameType, Any], bool]) -> set[str]:
    """Files of `data` with a function that counts when it returns."""
    files: set[str] = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "return" and frame.f_code.co_filename.startswith(FOLDER) and counts(frame, argument):
            files.add(Path(frame.f_code.co_filename).name)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


def test_a_pair_passes_through_few_files_on_its_way_to_the_loss(tmp_path: Path) -> None:
    """Files with a function that has the pair in its hands, over a real prepare and the first batch."""
    source = write_parquet(tmp_path / "a.parquet", pick_rows(1))

    def first_batch() -> None:
        dataset = opened(tmp_path, source, needs=Requirements(candidates=2, ties=False))
        item = next(dataset.loader(seed=0, start_step=0, batch_size=1))
        assert dataset.to_batch(item, torch.device("cpu")).latents.shape == (1, 2, 3, 4, 4)

    files = files_of(first_batch, lambda frame, value: any(map(carries, [*frame.f_locals.values(), value])))
    assert {"readers.py", "tables.py", "columns.py"} < files and len(files) <= 8, sorted(files)


def test_a_parquet_file_is_recognised_by_its_columns_alone(tmp_path: Path) -> None:
    """Neither folders nor specs nor annotations are asked about it."""
    source = write_parquet(tmp_path / "a.parquet", pick_rows(1))
    assert files_of(lambda: readers.detect(source), lambda *_: True) == {"readers.py", "tables.py", "columns.py"}
