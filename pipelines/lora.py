"""LoRA on the denoiser: added by peft, loaded by diffusers; files are written and read here, `lora_files.py` helping.

Every file that is written has the strength of training in its tensors alone (B is multiplied by alpha / rank, or
kohya's `.alpha` stands beside it), since most tools read nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn

from pipelines.base import Family, PipelineError
from pipelines.lora_files import LORA_FILE, read_lora

TEXT = ("text_encoder", "lora_te")  # how names of a text encoder's tensors begin in diffusers and kohya
LOADED = "lora"  # the name of a loaded adapter; one that was trained here has peft's "default"
# Module-name endings that families share in their presets.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")


class LoRAMixin(Family):
    lora_presets: ClassVar[Mapping[str, tuple[str, ...]]]
    lora_excluded: ClassVar[str | None] = None  # a module outside of the blocks that an ending of a preset matches
    # "diffusers" names are read by diffusers; "kohya" and "comfyui" by those tools, if they know the family.
    lora_namings: ClassVar[tuple[str, ...]] = ("diffusers", "comfyui")
    # In ComfyUI's names, where diffusers' are not among them: patterns of module names and their replacements.
    comfyui_names: ClassVar[Mapping[str, str]] = {}
    lora_base: ClassVar[tuple[str, str] | None] = None  # see `lora_version`; None is the family's name

    def add_lora(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | Sequence[str],
        init: str | None = None,
        dora: bool = False,
        without: Collection[str] = (),
    ) -> None:
        """Put a trainable LoRA (arXiv 2106.09685) on the denoiser; B starts at zero, so nothing changes yet.

        init: a saved LoRA of the same modules and rank that it starts from instead, at that one's strength.
        dora: with magnitudes of its own (arXiv 2402.09353).
        without: names of parameters, as of `unreached`; the LoRA leaves out the modules whose weights these are.
        """
        endings = self.lora_targets(targets)
        options: Any = {"target_modules": list(endings), "lora_alpha": alpha, "use_dora": dora}
        weights = [f".{name}" for name in without if name.endswith(".weight")]
        left_out = [name for name in weights if name.endswith(tuple(f".{ending}.weight" for ending in endings))]
        excluded = sorted(name[1:].removesuffix(".weight") for name in left_out)
        if isinstance(targets, str) and self.lora_excluded in endings:
            excluded.append(self.lora_excluded)
        if excluded:
            options["exclude_modules"] = "|".join(map(re.escape, excluded))  # peft takes entries of a list for endings
        self.denoiser.add_adapter(LoraConfig(r=rank, lora_dropout=dropout, **options))
        if init is not None:
            self._start_lora(init)

    def _start_lora(self, path: str) -> None:
        ours = next(iter(self.denoiser.peft_config))
        self.load_lora(path)
        own, given = ({n: m.r[name] for n, m in lora_layers(self.denoiser, name).items()} for name in (ours, LOADED))
        if own != given:
            found, expected = (" and ".join(map(str, sorted({*ranks.values()}))) for ranks in (given, own))
            raise PipelineError(
                f"{path}: a LoRA of rank {found} on {len(given)} modules, expected rank {expected} (lora.rank) on the "
                f"{len(own)} of lora.targets"
            )
        for layer in lora_layers(self.denoiser, ours).values():
            layer.lora_A[ours].weight.data.copy_(layer.lora_A[LOADED].weight)
            layer.lora_B[ours].weight.data.copy_(layer.lora_B[LOADED].weight)
            layer.lora_B[ours].weight.data *= layer.scaling[LOADED] / layer.scaling[ours]
        self.denoiser.set_adapter(ours)
        self.denoiser.delete_adapters(LOADED)

    def lora_targets(self, targets: str | Sequence[str]) -> tuple[str, ...]:
        """Module-name endings for a preset's name or a list of endings, each checked against the denoiser."""
        if isinstance(targets, str):
            if targets not in self.lora_presets:
                raise PipelineError(
                    f"unknown LoRA targets {targets!r}. Choices for {self.family}: "
                    f"{', '.join(sorted(self.lora_presets))}, or a list of module-name endings."
                )
            return self.lora_presets[targets]
        names = [name for name, _ in self.denoiser.named_modules()]
        for ending in targets:
            if not any(name == ending or name.endswith("." + ending) for name in names):
                raise PipelineError(f"LoRA target {ending!r} matches no module of the {self.family} denoiser")
        return tuple(targets)

    def save_lora(
        self,
        path: str | Path,
        naming: str = "diffusers",
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the LoRA as safetensors; returns the file.

        Args:
            path: folder, or a file that ends in `.safetensors`.
            naming: of its keys, one of `lora_namings`. dtype: of its tensors (default: as trained).
            metadata: more entries of the file's header.

        Raises:
            PipelineError: a naming without names for this family or one of its modules, or another dtype's overflow.
        """
        if naming not in self.lora_namings:
            choices = ", ".join(self.lora_namings)
            raise PipelineError(f"a LoRA of {self.family} cannot be written with {naming!r} names. Choices: {choices}.")
        component = type(self).denoiser_name  # also of a second expert, whose files have the first's name in diffusers
        adapter, config = next(iter(self.denoiser.peft_config.items()))
        layers = lora_layers(self.denoiser, adapter)
        weights = get_peft_model_state_dict(self.denoiser, adapter_name=adapter)
        kohya = naming == "kohya" or (naming == "comfyui" and "kohya" in self.lora_namings)
        tensors: dict[str, Tensor] = {}
        for key, weight in weights.items():
            module, _, kind = key.rpartition(".lora_")
            scale = float(layers[module].scaling[adapter])
            if naming == "diffusers":
                name = f"{component}.{key}"
            elif kind not in ("A.weight", "B.weight"):
                raise PipelineError(f"the LoRA's {key!r} (DoRA or a bias) has no place in a file with {naming} names")
            elif kohya:
                stem = f"lora_{component}_{module.replace('.', '_')}"
                name = f"{stem}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"
                tensors[f"{stem}.alpha"] = torch.tensor(scale * layers[module].r[adapter])
            else:
                name = f"{self._comfyui_name(module)}.lora_{kind}"
            folded = weight * scale if kind.startswith("B.") and not kohya else weight
            tensors[name] = folded.to(dtype).contiguous()
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise PipelineError(f"{len(bad)} tensors of the LoRA are not finite in {dtype}, such as {bad[0]}")
        header = {**self._lora_header([layer.r[adapter] for layer in layers.values()]), **(metadata or {})}
        if naming == "diffusers":  # peft's own description, in which alpha is now the rank, and sets have an order
            described = {**config.to_dict(), "lora_alpha": config.r, "alpha_pattern": config.rank_pattern}
            described["use_rslora"] = False
            described = {
                f"{component}.{key}": sorted(value) if isinstance(value, set | list) else value
                for key, value in described.items()
            }
            header[LORA_ADAPTER_METADATA_KEY] = json.dumps(described, indent=2, sort_keys=True)
        file = Path(path) if str(path).endswith(".safetensors") else Path(path) / LORA_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_serialised(tensors, header))  # safetensors' own files are readable by their owner alone
        return file

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Load a LoRA (folder, file or Hub id) through diffusers and make it active at `scale`.

        The names of diffusers, peft, kohya and what else diffusers converts; each module at its own alpha / rank.

        Raises:
            PipelineError: nothing there, a damaged file, or weights that do not all belong to what is loaded.
        """
        if LOADED in getattr(self.denoiser, "peft_config", {}):
            raise PipelineError(f"{path}: {self.source} already carries a LoRA that was loaded; unload it first")
        component = type(self).denoiser_name
        try:
            state = read_lora(path, component, {name for name, _ in self.denoiser.named_modules()})
            options = {"unet_config": self.denoiser.config} if component == "unet" else {}
            read = self.pipe.lora_state_dict(dict(state), **options)
            given, named = (
                [key for key in keys if not key.endswith(".alpha")]
                for keys in (state, read[0] if isinstance(read, tuple) else read)  # in diffusers' names
            )
            parts = {name: part for name, part in self.modules().items() if name.startswith("text_encoder")}
            parts[component] = self.denoiser
            if lost := [key for key in named if key.partition(".")[0] not in parts]:
                raise ValueError(
                    f"{len(lost)} of its tensors are for what is not loaded here, or have names that diffusers does "
                    f"not read for this family, such as {lost[0]!r}"
                )
            # Apart, as a fused qkv of kohya becomes three modules, which would hide a text encoder's that are dropped.
            for text in (True, False):
                before, after = ([key for key in keys if key.startswith(TEXT) == text] for keys in (given, named))
                if len(after) < len(before):
                    which = "text encoders'" if text else "other"
                    raise ValueError(
                        f"{len(before) - len(after)} of its {len(before)} {which} tensors are of unknown modules"
                    )
            if named and all(key.startswith(TEXT) for key in named):
                raise ValueError(
                    f"a LoRA of the text encoder alone, with nothing for the {component}, which is what LoRAs are of "
                    "here; fuse it into the text encoder with diffusers (load_lora_weights, fuse_lora, "
                    "save_pretrained), and name that folder as the model"
                )
            self.pipe.load_lora_weights(dict(state), adapter_name=LOADED, **self.lora_options)
            for name, part in parts.items():  # diffusers only logs tensors that do not fit
                wanted = sum(key.startswith(f"{name}.") for key in named)
                on = LOADED in getattr(part, "peft_config", {})
                taken = len(get_peft_model_state_dict(part, adapter_name=LOADED)) if on else 0
                if taken != wanted or (part is self.denoiser and not wanted):
                    raise ValueError(f"{taken} of its {wanted} {name} tensors fit")
        except Exception as error:  # diffusers, peft and torch each raise their own for keys and shapes that do not fit
            self.pipe.delete_adapters(LOADED)
            reason = " ".join("; ".join(str(error).split("\n")[:2]).split())[:1000]
            reason = reason or f"diffusers cannot convert it ({type(error).__name__})"
            raise PipelineError(f"{path}: this LoRA does not fit {self.family} ({self.source}): {reason}") from error
        for part in self.modules().values():
            for layer in lora_layers(part, LOADED).values():  # the strength is in the weights, whatever peft guessed
                layer.lora_alpha[LOADED], layer.scaling[LOADED] = layer.r[LOADED], 1.0
        self.pipe.set_adapters([LOADED], adapter_weights=[scale])

    def _comfyui_name(self, module: str) -> str:
        if not self.comfyui_names:
            return f"{type(self).denoiser_name}.{module}"  # which it reads for this family
        for pattern, replacement in self.comfyui_names.items():
            if re.fullmatch(pattern, module):
                return "diffusion_model." + re.sub(pattern, replacement, module)
        raise PipelineError(f"the LoRA's module {module!r} has no comfyui name")

    def lora_version(self) -> tuple[str, str]:
        """What a LoRA's header calls its base: ss_base_model_version (of sd-scripts) and modelspec.architecture."""
        return self.lora_base or (self.family, self.family)

    def _lora_header(self, ranks: Sequence[int]) -> dict[str, str]:
        """By which A1111, ComfyUI's managers and others know what a LoRA is for."""
        version, architecture = self.lora_version()
        kind = "flow" if self.flow else self.pipe.scheduler.config.get("prediction_type")
        rank = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"
        return {
            "format": "pt", "ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2")),
            "ss_sd_model_name": Path(self.source).name, "ss_network_module": "networks.lora",
            "ss_network_dim": rank, "ss_network_alpha": rank,
            "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{architecture}/lora",
            "modelspec.implementation": "diffusers", "modelspec.title": f"LoRA for {Path(self.source).name}",
            **({} if kind == "flow" else {"modelspec.prediction_type": "v" if kind == "v_prediction" else "epsilon"}),
        }  # fmt: skip


def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """The modules of a network that carry a LoRA of this name."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {name: layer for name, layer in layers if adapter in layer.lora_A}


def _serialised(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors file with an ordered header (safetensors' own is random), so that equal LoRAs are equal files."""
    content = save(dict(tensors))
    start = 8 + int.from_bytes(content[:8], "little")
    entries = {**json.loads(content[8:start]), "__metadata__": dict(sorted(header.items()))}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return len(text).to_bytes(8, "little") + text + content[start:]
