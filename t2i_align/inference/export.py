"""A LoRA under other names: what diffusers calls `unet.….lora_A.weight`, kohya's tools look for elsewhere."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from t2i_align.errors import UserError
from t2i_align.inference.resolve import LORA_ENDING, adapter_on, resolve_adapter, resolve_base, resolve_model


def export_lora(lora: str | Path, out: str | Path, *, format: str = "kohya", model: str | Path | None = None) -> Path:
    """Write a LoRA to the file `out`; returns that.

    Args:
        lora: training run, or a LoRA's file, folder or Hub id.
        format: naming of its tensors, `kohya` or `diffusers`; see `TrainablePipeline.save_lora`.
        model: what the LoRA is for (default: the training run's).

    Raises:
        UserError, PipelineError: soft tokens, a file that exists, no model known, a family that kohya has no names for.
    """
    import pipelines

    adapter = resolve_adapter(lora)
    if adapter.kind != "lora":
        raise UserError(f"{lora}: these are soft tokens, which no other tool reads")
    file = Path(out).expanduser()
    if file.suffix != LORA_ENDING or file.exists():
        problem = "is there already" if file.exists() else f"does not end in {LORA_ENDING}"
        raise UserError(f"{out}: {problem}; choose another file to write")
    base = resolve_base(model, adapter)
    pipeline = pipelines.load(
        resolve_model(base.path),
        encoders=False,
        expert=base.expert,
        revision=base.revision,
        variant=base.variant,
        single_file_config=base.single_file_config,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    with adapter_on(pipeline, adapter), tempfile.TemporaryDirectory(dir=file.parent) as folder:
        os.replace(pipeline.save_lora(folder, naming=format), file)
    return file
