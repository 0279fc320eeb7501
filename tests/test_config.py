"""Configuration: YAML, `key=value`, round trips, and the answers to wrong keys and values."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from pipelines.process import TIMESTEP_SAMPLING
from t2i_align import config
from t2i_align.errors import UserError
from t2i_align.objectives import DiffusionDPO
from t2i_align.training.sections import HealthConfig, ReferenceUpdateConfig, TrainConfig
from t2i_align.utils.settings import with_overrides

VALUES = {"objective": {"name": "diffusion_dpo", "beta": 500}, "output_dir": "runs/x"}


def test_a_run_round_trips_through_yaml() -> None:
    run = config.from_mapping({**VALUES, "lora": None, "optim": {"lr": "5e-6", "betas": [0.9, 0.99]}})
    assert run.lora is None and run.optim.lr == 5e-6 and run.objective.beta == 500.0
    assert config.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping(run)))) == run


def test_fields_of_a_plain_dataclass_are_in_the_mapping() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Plain(DiffusionDPO):
        gamma: float = 2.0

    mapping = config.to_mapping(config.RunConfig(objective=Plain(beta=3), output_dir="x"))
    assert mapping["objective"]["gamma"] == 2.0 and mapping["objective"]["beta"] == 3.0


def test_overrides_reach_inside_and_read_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    overrides = ["train.steps=7", "optim.lr=1e-5", "lora=null", "data.path=a=b", "objective.link=hinge", "resume=true"]
    run = config.load(file, [*overrides, "output_dir=2026-11-29"])
    assert (run.train.steps, run.optim.lr, run.lora, run.data.path, run.resume) == (7, 1e-5, None, "a=b", True)
    assert run.objective.link == "hinge" and run.objective.beta == 500.0 and run.output_dir == "2026-11-29"


def test_override_inside_an_objective_keeps_its_bare_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**VALUES, "objective": "lcpo"}))
    assert config.load(file).objective.name == "lcpo"
    run = config.load(file, ["objective.beta=7", "objective.eta=0.7"])
    assert (run.objective.name, run.objective.beta, run.objective.eta) == ("lcpo", 7.0, 0.7)


def test_optional_sections_and_values_may_be_null() -> None:
    run = config.from_mapping(
        {**VALUES, "train": {"reference_update": {"every": 16}}, "health": {"max_error_rise": None}}
    )
    assert run.train.reference_update == ReferenceUpdateConfig(every=16, max_drift=0.005)
    assert run.health == HealthConfig(max_error_rise=None, rollbacks=2)
    assert config.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping(run)))) == run
    assert config.from_mapping(VALUES).train.reference_update is None


COUNT = "a whole number of at least 1"
LINKS = "'sigmoid', 'robust', 'hinge' or 'ipo'"
SHIFTS = "'model', 'resolution' or a positive number"
SIZES = "a side or [height, width] of at least 1 pixel, or null"
TARGETS = "a preset's name or a list of at least one module-name ending"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", f"{COUNT}, found 'many'"),
        ("train.steps='7'", f"{COUNT}, found '7'"),
        ("train.steps=1.5", f"{COUNT}, found 1.5"),
        ("train.steps=true", f"{COUNT}, found True"),
        ("train.steps=null", f"{COUNT}, found null"),
        ("train.steps=0", f"{COUNT}, found 0"),
        ("train.precision=bf61", "'fp32', 'tf32', 'bf16' or 'fp16', found 'bf61'. Did you mean 'bf16'?"),
        ("train.caption_dropout=2", "a number in [0, 1], found 2"),
        ("train.timestep_shift=none", f"{SHIFTS}, found 'none'"),
        ("train.timestep_shift=0", f"{SHIFTS}, found 0"),
        ("train.compile='yes'", "a boolean, found 'yes'"),
        ("train.compile=1", "a boolean, found 1"),
        ("train.seed=-1", "a whole number in [0, 2^63), found -1"),
        ("train.seed=9223372036854775808", "a whole number in [0, 2^63), found 9223372036854775808"),
        ("objective.beta=0", "a positive number, found 0"),
        ("train.timestep_sampling=cosine", "'uniform', 'logit_normal' or 'geometric', found 'cosine'"),
        ("soft_tokens.count=0", f"{COUNT}, found 0"),
        ("objective.link=sigmod", f"{LINKS}, found 'sigmod'. Did you mean 'sigmoid'?"),
        ("objective=[1]", "a name or a mapping of keys, found [1]"),
        ("optim.lr=-1", "a positive number, found -1"),
        ("optim.lr=.inf", "a positive number, found inf"),
        ("optim.lr=true", "a positive number, found True"),
        ("optim.betas=[0.9, 1]", "two numbers in [0, 1), found [0.9, 1]"),
        ("optim.weight_decay=-1", "a number of 0 or more, found -1"),
        ("lora=8", "a mapping of keys, found 8"),
        ("lora.rank=0", f"{COUNT}, found 0"),
        ("lora.dropout=1", "a number in [0, 1), found 1"),
        ("optim.betas=[0.9]", "two numbers in [0, 1), found [0.9]"),
        ("optim.betas=0.9", "two numbers in [0, 1), found 0.9"),
        ("lora.targets=[]", f"{TARGETS}, found []"),
        ("lora.targets=''", f"{TARGETS}, found ''"),
        ("data.resolution=0", f"{SIZES}, found 0"),
        ("data.resolution=[480, 0]", f"{SIZES}, found [480, 0]"),
        ("data.limit=0", f"{COUNT} or null, found 0"),
        ("data.fps=0", "a positive number or null, found 0"),
        ("data.workers=-1", "a whole number of 0 or more, found -1"),
        ("data.path=7", "a string, found 7"),
        ("output_dir=''", "a path, found ''"),
        ('data.cache_dir="a\\0b"', "a path, found 'a\\x00b'"),
        ("log.trackers=[mlflow]", "'tensorboard' or 'wandb', found 'mlflow'"),
        ("validation.every=-1", "a whole number of 0 or more, found -1"),
        ("validation.batch_size=0", f"{COUNT} or null, found 0"),
        ("validation.guidance=.nan", "a number of 0 or more or null, found nan"),
        ("health.max_error_rise=0", "a positive number or null, found 0"),
        ("train.reference_update.every=0", f"{COUNT}, found 0"),
    ],
)
def test_wrong_value_error_names_key_expected_and_found(override: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        config.from_mapping(with_overrides(VALUES, [override]))
    key = re.escape(override.partition("=")[0])
    assert re.fullmatch(rf"{key}(\.\d)? must be {re.escape(expected)}", str(error.value))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=1", "trian: unknown key. Did you mean 'train'? Choices: data, health, log"),
        ("train.stps=1", "train.stps: unknown key. Did you mean 'steps'? Choices: accumulate, "),
        ("train.reference_update.evry=8", "train.reference_update.evry: unknown key. Did you mean 'every'?"),
        ("optim.schedule=cosin", "found 'cosin'. Did you mean 'cosine'?"),
        ("optim.schedule=piecewise_constant", "optim.schedule must be 'constant', 'constant_with_warmup'"),
        ("objective.bta=1", "objective.bta: unknown key. Did you mean 'beta'?"),
        ("objective=spo", "unknown objective 'spo'."),
        ("objective.name=diffusion_dop", "unknown objective 'diffusion_dop'. Did you mean 'diffusion_dpo'? Choices: "),
        ("objective={beta: 1}", "objective.name: missing key"),
        ("objective.name=[kto]", "unknown objective ['kto']."),
        ("train={1: 2}", "train.1: unknown key. Choices: accumulate, "),
        ("steps", "has the form key=value"),
        ("train.steps=[1", "'train.steps=[1': not valid YAML"),
        ("train.steps=" + "[" * 5000, "not valid YAML: maximum recursion depth"),
    ],
)
def test_wrong_key_error_names_the_nearest_and_all_choices(override: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        config.from_mapping(with_overrides(VALUES, [override]))


def test_all_errors_are_reported_at_once() -> None:
    values = {"objective": "spo", "train": {"stps": 1, "precision": "fp8"}, "lora": {"rank": 0}, "data": {"path": 1}}
    with pytest.raises(UserError) as error:
        config.from_mapping(values)
    first, *lines = str(error.value).splitlines()
    assert first == "6 errors:" and len(lines) == 6
    keys = ("unknown objective 'spo'", "output_dir", "train.stps", "train.precision", "lora.rank", "data.path")
    assert all(any(line.startswith(f"  {key}") for line in lines) for key in keys)


UPDATE = {"train": {"reference_update": {"every": 2}}}
SOFT = {"soft_tokens": {"count": 2}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"buckets": True, "cache": False}}, "data.buckets must be false without data.cache"),
        (
            {"data": {"stream": 8, "limit": 4}},
            "data.stream must be null with data.limit, data.annotations, data.buckets or data.flip",
        ),
        (
            {"optim": {"schedule": "constant", "warmup_steps": 2}},
            "'constant' takes no warm-up, found optim.warmup_steps=2",
        ),
        ({"lora": None, "train": {"reference": "adapter_off"}}, "train.reference 'adapter_off' needs a LoRA"),
        ({"lora": {"init": "x"}, "train": {"reference": "copy"}}, "'copy' with lora.init: use 'auto'"),
        ({**SOFT, "objective": "softrepa"}, "alternatives: with soft_tokens, set lora=null"),
        ({**SOFT, "lora": None}, "objectives without a reference; diffusion_dpo has one"),
        ({**UPDATE, "objective": "ncp_dpo"}, "ncp_dpo compares in the features of the model before training"),
        ({**UPDATE, "objective": "sft"}, "train.reference_update: sft asks no reference"),
        (
            {"train": {"reference": "copy", "reference_update": {}}},
            "'copy' with train.reference_update: under a LoRA use 'auto'",
        ),
    ],
)
def test_keys_that_exclude_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.from_mapping({**VALUES, **values})


def test_sections_are_checked_in_python_too() -> None:
    with pytest.raises(UserError, match=r"^LoraConfig\.rank must be a whole number of at least 1, found 0$"):
        config.LoraConfig(rank=0)
    with pytest.raises(UserError, match=r"^DiffusionDPO\.beta must be a positive number, found -1$"):
        DiffusionDPO(beta=-1)


def test_infinity_disables_a_limit() -> None:
    run = config.from_mapping({**VALUES, "optim": {"max_grad_norm": math.inf}, "health": {"max_error_rise": math.inf}})
    assert run.optim.max_grad_norm == run.health.max_error_rise == math.inf
    assert config.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping(run)))) == run


def test_wrong_key_is_reported_without_importing_torch(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**VALUES, "train": {"stps": 1}, "objective": "spo"}))
    code = (
        f"import sys; from t2i_align.cli import main; assert main(['train', {str(file)!r}]) == 2\n"
        "sys.exit(bool({'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "train.stps" in done.stderr and "unknown objective" in done.stderr, done.stderr


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/fox")
    run = config.from_mapping({**VALUES, "output_dir": "~/runs/x", "data": {"path": "~/pairs", "cache_dir": "~/cache"}})
    assert run.output_dir == "/home/fox/runs/x"
    assert (run.data.path, run.data.cache_dir) == ("/home/fox/pairs", "/home/fox/cache")
    assert config.from_mapping(VALUES).data.path == "testbed:pairs"


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such configuration file"),
        (b"a: [", "not valid YAML"),
        (b"- a", "a mapping of keys"),
        (b"", "a mapping of keys"),
        (b"resume: true", "missing key"),
        ("output_dir: café".encode("cp1252"), r"not UTF-8 text \(byte 15\)"),
        (b"output_dir: \0", "not valid YAML"),
        (b"train: " + b"[" * 5000, "not valid YAML: maximum recursion depth"),
        (b"train: &a [*a]", "not valid YAML: maximum recursion depth"),
        (b"train: !!int x", "not valid YAML"),
        (b"train: !!timestamp x", "not valid YAML"),
        (b"output_dir: x\ntrain: {steps: 2}\ntrain: {seed: 3}", "the key 'train' is there twice"),
        (BOMB.encode(), "more than 100000 values, counting those of each alias"),
    ],
)
def test_files_that_are_not_a_configuration(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "bad.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        config.load(file)
    assert str(file) in str(error.value) or message == "missing key"


def test_aliases_and_dates_are_values(tmp_path: Path) -> None:
    """A date may name a folder; no setting is one."""
    file = tmp_path / "run.yaml"
    file.write_text("objective: lcpo\noutput_dir: 2026-11-29\ntrain: &a {seed: &seed 3}\n"
                    "validation: {<<: *a, seed: *seed}\n")  # fmt: skip
    run = config.load(file)
    assert (run.output_dir, run.train.seed, run.validation.seed) == ("2026-11-29", 3, 3)
    assert config.load(file, ["output_dir=2026-11-29"]) == run
    assert config.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_mapping(run)))) == run


def test_values_in_messages_are_short(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.steps must be a whole number of at least 1, found 'x+\.\.\.x+'$"):
        config.from_mapping(with_overrides(VALUES, [f"train.steps={'x' * 100_000}"]))


def test_timestep_samplings_match_the_forward_process() -> None:
    assert get_args(get_type_hints(TrainConfig)["timestep_sampling"]) == TIMESTEP_SAMPLING
