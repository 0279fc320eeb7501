"""Silence library progress bars and known-harmless warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def silence_libraries() -> None:
    """Disable diffusers' and transformers' loading bars and one harmless warning; our own log lines stay visible.

    Called by entry points only: it changes both libraries for the whole process. Downloads keep their bars.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("diffusers.loaders.lora_base").addFilter(_is_relevant)
    # diffusers' own call of the Hub, for every model of the Hub.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")


def silent(function: Callable[P, R]) -> Callable[P, R]:
    """With `progress=False`, silence the libraries as well while a function runs."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("progress", True):
            return function(*args, **kwargs)
        import diffusers
        import transformers

        switches = [library.utils.logging for library in (diffusers, transformers)]
        shown = [switch for switch in switches if switch.is_progress_bar_enabled()]
        silence_libraries()
        try:
            return function(*args, **kwargs)
        finally:
            for switch in shown:
                switch.enable_progress_bar()

    return run


def _is_relevant(record: logging.LogRecord) -> bool:
    # Logged for every LoRA without text-encoder weights, as all of ours are.
    return not record.getMessage().startswith("No LoRA keys associated to")
