"""`--engine ray` on a local Ray with two actors, one of which is killed: the files of one process, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from t2i_align.cli import main
from t2i_align.data import encode, store
from t2i_align.inference import generate
from t2i_align.labeling import score, synthesize
from t2i_align.utils.distributed import Distributed
from tests.runs import jsonl_pairs, run_values

pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow

BRIGHT = """
from reward_scorers import Scorer

class Bright(Scorer):
    name, version = "bright", "1"

    def rate(self, inputs, prompts):
        return inputs.mean((1, 2, 3))
"""
Both = Callable[..., tuple[dict[str, bytes], dict[str, bytes]]]

# Once, in the middle of its work.
KILLER = """
import os, signal
from pathlib import Path
from t2i_align.data import encode, store
from t2i_align.inference import generate
from t2i_align.labeling import score, synthesize

def deadly(function, after, ranks):
    calls = []
    def called(*arguments, **options):
        result = function(*arguments, **options)
        calls.append(1)
        mark = Path({mark!r})
        if os.environ.get("RANK", "none") in ranks and len(calls) == after and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return called

generate.sample = synthesize.sample = deadly(generate.sample, 2, "1")
score.judge = deadly(score.judge, 2, "1")
store.write_table = deadly(store.write_table, 2, "01")  # whichever comes to write a shard
encode.MAX_ROWS_PER_SHARD = 4
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is there for its user."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {str(file): (folder / file).read_bytes() for file in files if not any(p[0] == "." for p in file.parts)}


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Both:
    """What a command leaves in {out} by itself, and with two actors of which one is killed."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(encode, "MAX_ROWS_PER_SHARD", 4)
    for module, name in ((generate, "sample"), (synthesize, "sample"), (score, "judge"), (store, "write_table")):
        monkeypatch.setattr(module, name, getattr(module, name))  # which the plugin replaces in this process, too
    mark, plugin = tmp_path / "killed", tmp_path / "killer.py"
    (tmp_path / "bright.py").write_text(BRIGHT)
    plugin.write_text(KILLER.format(mark=str(mark)))

    def run(*arguments: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        found = []
        for name, options in (("one", ()), ("two", ("--engine", "ray", "--workers", "2", "--plugin", str(plugin)))):
            out = tmp_path / name
            out.mkdir()
            assert main([*(part.replace("{out}", str(out)) for part in arguments), *options]) == 0
            found.append(contents(out))
        assert mark.exists(), "nothing was killed"
        assert found[0]
        return found[0], found[1]

    return run


def test_generate(both: Both, sd_path: Path, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(5)))
    sizes = ("--per-prompt", "2", "--batch-size", "2", "--steps", "2")
    one, two = both("generate", str(sd_path), "--prompts", str(prompts), "--out", "{out}/images", *sizes)
    assert one == two
    assert len(one) == 11


def test_score(both: Both, tmp_path: Path) -> None:
    pairs = jsonl_pairs(tmp_path / "pairs")
    scored = ("--scorers", f"{tmp_path / 'bright.py'}:Bright", "--batch-size", "4", "--out", "{out}/scores.jsonl")
    one, two = both("score", str(pairs), *scored)
    lines = [sorted(files["scores.jsonl"].splitlines()) for files in (one, two)]
    assert lines[0] == lines[1]
    assert len(lines[0]) == 24


def test_synthesize(both: Both, sd_path: Path, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(40)))
    drawn = ("--per-prompt", "2", "--steps", "2", "--batch-size", "4")
    one, two = both(
        "synthesize",
        str(prompts),
        "--models",
        str(sd_path),
        "--scorers",
        f"{tmp_path / 'bright.py'}:Bright",
        "--out",
        "{out}",
        *drawn,
    )
    for files in (one, two):
        del files["scores.jsonl"]  # each process has one; the groups have them all
    assert one == two and "groups.jsonl" in one


def test_prepare(both: Both, sd_path: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, jsonl_pairs(tmp_path / "pairs"), tmp_path / "run")
    (config := tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    one, two = both("prepare", str(config), "data.cache_dir={out}")
    assert one == two


def test_an_error_of_an_actor_is_the_command_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    pairs = jsonl_pairs(tmp_path / "pairs", count=1)
    assert main(["score", str(pairs), "--scorers", "nonsense", "--engine", "ray", "--workers", "2"]) == 2
    assert "error: unknown scorer 'nonsense'" in capsys.readouterr().err
    assert Distributed.engine is None
