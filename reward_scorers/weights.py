"""Weights from files and the Hub: every key and shape has to fit, or it is an error; never a randomly filled tower."""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reward_scorers.errors import ScorerError

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
# Plain values of numpy, which training scripts save beside the tensors, under numpy 1's and 2's names.
NUMPY: list[Any] = [
    np.ndarray, np.dtype, *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
    *((made.__reduce__()[0], f"numpy.{core}.multiarray.{name}")
      for made, name in ((np.float64(0), "scalar"), (np.zeros(0), "_reconstruct")) for core in ("core", "_core")),
]  # fmt: skip
State = Mapping[str, Tensor]


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn the various exceptions of libraries, the Hub and damaged files into a ScorerError about `what`."""
    try:
        yield
    except ScorerError:
        raise
    except pickle.UnpicklingError as error:  # torch's own message advises to open it all the same
        named = re.search(r"GLOBAL (\S+)", str(error))
        more = f", such as {named[1]}" if named else ""
        raise ScorerError(f"{what}: damaged, or more than tensors and plain values in it{more}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ScorerError(f"{what}: {reason}") from error


def read_state(path: str | Path, scorer: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, unwrapped from a `state_dict` entry and DataParallel's `module.`.

    Pickles are opened with `weights_only`: a file that holds more than tensors and plain values, those of numpy
    included, is refused.

    Raises:
        ScorerError: no such file, another ending, damaged, TorchScript, or no named tensors in it.
    """
    file, where = Path(path), f"{scorer}: {path}"
    if not file.is_file():
        raise ScorerError(f"{where}: no such file")
    if file.suffix not in ENDINGS:
        raise ScorerError(f"{where}: expected a file that ends in one of {', '.join(ENDINGS)}")
    with loading(f"{where}: not a readable checkpoint"):
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            inside = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
            if any(name.endswith("/constants.pkl") for name in inside):
                openai = "OpenAI's own CLIP files are tags of open_clip, such as clip:ViT-B-32-quickgelu:openai"
                raise ScorerError(f"{where}: a TorchScript program, not tensors; {openai}")
            with torch.serialization.safe_globals(NUMPY):
                state = torch.load(file, map_location="cpu", weights_only=True)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    named = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named or not state:
        raise ScorerError(f"{where}: expected named tensors, found {type(state).__name__} of something else")
    return {key.removeprefix("module."): value for key, value in state.items()}


def fit(network: nn.Module, state: State, where: str) -> None:
    """Load `state` into `network`, every key and shape of it.

    Raises:
        ScorerError: keys that are missing or unknown, other shapes, quantised values, or values that are not finite.
    """
    own, state = network.state_dict(), dict(state)
    for key in ("logit_scale", "logit_bias"):  # a scalar or [1], depending on the writer of the file
        if key in state and key in own and state[key].numel() == 1:
            state[key] = state[key].reshape(own[key].shape)
    shared = [(key, value, state[key]) for key, value in own.items() if key in state]
    _refuse(where, {
        "keys missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own and not key.endswith("position_ids")],
        "of another shape": [
            f"{key} is {list(b.shape)}, not {list(a.shape)}" for key, a, b in shared if a.shape != b.shape
        ],
        "not floating-point": [
            f"{key} is of {b.dtype}" for key, a, b in shared if a.is_floating_point() and not b.is_floating_point()
        ],
        "with NaN or infinite values": not_finite(state),
    })  # fmt: skip
    network.load_state_dict({key: state[key] for key in own})


def not_finite(state: State) -> list[str]:
    """Names of tensors with NaN or infinite values."""
    return [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]


def _refuse(where: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise ScorerError for names of tensors by their problem, if there are any."""
    counts = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in problems.items() if names]
    if counts:
        raise ScorerError(f"{where}: {', '.join(counts)}")


def from_hub(repository: str, name: str, scorer: str) -> Path:
    """A file of a Hub repository, from the local cache where it is there."""
    from huggingface_hub import hf_hub_download

    with loading(f"{scorer}: {name} of {repository} could not be fetched"):
        return Path(hf_hub_download(repository, name))


def load_checkpoint(
    network: nn.Module,
    checkpoint: str,
    scorer: str,
    hub: tuple[str, str] = ("", ""),
    *,
    target: str,
    rename: Callable[[dict[str, Tensor]], State] = dict,
) -> str:
    """Freeze a network with the weights of a checkpoint; returns what identifies them.

    Args:
        checkpoint: file; "" is the Hub's `hub`, a repository and a name; "random" keeps the network's own, for tests.
        target: what the weights are for, in the message if they do not fit.
        rename: from the checkpoint's names to the network's.

    Raises:
        ScorerError: see `read_state` and `fit`.
    """
    network.eval().requires_grad_(False)
    if checkpoint == "random":
        return "random"
    path = Path(checkpoint) if checkpoint else from_hub(*hub, scorer)
    fit(network, rename(read_state(path, scorer)), f"{scorer}: {path} does not fit {target}")
    return f"sha256 {digest(path)}"


def load_pretrained(
    load: Callable[..., Any], path: str, scorer: str, *, kind: str = "", strict: bool = True, **options: Any
) -> Any:
    """A frozen transformers model through its `from_pretrained`, without weights that this would fill in at random.

    Raises:
        ScorerError: not there, damaged, of another `kind`, or with weights missing, of other shapes, not finite, or
            when `strict` unused.
    """
    from transformers import AutoConfig

    if path.startswith(("/", "./", "../", "~")) and not Path(path).exists():  # transformers would ask the Hub for it
        raise ScorerError(f"{scorer}: {path}: no such folder")
    where = f"{scorer}: {path!r}"
    with loading(f"{where} could not be loaded"):
        # With trust_remote_code=None transformers would ask whether to run code that comes with the model.
        if kind and (other := AutoConfig.from_pretrained(path, trust_remote_code=False).model_type) != kind:
            raise ScorerError(f"{where} is a model of type {other!r}, expected {kind!r}")
        network, info = load(path, output_loading_info=True, trust_remote_code=False, **options)
    extra = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    _refuse(where, {
        "weights missing": sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])),
        "weights without a place": sorted(extra) if strict else (),  # such as layers that config.json does not declare
        "with NaN or infinite values": not_finite(network.state_dict()),
    })  # fmt: skip
    return network.eval().requires_grad_(False)


def load_tokenizer(path: str, scorer: str) -> Any:
    """A tokenizer of transformers; raises ScorerError where files are missing, for which it makes an empty one."""
    from transformers import AutoTokenizer

    with loading(f"{scorer}: the tokenizer of {path!r}"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer("a").input_ids == tokenizer("b").input_ids:
        raise ScorerError(f"{scorer}: the tokenizer of {path!r}: no vocabulary there")
    return tokenizer


def longer_than(limit: int, tokenizer: Any, prompts: Sequence[str]) -> list[bool]:
    """Which prompts have more tokens."""
    return [len(tokens) > limit for tokens in tokenizer(list(prompts), verbose=False).input_ids]


def identity(network: Any) -> str:
    """What identifies a transformers model's weights: the Hub's commit, or a digest of them where they are local."""
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
