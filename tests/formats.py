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
from tests.data.test_examples import colour, write_jsonl

EXAMPLES = Path(__file__).parent / "data"
PAIRS = [("a red fox", 0, 1), ("a blue owl, « à l'aube »", 2, 3)]  # prompt, better, worse
RANKINGS = [("a red fox", [0, 1, 2], [1, 2, 2]), ("a blue owl", [5, 4, 3], [1, 2, 3])]  # prompt, images, ranks


def encoded(number: int, format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), colour(number)).save(stream, format)
    return stream.getvalue()


def png(number: int) -> bytes:
    return encoded(number, "PNG")


def images(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))


def sheet(file: Path, entries: list[dict[str, Any]]) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(entries[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(entries)
    return file


def table(file: Path, entries: list[dict[str, Any]]) -> Path:
    """A table of any kind, by its ending."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(entries), file)
        return file
    if file.suffix == ".json":
        file.write_text(json.dumps(entries))
        return file
    return (write_jsonl if file.suffix == ".jsonl" else sheet)(file, entries)


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file


def embedded(number: int) -> dict[str, Any]:
    """An image as `datasets` writes it."""
    return {"bytes": png(number), "path": None}


RAPIDATA = [f"weighted_results_image{n}_preference" for n in (1, 2)]
Entry = Callable[[str, int, int], dict[str, Any]]
# A table: its name, the folder of its images where it has paths, and a row of prompt, better and worse image.
TABLES: dict[str, tuple[str, str | None, Entry]] = {
    "pickapic": ("train.parquet", None, lambda prompt, won, lost: {
        "jpg_0": png(lost), "jpg_1": png(won), "caption": prompt, "label_0": 0.0, "label_1": 1.0, "ranking_id": won}),
    "double_caption": ("train.parquet", None, lambda prompt, won, lost: {
        "jpg_0": png(won), "jpg_1": png(lost), "caption_0": prompt, "caption_1": "a failure", "label_0": 1,
        "label_1": 0}),
    "rapidata": ("train.parquet", None, lambda prompt, won, lost: {
        "prompt": prompt, "image1": {**embedded(won), "path": "w.png"}, "image2": embedded(lost), "model1": "flux",
        RAPIDATA[0]: 0.7, RAPIDATA[1]: 0.3}),
    "rapidata_counts": ("train_0001-00000-of-00001.parquet", None, lambda prompt, won, lost: {
        "prompt": prompt, "image1": embedded(lost), "image2": embedded(won), "votes_image1": 8, "votes_image2": 18,
        "detailed_results": "[]", "image1_path": "l.png"}),
    "hpdv2": ("train.json", "train", lambda prompt, won, lost: {
        "human_preference": [0, 1], "prompt": prompt, "file_path": [f"{lost}.png", f"{won}.png"]}),
    "hpdv3": ("train.json", "images", lambda prompt, won, lost: {
        "prompt": prompt, "path1": f"images/{won}.png", "path2": f"images/{lost}.png", "confidence": 0.9,
        "choice_dist": [9, 1], "model1": "flux", "model2": "kolors"}),
    "jsonl": ("pairs.jsonl", "p", lambda prompt, won, lost: {
        "prompt": prompt, "chosen": f"p/{won}.png", "rejected": f"p/{lost}.png"}),
    "comma_separated": ("pairs.csv", "p", lambda prompt, won, lost: {
        "prompt": prompt, "chosen": f"p/{won}.png", "rejected": f"p/{lost}.png"}),
    "parquet_pairs": ("pairs.parquet", None, lambda prompt, won, lost: {
        "prompt": prompt, "chosen": png(won), "rejected": png(lost)}),
    "demo": ("votes.jsonl", "p", lambda prompt, won, lost: {
        "prompt": prompt, "left": f"p/{lost}.png", "right": f"p/{won}.png", "vote": "right", "user": "anna"}),
    "vote_counts": ("votes.tsv", "p", lambda prompt, won, lost: {
        "text": prompt, "left": f"{lost}.png", "right": f"{won}.png", "for_left": 2, "for_right": 7}),
}  # fmt: skip
# A webdataset shard: its name, and the members of a sample.
SHARDS: dict[str, tuple[str, Entry]] = {
    "webdataset_roles": ("pairs.tar", lambda prompt, won, lost: {
        f"{won:06d}.chosen.png": png(won), f"{won:06d}.rejected.png": png(lost), f"{won:06d}.txt": prompt.encode()}),
    "webdataset_labels": ("pairs.tar", lambda prompt, won, lost: {
        f"{won:06d}.0.png": png(lost), f"{won:06d}.1.png": png(won),
        f"{won:06d}.json": json.dumps({"prompt": prompt, "label_0": 0, "label_1": 1}).encode()}),
    "webdataset_pickapic": ("00000.tar", lambda prompt, won, lost: {
        f"{won}.jpg_0.jpg": png(lost), f"{won}.jpg_1.jpg": png(won), f"{won}.label_0.txt": b"0.0",
        f"{won}.label_1.txt": b"1.0", f"{won}.original_prompt.txt": prompt.encode()}),
}  # fmt: skip


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


def hpdv2_test(folder: Path) -> Path:
    images(folder / "test")
    return table(folder / "test.json", [
        {"prompt": prompt, "image_path": [f"{number}.png" for number in of], "rank": ranks,
         "raw_annotations": [{"rank": ranks, "user_hash": "u"}]}
        for prompt, of, ranks in RANKINGS
    ])  # fmt: skip


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
    return table(folder / "ranked.jsonl", [
        {"prompt": prompt, "images": [f"p/{number}.png" for number in of], "scores": [3 - rank for rank in ranks]}
        for prompt, of, ranks in RANKINGS
    ])  # fmt: skip


def ranked_webdataset(folder: Path) -> Path:
    """Two shards below a folder."""
    for place, (prompt, of, ranks) in enumerate(RANKINGS):
        entry = json.dumps({"caption": prompt, "scores": [-rank for rank in ranks]}).encode()
        members = {f"s.{n}.png": png(number) for n, number in enumerate(of)} | {"s.json": entry}
        shard(folder / f"{place:06d}.tar", members)
    return folder


def groups(path: str | Path, format: str = "auto") -> list[Group]:
    """The groups of a source."""
    return [item for item in read(path, format) if isinstance(item, Group)]


def skips(path: str | Path, format: str = "auto") -> dict[str, str]:
    """The reasons of a source's rows that cannot be used, by id."""
    return {item.id: item.reason for item in read(path, format) if isinstance(item, Skipped)}


FUNCTIONS = {
    function.__name__: function
    for function in (folders, kohya, hpdv2_test, imagereward, ranked_jsonl, ranked_webdataset)
}
OF_PAIRS = [*TABLES, *SHARDS, "folders", "kohya"]
OF_RANKINGS = ["hpdv2_test", "imagereward", "ranked_jsonl", "ranked_webdataset"]


def write(folder: Path, name: str) -> Path:
    """Write the example `name` into a folder of this name; the path of the source."""
    target = folder / name
    target.mkdir(parents=True)
    return example(target, name)


def example(folder: Path, name: str) -> Path:
    """Write the example `name` into a folder; the path of the source."""
    if name in FUNCTIONS:
        return FUNCTIONS[name](folder)
    if name in SHARDS:
        file, sample = SHARDS[name]
        members = {key: content for pair in PAIRS for key, content in sample(*pair).items()}
        return shard(folder / file, members)
    file, images_folder, row = TABLES[name]
    if images_folder is not None:
        images(folder / images_folder)
    source = table(folder / file, [row(*pair) for pair in PAIRS])
    if name != "vote_counts":
        return source
    spec = folder / "votes.yaml"  # a dataset spec says what the columns of a sheet of one's own hold
    columns = "{candidates: [left, right], votes: [for_left, for_right], prompt: text, folder: p}"
    spec.write_text(f"path: votes.tsv\ncolumns: {columns}\n")
    return spec


if __name__ == "__main__":
    shutil.rmtree(EXAMPLES, ignore_errors=True)
    for name in (*OF_PAIRS, *OF_RANKINGS):
        print(write(EXAMPLES, name).relative_to(EXAMPLES))
