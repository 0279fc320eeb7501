"""Configuration: dataclasses <-> YAML <-> `key=value`, and what a typo answers."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from pipelines.process import TIMESTEP_SAMPLING
from t2i_align import config
from t2i_align.config import HealthConfig, ReferenceUpdateConfig, TrainConfig
from t2i_align.errors import UserError

VALUES = {"objective": {"name": "diffusion_dpo", "beta": 500}, "output_dir": "runs/x"}


def test_a_run_survives_yaml_and_back() -> None:
    run = config.from_mapping({**VALUES, "lora": None, "optim": {"lr": "5e-6", "betas": [0.9, 0.99]}})
    assert run.lora is None and run.optim.lr == 5e-6 and run.objective.beta == 500.0
    assert config.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping(run)))) == run


def test_overrides_reach_inside_and_read_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    overrides = ["train.steps=7", "optim.lr=1e-5", "lora=null", "data.path=a=b", "objective.link=hinge", "resume=true"]
    run = config.load(file, overrides)
    assert (run.train.steps, run.optim.lr, run.lora, run.data.path, run.resume) == (7, 1e-5, None, "a=b", True)
    assert run.objective.link == "hinge" and run.objective.beta == 500.0


def test_an_override_inside_an_objective_given_by_its_bare_name_keeps_the_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**VALUES, "objective": "lcpo"}))
    assert config.load(file).objective.name == "lcpo"
    run = config.load(file, ["objective.beta=7", "objective.eta=0.7"])
    assert (run.objective.name, run.objective.beta, run.objective.eta) == ("lcpo", 7.0, 0.7)


def test_what_may_be_null_is_switched_on_and_off() -> None:
    run = config.from_mapping(
        {**VALUES, "train": {"reference_update": {"every": 16}}, "health": {"max_error_rise": None}}
    )
    assert run.train.reference_update == ReferenceUpdateConfig(every=16, max_drift=0.005)
    assert run.health == HealthConfig(max_error_rise=None, rollbacks=2)
    assert config.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping(run)))) == run
    assert config.from_mapping(VALUES).train.reference_update is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=1", r"unknown key 'trian'. Did you mean 'train'\? Choices: data, health, log"),
        ("train.stps=1", r"unknown key in train 'stps'. Did you mean 'steps'"),
        ("train.steps=many", "train.steps: expected int, found 'many'"),
        ("train.steps=null", "train.steps: expected int, found null"),
        ("train.steps=0", "train.steps must be at least 1, found 0"),
        ("train.precision=int8", r"unknown value for train.precision: 'int8'.*Choices: bf16, fp16, fp32"),
        ("train.caption_dropout=2", r"train.caption_dropout must be in \[0, 1\]"),
        ("objective.bta=1", r"unknown key in objective 'bta'. Did you mean 'beta'"),
        ("objective=spo", "unknown objective 'spo'"),
        ("optim.lr=-1", "optim.lr must be positive"),
        ("optim.lr=.inf", "optim.lr must be positive, found inf"),
        ("optim.betas=[0.9, 1]", r"optim.betas must be two numbers in \[0, 1\), found \[0.9, 1.0\]"),
        ("optim.weight_decay=-1", "optim.weight_decay must be 0 or more, found -1"),
        ("lora.targets=[]", r"lora.targets must be a preset's name or at least one ending, found \[\]"),
        ("train.seed=-1", r"train.seed must be in \[0, 2\^63\), found -1"),
        ("data.resolution=0", "data.resolution must be at least 1 or null, found 0"),
        ("data.resolution=[480, 0]", r"data.resolution must be at least 1 or null, found \(480, 0\)"),
        ("data.limit=0", "data.limit must be at least 1 or null, found 0"),
        ("data.workers=-1", "data.workers must be 0 or more, found -1"),
        ("validation.every=-1", r"validation.every must be 0 \(never\) or more, found -1"),
        ("validation.count=0", "validation.count must be at least 1, found 0"),
        ("validation.steps=0", "validation.steps must be at least 1, found 0"),
        ("validation.batch_size=0", "validation.batch_size must be at least 1, found 0"),
        ("health.max_error_rise=0", "health.max_error_rise must be positive or null, found 0"),
        ("health.rollbacks=-1", "health.rollbacks must be 0 or more, found -1"),
        ("train.reference_update.every=0", "train.reference_update.every must be at least 1, found 0"),
        ("train.reference_update.max_drift=0", "train.reference_update.max_drift must be positive, found 0"),
        ("train.reference_update.evry=8", r"unknown key in train.reference_update 'evry'. Did you mean 'every'"),
        ("validation.guidance=.nan", "validation.guidance must be 0 or more, found nan"),
        ("lora=8", "lora: expected a mapping"),
        ("steps", "has the form key=value"),
        ("train.steps=[1", "not valid YAML"),
    ],
)
def test_wrong_keys_and_values_say_what_was_expected(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    with pytest.raises(UserError, match=message):
        config.load(file, [override])


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/fox")
    run = config.from_mapping({**VALUES, "output_dir": "~/runs/x", "data": {"path": "~/pairs", "cache_dir": "~/cache"}})
    assert run.output_dir == "/home/fox/runs/x"
    assert (run.data.path, run.data.cache_dir) == ("/home/fox/pairs", "/home/fox/cache")
    assert config.from_mapping(VALUES).data.path == "testbed:pairs"


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        config.load(tmp_path / "no.yaml")
    for text, message in (("a: [", "not valid YAML"), ("- a", "a mapping of keys"), ("resume: true", "missing key")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            config.load(tmp_path / "bad.yaml")


def test_timestep_samplings_are_those_of_the_forward_process() -> None:
    assert get_args(get_type_hints(TrainConfig)["timestep_sampling"]) == TIMESTEP_SAMPLING
