"""Networks without weights, from their configurations, for counts and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn


def blank_component(
    path: str | Path,
    name: str,
    entry: Sequence[str],
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> nn.Module:
    """A component of a folder or Hub id on torch's `meta` device.

    Args:
        entry: library and class, as model_index.json names them. dtype: of its parameters, but for those that
            `from_pretrained` keeps in float32.
    """
    cls: Any = getattr(import_module(entry[0]), entry[1])
    with torch.device("meta"):
        config: Any = getattr(cls, "config_class", None)
        if hasattr(config, "from_pretrained"):  # of transformers
            network = cls(config.from_pretrained(str(path), subfolder=name, revision=revision))
        else:
            network = cls.from_config(cls.load_config(str(path), subfolder=name, revision=revision))
    for key, parameter in network.named_parameters():
        if not set(key.split(".")) & set(getattr(cls, "_keep_in_fp32_modules", None) or ()):
            parameter.data = parameter.data.to(dtype)
    result: nn.Module = network
    return result
