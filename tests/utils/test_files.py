"""Atomic outputs survive failures and kills; two runs never write one output."""

from __future__ import annotations

import errno
import itertools
import json
import os
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
from t2i_align.utils.files import (
    WRITING,
    append_line,
    atomic_file,
    atomic_folder,
    check_own,
    claim,
    holds,
    mark,
    output_lock,
    whole_lines,
    write_files,
    write_json,
    write_text,
)
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


def test_file_is_complete_or_untouched(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_file(file) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".json" and json.loads(file.read_text()) == {"a": 1}
        1 / 0  # noqa: B018
    assert json.loads(file.read_text()) == {"a": 1} and list(file.parent.iterdir()) == [file]


def test_folder_is_replaced_when_complete(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for name in ("first", "second"):
        with atomic_folder(folder) as temporary:
            assert not list(temporary.iterdir())  # not even what a killed attempt left
            (temporary / name).write_text(name)
            assert name == "first" or [file.name for file in folder.iterdir()] == ["first"]
        (tmp_path / ".writing_out").mkdir()
        (tmp_path / ".writing_out" / "left_over").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(folder):
        1 / 0  # noqa: B018
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/second"]


def test_folder_whose_replacement_was_stopped_between_its_renames_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill, which runs no clean-up, is undone by the next attempt, and an error at once."""
    folder, rename = tmp_path / "out", Path.rename
    for name, stop in (("kill", KeyboardInterrupt), ("error", OSError)):
        with atomic_folder(folder) as temporary:
            (temporary / "first").touch()

        def stopped(self: Path, target: Path, stop: type[BaseException] = stop) -> None:
            if target == folder and self.name == ".writing_out":
                raise stop
            rename(self, target)

        with monkeypatch.context() as patch, pytest.raises(stop), atomic_folder(folder) as temporary:
            (temporary / "second").touch()
            patch.setattr(Path, "rename", stopped)
        assert [file.name for file in folder.iterdir()] == ["first"]
        if name == "kill":
            folder.rename(tmp_path / ".writing_out.old")
            with pytest.raises(ZeroDivisionError), atomic_folder(folder):
                1 / 0  # noqa: B018
            assert [file.name for file in folder.iterdir()] == ["first"]


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to("disk/a.json")
    (tmp_path / "folder").symlink_to("disk/b")
    write_json(tmp_path / "link.json", {"a": 1})
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "c").touch()
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "folder").is_symlink()
    assert json.loads((tmp_path / "disk" / "a.json").read_text()) == {"a": 1} and (tmp_path / "disk/b/c").exists()


def test_results_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "c").touch(mode=0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.json", "b", "b/c")] == [0o640, 0o750, 0o640]


def test_half_written_last_line_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"id": "ä\udc80"}, {"id": "\u2028"}]
    assert whole_lines(file) == []
    append_line(file, *rows)
    with open(file, "ab") as stream:
        stream.write(b'{"id": "ha')
    assert whole_lines(file) == rows
    append_line(file, {"id": 3})
    assert whole_lines(file) == [*rows, {"id": 3}]
    append_line(file, [])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a.jsonl, line 4: expected an object, found list"):
        whole_lines(file)


def test_each_differing_setting_is_named(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    claim(file, {"seed": 1, "sizes": (1, 2), "model": {"a": 1, "b": 2}})
    claim(file, {"seed": 1, "sizes": (1, 2), "model": {"a": 1, "b": 2}})
    message = r"settings.json: .* model.b is 2 there, 3 here; seed is 1 there, None here; try --force"
    with pytest.raises(UserError, match=message):
        claim(file, {"sizes": (1, 2), "model": {"a": 1, "b": 3}}, advice="try --force")
    file.write_text("{")
    with pytest.raises(UserError, match=r"settings.json: not valid JSON"):
        claim(file, {})


def test_files_that_belong_together_are_never_of_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any of its renames and removals: some of the new ones, or the old first one alone."""

    class Kill(BaseException):
        pass

    old, new = ({name: f"{time} {name}" for name in ("a", "b", "c")} for time in ("old", "new"))
    states = []
    for instant in range(5):
        write_files(tmp_path, old)
        actions = itertools.count()

        def interrupted(action: Callable[..., Any], instant: int = instant, actions: Any = actions) -> Any:
            def step(*paths: Any, **options: Any) -> Any:  # os.replace(temporary, final) or Path.unlink(final)
                if Path(paths[-1]).name in old and next(actions) == instant:
                    raise Kill
                return action(*paths, **options)

            return step

        with monkeypatch.context() as patch, pytest.raises(Kill):
            patch.setattr(os, "replace", interrupted(os.replace))
            patch.setattr(Path, "unlink", interrupted(Path.unlink))
            write_files(tmp_path, new)
        states.append([(tmp_path / name).read_text() for name in old if (tmp_path / name).exists()])
    assert states == [["old a", "old b", "old c"], ["old a", "old b"], ["old a"], ["new a"], ["new a", "new b"]]
    write_files(tmp_path, new)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == new


def test_only_a_commands_own_files_are_replaced(tmp_path: Path) -> None:
    first, second = tmp_path / "a.html", tmp_path / "b.json"
    check_own("evaluate", first, second)
    second.write_text("{}")
    with pytest.raises(UserError, match=r"b.json: exists, and was not written by t2i-align evaluate; choose another"):
        check_own("evaluate", first, second)
    first.write_text(f"<!doctype html><!-- {mark('evaluate')} -->")
    check_own("evaluate", first, second)
    with pytest.raises(UserError, match=r"a.html: exists, and was not written by t2i-align data inspect"):
        check_own("data inspect", first)


def test_only_folders_without_foreign_content_are_written(tmp_path: Path) -> None:
    assert not holds(tmp_path / "new", "run", "run.yaml") and not holds(tmp_path, "run", "run.yaml")
    (tmp_path / ".hidden").touch()
    assert not holds(tmp_path, "run", "run.yaml")
    with pytest.raises(UserError, match="the folder is not empty and holds no run; choose another"):
        holds(tmp_path, "run", "run.yaml", ignored=(WRITING,))
    with pytest.raises(UserError, match=r"hidden: is a file; expected a folder"):
        holds(tmp_path / ".hidden", "run", "run.yaml")
    (tmp_path / "run.yaml").touch()
    assert holds(tmp_path, "run", "run.yaml", ignored=())


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


def test_a_device_or_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(UserError, match=f"{target}: is no regular file"):
            write_text(target, "text")
        assert not target.is_file()
