"""Seed-paired evaluation on tiny genuine models: pairing, LoRA, files, and what is refused before any work."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pipelines
from reward_scorers import ScorerError
from reward_scorers.weights import digest
from t2i_align.errors import UserError
from t2i_align.evaluation import sides
from t2i_align.evaluation.report import choose, verdict
from t2i_align.inference.generate import generate
from tests.evaluation.conftest import FAST, PROMPTS, Red, Run

NUMBERS = ("win_rate", "win_rate_ci", "mean_before", "mean_after", "mean_change", "mean_change_ci")


@pytest.fixture(scope="module")
def lora(sd_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run with a LoRA that changes every image."""
    pipeline = pipelines.load(sd_path)
    pipeline.add_lora(rank=2, alpha=2.0, dropout=0.0, targets="attention")
    torch.manual_seed(0)
    for parameter in pipeline.trainable_parameters():
        torch.nn.init.normal_(parameter, std=1.0)
    run = tmp_path_factory.mktemp("run")
    pipeline.save_lora(run / "lora")
    return run


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().split("\n")[:-1]]


def test_a_model_against_itself_ties_everywhere(run: Run, tmp_path: Path) -> None:
    """Another outcome, in none of 5 prompts, may still be in z² / (5 + z²) = 0.434 of all prompts: 0.5 ± 0.434 / 2."""
    result = run()
    assert result.win_rate == 0.5 and result.win_rate_ci == pytest.approx((0.2828, 0.7172), abs=1e-4)
    assert (result.headline.total.tied, result.headline.total.mean_change) == (5, 0.0)
    assert all(part.win_rate == 0.5 for part in result.headline.parts.values())
    assert result.settings["identical_pairs"] == 5 and "all 5 pairs are byte-identical" in result.summary()
    assert re.search(r"All 5\s+pairs are byte-identical", (tmp_path / "out" / "report.html").read_text())


def test_spellings_of_one_prompt_are_one_prompt(run: Run, other: Path, tmp_path: Path) -> None:
    result = run(aligned=other, prompts=["a cat", "A  cat ", "a\u00a0CAT"])
    total = result.headline.total
    assert (total.n, total.prompts_compared) == (3, 1) and all(map(math.isnan, total.win_rate_ci))
    assert "1 of the 3 prompts are different" in result.summary() and "nan" not in result.summary()
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (stored["prompts"], stored["different_prompts"], stored["win_rate_ci"]) == (3, 1, [None, None])


def test_nothing_that_could_be_scored_is_an_error_after_the_files_are_written(run: Run, tmp_path: Path) -> None:
    class Silent(Red):
        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
            return torch.full((len(prompts),), math.nan)

    with pytest.raises(UserError, match="no pair could be scored: red gave no finite number"):
        run(scorers=[Silent()])
    assert "NaN" not in (tmp_path / "out" / "result.json").read_text() and len(samples(tmp_path / "out")) == 5


def test_files_hold_the_numbers_and_prompts_cannot_inject(run: Run, other: Path, tmp_path: Path) -> None:
    result = run("new", aligned=other, seeds_per_prompt=2)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["pairs.jsonl", "report.html", "result.json"]
    stored = json.loads((tmp_path / "new" / "result.json").read_text())
    for prefix in ("", "green_", "blue_"):
        assert {prefix + key for key in NUMBERS} <= stored.keys()
    assert stored["win_rate"] == result.win_rate and tuple(stored["win_rate_ci"]) == result.win_rate_ci
    counts = (stored["prompts"], stored["samples"], stored["seeds_per_prompt"], len(set(stored["seeds"])))
    assert counts == (5, 10, 2, 10)
    settings = (stored["ties"], stored["tie_margin"], stored["steps"], stored["aligned_kind"])
    assert settings == ("half", 0.0, 2, "model")
    assert stored["scorers"]["red"]["version"] == "7"
    assert stored["scorers"]["red"]["parts"]["blue"]["n"] == 4  # "dog" and "sun", two seeds each
    lines = samples(tmp_path / "new")
    change = np.mean([line["scores"]["red"]["after"] - line["scores"]["red"]["before"] for line in lines])
    assert change == pytest.approx(stored["mean_change"]) and change != 0
    assert lines[0]["scores"]["red"]["parts"]["blue"] == [None, None]

    html = (tmp_path / "new" / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;alert(1)" in html and "a &amp; b" in html
    assert not any(word in html for word in ("http:", "https:", "@import", "url(", "<link"))
    assert html.count("data:image/png;base64,") >= 2 * 10
    assert "pixelated" in html and html.count('<th scope="row">') == 3 and "green 0." in html


def test_samples_do_not_depend_on_the_batch_size(run: Run, other: Path, tmp_path: Path) -> None:
    for size in (1, 4):
        run(str(size), aligned=other, prompts=["cat"] * 5, batch_size=size)
    for one, four in zip(samples(tmp_path / "1"), samples(tmp_path / "4"), strict=True):
        assert one["seed"] == four["seed"]
        for side in ("before", "after"):
            # Sums in another order may move a pixel by one level of 255.
            assert one["scores"]["red"][side] == pytest.approx(four["scores"]["red"][side], abs=1e-4)
    spread = [line["scores"]["red"]["before"] for line in samples(tmp_path / "1")]
    assert np.std(spread) > 1e-3  # of one prompt, another seed is another image


def test_a_runs_lora_is_found_applied_and_taken_off_again(run: Run, sd_path: Path, lora: Path, tmp_path: Path) -> None:
    base, file = pipelines.load(sd_path), lora / "lora" / "pytorch_lora_weights.safetensors"
    by_folder, by_file = run("a", base=base, aligned=lora), run("b", base=base, aligned=file)
    assert by_folder.headline == by_file.headline  # so the first left the loaded base as it was
    assert by_folder.settings["aligned_kind"] == "lora" and by_folder.settings["adapter_sha256"] == digest(file)
    assert by_folder.headline.total.mean_change != 0
    assert by_folder.settings["base"] == str(sd_path)
    plain = pipelines.load(sd_path)
    for side in ("before", "after"):
        pixels = plain.generate(PROMPTS, by_folder.settings["seeds"], steps=2, guidance=2.0)
        for line, score in zip(samples(tmp_path / "a"), Red().score(pixels, PROMPTS), strict=True):
            assert line["scores"]["red"][side] == pytest.approx(score.item(), abs=2e-3)  # rounding to 8 bits
        if side == "before":
            plain.load_lora(file)


def test_a_loaded_base_against_another_model_keeps_its_name(run: Run, sd_path: Path, other: Path) -> None:
    result = run(base=pipelines.load(sd_path), aligned=other)
    assert (result.settings["base"], result.settings["aligned"]) == (str(sd_path), str(other))


def test_margins_by_scorer(run: Run, other: Path, tmp_path: Path) -> None:
    class Blue(Red):
        name = "blue"
        tie_margin = 2.0

    options = {"aligned": other, "scorers": [Red(), Blue()]}
    own = run(**options).scorers
    assert (own["red"].total.tied, own["blue"].total.tied) == (0, 5)
    given = run(**options, tie_margin={"red": 1.0}, ties="drop", force=True).scorers
    assert given["red"].total.tied == 5 and math.isnan(given["red"].total.win_rate)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["win_rate"] is None


def test_only_an_evaluation_is_replaced_and_only_when_forced(
    run: Run, sd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = generate(sd_path, ["cat"], tmp_path / "images", **FAST)
    before = listing.read_bytes()
    for force in (False, True):
        with pytest.raises(UserError, match="not empty and holds no evaluation"):
            run("images", force=force)
    assert listing.read_bytes() == before

    out = tmp_path / "out"
    run(prompts=["cat"])
    with monkeypatch.context() as patch:
        patch.setattr(sides, "sample", lambda *args, **kwargs: pytest.fail("something was generated"))
        with pytest.raises(UserError, match=r"holds an evaluation; .*--force"):
            run(prompts=["cat"])
    (out / "result.json").unlink()  # killed before it was written, last of all
    run(prompts=["cat"])
    run(prompts=["cat", "dog"], force=True)
    assert [line["prompt"] for line in samples(out)] == ["cat", "dog"]
    generate(sd_path, ["cat"], out, force=True, **FAST)
    assert len(samples(out)) == 2


def test_the_base_is_loaded_as_the_training_run_had_it(
    run: Run, sd_path: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(lora, tmp_path / "run")
    (tmp_path / "run" / "run.yaml").write_text(json.dumps({"model": {"path": str(sd_path), "revision": "r1"}}))
    load, seen = pipelines.load, []

    def recorded(path: str, **options: Any) -> pipelines.TrainablePipeline:
        seen.append(options["revision"])
        return load(path)

    monkeypatch.setattr(pipelines, "load", recorded)
    cases = [({"base": None}, "r1"), ({"base": sd_path}, "r1"), ({"base": None, "revision": "r2"}, "r2")]
    for number, (change, revision) in enumerate(cases):
        result = run(str(number), aligned=tmp_path / "run", prompts=["cat"], **change)
        assert (result.settings["base"], result.settings["revision"], seen[-1]) == (str(sd_path), revision, revision)
        assert f"revision {revision}" in (tmp_path / str(number) / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lora: 3", "run.yaml: expected a run's settings, found no 'model'"),
        (b"model: {path: 3}", r"run.yaml of .*: model.path must be a string, found 3"),
    ],
)
def test_damaged_settings_of_a_run_are_named(
    content: bytes, message: str, run: Run, lora: Path, tmp_path: Path
) -> None:
    shutil.copytree(lora, tmp_path / "run")
    (tmp_path / "run" / "run.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(base=None, aligned=tmp_path / "run")


def test_further_settings_are_written_and_reported(run: Run, tmp_path: Path) -> None:
    settings = {"aligned": "another name", "training_steps": 7}
    run(prompts=["cat"], settings=settings)
    assert settings.items() <= json.loads((tmp_path / "out" / "result.json").read_text()).items()
    assert "another name" in (tmp_path / "out" / "report.html").read_text()


def test_too_little_memory_for_a_scorer_names_the_option(run: Run) -> None:
    class Huge(Red):
        def rate(self, inputs: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match=r"CUDA out of memory at batch size 8; lower batch_size \(--batch-size\)"):
        run(prompts=["cat"], scorers=[Huge()])


def test_bad_input_is_named_before_anything_is_generated(
    run: Run, sd_path: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached_file(repository: str, name: str) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(sides, "sample", lambda *args, **kwargs: pytest.fail("something was generated"))
    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x09\x00")
    misfit = tmp_path / "misfit.safetensors"
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 3)}, misfit)

    half = tmp_path / "half"
    shutil.copytree(sd_path, half, ignore=shutil.ignore_patterns("unet"))

    class Picky(Red):
        def check_prompts(self, prompts: Sequence[str]) -> None:
            raise ScorerError("prompts[2]: not of my world")

    cases = [
        ({"base": tmp_path / "nowhere"}, "no such model"),
        ({"base": "no/such/model"}, "no such model"),
        ({"base": None}, "no base model given"),
        ({"aligned": "folder/foxs"}, "folder/foxs: no such model: no such file or folder"),
        ({"aligned": "somebody/foxs"}, "somebody/foxs: no such model: .*, nor on the Hub: no connection"),
        ({"device": "cdua"}, "device 'cdua' cannot be used: "),
        ({"aligned": tmp_path / "folder"}, "neither a LoRA, nor a model"),
        ({"aligned": tmp_path / "cut.safetensors"}, "not a readable safetensors file"),
        ({"aligned": misfit}, "does not fit"),
        ({"aligned": half}, "names 'unet', but there is no such folder"),
        ({"prompts": tmp_path / "none.txt"}, "no such prompt file"),
        ({"prompts": tmp_path / "empty.txt"}, "no prompt in it"),
        ({"prompts": tmp_path / "latin.txt"}, "not UTF-8"),
        ({"prompts": ["cat", " "]}, r"prompts\[1\]: expected text"),
        ({"prompts": []}, "no prompt in it"),
        ({"scorers": ["clib"]}, "Did you mean 'clip'"),
        ({"scorers": []}, "none given"),
        ({"scorers": [Red(), Red()]}, "two scorers of the same name"),
        ({"scorers": [Picky()]}, "not of my world"),
        ({"seeds_per_prompt": 0}, "seeds_per_prompt must be"),
        ({"tie_margin": -1.0}, "tie_margin must be"),
        ({"tie_margin": {"rad": 0.1}}, "Did you mean 'red'"),
        ({"ties": "lose"}, "ties must be"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"out": misfit.name}, "is a file"),
    ]
    for change, match in cases:
        with pytest.raises(UserError, match=match):
            run(**change)
    assert not (tmp_path / "out").exists()


def test_the_report_draws_at_random_and_ranks_the_extremes() -> None:
    """Pairs 0 … 39 change by (i - 20) / 100: 39 … 34 rise most, 0 … 5 fall most, 20 does not change."""
    changes = [(i - 20) / 100 for i in range(40)]
    pairs = [
        {"scores": {"s": {"before": 0.0, "after": c, "outcome": "tie" if c == 0 else "win" if c > 0 else "loss"}}}
        for c in changes
    ]
    chosen = choose(pairs, "s", 24, seed=0)
    assert chosen["wins"] == [39, 38, 37, 36, 35, 34] and chosen["losses"] == [0, 1, 2, 3, 4, 5]
    assert len(set(chosen["random"])) == 12 and chosen == choose(pairs, "s", 24, seed=0)
    blind = [{"scores": {"s": {"before": 0.0, "after": 1.0, "outcome": "win"}}}] * 40
    assert choose(blind, "s", 24, seed=0)["random"] == chosen["random"]  # the draw does not look at scores
    assert choose(pairs[:3], "s", 24, seed=0)["random"] == [0, 1, 2]


def test_verdict_follows_the_interval() -> None:
    cases = ([0.51, 0.6], [0.3, 0.49], [0.4, 0.6], [None, None])
    assert [verdict(c) for c in cases] == ["better", "worse", "open", "open"]
