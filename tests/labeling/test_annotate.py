"""Annotations of a source: what they hold, how they continue after a kill, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reward_scorers import Scorer
from t2i_align import cli
from t2i_align.data import readers
from t2i_align.data.annotations import Annotations
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from t2i_align.labeling.annotate import caption, perturb, relabel
from t2i_align.testbed.captions import parse
from t2i_align.testbed.oracle import Oracle
from tests.data.test_examples import write_jsonl
from tests.labeling.conftest import GROUPS, better, rows, skipped
from tests.labeling.test_models import blip, t5

QUIET: dict[str, Any] = {"progress": False, "batch_size": 4}


def prompts(source: Path) -> dict[str, str]:
    return {row["id"]: row["prompt"] for row in rows(source).values()}


# What is written ------------------------------------------------------------------------------------------------


def test_variant_c_describes_every_image_in_source_order(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "c.jsonl"
    summary = caption(source, "c", out, captioner="testbed:captioner", **QUIET)
    written = rows(out)
    assert list(written) == [f"g{i}" for i in range(GROUPS) if i != 5]
    assert (summary.groups, summary.skipped, str(summary.why_skipped)) == (10, 1, f"{out}.skipped.jsonl")
    assert skipped(out) == {"g5": "candidate 1: not an image in a known format (JPEG, PNG, WEBP, BMP, TIFF, GIF, AVIF)"}
    for key, row in written.items():
        stated = parse(prompts(source)[key]).canonical()
        shown = [parse(text).canonical() for text in row["captions"]]
        best, other = shown[better(key)], shown[1 - better(key)]
        assert best.relation == stated.relation
        assert [p.shape for p in best.phrases] == [p.shape for p in stated.phrases]
        assert (other.relation, other.phrases) != (stated.relation, best.phrases)


def test_variant_p_perturbs_the_prompt_for_the_loser(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    caption(source, "p", out, kinds=["relation"], **QUIET)
    assert skipped(out) == {"g4": "a tie: neither candidate is the winner"}  # no image was needed
    assert len(rows(out)) == GROUPS - 1
    for key, row in rows(out).items():
        captions, prompt = row["captions"], prompts(source)[key]
        assert captions[better(key)] == prompt
        opposite = parse(prompt).canonical().phrases[::-1]
        assert parse(captions[1 - better(key)]).canonical().phrases == opposite


def test_variant_h_perturbs_the_losers_description(source: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "h.jsonl", tmp_path / "c.jsonl"
    caption(source, "h", out, captioner="testbed:captioner", kinds=["attribute"], **QUIET)
    caption(source, "c", plain, captioner="testbed:captioner", **QUIET)
    assert {*skipped(out)} == {"g4", "g5"}
    for key, row in rows(out).items():
        described = rows(plain)[key]["captions"]
        assert row["captions"][better(key)] == described[better(key)]
        before, changed = (captions[1 - better(key)] for captions in (described, row["captions"]))
        assert changed != before and len(changed.split()) == len(before.split())


def test_scores_from_annotations_decide_the_winner(source: Path, tmp_path: Path) -> None:
    scores = write_jsonl(tmp_path / "scores.jsonl", [{"id": f"g{i}", "scores": [0, 1]} for i in range(GROUPS)])
    out = tmp_path / "p.jsonl"
    assert caption(source, "p", out, annotations=[scores], **QUIET).skipped == 0
    assert all(row["captions"][1] == prompts(source)[key] != row["captions"][0] for key, row in rows(out).items())


def test_negative_caption_depends_only_on_seed_and_id(source: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{i}.jsonl" for i in range(3)]
    perturb(source, outs[0], **QUIET)
    perturb(source, outs[1], progress=False, batch_size=3)
    perturb(source, outs[2], seed=1, **QUIET)
    first, again, other = map(rows, outs)
    assert first == again != other and len(first) == GROUPS
    for key, row in first.items():
        assert parse(row["negative_caption"]).canonical() != parse(prompts(source)[key]).canonical()
    write_jsonl(source, [row | {"prompt": "a red circle above a blue square"} for row in rows(source).values()])
    perturb(source, tmp_path / "alike.jsonl", **QUIET)
    assert len({row["negative_caption"] for row in rows(tmp_path / "alike.jsonl").values()}) > 3


def test_annotations_are_sorted_with_the_candidates(source: Path, tmp_path: Path) -> None:
    files = [tmp_path / "p.jsonl", tmp_path / "negatives.jsonl"]
    caption(source, "p", files[0], **QUIET)
    perturb(source, files[1], **QUIET)
    groups = [g for g in readers.read(source, annotations=Annotations.load(files)) if isinstance(g, Group)]
    assert len(groups) == GROUPS - 1
    for group in groups:
        assert group.captions is not None and group.captions[0] == group.prompt != group.captions[1]
        assert group.negative_caption == rows(files[1])[group.id]["negative_caption"]


def test_relabel_by_the_oracle_is_its_reward(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    relabel(source, ["oracle"], out, **QUIET)
    assert {*skipped(out)} == {"g5"}
    for key, row in rows(out).items():
        images = [Image.open(source.parent / f"{key[1:]}_{side}.png") for side in (0, 1)]
        pixels = np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) / 255 for image in images])
        reward = Oracle().judge(pixels, [prompts(source)[key]] * 2).reward
        np.testing.assert_allclose(row["scores"], reward, rtol=1e-6)
        assert row["by_scorer"] == {"oracle": {"version": Oracle.version, "scores": row["scores"]}}
        assert int(np.argmax(reward)) == better(key)


class Fixed(Scorer):
    """A scorer by a function of the mean of an image's pixels and its side."""

    version = "7"

    def __init__(self, name: str, function: Any, margin: float = 0.0) -> None:
        self.name, self.function, self.tie_margin = name, function, margin

    def rate(self, pixels: Any, prompts: Sequence[str]) -> Any:
        return self.function(pixels.mean((1, 2, 3)))


def grey_images(folder: Path, *values: int) -> Path:
    folder.mkdir()
    for value in values:
        Image.new("L", (8, 8), value).save(folder / f"{value}.png")
    row = {"id": "a", "prompt": "x", "images": [f"{v}.png" for v in values], "scores": [0] * len(values)}
    return write_jsonl(folder / "data.jsonl", [row])


def test_several_scorers_vote(tmp_path: Path) -> None:
    """Images of 51, 102 and 204 of 255: 0.2, 0.4, 0.8. Two scorers prefer bright, one dark; k - 1 = 2, n = 3.

    Majority: dark 2 wins of one scorer, 2 / 6; middle 1 of each, 3 / 6; bright 4 / 6. Where the dark one's margin is
    0.5, it has 0.5 of 0.2 against 0.4 and of 0.4 against 0.8, and 1 of 0.2 against 0.8: 1.5, 1 and 0.5 wins.
    """
    data = grey_images(tmp_path / "data", 51, 102, 204)
    scorers = [Fixed("bright", lambda x: x), Fixed("brighter", lambda x: 10 * x), Fixed("dark", lambda x: -x)]
    expected = {"majority": [2 / 6, 3 / 6, 4 / 6], "mean_rank": [-7 / 3, -2, -5 / 3], "sum": [2.0, 4.0, 8.0]}
    for rule, scores in expected.items():
        relabel(data, scorers, tmp_path / f"{rule}.jsonl", rule=rule, **QUIET)
        row = rows(tmp_path / f"{rule}.jsonl")["a"]
        np.testing.assert_allclose(row["scores"], scores, rtol=1e-6)
        np.testing.assert_allclose(row["by_scorer"]["dark"]["scores"], [-0.2, -0.4, -0.8], rtol=1e-6)
        assert row["by_scorer"]["dark"]["version"] == "7"
    scorers[2].tie_margin = 0.5
    relabel(data, scorers, tmp_path / "margin.jsonl", **QUIET)
    np.testing.assert_allclose(rows(tmp_path / "margin.jsonl")["a"]["scores"], [1.5 / 6, 3 / 6, 4.5 / 6])


def test_groups_that_cannot_be_scored_or_perturbed_are_skipped(tmp_path: Path) -> None:
    data = grey_images(tmp_path / "data", 51, 0)
    with pytest.raises(UserError, match=r"none of 1 groups could be annotated; .*skipped.jsonl says why"):
        relabel(data, [Fixed("log", lambda x: x.log())], tmp_path / "a.jsonl", **QUIET)
    assert skipped(tmp_path / "a.jsonl") == {"a": "no finite score by log"}
    with pytest.raises(UserError, match="none of 1"):
        relabel(data, "oracle", tmp_path / "b.jsonl", **QUIET)
    assert "cannot read the prompt 'x'" in skipped(tmp_path / "b.jsonl")["a"]
    with pytest.raises(UserError, match="none of 1"):
        perturb(data, tmp_path / "p.jsonl", **QUIET)
    assert skipped(tmp_path / "p.jsonl") == {"a": "the perturber cannot change 'x'"}
    single = grey_images(tmp_path / "single", 51)
    with pytest.raises(UserError, match="none of 1"):
        relabel(single, [Fixed("a", lambda x: x), Fixed("b", lambda x: x)], tmp_path / "c.jsonl", **QUIET)
    assert relabel(single, [Fixed("a", lambda x: x)], tmp_path / "d.jsonl", **QUIET).groups == 1


def test_transformers_models_write_captions(source: Path, tmp_path: Path) -> None:
    """The whole path with a random BLIP and a random T5: what they say means nothing, that it is written does."""
    out = tmp_path / "h.jsonl"
    models = {"captioner": str(blip(tmp_path / "blip")), "perturber": str(t5(tmp_path / "t5"))}
    summary = caption(source, "h", out, **models, max_new_tokens=5, **QUIET)
    assert summary.groups + summary.skipped == GROUPS and summary.groups > 3
    assert all(len(row["captions"]) == 2 and all(row["captions"]) for row in rows(out).values())


# What is refused before anything is written ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s, o: caption(s, "d", o), "unknown variant 'd'. Choices: c, h, p"),
        (lambda s, o: caption(s, "c", o), "variant c describes images: name a captioner"),
        (lambda s, o: caption(s, "c", o, captioner="./nothing"), "nothing: no such captioner"),
        (lambda s, o: caption(s, "p", o, perturber="./nothing"), "nothing: no such perturber"),
        (lambda s, o: caption(s, "p", o, batch_size=0), "batch_size must be"),
        (lambda s, o: caption(s, "p", o, annotations=["nothing.jsonl"]), "nothing.jsonl: no such file"),
        (lambda s, o: perturb(s, o, kinds=["colours"]), "unknown kind of edit 'colours'"),
        (
            lambda s, o: caption(s, "c", o, captioner="testbed:captioner", kinds=["colours"]),
            "unknown kind of edit 'colours'",
        ),
        (lambda s, o: caption(s, "c", o, captioner="testbed:captioner", precision="fp8"), "unknown precision 'fp8'"),
        (lambda s, o: perturb(s / "nothing", o), "nothing: no such file or folder"),
        (lambda s, o: perturb(s, o, format="parquet"), "unknown data format 'parquet'"),
        (lambda s, o: perturb(s, o.with_suffix(".txt")), "expected a file that ends in .jsonl"),
        (lambda s, o: relabel(s, ["orakel"], o), "unknown scorer 'orakel'. Did you mean 'oracle'?"),
        (lambda s, o: relabel(s, ["oracle"], o, rule="mean"), "unknown rule 'mean'"),
        (lambda s, o: relabel(s, ["oracle"], o, device="cuda:99"), "device 'cuda:99' cannot be used"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(call: Any, says: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(UserError) as error:
        call(source, folder / "a.jsonl")
    assert says in str(error.value)
    assert not folder.exists()


def test_source_without_usable_groups_is_named(source: Path, tmp_path: Path) -> None:
    ties = [row | {"scores": [1, 1]} for row in rows(source).values()]
    write_jsonl(source, ties)
    with pytest.raises(UserError, match=r"no pair with a winner in it; its groups by candidates: \{2: 11\}"):
        caption(source, "p", tmp_path / "p.jsonl", **QUIET)
    write_jsonl(source, [row | {"prompt": " "} for row in ties])
    with pytest.raises(UserError, match=r"no usable group among 11 rows.*the prompt is empty"):
        perturb(source, tmp_path / "n.jsonl", **QUIET)


# The commands ---------------------------------------------------------------------------------------------------


def test_commands_report_counts(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.jsonl"
    command = ["caption", str(source), "--variant", "c", "--captioner", "testbed:captioner"]
    assert cli.main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"10 groups in {out}, 1 skipped; why: {out}.skipped.jsonl\n"
    assert cli.main(["perturb", str(source), "--out", str(out)]) == 2
    assert "exists and is finished" in capsys.readouterr().err
    assert cli.main(["relabel", str(source), "--scorers", "oracle", "--out", str(tmp_path / "s.jsonl")]) == 0
    assert len(rows(tmp_path / "s.jsonl")) == 10
