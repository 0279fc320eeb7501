"""What captioners and perturbers share: genuine transformers models, loaded and asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t2i_align.errors import UserError
from t2i_align.inference.models import resolve_model
from t2i_align.inference.options import PRECISIONS, check_counts, check_precision, pick_device


class TextModel(ABC):
    """A model that writes texts: where its weights are from, and how it is asked.

    Args:
        path: folder or Hub id.
        what: "captioner" or "perturber", for messages.
        template: what the model is told; None for the subclass's own.
        revision: branch, tag or commit on the Hub.
        precision: of the weights. max_new_tokens: limit of each answer.

    Raises:
        UserError: no such model, one of another kind, or one that cannot be asked like this.
    """

    network: Any  # one of transformers' models

    def __init__(
        self,
        path: str,
        what: str,
        *,
        template: str | None = None,
        revision: str | None = None,
        precision: str = "fp32",
        device: str | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        check_precision(precision)
        check_counts(max_new_tokens=max_new_tokens)
        self.device, self.dtype = pick_device(device), PRECISIONS[precision]
        self.name, self.template, self.max_new_tokens = path, template, max_new_tokens
        try:
            self._load(resolve_model(path, what), revision=revision)
            self.network.to(self.device).eval().requires_grad_(False)
            self._try()
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # transformers, the Hub, tokenizers and chat templates each raise their own
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: cannot be used as a {what}: {type(error).__name__}: {reason}") from error

    @abstractmethod
    def _load(self, path: str, **options: Any) -> None:
        """Set `network` and what goes with it."""

    @abstractmethod
    def _try(self) -> None:
        """Ask once, so that what does not fit shows before the long work."""

    @torch.no_grad()
    def _generate(self, inputs: Mapping[str, Tensor], **how: Any) -> Tensor:
        """Answers as tokens [B, length]."""
        moved = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        return self.network.generate(**moved, max_new_tokens=self.max_new_tokens, **how)


def padded_in_front(tokenizer: Any) -> Any:
    """The tokenizer, padding so that answers follow their questions without a gap."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def one_line(text: str) -> str:
    """An answer as a caption: on one line, without quotation marks around it."""
    text = " ".join(text.split())
    for left, right in ('""', "''", "“”"):
        if len(text) > 1 and text[0] == left and text[-1] == right and left not in text[1:-1]:
            text = text[1:-1].strip()
    return text
