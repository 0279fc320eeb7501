"""Read other tools' LoRA files: every pair of tensors at its full strength, or an error that names what is lost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import hf_hub_download
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PEFT_FILE, PEFT_CONFIG, PEFT_PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# X.lora_A.weight, X.lora_down.weight, X.lora.down.weight, X_lora.down.weight, X.lora_linear_layer.down.weight …
PAIR = re.compile(
    r"(?P<module>.+?)(?P<infix>\.lora_|\.lora\.|_lora\d?\.|\.lora_linear_layer\.)(?P<side>A|B|down|up)\.weight"
)
DOWN = {"B": "A", "up": "down"}
KEPT = re.compile(r".+\.lora_magnitude_vector(\.weight)?")  # peft's DoRA, which diffusers loads
# Of peft's `init_lora_weights`; the others (pissa, olora, corda, loftq, lora_ga) take from the base what they put in.
KEEP_THE_BASE = ("True", "False", "gaussian", "eva", "orthogonal", "mica")
Scales = Callable[[str, int], float]  # a module's name and rank -> what its B is multiplied by


def read_lora(path: str | Path, component: str, modules: Collection[str]) -> dict[str, Tensor]:
    """A LoRA's tensors in float32, B of each pair multiplied by its alpha / rank, so that alpha is the rank throughout.

    Args:
        path: file, folder with one, or Hub id. A file of peft is read with the `adapter_config.json` beside it.
        component: of the denoiser in a pipeline. modules: names in the denoiser; a key that begins with one of them, or
            with peft's `base_model.model.`, gets the component's name in front of it.

    Raises:
        ValueError, OSError: nothing there, no LoRA, or tensors that no LoRA of diffusers has.
    """
    file = _file(path)
    with safe_open(file, framework="pt") as opened:
        keys, header = list(opened.keys()), opened.metadata() or {}
        state = {_named(key, component, modules): opened.get_tensor(key).float() for key in keys}
    pairs = {key: match for key in state if (match := PAIR.fullmatch(key))}
    alphas = {key.removesuffix(".alpha"): float(state[key]) for key in state if key.endswith(".alpha")}
    owners = {owner for match in pairs.values() for owner in _owners(match)}
    lost = [k for k in state if k not in pairs and not KEPT.fullmatch(k) and k.removesuffix(".alpha") not in owners]
    if lost:
        kinds = "DoRA of other tools, LoHa, LoKr, differences of norms and biases are not read"
        example = min(lost, key=lambda key: key.endswith(".alpha"))
        raise ValueError(f"{len(lost)} of its {len(state)} tensors are not a LoRA's, such as {example!r} ({kinds})")
    if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{len(bad)} of its {len(state)} tensors hold NaN or infinite values, such as {bad[0]!r}")
    scales = _scales(file, header, any(key.startswith(PEFT_PREFIX) for key in keys))
    for key, match in pairs.items():
        if match["side"] in ("A", "down"):
            continue
        down = state.get(f"{key[: match.start('side')]}{DOWN[match['side']]}.weight")
        if down is not None and down.ndim > state[key].ndim == 2:  # LyCORIS's DyLoRA leaves out the kernel of one
            state[key] = state[key].view(*state[key].shape, *[1] * (down.ndim - 2))
        rank, given = state[key].shape[1], [owner for owner in _owners(match) if owner in alphas]
        state[key] = state[key] * (alphas[given[0]] / rank if given else scales(match["module"], rank))
        if given:
            # Some of diffusers' conversions cannot do without; of UNets peft would make patterns that match nothing.
            del state[f"{given[0]}.alpha"]
            state |= {} if component == "unet" else {f"{given[0]}.alpha": torch.tensor(float(rank))}
    return state


def _owners(match: re.Match[str]) -> tuple[str, str]:
    """What stands before `.alpha` for a pair of tensors."""
    return match["module"], match["module"] + match["infix"].rstrip("._")


def _file(path: str | Path) -> Path:
    """The file of a path, a folder or a Hub id; that of peft with its configuration."""
    local = Path(path)
    if local.is_file():
        return local
    if local.is_dir():
        found = [file for name in (LORA_FILE, PEFT_FILE) if (file := local / name).is_file()]
        found = found or sorted(local.glob("*.safetensors"))
        if len(found) != 1:
            names = f"; name one of {', '.join(file.name for file in found)}" if found else ""
            raise ValueError(f"{len(found) or 'no'} .safetensors files with LoRA weights in this folder{names}")
        return found[0]
    try:
        return Path(hf_hub_download(str(path), LORA_FILE))
    except Exception:  # another file's name, or no access, which the second request names
        hf_hub_download(str(path), PEFT_CONFIG)
        return Path(hf_hub_download(str(path), PEFT_FILE))


def _named(key: str, component: str, modules: Collection[str]) -> str:
    """A key with the component's name before a module of it; peft's prefix and adapter name are left out."""
    bare = re.sub(r"^(.*\.)?base_model\.model\.", "", key).replace(".default.weight", ".weight")
    module = match["module"] if (match := PAIR.fullmatch(bare)) else re.split(r"\.(lora_|alpha$)", bare)[0]
    return f"{component}.{bare}" if module in modules else bare


def _scales(file: Path, header: dict[str, str], by_peft: bool) -> Scales:
    """alpha / rank by module from peft's description: in a header of diffusers, or in the file beside peft's own."""
    if LORA_ADAPTER_METADATA_KEY in header:
        described = json.loads(header[LORA_ADAPTER_METADATA_KEY])
    elif by_peft:
        if not (beside := file.with_name(PEFT_CONFIG)).is_file():
            raise ValueError(f"a file of peft without the {PEFT_CONFIG} beside it, which tells its strength")
        described = {f".{key}": value for key, value in json.loads(beside.read_text(encoding="utf-8")).items()}
    else:
        return lambda module, rank: 1.0

    for key, value in described.items():
        name = key.rpartition(".")[2]
        if name == "init_lora_weights" and str(value) not in KEEP_THE_BASE:
            raise ValueError(
                f"{name} is {value!r}, which also changes the base's weights; peft's save_pretrained writes a LoRA of "
                "the unchanged base when it is given path_initial_model_for_weight_conversion"
            )
        if name == "alora_invocation_tokens" and value:
            raise ValueError(f"{name}: a LoRA for some of the tokens is not read")

    def scale(module: str, rank: int) -> float:
        part, _, name = module.partition(".")

        def entry(key: str) -> Any:
            return described.get(f"{part}.{key}", described.get(f".{key}"))

        alpha, alphas = entry("lora_alpha"), entry("alpha_pattern") or {}
        if alpha is None:
            return 1.0
        alpha = alphas.get(get_pattern_key(list(alphas), name), alpha)
        return alpha / (math.sqrt(rank) if entry("use_rslora") else rank)

    return scale
