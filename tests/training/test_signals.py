"""A signal to a run, to its group with the loader's workers, or to one of two processes: it goes on bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from t2i_align.training import checkpoint
from tests.runs import finished, launch, lora_of, metrics, run_values, same
from tests.training.test_crashes import end_of, newest, wait_for

# Those that test_crashes.py has no trial of are not slow.
SLOW = [
    (target, name, *([] if (target, name) in (("process", "SIGHUP"), ("group", "SIGINT")) else [pytest.mark.slow]))
    for target in ("process", "group", "rank")
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
]


@pytest.mark.parametrize(("target", "name"), [pytest.param(target, name, marks=marks) for target, name, *marks in SLOW])
def test_a_run_ends_with_a_checkpoint_and_goes_on_to_the_same_weights(
    target: str, name: str, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    options = {"train__steps": 60, "log__checkpoint_every": 1000, "lora__dropout": 0.1, "train__batch_size": 2,
               "data__cache_dir": str(tmp_path / "cache"), "data__workers": 2 * (target == "group")}  # fmt: skip
    count = 2 if target == "rank" else 1
    whole, run = (tmp_path / name for name in ("whole", "run"))
    values = run_values(sd_path, pairs, run, **options)
    process = launch(values, tmp_path, processes=count, start_new_session=True)
    wait_for(process, lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2)
    number = signal.Signals[name]
    if target == "group":
        os.killpg(process.pid, number)
    elif target == "process":
        process.send_signal(number)
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), number)
    output = end_of(process)
    assert process.returncode == (1 if target == "rank" else 130), output
    assert output.count("interrupted: stopped after step") == count, output
    assert target == "rank" or "Traceback" not in output
    assert 0 < newest(run) == metrics(run)[-1]["step"] < 60
    finished(launch({**values, "resume": True}, tmp_path, processes=count))
    finished(launch({**values, "output_dir": str(whole)}, tmp_path, processes=count))
    assert same(lora_of(run), lora_of(whole)) and metrics(run) == metrics(whole)
    assert checkpoint.all_steps(run)[-1].name == "step_000060"
