"""Every format comes to the same groups; columns, source files and splits do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2i_align.data import opening, readers
from t2i_align.data.media import decode
from t2i_align.data.readers import read
from t2i_align.data.schema import Columns, Group
from t2i_align.errors import UserError
from tests import formats
from tests.data.test_examples import colour, write_images, write_jsonl
from tests.formats import OF_PAIRS, OF_RANKINGS, PAIRS, RANKINGS, groups, images, png, shard, sheet, skips, table


def seen(group: Group) -> list[int]:
    """The numbers of a group's images, by their colours."""
    known = {colour(number): number for number in range(6)}
    return [known[decode(media).getpixel((0, 0))] for media in group.candidates]  # type: ignore[index]


@pytest.mark.parametrize("name", [*OF_PAIRS, *OF_RANKINGS])
def test_every_format_comes_to_the_same_groups(tmp_path: Path, name: str) -> None:
    """As written here and as kept under tests/data, recognised without the name of its format."""
    if name in OF_PAIRS:
        expected = {prompt: [won, lost] for prompt, won, lost in PAIRS}
    else:
        expected = {prompt: of for prompt, of, _ in RANKINGS}
    written = formats.write(tmp_path, name)
    for source in (written, formats.EXAMPLES / written.relative_to(tmp_path)):
        by_prompt = {group.prompt: group for group in groups(source)}
        assert {prompt: seen(group) for prompt, group in by_prompt.items()} == expected
        first, second = (by_prompt[prompt].scores for prompt in expected)
        assert first[0] > first[1] == first[-1] and second[0] > second[1] >= second[-1]
        assert name in OF_PAIRS or second[1] > second[2]
        survey = opening.survey(source)
        k = len(first)
        assert (survey.rows, survey.candidates, survey.ties, survey.skips) == (2, {k: 2}, {}, {})


def test_every_format_has_an_example(tmp_path: Path) -> None:
    detected = {readers.detect(formats.write(tmp_path, name)) for name in (*OF_PAIRS, *OF_RANKINGS)}
    # Dataset specs and single images have tests of their own.
    assert detected | {"described", "captioned"} == set(readers.READERS)


def test_captions_users_and_vote_shares_of_formats(tmp_path: Path) -> None:
    """Captions, users and shares of votes; ranks are shares of the others that one beats.

    In the first ranking the best beats both, (1 + 1) / 2, and each of the others half of the other, (0 + 1/2) / 2.
    """
    doubled = groups(formats.write(tmp_path, "double_caption"))
    assert doubled[0].captions == (PAIRS[0][0], "a failure")
    assert [group.user for group in groups(formats.write(tmp_path, "demo"))] == ["anna", "anna"]
    votes = groups(formats.write(tmp_path, "vote_counts"))
    assert votes[0].scores == (7 / 9, 2 / 9)
    assert {group.scores for group in groups(formats.write(tmp_path, "hpdv2_test"))} == {
        (1.0, 0.25, 0.25),
        (1.0, 0.5, 0.0),
    }


@pytest.mark.parametrize(("order", "values"), [("votes", ("3", "0")), ("shares", ("1", "0")), ("shares", ("0", "1"))])
def test_a_candidate_may_have_no_vote(order: str, values: tuple[str, str], tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg"])
    row = {"prompt": "p", "a": "a.jpg", "b": "b.jpg", "of_a": values[0], "of_b": values[1]}
    write_jsonl(tmp_path / "votes.jsonl", [row])
    columns = f"{{candidates: [a, b], {order}: [of_a, of_b]}}"
    (tmp_path / "source.yaml").write_text(f"path: votes.jsonl\ncolumns: {columns}\n")
    (group,) = groups(tmp_path / "source.yaml")
    best = "a.jpg" if values[1] == "0" else "b.jpg"
    assert group.scores == (1.0, 0.0) and Path(str(group.candidates[0])).name == best


def test_candidates_listed_best_first_have_evenly_spread_scores(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])
    lists = ["b.jpg", "a.jpg", "c.jpg"], ["a.jpg"]
    write_jsonl(tmp_path / "lists.jsonl", [{"text": "p", "files": files} for files in lists])
    columns = "{prompt: text, candidates: files, best_first: true}"
    (tmp_path / "source.yaml").write_text(f"path: lists.jsonl\ncolumns: {columns}\n")
    ranking, single = groups(tmp_path / "source.yaml")
    assert (ranking.scores, single.scores) == ((1.0, 0.5, 0.0), (1.0,))
    assert [path.name for path in ranking.candidates] == ["b.jpg", "a.jpg", "c.jpg"]


def test_ties_and_pairs_by_choice(tmp_path: Path) -> None:
    source = formats.write(tmp_path, "hpdv2_test")
    described = tmp_path / "source.yaml"
    described.write_text("path: hpdv2_test/test.json\npairs: all\nties: false\n")
    result = groups(described)
    assert source.exists() and [seen(group) for group in result] == [[0, 1], [0, 2], [5, 4], [5, 3], [4, 3]]
    assert skips(described) == {"test.json:0#1-2": "a tie"}
    described.write_text("path: hpdv2_test/test.json\npairs: best_worst\n")
    assert [seen(group) for group in groups(described)] == [[0, 2], [5, 3]]


def test_a_vote_names_its_winner(tmp_path: Path) -> None:
    images(tmp_path / "p")
    choices = ["left", "right", "tie", "0", "1", "p/1.png", "p/5.png", None, "both"]
    entries = [{"prompt": "x", "left": "p/0.png", "right": "p/1.png", "vote": vote, "user": 3} for vote in choices]
    source = write_jsonl(tmp_path / "votes.jsonl", entries)
    scores = {group.id: (seen(group)[0], group.scores[0]) for group in groups(source)}
    expected = [(0, 1.0), (1, 1.0), (0, 0.5), (0, 1.0), (1, 1.0), (1, 1.0), None, None, (0, 0.5)]
    assert scores == {f"votes.jsonl:{n}": want for n, want in enumerate(expected, 1) if want}
    assert "'vote' must be left or right or 0 to 1 or tie or neither, found 'p/5.png'" in skips(source)["votes.jsonl:7"]


@pytest.mark.parametrize("votes", [(1, 2), ("1", "2"), (1.0, 2.0), ("0", "2"), ("left", " 2 ")])
def test_places_that_count_from_one_are_an_error(tmp_path: Path, votes: tuple[Any, Any]) -> None:
    """A 2 among two proves that a 1 means the first: every other row would be turned round."""
    images(tmp_path / "p")
    entries = [{"prompt": "x", "left": "p/0.png", "right": "p/1.png", "vote": vote} for vote in votes]
    for name in ("votes.jsonl", "votes.csv"):
        source = table(tmp_path / name, entries)
        advice = r"If this source counts from 1, subtract 1, or name columns or paths\.$"
        with pytest.raises(UserError, match=rf"(line 2|row 1): 'vote' is 2(\.0)?, but .* from 0 to 1\. {advice}"):
            opening.survey(source, "demo")


def test_rows_of_tables_are_skipped_with_their_reason(tmp_path: Path) -> None:
    images(tmp_path)
    row = {"prompt": "x", "images": '["0.png", "1.png"]', "scores": "[1, 2]"}
    changed = [
        ({}, ""),
        ({"prompt": ""}, "no 'prompt'"),
        ({"images": ""}, "1 candidates, but 2 scores"),
        ({"images": "[0"}, "'images' is not a list"),
        ({"images": '["0.png", "gone.png"]'}, "no such image: gone.png"),
        ({"scores": "[1, NaN]"}, "'scores' [1] must be a finite number, found nan"),
        ({"scores": '[1, "best"]'}, "'scores' [1] must be a finite number, found 'best'"),
        ({"images": "[]", "scores": "[]"}, "no candidates"),
    ]
    source = sheet(tmp_path / "a.csv", [{**row, **change} for change, _ in changed])
    with open(source, "a") as stream:
        stream.write('only one field\n"and, one", [2], 3, 4\n')
    reasons = skips(source)
    for number, (_, reason) in enumerate(changed):
        assert reasons.get(f"a.csv:{number}", "").startswith(reason) and (f"a.csv:{number}" in reasons) == bool(reason)
    assert reasons["a.csv:8"] == "1 fields, but 3 columns" and reasons["a.csv:9"] == "4 fields, but 3 columns"


GOOD = b'{"prompt": "x", "chosen": "0.png", "rejected": "1.png"}'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"prompt,chosen,chosen\n", "two columns of the same name"),
        ("a.csv", b"prompt,chosen,rejected\n", "no rows in it"),
        ("a.csv", b"prompt,chosen,rejected\n\xff,a,b\n", "not UTF-8 text"),
        ("a.csv", b'prompt,chosen,rejected\n"x,0.png,1.png\n', "not valid CSV"),
        ("a.csv", b"text,left,right\nx,0.png,1.png\n", "Its columns: text, left, right; a dataset spec"),
        ("a.csv", b"prompt,chosen,rejected\nx,0.png,../1.png\n", "leads outside"),
        ("a.parquet", b"", "the file is empty"),
        ("a.parquet", b"hello", "not a readable parquet"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n\n", "no rows in it"),
        ("a.jsonl", GOOD + b"\n{not json\n", "line 2: not valid JSON"),
        ("a.jsonl", GOOD + b"\n[1, 2]\n", "line 2: expected an object"),
        ("a.jsonl", GOOD + b"\n\xff\n", "line 2: not valid JSON"),
        ("a.jsonl", GOOD + b"\n" + b"[" * 100_000, "line 2: not valid JSON"),
        ("a.json", b"[]", "no rows in it"),
    ],
    # pytest escapes backslashes once more when a process collects again, as mutmut does, which then finds no such test.
    ids=lambda value: str(value)[:40].replace("\\", "|"),
)
def test_tables_that_are_broken(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    images(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{expected}"):
        list(read(tmp_path / name))


def test_a_group_column_gathers_rows(tmp_path: Path) -> None:
    images(tmp_path)
    rows = [
        {"prompt": "x", "image_path": "0.png", "rank": 1, "prompt_id": "a"},
        {"prompt": "x", "image_path": "1.png", "rank": 2, "prompt_id": "b"},
        {"prompt": "y", "image_path": "2.png", "rank": 2, "prompt_id": "a"},
        {"prompt": "x", "image_path": "3.png", "rank": 1, "prompt_id": None},
        {"prompt": "x", "image_path": "4.png", "rank": 1, "prompt_id": "b"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    assert [(group.id, seen(group), group.scores) for group in groups(source)] == [("b", [4, 1], (1.0, 0.0))]
    assert skips(source) == {"a.jsonl:4": "no 'prompt_id'", "a": "its 2 rows have different prompts"}
    source = table(tmp_path / "a.parquet", [{**rows[0], "image_path": png(0)}])
    with pytest.raises(
        UserError, match=r"a\.parquet, row 0: with a group column, images must be paths, not part of the"
    ):
        list(read(source))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path: gone.csv", "no such file or folder"),
        ("format: auto", "missing key"),
        ("path: a.csv\ncolour: red", "colour: unknown key"),
        ("path: a.csv\ncolumns: {usr: x}", "unknown key in columns 'usr'. Did you mean 'user'. Choices: .*captions"),
        ("path: a.csv\ncolumns: {own_names: true}", "unknown key in columns 'own_names'"),
        ("path: a.csv\ncolumns: {candidates: [left, right]}", "exactly one of .* found none"),
        ("path: a.csv\ncolumns: {candidates: x, scores: s, ranks: r}", "exactly one of .* found scores, ranks"),
        ("path: a.csv\ncolumns: {candidates: [left, right], scores: [s]}", "scores names 1 columns"),
        (
            "path: a.csv\ncolumns: {candidates: [left, right], winner: won, prompt: text}",
            r"'won' is missing. Columns found: text, left, right\. A dataset spec can say which column holds",
        ),
        (
            "path: a.csv\ncolumns: {candidates: [left, right], best_first: true, prompt: null}",
            "columns: prompt names no column, and there are no captions that could stand in for it$",
        ),
        (
            "path: a.csv\ncolumns: {candidates: left, winner: text, group: text}",
            "columns: with group, candidates is one column and scores, ranks or votes another$",
        ),
        ("path: a.csv\npart: {of: train, held_out: 2}", "part.held_out must be a number in .0, 1., found 2"),
        ("path: s.yaml", "a dataset spec itself"),
        ("path: loop", "'loop' is not a usable path"),
        ('path: "a\\0b"', r"'a\\x00b' is not a usable path"),
        ("path: ~unheard-of/x", "no such file or folder"),
        ("{", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("path: hub:nobody", "expected hub:owner/name"),
    ],
)
def test_source_files_that_are_wrong(tmp_path: Path, text: str, expected: str) -> None:
    sheet(tmp_path / "a.csv", [{"text": "x", "left": "0.png", "right": "1.png"}])
    (tmp_path / "s.yaml").write_text(text)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=expected):
        list(read(tmp_path / "s.yaml"))


def test_columns_that_do_not_exist() -> None:
    with pytest.raises(UserError, match=r"^unknown column 'usr'\. Did you mean 'user'"):
        Columns(candidates="images", scores="scores", columns={"usr": "who", "zone": "where"})


def test_webdataset_samples_that_cannot_be_used(tmp_path: Path) -> None:
    png = formats.png(0)
    good = {"chosen.png": png, "rejected.png": png, "txt": b"x"}
    bad = {
        "b": ({"json": b"{"}, "not valid JSON"),
        "c": ({"txt": b"\xff"}, "not UTF-8"),
        "d": ({"json": b"[1]"}, "expected an object"),
        "e": ({"rejected.png": b""}, "an image is missing"),
        "f": ({"txt": b" "}, "no 'prompt'"),
    }
    members = {f"a.{name}": content for name, content in good.items()}
    for key, (change, _) in bad.items():
        members |= {f"{key}.{name}": content for name, content in {**good, **change}.items()}
    source = shard(tmp_path / "a.tar", members)
    assert [group.id for group in groups(source)] == ["a.tar:a"]
    reasons = skips(source)
    for key, (_, reason) in bad.items():
        assert reason in reasons[f"a.tar:{key}"]
    whole = source.read_bytes()
    for length in (1536, 3000, 4096):  # between two members, within one, and at a boundary again
        source.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar: cannot be read as a tar file"):
            list(read(source))
    source.write_bytes(b"no tar")
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        list(read(source))


def test_a_clip_is_a_file_or_a_folder_of_frames(tmp_path: Path) -> None:
    for side in ("chosen", "rejected"):
        images(tmp_path / side / "running", 2)
        (tmp_path / side / "jumping.mp4").write_bytes(b"a clip")
        for name in ("running", "jumping"):
            (tmp_path / side / f"{name}.txt").write_text(name)
    (tmp_path / "chosen" / "empty").mkdir()
    result = {group.prompt: group for group in groups(tmp_path)}
    assert result["running"].candidates == (tmp_path / "chosen" / "running", tmp_path / "rejected" / "running")
    assert result["jumping"].candidates[0] == tmp_path / "chosen" / "jumping.mp4"
    assert skips(tmp_path)["chosen/empty"].startswith("a folder without frames")
    entry = {"prompt": "x", "chosen": "chosen/running", "rejected": "rejected/jumping.mp4"}
    source = write_jsonl(tmp_path / "clips.jsonl", [entry])
    assert groups(source)[0].candidates[0] == tmp_path / "chosen" / "running"
    before = opening.survey(source, "jsonl").identity
    (tmp_path / "chosen" / "running" / "1.png").write_bytes(b"another frame")
    assert opening.survey(source, "jsonl").identity != before


def test_a_dataset_spec_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    source = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "chosen": "0.png", "rejected": "1.png"}])
    images(tmp_path)
    spec = tmp_path / "s.yaml"
    for format in ("mine.py:votes", f"{tmp_path}/mine.py:votes", "mine.py:jsonl"):
        spec.write_text(f"path: {source.name}\nformat: {format}\n")
        with pytest.raises(UserError, match=r"s\.yaml: format: a dataset spec may come with data from anywhere"):
            groups(spec)
    assert not (tmp_path / "ran").exists()


def test_a_data_set_in_the_hubs_cache_is_read_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `huggingface_hub` keeps it: links from the snapshot to the files, which lie outside of it."""
    for name, value in {
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    cached = tmp_path / "hub" / "datasets--someone--pairs"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    source = formats.write(cached / "blobs", "folders")
    for file in filter(Path.is_file, source.rglob("*")):
        link = cached / "snapshots" / ("0" * 40) / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    assert [seen(group) for group in groups("hub:someone/pairs")] == [[won, lost] for _, won, lost in PAIRS]
    with pytest.raises(UserError, match="hub:someone/others: cannot be downloaded"):
        groups("hub:someone/others")


def test_a_format_in_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from t2i_align.data.readers import register\n"
        "from t2i_align.data.schema import Group\n"
        "@register('lines')\n"
        "def read(path):\n"
        "    for n, text in enumerate(path.read_text().splitlines()):\n"
        "        yield Group(id=str(n), prompt=text, candidates=(b'a', b'b'), scores=(0.0, 1.0), origin=str(n))\n"
    )
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    result = groups(tmp_path / "a.txt", f"{tmp_path}/mine.py:lines")
    assert [(group.prompt, group.candidates) for group in result] == [("one", (b"b", b"a")), ("two", (b"b", b"a"))]
    with pytest.raises(UserError, match=r"gone\.py: no such file"):
        read(tmp_path / "a.txt", f"{tmp_path}/gone.py:lines")
