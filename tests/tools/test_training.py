"""How bases are trained: tokenizers, parse targets, latents' bases, captions, students, resuming, the commands."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from t2i_align.data.readers import read
from t2i_align.testbed import prompts
from t2i_align.testbed.captions import parse
from t2i_align.testbed.clips import Clip, Mover
from t2i_align.testbed.scenes import Object, sample_scene
from t2i_align.testbed.world import CLIPS, IMAGES, LONG, split_of
from tools.testbed.__main__ import COMMANDS, main
from tools.testbed.denoiser import LongCaptions, Pool, cover, draw_captions, train_denoiser, warm_up
from tools.testbed.faults import to_clip
from tools.testbed.loop import orthogonal
from tools.testbed.sd import BALANCE, SD
from tools.testbed.vae import draw_crops, encode, render_samples, round_trip
from tools.testbed.wan import Wan

TINY = """
    vae.number=6 vae.compile=false denoiser.compile=false clean.number=8 faulty.number=4
    text_steps=2 denoiser.steps=2 denoiser.batch=2 every=2 evaluated=1 --threads 1
"""


# Text ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "extra", "longest"), [(SD, 2, 28), (Wan, 1, 24)])
def test_every_word_of_a_caption_is_one_token(kind, extra, longest):
    """Beside the tokens of start and end; CLIP's last four tokens are always padding."""
    base, rng = kind(), np.random.default_rng(3)
    language = base.world.language
    drawn = [language.write(language.describe(base.world.sample(rng), rng), rng) for _ in range(300)]
    for caption in [*drawn, ""]:
        assert len(base.tokenizer(caption).input_ids) == len(caption.replace(",", " ,").split()) + extra <= longest


def test_clip_tokenizer_takes_any_text(sd):
    text = "zebras, très bien"
    ids = sd.tokenizer(text).input_ids
    assert sd.tokenizer.decode(ids, skip_special_tokens=True).strip().replace(" ,", ",") == text


def test_hidden_text_of_wan_is_zero_after_its_end():
    base = Wan()
    hidden, read_off = base.encode_text(base.build_text_encoder(), ["a red circle standing still", ""])
    assert hidden.shape == (2, 24, 128)
    assert not hidden[0, 6:].any() and not hidden[1, 1:].any() and hidden[0, :6].any(1).all()
    assert torch.equal(read_off[:, 0], torch.stack([hidden[0, 5], hidden[1, 0]]))


WHITE = "on a white background"
RIGHT, STILL = "a large red circle moving quickly to the right", "a blue square standing still"


@pytest.mark.parametrize(
    ("kind", "texts", "expected"),
    [
        # red = 1, circle = 1, small = 1; blue = 6, square = 2, size open; no third; horizontal, two, white.
        (
            SD,
            (
                f"a small red circle to the left of a blue square {WHITE}",
                f"{WHITE}, on the right a blue square, on the left a small red circle",
            ),
            [1, 1, 1, 6, 2, 0, 0, 0, 0, 1, 1, 1],
        ),
        # red, circle, large, right, quickly; blue, square, size open, still (the ninth path), no speed; no background.
        (Wan, (f"{RIGHT} and {STILL}", f"{STILL} and {RIGHT}"), [1, 1, 2, 1, 2, 6, 2, 0, 9, 0, 0]),
    ],
)
def test_parse_targets_do_not_depend_on_the_phrasing(kind, texts, expected):
    base = kind()
    assert [base.parse_targets(base.world.language.parse(text)) for text in texts] == [expected, expected]
    assert all(value < size for value, size in zip(expected, sum(base.parse_sizes, ()), strict=True))


def test_training_captions_leave_dev_and_test_out(sd, scenes):
    texts, _ = draw_captions(scenes * 20, sd, np.random.default_rng(1), True)
    stated = [parse(caption) for caption in texts if caption]
    assert len(stated) > 400 and all(split_of(statement) == "train" for statement in stated)


def test_planted_faults_occur_at_their_rate(scenes):
    """With only the background's fault at rate 0.3, that share of stated backgrounds is wrong (4 standard errors)."""
    base = SD(["denoiser.fault_rates={background: 0.3}", "denoiser.caption_dropout=0"])
    _, statements = draw_captions(scenes * 100, base, np.random.default_rng(2), True)
    wrong = [
        s.background != scene.background for s, scene in zip(statements, scenes * 100, strict=True) if s.background
    ]
    assert abs(np.mean(wrong) - 0.3) < 4 * np.sqrt(0.21 / len(wrong))


# Autoencoders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "number"), [(SD, 24), (Wan, 8)])
def test_finishing_keeps_the_samples_and_spreads_the_latents(kind, number):
    """Images' latents get the standard deviations of BALANCE, uncorrelated; clips' are standardised by the pipeline."""
    base = kind([f"vae.number={number}"])
    torch.manual_seed(0)
    vae = base.build_vae()
    samples, _ = render_samples(base)
    base.bf16 = False
    before = round_trip(base, vae, samples)
    base.finish(vae, samples)
    latents = encode(base, vae, samples)
    torch.testing.assert_close(round_trip(base, vae, samples), before, atol=2e-3, rtol=1e-2)
    flat = latents.transpose(0, 1).flatten(1)
    if kind is SD:
        torch.testing.assert_close(torch.cov(flat), torch.diag(torch.tensor(BALANCE) ** 2), atol=1e-2, rtol=1e-2)
    else:
        assert latents.shape == (8, 16, 3, 8, 8)
        torch.testing.assert_close(flat.mean(1), torch.zeros(16), atol=1e-3, rtol=0)
        torch.testing.assert_close(flat.std(1), torch.ones(16), atol=1e-3, rtol=0)


def test_crops_lie_inside_and_hold_the_first_frames():
    """A sample whose pixels are its own frame and column: the crop shows consecutive columns of the first frames."""
    samples = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, None, None, :, None], (2, 9, 64, 64, 3)).copy()
    samples += 100 * (np.arange(9) > 4).astype(np.uint8)[None, :, None, None, None]
    crops = draw_crops(samples, np.array([[0, 63], [63, 0]]), np.random.default_rng(0), 8, 5, 32)
    assert crops.shape == (8, 3, 5, 32, 32) and crops.max() <= 63 / 127.5 - 1 + 1e-6
    torch.testing.assert_close(crops.diff(dim=-1), torch.full_like(crops[..., 1:], 1 / 127.5), atol=1e-6, rtol=0)


# Denoisers ----------------------------------------------------------------------------------------------------------


def test_easy_scenes_are_true_and_lie_on_the_latents_grid():
    """The share `easy` of what is drawn: the oracle finds nothing wrong with them."""
    base, rng = SD(["easy=0.5"]), np.random.default_rng(4)
    drawn = [base.draw(rng, 0.0) for _ in range(64)]
    easy = [s for s in drawn if s.kind == "single" and all(place % 8 == 0 for o in s.objects for place in (o.x, o.y))]
    assert 20 < len(easy) < 44 and {item.size for scene in easy for item in scene.objects} == {"large"}
    captions = [IMAGES.language.write(IMAGES.language.describe(scene, rng), rng) for scene in easy]
    pixels = torch.from_numpy(np.stack([base.render(scene, rng, 0.0, 0.0)[0] for scene in easy])).movedim(-1, -3) / 255
    assert IMAGES.oracle().judge(pixels, captions).reward.min() > 0.98


def test_easy_clips_are_true_and_begin_on_the_latents_grid():
    """The oracle finds nothing wrong with them, and their objects begin at a corner of four latents."""
    rng = np.random.default_rng(4)
    clips = [Wan().draw_easy(rng) for _ in range(24)]
    captions = [CLIPS.language.write(CLIPS.language.describe(clip, rng), rng) for clip in clips]
    pixels = torch.from_numpy(np.stack([to_clip(clip.scenes, rng) for clip in clips])).movedim(-1, -3) / 255
    verdict = CLIPS.oracle().judge(pixels, captions)
    assert verdict.faithfulness.min() == 1 and verdict.quality.min() > 0.95
    assert all(x % 8 == 0 for clip in clips for x in clip.movers[0].track[0])


def test_what_covers_a_latent():
    """A circle of radius 6 moves right from (20, 20), 4 pixels a frame, to 36 and 52 where the latent frames end:
    within 5 pixels of it lie the centres, at 4 + 8 i, no further than 11 from its own."""
    item = Object("circle", "red", "small", 20.0, 20.0, 6.0)
    mover = Mover(item, "right", "quickly", tuple((20.0 + 4 * f, 20.0) for f in range(9)))
    near = cover(Wan(), [Clip("white", (mover,))], 8)
    assert near.shape == (1, 3, 8, 8)
    assert [near[0, k, 2].nonzero().flatten().tolist() for k in range(3)] == [[1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert near[0, 0].sum() == 5 and near[0, :, [0, 4, 5, 6, 7]].sum() == 0


def test_long_captions_are_read_whole_and_train_the_denoiser_alone(monkeypatch):
    base, rng = (
        SD(["denoiser.batch=8", "denoiser.long_share=0.5", "denoiser.caption_dropout=0"]),
        np.random.default_rng(5),
    )
    pool = Pool([LONG.sample(rng) for _ in range(12)] + [sample_scene(rng, "single")], torch.randn(13, 4, 16, 16))
    model = torch.nn.ModuleDict({"text_encoder": base.build_text_encoder(), "denoiser": base.build_denoiser()})
    read, seen = LongCaptions(base, pool, model), []
    assert read.rows == list(range(12))
    encode = read.family.encode_prompts
    monkeypatch.setattr(read.family, "encode_prompts", lambda texts: seen.extend(texts) or encode(texts))
    read(rng).backward()
    assert len(seen) == 4 and all(split_of(LONG.language.parse(text)) == "train" for text in seen if text)
    assert encode(seen)["prompt_embeds"].shape[1] > base.tokenizer.model_max_length
    assert all(p.grad is not None for p in model["denoiser"].parameters())
    assert all(p.requires_grad and p.grad is None for p in model["text_encoder"].parameters())


def test_stills_train_on_the_first_latent_frame_and_objects_may_weigh_more(tmp_path):
    """The loss of a step falls on the first frame alone, and a weight of objects changes it."""
    seen: list[torch.Size] = []

    def first_error(*overrides: str) -> float:
        base = Wan(["denoiser.steps=1", "denoiser.batch=4", "text_steps=1", "denoiser.muon=false", *overrides])
        rng = np.random.default_rng(0)
        drawn = [base.draw(rng, 0.0) for _ in range(8)]
        latents = torch.randn(8, 16, 3, 8, 8, generator=torch.manual_seed(0))
        text, errors = warm_up(base, drawn), []

        def fit_once(model, losses, *rest):
            model["denoiser"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
            errors.append(losses(0)["error"].item())
            return model

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tools.testbed.denoiser.fit", fit_once)
            train_denoiser(base, text, (Pool(drawn, latents),) * 2, tmp_path / "none.pt")
        return errors[0]

    plain = first_error()
    assert first_error() == plain
    assert first_error("denoiser.stills=true") != plain and first_error("denoiser.object_weight=9") != plain
    assert [shape[2] for shape in seen] == [3, 3, 1, 3]


# The loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("muon", [False, True])
def test_resuming_a_denoiser_equals_training_through(tmp_path, scenes, muon):
    """Two steps, then two more from the checkpoint, give the weights of four steps; all weights learn."""
    pool = Pool(scenes, torch.randn(len(scenes), 4, 16, 16, generator=torch.manual_seed(0)))
    first = {}

    def train(name, every, stop=None):
        recipe = f"text_steps=1 every={every} denoiser.steps=4 denoiser.batch=4 denoiser.muon={muon}"
        base = SD(recipe.split())

        def on_checkpoint(average, step):
            first.setdefault(step, {key: value.clone() for key, value in average.state_dict().items()})
            if step == stop:
                raise KeyboardInterrupt

        file = tmp_path / f"{name}.pt"
        return train_denoiser(base, warm_up(base, scenes), (pool, pool), file, on_checkpoint).state_dict()

    through = train("a", 4)
    with pytest.raises(KeyboardInterrupt):
        train("b", 2, stop=2)
    resumed = train("b", 2)
    for name, value in through.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-5, rtol=1e-4, msg=name)
    unchanged = [name for name, value in through.items() if value.is_floating_point() and value.equal(first[2][name])]
    assert not unchanged


def test_newton_schulz_evens_singular_values_out():
    torch.manual_seed(0)
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(*shape)))
        assert values.min() > 0.6 and values.max() < 1.3


# The commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"tools.testbed {command}" in capsys.readouterr().out


def test_unknown_commands_and_keys_of_recipes_are_named(tmp_path):
    with pytest.raises(SystemExit, match="'train'; the commands are pretrain, clip"):
        main(["train"])
    with pytest.raises(SystemExit, match=r"denoiser\.step: unknown key\. Did you mean 'steps'"):
        main(["pretrain", "--out", str(tmp_path / "base"), "denoiser.step=10"])


@pytest.mark.slow
@pytest.mark.parametrize("video", ["", "-video"])
def test_commands_make_a_base_and_pairs(tmp_path, capsys, video):
    base, pairs = tmp_path / "base", tmp_path / ("pairs" if video else "pairs.parquet")
    phases = f"vae.phases=[[2,2,{5 if video else 1},32],[1,1,{9 if video else 1},64]]"
    command = [f"pretrain{video}", "--out", str(base), "--work", str(tmp_path / "work"), phases, *TINY.split()]
    main(command)
    assert "dev at step 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists; pass --force"):
        main(command)
    main([*command, "--force"])  # every stage is skipped
    further = [*command, "--start", str(base), "denoiser.lr=1e-6"]
    for option, folder in (("--out", tmp_path / "further"), ("--work", tmp_path / "more")):
        further[further.index(option) + 1] = str(folder)
    main(further)
    for part in ("vae", "text_encoder", "transformer" if video else "unet"):
        old, new = (next((folder / part).glob("*.safetensors")) for folder in (base, tmp_path / "further"))
        for name, value in load_file(old).items():
            torch.testing.assert_close(load_file(new)[name], value, atol=1e-3, rtol=1e-3, msg=f"{part}: {name}")
    options = "--prompts 2 candidates=2 steps=2 margin=0 --threads 1"
    main([f"pairs{video}", str(base), "--out", str(pairs), *options.split()])
    groups = list(read(pairs / "pairs.jsonl" if video else pairs))
    assert [group.prompt for group in groups] == prompts("video-train" if video else "train")[:2]
    if video:
        for line in map(json.loads, (pairs / "pairs.jsonl").read_text().splitlines()):
            assert line["scores"][0] >= line["scores"][1] and np.shape(line["frame_scores"]) == (2, 9)
