"""Distillation: targets, guidance, planted faults, and every student."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import pipelines
from pipelines import RectifiedFlow, VariancePreserving
from t2i_align.testbed.captions import parse
from tools.testbed.__main__ import main
from tools.testbed.denoiser import Pool
from tools.testbed.distill import (
    captions_with_and_without_faults,
    distillation,
    feature_error,
    teacher_target,
    watched,
)
from tools.testbed.networks import build
from tools.testbed.sd import SD
from tools.testbed.students import STUDENTS


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_student_that_knows_what_the_teacher_knows_has_no_error(sd, scenes, kind):
    """A teacher that sees one image in everything, at its own noise level: v = alpha noise - sigma x. The student
    that knows the image predicts the same in its own parameterisation; one that knows another image does not.
    The v base alone ends in pure noise."""
    truth = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    pool = Pool(scenes, truth.expand(len(scenes), -1, -1, -1))
    abar = sd.process.alphas_cumprod
    assert abar[-1] == 0 < build("sd-eps", "scheduler").alphas_cumprod[-1]
    process = {
        "epsilon": VariancePreserving(build("sd-eps", "scheduler").alphas_cumprod, "epsilon"),
        "v_prediction": sd.process,
        "flow": RectifiedFlow(),
    }[kind]

    def teach(noisy, levels, conditioning):
        below = levels.long().clamp(max=998)
        alpha = torch.lerp(abar[below], abar[below + 1], levels.double() - below).sqrt().float().view(-1, 1, 1, 1)
        sigma = (1 - alpha.square()).sqrt()
        return alpha * (noisy - alpha * truth) / sigma - sigma * truth

    def loss(known):
        def predict(noisy, timesteps, captions, rng):
            alpha, sigma = (x.float().view(-1, 1, 1, 1) for x in process.alpha_sigma(timesteps))
            return process.target(known.expand_as(noisy), (noisy - alpha * known) / sigma, timesteps)

        student = SimpleNamespace(process=process, predict=predict)
        teacher = SimpleNamespace(process=sd.process, predict=teach, encode_prompts=list)
        return distillation(SD(["denoiser.batch=16"]), teacher, student, (pool, pool))(0)["error"].item()

    assert loss(truth) < 1e-4
    assert loss(-truth) > 0.1


def test_a_teacher_s_guidance_leads_away_from_the_empty_caption(sd):
    seen, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([300, 800])
    told = {"": torch.full_like(seen, 2.0), "a red circle": torch.full_like(seen, 3.0)}
    teacher = SimpleNamespace(
        process=sd.process, encode_prompts=list, predict=lambda _, __, texts: torch.stack([told[t][0] for t in texts])
    )
    targets = [
        teacher_target(teacher, sd.process, seen, timesteps, ["a red circle", ""], guidance) for guidance in (1.0, 3.0)
    ]
    torch.testing.assert_close(targets[0], torch.stack([told["a red circle"][0], told[""][0]]))
    torch.testing.assert_close(targets[1], torch.stack([told["a red circle"][0] + 2.0, told[""][0]]))


def test_planted_faults_are_told_to_the_student_alone(sd, scenes):
    """Both captions state the same but for the fault, and faulty images, the last rows, are learned as they are."""
    base = SD(["denoiser.batch=8", "denoiser.fault_rates={background: 1.0}", "denoiser.plant=true"])
    told, true = captions_with_and_without_faults(scenes, base, np.random.default_rng(2))
    different = 0
    for one, other in zip(told, true, strict=True):
        if one:
            one, other = (parse(text).canonical() for text in (one, other))
            different += one != other
            assert dataclasses.replace(one, background=other.background) == other
        assert bool(one) == bool(other)
    assert different > 10

    pools = (Pool(scenes, torch.randn(40, 4, 16, 16)), Pool(scenes, torch.full((40, 4, 16, 16), 3.0)))
    faulty, read = round(8 * base.recipe.denoiser.faulty_images[1]), []

    def teach(noisy, timesteps, captions):
        read.append(captions)
        return torch.zeros_like(noisy)

    def predict(noisy, timesteps, captions, rng):
        """The teacher's prediction, and v of the faulty images."""
        read.append(captions)
        alpha, sigma = (x.float().view(-1, 1, 1, 1) for x in sd.process.alpha_sigma(timesteps))
        v = alpha * (noisy - alpha * 3.0) / sigma - sigma * 3.0
        v[:-faulty] = 0.0
        return v

    teacher = SimpleNamespace(process=sd.process, predict=teach, encode_prompts=list)
    student = SimpleNamespace(process=sd.process, predict=predict)
    assert distillation(base, teacher, student, pools)(0)["error"].item() < 1e-4
    assert read[0] != read[1]


def test_features_are_read_off_the_tokens_of_their_places():
    """Tokens that hold the features, whatever the channels' scales, leave no error; those of another place do."""
    torch.manual_seed(0)
    features = torch.randn(8, 3, 4, 4) * torch.tensor([1.0, 1e-3, 1e3]).view(-1, 1, 1) + 5.0
    standard = (features - features.mean((0, 2, 3), keepdim=True)) / features.std((0, 2, 3), keepdim=True)
    tokens, read = torch.zeros(8, 16, 6), torch.nn.Linear(6, 3)
    tokens[..., :3] = standard.flatten(2).transpose(1, 2)
    with torch.no_grad():
        read.weight.copy_(torch.eye(3, 6))
        read.bias.zero_()
    error = feature_error(read, tokens, features)
    assert error.shape == (8, 1, 4, 4) and error.max() < 1e-3  # features of 1e-3 around 5 have few digits
    assert feature_error(read, tokens.roll(1, 1), features).mean() > 1.0


@pytest.mark.parametrize("compiled", [False, True])
def test_every_call_of_a_watched_module_is_seen_once(compiled):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x)

    model = Model()
    layer = model.layer
    if compiled:
        model.compile(backend="eager")
    for value in (1.0, 2.0):  # each with a list of its own
        with watched(layer) as (seen,):
            model(torch.full((1, 2), value))
        torch.testing.assert_close(seen, [layer(torch.full((1, 2), value))])
    model(torch.ones(1, 2))
    assert len(seen) == 1 and not layer._forward_hooks


def test_features_of_a_unet_student_are_refused_before_long_work(tmp_path):
    options = ["--student", "sdxl", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "base")]
    with pytest.raises(SystemExit, match=r"feature_weight=0\.1: sdxl is a UNet"):
        main(["distill", *options, "denoiser.feature_weight=0.1"])
    assert not list((tmp_path / "work").iterdir())


def test_features_of_a_teacher_reach_the_blocks_up_to_the_one_that_is_read(sd, scenes):
    """Blocks after it and what the teacher has get no gradient, and no hook is left."""
    torch.manual_seed(0)
    teacher = pipelines.wrap(sd.assemble(sd.build_vae(), sd.build_text_encoder(), sd.build_denoiser()))
    student = STUDENTS["sd3"](teacher.pipe)
    base = SD(["denoiser.batch=4", "denoiser.feature_weight=0.5", "denoiser.guidance=2"], recipe="sd3")
    pool = Pool(scenes, torch.randn(40, 4, 16, 16))
    read = torch.nn.Linear(student.family.denoiser.inner_dim, teacher.denoiser.config.block_out_channels[1])
    terms = distillation(base, teacher, student, (pool, pool), read)(0)
    assert 0.25 < terms["features"] < 2.0  # half of a variance and a random map's
    terms["features"].backward()
    blocks = student.family.denoiser.transformer_blocks
    learning = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in blocks]
    assert learning == [block in list(blocks)[: list(blocks).index(student.block) + 1] for block in blocks]
    assert read.weight.grad.any() and all(p.grad is None for p in teacher.denoiser.parameters())
    assert not any(module._forward_hooks for part in (teacher.denoiser, blocks) for module in part.modules())


@pytest.mark.parametrize("name", list(STUDENTS))
def test_every_student_learns_and_becomes_a_pipeline(sd, name):
    """Gradients reach all that is trained and nothing else, and the base predicts as it did while it was trained."""
    torch.manual_seed(0)
    teacher = pipelines.wrap(sd.assemble(sd.build_vae(), sd.build_text_encoder(), sd.build_denoiser())).pipe
    student = STUDENTS[name](teacher)
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([300, 800])
    texts = ["a red circle", "two blue squares"]
    prediction = student.predict(noisy, timesteps, texts, np.random.default_rng(0))
    prediction.square().sum().backward()
    assert sum(p.grad.abs().sum() > 0 for p in student.trained.parameters() if p.grad is not None) > 50
    for part in student.trained.values():
        assert any(p.grad is not None for p in part.parameters())  # zero in what is read by zero weights
    assert all(p.grad is None for p in [*teacher.unet.parameters(), *teacher.text_encoder.parameters()])
    average = copy.deepcopy(student.trained)
    family = pipelines.wrap(student.assemble(average))
    assert family.denoiser is average[family.denoiser_name] is not student.family.denoiser
    family = pipelines.wrap(student.assemble(student.trained))
    assert family.process.prediction_type == student.process.prediction_type
    again = family.predict(noisy, timesteps, family.encode_prompts(texts))
    torch.testing.assert_close(again, prediction.detach(), rtol=1e-4, atol=1e-4)
    further = STUDENTS[name](teacher)  # its own random weights give way to those of the base it starts from
    further.start_from(student.assemble(average))
    torch.testing.assert_close(further.predict(noisy, timesteps, texts, np.random.default_rng(0)), prediction)
