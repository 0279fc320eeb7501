"""The parts that bases are trained with: tokenizer, parse targets, balanced latents, resuming."""

import numpy as np
import pytest
import torch

from t2i_align.testbed.captions import describe, parse, write
from t2i_align.testbed.denoiser import (
    Denoiser,
    DenoiserConfig,
    build_scheduler,
    build_unet,
    draw_captions,
    train_denoiser,
)
from t2i_align.testbed.pools import Pool
from t2i_align.testbed.prompts import prompts, split_of
from t2i_align.testbed.scenes import sample_scene
from t2i_align.testbed.text import ParseHeads, WordEncoder, build_text_encoder, build_tokenizer
from t2i_align.testbed.vae import BALANCE, balance_latents, build_vae, encode, render_pool


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


def test_balancing_keeps_the_pictures_and_spreads_the_latents():
    torch.manual_seed(0)
    vae = build_vae()
    pictures, _ = render_pool(24, 0.0, 0)
    with torch.no_grad():
        before = vae.decode(encode(vae, pictures)).sample
        balance_latents(vae, pictures)
        latents = encode(vae, pictures)
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-3, rtol=1e-3)
    covariance = torch.cov(latents.permute(1, 0, 2, 3).reshape(4, -1))
    torch.testing.assert_close(covariance, torch.diag(torch.tensor(BALANCE) ** 2), atol=1e-2, rtol=1e-2)


def test_training_captions_leave_dev_and_test_out(scenes):
    pool = Pool(scenes, torch.zeros(len(scenes), 4, 16, 16))
    captions, _ = draw_captions(pool, np.arange(40).repeat(20), np.random.default_rng(1), DenoiserConfig(), faulty=True)
    stated = [parse(caption) for caption in captions if caption]
    assert len(stated) > 400 and all(split_of(statement) == "train" for statement in stated)


def test_planted_faults_occur_at_their_rate(scenes):
    """With only the background's fault at rate 0.3, that share of stated backgrounds is wrong (4 standard errors)."""
    config = DenoiserConfig(fault_rates={"background": 0.3}, caption_dropout=0.0)
    pool = Pool(scenes, torch.zeros(len(scenes), 4, 16, 16))
    index = np.arange(40).repeat(100)
    _, statements = draw_captions(pool, index, np.random.default_rng(2), config, faulty=True)
    wrong = [s.background != scenes[i].background for s, i in zip(statements, index, strict=True) if s.background]
    assert abs(np.mean(wrong) - 0.3) < 4 * np.sqrt(0.21 / len(wrong))


def test_the_v_base_ends_in_pure_noise():
    assert build_scheduler("v_prediction").alphas_cumprod[-1] == 0
    assert build_scheduler("epsilon").alphas_cumprod[-1] > 0


def test_resuming_equals_training_through(tmp_path, tokenizer, scenes):
    """Two steps, then two more from the checkpoint, give the weights of four steps."""
    pool = Pool(scenes, torch.randn(len(scenes), 4, 16, 16, generator=torch.manual_seed(0)))
    config = DenoiserConfig(steps=4, batch=4)

    def train(folder, every, stop=None):
        torch.manual_seed(1)
        model = Denoiser(build_unet(), build_text_encoder(tokenizer), ParseHeads())

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
