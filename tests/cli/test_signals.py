"""Signals and a closed terminal: every command ends as after Ctrl-C, and a run saves first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml

from t2i_align import cli
from t2i_align.cli.commands import COMMANDS
from t2i_align.cli.streams import Stream
from t2i_align.training import checkpoint
from tests.runs import jsonl_pairs, metrics, run_values

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("again", [0, 2])
def test_a_signal_ends_a_command_as_ctrl_c_does(
    name: str, again: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM and SIGHUP often come several times, as from `timeout` or a service manager, which changes nothing."""
    number, before = signal.Signals[name], signal.getsignal(signal.SIGTERM)
    further = [signal.SIGTERM, signal.SIGHUP][:again] if number != signal.SIGINT else []

    def doctor() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            for other in further:
                os.kill(os.getpid(), other)

    monkeypatch.setattr("t2i_align.cli.doctor.doctor", doctor)
    assert cli.main(["doctor"]) == 130
    after = "." if name == "SIGINT" else f": {name}"
    assert capsys.readouterr().err == f"\ninterrupted{after}\n{COMMANDS['doctor'].interrupted}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_before_a_command_begins_ends_it_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_align.cli._main", lambda arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "\ninterrupted before it began\n"


def test_what_is_printed_to_a_closed_terminal_is_dropped() -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        print("seen", file=Stream(stream), flush=True)
        assert os.read(master, 100) == b"seen\r\n"
        os.close(master)
        for _ in range(2):
            print("dropped", file=Stream(stream), flush=True)


def test_a_run_whose_terminal_closes_saves_a_checkpoint(sd_path: Path, tmp_path: Path) -> None:
    """It prints a line a step, which then fails, as does its last word."""
    steps = {"train__steps": 100000, "log__every": 1, "log__checkpoint_every": 100000}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_values(sd_path, jsonl_pairs(tmp_path / "data"), tmp_path / "run", **steps)))
    master, slave = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, config], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.close(master)
    assert process.wait(120) == 130
    assert metrics(tmp_path / "run")[-1]["step"] == int(checkpoint.all_steps(tmp_path / "run")[-1].name[5:]) > 0


IN_A_TERMINAL = f"""
import fcntl, sys
from t2i_align.cli import main
fcntl.ioctl(0, {termios.TIOCSCTTY}, 0)
sys.exit(main(["train", *sys.argv[1:]]))
"""
