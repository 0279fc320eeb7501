"""A quantised frozen denoiser under a LoRA; what runs needs torchao, which the tests install."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import pipelines
from pipelines import PipelineError
from t2i_align import align
from t2i_align.errors import UserError
from t2i_align.utils.tensors import tensors_hash
from tests.runs import metrics, run_values


def test_int8_base_predicts_nearly_the_same(path: Callable[[str], Path]) -> None:
    plain = pipelines.load(path("sd3"), encoders=False)
    small = pipelines.load(path("sd3"), encoders=False, quantize="int8")
    linear = [name for name, module in plain.denoiser.named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(hasattr(small.denoiser.get_submodule(name).weight, "__tensor_flatten__") for name in linear)
    shape = plain.latent_shape(*plain.default_size)
    texts = {name: torch.randn(2, *size) for name, size in plain.text_shapes().items()}
    inputs = torch.randn(2, *shape), torch.tensor([300.0, 700.0]), texts
    with torch.no_grad():
        expected, found = (pipeline.predict(*inputs) for pipeline in (plain, small))
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    hashes = {tensors_hash(dict(pipeline.denoiser.named_parameters())) for pipeline in (plain, small)}
    assert len(hashes) == 2


def test_lora_on_an_int8_base_trains_and_resumes(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", model__quantize="int8", train__steps=2)
    align(values, progress=False)
    values["train"]["steps"], values["resume"] = 4, True
    assert align(values, progress=False).steps == 4
    whole = run_values(sd_path, pairs, tmp_path / "whole", model__quantize="int8")
    align(whole, progress=False)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_what_cannot_be_quantised_is_said(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.quantize needs a LoRA"):
        align(run_values(sd_path, pairs, tmp_path / "run", model__quantize="int8", lora=None), progress=False)
    for kind, package in (("int8", "torchao"), ("nf4", "bitsandbytes")):
        reason = "CUDA GPU" if find_spec(package) else rf"pip install 't2i-align\[{package}\]'"
        if kind == "nf4" or not find_spec(package):
            with pytest.raises(PipelineError, match=reason):
                pipelines.load(sd_path, encoders=False, quantize=kind)
