"""Atomic outputs survive failures and kills; two runs never write one output."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2i_align.errors import UserError
from t2i_align.utils.files import (
    WRITING,
    append_line,
    atomic_file,
    atomic_folder,
    check_own,
    claim,
    holds,
    mark,
    whole_lines,
    write_files,
    write_json,
    write_text,
)


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


def test_a_device_or_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (Path("/dev/null"), tmp_path / "pipe"):
        with pytest.raises(UserError, match=f"{target}: is no regular file"):
            write_text(target, "text")
        assert not target.is_file()
