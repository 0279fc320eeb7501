"""What `data inspect` counts, and what `data split` writes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from t2i_align.cli import main
from t2i_align.data import readers
from t2i_align.data.inspect import fingerprint, inspect
from t2i_align.data.readers import read
from t2i_align.data.schema import Group
from t2i_align.data.splits import split
from t2i_align.errors import UserError
from tests import formats
from tests.data.test_examples import contents, noise_jpeg, write_jsonl
from tests.formats import images


def test_a_fingerprint_survives_scaling_and_saving(tmp_path: Path) -> None:
    def opened(name: str) -> Image.Image:
        return Image.open(tmp_path / name).convert("RGB")

    (tmp_path / "a.jpg").write_bytes(noise_jpeg(1, side=48))
    (tmp_path / "b.jpg").write_bytes(noise_jpeg(2, side=48))
    smooth = opened("a.jpg").resize((3, 3)).resize((96, 96))
    smooth.save(tmp_path / "c.png")
    smooth.resize((48, 48)).save(tmp_path / "d.jpg", quality=80)
    assert fingerprint(opened("c.png")) == fingerprint(opened("d.jpg"))
    assert fingerprint(opened("a.jpg")) != fingerprint(opened("b.jpg"))
    assert fingerprint(Image.new("RGB", (8, 8), "red")) != fingerprint(Image.new("RGB", (8, 8), "blue"))


def test_counts_of_a_source(tmp_path: Path) -> None:
    """Four judgements of one pair, of which one differs: of the six couples of them, three do. Two scorers of three
    candidates: they agree on one of three pairs."""
    images(tmp_path)
    pair = {"prompt": "a fox", "images": ["0.png", "1.png"]}
    turned = {"prompt": "a fox", "images": ["1.png", "0.png"]}
    by_scorer = {"one": {"version": "1", "scores": [3, 2, 1]}, "two": {"version": "1", "scores": [1, 3, 2]}}
    entries = [
        {**pair, "scores": [0.8, 0.2], "user": "anna"},
        {**pair, "scores": [1, 0], "user": "ben"},
        {**turned, "scores": [0, 1], "user": "ben"},
        {**turned, "scores": [1, 0], "user": "carl"},
        {
            "prompt": "a <b>owl</b>",
            "images": ["2.png", "3.png", "4.png"],
            "scores": [1, 0.5, 0],
            "by_scorer": by_scorer,
        },
        {"prompt": "a tie", "images": ["5.png", "5.png"], "scores": [0.5, 0.5]},
        {"prompt": "gone", "images": ["9.png"], "scores": [1]},
    ]
    result = inspect(write_jsonl(tmp_path / "d.jsonl", entries), tmp_path / "report.html")
    assert (result.groups, result.ties.total(), dict(result.candidates)) == (6, 1, {2: 5, 3: 1})
    assert dict(result.skips) == {"no such image: 9.png": 1} and dict(result.users) == {"anna": 1, "ben": 2, "carl": 1}
    assert result.disagreement == (1, 0.5) and result.twins == 1
    assert result.duplicates == 6 + 1  # of the pair's two images three times each, and the twin
    agreement = result.agreement()
    assert agreement["one", "two"] == pytest.approx(1 / 3)
    assert agreement["label", "one"] == 1.0
    assert result.shares == pytest.approx([0.2, 0, 0, 0, 0.5]) and result.lengths["words"] == [2, 2, 2]
    page = (tmp_path / "report.html").read_text()
    assert "a &lt;b&gt;owl" in page and "<svg" in page and page.count("<img") == 2 * 5 + 3
    assert "http" not in page.replace("http-equiv", "")
    assert {"chosen", "rejected", "rank 2", "tie"} <= {*re.findall(r"<span>([a-z0-9 ]+)</span>", page)}
    short = f"Findings(6 groups of {tmp_path / 'd.jsonl'}, 1 rows skipped)"
    assert repr(result) == short and "<iframe" in result._repr_html_()


def test_names_that_a_terminal_would_obey_or_cannot_print(tmp_path: Path) -> None:
    images(tmp_path)
    source = tmp_path / os.fsdecode(b"d\xff\x1b[2J.jsonl")
    pair = {"id": "a", "prompt": "x", "chosen": "0.png", "rejected": "1.png", "\x1b]0;title\x07\ud800": 1}
    result = inspect(write_jsonl(source, [pair]), tmp_path / "r.html")
    name, columns = result.summary().splitlines()[0].split(": jsonl, columns ")
    assert name.endswith(r"d\udcff\x1b[2J.jsonl") and columns.endswith(r"\x1b]0;title\x07\ud800")
    assert name in (tmp_path / "r.html").read_text()


def test_images_beyond_the_opened_groups_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six groups, of which two are opened; charts are of one scale however few bars they have."""
    monkeypatch.setattr(readers, "READERS", dict(readers.READERS))

    def groups(path: Path, image: bytes = b"") -> Iterator[Group]:
        for n in range(6):
            assert not image or n < 3, "unused images are read"
            yield Group(id=str(n), prompt="x", candidates=(image or b"left out",), scores=(1.0,), origin=f"row {n}")

    readers.register("big", outline=groups)(lambda path: groups(path, formats.png(0)))
    (tmp_path / "a.big").write_text("")
    result = inspect(tmp_path / "a.big", tmp_path / "r.html", format="big", images=2)
    assert (result.groups, result.opened, sum(result.sizes.values()), len(result.examples)) == (6, 2, 2, 2)
    assert set(re.findall('viewBox="0 0 ([0-9]+)', (tmp_path / "r.html").read_text())) == {"532"}


def test_prompts_are_held_against_a_models_limit(tmp_path: Path, sd_path: Path) -> None:
    images(tmp_path)
    entries = [{"prompt": text, "chosen": "0.png", "rejected": "1.png"} for text in ("a", "a " * 200)]
    result = inspect(write_jsonl(tmp_path / "d.jsonl", entries), tmp_path / "r.html", model=str(sd_path))
    (lengths,) = result.lengths.values()
    assert lengths[0] < next(iter(result.limits.values())) < lengths[1]
    assert f"1 prompts exceed {next(iter(result.limits.values()))} tokens" in result.summary()


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Split, then each part inspected by its file's name; the parts together are the whole."""
    images(tmp_path)
    entries = [{"prompt": f"fox {n // 2}", "chosen": "0.png", "rejected": "1.png"} for n in range(40)]
    source = write_jsonl(tmp_path / "d.jsonl", entries)
    out = tmp_path / "split"
    assert main(["data", "split", str(source), "--out", str(out), "--held-out", "0.3", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    parts = {name: [g for g in read(out / f"{name}.yaml") if isinstance(g, Group)] for name in ("train", "held_out")}
    assert len(parts["train"]) + len(parts["held_out"]) == 40 and f"train            {len(parts['train'])}\n" in printed
    prompts = (out / "held_out_prompts.txt").read_text().splitlines()
    assert prompts == list(dict.fromkeys(group.prompt for group in parts["held_out"]))
    assert not set(prompts) & {group.prompt for group in parts["train"]}
    assert main(["data", "inspect", str(out / "train.yaml"), "--out", str(tmp_path / "r.html")]) == 0
    assert f"{len(parts['train'])} groups" in capsys.readouterr().out
    assert main(["data", "split", str(source), "--out", str(out / "none"), "--held-out", "1e-9"]) == 2
    assert capsys.readouterr().err.endswith("with held_out=1e-09 and seed=0, held_out is empty; choose others.\n")
    assert main(["data", "inspekt"]) == 2 and "Did you mean 'inspect'" in capsys.readouterr().err
    assert main(["data", "inspect", str(source), "--out", "r.txt"]) == 2


def test_a_described_source_is_split_with_what_it_says(tmp_path: Path) -> None:
    images(tmp_path)
    rows = [{"text": f"été  {n}" if n < 30 else "", "a": "0.png", "b": "1.png", "won": "a"} for n in range(31)]
    formats.sheet(tmp_path / "v.csv", rows)
    (tmp_path / "v.yaml").write_text("path: v.csv\ncolumns: {candidates: [a, b], winner: won, prompt: text}\n")
    counts = split(tmp_path / "v.yaml", tmp_path / "out", held_out=0.3)
    assert counts["train"] + counts["held_out"] == 30 and counts["held_out"] == counts["held_out_prompts"]
    assert (counts["on_neither_side"], counts["skipped"]) == (0, 1)
    assert all(
        text.startswith("été ") and "  " not in text
        for text in (tmp_path / "out/held_out_prompts.txt").read_text().splitlines()
    )
    written = yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())
    assert (
        written["columns"]["prompt"] == "text" and Path(written["path"]).is_absolute() and next(iter(written)) == "path"
    )
    assert written["part"] == {"of": "train", "held_out": 0.3, "by": ["prompt"], "seed": 0}
    files = contents(tmp_path / "out")
    for other in ({"held_out": 0.3, "seed": 1}, {"held_out": 0.4}, {"held_out": 0.3, "by": ["prompt", "user"]}):
        with pytest.raises(UserError, match=r"train\.yaml: this split was made with other settings"):
            split(tmp_path / "v.yaml", tmp_path / "out", **other)
    (tmp_path / "out" / "held_out.yaml").unlink()  # as a kill between the files leaves it
    with pytest.raises(UserError, match="made with other settings"):
        split(tmp_path / "v.yaml", tmp_path / "out", held_out=0.3, seed=1)
    assert split(tmp_path / "v.yaml", tmp_path / "out", held_out=0.3) == counts and contents(tmp_path / "out") == files
    with pytest.raises(UserError, match="one part of a split already"):
        split(tmp_path / "out" / "train.yaml", tmp_path / "again")
    with pytest.raises(
        UserError, match=r"with held_out=1e-09 and seed=0, held_out is empty; choose others\. Skipped rows: 1, such as "
    ):
        split(tmp_path / "v.yaml", tmp_path / "again", held_out=1e-9)
    formats.sheet(tmp_path / "v.csv", [{"text": "", "a": "0.png", "b": "1.png", "won": "a"}])
    with pytest.raises(UserError, match=r"no usable group among 1 rows.*v\.csv, row 0: no 'text'"):
        split(tmp_path / "v.yaml", tmp_path / "again")
    assert json.loads(json.dumps(counts)) == counts
