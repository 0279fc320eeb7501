"""Write a LoRA with the tensor names of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from t2i_align import __version__
from t2i_align.errors import UserError
from t2i_align.inference.models import LORA_ENDING, adapter_on, load_pipeline, resolve_adapter, resolve_base, run_of
from t2i_align.inference.options import PRECISIONS
from t2i_align.utils.files import atomic_file


def export_lora(
    lora: str | Path,
    out: str | Path,
    *,
    format: Literal["comfyui", "kohya", "diffusers"] = "comfyui",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    model: str | Path | None = None,
) -> Path:
    """Write a LoRA to the file `out`; returns that.

    Args:
        lora: training run or a step of it (as in `checkpoints/`), or a LoRA's file, folder or Hub id.
        out: file to write, ending in `.safetensors`.
        format: naming of its tensors: `comfyui` (of SD and SDXL kohya's), `kohya` or `diffusers`.
        precision: of its tensors; fp16 and bf16 halve the file.
        model: what the LoRA is for (default: the training run's).

    Raises:
        UserError, PipelineError: soft tokens, a file that exists, no model known, a family or module that this naming
            lacks, weights of a text encoder.
    """
    adapter = resolve_adapter(lora)
    if adapter.kind != "lora":
        what = {"soft_tokens": "soft tokens", "personal": "a personal branch (a LoRA beside it is a file of its own)"}
        raise UserError(f"{lora}: this is {what[adapter.kind]}, which no other tool reads")
    file = Path(out).expanduser()
    if file.suffix != LORA_ENDING or file.exists():
        problem = "exists already" if file.exists() else f"does not end in {LORA_ENDING}"
        raise UserError(f"{out}: {problem}; choose another file to write")
    base = resolve_base(model, adapter)
    pipeline = load_pipeline(base, device="cpu", encoders=False)
    origin = {"t2i_align.base": base.path, "t2i_align.version": __version__}
    if isinstance(objective := (run_of(adapter) or {}).get("objective"), dict):
        origin["t2i_align.objective"] = str(objective.get("name"))
    with adapter_on(pipeline, adapter), atomic_file(file) as temporary:
        pipeline.save_lora(temporary, format, dtype=PRECISIONS[precision], metadata=origin)
    return file
