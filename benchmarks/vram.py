"""Memory of published models by `t2i-align plan`, as a table for the documents.

python benchmarks/vram.py     # writes docs/vram.md; minutes to an hour of one core, without weights or a GPU
"""

from __future__ import annotations

import argparse
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import Any

from t2i_align import config as configuration
from t2i_align.planning.cards import FRAGMENTATION, RESERVE
from t2i_align.planning.published import described
from t2i_align.planning.trace import trace
from t2i_align.utils.logging import silence_libraries

OUT = Path(__file__).parents[1] / "docs" / "vram.md"
MODELS = (
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "stabilityai/stable-diffusion-3.5-medium",
    "stabilityai/stable-diffusion-3.5-large",
    "black-forest-labs/FLUX.1-dev",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Lightricks/LTX-Video",
)
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"train": {"gradient_checkpointing": False}},
    "LoRA, checkpointing": {},
    "LoRA on nf4, checkpointing": {"model": {"quantize": "nf4"}},
    "full, checkpointing, 8-bit AdamW": {"lora": None, "optim": {"optimizer": "adamw8bit"}},
}
GIB = 2**30


def row(model: str, kind: str) -> list[str]:
    """One line: parts at rest, activations of a pair, and the greatest batch on cards."""
    values = {"output_dir": "runs/plan", "objective": "diffusion_dpo", **KINDS[kind]}
    values["model"] = {"path": model, **values.get("model", {})}
    values["train"] = {"batch_size": 1, "precision": "bf16", "gradient_checkpointing": True, **values.get("train", {})}
    with described(configuration.from_mapping(values)) as config:
        traced = trace(config)
    activations = traced.memory["activations"]
    batches = []
    for card in (24, 48, 80):
        room = (card * GIB - RESERVE) / FRAGMENTATION - (traced.peak - activations)
        batches.append(str(max(0, int(room // activations))) if room > 0 else "0")
    parts = [traced.peak - activations, activations]
    return [model, kind, *(f"{part / GIB:.1f}" for part in parts), *batches, f"{traced.flops / 1e12:.1f}"]


def main() -> int:
    """Trace and write the table, after each line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="published models, or folders")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="what is trained and how")
    options = parser.parse_args()
    silence_libraries()
    head = ["model", "trained", "weights, optimiser, reference, GiB", "activations of a pair, GiB",
            "pairs on 24 GiB", "48 GiB", "80 GiB", "TFLOP a pair"]  # fmt: skip
    table = [head, ["---"] * len(head)]
    for model, kind in product(options.models, options.kinds):
        table.append(row(model, kind))
        print(" | ".join(table[-1]), flush=True)
        OUT.write_text("\n".join([
            "# Memory of published models", "",
            f"`{shlex.join(['python', 'benchmarks/vram.py', *sys.argv[1:]])}`", "",
            "Diffusion-DPO in bf16 at the model's own size, from the cache, by `t2i-align plan` "
            "([training.md](training.md#memory));\nnothing here was measured on a GPU. A pair is two images or clips; "
            "activations grow with the pairs of a micro-batch, and\nthe pairs that fit leave 1 GiB for the CUDA "
            "context and 5 % for fragmentation.", "",
            *("| " + " | ".join(line) + " |" for line in table), "",
        ]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
