"""Weights, gradients and optimiser states divided among processes: FSDP2, as accelerate prepares a network for it.

A sharded parameter is a DTensor: whole by its shape, with this process's part in memory. Before a block runs, FSDP
gathers its parameters from memory of its own, so that other weights are put in by exchanging values (`exchanged`), not
attributes. Every process has to run the network equally often: it would wait for the others' parts for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import fsdp2_prepare_model
from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from t2i_align.errors import UserError

if TYPE_CHECKING:
    from t2i_align.config import RunConfig
    from t2i_align.reward_models.config import ScorerRun

OPTIMIZER = "optimizer"  # optimizer.NUMBER.NAME: a state of the parameter of that number


def start(accelerator: Accelerator, config: RunConfig | ScorerRun) -> bool:
    """Make `accelerator` shard where accelerate's launch configuration or `train.shard` asks for it; whether it does.

    One process has nothing to share.

    Raises:
        UserError: an engine other than FSDP2, or a key that does not go with it.
    """
    asked, launched = getattr(config.train, "shard", None), accelerator.distributed_type
    by_launch = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    version = os.environ.get("FSDP_VERSION", "1")
    if launched in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (by_launch and asked is None):
        found, also = "FSDP" if by_launch else launched.value, "" if asked is None else " or FSDP2"
        raise UserError(f"launched as {found}, expected one process or several under DDP{also}")
    if by_launch and version != "2":
        raise UserError(f"launched as FSDP {version}, expected FSDP2: fsdp_version: 2 in accelerate's configuration")
    if not (asked or by_launch) or accelerator.num_processes == 1:
        return False
    check(cast("RunConfig", config))
    disable_fsdp_ram_efficient_loading()  # each process reads all weights; encoders would come out empty
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=policy, cpu_ram_efficient_loading=False)
    # By itself, accelerate shards on no CPU, and on GPUs only where its launcher says so.
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return True


def check(config: RunConfig) -> None:
    """Raise UserError for what does not work with sharded weights, naming the key."""
    train, needs = config.train, config.objective.needs
    for key, found in {
        "train.compile": train.compile,
        "train.precision=fp16": train.precision == "fp16",
        "train.reference=offloaded_copy": train.reference == "offloaded_copy",
        "model.quantize": config.model.quantize,
        "validation.patience": config.validation.patience,
        f"optim.optimizer={config.optim.optimizer}": config.optim.optimizer != "adamw",
        "soft_tokens, personal and model.segments.t5": config.trains not in ("lora", "model"),
        f"objective.name={config.objective.name}": needs.features or needs.uneven,
    }.items():
        if found:
            raise UserError(f"{key} does not work with sharded weights (FSDP2); leave it out, or train under DDP")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether `shard` divides networks."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def shard(accelerator: Accelerator, network: Any) -> None:
    """Divide a network's parameters among processes, in place, block by block; nothing where that was not asked for."""
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    # In float32 or as they are stored: autocast rounds, as it does without sharding.
    plugin.mixed_precision_policy = None
    if plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in network.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(there & set(network._no_split_modules or ()))
    fsdp2_prepare_model(accelerator, network)
    network.set_reshard_after_forward(True)  # the next pass may be another variant's


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's parts, which share the tensors' memory; of whole tensors these themselves."""
    return [
        tensor._local_tensor.detach().requires_grad_(tensor.requires_grad) if isinstance(tensor, DTensor) else tensor
        for tensor in tensors
    ]


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor divided as `like` is, where it has its shape."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


@contextmanager
@torch.no_grad()
def exchanged(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the parameters have the tensors' values and these have theirs."""
    pairs = list(zip(local(parameters), local(tensors), strict=True))

    def swap() -> None:
        for one, other in pairs:
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()


# Checkpoints ----------------------------------------------------------------------------------------------------------


def write(folder: Path, weights: Mapping[str, Tensor], optimizer: Mapping[int, Mapping[str, Any]]) -> None:
    """Write weights and optimiser states, each process its part; all must call it."""
    states = {f"{OPTIMIZER}.{i}.{key}": value for i, state in optimizer.items() for key, value in state.items()}
    dcp.save({**{name: tensor.detach() for name, tensor in weights.items()}, **states}, checkpoint_id=folder)


def read(folder: Path, own: Mapping[str, Tensor] = {}, trained: Sequence[Tensor] = ()) -> tuple[dict[str, Tensor], Any]:
    """Weights by name and optimiser states by number, divided as this run's are, from any number of processes.

    Args:
        own: this run's weights; those of other names are read whole. trained: the optimiser's parameters, in order; of
            none, no states are read.
    """
    entries: Mapping[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if state := name.startswith(f"{OPTIMIZER}."):
            like = trained[int(name.split(".")[1])] if trained else None
        else:
            like = own.get(name)
        if state and like is None:
            continue
        dtype = entry.properties.dtype
        if like is not None and like.shape == entry.size:
            tensors[name] = torch.zeros_like(like, requires_grad=False, dtype=dtype)
        else:
            tensors[name] = torch.zeros(entry.size, dtype=dtype)
    alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
    dcp.load(tensors, checkpoint_id=folder, no_dist=alone)
    states: dict[int, dict[str, Tensor]] = {}
    for name in [name for name in tensors if name.startswith(f"{OPTIMIZER}.")]:
        _, number, key = name.split(".", 2)
        states.setdefault(int(number), {})[key] = tensors.pop(name)
    return tensors, states
