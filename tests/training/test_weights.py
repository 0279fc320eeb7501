"""Named weights of one network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2i_align.errors import UserError
from t2i_align.training.weights import Weights, older_policy


def test_named_weights_apply_inside_the_block_and_are_restored_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1))
    network[0].requires_grad_(False)
    weights, x = Weights(network), torch.randn(4, 2)
    assert set(weights.policy) == {"2.weight", "2.bias"}
    weights.variants["ema"] = older_policy(weights)
    before = network.eval()(x)
    network.train()
    with torch.no_grad():
        network[2].weight += 1
    trained, out = dict(network.named_parameters()), network(x)
    with pytest.raises(ZeroDivisionError), weights.using("ema") as same:
        assert same is network and torch.equal(network(x), before), "without dropout, as it was"
        1 / 0  # noqa: B018
    assert dict(network.named_parameters()) == trained and network[1].training
    out.sum().backward()
    assert network[2].weight.grad is not None
    with weights.using("policy") as policy:
        assert policy is network
    with pytest.raises(RuntimeError, match="no reference weights are kept"):
        weights.using("reference")


def test_checkpoint_has_all_weights_under_their_names() -> None:
    weights = Weights(nn.Linear(1, 1))
    weights.variants["ema"] = older_policy(weights)
    state = {name: torch.full_like(tensor, i) for i, (name, tensor) in enumerate(weights.state().items())}
    assert list(state) == ["weight", "bias", "ema.weight", "ema.bias"]
    weights.load_state(state)
    assert weights.network.weight.item() == 0 and weights.variants["ema"].tensors["bias"].item() == 3
    del state["ema.bias"]
    with pytest.raises(UserError, match=r"lacks 1 trained tensors, as ema\.bias"):
        weights.load_state(state)
