"""Scoring images on disk: the list, the output, continuing after a kill, images that cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_scorers import Scorer
from reward_scorers.images import DECODER
from t2i_align.errors import UserError
from t2i_align.labeling.score import score
from t2i_align.reward_models.preferences import open_preferences
from t2i_align.utils.files import append_line, whole_lines
from tests.labeling.conftest import listed
from tests.reward_scorers.small import write_hf_clip
from tests.runs import finished, start


class Red(Scorer):
    """Mean red, and how many images it has seen."""

    name = "red"
    version = "1"

    def __init__(self) -> None:
        self.seen = 0

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen += len(inputs)
        return inputs[:, 0].mean((1, 2)), {"nothing": inputs[:, 0, 0, 0] * float("nan")}


def run(source: Path, scorer: Scorer, out: Path | None = None) -> float:
    return score(source, [scorer], out, batch_size=2, progress=False)[scorer.name]


def test_row_has_image_scorer_version_and_parts(images: Path, tmp_path: Path) -> None:
    assert run(images, Red(), tmp_path / "scores.jsonl") == pytest.approx(0.4)
    rows = whole_lines(tmp_path / "scores.jsonl")
    assert [row["score"] for row in rows] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert rows[1] | {"score": 0} == {
        "image": "1.png",
        "sha256": hashlib.sha256((tmp_path / "1.png").read_bytes()).hexdigest(),
        "prompt": "red\u2028number 1",
        "scorer": "red",
        "version": f"1, {DECODER}",
        "score": 0,
        "parts": {"nothing": None},
    }
    assert run(images, Red()) == pytest.approx(0.4)  # nothing written without `out`


def test_killed_run_continues(images: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "scores.jsonl", tmp_path / "whole.jsonl"
    run(images, Red(), whole)
    text = whole.read_bytes()
    cut = text.rstrip(b"\n").rfind(b"\n") + 25  # into the last line
    out.write_bytes(text[:cut])
    again = Red()
    assert run(images, again, out) == pytest.approx(0.4)
    assert again.seen == 1 and out.read_bytes() == text
    again.version = "2"  # other numbers: nothing counts as done
    run(images, again, out)
    assert again.seen == 6 and len(whole_lines(out)) == 10
    out.write_text(out.read_text().replace(f", {DECODER}", ""))  # as written before the decoder had a version
    run(images, again, out)
    assert again.seen == 11 and [row["version"] for row in whole_lines(out)][10:] == [f"2, {DECODER}"] * 5


def test_autocast_is_in_the_version_and_scores_keep_their_digits(images: Path, tmp_path: Path) -> None:
    spec = f"hf-clip:{write_hf_clip(tmp_path / 'clip')}"
    out = tmp_path / "scores.jsonl"
    for precision in ("fp32", "bf16", "bf16"):
        score(images, spec, out, batch_size=5, precision=precision, progress=False)
    rows = whole_lines(out)
    exact, rounded = (torch.tensor([row["score"] for row in rows[i : i + 5]]) for i in (0, 5))
    scorer_version = rows[0]["version"].removesuffix(f", {DECODER}")
    assert len(rows) == 10 and rows[5]["version"] == f"{scorer_version}, bfloat16 autocast, {DECODER}"
    assert 0 < (exact - rounded).abs().max() < 1  # of 100 times a cosine
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the cosine itself is not rounded
    with pytest.raises(UserError, match="unknown precision 'half'"):
        score(images, spec, out, precision="half", progress=False)


def test_scored_images_are_not_decoded_again(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(images, Red(), tmp_path / "scores.jsonl")
    opened = []
    monkeypatch.setattr(Image, "open", lambda file, real=Image.open, **how: opened.append(file) or real(file, **how))
    Image.new("RGB", (8, 8)).save(tmp_path / "3.png")  # another image under the same name
    run(images, Red(), tmp_path / "scores.jsonl")
    assert opened == [tmp_path / "3.png"]


def test_images_are_identified_by_content_not_by_name(tmp_path: Path) -> None:
    """Red 51 and 204 of 255: the means of the two folders are 0.2 and 0.8, whichever is scored first or again."""
    for name, red in (("base", 51), ("aligned", 204)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (red, 0, 0)).save(tmp_path / name / "00000.png")
        listed(tmp_path / name, {"prompt": "x", "file": "00000.png"}, name="samples.jsonl")
    out = tmp_path / "scores.jsonl"
    for name, mean in (("base", 0.2), ("aligned", 0.8), ("base", 0.2)):
        assert run(tmp_path / name, Red(), out) == pytest.approx(mean)
    assert [row["score"] for row in whole_lines(out)] == pytest.approx([0.2, 0.8])  # the third call had nothing to do
    (tmp_path / "base" / "00000.png").write_bytes((tmp_path / "aligned" / "00000.png").read_bytes())
    assert run(tmp_path / "base", Red(), out) == pytest.approx(0.8)  # made again in the same folder


def test_out_of_memory_and_unknown_device_are_named(images: Path) -> None:
    class Huge(Red):
        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"CUDA out of memory at batch size 2; lower batch_size \(--batch-size\)"):
        run(images, Huge())
    with pytest.raises(UserError, match="device 'cdua' cannot be used: "):
        score(images, [Red()], device="cdua", progress=False)


def test_all_sources_of_the_same_images_give_the_same_scores(images: Path, tmp_path: Path) -> None:
    """The same five images as JSONL, parquet with bytes, a ranking and prepared images."""
    names = [f"{i}.png" for i in range(5)]
    encoded = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in names]
    pq.write_table(pa.table({"image": encoded, "caption": ["red"] * 5}), tmp_path / "list.parquet")
    row = {"prompt": "red", "images": names, "scores": [0, 1, 2, 3, 4]}
    ranking = listed(tmp_path, row, name="ranking.jsonl")
    index = open_preferences(str(ranking), tmp_path / "index", progress=False).store.path
    for source in (images, tmp_path / "list.parquet", ranking, index):
        out = tmp_path / "out" / f"{source.name}.jsonl"
        assert run(source, Red(), out) == pytest.approx(0.4), source
        assert sorted(row["score"] for row in whole_lines(out)) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
        again = Red()
        assert run(source, again, out) == pytest.approx(0.4) and again.seen == 0


def test_parquet_output_continues_and_keeps_parts_and_errors(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    (tmp_path / "4.png").write_bytes(b"no image")
    run(images, Red(), out)
    rows = pq.read_table(out).to_pylist()
    assert [row["score"] for row in rows if row["error"] is None] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert [row["image"] for row in rows if row["error"]] == ["4.png"] and dict(rows[0]["parts"]) == {"nothing": None}
    pq.write_table(pq.read_table(out).slice(0, 2), out)
    left = tmp_path / f".{out.name}.1.jsonl"  # what another process wrote before it was killed
    append_line(left, {name: value for name, value in rows[2].items() if name not in ("error", "parts")})
    with open(left, "a") as stream:
        stream.write('{"image"')
    scorer = Red()
    assert run(images, scorer, out) == pytest.approx(0.3)
    assert scorer.seen == 1 and not left.exists() and pq.read_table(out).num_rows == 5
    pq.write_table(pa.table({"a": [1]}), out)
    with pytest.raises(UserError, match=r"scores.parquet, row 1: has no 'image'"):
        run(images, Red(), out)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_output_may_have_glob_characters_or_be_a_link(ending: str, images: Path, tmp_path: Path) -> None:
    out, link = tmp_path / "there" / f"s[1]*.{ending}", tmp_path / f"link.{ending}"
    out.parent.mkdir()
    link.symlink_to(out)
    scorer = Red()
    run(images, scorer, out)
    run(images, scorer, link)
    assert scorer.seen == 5 and link.is_symlink() and [file.name for file in out.parent.iterdir()] == [out.name]


def test_part_file_merged_before_a_kill_is_not_merged_twice(images: Path, tmp_path: Path) -> None:
    table, part = tmp_path / "a.parquet", tmp_path / ".a.parquet.0.jsonl"
    run(images, Red(), table)
    run(images, Red(), part)
    assert run(images, Red(), table) == pytest.approx(0.4) and pq.read_table(table).num_rows == 5


def test_changed_frame_makes_another_clip(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (51, 0, 0)).save(tmp_path / "clip" / f"{number}.png")
    source = listed(tmp_path, {"image": "clip", "prompt": "x"})
    for red in (51, 204):
        Image.new("RGB", (16, 16), (red, 0, 0)).save(tmp_path / "clip" / "0.png")
        means = run(source, Red(), tmp_path / "scores.jsonl")
        assert means == pytest.approx((0.2 * 2 + red / 255) / 3)


@pytest.mark.slow
def test_two_processes_share_the_work(images: Path, tmp_path: Path) -> None:
    """Under torchrun: each image is scored once, and the first process gathers."""
    code = (
        "import os, sys\n"
        "from tests.labeling.test_score import Red\n"
        "from t2i_align.labeling.score import score\n"
        f"means = score({str(images)!r}, [Red()], {str(tmp_path / 'both.jsonl')!r}, batch_size=2, progress=False)\n"
        "assert abs(means['red'] - 0.4) < 1e-6\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"  # gloo's threads may abort on the way out
    )
    (tmp_path / "work.py").write_text(code)
    output = finished(start(tmp_path / "work.py", processes=2))
    rows = whole_lines(tmp_path / "both.jsonl")
    assert sorted(row["score"] for row in rows) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert output.count("over 5 images") == 1 and not list(tmp_path.glob(".both*"))
