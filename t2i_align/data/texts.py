"""Texts of groups: encoded once each, compared as the encoders read them, and gathered for a batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from t2i_align.data.encode import Encoder, Row
from t2i_align.data.schema import COLUMNS, Column, Conditioning, Group

if TYPE_CHECKING:  # only entry points import `pipelines` at run time
    from pipelines import TrainablePipeline
    from t2i_align.data.store import Store

logger = logging.getLogger(__name__)


class Texts:
    """Encodes each text when it is met for the first time.

    known: those met before, which this or another process stores. unusable: those whose encoding is not finite.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.known, self.unusable = set[str](), set[str]()

    def encode_new(self, texts: Sequence[str]) -> list[Row]:
        """Rows of the texts that are new and can be encoded."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known and text not in self.unusable]
        rows = dict(zip(new, self.encoder.encode_texts(new), strict=True))
        self.unusable.update(text for text, row in rows.items() if row is None)
        self.known.update(rows.keys() - self.unusable)
        return [row for row in rows.values() if row is not None]

    def checked(self, group: Group, row: Row | str) -> Row | str:
        """The row of a group, or all reasons why it cannot be used."""
        bad = [text for text in group.texts if text in self.unusable]
        reasons = [f"the embedding of {text!r} is not finite in half precision" for text in bad]
        return "; ".join([*([row] if isinstance(row, str) else []), *reasons]) or row


def warn_of_cut_texts(pipeline: TrainablePipeline, texts: Sequence[str]) -> None:
    """Log how many texts are longer than the encoders read."""
    names: dict[tuple[int, int], list[str]] = {}
    for (name, limit), tokens in pipeline.tokenize(texts).items():
        names.setdefault((sum(len(ids) > limit for ids in tokens), limit), []).append(name)
    for (count, limit), tokenizers in names.items():
        if count:
            message = "%d of %d texts are longer than %d tokens (%s); what is beyond is not read"
            logger.warning(message, count, len(texts), limit, ", ".join(tokenizers))


def texts_alike(store: Store, columns: Sequence[Column]) -> np.ndarray:
    """Which groups have texts that the encoder cannot tell apart.

    columns: of texts, each compared with the prompt, or those of the best and of the worst candidate.
    """
    alike = np.zeros(len(store), bool)
    for column in columns:
        numbers = store.index[column.name]
        if not column.per_candidate:
            alike |= np.from_dlpack(numbers) == np.from_dlpack(store.index["prompt"])
            continue
        lengths = np.from_dlpack(numbers.value_lengths())
        ends, several = np.cumsum(lengths), lengths > 1
        flat = np.from_dlpack(numbers.flatten())
        alike[several] |= flat[(ends - lengths)[several]] == flat[(ends - 1)[several]]
        for number in np.flatnonzero(alike & several).tolist():  # candidates may share a text
            group, row = store.locate(number)
            texts = group[column.name][row].as_py()
            alike[number] = texts[0] != texts[-1]
    return alike


def encode_fields(
    encode: Callable[[Sequence[Any]], Conditioning], prompts: Sequence[Any], columns: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields `conditioning` and `columns` of a batch: texts, [B] or [B][k], become their conditioning.

    All are encoded together, so that their sequences are padded alike.
    """
    texts = {name: values for name, values in columns.items() if COLUMNS[name].text}
    if not texts:
        return {"conditioning": encode(prompts), "columns": columns}
    shapes = [np.shape(values) for values in (prompts, *texts.values())]
    encoded = encode([text for values in (prompts, *texts.values()) for text in np.ravel(values).tolist()])
    parts = {name: tensor.split([math.prod(shape) for shape in shapes]) for name, tensor in encoded.items()}
    fields = [
        {name: part[place].unflatten(0, shape) for name, part in parts.items()} for place, shape in enumerate(shapes)
    ]
    return {"conditioning": fields[0], "columns": {**columns, **dict(zip(texts, fields[1:], strict=True))}}


def widened(value: Any, device: torch.device) -> Any:
    """Tensors, also those in a dict, on the device; floats cross to it as they are and become float32 there."""
    if isinstance(value, dict):
        return {name: widened(one, device) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    moved = value.to(device, non_blocking=True)
    return moved.float() if moved.is_floating_point() else moved
