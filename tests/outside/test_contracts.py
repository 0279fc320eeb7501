"""What objectives, scorers and families from outside return is checked; loaded pipelines work like paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from reward_scorers import Scorer, ScorerError
from t2i_align import align, evaluate, generate, load_plugin
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers
from t2i_align.objectives import Objective, Requirements
from tests.runs import jsonl_pairs, run_values

HERE = Path(__file__).parent


class Broken(Objective):
    """Returns what the test gives it."""

    name = "broken"
    needs = Requirements(candidates=2, ties=False)
    returned: Callable[[torch.Tensor], Any]

    def step(self, policy: Any, reference: Any, batch: Any, rng: Any) -> Any:
        err = policy(batch.latents[:, 0], rng.timesteps(), batch.conditioning).square().flatten(1)
        return type(self).returned(err)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda err: (err.mean(), {}), r"objective 'broken': the loss must be a tensor of shape \[2\].*found \[\]"),
        (lambda err: (err.mean(1), {"a/b": err}), r"metric 'a/b' must be a tensor of shape \[2\].*found \[2, "),
        (lambda err: (err.mean(1), {"a": 1.0}), r"metric 'a' must be a tensor of shape \[2\].*found float"),
        (lambda err: err.mean(1), "`step` must return a loss and a mapping of metrics, found Tensor"),
        (lambda err: (err.mean(1).detach(), {}), "the loss has no gradient"),
    ],
)
def test_what_an_objective_returns_is_checked(
    returned: Any, message: str, sd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "returned", staticmethod(returned), raising=False)
    values = run_values(sd_path, jsonl_pairs(tmp_path / "data", count=2), tmp_path / "run", train__batch_size=2)
    with pytest.raises(UserError, match=message):
        align(values, objective=Broken(), progress=False)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: torch.zeros(n, n), r"bad: the score: expected shape \[2\], found \[2, 2\]"),
        (lambda n: torch.zeros(()), r"bad: the score: expected shape \[2\], found \[\]"),
        (lambda n: [0.0] * n, r"bad: `rate` must return a tensor \[2\].*found list"),
        (lambda n: (torch.zeros(n), {"part": torch.zeros(n, 1)}), r"bad: part: expected shape \[2\], found \[2, 1\]"),
    ],
)
def test_what_a_scorer_returns_is_checked(returned: Any, message: str) -> None:
    class Bad(Scorer):
        name, version = "bad", "1"

        def rate(self, inputs: Any, prompts: Any) -> Any:
            return returned(len(prompts))

    with pytest.raises(ScorerError, match=message):
        Bad().score(torch.zeros(2, 3, 8, 8), ["a", "b"])


def test_a_scorer_without_name_or_version_is_named() -> None:
    class Nameless(Scorer):
        def rate(self, inputs: Any, prompts: Any) -> Any: ...

    with pytest.raises(UserError, match="Nameless sets no name and no version"):
        build_scorers([Nameless()])


def test_conditioning_that_cannot_be_stored_is_named(
    zimage_path: Path, votes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its mask, Z-Image's prompts have different lengths; without the mask's tensor, or as a list."""
    family = load_plugin(f"{HERE}/zimage.py").ZImage
    values = run_values(zimage_path, votes, tmp_path / "run", train__batch_size=2)
    values["data"]["format"] = f"{HERE}/votes.py:votes"
    encode, only = family.encode_prompts, "prompt_embeds"
    for masks, message in (
        ({}, r"'prompt_embeds' of prompt 'prompt 0.*' has shape \[\d+, 16\], that of earlier ones"),
        ({"prompt_embeds": "gone"}, r"mask 'gone' of the conditioning 'prompt_embeds'.*found None"),
    ):
        monkeypatch.setattr(family, "conditioning_masks", masks)
        monkeypatch.setattr(family, "encode_prompts", lambda self, texts: {only: encode(self, texts)[only]})
        with pytest.raises(UserError, match=message):
            align(values, progress=False)
    monkeypatch.setattr(family, "encode_prompts", lambda self, texts: {"prompt_embeds": [torch.zeros(1)] * len(texts)})
    with pytest.raises(UserError, match=r"must be a tensor \[1, ...\], found list"):
        align(values, progress=False)


def test_loaded_pipelines_are_aligned_sampled_and_compared(zimage_path: Path, votes: Path, tmp_path: Path) -> None:
    load_plugin(f"{HERE}/zimage.py")
    base, aligned = pipelines.load(zimage_path), pipelines.load(zimage_path)
    values = run_values(zimage_path, votes, tmp_path / "run", train__batch_size=2, optim__lr=0.1)
    values["data"]["format"] = f"{HERE}/votes.py:votes"
    align(values, model=aligned, progress=False)
    options: dict[str, Any] = {"steps": 2, "guidance": 1.0, "progress": False}
    (one,), (two,) = (generate(pipeline, ["a fox"], out=None, **options) for pipeline in (base, aligned))
    assert one.size == (32, 32) and one.tobytes() != two.tobytes()
    with pytest.raises(UserError, match="carries an adapter already"):
        align({**values, "output_dir": str(tmp_path / "more")}, model=aligned, progress=False)

    class Mean(Scorer):
        name, version = "mean", "1"

        def rate(self, inputs: Any, prompts: Any) -> Any:
            return inputs.mean((1, 2, 3))

    result = evaluate(base=base, aligned=aligned, prompts=["a fox"], scorers=[Mean()], out=tmp_path / "e", **options)
    assert result.headline.total.mean_before != result.headline.total.mean_after
