"""The command line: options from signatures, help, messages and exit statuses."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import t2i_align.testbed.scorer  # noqa: F401  (registers the oracles)
from pipelines import PipelineError
from reward_scorers import ScorerError
from t2i_align import cli
from t2i_align import config as configuration
from t2i_align.cli.commands import COMMANDS, GROUPS, Command
from t2i_align.cli.parser import build
from t2i_align.cli.signature import PYTHON_ONLY
from t2i_align.errors import UserError
from t2i_align.objectives import OBJECTIVES
from t2i_align.quickstart import CONFIG
from t2i_align.utils.logging import silence_libraries
from tests.runs import jsonl_pairs, run_values

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "diffusers", "transformers"}
RAISED: list[BaseException] = []  # what `fail` raises


def fail() -> None:
    raise RAISED[-1]


def failing(error: BaseException, debug: bool = False) -> int:
    """The status of a command whose function raises `error`."""
    RAISED.append(error)
    command = Command(function=f"{__name__}:fail", summary="", examples=(), interrupted="Do this now.", silent=False)
    return command.run({}, debug=debug)


def chat(out: str) -> str:
    """Prints a line before and after its work, of which the first is "ahead"."""
    print("ahead", flush=True)
    print("\x1b]0;title\x07\x1b[2J", file=sys.stderr)
    Path(out).write_text("done")
    print("afterwards", flush=True)
    return "\x9b2J \r\x1b[1mbold\x1b[0m\ttab"


def function_of(name: str) -> Any:
    module, _, function = COMMANDS[name].function.partition(":")
    return getattr(importlib.import_module(module), function)


def called(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that a command line hands to its library function, which is not run."""
    name = " ".join(arguments[:2]) if arguments[0] in GROUPS else arguments[0]
    signature, calls = inspect.signature(function_of(name)), []
    module, _, function = COMMANDS[name].function.partition(":")
    monkeypatch.setattr(importlib.import_module(module), function, lambda **keywords: calls.append(keywords))
    monkeypatch.setattr("t2i_align.utils.ray_engine.run", lambda function, options, **engine: calls.append(options))
    monkeypatch.setattr("t2i_align.cli.commands.load_plugin", lambda place: None)
    monkeypatch.setattr("t2i_align.cli.commands.check_inputs", lambda options: None)
    monkeypatch.setitem(COMMANDS, name, replace(COMMANDS[name], report="", check=""))
    assert cli.main(arguments) == 0
    signature.bind(**calls[0])
    return calls[0]


# Help ---------------------------------------------------------------------------------------------------------------


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name.split()[0]} " in out for name in COMMANDS)
    for argv in (["data"], ["data", "--help"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert "\n  inspect " in out and "\n  split " in out


def test_help_completion_and_wrong_paths_import_nothing_heavy() -> None:
    lines = [["--help"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)]
    wrong = [["score", "gone.jsonl", "--scorers", "oracle", "--out", "o"], ["data", "inspect", "./gone", "--out", "o"],
             ["generate", "testbed:sd", "--prompts", "gone.txt", "--out", "o"]]  # fmt: skip
    lines += wrong
    code = "import sys; from t2i_align.cli import main; print([main(argv) for argv in {}], {} & {{*sys.modules}})"
    code = code.format(lines, HEAVY)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{[0] * (len(lines) - len(wrong)) + [2] * len(wrong)} set()"
    assert "gone.jsonl: no such file or folder" in done.stderr
    words = {"_T2I_ALIGN_COMPLETE": "complete_bash", "COMP_WORDS": "t2i-align evaluate --ti", "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "t2i_align"], env=os.environ | words, capture_output=True, text=True
    )
    assert done.stdout.split() == ["--tie-margin", "--ties"] and "| torch" not in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_of_the_function_is_an_option_with_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = inspect.signature(function_of(name)).parameters.keys() - set(PYTHON_ONLY)
    params = {param.name: param for param in build(name).params}
    engine = {"engine", "workers"} if COMMANDS[name].engines else set()
    assert params.keys() == wanted | engine | {"debug", "plugin"}
    assert all(param.help for param in params.values()), "a parameter that no docstring describes"
    assert cli.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"Usage: t2i-align {name} " in out
    assert f"  t2i-align {name}" in out.split("examples:")[1]
    assert all(f"--{key.replace('_', '-')}" in out for key in wanted if params[key].opts[0].startswith("-"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian'. Did you mean 'train'? Choices: audit-scorer, caption, check-model, "),
        ("data splt", "unknown action of data 'splt'. Did you mean 'split'? Choices: inspect, split."),
        ("score images", "Missing option '--scorers'"),
        ("train", "Missing argument"),
        ("score images --scorers oracle --prezision fp32", "No such option: --prezision"),
        ("evaluate --aligned a --prompts p --scorers s --out o --ties whole", "'whole' is not one of"),
        ("score images --scorers oracle --batch-size many", "should be a valid integer"),
    ],
)
def test_wrong_command_lines_print_the_error_and_the_choices(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


# Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "generate m --prompt a --prompt b --out o --lora-scale 0.5 --force --seed 0",
            {"model": "m", "prompt": ["a", "b"], "out": "o", "lora_scale": 0.5, "force": True, "seed": 0},
        ),
        ("generate --prompt a m --out o", {"model": "m", "prompt": ["a"], "out": "o"}),
        ("score i --scorers a b --batch-size 3", {"images": "i", "scorers": ["a", "b"], "batch_size": 3}),
        ("score --scorers a --scorers b --device cpu i", {"images": "i", "scorers": ["a", "b"], "device": "cpu"}),
        ("relabel x --scorers a,b c:d:/e.pt --out o", {"source": "x", "scorers": ["a", "b", "c:d:/e.pt"], "out": "o"}),
        (
            "evaluate --aligned a --prompts p --scorers s --out o --tie-margin 0.1 --ties drop",
            {"aligned": "a", "prompts": "p", "scorers": ["s"], "out": "o", "tie_margin": 0.1, "ties": "drop"},
        ),
        ("data split s --out o --by prompt user", {"source": "s", "out": "o", "by": ["prompt", "user"]}),
        ("train a.yaml x=1 --debug y=-2", {"config": "a.yaml", "overrides": ["x=1", "y=-2"]}),
        ("quickstart", {}),
        ("quickstart x=1 --output o", {"overrides": ["x=1"], "output": "o"}),
    ],
)  # fmt: skip
def test_arguments_reach_the_function_and_defaults_are_its_own(
    line: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert called(line.split(), monkeypatch) == wanted


# Messages and statuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [UserError, PipelineError, ScorerError])
def test_bad_input_prints_a_message_and_exits_with_2(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    error = kind("row 3: expected a number, found \x1b[2J")
    assert failing(error) == 2
    assert capsys.readouterr().err == "error: row 3: expected a number, found \\x1b[2J\n"  # a terminal would obey it
    assert failing(error, debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_full_disk_prints_a_message_and_a_bug_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a")) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'runs/a'\n"
    for kind in (errno.ENAMETOOLONG, errno.ELOOP):
        assert failing(OSError(kind, os.strerror(kind), "runs/a")) == 2
    assert failing(ValueError("a bug")) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["", "stopped after step 7; its checkpoint is saved"])
def test_ctrl_c_prints_how_to_continue(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(KeyboardInterrupt(message)) == 130
    err = capsys.readouterr().err
    assert message in err and "Do this now." in err and "Traceback" not in err
    assert "resume=true" in COMMANDS["train"].interrupted and "continues" in COMMANDS["prepare"].interrupted


def test_bad_configuration_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    assert cli.main(["train", str(CONFIG), f"output_dir={output}", "train.stesp=5", "lora.rank=0"]) == 2
    assert capsys.readouterr().err.startswith("error: 2 errors:\n  lora.rank must be a whole number")
    assert not output.exists()
    assert cli.main(["train", str(CONFIG), "steps"]) == 2
    assert "an override has the form key=value" in capsys.readouterr().err
    assert cli.main(["prepare", str(CONFIG), "data.cache=false"]) == 2
    assert "nothing to prepare" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["t2i_align", "t2i_align.train"])
def test_both_modules_run_and_return_the_exit_status(module: str) -> None:
    arguments = ["train", "nowhere.yaml"] if module == "t2i_align" else ["nowhere.yaml"]
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("error: nowhere.yaml: no such configuration file\n") and "Traceback" not in done.stderr


def test_reports_print_the_results(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = SimpleNamespace(
        summary=lambda: "60 % won",
        steps=7,
        weights="w",
        next="t2i-align evaluate",
        folder="f",
        accuracy={"held_out": 0.9},
        settings={"seconds": 3},
    )
    printed = {}
    for name, command in COMMANDS.items():
        command.print_report(result, {"out": "o"})
        printed[name] = capsys.readouterr().out
    assert printed["quickstart"].endswith("seeds:\n60 % won\n3 seconds in all\n")
    assert printed["train"] == "trained 7 steps; weights in w\nt2i-align evaluate\n"
    assert printed["train-scorer"] == "held out 0.9\ntrained 7 steps; the scorer is trained:f\n"
    assert printed["data inspect"] == "60 % won\nreport in o\n"
    COMMANDS["data split"].print_report({"train": 3, "held_out": 1}, {})
    assert capsys.readouterr().out == "train    3\nheld out 1\n"
    monkeypatch.setenv("RANK", "1")
    COMMANDS["train"].print_report(result, {})
    assert capsys.readouterr().out == ""


CHAT = Command(function=f"{__name__}:chat", summary="", examples=(), report="{result}", silent=False)


def test_work_goes_on_when_the_reader_of_its_output_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", buffering=1) as broken, monkeypatch.context() as patch:
            patch.setattr(sys, name, broken)
            assert CHAT.run({"out": str(tmp_path / name)}) == 0
        assert (tmp_path / name).read_text() == "done"


def test_escape_sequences_are_printed_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CHAT.run({"out": str(tmp_path / "a")}) == 0
    out, err = capsys.readouterr()
    assert out == "ahead\nafterwards\n\\x9b2J \r\x1b[1mbold\x1b[0m\ttab\n" and err == "\\x1b]0;title\\x07\\x1b[2J\n"
    assert failing(ValueError("a \x1b[2J bug")) == 1 and "a \\x1b[2J bug" in capsys.readouterr().err


# Commands of the command line alone ---------------------------------------------------------------------------------


def test_prepare_prints_the_cache_and_the_file_of_skipped_groups(
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
    assert "h = -1/2 beta [" in out and "objective.beta = 2000.0  (a positive number)" in out
    assert "objective.link = 'sigmoid'  ('sigmoid' or 'robust' or 'hinge' or 'ipo')" in out
    assert cli.main(["objectives", "dpo"]) == 2
    assert "unknown objective 'dpo'" in capsys.readouterr().err


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_its_own_configuration(name: str) -> None:
    assert configuration.load(ROOT / "configs" / OBJECTIVES[name].config).objective.name == name


def test_silenced_libraries_still_warn_of_anything_else() -> None:
    silence_libraries()
    logger = logging.getLogger("diffusers.loaders.lora_base")
    texts = ["No LoRA keys associated to CLIPTextModel found", "Something went wrong"]
    records = [logging.LogRecord(logger.name, logging.WARNING, "", 0, text, (), None) for text in texts]
    assert [bool(logger.filter(record)) for record in records] == [False, True]
