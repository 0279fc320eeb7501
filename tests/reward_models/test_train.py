"""Training preference models: they learn, they split, they continue, PAL knows its users, and bad input is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic_core import to_jsonable_python
from safetensors.torch import load_file, save_file

import reward_scorers
from reward_scorers import ScorerError
from reward_scorers.heads import PAL, LinearHead
from t2i_align import cli
from t2i_align.data.splits import split as data_split
from t2i_align.errors import UserError
from t2i_align.reward_models import config as configuration
from t2i_align.reward_models.config import PreferenceConfig, ScorerRun
from t2i_align.reward_models.preferences import open_preferences, split
from t2i_align.reward_models.train import train_scorer
from t2i_align.utils.settings import build
from tests.reward_scorers.small import write_hf_clip
from tests.runs import metrics, run_in_two_processes

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "scorers").glob("*.yaml"))
USERS = ("warm", "cold")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf-clip:{write_hf_clip(tmp_path_factory.mktemp('clip') / 'model')}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red against blue images under 40 prompts: half of the users want red, the others blue."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(80):
        for name, colour in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
            noise = rng.integers(-30, 30, (64, 64, 3)) + np.array(colour)
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{number}-{name}.png")
        user = USERS[number % 2]
        images = [f"{number}-red.png", f"{number}-blue.png"]
        scores = [1, 0] if user == "warm" else [0, 1]
        rows.append({"prompt": f"prompt {number // 2}", "images": images, "scores": scores, "user": user})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one_taste = [row for row in rows if row["user"] == "warm"]
    (folder / "warm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one_taste))
    return folder


def run_of(output: Path, source: Path, model: str, **more: Any) -> ScorerRun:
    values: dict[str, Any] = {
        "output_dir": str(output),
        "model": model,
        "data": {"path": str(source), "holdout_prompts": 0.3},
        "optim": {"lr": 3e-3},
        "train": {"steps": 12, "batch_size": 8},
        "log": {"every": 4, "checkpoint_every": 5},
    }
    for key, value in more.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return build(ScorerRun, values)


@pytest.mark.parametrize("tune", ["full", "lora", "linear"])
def test_training_learns_the_preference_and_the_scorer_can_be_used(
    tune: str, clip: str, source: Path, tmp_path: Path
) -> None:
    lr = {"full": 1e-3, "lora": 1e-2, "linear": 3e-2}[tune]
    run = run_of(tmp_path / "run", source / "warm.jsonl", clip, tune=tune, optim={"lr": lr}, train={"steps": 25})
    result = train_scorer(run, progress=False)
    assert result.accuracy["new_prompts"].accuracy > 0.9
    scorer = reward_scorers.build(f"trained:{tmp_path / 'run'}")
    red, blue = (Image.open(source / f"0-{name}.png") for name in ("red", "blue"))
    scores = scorer.score_images([red, blue], ["prompt 0", "prompt 0"])
    assert scores[0] > scores[1] and scorer.name == "trained:run" and "sha256" in scorer.version
    pixels = torch.rand(1, 3, 64, 64, requires_grad=True)
    scorer.score(pixels, ["x"]).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_lora_is_merged_so_that_transformers_alone_loads_it(clip: str, source: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    train_scorer(run_of(tmp_path / "run", source / "warm.jsonl", clip, tune="lora"), progress=False)
    saved = load_file(tmp_path / "run" / "scorer" / "clip" / "model.safetensors")
    before = CLIPModel.from_pretrained(clip.removeprefix("hf-clip:")).state_dict()
    assert saved.keys() == before.keys()
    changed = [key for key in saved if not torch.equal(saved[key], before[key])]
    assert changed and all("_proj" in key for key in changed)


def test_a_stopped_run_continues_bit_for_bit(clip: str, source: Path, tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", source / "warm.jsonl", clip, tune="lora", lora={"dropout": 0.1})
    train_scorer(whole, progress=False)
    half = dataclasses.replace(whole, output_dir=str(tmp_path / "half"))
    train_scorer(half, progress=False)
    for folder in (tmp_path / "half" / "checkpoints").glob("step_000012"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()  # as if it had been killed after step 10
    train_scorer(dataclasses.replace(half, resume=True), progress=False)
    one, other = (load_file(tmp_path / name / "scorer/clip/model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert metrics(tmp_path / "whole")[-1] == metrics(tmp_path / "half")[-1]


def test_a_stopped_run_does_not_continue_on_another_base(clip: str, source: Path, tmp_path: Path) -> None:
    base = shutil.copytree(clip.removeprefix("hf-clip:"), tmp_path / "base")
    run = run_of(tmp_path / "run", source / "warm.jsonl", f"hf-clip:{base}", train={"steps": 2})
    train_scorer(run, progress=False)
    assert train_scorer(dataclasses.replace(run, resume=True), progress=False).steps == 2
    file = base / "model.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="the base model has changed since step_000002"):
        train_scorer(dataclasses.replace(run, resume=True), progress=False)


@pytest.mark.parametrize("tune", ["linear", "pal"])
def test_two_processes_train_as_one_with_the_same_global_batch(
    tune: str, clip: str, source: Path, tmp_path: Path
) -> None:
    one = run_of(tmp_path / "one", source / "warm.jsonl", clip, tune=tune, train={"balance": "none"})
    train_scorer(one, progress=False)
    values = to_jsonable_python(one) | {"output_dir": str(tmp_path / "two")}
    values["train"]["batch_size"] = 4
    run_in_two_processes(values, tmp_path, module=("t2i_align", "train-scorer"))
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        # Adam takes whole steps along gradients that are rounding alone: their order shows in the update's length.
        assert ours.pop("update_norm") == pytest.approx(theirs.pop("update_norm"), rel=1e-2)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_pal_tells_users_apart_and_learns_new_ones_from_few_pairs(clip: str, source: Path, tmp_path: Path) -> None:
    pal = {"latent": 8, "hidden": 16}
    run = run_of(tmp_path / "pal", source / "pairs.jsonl", clip, tune="pal", pal=pal, loss="imagereward",
                 optim={"lr": 2e-2}, train={"steps": 150, "batch_size": 32})  # fmt: skip
    result = train_scorer(run, progress=False)
    assert result.accuracy["new_prompts"].accuracy > 0.9
    red, blue = (Image.open(source / f"1-{name}.png") for name in ("red", "blue"))
    for user, sign in (("warm", 1), ("cold", -1)):
        scores = reward_scorers.build(f"trained:{tmp_path / 'pal'}:{user}").score_images([red, blue], ["p", "p"])
        assert sign * (scores[0] - scores[1]) > 0, user
    one = dataclasses.replace(run, output_dir=str(tmp_path / "bt"), pal=dataclasses.replace(run.pal, prototypes=1))
    assert 0.3 < train_scorer(one, progress=False).accuracy["new_prompts"].accuracy < 0.7  # opposed tastes cancel
    rows = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
    new = [{**row, "user": f"new-{row['user']}"} for row in rows[:8]]
    (source / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    added = run_of(tmp_path / "more", source / "new.jsonl", str(tmp_path / "pal"), tune="users",
                   data={"holdout_prompts": 0.0}, optim={"lr": 0.2}, train={"steps": 60})  # fmt: skip
    train_scorer(added, progress=False)
    before, after = (load_file(tmp_path / name / "scorer/head.safetensors") for name in ("pal", "more"))
    assert all(torch.equal(before[key], after[key]) for key in before if key != "w")
    assert torch.equal(before["w"], after["w"][:2]) and len(after["w"]) == 4
    scores = reward_scorers.build(f"trained:{tmp_path / 'more'}:new-cold").score_images([red, blue], ["p", "p"])
    assert scores[1] > scores[0]
    with pytest.raises(ScorerError, match=r"does not know the user 'nobody'. Known: cold, warm"):
        reward_scorers.build(f"trained:{tmp_path / 'pal'}:nobody")


def test_pal_with_one_prototype_is_one_model_for_all() -> None:
    torch.manual_seed(0)
    head = PAL(8, 3, prototypes=1)
    images, texts = torch.randn(4, 8), torch.randn(4, 8)
    first = head(images, texts, torch.tensor([0, 1, 2, -1]))
    torch.testing.assert_close(first, head(images, texts))
    two = PAL(8, 3, prototypes=2)
    assert not torch.allclose(two(images, texts, torch.zeros(4, dtype=torch.long)), two(images, texts))


@pytest.mark.parametrize("options", [{"source": "prompt"}, {"score": "angle"}, {"source": "prompt", "score": "angle"}])
def test_every_form_of_pal_has_finite_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = PAL(8, 2, latent=4, hidden=8, **options)
    head(torch.randn(5, 8), torch.randn(5, 8), torch.tensor([0, 1, 1, 0, -1])).sum().backward()
    used = {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    assert {"w", "f.0.weight"} <= set(used) and all(bool(g.isfinite().all()) for g in used.values())


def test_the_linear_head_begins_as_the_cosine() -> None:
    images, texts = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(LinearHead(8)(images, texts), (images * texts).sum(-1))


def test_no_prompt_and_no_user_is_on_both_sides(source: Path, tmp_path: Path) -> None:
    data = open_preferences(str(source / "pairs.jsonl"), tmp_path, progress=False)
    parts = split(data, PreferenceConfig(holdout_prompts=0.4))
    prompts = [{data.prompts[row] for row in rows} for rows in (parts["train"], parts["new_prompts"])]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1] and not parts["new_users"]
    parts = split(data, PreferenceConfig(holdout_prompts=0.0, holdout_users=0.45))
    assert not {data.users[row] for row in parts["train"]} & {data.users[row] for row in parts["new_users"]}
    assert len(parts["train"]) + len(parts["new_users"]) == 80


def test_the_scorer_holds_out_the_prompts_that_data_split_holds_out(source: Path, tmp_path: Path) -> None:
    data = open_preferences(str(source / "pairs.jsonl"), tmp_path / "index", progress=False)
    for seed in (0, 7):
        data_split(source / "pairs.jsonl", tmp_path / f"split{seed}", held_out=0.3, seed=seed)
        parts = split(data, PreferenceConfig(holdout_prompts=0.3, holdout_seed=seed))
        held_out = (tmp_path / f"split{seed}" / "held_out_prompts.txt").read_text().splitlines()
        assert {data.prompts[row] for row in parts["new_prompts"]} == set(held_out)


@pytest.mark.parametrize("tune", ["linear", "lora"])
def test_sources_that_differ_in_images_alone_are_told_apart(tune: str, clip: str, source: Path, tmp_path: Path) -> None:
    """File names, prompts and labels of `swapped` are those of `data`; its red images are blue."""
    data, swapped = tmp_path / "data", tmp_path / "swapped"
    shutil.copytree(source, data)
    shutil.copytree(source, swapped)
    for red in swapped.glob("*-red.png"):
        blue = red.with_name(red.name.replace("red", "blue"))
        blue.write_bytes((data / red.name).read_bytes())
        red.write_bytes((data / blue.name).read_bytes())
    files = {"path": str(data / "warm.jsonl"), "test": str(swapped / "warm.jsonl")}
    run = run_of(tmp_path / "run", data / "warm.jsonl", clip, tune=tune, optim={"lr": 3e-2}, data=files)
    accuracy = train_scorer(run, progress=False).accuracy
    assert accuracy["new_prompts"].accuracy > 0.9 and accuracy["test"].accuracy < 0.1
    shutil.rmtree(data)
    shutil.copytree(swapped, data)
    with pytest.raises(UserError, match="the data has changed since step_000012 was saved"):
        train_scorer(dataclasses.replace(run, resume=True), progress=False)


def test_bad_runs_are_named_before_anything_is_trained(clip: str, source: Path, tmp_path: Path) -> None:
    warm, ties, nothing = (source / f"{name}.jsonl" for name in ("warm", "ties", "nothing"))
    lines = [{**json.loads(line), "scores": [1, 1], "user": None} for line in warm.read_text().splitlines()]
    ties.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (warm, {"loss": "dpo"}, "loss must be 'pickscore', 'hpsv2', 'imagereward' or 'btt', found 'dpo'"),
        (warm, {"tune": "most"}, "tune must be .*, found 'most'"),
        (warm, {"model": "clip:ViT-B-32:openai"}, "model must be hf-clip:"),
        (warm, {"data": {"holdout_prompts": 1.0}}, r"data.holdout_prompts must be a number in \[0, 1\)"),
        (warm, {"train": {"steps": 0}}, "train.steps must be a whole number of at least 1"),
        (warm, {"pal": {"prototypes": 0}}, "pal.prototypes must be a whole number of at least 1"),
        (warm, {"data": {"pth": "x"}}, "data.pth: unknown key"),
        (
            warm,
            {"tune": "lora", "lora": {"targets": ["zzz"]}},
            "lora.targets: .'zzz'. fits no module .*Choices: attention",
        ),
        (nothing, {}, "no such file or folder"),
        (warm, {"model": "hf-clip:/no/such/folder"}, r"model: .*/no/such/folder: no such folder"),
        (ties, {"loss": "hpsv2"}, "only ties to train on; hpsv2 learns nothing from them, loss=pickscore or btt does"),
        (ties, {"tune": "pal"}, "names no users, which tune=pal needs"),
    ]
    for number, (file, change, match) in enumerate(cases):
        with pytest.raises(UserError, match=match):
            train_scorer(run_of(tmp_path / f"bad{number}", file, **{"model": clip, **change}), progress=False)
    run = run_of(tmp_path / "good", warm, clip, tune="linear")
    train_scorer(run, progress=False)
    for change, match in (
        ({}, r"holds a run already .*resume=true"),
        ({"loss": "hpsv2", "resume": True}, "loss is 'pickscore' there, 'hpsv2' here"),
        ({"output_dir": str(tmp_path / "u"), "model": str(tmp_path / "good"), "tune": "users"}, "only PAL has users"),
    ):
        with pytest.raises(UserError, match=match):
            train_scorer(dataclasses.replace(run, **change), progress=False)


def test_diverged_training_stops_and_names_its_last_good_checkpoint(clip: str, source: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", source / "warm.jsonl", clip, tune="full", optim={"lr": 1e36})
    with pytest.raises(
        UserError, match=r"is not finite .*so the run has stopped. The last good .*step_000000. A smaller"
    ):
        train_scorer(run, progress=False)


def test_a_trained_scorer_refuses_another_base_and_metadata(clip: str, source: Path, tmp_path: Path) -> None:
    train_scorer(run_of(tmp_path / "run", source / "warm.jsonl", clip, tune="linear"), progress=False)
    file = tmp_path / "run" / "scorer" / "scorer.json"
    metadata = json.loads(file.read_text())
    for content, reason in (
        ({**metadata, "base_weights": "sha256 0123"}, r"was trained on hf-clip:.* with sha256 0123"),
        ({**metadata, "layout": 99}, "written with layout 99, this version reads 1"),
        ({**metadata, "kind": "tree"}, "expected the kind clip or linear or pal, found 'tree'"),
        ({k: v for k, v in metadata.items() if k not in ("width", "base")}, "of kind linear lacks base, width"),
        ([1], r"scorer.json: not the metadata of a scorer"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ScorerError, match=reason):
            reward_scorers.build(f"trained:{tmp_path / 'run'}")
    with pytest.raises(ScorerError, match=r"no scorer.json in it"):
        reward_scorers.build(f"trained:{tmp_path}")


def test_the_command(clip: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"output_dir": str(tmp_path / "run"), "model": clip, "tune": "linear", "train": {"steps": 3}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train-scorer", str(tmp_path / "run.yaml"), f"data.path={source / 'warm.jsonl'}"]) == 0
    printed = capsys.readouterr().out
    assert "new prompts" in printed and f"the scorer is trained:{tmp_path / 'run' / 'scorer'}" in printed
    assert cli.main(["train-scorer", str(tmp_path / "run.yaml"), "train.stesp=3"]) == 2
    assert "train.stesp: unknown key. Did you mean 'steps'" in capsys.readouterr().err


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_of_a_scorer_loads(file: Path) -> None:
    run = configuration.load(file, ["train.steps=7"])
    assert run.output_dir == f"runs/{file.stem}" and run.train.steps == 7
    assert yaml.safe_load(file.read_text())["model"] == run.model and len(CONFIGS) == 4
