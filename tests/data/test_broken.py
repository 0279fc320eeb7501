"""Whatever is wrong with a source, its rows end as groups, as skips with a reason, or in one clear error."""

from __future__ import annotations

import json
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from t2i_align.data import opening
from t2i_align.data.media import ImageError, decode
from t2i_align.data.readers import read
from t2i_align.data.schema import Group, Skipped
from t2i_align.data.tables import SHARES_TOLERANCE
from t2i_align.errors import UserError
from tests import formats
from tests.formats import OF_PAIRS, OF_RANKINGS, images, png, shard, sheet, table

UNMINDED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]  # of a busy machine
quick = settings(max_examples=30, deadline=None, suppress_health_check=UNMINDED)
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["a fox", "\ud800", "x" * 10_000, "🦊\u200d\u202e", "\x00", "ﷺ" * 300, "a\r\nb", '"', "  "]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)
names = st.sampled_from(["0.png", "1.png", "gone.png", "y" * 300, "../0.png", "/etc/passwd", "a\0b", "loop", "", "."])


def outcome(source: Path, format: str = "auto") -> list[Group | Skipped] | str:
    """The items, or the message of the error; both must say where they are from."""
    try:
        items = list(read(source, format))
    except UserError as error:
        assert source.name in str(error) or str(source.parent) in str(error)
        return str(error)
    for item in items:
        assert item.id and item.origin
        if isinstance(item, Skipped):
            assert item.reason
        else:
            assert item.prompt.strip() and list(item.scores) == sorted(item.scores, reverse=True)
            root = source.parent.resolve()
            assert all(isinstance(c, bytes) or c.is_relative_to(root) for c in item.candidates)
    return items


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    images(folder)
    (folder / "loop").symlink_to(folder / "loop")
    return folder


anything = st.one_of(values, names, st.sampled_from([[1, 0], ["a"], "0", 10**400]))
valid_texts = texts.map(lambda text: text.encode(errors="replace").decode())
json_keys = st.sampled_from(["prompt", "chosen", "rejected", "images", "scores", "captions", "id", "user"])
# Rows of any values, by the table that they are written to. Rows of the last one are grouped.
ROWS = {
    "votes.jsonl": st.fixed_dictionaries({
        "prompt": values, "left": st.one_of(names, values), "right": names,
        "vote": st.one_of(values, st.sampled_from(["left", "tie"])), "user": values}),
    "test.json": st.fixed_dictionaries({
        "prompt": texts, "image_path": st.lists(names, max_size=3), "rank": st.lists(values, max_size=3)}),
    "pairs.jsonl": st.dictionaries(json_keys, st.one_of(values, st.sampled_from(["0.png", ["0.png"], [1.0]]))),
    "a.csv": st.fixed_dictionaries({"prompt": valid_texts, "chosen": names, "rejected": names}),
    "grouped.jsonl": st.fixed_dictionaries({
        "image_path": anything, "rank": anything, "prompt_id": anything, "prompt": anything}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@given(data=st.data(), garbage=st.binary(max_size=20))
@quick
def test_any_rows(folder: Path, name: str, data: st.DataObject, garbage: bytes) -> None:
    """Also where something else follows them in the file."""
    rows = data.draw(st.lists(ROWS[name], min_size=1, max_size=5))
    source = table(folder / name, rows)
    items = outcome(source)
    assert isinstance(items, str) or len(items) == len(rows) or name == "grouped.jsonl"
    source.write_bytes(source.read_bytes() + garbage)
    outcome(source)


@pytest.mark.parametrize(("group", "prompt"), [(1, ["x"]), ("", "x")])
def test_rows_that_cannot_be_grouped(folder: Path, group: object, prompt: object) -> None:
    (item,) = outcome(table(folder / "grouped.jsonl", [
        {"image_path": "0.png", "rank": 1, "prompt_id": group, "prompt": prompt}]))  # fmt: skip
    assert isinstance(item, Skipped)


keys = st.sampled_from(["candidates", "prompt", "scores", "ranks", "votes", "winner", "best_first", "captions", "user",
                        "id", "group", "folder"])  # fmt: skip
any_value = st.one_of(values, st.sampled_from(["left", ["left", "right"], True, "..", "y" * 300]))
parts = st.fixed_dictionaries(
    {}, optional={"format": any_value, "pairs": any_value, "ties": any_value, "part": any_value, "path": any_value}
)


@given(columns=st.dictionaries(keys, any_value, max_size=5), others=parts)
@example(columns={"candidates": "left"}, others={})
@quick
def test_any_source_file(folder: Path, columns: dict[str, Any], others: dict[str, Any]) -> None:
    sheet(folder / "t.csv", [{"left": "0.png", "right": "1.png", "prompt": "x"}])
    (folder / "s.yaml").write_text(json.dumps({"path": "t.csv", "columns": columns, **others}))  # which is YAML as well
    outcome(folder / "s.yaml")


numbers = st.one_of(st.none(), st.floats(), st.floats(0, 1), st.integers(-3, 9).map(float))
rows_of_shares = st.tuples(st.one_of(st.none(), texts), st.one_of(st.none(), st.binary(max_size=9)), numbers, numbers,
                           st.one_of(st.none(), st.booleans()))  # fmt: skip


@pytest.mark.parametrize("names", ["jpg_0 jpg_1 caption label_0 label_1 has_label",
                                   "image1 image2 prompt votes_image1 votes_image2 ignored"])  # fmt: skip
@given(rows=st.lists(rows_of_shares, min_size=1, max_size=8), complement=st.booleans())
@quick
def test_any_shares_of_votes(folder: Path, names: str, rows: list[Any], complement: bool) -> None:
    """Pick-a-Pic's labels, which add up to 1, and Rapidata's votes: every row is a group or a skip, as it should be."""
    prompts, images, first, second, judged = zip(*rows, strict=True)
    if complement:
        second = tuple(None if one is None else 1 - one for one in first)
    clean = [prompt if prompt is None else prompt.encode(errors="replace").decode() for prompt in prompts]
    types = [pa.binary(), pa.binary(), pa.string(), pa.float64(), pa.float64(), pa.bool_()]
    columns = [images, [b"x"] * len(rows), clean, first, second, judged]
    table = {name: pa.array(values, type) for name, values, type in zip(names.split(), columns, types, strict=True)}
    source = folder / "a.parquet"
    pq.write_table(pa.table(table), source)
    items = outcome(source)
    assert isinstance(items, list) and [item.id for item in items] == [f"a.parquet:{row}" for row in range(len(rows))]
    for item, prompt, image, one, two, known in zip(items, clean, images, first, second, judged, strict=True):
        fine = all(share is not None and 0 <= share < float("inf") for share in (one, two)) and one + two > 0
        if "has_label" in names:
            fine = fine and abs(one + two - 1) <= SHARES_TOLERANCE and known is not False
        assert isinstance(item, Group) == bool(fine and image and prompt and prompt.strip())
        if isinstance(item, Group):
            assert item.scores[0] >= item.scores[1]
            assert item.candidates == ((image, b"x") if one >= two else (b"x", image))


@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_RANKINGS])
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3))
@example(cut=0.0625, flips=[])  # a source file that ends after its first key
@settings(max_examples=12, deadline=None, suppress_health_check=UNMINDED)
def test_every_format_damaged_anywhere(
    tmp_path_factory: pytest.TempPathFactory, name: str, cut: float, flips: list[tuple[float, int]]
) -> None:
    """Bytes changed and the file cut short: no other exception than UserError, and no image in another's place."""
    source = formats.write(tmp_path_factory.mktemp("cut"), name)
    damaged = source
    if source.is_dir():
        damaged = next(iter(sorted(file for file in source.rglob("*") if file.suffix in (".txt", ".caption", ".tar"))))
    content = bytearray(damaged.read_bytes())
    for place, change in flips:
        content[min(int(place * len(content)), len(content) - 1)] ^= change
    damaged.write_bytes(content[: max(1, int(cut * len(content)))])
    outcome(source)
    with suppress(UserError):
        opening.survey(source)


@pytest.mark.parametrize("name", ["../secret.png", "{root}/secret.png", "link.png", "sub/../../secret.png", "loop"])
@pytest.mark.parametrize("kind", ["demo.jsonl", "pairs.jsonl", "pairs.csv", "train.json", "pairs.parquet", "a.tar"])
def test_no_format_follows_a_path_out_of_its_folder(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    root = tmp_path / "data"
    images(root)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "loop").symlink_to(root / "loop")
    path = name.format(root=tmp_path)
    source = root / kind
    if kind == "a.tar":  # a name in an archive leads nowhere: nothing is unpacked
        key = path.removesuffix(".png")
        shard(source, {f"{key}.chosen.png": png(0), f"{key}.rejected.png": png(1), f"{key}.txt": b"x"})
        assert [item.candidates for item in read(source) if isinstance(item, Group)] == [(png(0), png(1))]
        return
    paths = {
        "demo.jsonl": {"left": "0.png", "right": path, "vote": "left"},
        "train.json": {"path1": "0.png", "path2": path},
        "pairs.parquet": {"chosen": "0.png", "rejected": {"bytes": None, "path": path}},
    }
    table(source, [{"prompt": "x", **paths.get(kind, {"chosen": "0.png", "rejected": path})}])
    with pytest.raises(UserError, match=rf"{kind}, (line|row|entry) \d: .*(leads outside|not a usable path)"):
        list(read(source))


@pytest.mark.parametrize("kind", ["a.jsonl", "a.csv", "votes.jsonl", "folders", "a.yaml"])
def test_a_name_that_is_too_long_for_a_file(tmp_path: Path, kind: str) -> None:
    images(tmp_path)
    long = "y" * 300
    source = tmp_path / kind
    if kind == "folders":
        for side in ("chosen", "rejected"):
            (source / side).mkdir(parents=True)
            (source / side / f"{long[:250]}.png").write_bytes(png(0))  # the caption's would be too long
    elif kind == "a.yaml":
        source.write_text(f"path: {long}")
    elif kind == "votes.jsonl":
        table(source, [{"prompt": "x", "left": "0.png", "right": long, "vote": "left"}])
    else:
        table(source, [{"prompt": "x", "chosen": "0.png", "rejected": f"{long}.png"}])
    result = outcome(source)
    if kind == "a.yaml":
        assert "no such file or folder" in result
    else:
        (item,) = result
        assert isinstance(item, Skipped) and ("no such image" in item.reason or "no caption" in item.reason)
        assert opening.survey(source).identity


def test_text_that_is_not_utf8_in_parquet(tmp_path: Path) -> None:
    """Row 1 of two, "\\xff"; Arrow's files do not check it."""
    offsets, text = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0])), pa.py_buffer(b"ok\xff")
    prompts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, text])
    rest = {"jpg_0": [png(0)] * 2, "jpg_1": [png(1)] * 2, "label_0": [1.0] * 2, "label_1": [0.0] * 2}
    pairs = {"prompt": prompts, "chosen": [png(0)] * 2, "rejected": [png(1)] * 2}
    for columns in ({"caption": prompts, **rest}, pairs):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert "a.parquet: cannot be read after row 0" in outcome(tmp_path / "a.parquet")


def test_values_that_python_cannot_hold(tmp_path: Path) -> None:
    """A nanosecond after 1970, in a column that names users."""
    users = pa.array([1], pa.timestamp("ns"))
    row = {"prompt": ["x"], "chosen": [png(0)], "rejected": [png(1)]}
    pq.write_table(pa.table({**row, "user": users}), tmp_path / "a.parquet")
    (skipped,) = outcome(tmp_path / "a.parquet")
    assert "'user' must be text or number" in skipped.reason


def test_columns_of_the_same_name_in_parquet(tmp_path: Path) -> None:
    arrays = [pa.array(["x"]), pa.array(["y"]), pa.array([png(0)]), pa.array([png(1)])]
    pq.write_table(pa.Table.from_arrays(arrays, ["prompt", "prompt", "chosen", "rejected"]), tmp_path / "a.parquet")
    assert "two columns of the same name" in outcome(tmp_path / "a.parquet")


def test_keys_that_are_there_twice(tmp_path: Path) -> None:
    images(tmp_path)
    twice = '{"prompt": "x", "chosen": "0.png", "rejected": "1.png", "chosen": "1.png"}'
    (tmp_path / "a.jsonl").write_text(twice)
    (tmp_path / "a.json").write_text(f"[{twice}]")
    for file in ("a.jsonl, line 1", "a.json"):
        assert f"{file}: not valid JSON: the key 'chosen' is there twice" in outcome(tmp_path / file.split(",")[0])
    shard(tmp_path / "a.tar", {"0.0.png": png(0), "0.1.png": png(1), "0.json": b'{"scores": [0, 1], "scores": [1, 0]}'})
    assert "the key 'scores' is there twice" in str(outcome(tmp_path / "a.tar"))


@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_RANKINGS])
def test_files_that_windows_wrote_say_the_same(tmp_path: Path, name: str) -> None:
    """With a mark of the order of bytes and other ends of lines."""

    def said(source: Path) -> list[Any]:
        groups = formats.groups(source)
        contents = [[one if isinstance(one, bytes) else one.read_bytes() for one in g.candidates] for g in groups]
        return [(group.prompt, group.scores, content) for group, content in zip(groups, contents, strict=True)]

    plain = said(formats.write(tmp_path / "plain", name))
    source = formats.write(tmp_path / "windows", name)
    for file in (tmp_path / "windows").rglob("*"):
        if file.suffix in (".json", ".jsonl", ".csv", ".tsv", ".yaml", ".txt", ".caption"):
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert said(source) == plain and len(plain) == 2


def test_a_folder_named_like_a_file(tmp_path: Path) -> None:
    formats.example(tmp_path, "pickapic")
    (tmp_path / "all.parquet").mkdir()
    (tmp_path / "train.parquet").rename(tmp_path / "all.parquet" / "part-0.parquet")
    assert [type(item).__name__ for item in outcome(tmp_path)] == ["Group", "Group"]


def test_a_shard_that_is_a_loop(tmp_path: Path) -> None:
    formats.example(tmp_path, "ranked_webdataset")
    (tmp_path / "000001.tar").unlink()
    (tmp_path / "000001.tar").symlink_to(tmp_path / "000001.tar")
    (tmp_path / "up").symlink_to(tmp_path)
    assert "000001.tar: not a regular file" in outcome(tmp_path)


def test_decompression_bomb_is_refused() -> None:
    """40,000 x 40,000 pixels of one colour in some kilobytes: 1.6 billion pixels, of which none is unpacked."""
    side = 40_000
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    content = zlib.compress(bytes(100_000))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    assert len(bomb) < 1000
    with pytest.raises(ImageError, match="pixels"):
        decode(bomb)
