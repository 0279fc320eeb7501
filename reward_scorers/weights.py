"""Weights from files and the Hub: every key and shape has to fit, or it is an error; never a randomly filled tower."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_scorers.base import ScorerError

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
State = Mapping[str, Tensor]


def read_state(path: str | Path, who: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, unwrapped from a `state_dict` entry and DataParallel's `module.`.

    Pickles are opened with `weights_only`: a file that holds more than tensors and plain values is refused.

    Raises:
        ScorerError: no such file, another ending, damaged, or no named tensors in it.
    """
    file = Path(path)
    if not file.is_file():
        raise ScorerError(f"{who}: {path}: no such file")
    if file.suffix not in ENDINGS:
        raise ScorerError(f"{who}: {path}: expected a file that ends in one of {', '.join(ENDINGS)}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message advises to open it all the same
        reason = "damaged, or more than tensors and plain values in it"
        raise ScorerError(f"{who}: {path}: not a readable checkpoint: {reason}") from error
    except Exception as error:  # safetensors and torch each raise their own for a damaged file
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise ScorerError(f"{who}: {path}: not a readable checkpoint: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    named = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named or not state:
        raise ScorerError(f"{who}: {path}: expected named tensors, found {type(state).__name__} of something else")
    return {key.removeprefix("module."): value for key, value in state.items()}


def fit(network: nn.Module, state: State, where: str) -> None:
    """Load `state` into `network`, every key and shape of it.

    Raises:
        ScorerError: keys that are missing or unknown, other shapes, quantised values or such that are not finite.
    """
    own = network.state_dict()
    state = dict(state)
    for key in ("logit_scale", "logit_bias"):  # a scalar or [1], depending on who wrote the file
        if key in state and key in own and state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own and not key.endswith("position_ids")]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or extra or shapes:
        example = f"; {shapes[0]} is {list(state[shapes[0]].shape)}, not {list(own[shapes[0]].shape)}" if shapes else ""
        raise ScorerError(
            f"{where}: {len(missing)} keys missing ({listed(missing[:3])}), "
            f"{len(extra)} unknown ({listed(extra[:3])}), {len(shapes)} of another shape{example}"
        )
    coarse = [key for key in own if own[key].is_floating_point() and not state[key].is_floating_point()]
    if coarse:
        kind = state[coarse[0]].dtype
        raise ScorerError(f"{where}: {len(coarse)} tensors are of {kind}, not floating-point ({listed(coarse[:3])})")
    check_finite(state, where)
    network.load_state_dict({key: state[key] for key in own})


def check_finite(state: State, where: str) -> None:
    """Raise ScorerError for tensors with NaN or infinite values."""
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise ScorerError(f"{where}: {len(bad)} tensors hold NaN or infinite values ({listed(bad[:3])})")


def from_hub(repository: str, name: str, who: str) -> Path:
    """A file of a Hub repository, from the local cache where it is there."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # no connection, no access, no such file: the Hub's own kinds
        reason = str(error).strip().partition("\n")[0]
        raise ScorerError(f"{who}: {name} of {repository} could not be fetched: {reason}") from error


def load_pretrained(load: Callable[..., Any], path: str, who: str, *, strict: bool = True, **options: Any) -> Any:
    """A transformers model through its `from_pretrained`, without the weights that this would fill in at random.

    Raises:
        ScorerError: not there, damaged, or with weights missing, of other shapes, not finite, or when `strict` without
            a place.
    """
    check_local(path, who)
    try:
        network, info = load(path, output_loading_info=True, **options)
    except Exception as error:  # transformers, the Hub and safetensors each raise their own
        reason = " ".join(str(error).split())[:300]
        raise ScorerError(f"{who}: {path!r} could not be loaded: {reason}") from error
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise ScorerError(f"{who}: {path!r} lacks {len(lacking)} weights ({listed(lacking[:3])})")
    extra = sorted(key for key in info["unexpected_keys"] if not key.endswith("position_ids"))
    if extra and strict:  # such as the layers that config.json does not know of
        raise ScorerError(f"{who}: {path!r} has {len(extra)} weights without a place ({listed(extra[:3])})")
    check_finite(network.state_dict(), f"{who}: {path!r}")
    return network


def check_local(path: str, who: str) -> None:
    """Raise ScorerError for a folder that is not there, which transformers would take for an id of the Hub."""
    if path.startswith(("/", "./", "../", "~")) and not Path(path).exists():
        raise ScorerError(f"{who}: {path}: no such folder")


def load_tokenizer(path: str, who: str) -> Any:
    """A tokenizer of transformers, which makes an empty one where its files are missing: an error here."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever transformers, tokenizers or the Hub raise
        raise ScorerError(f"{who}: the tokenizer of {path!r}: {error}") from error
    if tokenizer("a").input_ids == tokenizer("b").input_ids:
        raise ScorerError(f"{who}: the tokenizer of {path!r}: no vocabulary there")
    return tokenizer


def identity(network: Any) -> str:
    """What tells a transformers model's weights: the Hub's commit, or a digest of them where they are local."""
    commit = getattr(network.config, "_commit_hash", None)
    return f"revision {commit[:12]}" if commit else f"sha256 {digest_of_tensors(network.state_dict())}"


def digest(path: Path) -> str:
    """The first 12 digits of a file's sha256."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:12]


def digest_of_tensors(state: State) -> str:
    """The same of named tensors, whatever files they came from."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def listed(names: Sequence[str]) -> str:
    """Names for a message."""
    return ", ".join(names) or "none"
