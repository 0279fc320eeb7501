"""Two runs never write one output, and no command replaces what it did not write."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from t2i_align.data.inspect import inspect
from t2i_align.data.splits import split
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
from t2i_align.utils.files import output_lock
with output_lock(Path(sys.argv[1]), file=sys.argv[2] == "file"):
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


def write_images(model: Path, data: Path, out: Path, **options: Any) -> Any:
    return generate(model, ["cat"], out, **options, **FAST)


def write_evaluation(model: Path, data: Path, out: Path, **options: Any) -> Any:
    return evaluate(
        base=model, aligned=model, prompts=["cat"], scorers="temporal_flickering", out=out, **options, **FAST
    )


def write_scorer(model: Path, data: Path, out: Path) -> Any:
    values: Any = {"path": str(data)}
    return train_scorer(ScorerRun(output_dir=str(out), model="hf-clip:nowhere", data=values), progress=False)


WRITERS: list[tuple[str, Callable[[Path, Path, Path], Any]]] = [
    ("run", lambda model, data, out: align(run_values(model, data, out, train__steps=1), progress=False)),
    ("run", write_scorer),
    ("images", write_images),
    ("evaluation", write_evaluation),
    ("scores.jsonl", lambda model, data, out: score(data, "oracle", out, progress=False)),
    ("scores.parquet", lambda model, data, out: score(data, "oracle", out, progress=False)),
    ("scores.jsonl", lambda model, data, out: relabel(data, "oracle", out, progress=False)),
    ("audit", lambda model, data, out: audit(data, "temporal_flickering", out, progress=False)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_second_run_is_refused_while_the_first_lives(
    write: Callable[[Path, Path, Path], Any], name: str, sd_path: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / name
    with another_run(out, "file" if out.suffix else "folder"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=f"{name}: another run is writing there"):
            write(sd_path, data, out)
        assert sorted(tmp_path.rglob("*")) == before


FOREIGN: list[tuple[str, str, Callable[[Path, Path, Path], Any]]] = [
    ("out/00000.png", "00000.png: is not of an earlier run", lambda m, d, out: write_images(m, d, out, force=True)),
    ("out/samples.jsonl", "samples.jsonl: is not the list of", lambda m, d, out: write_images(m, d, out, force=True)),
    ("out/result.json", "holds no evaluation", lambda m, d, out: write_evaluation(m, d, out, force=True)),
    ("out/report.html", "html: exists, and was not written", lambda m, d, out: write_evaluation(m, d, out, force=True)),
    (
        "out/audit.json",
        "json: exists, and was not written",
        lambda m, d, out: audit(d, "temporal_flickering", out, progress=False),
    ),
    (
        "out/report.html",
        "html: exists, and was not written",
        lambda m, d, out: audit(d, "temporal_flickering", out, progress=False),
    ),
    ("out/train.yaml", "yaml: exists, and was not written", lambda m, d, out: split(d, out, held_out=0.5)),
    ("out/held_out.yaml", "yaml: exists, and was not written", lambda m, d, out: split(d, out, held_out=0.5)),
    ("out/held_out_prompts.txt", "txt: exists, and was not wr", lambda m, d, out: split(d, out, held_out=0.5)),
    ("out/a.html", "a.html: exists, and was not written", lambda m, d, out: inspect(d, out / "a.html")),
]


@pytest.mark.parametrize(("name", "says", "write"), FOREIGN)
def test_files_of_something_else_are_not_replaced(
    write: Callable[[Path, Path, Path], Any], says: str, name: str, sd_path: Path, data: Path, tmp_path: Path
) -> None:
    """Not even where it is forced: that replaces what the same command left."""
    (tmp_path / "out").mkdir()
    (tmp_path / name).write_text('{"my": "notes"}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=says):
        write(sd_path, data, tmp_path / "out")
    assert (tmp_path / name).read_text() == '{"my": "notes"}\n' and sorted(tmp_path.rglob("*")) == before


def test_lock_of_a_killed_run_is_ignored(tmp_path: Path) -> None:
    model, out = tiny_sd(tmp_path / "model"), tmp_path / "images"
    with another_run(out, "folder") as first:
        first.kill()
        first.wait()
        assert list(out.iterdir())  # its lock is left
        write_images(model, tmp_path, out)
    assert sorted(file.name for file in out.iterdir()) == ["00000.png", "samples.jsonl"]


def test_linked_output_is_locked_at_its_target(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "there.jsonl")
    with another_run(tmp_path / "there.jsonl", "file"), pytest.raises(UserError, match=r"link.jsonl: another run"):
        output_lock(tmp_path / "link.jsonl", file=True).__enter__()


def test_file_where_a_folder_is_needed_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for output, file in ((tmp_path / "a", False), (tmp_path / "a" / "b.jsonl", True)):
        with pytest.raises(UserError, match=r"a is a file; a folder is needed there"):
            output_lock(output, file=file).__enter__()


def test_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="out: cannot be written: Read-only file system"):
        output_lock(tmp_path / "out").__enter__()


def test_file_system_without_locks_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with output_lock(tmp_path / "out"):
        assert "keeps a second run from it" in caplog.text


def test_failed_run_releases_its_lock(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), output_lock(tmp_path / "a" / "b.jsonl", file=True):
            1 / 0  # noqa: B018
    assert not list((tmp_path / "a").iterdir())
