"""Whatever stands where a command shall write, it is left as it was, and the answer is one clear line."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import survival
from t2i_align import cli
from tests.tiny import random_lora

NOTES = "my notes, one line"  # without its end, as a half-written line
COMMANDS = {name: command for name, (command, _) in survival.COMMANDS.items()} | {
    "retrieval": "retrieval inputs/pairs.jsonl --scorers hf-clip:inputs/clip --out out/recall.json",
    "import-command": 'import-command "train.py --rank 8" --out out/mine.yaml',
    "quickstart": "quickstart train.steps=1 --output out/made",
    "video pairs": "video pairs inputs --model inputs/model --out out/made",
    "video segments": "video segments inputs/pairs.jsonl --scorers oracle --out out/labels.jsonl",
}
WRONG = {  # an argument whose value shows late, in place of a right one
    "prepare": ("inputs/model.yaml", "inputs/run.yaml"), "train": ("train.steps=x", ""),
    "train-scorer": ("model=nosuch", ""), "export-lora": ("--model nowhere", ""), "generate": ("--steps 0", ""),
    "perturb": ("--kinds nosuch", "--kinds attribute relation"), "caption": ("nosuch", "testbed:captioner"),
    "data inspect": ("--model nowhere", ""), "data split": ("--held-out 7", "--held-out 0.3"),
    "retrieval": ("nosuch", "hf-clip:inputs/clip"), "import-command": ("--rank", "--rank 8"),
    "quickstart": ("train.steps=x", "train.steps=1"), "video pairs": ("--model nowhere", "--model inputs/model"),
}  # fmt: skip
BESIDE = (
    "data split",
    "prepare",
    "import-command",
    "audit-scorer",
)  # write files of their own names into a folder that holds others


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials") / "inputs"
    survival.make_inputs(folder)
    random_lora(folder / "model", folder / "run" / "lora")
    (folder / "run" / "run.yaml").write_text("model: {path: inputs/model}\n")
    return folder


def a_file(target: Path) -> None:
    target.parent.mkdir()
    target.write_text(NOTES)


def a_folder(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "notes.txt").write_text(NOTES)


def a_link(target: Path) -> None:
    target.parent.mkdir()
    Path("elsewhere").write_text(NOTES)
    target.symlink_to(Path("elsewhere").absolute())


def a_file_above(target: Path) -> None:
    target.parent.write_text(NOTES)


def nothing(target: Path) -> None:
    """For places where nothing can be written."""


OBSTACLES: dict[str, Callable[[Path], None]] = {
    "a file": a_file, "a folder": a_folder, "a link to a file": a_link, "a file above": a_file_above,
    "no file system to write to": nothing, "its source": nothing, "a file, and a wrong argument": a_file,
}  # fmt: skip


def content(folder: Path) -> dict[Path, bytes]:
    """Of each file but locks."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("lock"))
    return {file.relative_to(folder): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_destroyed(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for what, make in OBSTACLES.items():
        place = tmp_path / what.replace(" ", "_")
        shutil.copytree(inputs, place / "inputs")
        monkeypatch.chdir(place)
        command = COMMANDS[name]
        out = re.findall(r"out/\S+", command)[0 if name != "prepare" else -1]
        target = out
        if what.startswith("no file"):
            target = f"/proc/{out}"  # where not even an administrator can write
        elif what == "its source":
            file = "run/lora/pytorch_lora_weights.safetensors" if name == "export-lora" else "pairs.jsonl"
            target = f"inputs/{file}" if Path(out).suffix else "inputs"
        if "wrong" in what:
            new, old = WRONG.get(name, ("nosuch", "oracle"))
            command = command.replace(old, new) if old else f"{command} {new}"
        make(Path(target))
        before = content(place)
        status = cli.main(shlex.split(command.replace(out, target)))
        printed = capsys.readouterr()
        after = content(place)
        lost = [str(file) for file, text in before.items() if after.get(file) != text]
        refused = status == 2 and "Traceback" not in printed.err and (after == before)
        fine = status == 0 and name in BESIDE and what in ("a folder", "its source")
        if lost or not (refused or fine):
            new = [str(file) for file in after if file not in before]
            wrong.append(f"{what}: exit status {status}, lost {lost}, new {new}: {printed.err[-300:]}")
    assert not wrong, "\n".join(wrong)
