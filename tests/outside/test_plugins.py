"""An objective, a family, a scorer and a format in files outside the package, from training to evaluation."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import pipelines
import reward_scorers
from reward_scorers import Scorer, ScorerError
from t2i_align import align, cli, load_plugin, objectives, plugins
from t2i_align import config as configuration
from t2i_align.cli import commands
from t2i_align.data import readers
from t2i_align.data.spec import load as load_spec
from t2i_align.errors import UserError
from t2i_align.inference.options import build_scorers
from t2i_align.objectives import SFT
from tests.runs import command, image, jsonl_pairs, metrics, run_in_two_processes, run_values, same

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_objective_of_a_file_trains_resumes_and_runs_in_two_processes(sd_path: Path, tmp_path: Path) -> None:
    """Two processes with half the batch follow the same losses; a run goes on from its own run.yaml."""
    data = jsonl_pairs(tmp_path / "data", count=6)
    objective = {"name": f"{HERE}/margin.py:Margin", "beta": 3.0}
    values = run_values(sd_path, data, tmp_path / "whole", objective=objective)
    whole = align(values, progress=False)
    halves = {**values, "output_dir": str(tmp_path / "halves")}
    align({**halves, "train": {**values["train"], "steps": 2}}, progress=False)
    recorded = tmp_path / "halves" / "run.yaml"
    assert yaml.safe_load(recorded.read_text())["objective"] == objective
    resumed = align(recorded, ["train.steps=4", "resume=true"], progress=False)
    assert same(load_file(resumed.weights), load_file(whole.weights))
    both = {**values, "output_dir": str(tmp_path / "both"), "train": {**values["train"], "batch_size": 2}}
    run_in_two_processes(both, tmp_path)
    for one, two in zip(metrics(tmp_path / "both"), metrics(tmp_path / "whole"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_family_scorer_and_format_from_files_in_every_command(
    zimage_path: Path, siglip_path: Path, votes: Path, tmp_path: Path
) -> None:
    """Named once when the run begins; afterwards run.yaml tells resume, torchrun, generate and evaluate."""
    siglip = f"{HERE}/siglip.py:SigLIP:{siglip_path}"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\nsomething that is a good deal longer\n")
    validation = {
        "every": 2, "prompts": str(prompts), "scorers": [siglip], "steps": 2, "guidance": 1.0,
    }  # fmt: skip
    values = run_values(
        zimage_path, votes, tmp_path / "run", train__steps=2, train__batch_size=2, validation=validation
    )
    values["data"]["format"] = f"{HERE}/votes.py:votes"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    out = command("train", str(config), "--plugin", str(HERE / "zimage.py"), cwd=tmp_path)
    assert "(zimage, flow)" in out
    run = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert run["plugins"] == [f"{HERE}/zimage.py"] and run["data"]["format"] == f"{HERE}/votes.py:votes"
    assert "validation/siglip" in metrics(tmp_path / "run")[-1]
    recorded = ["train", str(tmp_path / "run" / "run.yaml"), "resume=true", "train.steps=4", "train.batch_size=1"]
    command(*recorded, cwd=tmp_path, processes=2)
    assert metrics(tmp_path / "run")[-1]["step"] == 4

    sampling = ["--steps", "2", "--guidance", "1"]
    command("generate", str(zimage_path), "--lora", "run", "--prompts", str(prompts), "--out", "images", *sampling,
            cwd=tmp_path)  # fmt: skip
    command("score", "images", "--scorers", siglip, "--out", "scores.jsonl", cwd=tmp_path)
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 2
    command("evaluate", "--aligned", "run", "--prompts", str(prompts), "--scorers", siglip, "--out", "evaluation",
            *sampling, cwd=tmp_path)  # fmt: skip
    assert json.loads((tmp_path / "evaluation" / "result.json").read_text())["scorer"] == "siglip"


def test_split_keeps_the_place_of_a_format(votes: Path, tmp_path: Path) -> None:
    """Also where the file was detected by a plugin that has run."""
    load_plugin(f"{HERE}/votes.py")
    for number, format in enumerate((f"{HERE}/votes.py:votes", "auto")):
        out = tmp_path / str(number)
        split = ["data", "split", str(votes), "--format", format, "--held-out", "0.4", "--out", str(out)]
        assert cli.main(split) == 0
        described, _ = load_spec(out / "train.yaml")
        assert described.format.startswith(f"{HERE}/votes.py:")
        assert len(list(readers.read(out / "train.yaml"))) > 0


def test_siglip_equals_transformers(siglip_path: Path) -> None:
    (scorer,) = build_scorers(f"{HERE}/siglip.py:SigLIP:{siglip_path}")
    images, prompts = [image(0), image(1)], ["a fox", "a cow"]
    tokens = scorer.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt")
    pixels = torch.stack([scorer.preprocess(one) for one in images])
    with torch.no_grad():
        expected = scorer.model(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image.diag()
    torch.testing.assert_close(scorer.score_images(images, prompts), expected)


# Names ----------------------------------------------------------------------------------------------------------------


def test_plugins_in_the_configuration_and_as_entry_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {"objective": {"name": "margin", "beta": 2.0}, "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="unknown objective 'margin'"):
        configuration.from_mapping(values)
    run = configuration.from_mapping({**values, "plugins": [str(HERE / "margin.py")]})
    assert run.objective.name == "margin" and configuration.from_mapping(configuration.to_mapping(run)) == run
    objectives.CLASSES.pop("margin")
    (tmp_path / "site").mkdir()
    shutil.copy(HERE / "margin.py", tmp_path / "site" / "margin_installed.py")
    shutil.copy(HERE / "margin_helper.py", tmp_path / "site")
    (tmp_path / "site" / "own-1.dist-info").mkdir()
    (tmp_path / "site" / "own-1.dist-info" / "entry_points.txt").write_text(
        "[t2i_align.plugins]\nown = margin_installed\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    plugins.load_installed.cache_clear()
    assert "\nmargin " in commands.objectives()
    assert configuration.from_mapping(values).objective.name == "margin"
    plugins.load_installed.cache_clear()


def test_one_rule_for_names_of_all_four_kinds() -> None:
    """Defined again it replaces itself; something else of that name is an error."""

    def again() -> list[Any]:
        class Mine(SFT):
            name = "mine"

        class Family(pipelines.FAMILIES["sd"]):
            family, pipeline_classes = "mine", ("MinePipeline",)

        def factory() -> Scorer:
            raise NotImplementedError

        def read(path: Path) -> Iterator[Any]:
            raise NotImplementedError

        return [
            objectives.register(Mine), pipelines.register(Family), reward_scorers.register("mine")(factory),
            readers.register("mine")(read),
        ]  # fmt: skip

    again()
    mine, family, factory, read = again()
    assert objectives.get("mine") is mine and pipelines.FAMILIES["mine"] is family
    assert reward_scorers.registry.FACTORIES["mine"] is factory and readers.reader_of("mine").function is read

    class Other(mine):
        pass

    class OtherFamily(family):
        pass

    failing: list[Callable[[], Any]] = [
        lambda: objectives.register(Other),
        lambda: pipelines.register(OtherFamily),
        lambda: reward_scorers.register("mine")(lambda: factory()),
        lambda: readers.register("mine")(lambda path: read(path)),
        lambda: reward_scorers.register("clip")(factory),
        lambda: readers.register("folders")(read),
    ]
    for register in failing:
        with pytest.raises((UserError, pipelines.PipelineError, ScorerError), match="already"):
            register()


def test_a_file_that_changes_runs_again(tmp_path: Path) -> None:
    file = tmp_path / "changing_plugin.py"
    for number in (1, 2):
        file.write_text(f"VALUE = {number}\n")
        os.utime(file, ns=(number, number))
        assert number == load_plugin(str(file)).VALUE
    assert load_plugin(str(file)) is load_plugin(str(file))


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (None, "gone.py:A", r"gone\.py: no such file"),
        ("import no_such_module_at_all", "bad.py:A", "No module named 'no_such_module_at_all'"),
        ("x = 1 / 0", "bad.py:A", r"ZeroDivisionError: division by zero \(line 1 of .*bad\.py\)"),
        ("class B: pass", "bad.py:A", r"no objective 'A' in this plugin. It defines: B"),
        ("class A: pass", "bad.py:A", "expected a subclass of t2i_align.objectives.Objective"),
        ("from t2i_align.objectives import Objective\nclass A(Objective):\n    def step(self, *a): ...", "bad.py:A",
         "the class lacks name and needs"),
        (None, "no_such_package.module:A", "No module named 'no_such_package'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_plugin_is_said(content: str | None, place: str, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bad.py").write_text(content)
    place = f"{tmp_path}/{place}" if ".py" in place else place
    with pytest.raises(UserError, match=message):
        configuration.from_mapping({"objective": place, "output_dir": "x"})
