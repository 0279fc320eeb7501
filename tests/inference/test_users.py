"""Images for a user: from a file of choices or a mix of users, the same on every path, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pipelines
from t2i_align import align
from t2i_align.conditioning import personal
from t2i_align.conditioning.preferences import rebuilt
from t2i_align.data import readers
from t2i_align.data.users import choices_by_user
from t2i_align.errors import UserError
from t2i_align.evaluation.compare import evaluate
from t2i_align.inference.generate import generate
from t2i_align.inference.models import adapter_on, resolve_adapter
from t2i_align.inference.users import tokens_of
from tests.reward_scorers.small import write_hf_clip
from tests.runs import image, run_values

PROMPTS = ["a fox", "a hen"]


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    lines = []
    for number in range(8):
        for side in range(2):
            image(2 * number + side).save(folder / f"{number}_{side}.png")
        lines.append({"prompt": f"prompt {number}", "user": "ann" if number < 4 else "bob",
                      "chosen": f"{number}_0.png", "rejected": f"{number}_1.png"})  # fmt: skip
    (folder / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ann = [{key: value for key, value in line.items() if key != "user"} for line in lines[:4]]
    (folder / "ann.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ann))
    return folder / "choices.jsonl"


@pytest.fixture(scope="module")
def run(sd_path: Path, choices: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    clip = write_hf_clip(folder / "clip")
    options = {"embedder": f"hf-clip:{clip}", "examples": [1, 3], "width": 8}
    values = run_values(sd_path, choices, folder / "run", lora=None, personal=options, train__steps=2)
    file = align(values, progress=False).weights
    state = load_file(file)  # two steps change no image: make the branch strong
    state |= {name: 30 * torch.randn_like(t) for name, t in state.items() if "user_v" in name}
    save_file(state, file, {personal.HEADER: json.dumps(vars(personal.read(file)[0]))})
    return folder / "run"


def made(run: Path, **options: object) -> np.ndarray:
    images = generate(pipeline(run), PROMPTS, None, lora=run, steps=2, guidance=2.0, progress=False, **options)
    return np.stack([np.asarray(one) for one in images]).astype(float)


def pipeline(run: Path) -> pipelines.TrainablePipeline:
    import yaml

    return pipelines.load(yaml.safe_load((run / "run.yaml").read_text())["model"]["path"])


def test_a_file_a_name_and_a_mix(run: Path, choices: Path) -> None:
    nobody, ann, bob = made(run), made(run, user=choices.parent / "ann.jsonl"), made(run, users="bob")
    base = generate(pipeline(run), PROMPTS, None, steps=2, guidance=2.0, progress=False)
    assert (nobody == np.stack([np.asarray(one) for one in base])).all(), "without a user it is the base"
    assert (ann == made(run, user=choices, users="ann")).all() and (ann == made(run, users={"ann": 3.0})).all()
    assert abs(ann - nobody).max() > 2 and abs(ann - bob).max() > 2
    assert (made(run, users="ann", user_scale=0.0) == nobody).all()
    mixed = made(run, users="ann:0.5,bob:0.5")
    assert abs(mixed - ann).max() > 0 and abs(mixed - bob).max() > 0
    assert (made(run, users="ann:1,bob:0") == ann).all()


def test_the_diffusers_pipeline_itself_makes_the_same(run: Path, choices: Path) -> None:
    plain = pipeline(run)
    with adapter_on(plain, resolve_adapter(run)):
        branch = plain.denoiser.personal
        groups = choices_by_user(readers.read(choices), "")["ann"]
        tokens = tokens_of(branch, rebuilt(branch.embedding), groups)
        ours = plain.generate(PROMPTS, [0, 1], steps=2, guidance=2.0)
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        with personal.serving(plain.denoiser, tokens, guided=True):
            theirs = plain.pipe(
                PROMPTS, num_inference_steps=2, guidance_scale=2.0, generator=generators, output_type="pt"
            )
            ours_for_ann = plain.generate(PROMPTS, [0, 1], steps=2, guidance=2.0)
    torch.testing.assert_close(theirs.images.clamp(0, 1), ours_for_ann, atol=1e-5, rtol=1e-5)
    assert (ours - ours_for_ann).abs().max() > 1e-2


def test_evaluated_for_a_user(run: Path, choices: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\na hen\n")
    options = {"aligned": run, "prompts": tmp_path / "prompts.txt", "scorers": "smoothness_of.py:Dark", "steps": 2}
    plugin = tmp_path / "dark.py"
    plugin.write_text(
        "from reward_scorers import Scorer\n\n\nclass Dark(Scorer):\n    name, version = 'dark', '1'\n\n"
        "    def rate(self, inputs, prompts):\n        return -inputs.mean((1, 2, 3))\n"
    )
    options |= {"scorers": f"{plugin}:Dark", "progress": False}
    result = evaluate(out=tmp_path / "ann", users="ann:0.9,bob:0.1", **options)
    settings = json.loads((tmp_path / "ann" / "result.json").read_text())
    assert settings["users"] == {"ann": 0.9, "bob": 0.1} and settings["user_scale"] == 1.0
    assert settings["identical_pairs"] == 0 and result.headline.total.n == 2
    assert evaluate(out=tmp_path / "nobody", **options).settings["identical_pairs"] == 2


def test_what_cannot_be_served_is_refused(run: Path, choices: Path, sd_path: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: object) -> None:
        with pytest.raises(UserError, match=message):
            made(run, **options)

    refused("unknown user in .*choices.jsonl 'eve'", users="eve")
    refused("choices of 2 users; name one or several", user=choices)
    refused("expected names with weights such as ann:0.7,bob:0.3, found 'ann:x'", users="ann:x")
    refused("all weights are 0", users="ann:0")
    refused("no such file", user=tmp_path / "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"prompt": "a", "chosen": "gone.png", "rejected": "gone2.png"}) + "\n")
    refused("gone.png", user=broken)
    tie = choices.parent / "tie.jsonl"
    images = ["0_0.png", "0_1.png"]
    tie.write_text(json.dumps({"prompt": "a", "images": images, "scores": [1, 1]}) + "\n")
    refused("no pair that prefers one of two images", user=tie)
    with pytest.raises(UserError, match="only a run with a personal branch serves users"):
        generate(pipelines.load(sd_path), PROMPTS, None, users="ann", progress=False)
    other = write_hf_clip(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in state.items()}, other / "model.safetensors", {"format": "pt"})
    embedding, state = personal.read(run / "personal" / personal.FILE)
    file = tmp_path / "elsewhere.safetensors"
    save_file(state, file, {personal.HEADER: json.dumps({**vars(embedding), "embedder": f"hf-clip:{other}"})})
    with pytest.raises(UserError, match="trained with the embeddings of other weights"):
        generate(pipelines.load(sd_path), PROMPTS, None, lora=file, user=choices, users="ann", progress=False)
