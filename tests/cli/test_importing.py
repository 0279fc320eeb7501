"""People from elsewhere: other trainers' keys are answered with ours, their commands become a configuration."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from t2i_align import config
from t2i_align import objectives as registry
from t2i_align.cli import main
from t2i_align.cli.importing import import_command
from t2i_align.errors import UserError
from t2i_align.utils.settings import elsewhere

DIFFUSERS = """
# as in diffusers' examples
export MODEL_NAME="my/sdxl"
accelerate launch --mixed_precision=bf16 train_diffusion_dpo_sdxl.py \\
  --pretrained_model_name_or_path=$MODEL_NAME --pretrained_vae_model_name_or_path=my/vae \\
  --output_dir="dpo-sdxl" --dataset_name=some/pairs --train_batch_size=8 --gradient_accumulation_steps=2 \\
  --gradient_checkpointing --use_8bit_adam --rank=8 --learning_rate=1e-5 --report_to="wandb" \\
  --lr_scheduler="constant" --lr_warmup_steps=100 --max_train_steps=2000 --checkpointing_steps=500 \\
  --run_validation --validation_steps=50 --seed="3" --beta_dpo=2500 --loss_type=hinge --push_to_hub
"""
KOHYA = (
    "accelerate launch --num_cpu_threads_per_process 1 sdxl_train_network.py"
    " --pretrained_model_name_or_path=ill.safetensors"
    " --train_data_dir 'my pairs' --output_dir out --output_name foxes --network_module=networks.lora --network_dim 32"
    " --network_alpha 16 --resolution 832,1216 --enable_bucket --optimizer_type AdamW8bit --unet_lr 1e-4"
    " --lr_scheduler cosine --mixed_precision bf16 --max_train_epochs 10 --save_every_n_steps 200 --xformers"
    " --noise_offset 0.1"
)


def imported(command: str) -> tuple[dict, str]:
    text = import_command(command)
    return yaml.safe_load(text), text


def test_a_command_of_diffusers_becomes_a_configuration() -> None:
    """The beta is doubled, as ours is halved in the loss; the launcher's options are the launcher's, but precision."""
    values, text = imported(DIFFUSERS)
    run = config.from_mapping(values)
    assert (run.model.path, run.data.path, run.output_dir) == ("my/sdxl", "hub:some/pairs", "dpo-sdxl")
    assert (run.objective.name, run.objective.beta, run.objective.link) == ("diffusion_dpo", 5000.0, "hinge")
    assert run.lora is not None and run.lora.rank == 8
    assert (run.optim.lr, run.optim.optimizer, run.optim.warmup_steps) == (1e-5, "adamw8bit", 100)
    assert run.optim.schedule == "constant_with_warmup"
    assert (run.train.steps, run.train.batch_size, run.train.accumulate, run.train.seed) == (2000, 8, 2, 3)
    assert run.train.precision == "bf16" and run.train.gradient_checkpointing
    assert run.log.trackers == ["wandb"] and run.log.checkpoint_every == 500 and run.validation.every == 50
    assert "# Not carried over: pretrained_vae_model_name_or_path my/vae, run_validation" in text
    assert "# push_to_hub (True): the command `t2i-align push`" in text


def test_a_command_of_kohya_becomes_a_configuration(tmp_path: Path) -> None:
    """Its resolution is width,height; ours [height, width]."""
    (tmp_path / "train.sh").write_text(KOHYA)
    values, text = imported(str(tmp_path / "train.sh"))
    run = config.from_mapping(values)
    assert (run.objective.name, run.model.path, run.data.path) == ("sft", "ill.safetensors", "my pairs")
    assert run.lora is not None and (run.lora.rank, run.lora.alpha) == (32, 16.0)
    assert run.data.resolution == (1216, 832) and run.data.buckets and run.output_dir == "out/foxes"
    assert run.train.attention == "xformers" and run.log.keep_weights == 200 and run.optim.schedule == "cosine"
    assert "# max_train_epochs (10): train.steps, which counts optimiser steps" in text
    assert "for preference pairs: objective=diffusion_dpo" in text and "noise_offset (0.1): no key of its own" in text


def test_configurations_of_other_trainers_are_imported_too(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[network]\nnetwork_dim = 4\n[train]\nlearning_rate = 1e-3\nbf16 = true\n")
    (tmp_path / "b.json").write_text('{"--lora_rank": 4, "--learning_rate": "1e-3", "--mixed_precision": "bf16"}')
    for name in ("a.toml", "b.json"):
        run = config.from_mapping(imported(str(tmp_path / name))[0])
        assert (run.lora.rank, run.optim.lr, run.train.precision) == (4, 1e-3, "bf16")  # type: ignore[union-attr]


def test_the_command_line_writes_a_file_and_keeps_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    assert main(["import-command", KOHYA, "--out", str(out)]) == 0
    assert f"next: t2i-align train {out} data.path=my_pairs.jsonl" in capsys.readouterr().out
    assert config.load(out).lora.rank == 32  # type: ignore[union-attr]
    assert main(["import-command", KOHYA, "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert main(["import-command", "ls"]) == 2 and "no option such as --learning_rate" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"what was imported does not make a run: lora.rank must be .*found 0"):
        import_command("train.py --network_dim 0")


@pytest.mark.parametrize("name", sorted(elsewhere()))
def test_each_foreign_key_is_answered_with_one_of_ours(name: str) -> None:
    ours = elsewhere()[name]
    section, _, key = ours.partition(" ")[0].rstrip(",").partition(".")
    known = {f.name: f for f in fields(config.RunConfig)}  # type: ignore[arg-type]
    run = config.from_mapping({"objective": "diffusion_dpo", "output_dir": "x", "soft_tokens": None})
    if "." in ours.partition(" ")[0] or " " not in ours:
        assert section in known and (not key or key in {f.name for f in fields(getattr(run, section))})
    with pytest.raises(UserError) as error:
        config.from_mapping({"objective": "diffusion_dpo", "output_dir": "x", "health": {name: 1}})
    assert str(error.value) == f"health.{name}: unknown key. It is another trainer's; here there is {ours}."


def test_a_method_in_a_file_of_another_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("objective: {name: diffusion_dpo, beta: 500}\noutput_dir: x\n")
    with pytest.raises(
        UserError, match=r"(?s)objective.beta: unknown key.*write objective=sft instead of objective.name=sft"
    ):
        config.load(file, ["objective.name=sft"])
    assert config.load(file, ["objective=sft"]).objective == registry.get("sft")()
