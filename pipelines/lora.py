"""LoRA on the denoiser: added by peft, saved and loaded by diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from pipelines.base import Family, PipelineError

LORA_FILE = "pytorch_lora_weights.safetensors"
LOADED = "lora"  # the name of a loaded adapter; one that was trained here has peft's "default"
# Module-name endings that families share in their presets.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
TEXT_FEED_FORWARD = ("ff_context.net.0.proj", "ff_context.net.2")


class LoRAMixin(Family):
    def add_lora(
        self, *, rank: int, alpha: float, dropout: float, targets: str | Sequence[str], init: str | None = None
    ) -> None:
        """Put a trainable LoRA (arXiv 2106.09685) on the denoiser; B starts at zero, so nothing changes yet.

        init: a saved LoRA of the same modules and rank that it starts from instead, at that one's strength.
        """
        modules: Any = {"target_modules": list(self.lora_targets(targets)), "lora_alpha": alpha}
        self.denoiser.add_adapter(LoraConfig(r=rank, lora_dropout=dropout, **modules))
        if init is not None:
            self._start_lora(init)

    def _start_lora(self, path: str) -> None:
        ours = next(iter(self.denoiser.peft_config))
        self.load_lora(path)
        layers: dict[str, Any] = {n: m for n, m in self.denoiser.named_modules() if isinstance(m, LoraLayer)}
        own, given = ({n: m.r[name] for n, m in layers.items() if name in m.r} for name in (ours, LOADED))
        if own != given:
            found, expected = (" and ".join(map(str, sorted({*ranks.values()}))) for ranks in (given, own))
            raise PipelineError(
                f"{path}: a LoRA of rank {found} on {len(given)} modules, expected rank {expected} (lora.rank) on the "
                f"{len(own)} of lora.targets"
            )
        for layer in layers.values():
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

    def save_lora(self, directory: str | Path, naming: str = "diffusers") -> Path:
        """Write the LoRA as safetensors, with rank and alpha; returns the file.

        naming: of its keys. "diffusers" works for all families; "kohya", which other tools read, for those with a UNet.
        """
        if naming not in self.lora_namings:
            choices = ", ".join(self.lora_namings)
            raise PipelineError(f"a LoRA of {self.family} cannot be written with {naming!r} names. Choices: {choices}.")
        component = type(self).denoiser_name  # also of a second expert, whose files have the first's name in diffusers
        adapter, lora = next(iter(self.denoiser.peft_config.items()))
        weights = get_peft_model_state_dict(self.denoiser, adapter_name=adapter)
        file = Path(directory) / LORA_FILE
        if naming == "diffusers":
            layers, metadata = f"{component}_lora_layers", f"{component}_lora_adapter_metadata"
            type(self.pipe).save_lora_weights(str(directory), **{layers: weights, metadata: lora.to_dict()})
            return file
        named = convert_state_dict_to_kohya({f"{component}.{key}": value for key, value in weights.items()})
        # diffusers writes alpha = rank whatever alpha is, so that the LoRA would come back at another strength.
        named |= {key: torch.tensor(float(lora.lora_alpha)) for key in named if key.endswith(".alpha")}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in named.items()}, file)
        return file

    def load_lora(self, path: str | Path, *, scale: float = 1.0) -> None:
        """Load a LoRA (folder, file or Hub id) through diffusers and make it active at `scale`.

        Raises:
            PipelineError: nothing there, a damaged file, or weights that do not all belong to this denoiser.
        """
        local, component = Path(path), type(self).denoiser_name
        if local.is_dir() and not list(local.glob("*.safetensors")):
            raise PipelineError(f"{path}: no .safetensors file with LoRA weights in this folder")
        if LOADED in getattr(self.denoiser, "peft_config", {}):
            raise PipelineError(f"{path}: {self.source} already carries a LoRA that was loaded; unload it first")
        try:
            read = self.pipe.lora_state_dict(str(path))
            self.pipe.load_lora_weights(str(path), adapter_name=LOADED, **self.lora_options)
            # diffusers only logs a warning for keys that do not fit.
            keys = read[0] if isinstance(read, tuple) else read
            given = sum(key.startswith(f"{component}.") for key in keys)
            on = LOADED in getattr(self.denoiser, "peft_config", {})
            taken = len(get_peft_model_state_dict(self.denoiser, adapter_name=LOADED)) if on else 0
            if not given or taken != given:
                raise ValueError(f"{taken} of its {given} {component} tensors fit")
        except Exception as error:  # diffusers, peft and torch each raise their own for keys and shapes that do not fit
            self.denoiser.delete_adapters(LOADED)
            reason = " ".join("; ".join(str(error).split("\n")[:2]).split())[:300]
            raise PipelineError(f"{path}: this LoRA does not fit {self.family} ({self.source}): {reason}") from error
        self.pipe.set_adapters([LOADED], adapter_weights=[scale])
