"""Labels of clips' segments: by frame, by clip, by a judge in both orders, by the majority; and what has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from reward_scorers import Scorer
from t2i_align import cli
from t2i_align.data.annotations import Annotations
from t2i_align.data.media import save_clip, whole_clip
from t2i_align.data.readers import read
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from t2i_align.labeling.annotate import relabel
from t2i_align.labeling.models import ClipJudge, Frames, verdict
from t2i_align.labeling.segments import label
from tests.data.test_clips import ffmpeg
from tests.data.test_examples import write_jsonl
from tests.labeling.conftest import rows, skipped
from tests.labeling.test_curate import vary
from tests.labeling.test_models import blip, llava
from tests.runs import moving_clip

RATE = 8
QUIET: dict[str, Any] = {"seconds": 0.5, "least_decided": 0.0, "progress": False}
# Brightness of each half second of 4 frames, and of a last segment of one frame.
CLIPS = {"a": (50, 100, 150, 90), "b": (60, 100, 100, 80), "dark": (10, 10, 10, 10), "low": (10, 9, 10, 10)}


class Bright(Scorer):
    """Mean brightness in levels of 8 bits, of each frame or negated; differences up to 2 are none."""

    version, tie_margin = "1", 2.0

    def __init__(self, name: str = "bright", sign: int = 1) -> None:
        self.name, self.sign = name, sign

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.sign * 255 * inputs.mean((1, 2, 3))


class Length(Scorer):
    """How many frames a clip has; it wants three."""

    name, version, takes, min_frames = "length", "1", "clips", 3

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.full((len(inputs),), float(inputs.shape[1]))


def clip(levels: Sequence[int], last: int = 1) -> Tensor:
    frames = [level for level in levels[:-1] for _ in range(4)] + [levels[-1]] * last
    return torch.tensor(frames, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, levels in CLIPS.items():
        save_clip(clip(levels), tmp_path / f"{name}.mp4", RATE)
    lines = [
        {"id": "one", "prompt": "p", "videos": ["a.mp4", "b.mp4"], "scores": [0.5, 0.5]},
        {"id": "two", "prompt": "p", "videos": ["dark.mp4", "low.mp4"], "scores": [0, 1]},
    ]
    return write_jsonl(tmp_path / "pairs.jsonl", lines)


def test_a_scorer_of_images_is_averaged_over_each_segment(source: Path, tmp_path: Path) -> None:
    """b, a tie, a, a; of two clips that are the same but for one level all segments are ties, and are kept."""
    out = tmp_path / "labels.jsonl"
    assert label(source, out, scorers=[Bright()], **QUIET).groups == 2
    one, two = rows(out).values()
    assert one["segment_scores"] == [[0, 0.5, 1, 1], [1, 0.5, 0, 0]] and one["segment_seconds"] == 0.5
    assert two["segment_scores"] == [[0.5] * 4] * 2
    np.testing.assert_allclose(one["by_scorer"]["bright"]["scores"], [CLIPS["a"], CLIPS["b"]], atol=3)
    assert "scores" not in one
    (first, _) = read(source, annotations=Annotations.load([out]))
    assert isinstance(first, Group) and first.segment_scores == ((0, 0.5, 1, 1), (1, 0.5, 0, 0))


def test_whole_clips_get_the_mean_of_their_segments(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    label(source, out, scorers=[Bright()], whole=True, **QUIET)
    assert rows(out)["one"]["scores"] == [2.5 / 4, 1.5 / 4]
    relabel(source, [Bright()], tmp_path / "whole.jsonl", progress=False)
    whole = rows(tmp_path / "whole.jsonl")["one"]["scores"]  # of all frames at once
    expected = [(4 * sum(levels[:3]) + levels[3]) / 13 for levels in (CLIPS["a"], CLIPS["b"])]
    np.testing.assert_allclose(whole, expected, atol=3)


def test_the_majority_decides_and_an_even_vote_is_a_tie(source: Path, tmp_path: Path) -> None:
    """Two for and one against; one for and one against."""
    for number, others in enumerate(([Bright("other")], [])):
        out = tmp_path / f"{number}.jsonl"
        label(source, out, scorers=[Bright(), *others, Bright("against", -1)], **QUIET)
        scores = np.array(rows(out)["one"]["segment_scores"])
        expected = [-1, 0, 1, 1] if others else [0, 0, 0, 0]
        assert np.sign(scores[0] - scores[1]).tolist() == expected


def test_a_measure_of_clips_gets_the_frames_it_needs(source: Path, tmp_path: Path) -> None:
    """Three at least: of segments of four the last has one; of segments of two all get their neighbours."""
    for seconds, expected in ((0.5, [4, 4, 4, 3]), (0.25, [3] * 7)):
        out = tmp_path / f"{seconds}.jsonl"
        label(source, out, scorers=[Length()], **{**QUIET, "seconds": seconds})
        assert rows(out)["one"]["by_scorer"]["length"]["scores"] == [expected] * 2
    with pytest.raises(UserError, match="none of 2 groups"):
        label(source, tmp_path / "few.jsonl", scorers=[Length()], **{**QUIET, "fps": 1.0, "seconds": 1.0})
    assert skipped(tmp_path / "few.jsonl")["one"] == "2 frames; length judges 3 or more"


def test_a_judge_is_asked_in_both_orders(source: Path, tmp_path: Path) -> None:
    """One that sees brightness gives labels; one that always names the first clip gives ties."""
    asked: list[int] = []

    def brighter(pairs: Sequence[tuple[Frames, Frames]], prompts: Sequence[str]) -> list[str]:
        asked.extend(len(one) for one, _ in pairs)
        means = [[np.mean([np.asarray(frame) for frame in side]) for side in pair] for pair in pairs]
        return ["tie" if abs(one - other) < 2 else "1" if one > other else "2" for one, other in means]

    out = tmp_path / "labels.jsonl"
    label(source, out, judge=brighter, **QUIET)
    assert rows(out)["one"]["segment_scores"] == [[0, 0.5, 1, 1], [1, 0.5, 0, 0]]
    assert rows(out)["one"]["by_judge"] == [-1, 0, 1, 1]
    assert asked[:8] == [4, 4, 4, 1] * 2
    label(source, tmp_path / "biased.jsonl", judge=lambda pairs, prompts: ["1"] * len(pairs), **QUIET)
    assert rows(tmp_path / "biased.jsonl")["one"]["segment_scores"] == [[0.5] * 4] * 2
    both = tmp_path / "both.jsonl"  # against one scorer of another opinion: even votes
    label(source, both, scorers=[Bright("against", -1)], judge=brighter, **QUIET)
    assert rows(both)["one"]["segment_scores"] == [[0.5] * 4] * 2


def test_files_of_votes_count_like_a_labeller_each(source: Path, tmp_path: Path) -> None:
    """One of two people agrees with the scorer in each segment; the second pair has a vote of another length."""
    out, files = tmp_path / "labels.jsonl", [tmp_path / "anna.jsonl", tmp_path / "ben.jsonl"]
    for file, one in zip(files, ([0, 1, 0, 1], [1, 0, 1, 0.5]), strict=True):
        vote = {"id": "one", "segment_scores": [one, [1 - score for score in one]], "segment_seconds": 0.5}
        short = {**vote, "id": "two", "segment_scores": [[1, 0, 1]] * 2}
        write_jsonl(file, [vote, short] if file is files[0] else [vote])
    label(source, out, scorers=[Bright()], votes=files, **QUIET)
    scores = np.array(rows(out)["one"]["segment_scores"])
    # bright -1 0 1 1, anna -1 1 -1 1, ben 1 -1 1 0
    assert np.sign(scores[0] - scores[1]).tolist() == [-1, 0, 1, 1]
    assert skipped(out)["two"].endswith("votes on 3 segments of 0.5 s, expected 4 of 0.5 s")
    label(source, tmp_path / "people.jsonl", votes=files[1:], **QUIET)
    assert list(rows(tmp_path / "people.jsonl")) == ["one"]
    assert skipped(tmp_path / "people.jsonl") == {"two": "none of the files of votes has it"}


def opinionated(folder: Path, asked: Sequence[tuple[Frames, Frames]]) -> Path:
    """A random LLaVA that answers 1 or 2 and nothing else, by the projection of what it sees that varies most."""
    torch.manual_seed(0)
    judge, seen = ClipJudge(str(llava(folder)), max_new_tokens=1), []
    head = judge.network.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0, -1]))
    judge(asked, ["p"] * len(asked))
    hook.remove()
    hidden = torch.stack(seen)
    way = torch.linalg.svd(hidden - (middle := hidden.mean(0))).Vh[0]
    way -= (way @ middle) / (middle @ middle) * middle
    one, two = (judge.tokenizer.convert_tokens_to_ids(name) for name in "12")
    head.weight.data.zero_()[[one, two]] = 1e3 * torch.stack([way, -way])
    judge.network.save_pretrained(folder)
    return folder


def test_a_language_model_judges_frames_in_both_orders(source: Path, tmp_path: Path) -> None:
    """A genuine LLaVA of two layers: a vote where it names the same clip in both orders, a tie where it does not."""
    noise = torch.randint(0, 256, (2, 32, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name, frames in zip(CLIPS, noise, strict=False):
        save_clip(frames, source.parent / f"{name}.mp4", RATE)
    one, other = (whole_clip(source.parent / f"{name}.mp4") for name in list(CLIPS)[:2])
    frames = [[[to_pil_image(clip[f]) for f in range(s, s + 2)] for s in range(0, 32, 2)] for clip in (one, other)]
    straight, exchanged = (list(zip(*sides, strict=True)) for sides in (frames, frames[::-1]))
    folder = opinionated(tmp_path / "llava", [*straight, *exchanged])
    judge = ClipJudge(str(folder), max_new_tokens=1)
    answers = [*zip(judge(straight, ["p"] * 16), judge(exchanged, ["p"] * 16), strict=True)]
    assert {*answers} <= {(a, b) for a in "12" for b in "12"} and len({*answers}) > 2
    label(source, tmp_path / "labels.jsonl", judge=str(folder), max_new_tokens=1, **{**QUIET, "seconds": 0.25})
    wanted = [{("1", "2"): 1, ("2", "1"): -1}.get(pair, 0) for pair in answers]
    assert rows(tmp_path / "labels.jsonl")["one"]["by_judge"] == wanted
    settings = json.loads((tmp_path / "labels.jsonl.settings.json").read_text())["settings"]
    assert settings["judge"]["name"] == str(folder)


def test_a_judge_needs_a_chat_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chat template"):
        ClipJudge(str(blip(tmp_path / "blip")))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("1", "1"), ("Clip 2.", "2"), ("tie", "tie"), ("Neither 1 nor 2", "tie"), ("1, yes: 1", "1"), ("12", "tie"),
     ("", "tie")],
)  # fmt: skip
def test_answers_in_words(answer: str, expected: str) -> None:
    assert verdict(answer) == expected


def test_pairs_without_labels_are_skipped_with_a_reason(source: Path, tmp_path: Path) -> None:
    save_clip(clip((50, 60), last=0), tmp_path / "brief.mp4", RATE)
    save_clip(clip((50, 100, 150, 90, 20)), tmp_path / "longer.mp4", RATE)
    (tmp_path / "text.mp4").write_text("no video")
    videos = [["a.mp4", "b.mp4"], ["dark.mp4", "low.mp4"], ["brief.mp4", "a.mp4"], ["a.mp4", "longer.mp4"],
              ["a.mp4", "text.mp4"], ["a.mp4"]]  # fmt: skip
    rows_of = [{"id": str(n), "prompt": "p", "videos": of, "scores": [0] * len(of)} for n, of in enumerate(videos)]
    data, out = write_jsonl(tmp_path / "more.jsonl", rows_of), tmp_path / "labels.jsonl"
    label(data, out, scorers=[Bright()], **{**QUIET, "least_decided": 0.2, "seconds": 1.0})
    assert list(rows(out)) == ["0"]
    for number, expected in {
        "1": "0 of 2 segments have a preference, expected more than 20%",
        "2": "0.5 s, shorter than a segment of 1 s",
        "3": "its clips have 1.62 and 2.12 s",
        "4": "candidate 1: not a video that can be read",
        "5": "1 candidates; a preference is between two or more",
    }.items():
        assert skipped(out)[number].startswith(expected), skipped(out)[number]


def test_damaged_files_are_skipped_and_odd_ones_are_read(source: Path, tmp_path: Path) -> None:
    """Only sound, a tail that is cut off, nothing in it; a varying rate and odd sides: 26 frames in 1.6 s."""
    save_clip(torch.rand(13, 3, 64, 64), tmp_path / "noise.mp4", RATE)
    ffmpeg("-i", tmp_path / "noise.mp4", "-movflags", "+faststart", tmp_path / "start.mp4")
    content = (tmp_path / "start.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", tmp_path / "sound.mp4")
    (tmp_path / "empty.mp4").touch()
    save_clip(moving_clip(2, 40), tmp_path / "plain.mp4", 32)
    for number in range(2):
        vary(tmp_path / "plain.mp4", tmp_path / f"vary{number}.mkv", f",scale=47:33,lutyuv=y=val*{1 - number / 4}")
    pairs = [("cut.mp4", "a.mp4"), ("sound.mp4", "a.mp4"), ("empty.mp4", "a.mp4"), ("vary0.mkv", "vary1.mkv")]
    lines = [{"id": pair[0], "prompt": "p", "videos": pair, "scores": [1, 0]} for pair in pairs]
    lines.append({"id": "no caption", "videos": ["a.mp4", "b.mp4"], "scores": [1, 0]})
    out = tmp_path / "labels.jsonl"
    label(write_jsonl(tmp_path / "odd.jsonl", lines), out, scorers=[Bright()], **QUIET)
    assert rows(out)["vary0.mkv"]["segment_scores"] == [[1] * 4, [0] * 4]
    why = [*skipped(out).values()]
    for found, expected in zip(
        why, ("its clips have", "candidate 0: no video in it", "not a video", "expected the keys"), strict=True
    ):
        assert expected in found, why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no labeller"),
        ({"scorers": [Bright()], "seconds": 0.1}, "a segment has no frame"),
        ({"scorers": [Bright()], "seconds": float("nan")}, "a segment has no frame"),
        ({"scorers": [Bright()], "least_decided": 1.0}, "least_decided must lie in"),
        ({"scorers": [Bright()], "fps": 0.0}, "fps must be"),
        ({"judge": "no/such/folder"}, "no such judge"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        label(source, tmp_path / "out.jsonl", progress=False, **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_it_is_a_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["video", "segments", str(source), "--scorers", "motion_oracle", "--out", str(tmp_path / "o.jsonl")]
    assert cli.main([*arguments, "--seconds", "0.5"]) == 2  # the oracle judges the testbed's captions only
    assert "none of 2 groups could be annotated" in capsys.readouterr().err
    assert "cannot read the prompt 'p'" in skipped(tmp_path / "o.jsonl")["one"]
