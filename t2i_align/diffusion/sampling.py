"""Sampling that gradients pass, for reward fine-tuning: which steps carry them, and at what cost.

    x_T ~ N(0, 1),    x_s = step(guided prediction at x_t)    …    reward(decode(x̂0))

    longalign   gradients through every `every`-th step from a random offset, whose noisy input is detached: they reach
                the weights along the linear path of DDIM only (arXiv 2410.11817)
    refl        sampling stops at a random one of the last `last` steps, which alone has a gradient; x̂0 is predicted
                from there (ImageReward, arXiv 2304.05977)
    draft       back through the last `last` steps, from each into the one before (DRaFT-K, arXiv 2309.17400)
    draft_lv    only the last step, averaged over `last` new noisings of its x̂0 (DRaFT-LV, ibid.)
    alignprop   back through a random number of the last steps (arXiv 2310.03739)

Steps with a gradient are checkpointed, so that memory is bounded by one of them. Every sample has its own random
numbers, so a batch's gradient is the mean of its rows'. Sampling is deterministic (DDIM with eta = 0, Euler).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from t2i_align.data.batch import Conditioning, Model

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import ForwardProcess
    from t2i_align.diffusion.randomness import SampleRNG

ScheduleName = Literal["longalign", "refl", "draft", "draft_lv", "alignprop"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which steps carry gradients, for each sample; on the CPU, as it decides the course of a step.

    gradient: [steps, B], whether a step's prediction does. stop: [B], the step from whose prediction x̂0 is taken.
    through: whether gradients also pass a step's noisy input, into the steps before. noisings: how often the last step
    is repeated from new noise, 0 for from where sampling arrived.
    """

    gradient: Tensor
    stop: Tensor
    through: bool = False
    noisings: int = 0


def schedule(name: ScheduleName, steps: int, rng: SampleRNG, *, every: int = 10, last: int = 1) -> Schedule:
    """A named schedule for a batch (see the module).

    Args:
        every: distance of longalign's steps. last: how many steps from the end; of draft_lv, how many noisings.
    """
    choices = {"longalign": every, "refl": min(last, steps), "alignprop": steps}
    drawn = rng.choice("gradient steps", choices.get(name, 1))
    with rng.deciding():
        number, at = torch.tensor(drawn), torch.arange(steps)[:, None]
        end = torch.full_like(number, steps - 1)
        if name == "longalign":
            return Schedule(gradient=at % every == number, stop=end)
        if name == "refl":
            return Schedule(gradient=at == end - number, stop=end - number)
        if name == "draft_lv":
            return Schedule(gradient=at == end, stop=end, noisings=last)
        count = torch.full_like(end, last) if name == "draft" else 1 + number
        return Schedule(gradient=at >= steps - count, stop=end, through=True)


def without_gradient(steps: int, like: Tensor) -> Schedule:
    """All steps, none of them with a gradient, for a batch `like` [B, ...]."""
    zeros = torch.zeros(steps, len(like), dtype=torch.bool)
    return Schedule(gradient=zeros, stop=torch.full_like(zeros[0], steps - 1, dtype=torch.long))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Deterministic sampling of a denoiser with gradients where a schedule has them.

    guidance: of classifier-free guidance, 1 for none. unconditional_gradient: whether gradients also pass the empty
    prompt's prediction, with weight 1 - guidance, as in the authors' LongAlign: -6.5 at 7.5. equalise: scale each
    step's gradient so that along the linear path all weigh alike; the noisiest steps weigh most otherwise.
    """

    process: ForwardProcess
    steps: int
    guidance: float = 1.0
    unconditional_gradient: bool = True
    equalise: bool = False

    def sample(
        self, model: Model, noise: Tensor, conditioning: Conditioning, empty: Conditioning, schedule: Schedule,
        rng: SampleRNG, start: int = 0,
    ) -> Tensor:  # fmt: skip
        """Clean latents of noise [B, ...], or [B * noisings, ...] where the schedule repeats the last step.

        Args:
            noise: at the time of the step `start`: pure noise at the first.
            conditioning: the prompts', [B, ...]. empty: the empty prompt's, with sequences as long, [B, ...].
        """
        with rng.deciding():
            times, weights = rng.moved(self.process.sampling_times(self.steps)), self.step_weights()
        gradient, stop = schedule.gradient.tolist(), schedule.stop.tolist()
        x, clean, last = noise, torch.zeros_like(noise), max(stop)
        for i in range(start, last + 1):
            if i == last and schedule.noisings:
                break
            t = times[i].expand(len(x))
            x_in = x if schedule.through else x.detach()
            prediction = self._predict(model, x_in, t, conditioning, empty, gradient[i], weights[i], rng)
            if i in stop:
                arrived = rng.moved(torch.tensor([at == i for at in stop])).view(-1, *([1] * (x.ndim - 1)))
                clean = torch.where(arrived, self.process.to_clean(prediction, x, t), clean)
            if i < last:
                x = self.process.step(prediction, x, t, times[i + 1].expand(len(x)))
        if not schedule.noisings:
            return clean
        t = times[last].expand(len(x))
        with torch.no_grad():
            still = [False] * len(x)
            final = self.process.to_clean(self._predict(model, x, t, conditioning, empty, still, 1.0, rng), x, t)
        repeated = []
        for number in range(schedule.noisings):
            again = self.process.add_noise(final, rng.normal(f"noising {number}", final.shape[1:]).to(final), t)
            prediction = self._predict(model, again, t, conditioning, empty, gradient[last], 1.0, rng)
            repeated.append(self.process.to_clean(prediction, again, t))
        return torch.stack(repeated, 1).flatten(0, 1)

    def step_weights(self) -> list[float]:
        """What each step's gradient is multiplied with: 1, or the inverse of its share of the linear path's slope.

        Along that path x̂0 = sum over steps of c_i prediction_i + a term in x_T. Each step is linear, so its slopes are
        read off a step from x = 1 with prediction 0 and from x = 0 with prediction 1.
        """
        if not self.equalise:
            return [1.0] * self.steps
        times = self.process.sampling_times(self.steps)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        slopes, onwards = [0.0] * self.steps, 1.0
        for i in reversed(range(self.steps)):
            t = times[i : i + 1]
            if i == self.steps - 1:
                carried, predicted = self.process.to_clean(zero, one, t), self.process.to_clean(one, zero, t)
            else:
                s = times[i + 1 : i + 2]
                carried, predicted = self.process.step(zero, one, t, s), self.process.step(one, zero, t, s)
            slopes[i] = abs(float(predicted)) * onwards
            onwards *= abs(float(carried))
        mean = sum(slopes) / self.steps
        return [mean / slope for slope in slopes]

    def _predict(
        self, model: Model, x: Tensor, t: Tensor, conditioning: Conditioning, empty: Conditioning,
        gradient: list[bool], weight: float, rng: SampleRNG,
    ) -> Tensor:  # fmt: skip
        """The guided prediction; only rows with a gradient are recorded, checkpointed."""
        prediction = torch.zeros_like(x)
        for recorded in (True, False):
            if recorded not in gradient:
                continue
            rows = rng.moved(torch.tensor([row for row, carries in enumerate(gradient) if carries == recorded]))
            texts, blanks = ({name: value[rows] for name, value in c.items()} for c in (conditioning, empty))
            if recorded:
                part = checkpoint(self._guided, model, x[rows], t[rows], texts, blanks, use_reentrant=False)
                part = part.detach() + weight * (part - part.detach())
            else:
                with torch.no_grad():
                    part = self._guided(model, x[rows], t[rows], texts, blanks)
            prediction = prediction.index_put((rows,), part.to(prediction.dtype))
        return prediction

    def _guided(self, model: Model, x: Tensor, t: Tensor, conditioning: Conditioning, empty: Conditioning) -> Tensor:
        if self.guidance == 1:
            return model(x, t, conditioning)
        if self.unconditional_gradient or not torch.is_grad_enabled():
            both = {name: torch.cat([empty[name], conditioning[name]]) for name in conditioning}
            away, towards = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        else:
            with torch.no_grad():
                away = model(x, t, empty)
            towards = model(x, t, conditioning)
        return away + self.guidance * (towards - away)
