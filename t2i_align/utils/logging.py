"""Silence library progress bars and known-harmless warnings."""

from __future__ import annotations

import logging


def silence_libraries() -> None:
    """Disable diffusers' and transformers' loading bars and one harmless warning; our own log lines stay visible.

    Called by entry points only: it changes both libraries for the whole process. Downloads keep their bars.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers.loaders.lora_base").addFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    # Logged for every LoRA without text-encoder weights, as all of ours are.
    return not record.getMessage().startswith("No LoRA keys associated to")
