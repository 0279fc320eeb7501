"""The same preferences written in every format: `python -m tests.formats` makes the examples under tests/data.

Images are one-coloured, so that each is known again whatever it is called. PAIRS can be said in every format; the
RANKINGS, of which the last two images of the first are a tie, in those that rank.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from t2i_align.data.readers import read
from t2i_align.data.schema import Group, Skipped
from tests.data.test_examples import colour

EXAMPLES = Path(__file__).parent / "data"
PAIRS = [("a red fox", 0, 1), ("a blue owl, « à l'aube »", 2, 3)]  # prompt, better, worse
RANKINGS = [("a red fox", [0, 1, 2], [1, 2, 2]), ("a blue owl", [5, 4, 3], [1, 2, 3])]  # prompt, images, ranks


def png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour(number)).save(stream, "PNG")
    return stream.getvalue()


def images(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))


def lines(file: Path, entries: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")
    return file


def table(file: Path, entries: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(entries), file)
    return file


def sheet(file: Path, entries: list[dict[str, Any]]) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(entries[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(entries)
    return file


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def pickapic(folder: Path) -> Path:
    rows = [
        {"jpg_0": png(lost), "jpg_1": png(won), "caption": prompt, "label_0": 0.0, "label_1": 1.0, "ranking_id": won}
        for prompt, won, lost in PAIRS
    ]  # fmt: skip
    return table(folder / "train.parquet", rows)


def double_caption(folder: Path) -> Path:
    rows = [
        {
            "jpg_0": png(won),
            "jpg_1": png(lost),
            "caption_0": prompt,
            "caption_1": "a failure",
            "label_0": 1,
            "label_1": 0,
        }
        for prompt, won, lost in PAIRS
    ]
    return table(folder / "train.parquet", rows)


def rapidata(folder: Path) -> Path:
    names = [f"weighted_results_image{n}_preference" for n in (1, 2)]
    rows = [
        {"prompt": prompt, "image1": {"bytes": png(won), "path": "w.png"}, "image2": {"bytes": png(lost), "path": None},
         "model1": "flux", names[0]: 0.7, names[1]: 0.3}
        for prompt, won, lost in PAIRS
    ]  # fmt: skip
    return table(folder / "train.parquet", rows)


def rapidata_counts(folder: Path) -> Path:
    rows = [
        {"prompt": prompt, "image1": {"bytes": png(lost), "path": None}, "image2": {"bytes": png(won), "path": None},
         "votes_image1": 8, "votes_image2": 18, "detailed_results": "[]", "image1_path": "l.png"}
        for prompt, won, lost in PAIRS
    ]  # fmt: skip
    return table(folder / "train_0001-00000-of-00001.parquet", rows)


def hpdv2(folder: Path) -> Path:
    images(folder / "train")
    entries = [
        {"human_preference": [0, 1], "prompt": prompt, "file_path": [f"{lost}.png", f"{won}.png"]}
        for prompt, won, lost in PAIRS
    ]
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def hpdv3(folder: Path) -> Path:
    images(folder / "images")
    entries = [
        {"prompt": prompt, "path1": f"images/{won}.png", "path2": f"images/{lost}.png", "confidence": 0.9,
         "choice_dist": [9, 1], "model1": "flux", "model2": "kolors"}
        for prompt, won, lost in PAIRS
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(entries))
    return folder / "train.json"


def jsonl(folder: Path) -> Path:
    images(folder / "p")
    entries = [{"prompt": prompt, "chosen": f"p/{won}.png", "rejected": f"p/{lost}.png"} for prompt, won, lost in PAIRS]
    return lines(folder / "pairs.jsonl", entries)


def comma_separated(folder: Path) -> Path:
    images(folder / "p")
    entries = [{"prompt": prompt, "chosen": f"p/{won}.png", "rejected": f"p/{lost}.png"} for prompt, won, lost in PAIRS]
    return sheet(folder / "pairs.csv", entries)


def parquet_pairs(folder: Path) -> Path:
    return table(
        folder / "pairs.parquet", [{"prompt": p, "chosen": png(won), "rejected": png(lost)} for p, won, lost in PAIRS]
    )


def vote_counts(folder: Path) -> Path:
    """A spreadsheet of one's own, and a source file that says what its columns hold."""
    images(folder / "p")
    rows = [
        {"text": p, "left": f"{lost}.png", "right": f"{won}.png", "for_left": 2, "for_right": 7}
        for p, won, lost in PAIRS
    ]
    sheet(folder / "votes.tsv", rows)
    (folder / "votes.yaml").write_text(
        "path: votes.tsv\ncolumns: {candidates: [left, right], votes: [for_left, for_right], prompt: text, folder: p}\n"
    )
    return folder / "votes.yaml"


def demo(folder: Path) -> Path:
    images(folder / "p")
    entries = [
        {"prompt": prompt, "left": f"p/{lost}.png", "right": f"p/{won}.png", "vote": "right", "user": "anna"}
        for prompt, won, lost in PAIRS
    ]
    return lines(folder / "votes.jsonl", entries)


def folders(folder: Path) -> Path:
    for prompt, won, lost in PAIRS:
        for side, number in (("chosen", won), ("rejected", lost)):
            (folder / side).mkdir(exist_ok=True)
            (folder / side / f"{won}.png").write_bytes(png(number))
        (folder / "chosen" / f"{won}.txt").write_text(prompt, encoding="utf-8")
    return folder


def kohya(folder: Path) -> Path:
    for prompt, won, lost in PAIRS:
        for side, number in (("w", won), ("l", lost)):
            (folder / f"{won}_name" / side).mkdir(parents=True)
            (folder / f"{won}_name" / side / "image.png").write_bytes(png(number))
            (folder / f"{won}_name" / side / "image.caption").write_text(prompt, encoding="utf-8")
    return folder


def webdataset_roles(folder: Path) -> Path:
    members = {}
    for prompt, won, lost in PAIRS:
        text = prompt.encode()
        members |= {f"{won:06d}.chosen.png": png(won), f"{won:06d}.rejected.png": png(lost), f"{won:06d}.txt": text}
    return shard(folder / "pairs.tar", members)


def webdataset_labels(folder: Path) -> Path:
    members = {}
    for prompt, won, lost in PAIRS:
        entry = json.dumps({"prompt": prompt, "label_0": 0, "label_1": 1}).encode()
        members |= {f"{won:06d}.0.png": png(lost), f"{won:06d}.1.png": png(won), f"{won:06d}.json": entry}
    return shard(folder / "pairs.tar", members)


def webdataset_pickapic(folder: Path) -> Path:
    members = {}
    for prompt, won, lost in PAIRS:
        named = {"jpg_0.jpg": png(lost), "jpg_1.jpg": png(won), "label_0.txt": b"0.0", "label_1.txt": b"1.0",
                 "original_prompt.txt": prompt.encode()}  # fmt: skip
        members |= {f"{won}.{name}": content for name, content in named.items()}
    return shard(folder / "00000.tar", members)


def hpdv2_test(folder: Path) -> Path:
    images(folder / "test")
    entries = [
        {"prompt": prompt, "image_path": [f"{number}.png" for number in of], "rank": ranks,
         "raw_annotations": [{"rank": ranks, "user_hash": "u"}]}
        for prompt, of, ranks in RANKINGS
    ]  # fmt: skip
    (folder / "test.json").write_text(json.dumps(entries))
    return folder / "test.json"


def imagereward(folder: Path) -> Path:
    """A row per image; those of a prompt do not follow each other."""
    images(folder / "images" / "train")
    rows = [
        {"image_path": f"images/train/{number}.png", "prompt_id": f"id-{prompt}", "prompt": prompt, "rank": rank,
         "overall_rating": 8 - rank, "image_text_alignment_rating": 3, "fidelity_rating": 4}
        for prompt, of, ranks in RANKINGS
        for number, rank in zip(of, ranks, strict=True)
    ]  # fmt: skip
    return table(folder / "metadata-train.parquet", [rows[place] for place in (0, 3, 1, 4, 2, 5)])


def ranked_jsonl(folder: Path) -> Path:
    images(folder / "p")
    entries = [
        {"prompt": prompt, "images": [f"p/{number}.png" for number in of], "scores": [3 - rank for rank in ranks]}
        for prompt, of, ranks in RANKINGS
    ]
    return lines(folder / "ranked.jsonl", entries)


def ranked_webdataset(folder: Path) -> Path:
    """Two shards below a folder."""
    for place, (prompt, of, ranks) in enumerate(RANKINGS):
        entry = json.dumps({"caption": prompt, "scores": [-rank for rank in ranks]}).encode()
        members = {f"s.{n}.png": png(number) for n, number in enumerate(of)} | {"s.json": entry}
        shard(folder / f"{place:06d}.tar", members)
    return folder


def groups(path: Path, format: str = "auto") -> list[Group]:
    """The groups of a source."""
    return [item for item in read(path, format) if isinstance(item, Group)]


def skips(path: Path, format: str = "auto") -> dict[str, str]:
    """The reasons of a source's rows that cannot be used, by id."""
    return {item.id: item.reason for item in read(path, format) if isinstance(item, Skipped)}


OF_PAIRS: dict[str, Callable[[Path], Path]] = {
    function.__name__: function
    for function in (
        pickapic, double_caption, rapidata, rapidata_counts, hpdv2, hpdv3, jsonl, comma_separated, parquet_pairs,
        vote_counts, demo, folders, kohya, webdataset_roles, webdataset_labels, webdataset_pickapic,
    )
}  # fmt: skip
OF_RANKINGS: dict[str, Callable[[Path], Path]] = {
    function.__name__: function for function in (hpdv2_test, imagereward, ranked_jsonl, ranked_webdataset)
}


def write(folder: Path, name: str) -> Path:
    """Write the example `name` below a folder; the path of the source."""
    target = folder / name
    target.mkdir(parents=True)
    return {**OF_PAIRS, **OF_RANKINGS}[name](target)


if __name__ == "__main__":
    shutil.rmtree(EXAMPLES, ignore_errors=True)
    for example in (*OF_PAIRS, *OF_RANKINGS):
        print(write(EXAMPLES, example).relative_to(EXAMPLES))
