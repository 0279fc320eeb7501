"""Pairs of clips for preferences, from real clips: StructuralDPO's (arXiv 2506.03517, section 3.1), or vanilla ones.

    x_n = alpha x + sigma eps,    denoised from there twice, with eps of two seeds and the same level n

Both clips share the real one's layout and motion, and differ in their details, so that a preference is not one for less
motion. A vanilla pair is two samples of the caption from pure noise.

    <out>/pairs.jsonl                the pairs, without a preference yet, with what each is made from
          pairs.jsonl.settings.json  the model's weights, the sampler, and the source
          pairs.jsonl.skipped.jsonl  clips that cannot be used, and why
          clips/NAME/0.mp4, 1.mp4

What is listed is not made again, so it continues after a kill.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from t2i_align.data.batch import Conditioning
from t2i_align.data.media import ImageError, MediaSize, load, save_clip
from t2i_align.data.schema import Group, Media
from t2i_align.diffusion.noising import repeated
from t2i_align.diffusion.randomness import SampleRNG, stable_seed
from t2i_align.diffusion.sampling import Sampler, without_gradient
from t2i_align.errors import UserError
from t2i_align.inference.models import load_pipeline, resolve_base
from t2i_align.inference.options import check_options, memory_for, use_precision
from t2i_align.labeling.annotate import Job
from t2i_align.labeling.groups import Batch, Summary
from t2i_align.utils.resumable import Row
from t2i_align.utils.tensors import tensors_hash
from t2i_align.utils.whole import is_whole

if TYPE_CHECKING:
    from pipelines import ForwardProcess, TrainablePipeline

PAIRS, CLIPS = "pairs.jsonl", "clips"


def pairs(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path,
    independent: bool = False,
    least_level: float = 0.65,
    most_level: float = 0.8,
    steps: int = 40,
    guidance: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    lossless: bool = False,
    format: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    precision: str = "fp32",
    seed: int = 0,
    device: str | None = None,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Make two clips of each real clip, for preferences between them.

    Args:
        source: Folder of clips with captions (`fox.mp4` beside `fox.txt`), or any preference data, of which the best
            clip of each group is taken.
        out: Folder for the clips and `pairs.jsonl`.
        model: Video model: diffusers folder, Hub id or `testbed:wan`.
        independent: Vanilla pairs: two samples of each caption from pure noise.
        least_level, most_level: Range of the noise that real clips get, drawn for each pair: the noise's share sigma /
            (alpha + sigma), which is sigma for flow models. Of the sampler's own steps the nearest is taken.
        steps: Steps of the sampler from pure noise on, of which a pair takes those below its level.
        fps: Frame rate at which real clips are read and clips are written (default: the model's).
        lossless: Write files that keep every byte, which browsers do not show.
        format: Format of the source.
        revision: Branch, tag or commit of the model on the Hub.
        precision: Of the weights: `fp32`, `tf32`, `bf16` or `fp16`.
        seed: Seed of levels and noise.
        force: Replace what this command wrote to `out` before.

    Others as in `t2i_align.inference.generate.generate`.

    Raises:
        UserError: an argument that cannot be used, a model without clips, a source without a clip that can be used, or
            listed clips that are no longer whole.
    """
    check_options(precision, fps, steps=steps, height=height, width=width, frames=frames)
    if not 0 < least_level <= most_level < 1:
        found = f"{least_level!r} and {most_level!r}"
        raise UserError(f"least_level and most_level must lie in (0, 1), the first not above the second; found {found}")
    job = Job(source, Path(out).expanduser() / PAIRS, format, batch_size=1, force=force)
    folder = job.table.out.parent
    for row in () if force else job.table.rows():
        for name in row.get("videos", ()):
            if not is_whole(folder / name):
                raise UserError(f"{folder / name}: is listed in {PAIRS}, and missing or cut; --force makes all anew")
    pipeline = load_pipeline(resolve_base(model, revision=revision, variant=variant), precision, device)
    if not pipeline.video:
        raise UserError(f"{model}: this model makes images; pairs of clips are made here")
    steps, guidance, _ = pipeline.sampling(steps, guidance)
    default_height, default_width = pipeline.default_size
    size = MediaSize(height or default_height, width or default_width, frames or pipeline.default_frames, fps)
    pipeline.check_size(size.height, size.width, size.frames)
    maker = Maker(pipeline, size, steps, guidance, negative_prompt, seed, (least_level, most_level), precision)
    networks = dict.fromkeys(pipeline.denoiser_at(time) for time in (1000.0, 0.0))  # one, or two experts
    make = maker.independent if independent else maker.structural
    settings = {
        "kind": "independent" if independent else "structural", "model": str(model), "revision": revision,
        "sha256": [tensors_hash(network.state_dict()) for network in networks], "steps": steps, "guidance": guidance,
        "negative_prompt": negative_prompt, **size._asdict(), "lossless": lossless, "precision": precision,
        "seed": seed, **({} if independent else {"levels": [least_level, most_level]}),
    }  # fmt: skip

    def annotate(batch: Batch) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for group in batch.left:
            try:
                with memory_for(1):
                    clips, facts = make(group)
            except ImageError as error:
                batch.reasons[group.id] = str(error)
                continue
            names = [f"{CLIPS}/{_file_name(group.id)}/{place}.mp4" for place in range(len(clips))]
            for clip, name in zip(clips, names, strict=True):
                save_clip(clip, folder / name, fps or pipeline.fps, lossless=lossless)
            rows[group.id] = {
                "prompt": group.prompt, "videos": names, "scores": [0.5] * len(names), "source": group.origin, **facts,
            }  # fmt: skip
        return rows

    return job.run(annotate, settings, progress=progress)


@dataclass
class Maker:
    """Makes the two clips of a real one; what is drawn depends on the seed and the group's id alone.

    Raises:
        UserError: no step of the sampler has a level in the range.
    """

    pipeline: TrainablePipeline
    size: MediaSize
    steps: int
    guidance: float
    negative_prompt: str
    seed: int
    levels: tuple[float, float]
    precision: str = "fp32"

    def __post_init__(self) -> None:
        self.process = whole_process(self.pipeline, self.size)
        alpha, sigma = self.process.alpha_sigma(self.process.sampling_times(self.steps))
        self.noise_levels = sigma / (alpha + sigma)
        least, most = self.levels
        if not ((least <= self.noise_levels) & (self.noise_levels <= most)).any():
            near = ", ".join(f"{level:.2f}" for level in self.noise_levels.tolist())
            raise UserError(
                f"no step of a sampler of {self.steps} steps has a level in [{least:g}, {most:g}]; take more steps, or "
                f"a range around one of {near}"
            )
        self.empty = self.pipeline.encode_prompts([self.negative_prompt])

    @torch.no_grad()
    def structural(self, group: Group) -> tuple[list[Tensor], Row]:
        """The real clip noised and denoised twice, each [F, 3, H, W], and the level.

        Raises:
            ImageError: a clip that cannot be used.
        """
        latents = self.pipeline.encode_pixels(self._real(group.candidates[0]).unsqueeze(0)).float()
        rng = SampleRNG(self.seed, [group.id], self.process, device=latents.device)
        start = self.start(float(rng.on_cpu.uniform("level")))
        time = self.process.sampling_times(self.steps)[start : start + 1].to(latents.device)
        conditioning, empty = repeated(self.pipeline.encode_prompts([group.prompt]), self.empty, 1)
        sampler = Sampler(process=self.process, steps=self.steps, guidance=self.guidance)
        dtype = use_precision(self.precision)
        clips = []
        for side in range(2):
            noise = rng.normal(f"noise {side}", latents.shape[1:])
            noisy = self.process.add_noise(latents, noise, time)
            schedule = without_gradient(self.steps, noisy)
            with torch.autocast(latents.device.type, dtype, enabled=dtype is not None):
                clean = sampler.sample(self._predict, noisy, conditioning, empty, schedule, rng, start)
                clips.append(self.pipeline.decode_latents(clean)[0].float().cpu())
        if not all(clip.isfinite().all() for clip in clips):
            raise ImageError("what the model makes of it is not finite")
        return clips, {"level": round(float(self.noise_levels[start]), 6), "start": start}

    def independent(self, group: Group) -> tuple[list[Tensor], Row]:
        """Two samples of the caption from pure noise, each [F, 3, H, W], and their seeds."""
        seeds = [stable_seed(self.seed, group.id, side) % 2**32 for side in range(2)]
        clips = self.pipeline.generate(
            [group.prompt] * 2, seeds, steps=self.steps, guidance=self.guidance, negative_prompt=self.negative_prompt,
            height=self.size.height, width=self.size.width, frames=self.size.frames,
        )  # fmt: skip
        return list(clips), {"seeds": seeds}

    def start(self, u: float) -> int:
        """The step whose level is nearest to the one at the share `u` of the range; of those in the range."""
        least, most = self.levels
        inside = (least <= self.noise_levels) & (self.noise_levels <= most)
        distance = (self.noise_levels - (least + u * (most - least))).abs()
        return int(distance.masked_fill(~inside, torch.inf).argmin())

    def _predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        network = self.pipeline.denoiser_at(float(timesteps[0]))
        return self.pipeline.predict(noisy, timesteps, conditioning, denoiser=network)

    def _real(self, media: Media) -> Tensor:
        folder = isinstance(media, Path) and media.is_dir()  # of frames, which have no rate: all are taken
        rate = None if folder else self.size.fps or self.pipeline.fps
        return load(media, self.size._replace(fps=rate)).pixels


def whole_process(pipeline: TrainablePipeline, size: MediaSize) -> ForwardProcess:
    """The forward process with the times of the family's own sampler, from pure noise to the clean clip.

    Its shift is the scheduler's, also where that depends on the resolution; and it is the whole way where the pipeline
    trains one of two denoisers, each for a part of it.
    """
    from pipelines import RectifiedFlow

    if isinstance(pipeline.process, RectifiedFlow):
        if pipeline.resolution_shift and pipeline.pipe.scheduler.config.get("use_dynamic_shifting"):
            pipeline.shift_timesteps("resolution", size.height, size.width, size.frames)
        return RectifiedFlow(pipeline.process.shift)
    return pipeline.process


def _file_name(group: str) -> str:
    """A folder's name for a group's id, which may hold anything."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', group)[-60:]}-{hashlib.sha256(group.encode()).hexdigest()[:8]}"
