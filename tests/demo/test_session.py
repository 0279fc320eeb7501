"""Drawing, cancelling, uploads and training, without a browser."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipelines
from t2i_align.demo import app, view
from t2i_align.demo.session import Demo, prompts_of, rows_of
from t2i_align.demo.training import choices
from t2i_align.errors import UserError
from t2i_align.inference.generate import generate
from tests.demo.conftest import PROMPTS, generated
from tests.runs import image


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("session")
    pipeline = pipelines.load("t2i_align/assets/tiny-sd")
    pipeline.add_lora(rank=2, alpha=2.0, dropout=0.0, targets="attention")
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    pipeline.save_lora(folder / "foxes")
    with app.opened("testbed:sd", [folder / "foxes"], out=folder / "demo", scorers=["oracle"]) as opened:
        yield opened


def test_every_model_draws_the_same_prompts_and_seeds_with_its_weight(demo: Demo) -> None:
    rows = rows_of(PROMPTS, 2, 7)
    weights = {"base": 1.0, "foxes": 0.0}
    *_, (job, drawn) = demo.draw("s", weights, rows, demo.compared, steps=3, guidance=1.0)
    assert job.done == job.total and len(drawn) == 8 and not demo.jobs
    by_model = {name: [one for one in drawn if one.model == name] for name in weights}
    assert [(one.prompt, one.seed) for one in by_model["base"]] == rows
    assert [one.file for one in by_model["base"]] == [one.file for one in by_model["foxes"]]  # weight 0: no difference
    images = generate("testbed:sd", list(PROMPTS), None, per_prompt=2, seed=7, steps=3, guidance=1.0, progress=False)
    assert [demo.compared.add(one) for one in images] == [one.file for one in by_model["base"]]
    *_, (_, half) = demo.draw("s", {"foxes": 1.0}, rows, demo.compared, steps=3, guidance=1.0)
    assert not {one.file for one in half} & {one.file for one in drawn}
    assert all(one.scores.keys() == {"oracle"} for one in drawn)
    assert view.comparison(demo.compared, drawn, True).count("oracle") == 0
    assert "foxes" not in view.comparison(demo.compared, drawn, True)
    assert view.comparison(demo.compared, drawn, False).count("foxes × 0") == 8  # caption and description


def test_prompts_that_a_scorer_cannot_judge_are_drawn_without_its_score(demo: Demo) -> None:
    *_, (_, drawn) = demo.draw("s", {"base": 1.0}, [("<script>alert(1)</script>", 1)], demo.compared, steps=1)
    assert not drawn[0].scores
    assert "<script>" not in view.comparison(demo.compared, drawn, False)


def test_cancelling_ends_a_drawing_at_the_next_step_and_no_other_sessions(demo: Demo) -> None:
    long = demo.draw("anna", {"base": 1.0}, [(PROMPTS[0], 1)], demo.compared, steps=1000, guidance=1.0)
    job, _ = next(long)
    while job.done < 2:
        next(long)
    demo.cancel("ben")
    assert not job.cancelled.is_set()
    started = time.monotonic()
    demo.cancel("anna")
    *_, (_, drawn) = long
    assert not drawn and time.monotonic() - started < 2 and job.done < 1000
    *_, (_, drawn) = demo.draw("anna", {"base": 1.0}, [(PROMPTS[0], 1)], demo.compared, steps=1)
    assert len(drawn) == 1  # the model is free again


def test_two_sessions_at_once_get_their_own_samples(demo: Demo) -> None:
    results: dict[int, list[str]] = {}

    def work(number: int) -> None:
        *_, (_, drawn) = demo.draw(str(number), {"base": 1.0}, rows_of(PROMPTS, 1, number), demo.compared, steps=2)
        results[number] = [one.file for one in drawn]

    def together(numbers: list[int]) -> None:
        threads = [threading.Thread(target=work, args=[number]) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    together([1, 2])
    at_once = dict(results)
    together([1])
    together([2])
    assert at_once == results and results[1] != results[2]


def test_too_much_nothing_and_unknown_models_are_refused(demo: Demo) -> None:
    for weights, rows, problem in [
        ({"base": 1.0}, rows_of(["a"] * 300, 1, 0), "at most 256"),
        ({"base": 1.0}, [("x" * 2001, 0)], "2000 characters"),
        ({}, [("a", 0)], "at least one model"),
        ({"base": 1.0}, [], "at least one model and one prompt"),
        ({"../../etc": 1.0}, [("a", 0)], "unknown model"),
    ]:
        with pytest.raises(UserError, match=problem):
            list(demo.draw("s", weights, rows, demo.compared))
    assert prompts_of(" a \n\nb\na") == ["a", "b"]


def test_pairs_of_samples_are_two_models_or_two_seeds(demo: Demo) -> None:
    *_, (_, drawn) = demo.draw(
        "s", {"base": 1.0, "foxes": 1.0}, rows_of(PROMPTS, 2, 3), demo.votes.images, steps=1, guidance=1.0
    )
    before = demo.votes.pairs
    # Of each prompt, base and foxes with each of two seeds, and two seeds of base and of foxes.
    assert demo.offer(drawn) == 8 == demo.votes.pairs - before
    assert demo.offer(drawn[::-1]) == 0


def test_uploads_are_images_or_refused(demo: Demo, tmp_path: Path) -> None:
    image(1).save(tmp_path / "a.png")
    image(2).save(tmp_path / "b.jpg")
    (tmp_path / "evil.png").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "program.gif").write_bytes(b"MZ\x90\x00")
    files = [*tmp_path.iterdir()]
    new, refused = demo.upload(files, "a fox")
    assert new == 1 and len(refused) == 2
    assert all(name in " ".join(refused) for name in ("evil.png", "program.gif"))
    with pytest.raises(UserError, match="prompt"):
        demo.upload(files, " ")
    with pytest.raises(UserError, match="two different images"):
        demo.upload([tmp_path / "a.png", tmp_path / "a.png"], "a fox")
    with pytest.raises(UserError, match="at most 64"):
        demo.upload(files * 20, "a fox")


def test_a_run_on_the_votes_leaves_a_lora_that_can_be_drawn(tmp_path: Path) -> None:
    source = generated(tmp_path / "source", prompts=6)
    with app.opened("testbed:sd", sources=[source], out=tmp_path / "demo") as demo:
        with pytest.raises(UserError, match="at least 2"):
            demo.training.start()
        for choice in ("left", "right", "tie", "left", "neither"):
            pair = demo.votes.next("anna")
            assert pair and demo.votes.vote("anna", pair, choice)
        with pytest.raises(UserError, match="votes suit"):
            demo.training.start("reward")
        with pytest.raises(UserError, match="0 votes"):
            demo.training.start(user="ben")
        demo.training.start("diffusion_dpo", steps=2)
        with pytest.raises(UserError, match="going on"):
            demo.training.start()
        pair = demo.votes.next("anna")
        assert pair and demo.votes.vote("anna", pair, "right")  # meanwhile
        while (state := demo.trained()) and state.running:
            time.sleep(0.5)
        assert state and state.weights and len(state.history) == 2, state
        assert "votes 1" in demo.studio.entries
        assert "the tab" in view.run(state)
        *_, (_, drawn) = demo.draw("s", {"votes 1": 1.0}, [(PROMPTS[0], 1)], demo.compared, steps=1)
        assert len(drawn) == 1
        assert demo.training.export().name == "1.safetensors" and demo.training.export().is_file()
    assert (tmp_path / "demo" / "votes_1.jsonl").read_text().count("\n") == 5
    assert "3 groups" in (tmp_path / "demo" / "runs" / "1.log").read_text()


def test_a_run_that_fails_says_why_and_one_that_goes_on_is_stopped_with_the_demo(tmp_path: Path) -> None:
    source = generated(tmp_path / "source", prompts=4)
    with app.opened("testbed:sd", sources=[source], out=tmp_path / "demo") as demo:
        while pair := demo.votes.next("anna"):
            demo.votes.vote("anna", pair, "left")
        with pytest.raises(UserError, match=r"optim\.lr"):
            demo.training.start(lr=-1)
        with pytest.raises(UserError, match="at most"):
            demo.training.start(steps=10**9)
        demo.training.start(steps=5000)
        while not (state := demo.training.state()) or not state.history:
            time.sleep(0.5)
        process = demo.training._process
    assert process and process.poll() == 130
    state = demo.training.state()
    assert state and "stopped after step" in state.message


def test_the_objectives_offered_learn_from_pairs_alone() -> None:
    assert {"diffusion_dpo", "mapo", "sft", "kto"} <= {*choices()}
    assert not {"reward", "dcpo", "tdpo", "smpo"} & {*choices()}


def test_accounts_are_read_from_options_and_files(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text("anna:a:b\n\nben:c\n")
    assert app.accounts_of([str(file), "carl:d"]) == [("anna", "a:b"), ("ben", "c"), ("carl", "d")]
    for wrong in (["anna"], ["anna:"], [":x"], ["a:b", "a:c"]):
        with pytest.raises(UserError, match="auth"):
            app.accounts_of(wrong)
