"""Silence library progress bars and known-harmless warnings."""

from __future__ import annotations

import logging


def silence_libraries() -> None:
    """Disable diffusers' and transformers' loading bars and a harmless warning; downloads keep their bars.

    Called by entry points only, as it affects the whole process.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Logged for every LoRA without text encoder weights, such as all of ours.
    harmless = "No LoRA keys associated to"
    logging.getLogger("diffusers.loaders.lora_base").addFilter(lambda record: harmless not in record.getMessage())
