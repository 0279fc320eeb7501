"""The parts that the video base is trained with, the commands on tiny settings, and the base that is shipped."""

import json

import numpy as np
import pytest
import torch

import pipelines
from t2i_align.data.readers import read
from t2i_align.testbed import base_path, prompts
from t2i_align.testbed.clip_captions import parse, words
from tools.testbed.__main__ import main
from tools.testbed.loop import LoopConfig, fit
from tools.testbed.muon import Muon, orthogonal
from tools.testbed.sampling import sample
from tools.testbed.text import build_word_tokenizer
from tools.testbed.video.text import ParseHeads, build_text_encoder, encode_text
from tools.testbed.video.vae import build_vae, decode, encode, finish, normalise, render_pool

TINY = "--vae-steps 3 --vae-clips 6 --clips 8 --text-steps 2 --steps 2 --batch 2 --every 2 --evaluated 1 --threads 1"


def test_the_newton_schulz_iteration_evens_singular_values_out():
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(*shape)))
        assert values.min() > 0.6 and values.max() < 1.3


def test_muon_learns_and_resumes(tmp_path):
    """Ten steps and ten more from the checkpoint give the weights of twenty; both kinds of parameters learn."""

    def train(folder, stop=None):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        first = [p.clone() for p in model.parameters()]

        def losses(step):
            x = torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            return {"error": (model(x) - x.flip(1)).square().mean()}

        def interrupt(_, step):
            if step == stop:
                raise KeyboardInterrupt

        folder.mkdir(exist_ok=True)
        config = LoopConfig(steps=20, lr=1e-2, every=10)
        fit(model, losses, config, folder / "state.pt", interrupt, Muon(model.parameters(), 1e-2))
        return first, list(model.parameters())

    first, through = train(tmp_path / "a")
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(first, through, strict=True))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", stop=10)
    for a, b in zip(through, train(tmp_path / "b")[1], strict=True):
        assert torch.equal(a, b)


def test_every_word_is_one_token_and_text_after_the_end_is_zero():
    tokenizer = build_word_tokenizer(words())
    captions = [*prompts("video-dev"), ""]
    for caption in captions:
        assert len(tokenizer(caption).input_ids) == len(caption.replace(",", " ,").split()) + 1 <= 24, caption
    torch.manual_seed(0)
    hidden, last = encode_text(build_text_encoder(tokenizer), tokenizer, ["a red circle standing still", ""])
    assert hidden.shape == (2, 24, 128)
    assert not hidden[0, 6:].any() and not hidden[1, 1:].any() and hidden[0, :6].any(1).all()
    assert torch.equal(last, torch.stack([hidden[0, 5], hidden[1, 0]]))


def test_parse_targets_do_not_depend_on_the_order():
    one = parse("a large red circle moving quickly to the right and a blue square standing still")
    two = parse("a blue square standing still and a large red circle moving quickly to the right")
    targets = ParseHeads.targets([one, two])
    # red, circle, large, right, quickly; blue, square, size open, still (the ninth path), no speed; no background.
    assert targets[0].tolist() == targets[1].tolist() == [1, 1, 2, 1, 2, 6, 2, 0, 9, 0, 0]


def test_finishing_keeps_the_clips_and_evens_the_latents_out():
    torch.manual_seed(0)
    vae = build_vae()
    clips, _ = render_pool(8, 1)
    before = decode(vae, encode(vae, clips))
    finish(vae, 0, 8)
    latents = encode(vae, clips)
    torch.testing.assert_close(decode(vae, latents), before, atol=2e-3, rtol=1e-2)
    flat = normalise(vae, latents).transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(16), atol=1e-3, rtol=0)
    assert latents.shape == (8, 16, 3, 8, 8)


@pytest.mark.slow
def test_the_commands_make_a_base_and_pairs(tmp_path, capsys):
    base, pairs = tmp_path / "tiny-wan", tmp_path / "pairs"
    main(["pretrain-video", "--out", str(base), "--work", str(tmp_path / "work"), *TINY.split()])
    assert "dev at step 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists"):
        main(["pretrain-video", "--out", str(base), "--work", str(tmp_path / "work"), *TINY.split()])
    options = "--prompts 2 --candidates 2 --steps 2 --margin 0 --threads 1"
    main(["pairs-video", str(base), "--out", str(pairs), *options.split()])
    lines = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["scores"][0] >= line["scores"][1] and np.shape(line["frame_scores"]) == (2, 9)
    groups = list(read(pairs / "pairs.jsonl"))
    assert [group.prompt for group in groups] == [line["prompt"] for line in lines]


def test_the_shipped_base_samples():
    pipeline = pipelines.load(base_path("wan"))
    assert (pipeline.family, pipeline.default_frames, pipeline.default_size) == ("wan", 9, (64, 64))
    clips = sample(pipeline.pipe, prompts("video-dev")[:2], [0, 1], steps=2)
    assert clips.shape == (2, 9, 3, 64, 64) and clips.isfinite().all()
