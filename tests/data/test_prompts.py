"""The prompts that an objective with a scorer learns from."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i_align.config import DataConfig
from t2i_align.data.prompts import open_prompts
from t2i_align.errors import UserError
from tests.formats import write_jsonl
from tests.runs import image


def test_prompts_of_preferences_are_taken_in_their_order_without_captions(tmp_path: Path) -> None:
    image(0).save(tmp_path / "0.png")
    row = {"images": ["0.png", "0.png"], "scores": [1, 0], "captions": ["c", "d"], "negative_caption": "wrong"}
    rows = [{"prompt": prompt, **row} for prompt in ("z", "a", "z", "m")]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert open_prompts(DataConfig(path=str(source))) == ["z", "a", "m"]
    assert open_prompts(DataConfig(path=str(source), limit=2)) == ["z", "a"]
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    assert open_prompts(DataConfig(path=str(tmp_path / "prompts.txt"))) == ["one", "two"]
    with pytest.raises(UserError, match=r"no usable group among 1 rows.*expected the keys"):
        open_prompts(DataConfig(path=str(write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "x"}]))))
