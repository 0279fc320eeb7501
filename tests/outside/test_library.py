"""The package as a library: documents that are followed literally, types, notebooks, folders of the same name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

import t2i_align
from pipelines import PipelineError
from reward_scorers import ScorerError
from t2i_align import align, cli, losses, objectives
from t2i_align.config import RunConfig, from_mapping
from t2i_align.data.memory import source_path
from t2i_align.data.readers import read
from t2i_align.data.schema import Group
from t2i_align.errors import UserError
from t2i_align.objectives import SFT, DiffusionDPO, MaPO, Pairwise, Requirements
from t2i_align.utils.settings import settings
from tests.runs import image, jsonl_pairs, metrics, run_values

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def blocks(document: str, section: str = "") -> list[str]:
    """The Python code of a section of a document."""
    text = (ROOT / document).read_text()
    text = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0] if section else text
    return re.findall(r"```python\n(.*?)```", text, re.S)


# Documents ------------------------------------------------------------------------------------------------------------


def test_the_loop_of_the_guide_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does the call of `align` after it, in the same session."""
    monkeypatch.chdir(tmp_path)
    loop, call = blocks("docs/library.md")
    assert len([line for line in loop.splitlines() if line and "import" not in line]) <= 20
    session: dict[str, Any] = {}
    exec(loop, session)
    assert (tmp_path / "my_lora" / "pytorch_lora_weights.safetensors").is_file()
    session["pipeline"].denoiser.unload_lora()
    session["images"] = [(image(2 * i, 64), image(2 * i + 1, 64)) for i in range(4)]
    exec(call, session)
    assert session["run"].steps == 2 and session["samples"][0].size == (64, 64)


def test_contributing_is_followed_literally(sd_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of its text, written as they stand, and the commands that use them."""
    data = jsonl_pairs(tmp_path / "data", count=4)
    monkeypatch.chdir(tmp_path)
    for section, name in (("An objective", "objective"), ("A scorer", "scorer"), ("A data format", "format")):
        (code,) = blocks("CONTRIBUTING.md", section)
        Path(f"my_{name}.py").write_text(code)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (train,) = re.findall(r"t2i-align (train configs/\S+ objective=my_objective\S+)", text)
    (score,) = re.findall(r"t2i-align (score runs/images \S+ my_scorer\S+)", text)
    (inspect,) = re.findall(r"t2i-align (data inspect \S+ --format \S+)", text)
    short = ["train.steps=2", "train.batch_size=2", f"model.path={sd_path}", f"data.path={data}", "output_dir=run"]
    command, config, objective = train.split()
    assert cli.main([command, str(ROOT / config), objective, *short, "data.resolution=null", "log.every=1"]) == 0
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2 at the reference
    Path("my_votes.votes").write_text("a fox\tdata/0_good.png\tdata/0_bad.png\t3\t1\n")
    assert cli.main([*inspect.split(), "--out", "inspect.html"]) == 0
    assert cli.main(["generate", str(sd_path), "--prompt", "a fox", "--out", "runs/images", "--steps", "1"]) == 0
    assert cli.main([*score.split(), "--out", "runs/scores.jsonl"]) == 0


# Python -------------------------------------------------------------------------------------------------------------


def test_user_code_is_strictly_typed(tmp_path: Path) -> None:
    files = [str(HERE / f"{name}.py") for name in ("margin", "siglip", "votes", "zimage", "user_code")]
    libraries = "torch torchvision transformers diffusers peft accelerate numpy pyarrow PIL scipy".split()
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nfollow_imports = silent\nignore_missing_imports = True\n"
        f"[mypy-{','.join(f'{name}.*' for name in libraries)}]\nfollow_imports = skip\n"  # their types take minutes
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={tmp_path}/mypy.ini", f"--cache-dir={tmp_path}/cache", *files],
        env={**os.environ, "MYPYPATH": f"{ROOT}:{HERE}"}, capture_output=True, text=True, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_names_are_offered_and_all_exist() -> None:
    assert {"align", "evaluate", "generate", "losses", "objectives"} <= set(dir(t2i_align))
    for module in (t2i_align, losses, objectives):
        assert all(hasattr(module, name) for name in module.__all__)
    classes = {path.partition(":")[2] for path in objectives.CLASSES.values() if isinstance(path, str)}
    assert classes <= set(objectives.__all__) <= set(dir(objectives))
    code = "import sys, t2i_align.losses; print({'diffusers', 'accelerate', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_overrides_are_honoured_whatever_the_configuration_is(sd_path: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, jsonl_pairs(tmp_path / "data", count=2), tmp_path / "run", train__batch_size=2)
    overrides = ["train.steps=1", "objective.beta=3", "log.every=1"]
    for number, config in enumerate((values, from_mapping(values))):
        output = tmp_path / str(number)
        assert align(config, overrides, output_dir=output, progress=False).steps == 1
        assert "beta: 3.0" in (output / "run.yaml").read_text()
    run = align(values, overrides, objective=DiffusionDPO(beta=7.0), output_dir=tmp_path / "2", progress=False)
    assert "beta: 3.0" in (run.output_dir / "run.yaml").read_text()
    assert isinstance(from_mapping({**values, "objective": SFT()}), RunConfig)


def test_callbacks_see_steps_validations_and_checkpoints(sd_path: Path, tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"step": [], "validate": [], "save": []}
    validation = {"every": 2, "steps": 1, "guidance": 1.0, "count": 2}
    rows = [{"prompt": f"p {i}", "images": [image(2 * i), image(2 * i + 1)], "scores": [i, 1]} for i in range(4)]
    values = run_values(sd_path, tmp_path, tmp_path / "run", train__steps=3, train__batch_size=2, log__every=2,
                        validation=validation)  # fmt: skip
    align(
        values, data=rows, progress=False,
        on_step=lambda step, logged: seen["step"].append((step, "loss" in logged)),
        on_validate=lambda step, scores, samples: seen["validate"].append((step, scores, tuple(samples.shape))),
        on_save=lambda step, folder: seen["save"].append((step, (folder / "state.pt").is_file())),
    )  # fmt: skip
    assert seen["step"] == [(1, False), (2, True), (3, True)]
    assert seen["validate"] == [(step, {}, (2, 3, 32, 32)) for step in (0, 2, 3)]
    assert seen["save"] == [(0, True), (2, True), (3, True)]


def test_rows_in_memory_become_a_source_that_is_named_by_its_content(tmp_path: Path) -> None:
    image(2).save(tmp_path / "c.png")
    rows = [
        {"prompt": "one", "chosen": image(0), "rejected": tmp_path / "c.png", "user": "a"},
        {"prompt": "two", "chosen": (tmp_path / "c.png").read_bytes(), "rejected": image(1).convert("L"), "user": "b"},
    ]
    path = source_path(rows, tmp_path / "cache")
    assert path == source_path(rows, tmp_path / "cache") != source_path(rows[:1], tmp_path / "cache")
    groups = [group for group in read(path) if isinstance(group, Group)]
    assert [(group.prompt, group.user, group.scores) for group in groups] == [
        ("one", "a", (1, 0)),
        ("two", "b", (1, 0)),
    ]
    assert repr(groups[0]).startswith("Group(") and len(repr(groups[0])) < 200
    spec = source_path({"path": path, "part": {"of": "held_out", "held_out": 0.99}}, tmp_path / "cache")
    assert spec.endswith(".yaml") and len(list(read(spec))) > 0
    for wrong, message in (
        ([], "a list without rows"),
        (["x"], r"data\[0\]: expected a mapping"),
        ([rows[0], {"prompt": "x", "chosen": 3, "rejected": image(0)}], r"data\[1\]\['chosen'\]: expected a PIL image"),
        ([{"prompt": "x", "images": [tmp_path / "gone.png"]}], r"data\[0\]\['images'\].*gone\.png"),
    ):
        with pytest.raises(UserError, match=message):
            source_path(wrong, tmp_path / "cache")


@settings
class MarginLink(Pairwise):
    """A method on pairs without a reference."""

    name = "margin_link"
    needs = Requirements(candidates=2, ties=False)


def test_a_method_on_pairs_without_a_reference_keeps_links_guard_and_metrics(sd_path: Path, tmp_path: Path) -> None:
    """The logit is -1/2 beta (err_w - err_l): with a hinge the loss is the mean of max(0, 1 - margin)."""
    values = run_values(sd_path, jsonl_pairs(tmp_path / "data"), tmp_path / "run", train__steps=1)
    objective = MarginLink(beta=4.0, link="hinge", guard=0.2)
    (line,) = metrics(align(values, objective=objective, progress=False).output_dir)
    assert line["loss"] == pytest.approx(1 - line["rewards/margins"], abs=1e-5)  # no margin is above 1 here
    assert {"guard/passing", "rewards/accuracies", "error/chosen"} <= line.keys()
    assert not any("reference" in name or name == "drift" for name in line)


@pytest.mark.parametrize("objective", [MaPO(), SFT()])
def test_winners_that_get_worse_end_a_run_without_a_reference(objective: Any, sd_path: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the winners' error against the same noise, before and after."""
    values = run_values(
        sd_path, jsonl_pairs(tmp_path / "data"), tmp_path / "run", lora=None, optim__lr=0.1,
        optim__warmup_steps=0, health={"rollbacks": 0, "max_error_rise": 0.2},
    )  # fmt: skip
    with pytest.raises(UserError, match="winners that are denoised much worse than by the initial model"):
        align(values, objective=objective, progress=False)


# Notebooks ------------------------------------------------------------------------------------------------------------


def test_errors_of_input_are_one_line_in_ipython(capsys: pytest.CaptureFixture[str]) -> None:
    shell = InteractiveShell.instance()
    for error in (UserError, PipelineError, ScorerError):
        shell.user_ns["error"] = error
        shell.run_cell("def f():\n    raise error('what is wrong')\nf()")
        assert capsys.readouterr().out.strip() == f"{error.__name__}: what is wrong"
    InteractiveShell.clear_instance()


def test_a_run_and_an_evaluation_show_themselves(
    sd_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = {"every": 2, "steps": 1, "guidance": 1.0, "count": 2}
    values = run_values(sd_path, jsonl_pairs(tmp_path / "data"), tmp_path / "run", validation=validation)
    capsys.readouterr()
    run = align(values, progress=False)
    printed = capsys.readouterr()
    assert printed.out == "" and "Loading" not in printed.err  # as the libraries' bars begin
    page = run._repr_html_()
    assert page.count("<polyline") >= 8 and "Implicit reward" in page and "data:image/png" in page
    assert len(run.history) == 4 and len(repr(run)) < 200
    result = t2i_align.evaluate(
        base=sd_path, aligned=run.output_dir, prompts=["a fox"], scorers=[sharpness()],
        out=tmp_path / "evaluation", steps=1, guidance=1.0, progress=False,
    )  # fmt: skip
    page = result._repr_html_()
    assert "win rate" in page and "95 % interval" in page and "<iframe" in page and "data:image/png" in page
    assert repr(result).startswith("Evaluation(win rate ") and len(repr(result)) < 200


def sharpness() -> Any:
    session: dict[str, Any] = {"__name__": "sharpness"}
    exec(blocks("CONTRIBUTING.md", "A scorer")[0].replace('@register("sharpness")\n', ""), session)
    return session["Sharpness"]()


# Folders of the same name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "import t2i_align; from t2i_align import align; import pipelines; print(pipelines.FAMILIES['sd'])",
            "pipelines.sd",
        ),
        ("import pipelines; import t2i_align.losses; print('mine', pipelines.MINE)", "mine 1"),
        ("import pipelines; from t2i_align import align", "Rename your folder, say to my_pipelines"),
        ("import pipelines; from t2i_align.training.run import align", "Rename your folder, say to my_pipelines"),
        ("from t2i_align import align; import pipelines.part", "Rename your folder, say to my_pipelines"),
        ("from t2i_align import cli; print(cli.main(['objectives', 'sft']))", "0"),
    ],
)
def test_a_folder_named_pipelines_beside_a_script(code: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "__init__.py").write_text("MINE = 1\n")
    (tmp_path / "pipelines" / "part.py").write_text("")
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert expected in done.stdout + done.stderr
    assert ("Rename" in expected) == (done.returncode != 0)


def test_a_pipeline_of_the_testbed_is_said_where_it_is_loaded() -> None:
    import pipelines

    with pytest.raises(PipelineError, match=r"write t2i_align.load_pipeline\('testbed:sd'\)"):
        pipelines.load("testbed:sd")
    assert t2i_align.load_pipeline("testbed:sd").family == "sd"
