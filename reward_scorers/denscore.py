"""The decomposed preference score for long texts (Denscore; LongAlign, arXiv 2410.11817), over any CLIP-style scorer.

    P    mean of the unit features of a prompt's sentences
    V    the common direction: the normalised mean of P over many prompts
    score = scale [P - (1 - omega) (P V) V] I,      relevant = scale [P - (P V) V] I,    irrelevant = scale (P V) (V I)

All prompts share V, and what an image scores along it is text-irrelevant: a taste. omega = 1 keeps all of it and 0
none; 0.3 is published. The parts are reported beside the score. As in the authors' code P is not normalised again.

    denscore:pickscore              omega 0.3, V from each batch
    denscore:FILE.yaml              scorer: pickscore
                                    omega: 0.3
                                    direction: prompts.txt     # a corpus; V is computed once and kept beside it
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from reward_scorers.base import Judgement, Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.registry import build
from reward_scorers.sentences import split
from reward_scorers.towers import TwoTowers

logger = logging.getLogger(__name__)
BATCH = 256  # prompts of a corpus at a time


class Settings(BaseModel):
    """The keys of a file. direction: `batch`, `ema`, or a text file with one prompt per line."""

    model_config = ConfigDict(extra="forbid")

    scorer: str
    omega: float = Field(0.3, ge=0, le=1)
    direction: Path | Literal["batch", "ema"] = "batch"
    decay: float = Field(0.99, ge=0, lt=1)


def denscore(argument: str) -> Denscore:
    """`denscore:SCORER` or `denscore:FILE.yaml`."""
    if not argument.endswith((".yaml", ".yml")):
        return Denscore(_towers(argument))
    file = Path(argument)
    try:
        settings = Settings.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ScorerError(f"denscore: {file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ScorerError(f"denscore: {file}: {error}") from error
    scorer, corpus = _towers(settings.scorer), settings.direction
    direction = common_direction(scorer, file.parent / corpus) if isinstance(corpus, Path) else None
    return Denscore(scorer, settings.omega, direction, settings.decay if corpus == "ema" else None)


def _towers(spec: str) -> TwoTowers:
    scorer = build(spec) if spec else None
    if not isinstance(scorer, TwoTowers):
        raise ScorerError(f"denscore: expected a CLIP-style scorer such as denscore:pickscore, found {spec!r}")
    return scorer


class Denscore(Scorer):
    """The decomposed score of a CLIP-style scorer.

    Args:
        omega: the weight of what is text-irrelevant, in [0, 1].
        direction: V, [D], unit; None estimates it from each batch. At batch 1, that leaves omega of the score.
        decay: of an average of the batches' estimates; None takes each batch's own.
    """

    differentiable = True

    def __init__(
        self, scorer: TwoTowers, omega: float = 0.3, direction: Tensor | None = None, decay: float | None = None
    ) -> None:
        self.scorer, self.omega, self.direction, self.decay = scorer, omega, direction, decay
        self.preprocess = scorer.preprocess
        self.mean: Tensor | None = None  # of the batches so far, with a decay
        self.name = f"denscore:{scorer.name}"
        kind = "batch" if decay is None else f"ema {decay:g}"
        if direction is not None:
            kind = hashlib.sha256(direction.float().cpu().numpy().tobytes()).hexdigest()[:12]
        self.version = f"{scorer.version}, denscore omega {omega:g}, direction {kind}"

    def check_prompts(self, prompts: Sequence[str]) -> None:
        self.scorer.check_prompts(prompts)

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Judgement:
        image = self.scorer.encode_images(inputs)
        text = text_features(self.scorer, prompts)
        common = self._direction(text)
        along = (text * common).sum(-1, keepdim=True)
        relevant = self.scorer.scale * ((text - along * common) * image).sum(-1)
        irrelevant = self.scorer.scale * along[:, 0] * (image * common).sum(-1)
        return relevant + self.omega * irrelevant, {"relevant": relevant, "irrelevant": irrelevant}

    def _direction(self, text: Tensor) -> Tensor:
        if self.direction is not None:
            return self.direction.to(text)
        mean = text.mean(0)
        if self.decay is not None:
            mean = mean if self.mean is None else self.decay * self.mean.to(mean) + (1 - self.decay) * mean
            self.mean = mean
        return normalize(mean, dim=0)


@torch.no_grad()
def text_features(scorer: TwoTowers, prompts: Sequence[str]) -> Tensor:
    """P of each prompt, [B, D]: the mean of its sentences' unit features; sentences too long for the tower are cut."""
    sentences = [list(split(prompt, len, max(1, len(prompt)))) for prompt in prompts]
    features = iter(scorer.text_features([text or " " for parts in sentences for text in parts]))
    return torch.stack([torch.stack([next(features) for _ in parts]).mean(0) for parts in sentences])


def common_direction(scorer: TwoTowers, corpus: Path) -> Tensor:
    """V of a corpus of prompts, one per line, [D]; kept beside it in a file named after scorer and corpus.

    Raises:
        ScorerError: the corpus cannot be read or holds no prompt.
    """
    try:
        prompts = [line.strip() for line in corpus.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ScorerError(f"denscore: {corpus}: no readable text file of prompts: {error}") from error
    if not prompts:
        raise ScorerError(f"denscore: {corpus}: no prompt in it")
    identity = json.dumps([scorer.name, scorer.version, prompts])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    file = corpus.with_name(f"{corpus.name}.{fingerprint[:12]}.safetensors")
    if (kept := _kept(file, fingerprint)) is not None:
        return kept
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    total = torch.stack([text_features(scorer, batch).double().sum(0) for batch in batches]).sum(0)
    direction = normalize(total, dim=0).float().cpu()
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file({"direction": direction}, temporary, metadata={"fingerprint": fingerprint})
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:  # as beside a corpus that many share
        logger.warning("denscore: V is not kept, so it is computed each time: %s: %s", file, error)
        temporary.unlink(missing_ok=True)
    return direction


def _kept(file: Path, fingerprint: str) -> Tensor | None:
    """The direction in a file, unless it is missing, damaged, or of something else."""
    try:
        with safe_open(file, framework="pt") as stored:
            own = (stored.metadata() or {}).get("fingerprint") == fingerprint
            direction: Tensor | None = stored.get_tensor("direction") if own else None
            return direction
    except (OSError, SafetensorError):
        return None
