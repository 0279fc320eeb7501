"""The documentation: it builds, its snippets can be used, its figures and metrics are those of the code."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from reward_scorers.combine import Combination
from reward_scorers.denscore import Settings
from t2i_align import config
from t2i_align.cli.commands import COMMANDS
from t2i_align.data.spec import load as load_spec
from t2i_align.quickstart import CONFIG
from tests.objectives.test_identities import CASES, build
from tests.objectives.toy import as_required, loss_and_gradient, rich_batch
from tests.test_house import DOCUMENTS, ROOT

SHELL = {"accelerate", "cd", "docker", "git", "make", "pip", "python", "ray", "t2i-align", "torchrun"}
PAGES = sorted(ROOT.glob("docs/**/*.md"))


def snippets(language: str) -> Iterator[tuple[Path, str]]:
    """Code blocks of all documents."""
    for file in DOCUMENTS:
        for block in re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.M | re.S):
            yield file, block


def test_site_builds_without_warnings_and_has_every_page(tmp_path: Path) -> None:
    """Also those outside docs/, the API from docstrings, and the notebooks with their outputs."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    for page in [*(file.relative_to(ROOT / "docs") for file in PAGES), Path("CONTRIBUTING.md")]:
        assert (tmp_path / page.with_suffix(".html")).is_file(), f"{page} is not on the site"
    api = (tmp_path / "api.html").read_text()
    assert "on_validate" in api and "dpo_logit" in api and "Parameters" in api
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        assert (tmp_path / "notebooks" / f"{notebook.stem}.html").is_file()
    training = (tmp_path / "training.html").read_text()
    assert 'href="CONTRIBUTING.html"' in training and "../CONTRIBUTING.md" not in training


def test_shell_lines_are_commands_that_exist() -> None:
    """`test_cli` parses each; here none is left out for its name."""
    makefile, setup, lines = (ROOT / "Makefile").read_text(), configparser.ConfigParser(), 0
    setup.read(ROOT / "setup.cfg")
    for file, block in snippets("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split("#")[0].split()
            while words and "=" in words[0]:
                words.pop(0)
            if not words:
                continue
            lines += 1
            assert words[0] in SHELL, f"{file.name}: {line}"
            if words[0] == "t2i-align":
                assert words[1] in COMMANDS or " ".join(words[1:3]) in COMMANDS, f"{file.name}: {line}"
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.M), f"{file.name}: {line}"
        for extra in re.findall(r"'\.\[(\w+)\]'", file.read_text()):
            assert extra in setup["options.extras_require"], f"{file.name}: no extra {extra}"
    assert lines > 40


def test_yaml_snippets_are_read_by_what_reads_them(tmp_path: Path) -> None:
    kinds = set()
    for file, block in snippets("yaml"):
        values = yaml.safe_load(block)
        if "rule" in values:
            kinds.add(Combination.model_validate(values).__class__)
        elif "scorer" in values:
            kinds.add(Settings.model_validate(values).__class__)
        elif "columns" in values:
            (tmp_path / "spec.yaml").write_text(block)
            (tmp_path / values["path"]).write_text("")
            kinds.add(load_spec(tmp_path / "spec.yaml")[0].__class__)
        else:
            assert values.keys() <= config.to_mapping(config.load(CONFIG)).keys(), file
            base = {"objective": {"name": "diffusion_dpo"}, "output_dir": "runs/a"}
            kinds.add(config.from_mapping(base | values).__class__)
    assert len(kinds) >= 3


@pytest.mark.parametrize("language", ["python", "json"])
def test_python_and_json_snippets_parse(language: str) -> None:
    for file, block in snippets(language):
        code = re.sub(r"^[%!].*$", "", block, flags=re.M)
        for part in [code] if language == "python" else code.strip().splitlines():
            try:
                ast.parse(part) if language == "python" else yaml.safe_load(part)
            except (SyntaxError, yaml.YAMLError) as error:
                pytest.fail(f"{file.name}: {error}")


def test_choosing_has_the_figures_of_the_claims() -> None:
    """Win rates with their intervals, and a step's cost; the last are of the one run of each method."""
    claims = (ROOT / "docs" / "claims.md").read_text() + (ROOT / "docs" / "data.md").read_text()
    choosing = (ROOT / "docs" / "choosing.md").read_text()
    figures = re.findall(r"\d+ % \[\d+, \d+\]", choosing)
    assert len(figures) >= 10
    for figure in figures:
        assert figure in claims or figure.replace(" %", "%") in claims or figure in claims.replace("\n", " "), figure
    cost = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+ \| [\d.]+) \|$", claims, re.M))
    rows = re.findall(r"^\|[^|]+\| `(\w+)`(.*?) \|[^|]+\| ([\d.]+ \| [\d.]+) \|$", choosing, re.M)
    assert len(rows) >= 7
    for name, more, figure in rows:
        assert cost["stable_reference" if "reference" in more else name] == figure, name


# Metrics --------------------------------------------------------------------------------------------------------------


def documented() -> set[str]:
    """Metrics in the first columns of the page's tables."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`([^`]+)`", row)}


def general(name: str) -> str:
    """A metric's name with what depends on scorers left open, as the page has it."""
    for form in (r"^(reward/).+", r"^(validation/)[^/]+(/)[^/]+$"):
        name = re.sub(form, lambda match: "<scorer>".join(match.groups()) + "<part>", name)
    return re.sub(r"^(validation/)[^/<]+$", r"\1<scorer>", re.sub(r"^(held_out/).+", r"\1<metric>", name))


def test_every_metric_is_documented_and_every_documented_one_is_logged() -> None:
    logged = {"step"}
    for name, options in CASES:
        objective = build(name, options)
        logged |= {
            general(key) for key in loss_and_gradient(objective, as_required(rich_batch(4, 4), objective), "epsilon")[2]
        }
    for file in (ROOT / "t2i_align" / "training").glob("*.py"):  # what is not an objective's
        names = re.findall(
            r'"((?:winners|reference)/\w+|loss|grad_norm|update_norm|lr|rollback|diverged_at|ended'
            r'|epoch|time|seconds_per_step|memory_gib)"',
            file.read_text(),
        )
        logged |= {*names}
        logged |= {general(name) for name in re.findall(r'f"((?:validation|held_out)/\{[^"]*)"', file.read_text())}
    assert logged == documented()
