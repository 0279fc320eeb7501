"""What other tools call the same: keys of pairs, folders, separators, Excel files, and images that lie elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import openpyxl
import pytest

from t2i_align import align
from t2i_align.data import readers
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from t2i_align.inference.options import resolve_prompts
from tests.data.test_examples import write_images
from tests.formats import groups
from tests.runs import image, run_values


def named(group: Group) -> tuple[str, list[str]]:
    return group.prompt, [media.name for media in group.candidates if isinstance(media, Path)]


@pytest.mark.parametrize("prompt", ["prompt", "caption", "text"])
@pytest.mark.parametrize("sides", ["chosen rejected", "winner loser", "win lose", "image_w image_l", "good bad"])
def test_pairs_under_other_names(sides: str, prompt: str, tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    better, worse = sides.split()
    (tmp_path / "a.jsonl").write_text(json.dumps({worse: "b.png", prompt: "a fox", better: "a.png"}))
    (tmp_path / "a.csv").write_text(f"{worse},{prompt},{better}\nb.png,a fox,a.png\n")
    for name in ("a.jsonl", "a.csv"):
        assert [named(group) for group in groups(tmp_path / name)] == [("a fox", ["a.png", "b.png"])]


def test_rankings_under_other_names(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "a.jsonl").write_text(json.dumps({"caption": "a fox", "images": ["a.png", "b.png"], "scores": [1, 2]}))
    assert [named(group) for group in groups(tmp_path / "a.jsonl")] == [("a fox", ["b.png", "a.png"])]


@pytest.mark.parametrize("sides", ["win lose", "image_w image_l", "winners losers"])
def test_folders_under_other_names(sides: str, tmp_path: Path) -> None:
    for side in sides.split():
        (tmp_path / side).mkdir()
        write_images(tmp_path / side, ["fox.png"])
    (tmp_path / sides.split()[0] / "fox.txt").write_text("a fox")
    (group,) = groups(tmp_path)
    assert [media.parent.name for media in group.candidates if isinstance(media, Path)] == sides.split()


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_the_separator_of_a_csv_is_that_of_its_header(delimiter: str, tmp_path: Path) -> None:
    """Text in quotation marks may hold any of them."""
    write_images(tmp_path, ["a.png", "b.png"])
    rows = [["prompt", "chosen", "rejected"], ['"a fox; a hen, a\tdog"', "a.png", "b.png"]]
    text = "".join(delimiter.join(row) + "\r\n" for row in rows)
    (tmp_path / "a.csv").write_bytes(text.encode("utf-8-sig"))
    assert [named(group) for group in groups(tmp_path / "a.csv")] == [("a fox; a hen, a\tdog", ["a.png", "b.png"])]
    assert resolve_prompts(tmp_path / "a.csv") == ["a fox; a hen, a\tdog"]


def test_an_excel_file_is_a_table(tmp_path: Path) -> None:
    """Empty rows and columns without a name are left out."""
    write_images(tmp_path, ["a.png", "b.png"])
    book = openpyxl.Workbook()
    for row in (
        ["id", "prompt", "chosen", "rejected", None],
        [7, "a fox", "a.png", "b.png", "note"],
        [],
        [8, None, "a.png", "b.png"],
    ):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    first, second = readers.read(tmp_path / "a.xlsx")
    assert isinstance(first, Group) and first.id == "7" and named(first) == ("a fox", ["a.png", "b.png"])
    assert not isinstance(second, Group) and "no 'prompt'" in second.reason and "a.xlsx, row 1" in second.origin
    (tmp_path / "b.xlsx").write_bytes(b"PK no")
    with pytest.raises(UserError, match=r"b\.xlsx: not a readable Excel file"):
        list(readers.read(tmp_path / "b.xlsx", "pairs"))


def test_images_outside_the_lists_folder_need_a_root(sd_path: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "lists").mkdir()
    for i in range(4):
        image(i).save(tmp_path / "images" / f"{i}.png")
    lists = tmp_path / "lists" / "a.jsonl"
    pairs = [{"prompt": "x", "chosen": str(tmp_path / "images/0.png"), "rejected": "1.png"},
             {"prompt": "y", "chosen": "2.png", "rejected": "3.png"}]  # fmt: skip
    lists.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = run_values(sd_path, lists, tmp_path / "run", train__steps=1, train__batch_size=2)
    with pytest.raises(
        UserError, match=r"0.png' leads outside .*lists\. Name the folder .* as data.root, or as `root`"
    ):
        align(values, progress=False)
    values["data"]["root"] = str(tmp_path / "images")
    assert align(values, progress=False).steps == 1
    spec = tmp_path / "spec.yaml"
    spec.write_text("path: lists/a.jsonl\nroot: images\n")
    assert [named(group) for group in groups(spec)] == [("x", ["0.png", "1.png"]), ("y", ["2.png", "3.png"])]
    values["data"]["path"] = str(spec)
    with pytest.raises(UserError, match=r"data\.root: .*spec\.yaml is a dataset spec; give `root` in it instead"):
        align({**values, "output_dir": str(tmp_path / "other")}, progress=False)
    lists.write_text(json.dumps({"prompt": "x", "chosen": "../lists/a.png", "rejected": "1.png"}))
    with pytest.raises(UserError, match=r"leads outside .*images\."):
        list(readers.read(spec))
