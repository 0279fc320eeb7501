"""Commands that write survive kills, a full disk and damaged files; `benchmarks/survival.py` tries all of them."""

from __future__ import annotations

from benchmarks import survival
from t2i_align.cli.commands import COMMANDS

QUICK = ("data split", "perturb")


def test_every_command_that_writes_is_tried() -> None:
    """But the quickstart, which is made of `train` and `evaluate`, and others with tests of their own."""
    others = {"quickstart", "demo"}
    others |= {"check-model", "doctor", "objectives", "plan", "push", "import-command", "retrieval"}  # at most one file
    assert COMMANDS.keys() - survival.COMMANDS.keys() == others


def test_commands_survive() -> None:
    trials = list(survival.survive(QUICK, {"kills": 3, "random": 1, "full": 1, "damage": 1}))
    results = [result for _, _, results in trials for result in results]
    assert not [wrong for wrong in results if wrong]
    assert len(results) >= 5 * len(QUICK)
