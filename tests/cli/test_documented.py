"""Commands, options and scorers that documents name exist and parse."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

import t2i_align.testbed.scorer  # noqa: F401  (registers the oracles)
from reward_scorers.registry import FACTORIES
from t2i_align.cli.commands import COMMANDS, TABLE
from t2i_align.cli.parser import build
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers
from t2i_align.quickstart import CONFIG
from tests.cli.test_cli import ROOT, called
from tools.testbed.sampling import GUIDANCE, STEPS


def documents() -> str:
    """All texts that may name a command; code spans and continued lines are on one line."""
    folders = ("docs", "configs", "notebooks", "benchmarks", "tools", "t2i_align", "pipelines", "reward_scorers")
    files = [*ROOT.glob("*.md"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    suffixes = (".md", ".py", ".yaml", ".ipynb")
    text = "\n".join(file.read_text() for file in files if file.suffix in suffixes and file != TABLE)
    return re.sub(r"(?<!`)`[^`\n]+\n[^`\n]+`", lambda match: " ".join(match[0].split()), text.replace("\\\n", " "))


def documented() -> list[str]:
    """Whole commands: lines in the documents, the comments and the docstrings, and the examples of `--help`."""
    launched = r"^[# ]*(?:torchrun|accelerate launch) .*-m t2i_align(?=[. ])"
    text = "\n".join([documents(), *(example for command in COMMANDS.values() for example in command.examples)])
    lines = re.findall(r"(?:^[# ]*| {3})t2i-align(?=[. ])(.*)", re.sub(launched, "t2i-align", text, flags=re.M), re.M)
    lines = [line.replace(".train ", " train ").split(" #")[0].strip() for line in lines]
    return sorted({line for line in lines if line.startswith(tuple(f"{name} " for name in COMMANDS))})


def test_every_command_is_documented() -> None:
    assert all(any(line.startswith(f"{name} ") for line in documented()) for name in COMMANDS)


@pytest.mark.parametrize("line", documented(), ids=lambda line: line[:40])
def test_documented_commands_parse_with_the_testbed_figures_sampling_options(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options and configuration are read; what the command would do is not done."""
    command = next(command for name, command in COMMANDS.items() if line.startswith(f"{name} "))
    module, _, load = (command.check or COMMANDS["train"].check).partition(":")
    options = called(shlex.split(line), monkeypatch)
    if "testbed:sd" in (options.get("model"), options.get("base")):
        assert (options["steps"], options["guidance"]) == (STEPS, GUIDANCE)
    if "overrides" in options:
        overrides = [one for one in options["overrides"] if "my_objective.py" not in one]  # see test_library
        getattr(importlib.import_module(module), load)(ROOT / options.get("config", CONFIG), overrides)


def test_commands_in_code_spans_and_their_options_exist() -> None:
    """Such as `t2i-align perturb SOURCE`, which may leave out what a whole command needs."""
    spans = re.findall(r"`[^`\n]*\bt2i[-_]align ([a-z][^`\n]*)`", documents())
    assert len(spans) > 20
    for span in spans:
        name = next((name for name in (" ".join(span.split()[:2]), span.split()[0]) if name in COMMANDS), None)
        assert name, f"unknown command: t2i-align {span}"
        options = {opt for param in build(name).params for opt in param.opts} | {"--help"}
        assert {*re.findall(r"--[\w-]+", span)} <= options, span


PLACEHOLDERS = re.compile(
    r"FOLDER|FILE|MODEL|CHECKPOINT|TAG|HEAD|WEIGHTS|TOKENIZER|SPEC|SCORER|USER|FPS|[.]yaml|owner/name|:/folder|:/path"
)


def named_scorers() -> list[str]:
    """Specs in documents, code and `--help` that stand for published weights, or for none."""
    text = "\n".join([documents(), TABLE.read_text()])
    published = "|".join(re.escape(name) for name in sorted(FACTORIES) if name not in ("combine", "trained"))
    specs = re.findall(rf"(?<![\w/.:-])((?:{published}):[\w/~-][\w./~:-]*)", text)
    for listed in re.findall(r"--scorers ((?:[\w.-][\w./:-]*[ ,]*)+)", text):
        specs += [spec for spec in re.split("[ ,]+", listed) if spec in FACTORIES]
    return sorted({spec.rstrip(".:") for spec in specs if not PLACEHOLDERS.search(spec)})


def test_scorers_named_in_documents_can_be_built_up_to_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    specs = named_scorers()
    assert {"clip:ViT-B-32:laion400m_e32", "pickscore", "hpsv2.1", "oracle"} <= {*specs} and len(specs) > 8
    for spec in specs:
        try:
            build_scorers([spec])
        except UserError as error:
            assert re.search(r"locate the file on the Hub|connect to 'https://huggingface.co'", str(error)), spec
