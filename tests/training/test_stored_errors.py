"""The reference's errors, stored by one run and reused by the next on the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from t2i_align import align
from t2i_align.errors import UserError
from t2i_align.training.reference import Reference
from tests.runs import metrics, run_values, same


def lines(output: Path) -> list[dict[str, Any]]:
    """A run's metrics, without the one that needs the reference's prediction."""
    return [{name: value for name, value in line.items() if name != "drift"} for line in metrics(output)]


@pytest.mark.parametrize("trained", ["lora", "model"])
def test_sweep_reuses_stored_errors_and_equals_runs_that_compute_them(
    trained: str, sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: dict[str, Any] = {} if trained == "lora" else {"lora": None}

    def run(name: str, store: bool, **changes: Any) -> Path:
        values = run_values(sd_path, pairs, tmp_path / name, train__store_reference=store, **full, **changes)
        return align(values, progress=False).weights

    other: dict[str, Any] = {"objective__beta": 50.0, "objective__link": "hinge", "optim__lr": 1e-4}
    run("first", True)
    computed = run("computed", False, **other)
    monkeypatch.setattr(Reference, "__call__", lambda *_: pytest.fail("the reference was asked"))
    recalled = run("recalled", True, **other)
    assert lines(tmp_path / "recalled") == lines(tmp_path / "computed") and len(lines(tmp_path / "recalled")) == 4
    if trained == "lora":
        assert same(load_file(computed), load_file(recalled))


def test_another_objective_on_the_same_noise_reuses_them_and_a_changed_run_does_not(
    sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"train__store_reference": True, "train__steps": 2}
    align(run_values(sd_path, pairs, tmp_path / "first", **values), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Reference, "__call__", lambda *_: pytest.fail("the reference was asked"))
        align(run_values(sd_path, pairs, tmp_path / "lpo", objective={"name": "lpo"}, **values), progress=False)
    align(run_values(sd_path, pairs, tmp_path / "seed", train__seed=7, **values))
    assert "train.seed" in (printed := capsys.readouterr().out) and "computed and stored" in printed
    align(run_values(sd_path, pairs, tmp_path / "longer", train__seed=7, train__store_reference=True))
    assert "8 errors of the reference are stored" in capsys.readouterr().out
    assert len(lines(tmp_path / "longer")) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "dspo"}}, "dspo needs the reference's prediction itself"),
        ({"objective": {"name": "sft"}}, "sft asks no reference"),
        ({"train__reference_update": {"every": 2}}, "train.reference_update exclude each other"),
    ],
)
def test_what_needs_more_than_errors_is_refused(
    changes: dict[str, Any], message: str, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", train__store_reference=True, **changes)
    with pytest.raises(UserError, match=message):
        align(values, progress=False)
    assert not (tmp_path / "run").exists()


def test_damaged_file_is_named(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    align(run_values(sd_path, pairs, tmp_path / "first", train__store_reference=True), progress=False)
    (file,) = (tmp_path / "cache" / "reference").glob("*/*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=file.name):
        align(run_values(sd_path, pairs, tmp_path / "second", train__store_reference=True), progress=False)
