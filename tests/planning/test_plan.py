"""Planned memory against memory that a step really takes, published sizes, and what makes a run fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan import measured
from t2i_align import config as configuration
from t2i_align.config import RunConfig
from t2i_align.errors import UserError
from t2i_align.inference.models import open_model
from t2i_align.planning.cards import Card
from t2i_align.planning.plan import memory_warning, plan
from t2i_align.planning.published import described
from t2i_align.planning.trace import trace

CHECKPOINTED = {"train": {"batch_size": 4, "gradient_checkpointing": True}}
INVERTED = {"objective": {"name": "inpo", "levels": 3, "renoise": 1}}
DRAWN = {"objective": {"name": "reward", "schedule": "draft", "last": 2, "sampling_steps": 4, "guidance": 2.0}}
OFFLOADED = {"train": {**CHECKPOINTED["train"], "offload": "base"}}


def run(folder: Path, **values: Any) -> RunConfig:
    defaults = {"objective": "diffusion_dpo", "data": {"limit": 16}, "train": {"batch_size": 4}}
    return configuration.from_mapping({"output_dir": str(folder / "run"), **defaults, **values})


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": None}, CHECKPOINTED, OFFLOADED, INVERTED, DRAWN],
    ids=["lora", "full", "checkpointing", "offload", "inpo", "reward"],
)
def test_planned_memory_is_within_a_tenth_of_the_measured(changes: dict[str, Any], tmp_path: Path) -> None:
    config = run(tmp_path, **changes)
    planned = trace(config, device="cpu")
    peak, _ = measured(config, tmp_path / "trace.json", timed=0)  # on a CPU, with what is offloaded
    assert planned.peak + planned.host == pytest.approx(peak, rel=0.1)
    assert (planned.host > planned.memory["weights"]) == (config.train.offload == "base")
    assert all(size >= 0 for size in planned.memory.values())
    assert (planned.memory["reference"] > 0) == (config.lora is None)


@pytest.mark.parametrize(("objective", "model"), [("dense_dpo", "wan"), ("dcpo", "sd"), ("kto", "sd"), ("lpo", "sd")])
def test_steps_of_objectives_with_columns_and_other_groups_are_traced(
    objective: str, model: str, tmp_path: Path
) -> None:
    planned = trace(run(tmp_path, objective=objective, model={"path": f"testbed:{model}"}, train={"batch_size": 2}))
    assert planned.memory["activations"] > 0


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 859_520_964),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2_567_463_684),
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800),
    ],
)
def test_bundled_configurations_have_the_published_sizes(model: str, parameters: int, tmp_path: Path) -> None:
    with described(run(tmp_path, model={"path": model})) as local:
        denoiser = open_model(local.model, weights=False).denoiser
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters


def test_keys_that_make_a_run_fit_are_found_and_traced(tmp_path: Path) -> None:
    config = run(tmp_path, train={"batch_size": 8, "precision": "bf16"})
    narrow = Card("narrow", 1.04, 100, 50)
    planned = plan(config, card=narrow)
    assert planned.keys is not None and planned.fitting is not None and not planned.fits
    assert planned.keys.startswith("train.gradient_checkpointing=true") and planned.keys in str(planned)
    assert narrow.fits(planned.fitting.peak) and not narrow.fits(planned.trace.peak)
    assert configuration.changed(config, {}, planned.keys.split()).train.gradient_checkpointing


def test_a_base_that_fits_in_no_bits_is_offloaded(tmp_path: Path) -> None:
    config = run(tmp_path, train={"batch_size": 1, "precision": "bf16", "gradient_checkpointing": True})
    quantised, offloaded = (
        trace(configuration.changed(config, {}, keys))
        for keys in (["model.quantize=nf4", "optim.optimizer=adamw8bit"], ["train.offload=base"])
    )
    assert offloaded.memory["weights"] < quantised.memory["weights"]
    between = Card("between", (offloaded.peak + quantised.peak) / 2 * 1.05 / 2**30 + 1, 100, 50)
    planned = plan(config, card=between)
    assert planned.keys and planned.keys.endswith("model.quantize=null train.offload=base")
    assert configuration.changed(config, {}, planned.keys.split()).train.offload == "base"


def test_warning_names_the_card_only_where_the_run_does_not_fit(tmp_path: Path) -> None:
    config = run(tmp_path, train={"batch_size": 1, "precision": "bf16", "gradient_checkpointing": True})
    config = replace(config, optim=replace(config.optim, optimizer="adamw8bit"))
    assert memory_warning(config, Card("wide", 1.2, 100, 50)) == ""
    assert "narrow: 1.0 GiB needed of 0.5 GiB: does not fit" in memory_warning(config, Card("narrow", 0.5, 100, 50))


def test_accumulation_multiplies_operations_and_keeps_gradients(tmp_path: Path) -> None:
    once = trace(run(tmp_path, lora=None))
    thrice = trace(run(tmp_path, lora=None, train={"batch_size": 4, "accumulate": 3}))
    assert thrice.flops == 3 * once.flops and thrice.peak >= once.peak


def test_reference_copy_is_in_the_precision_of_the_run_and_a_quantised_base_is_smaller(tmp_path: Path) -> None:
    full = trace(run(tmp_path, lora=None, train={"batch_size": 1, "precision": "bf16"}))
    assert full.memory["reference"] == pytest.approx(full.memory["weights"] / 2, rel=0.05)
    plain, small = (
        trace(run(tmp_path, model={"quantize": quantize}, train={"batch_size": 1, "precision": "bf16"}))
        for quantize in (None, "nf4")
    )
    assert small.memory["weights"] < plain.memory["weights"] and small.flops == plain.flops


def test_optimiser_that_reads_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'adafactor': its course depends on tensors' values"):
        trace(run(tmp_path, optim={"optimizer": "adafactor"}, train={"batch_size": 1}))


def test_passes_of_inversion_and_sampling_are_counted_as_often_as_a_sample_takes_them(tmp_path: Path) -> None:
    plain, inverted, drawn, guided = (
        trace(run(tmp_path, objective=objective)).flops
        for objective in (
            "diffusion_dpo",
            {"name": "inpo", "levels": 4},
            {"name": "reward", "schedule": "longalign", "sampling_steps": 4, "every": 2, "guidance": 1.0},
            {"name": "reward", "schedule": "longalign", "sampling_steps": 4, "every": 2, "guidance": 2.0},
        )
    )
    # Diffusion-DPO: both images forward by policy and reference, and backward, which is about as much again.
    forward = plain / 2 / 3
    assert inverted == pytest.approx(plain + 2 * 2.5 * forward, rel=0.05)  # 1 to 4 steps, as often each
    # One image four times forward, and of two steps again and backward; the rest is the decoder.
    network = (guided - drawn) / 8
    assert network == pytest.approx(forward, rel=0.1) and drawn > 8 * network


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    config = run(tmp_path, personal={"embedder": "oracle"})
    with pytest.raises(UserError, match="personal: its branch depends on the users' data"):
        plan(config)
    assert "cannot be planned" in memory_warning(config, Card("any", 24, 100, 50))
    with pytest.raises(UserError, match=r"unknown card 'RTX 4091'.*RTX 4090"):
        plan(replace(config), card="RTX 4091")
