"""Runs with users: which choices stand for whom, exact resume, two processes, and users with few choices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from t2i_align import align
from t2i_align import config as configuration
from t2i_align.conditioning.personal import read
from t2i_align.data.loader import PreparedDataset
from t2i_align.errors import UserError
from tests.reward_scorers.small import write_hf_clip
from tests.runs import align_killed, image, metrics, run_in_two_processes, run_values, same

USERS = {"ann": 5, "bob": 4, "cy": 1}  # choices of each


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of three users, and a tie."""
    folder, lines = tmp_path_factory.mktemp("choices"), []
    for number, user in enumerate(user for user, count in USERS.items() for _ in range(count)):
        for side in range(2):
            image(2 * number + side).save(folder / f"{number}_{side}.png")
        lines.append({"id": f"g{number}", "prompt": f"prompt {number}", "user": user,
                      "images": [f"{number}_0.png", f"{number}_1.png"], "scores": [1, 0]})  # fmt: skip
    lines.append({**lines[0], "id": "tie", "prompt": "another", "scores": [1, 1]})
    (folder / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "choices.jsonl"


def values(model: Path, data: Path, clip: Path, output: Path, **changes: object) -> dict:
    personal = {"embedder": f"hf-clip:{clip}", "examples": [1, 3], "width": 8, "tokens": 2, "dropout": 0.2}
    personal |= {key.removeprefix("personal__"): changes.pop(key) for key in [*changes] if key.startswith("personal")}
    return run_values(
        model, data, output, lora=None, personal=personal, data__cache_dir=str(data.parent / "cache"), **changes
    )


def source(run: dict, tmp_path: Path) -> PreparedDataset:
    """The data of a run, with its users."""
    from accelerate import Accelerator

    from t2i_align.training.run import load_data, load_model

    config = configuration.from_mapping(run)
    loaded = load_data(config, Accelerator(cpu=True), load_model(config, torch.device("cpu")), progress=False)
    assert isinstance(loaded, PreparedDataset) and loaded.users
    return loaded


def test_support_is_the_users_own_and_never_the_training_pair_or_its_prompt(
    sd_path: Path, choices: Path, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = values(sd_path, choices, clip, tmp_path / "run", personal__dropout=0.0)
    data = source(run, tmp_path)
    assert data.counts == {"groups": 9, "skipped": 0, "ties_left_out": 1, "users": 3,
                           "of_users_with_few_choices_left_out": 1}  # fmt: skip
    assert "1 groups of 1 users with too few choices are left out: cy" in caplog.text
    users, all_rows = data.users, {}
    for user, history in users.histories.items():
        for rows, prompts in zip(history.rows, history.prompts, strict=True):
            all_rows[rows.float().flatten().numpy().tobytes()] = (user, *prompts)
    assert len(all_rows) == 10, "the tie is no choice, and each choice has rows of its own"
    counts = set()
    for epoch in range(20):
        for number in range(9):
            rows = users.rows([f"{epoch}/g{number}"])[0]
            found = [all_rows[row.numpy().tobytes()] for row in rows if row.any()]
            assert {user for user, _ in found} == {"ann" if number < 5 else "bob"}
            assert f"prompt {number}" not in {prompt for _, prompt in found} and len({*found}) == len(found)
            counts.add(len(found))
    assert counts == {1, 2, 3}
    again = source(run, tmp_path).users
    assert torch.equal(again.rows(["3/g1", "4/g7"]), users.rows(["3/g1", "4/g7"]))


def test_users_with_few_choices_by_choice(sd_path: Path, choices: Path, clip: Path, tmp_path: Path) -> None:
    data = source(values(sd_path, choices, clip, tmp_path / "a", personal__few="null"), tmp_path)
    assert data.counts["groups"] == 10 and data.counts["without_a_user"] == 1
    assert not data.users.rows(["0/g9"]).any()
    with pytest.raises(UserError, match=r"1 of 10 groups are of 1 users with fewer than 1 choices .* such as cy"):
        source(values(sd_path, choices, clip, tmp_path / "b", personal__few="error"), tmp_path)
    with pytest.raises(UserError, match=r"10 of 10 groups are of 3 users with fewer than 9 choices"):
        source(values(sd_path, choices, clip, tmp_path / "c", personal__examples=9), tmp_path)
    dropped = source(values(sd_path, choices, clip, tmp_path / "d", personal__dropout=0.5), tmp_path)
    shares = [dropped.users.rows([f"{epoch}/g0"]).any().item() for epoch in range(200)]
    assert 0.4 < sum(shares) / 200 < 0.6


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}])
def test_a_run_starts_at_log_2_learns_resumes_exactly_and_is_saved(
    lora: dict | None, sd_path: Path, choices: Path, clip: Path, tmp_path: Path
) -> None:
    run = values(sd_path, choices, clip, tmp_path / "whole", train__steps=4)
    result = align({**run, "lora": lora}, progress=False)
    lines = metrics(result.output_dir)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7) and lines[-1]["loss"] != lines[0]["loss"]
    embedding, state = read(result.weights)
    assert embedding.embedder == f"hf-clip:{clip}" and state["user_v.0.weight"].abs().max() > 0
    names = sorted(file.name for file in result.weights.parent.iterdir())
    assert names == ["personal.safetensors", *(["pytorch_lora_weights.safetensors"] if lora else [])]
    killed = {**run, "lora": lora, "output_dir": str(tmp_path / "killed")}
    align_killed(killed, before=lambda step, state: False, after=lambda step, state: step == 2)
    resumed = align({**killed, "resume": True}, progress=False)
    assert same(load_file(resumed.weights), load_file(result.weights))


def test_another_embedder_or_history_is_no_continuation(
    sd_path: Path, choices: Path, clip: Path, tmp_path: Path
) -> None:
    run = values(sd_path, choices, clip, tmp_path / "run", train__steps=2)
    align(run, progress=False)
    with pytest.raises(UserError, match=r"personal.examples is \[1, 3\] there, 2 here"):
        align({**run, "personal": {**run["personal"], "examples": 2}, "resume": True}, progress=False)


@pytest.mark.parametrize("objective", ["dcpo", "tdpo", "mapo", "inpo"])
def test_other_objectives_run_with_users(
    objective: str, sd_path: Path, choices: Path, clip: Path, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in choices.read_text().splitlines()][:9]
    for number, line in enumerate(lines):
        line |= {"captions": [f"one {number}", f"two {number}"], "negative_caption": f"no {number}"}
    file = choices.parent / "captioned.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = values(sd_path, file, clip, tmp_path / "run", objective={"name": objective}, train__steps=2)
    result = align(run, progress=False)
    assert read(result.weights)[1]["user_v.0.weight"].abs().max() > 0


def test_two_processes_train_as_one(sd_path: Path, choices: Path, clip: Path, tmp_path: Path) -> None:
    one = align(values(sd_path, choices, clip, tmp_path / "one", train__steps=2), progress=False)
    run_in_two_processes(
        values(sd_path, choices, clip, tmp_path / "two", train__steps=2, train__batch_size=2), tmp_path
    )
    state, other = load_file(one.weights), load_file(tmp_path / "two" / "personal" / one.weights.name)
    for name, tensor in state.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def test_what_cannot_be_used_is_refused(sd_path: Path, pairs: Path, choices: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 'user' with each group, but only 0 of 12 groups have it"):
        align(values(sd_path, pairs, clip, tmp_path / "a"), progress=False)
    with pytest.raises(UserError, match=r"personal needs data\.cache=true"):
        configuration.from_mapping(values(sd_path, choices, clip, tmp_path / "b", data__cache=False))
    with pytest.raises(UserError, match="expected a CLIP-style scorer or vlm:MODEL"):
        align(values(sd_path, choices, clip, tmp_path / "c", personal__embedder="temporal_flickering"), progress=False)
    with pytest.raises(UserError, match=r"personal\.layers and personal\.pool are for a VLM"):
        configuration.from_mapping(values(sd_path, choices, clip, tmp_path / "d", personal__pool="mean"))
