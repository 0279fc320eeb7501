"""The parts that bases are trained with: tokenizer, parse targets, balanced latents, resuming."""

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

import pipelines
from pipelines import RectifiedFlow, VariancePreserving
from t2i_align.testbed import captions as image_captions
from t2i_align.testbed.captions import describe, parse, write
from t2i_align.testbed.prompts import prompts, split_of
from t2i_align.testbed.scenes import sample_scene
from tools.testbed.denoiser import (
    Denoiser,
    DenoiserConfig,
    build_scheduler,
    build_unet,
    draw_captions,
    train_denoiser,
)
from tools.testbed.distill import Distillation, teacher_timesteps
from tools.testbed.pools import Pool
from tools.testbed.sampling import assemble
from tools.testbed.students import STUDENTS, Student
from tools.testbed.text import ParseHeads, WordEncoder, build_text_encoder, build_tokenizer
from tools.testbed.vae import BALANCE, balance_latents, build_vae, encode, render_pool


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(40)]


def test_the_table_equals_the_tokenizer(tokenizer):
    captions = [*prompts("dev")[:200], ""]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, WordEncoder(tokenizer)(captions))
    assert (ids[:, -4:] == tokenizer.pad_token_id).all()


def test_the_tokenizer_takes_any_text(tokenizer):
    text = "zebras, très bien"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip().replace(" ,", ",") == text


def test_parse_targets_do_not_depend_on_the_phrasing():
    left = parse("a small red circle to the left of a blue square on a white background")
    right = parse("on a white background, on the right a blue square, on the left a small red circle")
    targets = ParseHeads.targets([left, right])
    assert torch.equal(targets[0], targets[1])
    # red = 1, circle = 1, small = 1; blue = 6, square = 2, size open; no third; horizontal, two, white.
    assert targets[0].tolist() == [1, 1, 1, 6, 2, 0, 0, 0, 0, 1, 1, 1]


def test_balancing_keeps_the_images_and_spreads_the_latents():
    torch.manual_seed(0)
    vae = build_vae()
    images, _ = render_pool(24, 0.0, 0)
    with torch.no_grad():
        before = vae.decode(encode(vae, images)).sample
        balance_latents(vae, images)
        latents = encode(vae, images)
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    covariance = torch.cov(latents.permute(1, 0, 2, 3).reshape(4, -1))
    torch.testing.assert_close(covariance, torch.diag(torch.tensor(BALANCE) ** 2), atol=1e-2, rtol=1e-2)


def test_training_captions_leave_dev_and_test_out(scenes):
    pool = Pool(scenes, torch.zeros(len(scenes), 4, 16, 16))
    captions, _ = draw_captions(
        pool, np.arange(40).repeat(20), np.random.default_rng(1), DenoiserConfig(), True, image_captions
    )
    stated = [parse(caption) for caption in captions if caption]
    assert len(stated) > 400 and all(split_of(statement) == "train" for statement in stated)


def test_planted_faults_occur_at_their_rate(scenes):
    """With only the background's fault at rate 0.3, that share of stated backgrounds is wrong (4 standard errors)."""
    config = DenoiserConfig(fault_rates={"background": 0.3}, caption_dropout=0.0)
    pool = Pool(scenes, torch.zeros(len(scenes), 4, 16, 16))
    index = np.arange(40).repeat(100)
    _, statements = draw_captions(pool, index, np.random.default_rng(2), config, True, image_captions)
    wrong = [s.background != scenes[i].background for s, i in zip(statements, index, strict=True) if s.background]
    assert abs(np.mean(wrong) - 0.3) < 4 * np.sqrt(0.21 / len(wrong))


def test_the_v_base_ends_in_pure_noise():
    assert build_scheduler("v_prediction").alphas_cumprod[-1] == 0
    assert build_scheduler("epsilon").alphas_cumprod[-1] > 0


def test_teacher_and_student_meet_at_the_same_noise_level():
    """The v base's levels, interpolated at the fractional timesteps, are the epsilon base's; equal tables give t."""
    own, teacher = (build_scheduler(kind).alphas_cumprod.double() for kind in ("epsilon", "v_prediction"))
    timesteps = torch.tensor([0, 1, 250, 600, 998, 999])
    levels = teacher_timesteps(own[timesteps], teacher).double()
    below = levels.long().clamp(max=998)
    met = torch.lerp(teacher[below], teacher[below + 1], levels - below)
    torch.testing.assert_close(met, own[timesteps], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(teacher_timesteps(own[timesteps], own), timesteps.float())


class Oracle(Student):
    """Predicts what follows from a teacher that knows the truth."""

    def __init__(self, process, truth):
        self.kind, self.truth, self.asked = process, truth, None

    @property
    def process(self):
        return self.kind

    def build(self, teacher):
        raise NotImplementedError

    assemble = build

    def predict(self, noisy, timesteps, captions, rng):
        noise = (noisy - self._over(0, timesteps) * self.truth) / self._over(1, timesteps)
        return self.kind.target(self.truth.expand_as(noisy), noise, timesteps)

    def _over(self, which, timesteps):
        return self.kind.alpha_sigma(timesteps)[which].float().view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_student_that_knows_what_the_teacher_knows_has_no_error(tokenizer, scenes, kind):
    """A teacher that sees one image in everything, at its own noise level: v = alpha noise - sigma x. The student
    that knows the image predicts the same thing in its own words; one that knows another image does not."""
    truth = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    pool = Pool(scenes, truth.expand(len(scenes), -1, -1, -1))
    teacher_process = VariancePreserving(build_scheduler("v_prediction").alphas_cumprod, "v_prediction")
    abar = teacher_process.alphas_cumprod

    def teacher(noisy, levels, hidden):
        below = levels.long().clamp(max=998)
        alpha = torch.lerp(abar[below], abar[below + 1], levels.double() - below).sqrt().float().view(-1, 1, 1, 1)
        sigma = (1 - alpha.square()).sqrt()
        return (alpha * (noisy - alpha * truth) / sigma - sigma * truth,)

    processes = {
        "epsilon": VariancePreserving(build_scheduler("epsilon").alphas_cumprod, "epsilon"),
        "v_prediction": teacher_process,
        "flow": RectifiedFlow(),
    }
    text_encoder, pools = build_text_encoder(tokenizer, CLIPTextModel), (pool, pool)
    config, to_ids = DenoiserConfig(batch=16), WordEncoder(tokenizer)

    def loss(known):
        student = Oracle(processes[kind], known)
        return Distillation(teacher, text_encoder, teacher_process, student, to_ids, pools, config)(0)["error"].item()

    assert loss(truth) < 1e-4
    assert loss(-truth) > 0.1


@pytest.mark.parametrize("name", list(STUDENTS))
def test_every_student_learns_and_becomes_a_pipeline(tokenizer, scenes, name):
    """Gradients reach all that is trained and nothing else, and the base predicts as it did while it was trained."""
    teacher = assemble(
        build_vae(), build_text_encoder(tokenizer, CLIPTextModel), tokenizer, build_unet(), "v_prediction"
    )
    teacher.unet.requires_grad_(False), teacher.text_encoder.requires_grad_(False)
    torch.manual_seed(0)
    student = STUDENTS[name](teacher)
    noisy, timesteps = torch.randn(2, 4, 16, 16), torch.tensor([300, 800])
    captions = ["a red circle", "two blue squares"]
    prediction = student.predict(noisy, timesteps, captions, np.random.default_rng(0))
    prediction.square().sum().backward()
    assert sum(p.grad.abs().sum() > 0 for p in student.trained.parameters() if p.grad is not None) > 50
    assert all(p.grad is None for p in [*teacher.unet.parameters(), *teacher.text_encoder.parameters()])
    family = pipelines.wrap(student.assemble(student.trained))
    assert family.process.prediction_type == student.process.prediction_type
    again = family.predict(noisy, timesteps, family.encode_prompts(captions))
    torch.testing.assert_close(again, prediction.detach(), rtol=1e-4, atol=1e-4)


def test_resuming_equals_training_through(tmp_path, tokenizer, scenes):
    """Two steps, then two more from the checkpoint, give the weights of four steps."""
    pool = Pool(scenes, torch.randn(len(scenes), 4, 16, 16, generator=torch.manual_seed(0)))
    config = DenoiserConfig(steps=4, batch=4)

    def train(folder, every, stop=None):
        torch.manual_seed(1)
        model = Denoiser(build_unet(), build_text_encoder(tokenizer, CLIPTextModel), ParseHeads())

        def interrupt(_, step):
            if step == stop:
                raise KeyboardInterrupt

        folder.mkdir(exist_ok=True)
        options = {"every": every, "on_checkpoint": interrupt}
        return train_denoiser(folder, model, tokenizer, (pool, pool), config, **options)

    through = train(tmp_path / "a", 4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", 2, stop=2)
    resumed = train(tmp_path / "b", 2)
    for name, value in through.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_words_of_every_caption_are_known(tokenizer):
    encoder, rng = WordEncoder(tokenizer), np.random.default_rng(3)
    encoder([write(describe(sample_scene(rng), rng), rng) for _ in range(300)])
