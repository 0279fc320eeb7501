"""Soft tokens: a few trained vectors among the prompt's, with the denoiser itself frozen (SoftREPA, arXiv 2503.08250).

    UNet           [BOS, w_1 … w_m]  ->  [BOS, p_1 + q(t) … p_n + q(t), w_1 … w_m]    for the cross-attention
    joint (SD3)    [w_1 … w_m]       ->  [p_1 + q(t) … p_n + q(t), w_1 … w_m]         for each of the first blocks,
                                          with tokens of its own that go in front of its text and are taken off after

q is one vector for each of 100 bins of t. For UNets that read CLIP's hidden states (SD1.x, SD2.x, SDXL) and for SD3's
joint transformer, whose tokens are of the transformer's own width. They live on the denoiser as a module and work
through hooks, so that the genuine diffusers pipeline generates with them. As in the released code all prompts get them,
the empty one of guidance too. (There only some of a UNet's blocks do; here every block.)

Tokens cannot be inserted without effect: attention divides among them. For UNets the least is done by copies of the BOS
token, the authors' start for SD1.5, which only give it more weight; give `initial` for that. They have a file of their
own: `remove` them before a pipeline is saved as a whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_align.errors import UserError

NAME = "soft_tokens"  # of the module on the denoiser
FILE = "soft_tokens.safetensors"
KEYS = {"tokens", "times"}
BINS = 100
TIMES = 1000  # timesteps run to here
SPREAD = 0.02  # standard deviation at the start
JOINT_BLOCKS = 5  # so many of a joint transformer's blocks get tokens


class SoftTokens(nn.Module):
    """n tokens of the text's width for each of `blocks` places, and what each bin of time adds to all of a place's."""

    def __init__(self, n_tokens: int, width: int, blocks: int = 1, bins: int = BINS) -> None:
        super().__init__()
        self.tokens = nn.Parameter(SPREAD * torch.randn(blocks, n_tokens, width))
        self.times = nn.Parameter(SPREAD * torch.randn(blocks, bins, width))
        self.hooks: list[Any] = []
        self.now: Tensor | None = None  # a joint transformer's timesteps, which its blocks are not told

    def forward(self, embeds: Tensor, timesteps: Tensor, block: int = 0, after: int = 1) -> Tensor:
        """Embeddings [B, L, width] and timesteps [B] or one, to [B, L + n, width]; tokens stand `after` so many."""
        bins = self.times.shape[1]
        at = (timesteps.to(self.times.device) * bins / TIMES).long().clamp(0, bins - 1)
        soft = (self.tokens[block] + self.times[block, at.expand(len(embeds))].unsqueeze(1)).to(embeds.dtype)
        return torch.cat([embeds[:, :after], soft, embeds[:, after:]], dim=1)


def install(denoiser: Any, n_tokens: int = 4, *, initial: Tensor | None = None) -> SoftTokens:
    """Put fresh soft tokens on a denoiser and freeze everything else in it.

    Args:
        initial: one embedding [width] that all of a UNet's tokens start from, exactly: BOS's, as in the authors' run
            on SD1.5.

    Raises:
        UserError: the denoiser has soft tokens already, or is of a kind that they are not made for.
    """
    if hasattr(denoiser, NAME):
        raise UserError("this denoiser has soft tokens already; remove them first")
    width, blocks = layout(denoiser)
    soft = SoftTokens(n_tokens, width, blocks)
    joint = isinstance(denoiser, SD3Transformer2DModel)
    if initial is not None:
        if joint:
            raise UserError("soft_tokens.start 'bos' is for UNets; with SD3 set soft_tokens.start=random")
        soft.tokens.data.copy_(initial.expand_as(soft.tokens))
        soft.times.data.zero_()
    denoiser.requires_grad_(False)
    # Trained, so in single precision whatever the frozen weights are in.
    denoiser.add_module(NAME, soft.to(next(denoiser.parameters()).device))
    if not joint:
        soft.hooks = [denoiser.register_forward_pre_hook(_insert, with_kwargs=True)]
        return soft
    soft.hooks = [denoiser.register_forward_pre_hook(_note_time, with_kwargs=True)]
    for number, block in enumerate(denoiser.transformer_blocks[:blocks]):
        around = _AroundBlock(soft, number)
        soft.hooks.append(block.register_forward_pre_hook(around.put, with_kwargs=True))
        soft.hooks.append(block.register_forward_hook(around.take))
    return soft


def layout(denoiser: Any) -> tuple[int, int]:
    """Width of the tokens, and at how many places they go in.

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


def remove(denoiser: nn.Module) -> None:
    """Take the soft tokens off again; the denoiser is then as it was."""
    for hook in getattr(denoiser, NAME).hooks:
        hook.remove()
    delattr(denoiser, NAME)


def save(denoiser: nn.Module, path: str | Path) -> Path:
    """Write a denoiser's soft tokens as safetensors; returns the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in getattr(denoiser, NAME).state_dict().items()},
        path,
    )
    return path


def load(denoiser: Any, path: str | Path) -> SoftTokens:
    """Put saved soft tokens on a denoiser, in the place of any that are there.

    Raises:
        UserError: the file holds something else, or tokens of another width or number of blocks.
    """
    state = load_file(path)
    if set(state) != KEYS:
        raise UserError(f"{path}: no soft tokens; found {', '.join(sorted(state)) or 'nothing'}")
    blocks, n_tokens, width = state["tokens"].shape
    if (width, blocks) != (expected := layout(denoiser)):
        raise UserError(
            f"{path}: these soft tokens are of width {width} for {blocks} places in the denoiser; "
            f"this model's would be of width {expected[0]} for {expected[1]}"
        )
    if hasattr(denoiser, NAME):
        remove(denoiser)
    soft = install(denoiser, n_tokens)
    soft.times.data = soft.times.data.new_empty(state["times"].shape)
    soft.load_state_dict(state)
    return soft


def _insert(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The denoiser's arguments with the soft tokens inserted. It knows no tokens but its own, so copies keep theirs."""
    timesteps = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1])
    embeds = kwargs.get("encoder_hidden_states")
    if embeds is None:
        raise TypeError("with soft tokens, the denoiser takes encoder_hidden_states as a keyword argument")
    return args, {**kwargs, "encoder_hidden_states": getattr(denoiser, NAME)(embeds, timesteps)}


def _note_time(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    getattr(denoiser, NAME).now = kwargs["timestep"]


class _AroundBlock:
    """Puts a block's soft tokens in front of its text, and takes them off what it returns."""

    def __init__(self, soft: SoftTokens, number: int) -> None:
        self.soft, self.number = soft, number

    def put(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self.soft.now is not None
        if args:  # under gradient checkpointing the block is called by position: image, text, ...
            image, text, *rest = args
            return (image, self.soft(text, self.soft.now, self.number, after=0), *rest), kwargs
        text = self.soft(kwargs["encoder_hidden_states"], self.soft.now, self.number, after=0)
        return args, {**kwargs, "encoder_hidden_states": text}

    def take(self, block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        text, image = output
        return text[:, self.soft.tokens.shape[1] :], image
