"""One training step on tensors without values: its memory by part, and its floating-point operations.

The run's own parts (family, adapter, reference, objective, optimiser) run under torch's `FakeTensorMode`, in which a
tensor has a shape, a dtype and a storage of so many bytes, but no content. A dispatch mode follows these storages from
their allocation to their release. Not seen are a kernel's own workspaces and what the allocator wastes between blocks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pipelines.offload import stream, streamable
from pipelines.quantize import BITS
from reward_scorers.base import Scorer
from t2i_align.conditioning.adapter import TRAINED
from t2i_align.config import RunConfig
from t2i_align.errors import UserError
from t2i_align.inference.models import open_model
from t2i_align.inference.options import PRECISIONS
from t2i_align.objectives.base import DataStats
from t2i_align.planning.inputs import Brightness, blank_encoders, first_batch
from t2i_align.training.optimizer import make_optimizer
from t2i_align.training.reference import build_reference
from t2i_align.training.rewards import Rewarder
from t2i_align.training.weights import CAST, Weights, older_policy

PARTS = ("weights", "encoders", "reference", "moving average", "optimiser", "gradients", "activations")
COUNTED: dict[Any, Any] = {  # kernels by what counts their operations; torch's table lacks those of the CPU's attention
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)
    ),
}
QUANTISED_FROM = 4096  # elements: bitsandbytes keeps the states of smaller tensors in float32
QUANTISED_BLOCK = 256  # elements that share a float32 scale in its 8-bit states


@dataclass(frozen=True)
class Trace:
    """What a step takes.

    memory: bytes by part at the moment of the greatest sum. flops: of all its micro-batches. parameters, trained:
    numbers. host: bytes in CPU memory, of an offloaded base or reference.
    """

    memory: dict[str, int]
    flops: int
    parameters: int
    trained: int
    host: int = 0

    @property
    def peak(self) -> int:
        """Bytes on the device at the worst moment."""
        return sum(self.memory.values())


class StorageFollower(TorchDispatchMode):
    """Counts the bytes of live storages by part, and operations (torch's own counter keeps what checkpoints release).

    now: bytes at present; peak: when their sum was greatest. flops: floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.flops = Counter[str](), Counter[str](), 0
        self._parts: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]] = weakref.WeakKeyDictionary()

    def assign(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages under a part."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (known := self._parts.get(storage)) is None:
                self._parts[storage] = known = [part]
                weakref.finalize(storage, self._freed, known, storage.nbytes())
            else:
                self.now[known[0]] -= storage.nbytes()
                known[0] = part
            self.now[part] += storage.nbytes()
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._made, out)
        if count := COUNTED.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _made(self, tensor: Tensor) -> None:
        if tensor.untyped_storage() not in self._parts:
            self.assign("activations", [tensor])

    def _freed(self, part: list[str], size: int) -> None:
        self.now[part[0]] -= size


class _Fake(FakeTensorMode):
    def __deepcopy__(self, memo: dict[int, Any]) -> _Fake:  # a copy of a network stays in the same mode
        return self


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Normalisations and interpolation in float32, as CUDA's autocast computes them and the CPU's does not.

    By replacing torch's functions: a mode would not reach what checkpoints compute again in the backward pass.
    """
    own = {name: getattr(F, name) for name in ("layer_norm", "group_norm", "interpolate")}

    def widened(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return function(*args, **kwargs)

        return call

    try:
        for name, function in own.items():
            setattr(F, name, widened(function))
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)


def trace(config: RunConfig, candidates: int = 2, device: str = "cuda") -> Trace:
    """Trace one step of a run, without weights and data.

    Args:
        config: whose `model.path` is a folder or Hub id with configurations; weights are not read.
        candidates: images or clips of a group.
        device: whose rules of precision apply, `cuda` or `cpu`.

    Raises:
        UserError: the objective or the optimiser reads values in the course of a step. PipelineError: no such model.
    """
    objective, train = config.objective.fit_to_data(DataStats(score_range=(0.0, 1.0))), config.train
    if config.personal:
        raise UserError("personal: its branch depends on the users' data, which a plan does not have")
    dtype = PRECISIONS[train.precision]
    pipeline = open_model(
        config.model, denoiser_dtype=torch.float32 if config.trains == "model" else dtype, weights=False
    )
    if config.lora:
        pipeline.lora_targets(config.lora.targets)
    adapted = bool(config.lora and config.lora.init)
    start: dict[str, Any] = {"lora": replace(config.lora, init=None)} if config.lora else {}
    if config.soft_tokens:
        start["soft_tokens"] = replace(config.soft_tokens, start="random")
    TRAINED[config.trains].install(pipeline, replace(config, **start), set(), None)
    if train.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    pipeline.denoiser.train()
    encoders = blank_encoders(config, pipeline) if objective.needs.scorer else {}
    follower = StorageFollower()
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype != torch.float32 else nullcontext()
    rules = _cuda_autocast() if device == "cuda" else nullcontext()
    with _Fake(allow_non_fake_inputs=True):
        _materialise(pipeline.denoiser)
        kept = train.reference == "offloaded_copy"
        plain = replace(train, compile=False, precision="fp32", reference="copy" if kept else train.reference)
        reference = build_reference(plain, pipeline, needed=objective.needs.reference, adapted=adapted)
        weights = Weights(pipeline.denoiser)
        streamed = [p for layer in streamable(pipeline.denoiser) for p in layer.parameters()]
        host = stream(pipeline.denoiser, "cpu") if train.offload == "base" else 0
        outside = set(streamed) if host else set()
        follower.assign("weights", [tensor for tensor in _tensors(pipeline.denoiser) if tensor not in outside])
        follower.now["weights"] -= _saved(pipeline.denoiser, config.model.quantize)
        follower.peak = follower.now.copy()
        copy = reference.weights.variants.get("reference")
        frozen: list[Tensor] = []
        if copy is not None and copy.network is not pipeline.denoiser:
            for module in copy.network.modules():  # as `frozen_copy`; torch cannot convert a module of fake tensors
                if isinstance(module, CAST):
                    _materialise(module, dtype)
            frozen = list(_tensors(copy.network))
        if not kept:
            follower.assign("reference", [*frozen, *(copy.tensors.values() if copy else ())])
        for network in encoders.values():  # which stay, as every step encodes prompts and decodes samples
            _materialise(network)
            follower.assign("encoders", _tensors(network))
        if config.optim.ema is not None:
            average = older_policy(weights)
            follower.assign("moving average", average.tensors.values())
        parameters = list(weights.policy.values())
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: follower.assign("gradients", [p.grad]))
        step = _optimizer(config, parameters, follower)
        batch, rng = first_batch(config, pipeline, candidates)
        if encoders:
            pipeline.pipe.register_modules(vae=encoders["vae"])
            scorer = cast(Scorer, Brightness())  # a rewarder calls nothing but its `judge`
            rewarder = Rewarder(pipeline, scorer, getattr(objective, "latent_frames", None))
            batch = replace(batch, rewarder=rewarder, prompts=("",) * train.batch_size)
        batch = replace(batch, state={name: torch.tensor(value) for name, value in objective.initial_state().items()})
        policy = partial(pipeline.predict, denoiser=pipeline.denoiser)
        micro = min(train.accumulate, 2)  # the second meets the gradients of the first
        with follower, rules:
            for _ in range(micro):
                with autocast, _without_values(f"objective {objective.name}"):
                    loss, _metrics = objective.step(policy, reference, batch, rng)
                loss.mean().backward()
                del loss, _metrics
            reached = sum(parameter.numel() for parameter in parameters if parameter.grad is not None)
            step()
    return Trace(
        memory={part: follower.peak[part] for part in PARTS},
        flops=follower.flops // micro * train.accumulate,
        parameters=sum(parameter.numel() for parameter in pipeline.denoiser.parameters()),
        trained=reached,
        host=host + (sum(tensor.untyped_storage().nbytes() for tensor in frozen) if kept else 0),
    )


@contextmanager
def _without_values(what: str) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"{what}: its course depends on tensors' values, which a plan does not have: {error}"
        ) from error


def _materialise(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace parameters and buffers by fake ones on the CPU, parameters in a dtype (default: theirs)."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cpu", dtype=dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _saved(network: nn.Module, quantize: str | None) -> int:
    """Bytes that frozen linear layers take less when they are quantised; one of them is widened at a time."""
    if quantize is None:
        return 0
    layers = [m.weight for m in network.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    stored = [weight.numel() * BITS[quantize] // 8 + 4 * len(weight) for weight in layers]  # and a scale for each row
    widest = max(weight.nbytes for weight in layers)
    return sum(weight.nbytes for weight in layers) - sum(stored) - widest


def _optimizer(config: RunConfig, parameters: list[nn.Parameter], follower: StorageFollower) -> Any:
    """What a logged step does after its backward pass; the optimiser's states are there, as from the second step on."""
    optimizer = None
    if config.optim.optimizer == "adamw8bit":  # its kernels need the device
        sizes = [parameter.numel() for parameter in parameters]
        states = [2 * n + 8 * n // QUANTISED_BLOCK if n >= QUANTISED_FROM else 8 * n for n in sizes]
        follower.assign("optimiser", [torch.empty(sum(states), dtype=torch.uint8)])
    else:
        optimizer = make_optimizer(config.optim, parameters)
        for group in optimizer.param_groups:  # one tensor at a time needs what the fused kernel does: nothing
            group.update({name: False for name in ("fused", "foreach") if name in group})
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        with _without_values(f"optim.optimizer {config.optim.optimizer!r}"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values = [value for state in optimizer.state.values() for value in state.values()]
        follower.assign("optimiser", [value for value in values if isinstance(value, Tensor)])

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        before = [parameter.detach().clone() for parameter in parameters]  # as the loop, for the norm of the update
        if optimizer:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        torch._foreach_sub_(before, [parameter.detach() for parameter in parameters])

    return step
