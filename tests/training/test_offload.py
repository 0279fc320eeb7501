"""Weights in CPU memory that pass through the device: the same numbers, and at most one block's copies there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pipelines
from pipelines.offload import stream, streamable
from t2i_align import align
from t2i_align.config import from_mapping
from t2i_align.errors import UserError
from t2i_align.training.optimizer import check_machine
from tests.runs import metrics, run_values, same
from tests.tiny import TINY

CHECKPOINTED = {"train__gradient_checkpointing": True}


@pytest.mark.parametrize("offload", ["encoders", "base"])
def test_offloaded_run_equals_the_plain_one_to_the_last_bit(
    offload: str, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    plain = align(run_values(sd_path, pairs, tmp_path / "plain", **CHECKPOINTED), progress=False)
    cache = {"data__cache_dir": str(tmp_path / "other cache")}  # encoded anew
    values = run_values(sd_path, pairs, tmp_path / "run", train__offload=offload, **CHECKPOINTED, **cache)
    offloaded = align(values, progress=False)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "plain")
    assert same(load_file(offloaded.weights), load_file(plain.weights))


@pytest.mark.parametrize("family", TINY)
def test_every_family_streams_its_blocks_and_keeps_its_device(family: str, path: Callable[[str], Path]) -> None:
    pipeline = pipelines.load(path(family), encoders=False)
    size, texts = pipeline.latent_shape(*pipeline.default_size, pipeline.default_frames), pipeline.text_shapes()
    inputs = torch.randn(1, *size), torch.tensor([300.0]), {name: torch.randn(1, *s) for name, s in texts.items()}
    masks = {mask: torch.ones(1, texts[name][0]).bool() for name, mask in pipeline.conditioning_masks.items()}
    inputs[2].update(masks)
    if pipeline.size_conditioned:
        inputs[2]["time_ids"] = torch.zeros(1, 6)
    pipeline.denoiser.enable_gradient_checkpointing()
    for parameter in pipeline.denoiser.parameters():  # in a file they lie at any address, by which CPUs' kernels round
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        expected = pipeline.predict(*inputs)
    unreached = pipeline.unreached(*inputs)
    first = next(pipeline.denoiser.parameters())
    assert stream(pipeline.denoiser, "cpu") > 0
    assert all(first is not parameter for layer in streamable(pipeline.denoiser) for parameter in layer.parameters())
    with torch.no_grad():
        assert torch.equal(pipeline.predict(*inputs), expected)
    assert pipeline.unreached(*inputs) == unreached


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(lambda y: self.layer(y).tanh(), x, use_reentrant=False)


def test_only_the_copies_of_one_block_live_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, x = nn.Module(), torch.randn(2, 4, requires_grad=True)
    network.blocks = nn.ModuleList(Block() for _ in range(5)).requires_grad_(False)

    def gradient() -> torch.Tensor:
        y = x
        for block in network.blocks:
            y = block(y)
        return torch.autograd.grad(y.square().sum(), x)[0]

    expected, move, alive, most = gradient(), torch.Tensor.to, set[int](), 0
    stream(network, "cpu")

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal most
        copy = move(tensor, *arguments, **options)
        alive.add(id(copy))
        weakref.finalize(copy, alive.discard, id(copy))
        most = max(most, len(alive))
        return copy

    monkeypatch.setattr(torch.Tensor, "to", counted)
    assert torch.equal(gradient(), expected)
    assert most == 2 and not alive  # weight and bias


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.LayerNorm(4), nn.RMSNorm(4)], ids=str)
def test_data_exchanged_in_place_reach_the_backward_pass(layer: nn.Module) -> None:
    """Why hooks that exchange data, as diffusers' do, cannot serve training."""
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    y = layer.requires_grad_(False)(x)
    layer.weight.data = torch.zeros_like(layer.weight)
    assert not torch.autograd.grad(y.square().sum(), x)[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, "lora=null: weights that are trained"),
        ({"train__gradient_checkpointing": False}, "gradient_checkpointing=false: autograd would keep"),
        ({"model__quantize": "int8"}, r"model\.quantize: choose one"),
        ({"train__compile": True}, r"train\.compile"),
        ({"train__shard": True}, r"train\.shard"),
        ({"train__reference": "copy"}, r"train\.reference=copy"),
        ({"objective": {"name": "reward"}}, "passes the VAE"),
    ],
)
def test_what_cannot_be_offloaded_is_said(
    changes: dict[str, Any], message: str, sd_path: Path, pairs: Path, tmp_path: Path
) -> None:
    values = {**CHECKPOINTED, "train__offload": "base", **changes}
    with pytest.raises(UserError, match=message):
        align(run_values(sd_path, pairs, tmp_path / "run", **values), progress=False)
    assert not (tmp_path / "run").exists()


def test_several_processes_keep_their_base_on_the_device(
    sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = from_mapping(run_values(sd_path, pairs, tmp_path / "run", train__offload="base", **CHECKPOINTED))
    with pytest.raises(UserError, match=r"offload=base is for one process, found 2"):
        check_machine(config)
