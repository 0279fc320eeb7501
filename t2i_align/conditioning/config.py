"""The configuration of what conditions a model beside its own encoding; needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from t2i_align.errors import UserError
from t2i_align.utils.settings import Count, Int, Share, UserPath, Whole, settings

if TYPE_CHECKING:
    from t2i_align.config import RunConfig


USER = "user"  # the name of the users' rows of features in the conditioning


@settings
class SegmentsConfig:
    """Prompts of any length, encoded in segments (LongAlign, arXiv 2410.11817; see `conditioning.segments`).

    tokens: a prompt's sequence is padded to a multiple of it. bos, eos: the start and end tokens that are kept, of
    `each` segment, of the `first` or `last`, or of `none`. pooled: SDXL's pooled vector, the segments' `mean` or the
    `first` one's. t5: a T5 (folder or Hub id) that reads up to `tokens` of the whole prompt beside CLIP, through an
    adapter (`conditioning.t5`). adapter: a trained one, which is then part of the model; null: the run trains one.
    """

    tokens: Count = 240
    bos: Literal["each", "first", "none"] = "each"
    eos: Literal["each", "last", "none"] = "none"
    pooled: Literal["mean", "first"] = "mean"
    t5: str | None = None
    adapter: UserPath | None = None

    def __post_init__(self) -> None:
        if self.adapter and not self.t5:
            raise UserError("model.segments.adapter needs the T5 that it was trained with, in model.segments.t5")

    @property
    def trains(self) -> bool:
        """Whether a run with these trains an adapter."""
        return self.t5 is not None and self.adapter is None

    def check(self, run: RunConfig) -> None:
        """Raise UserError where the run's other keys do not go with these."""
        if self.t5 and (run.soft_tokens or run.personal or run.train.compile):
            raise UserError(
                "model.segments.t5 goes with neither soft_tokens, personal nor train.compile; leave these out"
            )
        if self.trains and run.objective.needs.reference:
            raise UserError(
                f"model.segments.t5 trains an adapter, for objectives without a reference; {run.objective.name} has "
                "one: train the adapter first, as by sft, and give it as model.segments.adapter"
            )
        if self.adapter and run.trains == "model":
            raise UserError("model.segments.adapter needs a LoRA: a whole model is saved without the adapter")


@settings
class PersonalConfig:
    """Personal preferences (PPD, arXiv 2501.06655): a branch of attention that reads a user's preference embedding.

    embedder: `clip:ViT-L-14:openai` or another CLIP-style scorer, or `vlm:owner/name`. examples: how many of a user's
    other choices make an embedding: a number, or for CLIP [fewest, most], drawn anew for each sample. tokens: to which
    learned pooling reduces these (null: none, each row of the embedding is a token). width: of a token. dropout: share
    of samples without a user. few: groups of users with fewer choices are dropped, trained without a user (`null`), or
    an error. pretrain: steps in which the pooling alone first learns to tell the users in training apart. layers: of
    the VLM's hidden states, 0 the embeddings and -1 the last (null: all). pool: `mean` averages these.
    """

    embedder: str
    examples: Annotated[
        Count | tuple[Count, Count], Field(description="a whole number of at least 1, or [fewest, most]")
    ] = 4
    tokens: Count | None = 4
    width: Count = 64
    dropout: Share = 0.1
    few: Literal["drop", "null", "error"] = "drop"
    pretrain: Whole = 200
    layers: list[Int] | None = None
    pool: Literal["none", "mean"] = "none"

    def __post_init__(self) -> None:
        if self.fewest > self.most or (self.is_vlm and self.fewest < self.most):
            expected = "one number with a VLM" if self.is_vlm else "[fewest, most]"
            raise UserError(f"personal.examples: expected {expected}, found {[self.fewest, self.most]}")
        if not self.is_vlm and (self.layers is not None or self.pool != "none"):
            raise UserError(f"personal.layers and personal.pool are for a VLM; leave them out with {self.embedder!r}")

    def check(self, run: RunConfig) -> None:
        """Raise UserError where the run's other keys do not go with these."""
        if not run.data.cache or run.data.stream:
            raise UserError(
                "personal needs data.cache=true and data.stream=null: a user's choices come from all the data"
            )
        if run.objective.needs.scorer:
            raise UserError(f"personal needs data with users; {run.objective.name} learns from prompts alone")
        if run.validation.every and run.lora is None:
            raise UserError("validation samples without a user, which is the base model; set validation.every=0")
        if run.soft_tokens or run.train.compile:
            raise UserError("personal goes with neither soft_tokens nor train.compile; leave these out")

    def entries(self, together: int) -> tuple[int, int]:
        """How many entries of so many examples each stand for a user, at least and at most."""
        return max(1, self.fewest // together), max(1, self.most // together)

    @property
    def is_vlm(self) -> bool:
        """Whether a vision-language model reads the examples together."""
        return self.embedder.startswith("vlm:")

    @property
    def fewest(self) -> int:
        return self.examples if isinstance(self.examples, int) else self.examples[0]

    @property
    def most(self) -> int:
        return self.examples if isinstance(self.examples, int) else self.examples[1]
