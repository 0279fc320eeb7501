"""Runs, their checkpoints and kept steps as models: what `generate`, `evaluate` and `export-lora` take."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from t2i_align import align, generate
from t2i_align.errors import UserError
from t2i_align.evaluation.compare import evaluate
from t2i_align.inference.export import export_lora
from t2i_align.inference.models import resolve_aligned, resolve_base, resolve_model
from t2i_align.inference.push import push
from t2i_align.training import checkpoint
from tests.runs import metrics, run_values, same

FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def lora_run(sd_path: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with checkpoints at 2 and 4, and weights kept at 1 and 3."""
    values = run_values(sd_path, pairs, tmp_path_factory.mktemp("lora") / "run", train__steps=4, optim__lr=1e-2)
    values["log"] |= {"keep_weights": 3}
    return align(values, progress=False).output_dir


@pytest.fixture(scope="module")
def full_run(sd_path: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of all weights, with their average."""
    output = tmp_path_factory.mktemp("full") / "run"
    values = run_values(sd_path, pairs, output, lora=None, train__steps=2, optim__ema=0.5, optim__lr=1e-3)
    values["log"] |= {"keep_weights": 1}
    return align(values, progress=False).output_dir


def samples(*arguments: object, **options: object) -> np.ndarray:
    given = {"prompt": ["a red circle"], "out": None, "steps": 2, "progress": False, **options}
    return np.stack([np.asarray(image) for image in generate(*arguments, **given)])  # type: ignore[arg-type]


def test_every_checkpoint_and_kept_step_holds_the_lora_of_its_step(lora_run: Path, sd_path: Path) -> None:
    assert sorted(path.name for path in (lora_run / "weights").iterdir()) == ["step_000003"]
    steps = {2: "checkpoints/step_000002", 3: "weights/step_000003", 4: "checkpoints/step_000004"}
    files = {step: load_file(lora_run / folder / "lora" / FILE) for step, folder in steps.items()}
    assert same(files[4], load_file(lora_run / "lora" / FILE))
    assert not same(files[2], files[3]) and not same(files[3], files[4])
    base = samples(sd_path)
    for step, folder in steps.items():
        # B is stored with its strength alpha / rank = 2.
        trained = checkpoint.load(lora_run / f"checkpoints/step_{step:06d}")[0] if step != 3 else {}
        (name, *_) = (name for name in files[step] if name.endswith("lora_B.weight"))
        for own, tensor in trained.items():
            if own.replace(".default", "").endswith(name.removeprefix("unet.")):
                assert torch.allclose(2 * tensor, files[step][name])
        drawn = samples(lora_run / folder)
        assert np.array_equal(drawn, samples(sd_path, lora=lora_run / folder))
        assert not np.array_equal(drawn, base)
    assert np.array_equal(samples(lora_run), samples(lora_run / "checkpoints" / "step_000004"))


def test_commands_take_a_checkpoint(lora_run: Path, tmp_path: Path) -> None:
    step = lora_run / "checkpoints" / "step_000002"
    assert resolve_base(None, resolve_aligned(step)).path == resolve_base(None, resolve_aligned(lora_run)).path
    exported = load_file(export_lora(step, tmp_path / "a.safetensors", format="diffusers"))
    assert same(exported, load_file(step / "lora" / FILE))
    compared = evaluate(aligned=step, prompts=["a red circle"], scorers=["oracle"], out=tmp_path / "out", steps=1,
                        progress=False)  # fmt: skip
    assert compared.settings["aligned_kind"] == "lora"


def test_a_checkpoint_of_all_weights_is_its_model(full_run: Path, sd_path: Path, tmp_path: Path) -> None:
    """With the average, with which the run ends; also where the run was stopped before it wrote its model."""
    whole = samples(full_run / "model")
    assert np.array_equal(whole, samples(full_run / "checkpoints" / "step_000002"))
    assert np.array_equal(whole, samples(full_run / "weights" / "step_000002"))
    assert not np.array_equal(whole, samples(full_run / "weights" / "step_000001"))
    stopped = shutil.copytree(full_run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    assert np.array_equal(whole, samples(stopped)) and not np.array_equal(whole, samples(sd_path))
    assert resolve_model(full_run) == str(full_run / "model")
    for name in ("model", "checkpoints/step_000002"):
        compared = evaluate(aligned=full_run / name, base=sd_path, prompts=["a red circle"], scorers=["oracle"],
                            out=tmp_path / name, steps=1, progress=False)  # fmt: skip
        assert compared.settings["aligned_kind"] == "model" and compared.settings["identical_pairs"] == 0
    push(full_run / "checkpoints" / "step_000002", "me/foxes", out=tmp_path / "card")
    assert np.array_equal(whole, samples(tmp_path / "card")) and not (tmp_path / "card" / checkpoint.STATE).exists()


def test_a_lora_or_a_run_in_place_of_a_model_is_named(lora_run: Path, sd_path: Path) -> None:
    for path in (lora_run, lora_run / "lora" / FILE, lora_run / "checkpoints" / "step_000002"):
        with pytest.raises(
            UserError, match=r"with a LoRA, which needs its base model; .*--lora, --aligned, or lora.init"
        ):
            resolve_model(path)
    with pytest.raises(UserError, match="this run has a lora of its own; leave out"):
        samples(lora_run, lora=lora_run)
    steps = lora_run / "checkpoints"
    start = shutil.copytree(steps / "step_000002", steps / "step_000000", ignore=shutil.ignore_patterns("lora"))
    with pytest.raises(UserError, match="step_000000: nothing is trained yet in this checkpoint"):
        resolve_aligned(start)
    shutil.rmtree(start)


def test_a_dora_in_half_precision_is_saved_and_loaded(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    """It starts at the base: the first loss is log 2. Its magnitudes are in the file, all tensors in bf16."""
    lora = {"rank": 2, "alpha": 4.0, "dora": True, "save_precision": "bf16"}
    values = run_values(sd_path, pairs, tmp_path / "run", lora=lora, optim__lr=1e-2)
    run = align(values, progress=False)
    assert metrics(run.output_dir)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    tensors = load_file(run.weights)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert any("magnitude" in name for name in tensors)
    assert not np.array_equal(samples(run.output_dir), samples(sd_path))
    with pytest.raises(UserError, match=r"lora.dora: starts from the model's own magnitudes; leave lora.init null"):
        align({**values, "lora": {**lora, "init": str(run.weights)}}, progress=False)
