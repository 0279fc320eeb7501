"""Two runs at once: the second is refused whatever it would write, and a killed one stands in nobody's way."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from t2i_align.errors import UserError
from t2i_align.evaluation.compare import evaluate
from t2i_align.inference.generate import generate
from t2i_align.labeling.annotate import relabel
from t2i_align.labeling.score import score
from t2i_align.reward_models.audit import audit
from t2i_align.reward_models.config import ScorerRun
from t2i_align.reward_models.train import train_scorer
from t2i_align.training.run import align
from t2i_align.utils.files import output_lock
from tests.runs import jsonl_pairs, run_values
from tests.tiny import tiny_sd

HOLD = """
import sys
from pathlib import Path
from t2i_align.utils.files import only_writer
with only_writer(Path(sys.argv[1]), file=sys.argv[2] == "file"):
    print("held", flush=True)
    sys.stdin.read()
"""
FAST: dict[str, Any] = {"steps": 1, "guidance": 1.0, "progress": False}


@contextmanager
def another_run(output: Path, kind: str) -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jsonl_pairs(tmp_path_factory.mktemp("data"), 4)


def write_run(model: Path, data: Path, out: Path) -> Any:
    return align(run_values(model, data, out, train__steps=1), progress=False)


def write_scorer(model: Path, data: Path, out: Path) -> Any:
    values = {"path": str(data)}
    return train_scorer(ScorerRun(output_dir=str(out), model="hf-clip:nowhere", data=values), progress=False)  # type: ignore[arg-type]


def write_images(model: Path, data: Path, out: Path) -> Any:
    return generate(model, ["cat"], out, **FAST)


def write_evaluation(model: Path, data: Path, out: Path) -> Any:
    return evaluate(base=model, aligned=model, prompts=["cat"], scorers="motion", out=out, **FAST)


def write_scores(model: Path, data: Path, out: Path) -> Any:
    return score(data, "oracle", out, progress=False)


def write_audit(model: Path, data: Path, out: Path) -> Any:
    return audit(data, "motion", out, progress=False)


def write_annotations(model: Path, data: Path, out: Path) -> Any:
    return relabel(data, "oracle", out, progress=False)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_run, "run"),
        (write_scorer, "run"),
        (write_images, "images"),
        (write_evaluation, "evaluation"),
        (write_scores, "scores.jsonl"),
        (write_scores, "scores.parquet"),
        (write_annotations, "scores.jsonl"),
        (write_audit, "audit"),
    ],
)
def test_a_second_run_is_refused_while_the_first_lives(
    write: Callable[[Path, Path, Path], Any], name: str, sd_path: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    with another_run(out, "file" if out.suffix else "folder"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=f"{name}: another run is writing there"):
            write(sd_path, data, out)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_killed_run_stands_in_nobodys_way(tmp_path: Path) -> None:
    model, out = tiny_sd(tmp_path / "model"), tmp_path / "images"
    with another_run(out, "folder") as first:
        first.kill()
        first.wait()
        assert list(out.iterdir())  # its lock is left
        write_images(model, tmp_path, out)
    assert sorted(file.name for file in out.iterdir()) == ["00000.png", "samples.jsonl"]


def test_a_link_is_held_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there.jsonl")
    with another_run(tmp_path / "there.jsonl", "file"), pytest.raises(UserError, match=r"link.jsonl: another run"):
        output_lock(tmp_path / "link.jsonl", file=True).__enter__()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for output, file in ((tmp_path / "a", False), (tmp_path / "a" / "b.jsonl", True)):
        with pytest.raises(UserError, match=r"a is a file; a folder is needed there"):
            output_lock(output, file=file).__enter__()


def test_a_file_system_without_locks_is_written_to_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with output_lock(tmp_path / "out"):
        assert "keeps a second run from it" in caplog.text


def test_a_run_that_fails_lets_go(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), output_lock(tmp_path / "a" / "b.jsonl", file=True):
            1 / 0  # noqa: B018
    assert not list((tmp_path / "a").iterdir())
