"""A branch of attention that reads a user's preference embedding u (PPD, arXiv 2501.06655).

    softmax(Q K^T / sqrt d) V + scale softmax(Q K_u^T / sqrt d) V_u,    K_u = u W'_k,  V_u = u W'_v

beside each attention of the image to the text, with its own queries: a UNet's cross-attentions, where this is
IP-Adapter's decoupled cross-attention (arXiv 2308.06721), and the joint attentions of SD3's and FLUX's transformers, of
FLUX's those of its blocks with two streams. W'_v starts at zero and nothing has a bias, so that training starts at the
base model exactly, and a user of zeros is no user.

u is a few tokens that an encoder here makes of an embedder's rows of features (see `preferences`). It may first learn
to tell users apart (`tell_apart`), which the denoiser's loss teaches it slowly. All of it is a module on the denoiser
that works through hooks, so that the genuine diffusers pipeline generates with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_align.conditioning.config import USER
from t2i_align.errors import UserError

NAME = "personal"  # of the module on the denoiser
FILE = "personal.safetensors"
HEADER = "t2i_align.personal"  # the entry of the file's metadata
TEMPERATURE, RATE, USERS_AT_ONCE = 0.1, 3e-3, 64  # of `tell_apart`


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What an embedder makes of examples, and how it is encoded.

    embedder, version: its spec, and what identifies its weights. together: how many examples it reads at once.
    features: of a row. rows: at most, of a user. layers, pool: see `PersonalConfig`. tokens, width: of the encoder.
    """

    embedder: str
    version: str
    together: int
    features: int
    rows: int
    tokens: int | None
    width: int
    layers: tuple[int, ...] | None = None
    pool: str = "none"


class Encoder(nn.Module):
    """Rows of features [B, N, features], zeros where there are none, to tokens [B, T, width].

    With `tokens`, each token pools all rows by an attention of its own: their order has no influence, and their number
    is free. Without, each row is a token. Where there are no rows, tokens are zeros.
    """

    def __init__(self, features: int, width: int, tokens: int | None) -> None:
        super().__init__()
        self.tokens = tokens
        self.hidden = nn.Linear(features, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width * (tokens or 1), bias=False)
        if tokens:
            self.weigh = nn.Linear(features, tokens, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        present = rows.abs().amax(-1, keepdim=True) > 0  # [B, N, 1]
        values = self.out(torch.tanh(self.hidden(rows)))
        if self.tokens:
            weights = self.weigh(rows).float().masked_fill(~present, -1e4).softmax(1)
            weights = (weights * present).to(values.dtype)
            values = torch.einsum("bnt,bntw->btw", weights, values.unflatten(-1, (self.tokens, -1)))
            present = present.any(1, keepdim=True)
        return F.layer_norm(values, values.shape[-1:]) * present


def tell_apart(
    encoder: Encoder, histories: Mapping[str, Tensor], draw: tuple[int, int], *, steps: int, seed: int
) -> float | None:
    """Train an encoder so that disjoint draws of one user's entries are alike and those of two users are not.

    InfoNCE (arXiv 1807.03748) over up to USERS_AT_ONCE users: of e_i and e'_i from two draws of user i,

        loss = -mean log softmax_j(cos(e_i, e'_j) / TEMPERATURE)_i,  both ways

    Args:
        histories: entries [n, rows, features] by user. draw: how many entries make an embedding, fewest and most.
        steps: of AdamW. seed: of the draws; on the CPU, so that all processes get the same encoder.

    Returns the last loss; None where fewer than two users have entries for two draws, and nothing is learned.
    """
    fewest, most = draw
    own = [rows.float() for _, rows in sorted(histories.items()) if len(rows) >= 2 * fewest]
    if len(own) < 2:
        return None
    device, generator = next(encoder.parameters()).device, torch.Generator().manual_seed(seed)
    encoder.cpu()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        users = [own[i] for i in torch.randperm(len(own), generator=generator)[:USERS_AT_ONCE].tolist()]
        count = int(torch.randint(fewest, most + 1, (), generator=generator))
        draws: tuple[list[Tensor], list[Tensor]] = ([], [])
        for rows in users:
            order = torch.randperm(len(rows), generator=generator)
            taken = min(count, len(rows) // 2)
            for part, places in zip(draws, (order[:taken], order[taken : 2 * taken]), strict=True):
                part.append(rows[places].flatten(0, 1))
        first, second = (
            F.normalize(tokens.flatten(1) if encoder.tokens else tokens.mean(1), dim=-1)
            for tokens in (encoder(nn.utils.rnn.pad_sequence(part, batch_first=True)) for part in draws)
        )
        alike = first @ second.T / TEMPERATURE
        loss = (F.cross_entropy(alike, right := torch.arange(len(users))) + F.cross_entropy(alike.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.to(device).zero_grad()
    return loss.item()


class Personal(nn.Module):
    """The encoder and the projections W'_k, W'_v of each place, and the user that is served.

    scale: of the branch. off: the denoiser is its base model. tokens: of the user of each row of the batch, [B, T, w].
    """

    def __init__(self, embedding: Embedding, places: Mapping[str, int]) -> None:
        super().__init__()
        self.embedding, self.places = embedding, list(places)
        self.encoder = Encoder(embedding.features, embedding.width, embedding.tokens)
        # Other names than the denoiser's own, which a LoRA may be put on.
        self.user_k = nn.ModuleList([nn.Linear(embedding.width, inner, bias=False) for inner in places.values()])
        self.user_v = nn.ModuleList([nn.Linear(embedding.width, inner, bias=False) for inner in places.values()])
        for parameter in self.user_v.parameters():
            nn.init.zeros_(parameter)
        self.scale, self.off = 1.0, False
        self.served: tuple[Tensor, bool] | None = None  # see `serving`
        self.tokens: Tensor | None = None
        self.queries: dict[int, Tensor] = {}
        self.hooks: list[Any] = []
        self.hooked: list[int] = []

    # Hooks. They are methods, so that a copy of the denoiser has its own branch.

    def begin(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the users' rows out of the denoiser's arguments, and encode them."""
        kwargs = dict(kwargs)
        rows = kwargs.pop(USER, None)
        self.tokens, self.queries = None, {}
        if not self.off and rows is not None:
            self.tokens = self.encoder(rows)
        elif not self.off and self.served is not None:
            tokens, guided = self.served
            sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            count = len(sample) // 2 if guided else len(sample)
            self.tokens = tokens.expand(count, -1, -1)
            if guided:  # the pipeline's order: without the prompt first
                self.tokens = torch.cat([torch.zeros_like(self.tokens), self.tokens])
        self.attach(denoiser)
        return args, kwargs

    def attach(self, denoiser: nn.Module) -> None:
        """Hook the projections that attentions have now: a LoRA that is put on or taken off replaces them."""
        attentions: list[Any] = [denoiser.get_submodule(place) for place in self.places]
        now = [id(layer) for attention in attentions for layer in (attention.to_q, attention.to_out[0])]
        if now == self.hooked:
            return
        for hook in self.hooks[1:]:
            hook.remove()
        del self.hooks[1:]
        for number, attention in enumerate(attentions):
            self.hooks.append(attention.to_q.register_forward_hook(partial(self.note, number)))
            add = partial(self.add, number, attention.heads, attention.norm_q)
            self.hooks.append(attention.to_out[0].register_forward_pre_hook(add))
        self.hooked = now

    def note(self, number: int, module: nn.Module, args: Any, query: Tensor) -> None:
        """Keep the queries of a place."""
        if self.tokens is not None:
            self.queries[number] = query

    def add(self, number: int, heads: int, norm: nn.Module | None, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """The attention's result with the branch's."""
        if self.tokens is None:
            return None
        hidden, query = args[0], self.queries.pop(number)
        key, value = self.user_k[number](self.tokens), self.user_v[number](self.tokens)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
        query = query if norm is None else norm(query)
        out = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype))
        return (hidden + self.scale * out.transpose(1, 2).flatten(2).to(hidden.dtype), *args[1:])


@contextmanager
def serving(denoiser: Any, tokens: Tensor | None, *, guided: bool, scale: float = 1.0) -> Iterator[None]:
    """Sample for one user inside the block, also with the diffusers pipeline itself.

    Args:
        tokens: of the user, [T, width], as `Personal.encoder` makes them; None: no user.
        guided: whether the pipeline guides, and so calls the denoiser with each sample twice, first without its
            prompt: those have no user either.
        scale: of the branch.
    """
    personal: Personal = getattr(denoiser, NAME)
    before = personal.served, personal.scale
    own = next(personal.parameters())
    personal.served = None if tokens is None else (tokens.unsqueeze(0).to(own.device, own.dtype), guided)
    personal.scale = scale
    try:
        yield
    finally:
        personal.served, personal.scale = before
        personal.tokens = None


def places(denoiser: Any) -> dict[str, int]:
    """The attentions of the image to the text by name, with the width of their queries.

    Raises:
        UserError: neither a UNet with cross-attention nor the transformer of SD3 or FLUX.
    """
    if isinstance(denoiser, UNet2DConditionModel):
        return {name: m.inner_dim for name, m in denoiser.named_modules() if name.endswith(".attn2")}
    if isinstance(denoiser, SD3Transformer2DModel | FluxTransformer2DModel):
        blocks = denoiser.transformer_blocks
        return {f"transformer_blocks.{number}.attn": block.attn.inner_dim for number, block in enumerate(blocks)}
    raise UserError(
        f"personal: for UNets of SD and SDXL and transformers of SD3 and FLUX, not for {type(denoiser).__name__}"
    )


def install(pipeline: Any, embedding: Embedding) -> Personal:
    """Put a fresh branch, in float32, on a pipeline's denoiser.

    Raises:
        UserError: the denoiser has one already, or none is made for its kind.
    """
    denoiser = pipeline.denoiser
    if hasattr(denoiser, NAME):
        raise UserError("this denoiser has a personal branch already; remove it first")
    personal = Personal(embedding, places(denoiser))
    denoiser.add_module(NAME, personal.to(next(denoiser.parameters()).device))
    personal.hooks = [denoiser.register_forward_pre_hook(personal.begin, with_kwargs=True)]
    pipeline.adapter_inputs = (USER,)
    return personal


def remove(pipeline: Any) -> None:
    """Take the branch off; the denoiser is then as it was."""
    for hook in getattr(pipeline.denoiser, NAME).hooks:
        hook.remove()
    delattr(pipeline.denoiser, NAME)
    pipeline.adapter_inputs = ()


def save(denoiser: Any, folder: Path) -> Path:
    """Write the branch as safetensors, its embedding in the header; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    personal: Personal = getattr(denoiser, NAME)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in personal.state_dict().items()}
    save_file(state, folder / FILE, {HEADER: json.dumps(asdict(personal.embedding))})
    return folder / FILE


def read(path: str | Path) -> tuple[Embedding, dict[str, Tensor]]:
    """What a saved branch was trained with, and its tensors. Raises UserError for another file."""
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(HEADER)
        if header is None:
            raise UserError(f"{path}: no personal branch: its header lacks {HEADER!r}")
        values = json.loads(header)
        layers = values.pop("layers")
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        return Embedding(**values, layers=layers and tuple(layers)), state


def load(pipeline: Any, path: str | Path) -> Personal:
    """Put a saved branch on a denoiser. Raises UserError where it does not fit."""
    embedding, state = read(path)
    personal = install(pipeline, embedding)
    own = {name: tuple(tensor.shape) for name, tensor in personal.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if own != given:
        remove(pipeline)
        name = min(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise UserError(
            f"{path}: this personal branch is for another model: {name} is {given.get(name)}, expected {own.get(name)}"
        )
    personal.load_state_dict(state)
    return personal.requires_grad_(False).eval()
