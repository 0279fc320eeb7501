"""`t2i-align doctor`: what is there, what is missing and how to get it, and the exit status."""

from __future__ import annotations

import shutil
from importlib import metadata

import pytest

from t2i_align.cli import doctor, main


def test_it_names_versions_devices_and_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "diffusers", "transformers", "peft"):
        assert f"{name} {metadata.version(name)}" in out
    assert "GB free" in out and "cores" in out and "HF_HUB_OFFLINE is set" in out and "native (torch SDPA)" in out
    assert out.endswith("This machine can train.\n")


def test_what_is_missing_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is needed and too old ends in status 2; one of an extra is advice."""
    real = metadata.version
    changed = {"peft": "0.1", "wandb": None}

    def version(name: str) -> str:
        found = changed.get(name, real(name) if name not in changed else None)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(doctor, "version", version)
    assert main(["doctor"]) == 2
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if line.startswith("peft "))
    assert "0.1: pip install 'peft>=0.18'" in line
    assert "not installed, needed for log.trackers=[wandb]: pip install 't2i-align[wandb]'" in err
    assert "can train." not in err
    del changed["peft"]
    assert main(["doctor"]) == 0 and "t2i-align[wandb]" in capsys.readouterr().out


def test_a_full_disk_is_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(100, 95, 5 * 10**9))
    found = [finding for kind, finding in doctor._disk() if kind == "advice"]
    assert {finding.found for finding in found} == {"5 GB free"} and "20 GB or more" in found[0].remedy
