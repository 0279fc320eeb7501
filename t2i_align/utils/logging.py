"""What a person at a terminal or in a notebook is spared."""

from __future__ import annotations

import logging


def silence_libraries() -> None:
    """Keep the libraries' bars of a second and their "safe to ignore" from drowning what should be read.

    Called by entry points only: it changes diffusers and transformers for the whole process. Downloads keep their bars.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers.loaders.lora_base").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    # Said of every LoRA that leaves the text encoders alone, as all of ours do.
    return not record.getMessage().startswith("No LoRA keys associated to")
