"""Votes on disk: what is read as a preference, what survives, and that nothing is lost or mixed."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from t2i_align.data import readers
from t2i_align.data.schema import Group
from t2i_align.demo.pairs import pairs_of
from t2i_align.demo.report import report
from t2i_align.demo.votes import CHOICES, Votes, segment_columns
from t2i_align.errors import UserError
from tests.demo.conftest import generated
from tests.runs import image, jsonl_clips


def groups(file: Path) -> list[Group]:
    items = list(readers.read(file))
    assert all(isinstance(item, Group) for item in items), items
    return [item for item in items if isinstance(item, Group)]


def vote_on_all(votes: Votes, user: str, choice: str) -> int:
    count = 0
    while pair := votes.next(user):
        assert votes.vote(user, pair, choice)
        count += 1
    return count


def test_votes_are_preferences_and_ties_are_none(tmp_path: Path) -> None:
    with Votes.opened(tmp_path / "demo") as votes:
        votes.offer(pairs_of([generated(tmp_path / "images", prompts=4)]))
        liked = {}
        for choice in CHOICES:
            pair = votes.next("anna")
            assert pair and votes.vote("anna", pair, choice)
            liked[pair.prompt] = pair.left if choice == "left" else pair.right if choice == "right" else None
    read = groups(tmp_path / "demo" / "votes.jsonl")
    assert {group.user for group in read} == {"anna"} and len({group.id for group in read}) == 4
    for group, choice in zip(read, CHOICES, strict=True):
        assert group.is_tie == (choice in ("tie", "neither"))
        if not group.is_tie:
            assert group.scores == (1.0, 0.0)
            assert isinstance(group.candidates[0], Path) and group.candidates[0].name == liked[group.prompt]
    assert {group.scores for group in read if group.is_tie} == {(0.5, 0.5), (0.0, 0.0)}


def test_each_user_has_an_order_and_sides_of_their_own_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    source = pairs_of([generated(tmp_path / "images", prompts=20)])
    seen: dict[str, list[tuple[str, str]]] = {}
    for half in range(2):
        with Votes.opened(tmp_path / "demo") as votes:
            votes.offer(source)
            for user in ("anna", "ben"):
                assert votes.progress(user) == (10 * half, 20)
                for _ in range(10):
                    pair = votes.next(user)
                    assert pair and pair == votes.next(user)  # a reload shows the same pair on the same sides
                    votes.vote(user, pair, "left")
                    seen.setdefault(user, []).append((pair.id, pair.left))
    assert all(len(dict(pairs)) == 20 for pairs in seen.values())
    assert [key for key, _ in seen["anna"]] != [key for key, _ in seen["ben"]]
    assert dict(seen["anna"]) != dict(seen["ben"])


def test_a_second_vote_on_a_pair_does_not_count_and_undo_takes_the_last_back(tmp_path: Path) -> None:
    with Votes.opened(tmp_path / "demo") as votes:
        votes.offer(pairs_of([generated(tmp_path / "images")]))
        first = votes.next("anna")
        assert first and votes.vote("anna", first, "left") and not votes.vote("anna", first, "right")
        other = votes.next("ben")
        assert other and votes.vote("ben", other, "tie")
        assert votes.undo("anna") and not votes.undo("anna")
        assert votes.next("anna") == first
    assert [group.user for group in groups(tmp_path / "demo" / "votes.jsonl")] == ["ben"]


@pytest.mark.parametrize(
    ("user", "choice", "problem"),
    [
        ("", "left", "user name"),
        ("x" * 65, "left", "user name"),
        ("a\x1b[2J", "left", "user name"),
        ("a", "up", "vote"),
    ],
)
def test_votes_that_cannot_be_recorded_are_refused(tmp_path: Path, user: str, choice: str, problem: str) -> None:
    with Votes.opened(tmp_path / "demo") as votes:
        votes.offer(pairs_of([generated(tmp_path / "images")]))
        pair = votes.next("anna")
        assert pair
        with pytest.raises(UserError, match=problem):
            votes.vote(user, pair, choice)
    assert not (tmp_path / "demo" / "votes.jsonl").exists()


def test_votes_survive_a_kill_at_any_time(tmp_path: Path) -> None:
    """A process votes until it is killed: whatever it has acknowledged is there, and half a line is cut off."""
    source, out = generated(tmp_path / "images", prompts=300), tmp_path / "demo"
    pairs = pairs_of([source])
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with Votes.opened(out) as votes:
            votes.offer(pairs)
            while pair := votes.next("anna"):
                votes.vote("anna", pair, "left")
                os.write(writing, f"{pair.id}\n".encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as acknowledgements:
        acknowledged = [acknowledgements.readline().strip() for _ in range(20)]
        os.kill(child, signal.SIGKILL)
        acknowledged += acknowledgements.read().split()
    os.waitpid(child, 0)
    with open(out / "votes.jsonl", "ab") as file:
        file.write(b'{"id": "half')
    with Votes.opened(out) as votes:
        assert {*acknowledged} <= {row["pair"] for row in votes.snapshot()}
        votes.offer(pairs)
        pair = votes.next("anna")
        assert pair and votes.vote("anna", pair, "right")
    assert len(groups(out / "votes.jsonl")) >= 21


def test_a_vote_that_cannot_be_written_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Votes.opened(tmp_path / "demo") as votes:
        votes.offer(pairs_of([generated(tmp_path / "images")]))
        first = votes.next("anna")
        assert first and votes.vote("anna", first, "left")
        second = votes.next("anna")
        assert second

        def full(file: Path) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("t2i_align.demo.votes.sync_file", full)
            with pytest.raises(OSError, match="No space"):
                votes.vote("anna", second, "left")
        assert votes.next("anna") == second and votes.vote("anna", second, "right")
    assert len(groups(tmp_path / "demo" / "votes.jsonl")) == 2


def test_users_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    """20 threads; each user likes one side of their own, by which their votes are known again."""
    with Votes.opened(tmp_path / "demo") as votes:
        votes.offer(pairs_of([generated(tmp_path / "images", prompts=30)]))
        start = threading.Barrier(20)

        def work(number: int) -> int:
            start.wait()
            return vote_on_all(votes, f"user {number}", CHOICES[number % 4])

        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(work, range(20))) == [30] * 20
    rows = [json.loads(line) for line in (tmp_path / "demo" / "votes.jsonl").read_text().splitlines()]
    assert len(rows) == 600 == len({row["id"] for row in rows})
    assert all(row["vote"] == CHOICES[int(row["user"].split()[1]) % 4] for row in rows)
    assert len(groups(tmp_path / "demo" / "votes.jsonl")) == 600


def test_a_folder_of_something_else_and_a_second_demo_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"), Votes.opened(tmp_path / "other"):
        pass
    with (
        Votes.opened(tmp_path / "demo"),
        pytest.raises(UserError, match="another run"),
        Votes.opened(tmp_path / "demo"),
    ):
        pass


# Where pairs come from --------------------------------------------------------------------------------------------


def test_pairs_of_several_folders_are_of_the_same_prompt_and_seed(tmp_path: Path) -> None:
    for name, first in (("base", 0), ("tuned", 50)):
        generated(tmp_path / name, first=first)
    pairs = pairs_of([tmp_path / "base", tmp_path / "tuned"])
    assert len(pairs) == 6 and {pair.models for pair in pairs} == {("base", "tuned")}
    assert all(isinstance(m, Path) for pair in pairs for m in pair.media)
    assert all(Path(str(pair.media[0])).name == Path(str(pair.media[1])).name for pair in pairs)


def test_images_with_captions_and_preference_data_give_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for index in range(4):
        image(index).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a fox" if index < 3 else "an owl")
    assert [pair.prompt for pair in pairs_of([folder])] == ["a fox"] * 3
    assert len(pairs_of(["testbed:pairs"], limit=5)) == 5
    for caption in folder.glob("*.txt"):
        caption.unlink()
    with pytest.raises(UserError, match=r"fox\.txt"):
        pairs_of([folder])


def test_clips_are_shown_as_they_are(tmp_path: Path) -> None:
    source = jsonl_clips(tmp_path / "clips", 5, endings=(".mp4", ".gif"), count=4)
    with Votes.opened(tmp_path / "demo") as votes:
        votes.offer(pairs_of([source]))
        vote_on_all(votes, "anna", "left")
        assert not votes.unusable
    names = [path.name for group in groups(tmp_path / "demo" / "votes.jsonl") for path in group.candidates]  # type: ignore[union-attr]
    assert {Path(name).suffix for name in names} == {".mp4", ".gif"}


def test_segments_of_clips_are_read_in_the_order_of_the_sides(tmp_path: Path) -> None:
    """20 frames at 16 a second are 1.25 s: three segments of half a second, of which the last is left open."""
    source = jsonl_clips(tmp_path / "clips", 20, endings=(".mp4", ".webp"), count=2)
    with Votes.opened(tmp_path / "demo", segment_seconds=0.5) as votes:
        votes.offer(pairs_of([source]))
        for choice in ("left", "right"):
            pair = votes.next("anna")
            assert pair and (pair.segments, pair.segment_seconds) == (3, 0.5)
            votes.vote("anna", pair, choice, segment_columns(["left", "right", None], 0.5))
    first, second = groups(tmp_path / "demo" / "votes.jsonl")
    assert first.segment_scores == ((1.0, 0.0, 0.5), (0.0, 1.0, 0.5)) and first.segment_seconds == 0.5
    assert second.segment_scores == first.segment_scores[::-1]  # the right one is the best, and so comes first
    assert segment_columns([None, None], 0.5) == {}


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png"])
def test_no_image_outside_its_folder_is_read(tmp_path: Path, name: str) -> None:
    source = generated(tmp_path / "images")
    image(99).save(tmp_path / "secret.png")
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    append = {"prompt": "prompt 0", "seed": 1, "file": name, "model": "m", "lora": None}
    with open(source / "samples.jsonl", "a") as file:
        file.write(json.dumps(append) + "\n")
    with pytest.raises(UserError, match="leads outside"):
        pairs_of([source])


def test_damaged_images_are_left_out_with_the_reason(tmp_path: Path) -> None:
    source = generated(tmp_path / "images")
    (source / "00000.png").write_bytes(b"<script>alert(1)</script>")
    with Votes.opened(tmp_path / "demo") as votes:
        votes.offer(pairs_of([source]))
        assert vote_on_all(votes, "anna", "left") == 2 and votes.progress("anna") == (2, 2)
        assert "not an image" in next(iter(votes.unusable.values()))


def test_a_link_among_the_images_is_refused_at_once(tmp_path: Path) -> None:
    with Votes.opened(tmp_path / "demo"):
        pass
    os.symlink("/etc/passwd", tmp_path / "demo" / "images" / "a.png")
    with pytest.raises(UserError, match="is a link"), Votes.opened(tmp_path / "demo"):
        pass


# The report ---------------------------------------------------------------------------------------------------------


def test_the_report_counts_wins_whatever_side_a_model_is_on() -> None:
    """B beats A on 6 of 8 prompts, ties once, loses once: (6 + 1/2) / 8. Left is preferred in 4 of 7 decided votes."""
    choices = [("a", "b", "right")] * 3 + [("b", "a", "left")] * 3 + [("a", "b", "tie"), ("a", "b", "left")]
    rows = [
        {"prompt": f"p{i}", "pair": i, "user": "anna", "left_model": left, "right_model": right, "vote": vote,
         "left": f"{i}l", "right": f"{i}r"}
        for i, (left, right, vote) in enumerate(choices)
    ]  # fmt: skip
    result = report(rows)
    comparison = result.models["a", "b"]
    assert (comparison.wins, comparison.losses, comparison.tied) == (6, 1, 1)
    assert comparison.win_rate == 6.5 / 8 and result.left.win_rate == 4.5 / 8
    low, high = comparison.win_rate_ci
    assert 0 < low < 6.5 / 8 < high <= 1
    assert "81.2%" in result.to_html()


def test_the_report_says_how_far_users_agree() -> None:
    """Of two pairs that both judged, one is the same image, though on other sides; a tie says nothing."""
    rows = [
        {"prompt": "p", "pair": pair, "user": user, "left": left, "right": right, "vote": vote}
        for pair, user, left, right, vote in [
            (1, "anna", "x", "y", "left"), (1, "ben", "y", "x", "right"), (2, "anna", "x", "y", "left"),
            (2, "ben", "x", "y", "right"), (3, "anna", "x", "y", "left"), (3, "ben", "x", "y", "tie"),
        ]
    ]  # fmt: skip
    result = report(rows)
    assert result.agreement == 0.5 and result.judged_twice == 3 and not result.models
    assert report([]).to_html() == "<p>No votes yet.</p>"
