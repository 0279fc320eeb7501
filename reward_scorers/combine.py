"""Several scorers as one (`combine:FILE.yaml`): a sum, a cautious mean, the worst, a vote, a conjunction.

    rule: mean_minus_std           # weighted_sum, mean_minus_std, min, majority or conjunction
    strength: 1.0                  # lambda of mean_minus_std
    quantile: 0.5                  # of a reference's scores of a prompt
    scorers:
      - scorer: clip:ViT-B-32:laion400m_e32
        weight: 1.0                # weighted_sum only
        centre: 25.0               # v = (score - centre) / spread brings scorers to one scale
        spread: 3.0
      - scorer: pickscore
        reference: base.jsonl      # instead of a centre: the quantile of what a base model's images of the prompt got

- weighted_sum: Σ w v. - mean_minus_std: mean(v) - λ std(v), the population's; ensembles disagree where they are fooled.
- min: the smallest v. - majority: the share of scorers with v > 0, ties (their margin) counting half.
- conjunction: Σ log σ(v), which no single scorer can buy alone: an image has to beat the reference for each of them.

A vote here is against the centre or the reference, because a scorer sees one image; the vote among a prompt's
candidates is `t2i-align relabel --rule majority`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from torch import Tensor
from torch.nn import functional as F

from reward_scorers.base import Judgement, Media, Scorer
from reward_scorers.errors import ScorerError
from reward_scorers.images import DECODER
from reward_scorers.registry import build_all


class Member(BaseModel, extra="forbid", arbitrary_types_allowed=True):
    """A scorer and how its scores reach the common scale: v = (score - centre) / spread."""

    scorer: str | Scorer
    weight: FiniteFloat = 1.0
    centre: FiniteFloat = 0.0
    spread: FiniteFloat = Field(1.0, gt=0)
    reference: Path | None = None


class Combination(BaseModel, extra="forbid"):
    """The file's keys. strength: lambda of `mean_minus_std`."""

    name: str | None = None
    rule: str
    strength: FiniteFloat = 1.0
    quantile: float = Field(0.5, ge=0, le=1)
    scorers: list[Member] = Field(min_length=1)


def from_file(argument: str) -> Combined:
    """`combine:FILE.yaml`."""
    file = Path(argument)
    if not argument or not file.is_file():
        raise ScorerError(f"combine: {argument or 'nothing'}: no such file; expected combine:FILE.yaml")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ScorerError(f"combine: {file}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ScorerError(f"combine: {file}: expected a mapping of keys, found {type(values).__name__}")
    return from_mapping({"name": file.stem, **values}, root=file.parent)


def from_mapping(values: Mapping[str, Any], root: Path = Path()) -> Combined:
    """The same from plain values; paths of references are relative to `root`."""
    entries = values.get("scorers")
    if isinstance(entries, list):
        entries = [{"scorer": entry} if isinstance(entry, str | Scorer) else entry for entry in entries]
        values = {**values, "scorers": entries}
    try:
        config = Combination.model_validate(values)
    except ValidationError as error:
        raise ScorerError("combine: " + "; ".join(map(_described, error.errors()))) from None
    for key, rule, sections in (("weight", "weighted_sum", config.scorers), ("strength", "mean_minus_std", [config])):
        if config.rule != rule and any(key in section.model_fields_set for section in sections):
            raise ScorerError(f"combine: {key} belongs to the rule {rule}, not to {config.rule!r}")
    for number, member in enumerate(config.scorers):
        if {"centre", "reference"} <= member.model_fields_set:
            raise ScorerError(f"combine: scorers[{number}]: centre and reference are alternatives")
    if "quantile" in config.model_fields_set and all(member.reference is None for member in config.scorers):
        raise ScorerError("combine: quantile is of a reference's scores, and no scorer has a reference")
    return Combined(config, root)


def _described(error: Any) -> str:
    """One of pydantic's errors: where, what was expected, and what was found."""
    where = ""
    for key in error["loc"]:
        where += f"[{key}]" if isinstance(key, int) else f".{key}" if where else str(key)
    if error["type"] == "extra_forbidden":
        known = (Member if "[" in where else Combination).model_fields
        return f"unknown key {where!r}. Choices: {', '.join(sorted(known))}"
    if error["type"] == "missing":
        return f"{where}: missing key"
    return f"{where}: {error['msg'].replace('Input should be', 'must be')}, found {error['input']!r}"


class Combined(Scorer):
    """One score of several scorers' [members, B]; its parts are theirs, on their own scales.

    Args:
        config: its rule is a name of RULES.
        root: folder that paths of references are relative to.
    """

    takes = "media"  # each member has its own preprocessing

    def __init__(self, config: Combination, root: Path = Path()) -> None:
        if config.rule not in RULES:
            raise ScorerError(f"combine: unknown rule {config.rule!r}. Choices: {', '.join(RULES)}.")
        self.config, self.members = config, config.scorers
        self.scorers = build_all([m.scorer for m in self.members])
        names = [scorer.name for scorer in self.scorers]
        self.references = [
            read_reference(root / m.reference.expanduser(), scorer, config.quantile) if m.reference else None
            for m, scorer in zip(self.members, self.scorers, strict=True)
        ]
        self.name = f"combine:{config.name or config.rule}"
        self.differentiable = config.rule != "majority" and all(scorer.differentiable for scorer in self.scorers)
        identities = [
            [scorer.name, scorer.version, m.weight, m.centre, m.spread, reference]
            for scorer, m, reference in zip(self.scorers, self.members, self.references, strict=True)
        ]
        settings = json.dumps([config.rule, config.strength, identities], sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
        self.version = f"{config.rule} of {', '.join(names)}, sha256 {digest}"

    @property
    def cut(self) -> set[str]:
        """Of any of the members."""
        return set().union(*(scorer.cut for scorer in self.scorers))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ScorerError for a prompt that a member cannot judge, or that a reference lacks."""
        for index, scorer in enumerate(self.scorers):
            scorer.check_prompts(prompts)
            self.centres(index, prompts)

    def centres(self, index: int, prompts: Sequence[str]) -> list[float]:
        """A member's centre for each prompt; raises ScorerError if its reference lacks a prompt or this precision."""
        reference, scorer = self.references[index], self.scorers[index]
        name, version = scorer.name, scorer.recorded_version
        if reference is None:
            return [self.members[index].centre] * len(prompts)
        if version not in reference:
            there = ", ".join(map(repr, reference))
            raise ScorerError(f"combine: the reference of {name} was scored by version {there}, this is {version!r}")
        for row, prompt in enumerate(prompts):
            if prompt not in reference[version]:
                raise ScorerError(f"combine: prompts[{row}]: the reference of {name} lacks {prompt!r}")
        return [reference[version][prompt] for prompt in prompts]

    def rate(self, inputs: Media, prompts: Sequence[str]) -> Judgement:
        parts = {scorer.name: scorer.judge(inputs, prompts)[0] for scorer in self.scorers}
        device = next(iter(parts.values())).device
        scores = torch.stack([part.to(device) for part in parts.values()])
        centres = torch.tensor([self.centres(index, prompts) for index in range(len(parts))]).to(scores)
        members = zip(self.members, self.scorers, strict=True)
        columns = torch.tensor([[m.spread, m.weight, scorer.tie_margin / m.spread] for m, scorer in members])
        spreads, weights, margins = columns.to(scores).T[..., None]
        return RULES[self.config.rule]((scores - centres) / spreads, weights, margins, self.config.strength), parts


# Of values [members, B], weights and tie margins [members, 1], and the strength.
RULES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "weighted_sum": lambda v, weights, *_: (weights * v).sum(0),
    # The square root has no gradient where all agree.
    "mean_minus_std": lambda v, w, m, strength: v.mean(0) - strength * (v.var(0, correction=0) + 1e-12).sqrt(),
    "min": lambda v, *_: v.amin(0),
    "majority": lambda v, w, margins, _: torch.where(v.abs() <= margins, 0.5, (v > 0).float()).mean(0),
    "conjunction": lambda v, *_: F.logsigmoid(v).sum(0),
}


def read_reference(file: Path, scorer: Scorer, quantile: float) -> dict[str, dict[str, float]]:
    """Each prompt's quantile of the scores that `t2i-align score` wrote of a base model's images, by their version.

    Scores of other scorers, versions and decoders are left out.

    Raises:
        ScorerError: no such file, or no scores of this scorer and version in it.
    """
    if not file.is_file():
        raise ScorerError(f"combine: {file}: no such file of reference scores")
    scores: dict[str, dict[str, list[float]]] = {}
    try:
        if file.suffix == ".parquet":
            rows = pq.read_table(file).to_pylist()
        else:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        for row in rows:
            name, version, prompt = row["scorer"], row["version"], row["prompt"]
            if name == scorer.name and row.get("score") is not None:
                scores.setdefault(str(version), {}).setdefault(prompt, []).append(float(row["score"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScorerError(f"combine: {file}: not a file of scores ({error!r})") from error
    own = {v: of for v, of in scores.items() if v.startswith(f"{scorer.version},") and v.endswith(f", {DECODER}")}
    if not own:
        only = f" of version {scorer.recorded_version!r}, only of {', '.join(map(repr, scores))}" if scores else ""
        raise ScorerError(f"combine: {file}: no scores of {scorer.name}{only} in it")
    return {
        version: {prompt: float(torch.tensor(values).quantile(quantile)) for prompt, values in by_prompt.items()}
        for version, by_prompt in own.items()
    }
