"""Soft tokens: a few trained vectors among the prompt's, with the denoiser itself frozen (SoftREPA, arXiv 2503.08250).

    UNet           [BOS, w_1 … w_m]  ->  [BOS, p_1 + q(t) … p_n + q(t), w_1 … w_m]    for the cross-attention
    joint (SD3)    [w_1 … w_m]       ->  [p_1 + q(t) … p_n + q(t), w_1 … w_m]         for each of the first blocks,
                                          with its own tokens, which are removed from its output

q is one vector for each of 100 bins of t. For UNets that read CLIP's hidden states (SD1.x, SD2.x, SDXL) and for SD3's
joint transformer, where tokens have the transformer's width, as the released ones do (the released code now trains 4096
wide ones before `context_embedder`: another start and effective rate). They live on the denoiser as a module and work
through hooks, so that the genuine diffusers pipeline generates with them. As in the released code all prompts get them,
also guidance's empty one. (There only some of a UNet's blocks do; here every block.)

Tokens cannot be inserted without effect: attention divides among them. In UNets copies of the BOS token, the authors'
start for SD1.5, change least: they only give it more weight. Remove soft tokens before a pipeline is saved as a whole.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_align.config import RunConfig
from t2i_align.errors import UserError

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from t2i_align.conditioning.personal import Embedding

NAME = "soft_tokens"  # of the module on the denoiser
FILE = "soft_tokens.safetensors"
KEYS = {"tokens", "times"}
BINS = 100
TIMES = 1000  # timesteps run to here
SPREAD = 0.02  # standard deviation at the start
JOINT_BLOCKS = 5  # so many of a joint transformer's blocks get tokens

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class SoftTokens(nn.Module):
    """n tokens of the text's width for each of `blocks` places, and what each bin of time adds to all of a place's."""

    def __init__(self, n_tokens: int, width: int, blocks: int = 1, bins: int = BINS) -> None:
        super().__init__()
        self.tokens = nn.Parameter(SPREAD * torch.randn(blocks, n_tokens, width))
        self.times = nn.Parameter(SPREAD * torch.randn(blocks, bins, width))
        self.hooks: list[Any] = []
        self.now: Tensor | None = None  # the denoiser's timesteps, which its blocks do not receive

    def forward(self, embeds: Tensor, timesteps: Tensor, block: int = 0, after: int = 1) -> Tensor:
        """Embeddings [B, L, width] and timesteps [B] or one, to [B, L + n, width]; tokens follow the first `after`."""
        bins = self.times.shape[1]
        at = (timesteps.to(self.times.device) * bins / TIMES).long().clamp(0, bins - 1)
        soft = (self.tokens[block] + self.times[block, at.expand(len(embeds))].unsqueeze(1)).to(embeds.dtype)
        return torch.cat([embeds[:, :after], soft, embeds[:, after:]], dim=1)

    # Hooks. They are methods, so that a copy of the denoiser has its own tokens inserted.

    def note_time(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the timesteps that the denoiser is called with."""
        self.now = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])

    def insert(self, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments of a UNet, or of a joint transformer's block, with the tokens in the text."""
        assert self.now is not None
        after = int(isinstance(module, UNet2DConditionModel))  # its BOS stays in front
        if (text := kwargs.get("encoder_hidden_states")) is not None:
            return args, {**kwargs, "encoder_hidden_states": self(text, self.now, block, after)}
        place = 1 + after  # by position, as under gradient checkpointing: image, (timestep,) text, ...
        return (*args[:place], self(args[place], self.now, block, after), *args[place + 1 :]), kwargs

    def cut(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """A joint transformer block's output without the tokens."""
        text, image = output
        return text[:, self.tokens.shape[1] :], image


class SoftTokensAdapter:
    """Soft tokens as a run trains, saves and loads them."""

    def install(
        self, pipeline: TrainablePipeline, config: RunConfig, unreached: Set[str], embedding: Embedding | None
    ) -> None:
        assert config.soft_tokens is not None
        bos = None
        if config.soft_tokens.start == "bos":  # causal: the text after it has no influence
            bos = pipeline.load_encoders().encode_prompts(["a"])["prompt_embeds"][0, 0]
        install(pipeline.denoiser, config.soft_tokens.count, initial=bos)

    def save(self, pipeline: TrainablePipeline, folder: Path, dtype: torch.dtype | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        state = getattr(pipeline.denoiser, NAME).state_dict()
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / FILE)
        return folder / FILE

    def recognises(self, keys: Set[str]) -> bool:
        return keys == KEYS

    def installed(self, pipeline: TrainablePipeline) -> bool:
        return hasattr(pipeline.denoiser, NAME)

    def load(self, pipeline: TrainablePipeline, path: str | Path, *, scale: float = 1.0) -> None:
        """Put saved soft tokens on the denoiser, replacing any that are there.

        Raises:
            UserError: the file holds something else, or tokens of another width or number of blocks.
        """
        state = load_file(path)
        if set(state) != KEYS:
            raise UserError(f"{path}: no soft tokens; found {', '.join(sorted(state)) or 'nothing'}")
        blocks, n_tokens, width = state["tokens"].shape
        if (width, blocks) != (expected := layout(pipeline.denoiser)):
            raise UserError(
                f"{path}: these soft tokens are of width {width} for {blocks} places in the denoiser; "
                f"this model's would be of width {expected[0]} for {expected[1]}"
            )
        if self.installed(pipeline):
            self.remove(pipeline)
        soft = install(pipeline.denoiser, n_tokens, bins=state["times"].shape[1])
        soft.load_state_dict(state)

    def remove(self, pipeline: TrainablePipeline) -> None:
        for hook in getattr(pipeline.denoiser, NAME).hooks:
            hook.remove()
        delattr(pipeline.denoiser, NAME)


def install(denoiser: Any, n_tokens: int = 4, *, initial: Tensor | None = None, bins: int = BINS) -> SoftTokens:
    """Put fresh soft tokens on a denoiser and freeze everything else in it.

    Args:
        initial: one embedding [width] that all of a UNet's tokens start from, exactly: BOS's, as in the authors' run
            on SD1.5.

    Raises:
        UserError: the denoiser already has soft tokens, or none are made for its kind.
    """
    if hasattr(denoiser, NAME):
        raise UserError("this denoiser has soft tokens already; remove them first")
    width, blocks = layout(denoiser)
    soft = SoftTokens(n_tokens, width, blocks, bins)
    joint = isinstance(denoiser, SD3Transformer2DModel)
    if initial is not None:
        if joint:
            raise UserError("soft_tokens.start 'bos' is for UNets; with SD3 set soft_tokens.start=random")
        soft.tokens.data.copy_(initial.expand_as(soft.tokens))
        soft.times.data.zero_()
    denoiser.requires_grad_(False)
    # Trained, so in single precision whatever the frozen weights are in.
    denoiser.add_module(NAME, soft.to(next(denoiser.parameters()).device))
    soft.hooks = [denoiser.register_forward_pre_hook(soft.note_time, with_kwargs=True)]
    for number, module in enumerate(denoiser.transformer_blocks[:blocks] if joint else [denoiser]):
        soft.hooks.append(module.register_forward_pre_hook(partial(soft.insert, number), with_kwargs=True))
        if joint:
            soft.hooks.append(module.register_forward_hook(soft.cut))
    return soft


def layout(denoiser: Any) -> tuple[int, int]:
    """Width of the tokens, and at how many places they are inserted.

    Raises:
        UserError: neither a UNet with cross-attention nor SD3's transformer.
    """
    if isinstance(denoiser, SD3Transformer2DModel):
        return int(denoiser.inner_dim), min(JOINT_BLOCKS, len(denoiser.transformer_blocks) - 1)  # the last drops text
    if isinstance(denoiser, UNet2DConditionModel):
        return int(denoiser.config.cross_attention_dim), 1
    raise UserError(
        f"soft_tokens: for the UNets of SD and SDXL and for SD3's transformer, not for {type(denoiser).__name__}"
    )
