"""Scoring images on disk: the list, the output, continuing after a kill, images that cannot be read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_scorers import Scorer
from reward_scorers.images import DECODER
from t2i_align.data.media import load_pixels, save_clip
from t2i_align.errors import UserError
from t2i_align.labeling.score import score
from t2i_align.reward_models.preferences import open_preferences
from t2i_align.utils.files import append_line, whole_lines
from tests.reward_scorers.small import write_hf_clip


class Red(Scorer):
    """Mean red, and how many images it has seen."""

    name = "red"
    version = "1"

    def __init__(self) -> None:
        self.seen = 0

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen += len(inputs)
        return inputs[:, 0].mean((1, 2)), {"nothing": inputs[:, 0, 0, 0] * float("nan")}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five reds of 0, 51, 102, 153 and 204, that is 0, 0.2, 0.4, 0.6 and 0.8."""
    for i in range(5):
        Image.new("RGB", (8, 8 + i), (51 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return listed(tmp_path, *({"image": f"{i}.png", "prompt": f"red\u2028number {i}"} for i in range(5)))


def listed(folder: Path, *rows: dict[str, Any], name: str = "list.jsonl") -> Path:
    """A list of images, with an empty line at its end."""
    append_line(folder / name, *rows)
    with open(folder / name, "a") as stream:
        stream.write("\n")
    return folder / name


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


def test_unreadable_images_get_a_row_with_the_error(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")  # which nobody writes to
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "3.png", format="TIFF", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(tmp_path / "2.png", format="TIFF")
    assert run(images, Red(), tmp_path / "scores.jsonl") == pytest.approx(0.8)
    rows = {row["image"]: row for row in whole_lines(tmp_path / "scores.jsonl")}
    assert "no such file" in rows["0.png"]["error"] and "score" not in rows["0.png"]
    assert rows["1.png"]["error"] == "not a regular file" and "several pages" in rows["3.png"]["error"]
    assert "has no known range" in rows["2.png"]["error"]
    assert rows["4.png"]["score"] == pytest.approx(0.8)
    assert "over 1 images; 4 could not be scored" in capsys.readouterr().out


def test_what_never_ends_or_has_no_usable_name_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "clip").mkdir()
    os.mkfifo(tmp_path / "clip" / "0.png")
    Image.new("RGB", (8, 8), (51, 0, 0)).save(tmp_path / "good.png")
    names = ["pipe.png", "zero.png", "clip", "x" * 300, "x" * 300 + ".mp4", "good.png"]
    source = listed(tmp_path, *({"image": name, "prompt": "x"} for name in names))
    assert run(source, Red(), tmp_path / "out.jsonl") == pytest.approx(0.2)
    errors = {row["image"]: row.get("error", "") for row in whole_lines(tmp_path / "out.jsonl")}
    assert errors["good.png"] == "" and all("not a regular file" in errors[name] for name in names[:2])
    assert errors["clip"] == "no frames, expected a clip of 2 frames"
    assert all("name too long" in errors[name] for name in names[3:5])


def test_sources_of_which_nothing_can_be_scored_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Silent(Red):
        name = "silent"

        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.full((len(inputs),), float("nan"))

    urls = listed(tmp_path, *({"image": f"http://x/{i}.png", "prompt": "x"} for i in range(3)), name="urls.jsonl")
    with pytest.raises(UserError, match=r"urls.jsonl: none of its 3 images could be scored, such as: no such file: "):
        run(urls, Red())
    with pytest.raises(UserError, match=r"none of its 5 images .*: the scorers give no finite number"):
        run(images, Silent(), tmp_path / "out.jsonl")
    assert score(images, [Red(), Silent()], progress=False) == pytest.approx({"red": 0.4})
    printed = capsys.readouterr().out
    assert "nan" not in printed and printed.endswith("silent: no image could be scored\n")


def test_score_hands_over_the_pixels_that_training_decodes(tmp_path: Path) -> None:
    """EXIF orientation, transparency, 16-bit gray and CMYK."""

    class Recorder(Red):
        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
            received.extend(inputs)
            return super().rate(inputs, prompts)

    rotated = Image.Exif()
    rotated[0x0112] = 6
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 12, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(tmp_path / "rotated.jpg", exif=rotated)
    Image.fromarray(noise).save(tmp_path / "transparent.png")
    Image.fromarray(rng.integers(0, 65536, (8, 12), dtype=np.uint16)).save(tmp_path / "sixteen.png")
    Image.frombytes("CMYK", (12, 8), noise.tobytes()).save(tmp_path / "cmyk.jpg")
    names = ("rotated.jpg", "transparent.png", "sixteen.png", "cmyk.jpg")
    source = listed(tmp_path, *({"image": name, "prompt": "x"} for name in names))
    received: list[Tensor] = []
    score(source, [Recorder()], batch_size=1, progress=False)
    assert [tuple(pixels.shape[1:]) for pixels in received] == [(12, 8), (8, 12), (8, 12), (8, 12)]
    for name, pixels in zip(names, received, strict=True):
        assert torch.equal(pixels, load_pixels(tmp_path / name, *pixels.shape[1:])), name


def test_bad_input_is_named_before_images_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    cases = [
        ('{"image": "a.png", "prompt": "x"}\n{"image": ', "line 2: not valid JSON"),
        ("[1]", "entry 0: expected an object .*, found int"),
        ('{"photo": 1, "prompt": "x"}', "found 'photo', 'prompt'. Or give a folder .* JSONL or parquet with 'image'"),
        ('{"image": null, "prompt": "x"}', r"expected a path under 'image', found \{'image': None\}"),
        ('{"image": "a.png", "prompt": " "}', "expected text under 'prompt', found ' '"),
        ('{"image": "a.png", "prompt": "\\ud800"}', "expected text under 'prompt', found"),
        ('{"image": "\\ud800", "prompt": "x"}', "expected a path under 'image', found"),
        ("\n", "no rows in it"),
    ]
    for text, match in cases:
        file.write_text(text)
        with pytest.raises(UserError, match=match):
            run(file, Red())
    with pytest.raises(UserError, match=r"Or give a folder with samples.jsonl"):
        run(tmp_path, Red())
    file.write_text('{"image": "a.png", "prompt": "x"}')
    with pytest.raises(UserError, match="unknown scorer 'rde'"):
        score(file, ["rde"], progress=False)
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"foreign.jsonl, row 1: has no 'image'; choose another output"):
        run(file, Red(), tmp_path / "foreign.jsonl")
    for out in (tmp_path / "scores.csv", tmp_path):
        with pytest.raises(UserError, match=r"expected a file that ends in .jsonl or .parquet"):
            run(file, Red(), out)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png: no reader recognises this file"):
        run(tmp_path / "a.png", Red())


def test_images_refused_by_a_scorer_are_named(images: Path) -> None:
    with pytest.raises(UserError, match=r"0.png ... 1.png: temporal_flickering: judges clips, found single images"):
        score(images, ["temporal_flickering"], batch_size=2, progress=False)


def test_clips_from_generate_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reds of 0.2 and 0.6 in turn: 0.4 on average, and 0.4 / 3 of all three channels change from frame to frame."""
    clip = torch.zeros(6, 3, 16, 16)
    clip[::2, 0], clip[1::2, 0] = 0.2, 0.6
    save_clip(clip, tmp_path / "0.mp4", fps=8, lossless=True)
    save_clip(clip, tmp_path / "frames", fps=8)
    save_clip(clip[:1], tmp_path / "still", fps=8)
    names = ("0.mp4", "frames", "still")
    listed(tmp_path, *({"prompt": "x", "file": name} for name in names), name="samples.jsonl")
    means = score(tmp_path, [Red(), "temporal_flickering"], tmp_path / "scores.jsonl", progress=False)
    assert means == pytest.approx({"red": 0.4, "temporal_flickering": 1 - 0.4 / 3}, abs=1e-2)
    rows = whole_lines(tmp_path / "scores.jsonl")
    assert [row["image"] for row in rows if "score" in row] == ["0.mp4", "frames"] * 2
    assert "a single image, expected a clip of 2 frames" in rows[2]["error"]
    monkeypatch.setattr("t2i_align.data.media.MAX_CLIP_PIXELS", 6 * 16 * 16 - 1)
    with pytest.raises(UserError, match=r"its frames have more than 1535 pixels"):
        score(tmp_path, Red(), progress=False)


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


def test_unusable_groups_are_recorded(images: Path, tmp_path: Path) -> None:
    pairs = {"x": ("0.png", "1.png"), "y": ("2.png", "no")}
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": other} for prompt, (chosen, other) in pairs.items()]
    source = listed(tmp_path, *rows, name="pairs.jsonl")
    for _ in range(2):
        assert run(source, Red(), tmp_path / "scores.jsonl") == pytest.approx(0.1)
    lines = whole_lines(tmp_path / "scores.jsonl")
    assert len(lines) == 3 and "pairs.jsonl:2" in lines[2]["image"] and "no" in lines[2]["error"]
    assert lines[2]["sha256"] is None


def test_prompt_refused_by_a_scorer_is_recorded(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    prompts = ["a large red circle on a white background", "a photo of my cat", "x\u0000"]
    names = ["a.png", "a.png", "a\u0000.png"]
    rows = [{"image": name, "prompt": prompt} for name, prompt in zip(names, prompts, strict=True)]
    score(listed(tmp_path, *rows), "oracle", tmp_path / "scores.jsonl", progress=False)
    scored, unknown, unreadable = sorted(
        whole_lines(tmp_path / "scores.jsonl"), key=lambda row: prompts.index(row["prompt"])
    )
    assert scored["score"] is not None and "my cat" in unknown["error"] and "null byte" in unreadable["error"]


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
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(tmp_path / "work.py")],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = whole_lines(tmp_path / "both.jsonl")
    assert sorted(row["score"] for row in rows) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert done.stdout.count("over 5 images") == 1 and not list(tmp_path.glob(".both*"))


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "1"])
def test_images_of_every_mode_and_of_one_pixel_are_scored(mode: str, tmp_path: Path) -> None:
    Image.new("RGB" if mode == "P" else mode, (1, 1)).convert(mode).save(tmp_path / "a.tif")
    run(listed(tmp_path, {"image": "a.tif", "prompt": "x"}), Red(), tmp_path / "out.jsonl")
    (row,) = whole_lines(tmp_path / "out.jsonl")
    assert "score" in row and "error" not in row


def test_prompts_that_are_cut_are_counted(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of letters, 75 fit between the two marks of 77 tokens."""
    rows = [{"image": "0.png", "prompt": "x" * count} for count in (75, 76, 90)]
    scorer = f"hf-clip:{write_hf_clip(tmp_path / 'clip')}"
    score(listed(tmp_path, *rows, name="long.jsonl"), scorer, progress=False)
    assert "over 3 images; 2 prompts were longer than its text encoder reads, and cut" in capsys.readouterr().out
