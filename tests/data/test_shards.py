"""Which files of a folder are read, and samples of webdataset shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetInfo, HfApi

from t2i_align.data import hub
from t2i_align.data.readers import read
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from tests import formats
from tests.data.test_examples import pick_rows, write_images, write_parquet
from tests.formats import groups, shard, skips

README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "a*"}
  - {split: hard, path: [b.parquet, c.parquet]}
---
# Pairs
"""


def written(folder: Path, names: list[str], suffix: str = ".parquet") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(folder / f"{name}{suffix}", {**pick_rows(1), "ranking_id": [None]})
    return folder


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ("train-00000-of-00003", "train-00001-of-00003 train-00002-of-00003"),
        ("a/x-00001-of-00004 a/x-00002-of-00004", "a/x-00000-of-00004 a/x-00003-of-00004"),
        ("x-00001-of-00002 x-00002-of-00002", ""),  # some count from 1
        ("x-00000-of-00001 y-00001-of-00002", "y-00000-of-00002"),
        ("000003 000005", "000004"),
        ("votes-20240101 votes-20250101", ""),
        ("export_1732800000 export_1732886400", ""),
        ("shard-100 shard-101 shard-1000", ""),
        ("votes-20240101-00001-of-00002", "votes-20240101-00000-of-00002"),
    ],
)
def test_missing_shards_are_named(tmp_path: Path, names: str, missing: str) -> None:
    written(tmp_path, names.split())
    written(tmp_path / ".hidden", ["x-00000-of-00009"])  # as notebooks and file managers leave there
    (tmp_path / "._copy.parquet").write_bytes(b"?")
    assert [group.id for group in groups(tmp_path)] == [f"{name}.parquet:0" for name in names.split()]
    assert [*skips(tmp_path)] == [f"{name}.parquet" for name in missing.split()]
    assert not skips(tmp_path / f"{names.split()[0]}.parquet")  # the file itself was asked for


def test_many_missing_shards_are_one_skip(tmp_path: Path) -> None:
    written(tmp_path, ["x-00000-of-99999", "x-00002-of-99999"])
    ((name, reason),) = skips(tmp_path).items()
    assert name == "x-00001-of-99999.parquet" and reason.startswith("99997 shards are missing")


@pytest.mark.parametrize(
    ("names", "readme", "split", "expected"),
    [
        ("data/test-00000-of-00001 data/train-00000-of-00001", "", "train", "data/train-00000-of-00001"),
        ("default/test/0000 default/train/0000 default/other", "", "train", "default/other default/train/0000"),
        ("train dev eval", "", "train", "train"),
        ("trainees contest", "", "train", "contest trainees"),
        ("test-00000-of-00001", "", "train", "test-00000-of-00001"),
        ("train test", "", "test", "test"),
        ("train test", "", "all", "test train"),
        ("x/train-00000-of-00001 x/validation_unique-00000-of-00001", "", "validation_unique",
         "x/validation_unique-00000-of-00001"),
        ("train-00000-of-00001 val-00000-of-00001", "", "validation", "val-00000-of-00001"),
        ("a b c", README, "train", "a"),
        ("a b c", README, "hard", "b c"),
        ("a train", "---\nconfigs: [1, {data_files: x}]\n---\n", "train", "a train"),
        ("a train", "---\nconfigs: [{data_files: {split: [x], path: [[a]]}}]\n---\n", "train", "a train"),
    ],
)  # fmt: skip
def test_one_split_of_a_folder_is_read(tmp_path: Path, names: str, readme: str, split: str, expected: str) -> None:
    folder = written(tmp_path / "data", names.split())
    if readme:
        (folder / "README.md").write_text(readme)
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"path: data\nsplit: {split}\n")
    for source in (spec, folder) if split == "train" else (spec,):
        assert [group.id for group in groups(source)] == [f"{name}.parquet:0" for name in expected.split()]
        others = len(names.split()) - len(expected.split())
        assert len(skips(source)) == (
            others if split == "train" and not readme else min(others, 1) * (split == "train")
        )
    spec.write_text("path: data\nsplit: unheard_of\n")
    with pytest.raises(UserError, match="split: no file of 'unheard_of'; there are: "):
        groups(spec)


def test_a_stream_of_the_hub_has_the_files_of_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their names, or as the README declares them."""
    for names, card, expected in (
        (["test-00000-of-00001", "train-00010-of-00011", "train-00002-of-00011"], None, [2, 1]),
        (["b", "a2", "a10"], yaml.safe_load(README.split("---")[1]), [1, 2]),
    ):
        files = [{"rfilename": f"{name}.parquet"} for name in names]
        info = DatasetInfo(id="owner/name", sha="abc", siblings=files, card_data=card)
        monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision, info=info: info)
        result = [f"{names[place]}.parquet" for place in expected]
        assert hub.pieces("hub:owner/name", (".parquet",)) == (result, "hub:owner/name@abc")


def test_winner_and_loser_folders_of_one_split_are_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for side in ("w", "l"):
            write_images(tmp_path / split / side, ["a.png"])
        (tmp_path / split / "w" / "a.txt").write_text(split)
    assert [group.prompt for group in groups(tmp_path)] == ["train"] and [*skips(tmp_path)] == ["test"]
    assert [group.prompt for group in groups(tmp_path / "test")] == ["test"]


# Webdataset ---------------------------------------------------------------------------------------------------------

TWELVE = [f"jpg_{n}" for n in range(12)]


def label(best: int, numbers: range) -> dict[str, Any]:
    return {f"label_{number}": float(number == best) for number in numbers}


@pytest.mark.parametrize(
    ("names", "values", "best"),
    [
        ([str(n) for n in range(12)], {"scores": [*range(12)]}, "11"),
        (TWELVE, label(10, range(12)), "jpg_10"),
        (TWELVE, label(2, range(12)), "jpg_2"),
        (["jpg_1", "jpg_2"], label(2, range(1, 3)), "jpg_2"),
        (["left", "right"], label(1, range(2)), "right"),
        (["jpg_0", "jpg_2"], label(2, range(3)), "label_{0, 1, 2} do not fit images jpg_0, jpg_2"),
        (["jpg_1", "jpg_2"], label(1, range(2)), "label_{0, 1} do not fit images jpg_1, jpg_2"),
        (["jpg_1", "jpg_2"], label(1, range(3)), "label_{0, 1, 2} do not fit images jpg_1, jpg_2"),
        (["jpg_0", "jpg_1"], label(1, range(1)), "label_{0} do not fit images jpg_0, jpg_1"),
        (TWELVE, {"winner": 10}, "jpg_10"),
        (TWELVE, {"winner": "jpg_2"}, "jpg_2"),
        (["1", "2"], {"winner": 1}, "1"),
        (["1", "2"], {"winner": "2"}, "2"),
        (["1", "2"], {"winner": 1.0}, "1"),
        (["01", "02"], {"winner": 1}, "01"),
        (["left", "right"], {"winner": 1}, "right"),
        (["CHOSEN", "REJECTED"], label(1, range(5)), "CHOSEN"),
    ],
)
def test_labels_of_a_sample_belong_to_the_image_of_their_number(
    tmp_path: Path, names: list[str], values: dict[str, Any], best: str
) -> None:
    """As keys of the JSON and as text members; every image keeps its own, in whatever order the archive has them."""
    images = {name: formats.png(number) for number, name in enumerate(names)}
    members = {f"k.{name}.PNG": content for name, content in images.items()}
    texts = {f"k.{key}.TXT": str(value).encode() for key, value in values.items()}
    for others in ({"k.json": json.dumps(values).encode()}, texts if "scores" not in values else {}):
        for order in (1, -1):
            entries = [*members.items(), *others.items(), ("k.TXT", b"a fox")][::order]
            source = shard(tmp_path / "a.tar", dict(entries))
            (item,) = read(source)
            if others and not isinstance(item, Group):
                assert item.reason == best
            elif others:
                assert isinstance(item, Group) and item.candidates[0] == images[best] and item.prompt == "a fox"


@pytest.mark.parametrize(
    ("names", "winners", "expected"),
    [
        (["1", "2"], (1, 0), "'winner' is 0, but images are numbered 1, 2"),
        (["jpg_0", "jpg_1"], ("1", "2"), "'winner' is 2, but images are numbered 0, 1"),
        (["left", "right"], (1, 2), "'winner' is 2, but places count from 0 to 1"),
    ],
)
def test_winners_that_prove_another_numbering_are_an_error(
    tmp_path: Path, names: list[str], winners: tuple[Any, Any], expected: str
) -> None:
    members = {f"{key}.{name}.png": formats.png(n) for key in "ab" for n, name in enumerate(names)}
    for key, winner in zip("ab", winners, strict=True):
        members[f"{key}.json"] = json.dumps({"winner": winner, "prompt": "x"}).encode()
    with pytest.raises(UserError, match=rf"a\.tar, sample 'b': {expected}"):
        groups(shard(tmp_path / "a.tar", members))


def test_captions_of_a_sample_belong_to_the_image_of_their_number(tmp_path: Path) -> None:
    members = {f"k.{n}.png": formats.png(n) for n in range(12)} | {f"k.caption_{n}.txt": b"%d" % n for n in range(12)}
    members |= {"k.json": b'{"winner": 10}', "k.txt": b"x"}
    (group,) = groups(shard(tmp_path / "a.tar", members))
    assert [group.candidates[place] for place in range(12)] == [formats.png(int(text)) for text in group.captions]


def test_members_of_a_sample_may_be_apart(tmp_path: Path) -> None:
    """As `tar` without --sort=name has them."""
    keys = ["b", "a"]
    members = {f"{key}.chosen.png": formats.png(place) for place, key in enumerate(keys)}
    members |= {f"{key}.rejected.avif": formats.encoded(place + 2, "AVIF") for place, key in enumerate(keys)}
    members |= {f"./{key}.txt": key.encode() for key in keys} | {f"{key}.chosen.txt": b"its own" for key in keys}
    members |= {"c.heic": b"?", "c.txt": b"x", "._b.txt": b"Mac"}
    source = shard(tmp_path / "a.tar", members)
    result = groups(source)
    assert [(group.prompt, group.candidates[0]) for group in result] == [("b", formats.png(0)), ("a", formats.png(1))]
    assert skips(source)["a.tar:c"].startswith("no image or clip among heic, txt (known endings: .jpg")
