"""The command line as a person meets it: help, messages, exit statuses."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import PipelineError
from reward_scorers import ScorerError
from t2i_align import cli
from t2i_align import config as configuration
from t2i_align.errors import UserError
from t2i_align.objectives import OBJECTIVES
from t2i_align.quickstart import CONFIG
from t2i_align.utils.logging import silence_libraries
from tests.runs import jsonl_pairs, run_values
from tools.testbed.sampling import GUIDANCE, STEPS

ROOT = Path(__file__).parents[2]
LIBRARY = {
    "generate": "t2i_align.inference.generate",
    "score": "t2i_align.labeling.score",
    "evaluate": "t2i_align.evaluation.compare",
}
IN_PYTHON_ONLY = {"progress", "settings"}


def command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Put a command named `fail` in place that raises `error`."""

    def run(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command(run=run, summary="", interrupted="Do this now."))


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: t2i-align {name}" in out
    assert f"  t2i-align {name}" in out.split("examples:")[1]


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"], ["quickstart", "--help"]])
def test_help_loads_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom t2i_align.cli import main\n"
        f"try: main({argv})\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'numpy', 'yaml', 'diffusers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_an_unknown_command_answers_with_the_nearest_and_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    err = capsys.readouterr().err
    assert "unknown command 'trian'" in err
    assert "Did you mean 'train'?" in err
    assert all(name in err for name in cli.COMMANDS)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stesp=5", "train.stesp: unknown key. Did you mean 'steps'? Choices:"),
        ("optim.lr=fast", "optim.lr must be a positive number, found 'fast'"),
        ("objective.name=diffusion_dop", "unknown objective 'diffusion_dop'. Did you mean 'diffusion_dpo'? Choices:"),
        ("objective.beta=0", "objective.beta must be a positive number, found 0"),
        ("lora.rank=0", "lora.rank must be a whole number of at least 1, found 0"),
        ("train.precision=fp8", "train.precision must be 'fp32', 'bf16' or 'fp16', found 'fp8'"),
        ("steps", "an override has the form key=value"),
    ],
)
def test_bad_configuration_is_named(
    override: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert cli.main(["train", str(CONFIG), f"output_dir={output}", override]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert says in err
    assert not output.exists()


def test_a_missing_configuration_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: no such configuration file\n"


def test_prepare_without_a_cache_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", str(CONFIG), "data.cache=false"]) == 2
    assert "nothing to prepare" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [UserError, PipelineError, ScorerError])
def test_bad_input_is_a_message_and_status_2(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, kind("row 3: expected a number, found 'x'"))
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err == "error: row 3: expected a number, found 'x'\n"
    assert cli.main(["fail", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_a_message_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"))
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'runs/a'\n"


def test_a_defect_of_the_program_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, ValueError("a bug"))
    assert cli.main(["fail"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["", "stopped after step 7; its checkpoint is saved"])
def test_ctrl_c_says_how_to_go_on(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, KeyboardInterrupt(message))
    assert cli.main(["fail"]) == 130
    err = capsys.readouterr().err
    assert message in err and "Do this now." in err and "Traceback" not in err


def test_the_commands_that_train_say_how_they_resume() -> None:
    assert "resume=true" in cli.COMMANDS["train"].interrupted
    assert "continues" in cli.COMMANDS["prepare"].interrupted


def test_prepare_says_where_the_cache_and_what_was_skipped_are(
    sd_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = jsonl_pairs(tmp_path / "data", 4)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(run_values(sd_path, data, tmp_path / "runs" / "a")))
    arguments = ["prepare", str(config), f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    (cache,) = (tmp_path / "cache").iterdir()
    assert re.search(rf"^cache +{cache}$", out, re.MULTILINE) and "skipped.jsonl" not in out
    (tmp_path / "data" / "0_bad.png").unlink()
    assert cli.main(arguments) == 0
    (file,) = re.findall(r"^why skipped +(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert "0_bad.png" in Path(file).read_text()


def test_objectives_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["objectives"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert list(rows) == sorted(OBJECTIVES)
    assert all(cls.paper in rows[name] and rows[name].endswith(cls.config) for name, cls in OBJECTIVES.items())
    assert "pairs, with captions and a reference" in rows["dcpo"] and "rankings" in rows["lpo"]
    assert cli.main(["objectives", "diffusion_dpo"]) == 0
    out = capsys.readouterr().out
    assert "loss = -log sigmoid(h)" in out and "objective.beta = 2000.0  (a positive number)" in out
    assert cli.main(["objectives", "dpo"]) == 2
    assert "unknown objective 'dpo'" in capsys.readouterr().err


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_configuration_of_its_own(name: str) -> None:
    run = configuration.load(Path(__file__).parents[2] / "configs" / OBJECTIVES[name].config)
    assert run.objective.name == name


def test_overrides_may_stand_on_both_sides_of_an_option() -> None:
    parser = cli._run_parser("train")
    options = cli._parse(parser, ["a.yaml", "x=1", "--debug", "y=2"])
    assert (options.config, options.overrides, options.debug) == ("a.yaml", ["x=1", "y=2"], True)


@pytest.mark.parametrize(
    ("module", "function", "argv", "wanted"),
    [
        (
            "t2i_align.inference.generate",
            "generate",
            ["generate", "m", "--prompt", "a", "--prompt", "b", "--out", "o", "--lora-scale", "0.5", "--force"],
            {"model": "m", "prompt": ["a", "b"], "prompts": None, "out": "o", "lora_scale": 0.5, "force": True},
        ),
        (
            "t2i_align.labeling.score",
            "score",
            ["score", "images", "--scorers", "oracle", "clip", "--batch-size", "3"],
            {"images": "images", "scorers": ["oracle", "clip"], "out": None, "batch_size": 3},
        ),
        (
            "t2i_align.evaluation.compare",
            "evaluate",
            [
                "evaluate",
                "--base",
                "b",
                "--aligned",
                "a",
                "--prompts",
                "p",
                "--scorers",
                "s",
                "--out",
                "o",
                "--seed",
                "7",
            ],
            {"base": "b", "aligned": "a", "prompts": "p", "scorers": ["s"], "out": "o", "seed": 7, "guidance": None},
        ),
    ],
)
def test_arguments_reach_the_library_under_its_own_names(
    module: str, function: str, argv: list[str], wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(importlib.import_module(module), function)
    calls: list[dict[str, Any]] = []

    def recorded(**keywords: Any) -> Any:
        inspect.signature(real).bind(**keywords)
        calls.append(keywords)
        return SimpleNamespace(summary=str)

    monkeypatch.setattr(importlib.import_module(module), function, recorded)
    assert cli.main(argv) == 0
    assert wanted.items() <= calls[0].items()
    defaults = {name: parameter.default for name, parameter in inspect.signature(real).parameters.items()}
    given = {name for name in calls[0] if f"--{name.replace('_', '-')}" in argv or name in wanted}
    for name in calls[0].keys() - given:
        assert calls[0][name] == defaults[name], f"the command's default of {name} is not the library's"


def documented() -> list[str]:
    """Commands in the README, the guide and the help texts that call one of LIBRARY's functions."""
    texts = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("README.md", "docs/evaluation.md")]
    lines = [line for text in texts for line in text.splitlines()]
    lines += [example for command in cli.COMMANDS.values() for example in command.examples]
    return [line for line in lines if line.startswith(tuple(f"t2i-align {name} " for name in LIBRARY))]


def test_commands_are_documented_of_each_kind() -> None:
    assert {line.split()[1] for line in documented()} == set(LIBRARY) and len(documented()) >= 7


@pytest.mark.parametrize("line", documented())
def test_documented_commands_run_and_use_the_testbed_as_its_figures_do(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, name, *arguments = shlex.split(line)
    calls: list[dict[str, Any]] = []
    module = importlib.import_module(LIBRARY[name])
    monkeypatch.setattr(module, name, lambda **keywords: calls.append(keywords) or SimpleNamespace(summary=str))
    assert cli.main([name, *arguments]) == 0
    if "testbed:sd" in arguments:
        assert (calls[0]["steps"], calls[0]["guidance"]) == (STEPS, GUIDANCE)


@pytest.mark.parametrize("name", LIBRARY)
def test_the_command_offers_what_the_function_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(LIBRARY[name])
    real, calls = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda **keywords: calls.append(keywords) or SimpleNamespace(summary=str))
    line = next(line for line in documented() if line.split()[1] == name)
    assert cli.main(shlex.split(line)[1:]) == 0
    assert calls[0].keys() == inspect.signature(real).parameters.keys() - IN_PYTHON_ONLY


def test_the_readme_maps_every_module() -> None:
    listed = re.findall(r"^  (\w+\.py) ", (ROOT / "README.md").read_text(), re.MULTILINE)
    modules = {file.name for file in (ROOT / "t2i_align").glob("*.py")}
    assert set(listed) == modules - {"__init__.py", "__main__.py"}


def test_quiet_drops_only_the_message_that_says_nothing() -> None:
    silence_libraries()
    logger = logging.getLogger("diffusers.loaders.lora_base")
    texts = ["No LoRA keys associated to CLIPTextModel found", "Something went wrong"]
    records = [logging.LogRecord(logger.name, logging.WARNING, "", 0, text, (), None) for text in texts]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


@pytest.mark.parametrize("module", ["t2i_align", "t2i_align.train"])
def test_both_modules_run_and_pass_the_status_on(module: str) -> None:
    arguments = ["train", "nowhere.yaml"] if module == "t2i_align" else ["nowhere.yaml"]
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nowhere.yaml: no such configuration file" in done.stderr and "Traceback" not in done.stderr
