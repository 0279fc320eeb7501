"""Train a base's text encoder, then its denoiser with it, on cached latents of drawn images or clips."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

import pipelines
from t2i_align.conditioning import segments
from t2i_align.conditioning.config import SegmentsConfig
from t2i_align.testbed.scenes import SIDE
from t2i_align.testbed.world import LONG, split_of
from t2i_align.utils.files import atomic_file
from tools.testbed.base import Base, ClassHeads, DenoiserRecipe, PoolRecipe, Recipe
from tools.testbed.loop import LoopConfig, fit, quick
from tools.testbed.networks import WIDTH
from tools.testbed.vae import encode

NEAR = 5.0  # pixels from an object in which its outline and its blur lie


@dataclasses.dataclass(frozen=True)
class Pool:
    """Scenes or clips and their latents [N, ...] in half precision."""

    drawn: list[Any]
    latents: Tensor

    @functools.cached_property
    def large(self) -> np.ndarray:
        """Whether only large objects are in it, [N]."""
        return np.array([all(item.size == "large" for item in drawn.objects) for drawn in self.drawn])

    def draw(self, rng: np.random.Generator, count: int, large_weight: float) -> np.ndarray:
        """`count` random numbers of scenes; those of large objects only are `large_weight` times as likely."""
        weights = np.cumsum(np.where(self.large, large_weight, 1.0))
        return np.searchsorted(weights, rng.random(count) * weights[-1], side="right")


def make_pool(base: Base, config: PoolRecipe, vae: nn.Module, cache: Path) -> Pool:
    """Draw a pool, and encode it unless `cache` (a .pt file) holds its latents.

    Raises:
        ValueError: `cache` belongs to another configuration or autoencoder.
    """
    rng = np.random.default_rng((config.seed, 0))
    drawn = [base.draw(rng, config.faulty) for _ in range(config.number)]
    digest = hashlib.sha256(repr((config, base.recipe.easy)).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    if cache.exists():
        saved = torch.load(cache, weights_only=True)
        if saved["key"] != digest.hexdigest():
            raise ValueError(f"{cache} was made by another autoencoder or recipe; delete it to make it anew")
        return Pool(drawn, saved["latents"])
    rng, parts = np.random.default_rng((config.seed, 1)), []
    for start in range(0, len(drawn), 500):
        samples = [base.render(item, rng, config.faulty, config.degraded) for item in drawn[start : start + 500]]
        parts.append(encode(base, vae, np.stack(samples)).half())
        print(f"latents {start + len(samples)}/{len(drawn)}", flush=True)
    with atomic_file(cache) as temporary:
        torch.save({"key": digest.hexdigest(), "latents": torch.cat(parts)}, temporary)
    return Pool(drawn, torch.cat(parts))


def make_pools(base: Base, vae: nn.Module, work: Path) -> tuple[Pool, Pool]:
    """Clean and faulty images or clips, cached in `work`."""
    clean = make_pool(base, base.recipe.clean, vae, work / "latents_clean.pt")
    return clean, make_pool(base, base.recipe.faulty, vae, work / "latents_faulty.pt")


def draw_captions(
    drawn: Sequence[Any], base: Base, rng: np.random.Generator, faulty: bool, language: Any = None
) -> tuple[list[str], list[Any]]:
    """A caption for each scene or clip, "" where dropped, and its statement, with planted faults where `faulty`.

    Statements of dev and test prompts never occur. The language is the base's own unless given.
    """
    recipe, captions, statements = base.recipe.denoiser, [], []
    language = language or base.world.language
    for item in drawn:
        statement = language.describe(item, rng)
        if faulty:
            for fault, rate in recipe.fault_rates.items():
                if rng.random() < rate:
                    statement = base.corrupt(statement, fault, rng) or statement
        caption = language.write(statement, rng)
        statement = language.parse(caption)  # in the order of the text
        if rng.random() < recipe.caption_dropout or split_of(statement) != "train":
            caption = ""
        captions.append(caption)
        statements.append(statement)
    return captions, statements


def draw_batch(
    pools: tuple[Pool, Pool], base: Base, rng: np.random.Generator, faulty: bool
) -> tuple[Tensor, list[Any]]:
    """Latents [B, ...] and what was drawn, of clean and faulty images in their phase's shares."""
    recipe = base.recipe.denoiser
    number = round(recipe.faulty_images[int(faulty)] * recipe.batch)
    latents, drawn = [], []
    for pool, count in zip(pools, (recipe.batch - number, number), strict=True):
        index = pool.draw(rng, count, recipe.large_weight)
        latents.append(pool.latents[torch.from_numpy(index)].float())
        drawn += [pool.drawn[i] for i in index]
    return torch.cat(latents)[:, :, : 1 if recipe.stills else None], drawn


def cover(base: Base, drawn: Sequence[Any], side: int) -> Tensor:
    """Whether a latent, of `side` x `side` a frame, is within NEAR pixels of an object: float32 [B, F, side, side]."""
    centres = (np.arange(side) + 0.5) * SIDE / side
    frames = [base.latent_frames(item) for item in drawn]
    near = np.zeros((len(drawn), len(frames[0]), side, side), np.float32)
    for covered, scenes in zip(near.reshape(-1, side, side), [s for own in frames for s in own], strict=True):
        for item in (item for scene in scenes for item in scene.objects):
            apart = np.hypot(centres - item.x, centres[:, None] - item.y)
            covered[apart < item.radius + NEAR] = 1.0
    return torch.from_numpy(near)


def weighted_mean(base: Base, drawn: Sequence[Any], errors: Tensor, sigma: Tensor) -> Tensor:
    """The mean of squared errors [B, C, ...] of latents; those near objects weigh more the less noise [B] there is."""
    per_latent = errors.mean(1).flatten(1)
    weight = torch.ones_like(per_latent)
    if base.recipe.denoiser.object_weight:
        near = cover(base, drawn, errors.shape[-1]).flatten(1)[:, : weight.shape[1]]  # of stills, the first frame
        weight = weight + base.recipe.denoiser.object_weight * (1.0 - sigma.float().view(-1, 1)) * near
    return (weight * per_latent).sum() / weight.sum()


def draw_timesteps(rng: np.random.Generator, recipe: DenoiserRecipe) -> Tensor:
    """Timesteps [B] in 0..999: stratified uniform, logit-normal and noisiest ones, see `DenoiserRecipe`."""
    times = (rng.permutation(recipe.batch) + rng.random(recipe.batch)) / recipe.batch
    middle = rng.random(recipe.batch) < recipe.middle_share
    times[middle] = 1.0 / (1.0 + np.exp(-rng.normal(*recipe.middle, int(middle.sum()))))
    noisiest = rng.random(recipe.batch) < recipe.noisiest_share
    times[noisiest] = 1.0 - 0.05 * rng.random(int(noisiest.sum()))
    return torch.from_numpy((times * 1000).astype(np.int64)).clamp(max=999)


def warm_up(
    base: Base, drawn: Sequence[Any], state_file: Path | None = None, encoder: nn.Module | None = None
) -> nn.ModuleDict:
    """A text encoder that reads true captions of what is drawn, and its parse heads.

    The text encoders of real models know language from their own pretraining. This gives the tiny ones the same start:
    throw-away heads on a few tokens must tell what the caption states. Each step sees up to 128 captions; statements of
    dev and test prompts are left out. Where `encoder` is already trained, only the heads learn.
    """
    language, steps, seed = base.world.language, base.recipe.text_steps, base.recipe.seed
    torch.manual_seed(seed)
    trained = (encoder or base.build_text_encoder()).requires_grad_(encoder is None)
    model = nn.ModuleDict({"text_encoder": trained, "heads": ClassHeads(base.parse_sizes, WIDTH)})

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, 7, step))
        statements = [language.describe(drawn[i], rng) for i in rng.integers(len(drawn), size=128)]
        captions = [language.write(statement, rng) for statement in statements if split_of(statement) == "train"]
        targets = torch.tensor([base.parse_targets(language.parse(caption)) for caption in captions])
        read = base.encode_text(model["text_encoder"], captions)[1]
        return {"parse": cast(ClassHeads, model["heads"]).loss(read, targets)}

    fit(model, losses, LoopConfig(steps=steps, lr=2e-3, warmup=max(1, steps // 10), every=steps), state_file)
    return model


class LongCaptions:
    """The error on clean scenes with true long captions, encoded in segments (LongAlign, arXiv 2410.11817).

    The text encoder is not trained by it: each sentence is a caption of the short kind.
    """

    def __init__(self, base: Base, pool: Pool, model: nn.ModuleDict) -> None:
        self.base, self.pool = base, pool
        self.rows = [i for i, scene in enumerate(pool.drawn) if scene.kind in ("pair", "triple")]
        pipeline = base.assemble(base.build_vae(), model["text_encoder"], model["denoiser"])  # nothing is decoded
        self.family = pipelines.wrap(pipeline)
        segments.install(self.family, SegmentsConfig(tokens=base.tokenizer.model_max_length))
        model.requires_grad_(True)  # which belongs to training again

    def __call__(self, rng: np.random.Generator) -> Tensor:
        recipe, process = self.base.recipe.denoiser, self.base.process
        rows = rng.choice(self.rows, max(1, round(recipe.long_share * recipe.batch)))
        latents = self.pool.latents[torch.from_numpy(rows)].float()
        captions, _ = draw_captions([self.pool.drawn[row] for row in rows], self.base, rng, False, LONG.language)
        timesteps = draw_timesteps(rng, recipe)[: len(rows)]
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        noisy = process.add_noise(latents, noise, timesteps)
        with quick():
            prediction = self.family.predict(noisy, timesteps, self.family.encode_prompts(captions))
        return (prediction.float() - process.target(latents, noise, timesteps)).square().mean()


def loop_config(recipe: Recipe) -> LoopConfig:
    """The loop of a denoiser; its learning rate warms up over a tenth of the steps, 200 at most."""
    training = recipe.denoiser
    warmup = max(1, min(200, training.steps // 10))
    return LoopConfig(steps=training.steps, lr=training.lr, warmup=warmup, every=recipe.every, muon=training.muon)


def train_denoiser(
    base: Base,
    text: nn.ModuleDict,
    pools: tuple[Pool, Pool],
    state_file: Path,
    on_checkpoint: Callable[[nn.ModuleDict, int], None] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> nn.ModuleDict:
    """Train denoiser and text encoder and return their exponential average, continuing from `state_file`.

    Args:
        text: from `warm_up`.
        pools: clean and faulty images or clips.
        on_checkpoint: called with the average and the step after each checkpoint.
        weights: of a trained denoiser to start from.
    """
    recipe, seed = base.recipe.denoiser, base.recipe.seed
    torch.manual_seed(seed)
    model = nn.ModuleDict({**text, "denoiser": base.build_denoiser()}).requires_grad_(True)
    if weights is not None:
        model["denoiser"].load_state_dict(weights)
    if recipe.compile:
        model["denoiser"].compile()
    process, heads = base.process, cast(ClassHeads, model["heads"])
    read_long = LongCaptions(base, pools[0], model) if recipe.long_share else None

    def losses(step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, 11, step))
        faulty = step >= recipe.clean_fraction * recipe.steps
        latents, drawn = draw_batch(pools, base, rng, faulty)
        captions, statements = draw_captions(drawn, base, rng, faulty)
        timesteps = draw_timesteps(rng, recipe)
        if base.continuous:
            timesteps = timesteps + torch.from_numpy(rng.random(len(latents), np.float32))
        noise = torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        noisy = process.add_noise(latents, noise, timesteps)
        with quick():
            hidden, read = base.encode_text(model["text_encoder"], captions)
            prediction = model["denoiser"](noisy, timesteps, hidden, return_dict=False)[0]
        captioned = torch.tensor([bool(caption) for caption in captions])
        targets = torch.tensor([base.parse_targets(statement) for statement in statements])
        error = (prediction.float() - process.target(latents, noise, timesteps)).square()
        error = weighted_mean(base, drawn, error, process.alpha_sigma(timesteps)[1])
        terms = {"error": error, "parse": recipe.parse_weight * heads.loss(read[captioned], targets[captioned])}
        return terms | ({"long": recipe.long_share * read_long(rng)} if read_long else {})

    return fit(model, losses, loop_config(base.recipe), state_file, on_checkpoint)
