"""A frozen denoiser in fewer bits, for a LoRA on it, through diffusers' own quantisation.

    int8   torchao, 8-bit integers with a scale for each output channel; on any device
    fp8    torchao, 8-bit floats with a scale; NVIDIA GPUs since Ada and Hopper
    nf4    bitsandbytes, 4-bit NormalFloat with double quantisation (QLoRA, arXiv 2305.14314); CUDA

Only weights of linear layers are stored so; they are widened to the inputs' precision at each call.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

from pipelines.base import PipelineError

BITS = {"int8": 8, "fp8": 8, "nf4": 4}  # of a weight
FP8_CAPABILITY = (8, 9)


def quantisation(kind: str | None, component: str) -> dict[str, Any]:
    """Arguments of a diffusers pipeline's `from_pretrained` to load a component quantised; none for None.

    Raises:
        PipelineError: an unknown kind, a package that is missing, or a device that cannot compute so.
    """
    if kind is None:
        return {}
    if kind not in BITS:
        raise PipelineError(f"unknown quantisation {kind!r}. Choices: {', '.join(BITS)}.")
    package = "bitsandbytes" if kind == "nf4" else "torchao"
    if find_spec(package) is None:
        raise PipelineError(f"quantisation {kind!r} needs {package}: pip install 't2i-align[{package}]'")
    if kind != "int8" and not torch.cuda.is_available():
        raise PipelineError(f"quantisation {kind!r} needs a CUDA GPU; 'int8' runs on any device")
    if kind == "fp8" and (found := torch.cuda.get_device_capability()) < FP8_CAPABILITY:
        raise PipelineError(f"quantisation 'fp8' needs a GPU of compute capability 8.9 or more, found {found}")
    if kind == "nf4":
        options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
        config: Any = BitsAndBytesConfig(**options)
    else:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping={component: config})}
