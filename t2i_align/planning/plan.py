"""Memory, operations and time of a run before it starts, from configurations alone.

The step is traced without values (`trace`); what is assumed beyond that (a card's utilisation, the context's memory,
the allocator's waste) is in `cards`, and a plan's text says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from pipelines import PipelineError
from t2i_align import config as configuration
from t2i_align.config import LoraConfig, RunConfig
from t2i_align.errors import UserError
from t2i_align.inference.models import open_model
from t2i_align.planning.cards import CARDS, FRAGMENTATION, RESERVE, UTILISATION, Card, card_named
from t2i_align.planning.inputs import blank_encoders
from t2i_align.planning.published import described
from t2i_align.planning.trace import Trace, trace

GIB = 2**30
NEGLIGIBLE = 0.05  # of the peak: what saves less is not advised
Change = tuple[str, RunConfig]  # keys as on the command line, and the run with them


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    trace: of one step. sample: (height, width) or (frames, height, width) in pixels. encoders: bytes of VAE and text
    encoders. pair: bytes of a pair in the cache, with a prompt of its own. card, keys: the card that was asked about,
    and the keys with which the run fits there ("" as it is, None where none was found); fitting: the step with them.
    """

    config: RunConfig
    trace: Trace
    sample: tuple[int, ...]
    encoders: int
    pair: int
    card: Card
    keys: str | None
    fitting: Trace | None

    @property
    def fits(self) -> bool:
        """Whether the run fits on the card as it is."""
        return self.keys == ""

    def verdict(self) -> str:
        """Whether the run fits on the card, and the keys that would make it fit."""
        need = FRAGMENTATION * self.trace.peak + RESERVE
        text = f"{self.card.name}: {need / GIB:.1f} GiB needed of {self.card.memory:g} GiB"
        if self.fits:
            return f"{text}: fits"
        if self.fitting is None:
            return f"{text}: does not fit, nor with any key that saves memory"
        return f"{text}: does not fit; {self.fitting.peak / GIB:.1f} GiB at the peak with {self.keys}"

    def rows(self) -> Iterator[tuple[str, str]]:
        """The parts of the report."""
        config, train, parts = self.config, self.config.train, self.trace
        yield "model", f"{config.model.path}: {parts.parameters:,} parameters, {parts.trained:,} of them trained"
        size = " x ".join(map(str, self.sample))
        batch = f"{train.batch_size} x {train.accumulate} groups of {size}"
        yield "step", f"{batch}, {train.precision}: {parts.flops / 1e12:.3g} TFLOP"
        yield "memory", f"{parts.peak / GIB:.2f} GiB at the peak of a step:"
        for name, size_in_bytes in parts.memory.items():
            if size_in_bytes:
                yield "", f"{size_in_bytes / GIB:8.2f} GiB {name}"
        if parts.host:
            what = "the base, which every pass fetches (not in the times)" if train.offload else "the reference"
            yield "", f"{parts.host / GIB:8.2f} GiB of CPU memory for {what}"
        if config.objective.needs.scorer:
            scorer = getattr(config.objective, "scorer", "")
            yield "scorer", f"{scorer}: its weights, activations and time come on top of all that"
        else:
            where = "in CPU memory" if train.offload else "on the card"
            yield "encoders", f"{self.encoders / GIB:.2f} GiB, {where} while the cache is made and for `validation`"
            yield "cache", f"{1000 * self.pair / 2**20:.1f} MiB per 1,000 groups with a prompt each"
        yield "fits", self.verdict()
        rate = "fp32" if train.precision == "fp32" else train.precision
        yield "speed", f"at {UTILISATION:.0%} of each card's peak rate in {rate}, which is assumed:"
        for card in CARDS:
            seconds = card.seconds(parts.flops, train.precision)
            fits = "fits" if card.fits(parts.peak) else "does not fit"
            hours = train.steps * seconds / 3600
            yield "", f"{card.name:<11} {1 / seconds:8.2f} steps/s {hours:8.2f} h for {train.steps} steps, {fits}"

    def __str__(self) -> str:
        return "\n".join(f"{name:<10} {text}" for name, text in self.rows())


def plan(config: str | Path | RunConfig, overrides: Sequence[str] = (), *, card: str | Card | None = None) -> Plan:
    """Memory, operations and time of a run, without weights, data or a GPU.

    Args:
        config: path of a YAML file such as those under configs/.
        overrides: `key=value` changes to the file: train.steps=200 objective.beta=500 lora=null ...
        card: GPU by name, such as "RTX 4090", or a number of GiB (default: the GPU if there is one, else RTX 4090).

    Raises:
        UserError: an unknown card, or what cannot be traced. PipelineError: no such model.
    """
    run = config if isinstance(config, RunConfig) else configuration.load(config, overrides)
    chosen = card if isinstance(card, Card) else card_named(card) if card else present_card() or card_named("RTX 4090")
    with described(run) as local:
        traced = trace(local, candidates(local))
        encoders, pair, sample = _surroundings(local)
        keys, fitting = _fitting(local, traced, chosen)
    return Plan(run, traced, sample, encoders, pair, chosen, keys, fitting)


def present_card() -> Card | None:
    """This machine's first GPU with the memory that it has, at the rates of its namesake if that is known."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    rates = next((card for card in reversed(CARDS) if card.name.split()[-1] in found.name), card_named("RTX 4090"))
    return Card(found.name, round(found.total_memory / GIB, 1), rates.bf16, rates.fp32)


def candidates(config: RunConfig) -> int:
    """Candidates of a group: what the objective compares at least."""
    return config.objective.needs.candidates


def memory_warning(config: RunConfig, card: Card | None = None) -> str:
    """What to print before a run that does not fit on a card (default: the one that is there); "" where it fits."""
    card = card or present_card()
    if card is None:
        return ""
    try:
        planned = plan(config, card=card)
    except (UserError, PipelineError) as error:
        return f"this run's memory cannot be planned: {error}"
    return "" if planned.fits else planned.verdict()


def _surroundings(config: RunConfig) -> tuple[int, int, tuple[int, ...]]:
    """Bytes of the encoders and of a pair in the cache, and a sample's size."""
    pipeline = open_model(config.model, weights=False)
    networks = blank_encoders(config, pipeline).values()
    encoders = sum(parameter.nbytes for network in networks for parameter in network.parameters())
    height, width = config.data.size or pipeline.default_size
    frames = config.data.frames or pipeline.default_frames
    latents = 2 * prod(pipeline.latent_shape(height, width, frames)) * max(2, candidates(config))
    texts = sum(prod(shape) for shape in pipeline.text_shapes().values()) * pipeline.conditioning_dtype.itemsize
    return encoders, latents + texts, (*((frames,) if frames else ()), height, width)


def _fitting(config: RunConfig, traced: Trace, card: Card) -> tuple[str | None, Trace | None]:
    """The keys with which the run fits on the card, and its step with them: changes are added until it does."""
    keys: list[str] = []
    for change in (None, *CHANGES):
        if change is not None:
            if (changed := change(config, traced, card)) is None:
                continue
            key, config = changed
            keys.append(key)
            traced = trace(config, candidates(config))
        if card.fits(traced.peak):
            return " ".join(keys), traced
    return None, None


def _bf16(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    if config.train.precision not in ("fp32", "tf32"):
        return None
    return "train.precision=bf16", _with(config, "train", precision="bf16")


def _checkpointing(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    if config.train.gradient_checkpointing or not _matters("activations", traced):
        return None
    return "train.gradient_checkpointing=true", _with(config, "train", gradient_checkpointing=True)


def _smaller_batch(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    """Micro-batches of the largest size that divides the batch and leaves room, as activations grow with it."""
    train, rest = config.train, traced.peak - traced.memory["activations"]
    sizes = [size for size in range(1, train.batch_size) if train.batch_size % size == 0]
    if not sizes or not _matters("activations", traced):
        return None
    gradients = 4 * traced.trained  # of the micro-batches before, from the second on
    room = [s for s in sizes if card.fits(rest + gradients + traced.memory["activations"] * s // train.batch_size)]
    size = max(room, default=1)
    accumulate = train.accumulate * train.batch_size // size
    changed = _with(config, "train", batch_size=size, accumulate=accumulate)
    return f"train.batch_size={size} train.accumulate={accumulate}", changed


def _quantised(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    if not config.lora or config.model.quantize or not _matters("weights", traced):
        return None
    return "model.quantize=nf4", _with(config, "model", quantize="nf4")


def _eight_bit(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    if config.optim.optimizer != "adamw" or not _matters("optimiser", traced):
        return None
    return "optim.optimizer=adamw8bit", _with(config, "optim", optimizer="adamw8bit")


def _offloaded(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    if config.trains != "model" or config.train.reference == "offloaded_copy" or not _matters("reference", traced):
        return None
    return "train.reference=offloaded_copy", _with(config, "train", reference="offloaded_copy")


def _streamed(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    train = config.train
    if not config.lora or train.offload == "base" or not train.gradient_checkpointing or train.compile or train.shard:
        return None
    if not _matters("weights", traced) or config.lora.dora or "copy" in train.reference:
        return None
    changed = _with(_with(config, "model", quantize=None), "train", offload="base")
    return "model.quantize=null train.offload=base", changed


def _lora(config: RunConfig, traced: Trace, card: Card) -> Change | None:
    if config.trains != "model":
        return None
    changed = replace(config, lora=LoraConfig(), train=replace(config.train, reference="auto"))
    return "lora.rank=16 train.reference=auto", changed


CHANGES: Sequence[Callable[[RunConfig, Trace, Card], Change | None]] = (
    _bf16, _checkpointing, _smaller_batch, _quantised, _eight_bit, _offloaded, _streamed, _lora,
)  # fmt: skip


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _matters(part: str, traced: Trace) -> bool:
    return traced.memory[part] > NEGLIGIBLE * traced.peak
