"""What is in a folder: equal for runs that made the same, however long they took."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from t2i_align.training.checkpoint import SUMS


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file but locks, by its path in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("lock"))
    return {str(file.relative_to(folder)): hashlib.sha256(content(file)).hexdigest() for file in files}


def content(file: Path) -> bytes:
    """What a file holds but how long it took; safetensors orders its header at random, pickles tell equal from same."""
    if file.name == SUMS:  # of such bytes; the program checks it
        return b""
    data = file.read_bytes()
    if file.suffix == ".pt" and data:
        with contextlib.suppress(RuntimeError, pickle.UnpicklingError, EOFError):  # damaged
            return repr(plain(torch.load(file, weights_only=True))).encode()
    if file.suffix in (".json", ".html"):
        data = re.sub(rb'"seconds": [\d.]+|\d+ seconds', b"", data)
    if file.suffix != ".safetensors" or len(data) < 8:
        return data
    start = 8 + int.from_bytes(data[:8], "little")
    with contextlib.suppress(ValueError):  # damaged
        return json.dumps(json.loads(data[8:start]), sort_keys=True).encode() + data[start:]
    return data


def plain(state: Any) -> Any:
    """A state with its tensors as lists."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), state.tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state
