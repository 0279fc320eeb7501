"""What a step costs beside its arithmetic: no waiting for the device, no walks over the network, no second copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pipelines
from t2i_align import align
from t2i_align.config import TrainConfig
from t2i_align.inference.models import load_pipeline
from t2i_align.inference.options import PRECISIONS, use_precision
from t2i_align.objectives import OBJECTIVES
from t2i_align.training.loop import Loop
from t2i_align.training.reference import build_reference
from tests.runs import run_values
from tests.tiny import example

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique")
ON_CPU = ("inpo", "smpo", "reward")  # draw on the CPU how many steps are taken or trained, and read that there


class Operations(TorchDispatchMode):
    """Counts operations, and fails where Python reads a tensor's value: on a GPU it would wait for what is queued."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else ()
        assert not masks and not name.startswith(READS), f"{name} waits for the device"
        self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - set(ON_CPU)))
def test_step_reads_nothing_from_the_device(
    name: str,
    sd_path: Path,
    rankings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: Counter[str] = Counter()
    real = Loop._one_step

    def one_step(loop: Loop, *args: Any) -> Callable[[], list[float]]:
        with Operations(counts):
            return real(loop, *args)

    monkeypatch.setattr(Loop, "_one_step", one_step)
    values = run_values(sd_path, rankings, tmp_path / "run", objective={"name": name}, optim__ema=0.9, train__steps=2)
    assert align(values, progress=False).steps == 2
    assert counts["_fused_adamw_"] == 2
    assert counts["_foreach_sub_"] >= 2, "one operation for all averages"


@pytest.mark.parametrize("update", [None, {"every": 100}])
def test_step_does_not_walk_over_the_network(
    update: dict[str, int] | None, sd_path: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for training mode nor for the reference: the adapter switched off, or an older one without dropout."""
    walks: list[str] = []
    real, methods = Loop._one_step, {name: getattr(nn.Module, name) for name in ("named_modules", "train")}

    def counted(name: str) -> Callable[..., Any]:
        return lambda *args, **options: walks.append(name) or methods[name](*args, **options)

    def one_step(loop: Loop, *args: Any) -> Callable[[], list[float]]:
        with monkeypatch.context() as patch:
            for name in methods:
                patch.setattr(nn.Module, name, counted(name))
            return real(loop, *args)

    monkeypatch.setattr(Loop, "_one_step", one_step)
    align(run_values(sd_path, pairs, tmp_path / "run", train__reference_update=update), progress=False)
    assert not walks


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "wan", "cogvideox", "ltx"])
def test_reference_of_a_model_trained_in_bf16_takes_half_the_memory_and_predicts_the_same(
    name: str, path: Callable[[str], Path]
) -> None:
    pipeline = pipelines.load(path(name))
    pipeline.denoiser.requires_grad_(True)
    reference = build_reference(TrainConfig(precision="bf16"), pipeline)
    twin = reference.weights.variants["reference"].network
    size, whole = (sum(p.numel() * p.element_size() for p in m.parameters()) for m in (twin, pipeline.denoiser))
    assert size < 0.6 * whole
    inputs = example(pipeline)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(reference(*inputs), pipeline.predict(*inputs))


def test_tf32_is_on_where_it_is_asked_for(sd_path: Path, pairs: Path, tmp_path: Path) -> None:
    values = run_values(sd_path, pairs, tmp_path / "run", train__precision="tf32", train__steps=1)
    align(values, progress=False)
    assert torch.get_float32_matmul_precision() == "high"
    assert [use_precision(name) for name in PRECISIONS] == [None, None, torch.bfloat16, torch.float16]
    assert torch.get_float32_matmul_precision() == "highest"
    load_pipeline(sd_path, "tf32")
    assert torch.get_float32_matmul_precision() == "high"
    use_precision("fp32")
