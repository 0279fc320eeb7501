"""T5 beside CLIP's segments, through a trained adapter (LaVi-Bridge, arXiv 2403.07860; LongAlign, arXiv 2410.11817).

    [CLIP's segments] [MLP(T5's hidden states of the whole prompt)]        along the sequence, CLIP first

Released code also attends to T5's padding; here a prompt has as many of these rows as it has tokens.

On their way to the denoiser both kinds are one sequence: rows are widened to the wider of the two, and one more channel
says which they are. So caches, masks, batches, guidance and the diffusers pipeline treat them like any embeddings, and
`narrow`, a hook on the denoiser, takes them apart. Without an adapter it masks T5's rows: that is the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoTokenizer, T5EncoderModel
from transformers.utils import cached_file

from pipelines.files import component_files, files_digest
from t2i_align.errors import UserError

if TYPE_CHECKING:
    from pipelines import TrainablePipeline

NAME = "t5_adapter"  # of the module on the denoiser
FILE = "t5_adapter.safetensors"
KEYS = {"t5_norm.weight", "t5_norm.bias", "t5_in.weight", "t5_in.bias", "t5_out.weight", "t5_out.bias"}
WIDENING = 3  # hidden width over T5's
DROPOUT = 0.1  # the authors'
MASK = "encoder_attention_mask"


class T5Adapter(nn.Module):
    """T5's hidden states [..., features] to the width of the denoiser's text [..., width].

    base: it belongs to the model that is trained or sampled, and is not what a run trains.
    """

    def __init__(self, features: int, width: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or WIDENING * features
        self.t5_norm = nn.LayerNorm(features)
        self.t5_in, self.t5_out = nn.Linear(features, hidden), nn.Linear(hidden, width)
        self.dropout, self.base = nn.Dropout(DROPOUT), False

    def forward(self, states: Tensor) -> Tensor:
        inner = nn.functional.gelu(self.t5_in(self.t5_norm(states.to(self.t5_norm.weight.dtype))))
        out: Tensor = self.t5_out(self.dropout(inner))
        return out


class T5:
    """A T5 encoder with its tokenizer, loaded when it is first asked.

    Raises:
        UserError: no T5 there.
    """

    def __init__(self, path: str, tokens: int) -> None:
        self.path, self.tokens = path, tokens
        self.model: Any = None
        try:
            config: Any = AutoConfig.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise UserError(f"model.segments.t5: {path}: no model there: {str(error).splitlines()[0]}") from error
        if config.model_type != "t5":
            raise UserError(f"model.segments.t5: {path}: expected a T5, found {config.model_type!r}")
        self.features = int(config.d_model)

    def fingerprint(self) -> str:
        """A hash of its files; of a Hub id, its commit."""
        if (folder := Path(self.path)).is_dir():
            return files_digest({file.name: file for file in component_files(folder)})
        return Path(str(cached_file(self.path, "config.json"))).parent.name

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], like: Tensor) -> list[Tensor]:
        """Hidden states of each prompt [L, features], cut to `tokens`, on the device and in the dtype of `like`."""
        if self.model is None:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.path)
            self.model = T5EncoderModel.from_pretrained(self.path, dtype=torch.float32).requires_grad_(False).eval()
        model = self.model.to(like.device)
        ids = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        ids = ids.to(like.device)
        with torch.autocast(like.device.type, enabled=False):  # its large states overflow half precision
            states = model(input_ids=ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
        return [row[mask.bool()].to(like.dtype) for row, mask in zip(states, ids.attention_mask, strict=True)]


def joined(clip: Sequence[Tensor], t5: Sequence[Tensor]) -> list[Tensor]:
    """CLIP's rows [L, width] and T5's [M, features] of each prompt as [L + M, wider + 1]: 1 in the last is T5's."""
    wider = max(clip[0].shape[-1], t5[0].shape[-1])

    def marked(rows: Tensor, mark: float) -> Tensor:
        return torch.cat([pad(rows, (0, wider - rows.shape[-1])), rows.new_full((len(rows), 1), mark)], dim=-1)

    return [torch.cat([marked(one, 0.0), marked(other, 1.0)]) for one, other in zip(clip, t5, strict=True)]


def narrow(denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the denoiser: its text as it reads it, T5's rows through the adapter, or masked where there is none."""
    text, width = kwargs["encoder_hidden_states"], denoiser.config.cross_attention_dim
    clip, of_t5 = text[..., :width], text[..., -1:] > 0.5
    adapter: T5Adapter | None = getattr(denoiser, NAME, None)
    if adapter is None:
        kwargs = {**kwargs, MASK: kwargs[MASK] * ~of_t5[..., 0]}
    else:
        features = adapter.t5_norm.normalized_shape[0]
        clip = torch.where(of_t5, adapter(text[..., :features]).to(clip.dtype), clip)
    return args, {**kwargs, "encoder_hidden_states": clip}


def attach(denoiser: Any, adapter: T5Adapter) -> None:
    """Put an adapter on a denoiser. Raises UserError where there is one."""
    if hasattr(denoiser, NAME):
        raise UserError("this denoiser has a T5 adapter already; remove it first")
    denoiser.add_module(NAME, adapter.to(next(denoiser.parameters()).device))


def save(denoiser: Any, folder: Path) -> Path:
    """Write the adapter into a folder; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    state = getattr(denoiser, NAME).state_dict()
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / FILE)
    return folder / FILE


def load(pipeline: TrainablePipeline, path: str | Path, *, base: bool = False) -> None:
    """Put a saved adapter on the denoiser, frozen. base: as a part of the model.

    Raises:
        UserError: the file holds something else, or does not fit the model or its T5.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such T5 adapter")
    state = load_file(file)
    if set(state) != KEYS:
        raise UserError(f"{file}: no T5 adapter; found {', '.join(sorted(state)[:3]) or 'nothing'}")
    (hidden, features), width = state["t5_in.weight"].shape, len(state["t5_out.weight"])
    t5, expected = pipeline_t5(pipeline), pipeline.denoiser.config.cross_attention_dim
    if (features, width) != (t5.features, expected):
        raise UserError(
            f"{file}: an adapter from a T5 of width {features} to {width}; {t5.path} is of width {t5.features}, and "
            f"the denoiser reads {expected}"
        )
    adapter = T5Adapter(features, width, hidden)
    adapter.load_state_dict(state)
    adapter.base, adapter.dropout.p = base, 0.0  # it is not trained
    attach(pipeline.denoiser, adapter.requires_grad_(False).eval())


def pipeline_t5(pipeline: TrainablePipeline) -> T5:
    """The T5 that encodes a pipeline's prompts. Raises UserError where none does."""
    t5: T5 | None = getattr(pipeline.long_prompts, "keywords", {}).get("t5")
    if t5 is None:
        raise UserError(
            "this adapter is for prompts that a T5 reads: the run's run.yaml, which names it in model.segments.t5, is "
            "not with it"
        )
    return t5
