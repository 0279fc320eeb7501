"""Write a LoRA with the tensor names of another tool."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

from t2i_align.errors import UserError
from t2i_align.inference.models import LORA_ENDING, adapter_on, load_pipeline, resolve_adapter, resolve_base


def export_lora(
    lora: str | Path,
    out: str | Path,
    *,
    format: Literal["kohya", "diffusers"] = "kohya",
    model: str | Path | None = None,
) -> Path:
    """Write a LoRA to the file `out`; returns that.

    Args:
        lora: training run, or a LoRA's file, folder or Hub id.
        out: file to write, ending in `.safetensors`.
        format: naming of its tensors, `kohya` or `diffusers`; see `TrainablePipeline.save_lora`.
        model: what the LoRA is for (default: the training run's).

    Raises:
        UserError, PipelineError: soft tokens, a file that exists, no model known, a family that kohya has no names for.
    """
    adapter = resolve_adapter(lora)
    if adapter.kind != "lora":
        raise UserError(f"{lora}: these are soft tokens, which no other tool reads")
    file = Path(out).expanduser()
    if file.suffix != LORA_ENDING or file.exists():
        problem = "exists already" if file.exists() else f"does not end in {LORA_ENDING}"
        raise UserError(f"{out}: {problem}; choose another file to write")
    pipeline = load_pipeline(resolve_base(model, adapter), device="cpu", encoders=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with adapter_on(pipeline, adapter), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        os.replace(pipeline.save_lora(folder, naming=format), file)
    return file
