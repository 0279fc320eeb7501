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
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from reward_scorers.base import Judgement, Scorer, ScorerError, rounding
from reward_scorers.registry import build, register

KEYS = {"name", "rule", "strength", "quantile", "scorers"}
MEMBER_KEYS = {"scorer", "weight", "centre", "spread", "reference"}


@register("combine")
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
    try:
        return from_mapping({"name": file.stem, **values}, root=file.parent)
    except RecursionError:
        raise ScorerError(f"combine: {file}: it is among its own scorers") from None


def from_mapping(values: Mapping[str, Any], root: Path = Path()) -> Combined:
    """The same from plain values; paths of references are relative to `root`."""
    _known(values, KEYS, "combine")
    quantile = _number(values, "quantile", 0.5, "combine")
    if not 0 <= quantile <= 1:
        raise ScorerError(f"combine: quantile must be in [0, 1], found {quantile}")
    listed = values.get("scorers")
    if not isinstance(listed, list) or not listed:
        raise ScorerError(f"combine: scorers: expected a list of at least one, found {listed!r}")
    rule = values.get("rule")
    members = []
    for number, entry in enumerate(listed):
        where = f"combine: scorers[{number}]"
        entry = {"scorer": entry} if isinstance(entry, str | Scorer) else entry
        if not isinstance(entry, Mapping) or "scorer" not in entry:
            raise ScorerError(f"{where}: expected a scorer's spec or a mapping with `scorer`, found {entry!r}")
        _known(entry, MEMBER_KEYS, where)
        if "weight" in entry and rule != "weighted_sum":
            raise ScorerError(f"{where}: weight belongs to the rule weighted_sum, not to {rule!r}")
        if "centre" in entry and "reference" in entry:
            raise ScorerError(f"{where}: centre and reference are alternatives")
        spread = _number(entry, "spread", 1.0, where)
        if spread <= 0:
            raise ScorerError(f"{where}: spread must be positive, found {spread}")
        scorer = entry["scorer"] if isinstance(entry["scorer"], Scorer) else build(entry["scorer"])
        reference = None
        if "reference" in entry:
            reference = read_reference(root / Path(str(entry["reference"])).expanduser(), scorer, quantile)
        weight, centre = _number(entry, "weight", 1.0, where), _number(entry, "centre", 0.0, where)
        members.append(Member(scorer, weight, centre, spread, reference))
    if "strength" in values and rule != "mean_minus_std":
        raise ScorerError(f"combine: strength belongs to the rule mean_minus_std, not to {rule!r}")
    if "quantile" in values and all(member.reference is None for member in members):
        raise ScorerError("combine: quantile is of a reference's scores, and no scorer has a reference")
    return Combined(str(rule), members, _number(values, "strength", 1.0, "combine"), str(values.get("name", rule)))


@dataclass(frozen=True)
class Member:
    """A scorer and how its scores reach the common scale.

    reference: by what `rounding` says, and then by prompt, what `centre` is there.
    """

    scorer: Scorer
    weight: float = 1.0
    centre: float = 0.0
    spread: float = 1.0
    reference: Mapping[str, Mapping[str, float]] | None = None

    def value(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """(score - centre) / spread, [B]."""
        centre: float | Tensor = self.centre
        if self.reference is not None:
            self.check(prompts)
            known = self.reference[rounding()]
            centre = torch.tensor([known[prompt] for prompt in prompts], device=scores.device)
        return (scores - centre) / self.spread

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ScorerError for a prompt that the reference has no scores of, in the precision it is judged in."""
        if self.reference is None:
            return
        precision = rounding()
        if precision not in self.reference:
            there, here = (kind.removeprefix(", ") or "float32" for kind in (next(iter(self.reference)), precision))
            raise ScorerError(f"combine: the reference of {self.scorer.name} was scored in {there}, this is {here}")
        for row, prompt in enumerate(prompts):
            if prompt not in self.reference[precision]:
                raise ScorerError(f"combine: prompts[{row}]: the reference of {self.scorer.name} lacks {prompt!r}")


def _majority(values: Tensor, margins: Tensor) -> Tensor:
    return torch.where(values.abs() <= margins, 0.5, (values > 0).float()).mean(0)


class Combined(Scorer):
    """One score of several scorers' [members, B]; its parts are theirs, on their own scales.

    Args:
        rule: a name of RULES. members: at least one. strength: lambda of `mean_minus_std`.
    """

    def __init__(self, rule: str, members: Sequence[Member], strength: float = 1.0, name: str | None = None) -> None:
        if rule not in RULES:
            raise ScorerError(f"combine: unknown rule {rule!r}. Choices: {', '.join(RULES)}.")
        names = [member.scorer.name for member in members]
        if len(set(names)) < len(names):
            raise ScorerError(f"combine: two scorers of the same name among {', '.join(names)}")
        self.rule, self.members, self.strength = rule, list(members), strength
        self.name = f"combine:{name or rule}"
        self.differentiable = rule != "majority" and all(member.scorer.differentiable for member in members)
        told = [[m.scorer.name, m.scorer.version, m.weight, m.centre, m.spread, m.reference] for m in members]
        settings = json.dumps([rule, strength, told], sort_keys=True)
        self.version = f"{rule} of {', '.join(names)}, sha256 {hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    def to(self, device: torch.device | str) -> Combined:
        """Move the members' networks. Returns itself."""
        for member in self.members:
            member.scorer.to(device)
        return self

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ScorerError for a prompt that a member cannot judge, or that a reference lacks."""
        for member in self.members:
            member.scorer.check_prompts(prompts)
            member.check(prompts)

    def combine(self, scores: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """The rule applied to the members' scores, each [B]."""
        device = scores[0].device
        pairs = zip(self.members, scores, strict=True)
        values = torch.stack([member.value(score.to(device), prompts) for member, score in pairs])
        return RULES[self.rule](values, self)

    def _score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._score_media(pixels, prompts)

    def _score_media(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.combine([member.scorer.score(pixels, prompts) for member in self.members], prompts)

    def _judge_media(self, pixels: Tensor, prompts: Sequence[str]) -> Judgement:
        return self._whole([member.scorer.score(pixels, prompts) for member in self.members], prompts)

    def _judge_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Judgement:
        return self._whole([member.scorer.score_images(images, prompts) for member in self.members], prompts)

    def _whole(self, scores: Sequence[Tensor], prompts: Sequence[str]) -> Judgement:
        names = (member.scorer.name for member in self.members)
        return self.combine(scores, prompts), dict(zip(names, scores, strict=True))

    def column(self, values: Sequence[float], like: Tensor) -> Tensor:
        """One number a member as [members, 1] beside `like`."""
        return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None]


RULES: dict[str, Callable[[Tensor, Combined], Tensor]] = {
    "weighted_sum": lambda v, c: (c.column([m.weight for m in c.members], v) * v).sum(0),
    # The square root has no gradient where all agree.
    "mean_minus_std": lambda v, c: v.mean(0) - c.strength * (v.var(0, correction=0) + 1e-12).sqrt(),
    "min": lambda v, c: v.amin(0),
    "majority": lambda v, c: _majority(v, c.column([m.scorer.tie_margin / m.spread for m in c.members], v)),
    "conjunction": lambda v, c: F.logsigmoid(v).sum(0),
}


def read_reference(file: Path, scorer: Scorer, quantile: float) -> dict[str, dict[str, float]]:
    """Each prompt's quantile of the scores that `t2i-align score` wrote of a base model's images, by precision.

    Scores of other scorers and versions are left out.

    Raises:
        ScorerError: no such file, or no scores of this scorer and version in it.
    """
    if not file.is_file():
        raise ScorerError(f"combine: {file}: no such file of reference scores")
    try:
        if file.suffix == ".parquet":
            rows = pq.read_table(file).to_pylist()
        else:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        told = [(row["scorer"], row["version"], row.get("score"), row["prompt"]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScorerError(f"combine: {file}: not a file of scores ({error!r})") from error
    found: dict[str, dict[str, list[float]]] = {}
    others: dict[str, None] = {}
    for name, version, score, prompt in told:
        precision = str(version).removeprefix(scorer.version)
        if name == scorer.name and (precision == "" or precision.endswith(" autocast")):
            if score is not None:
                found.setdefault(precision, {}).setdefault(prompt, []).append(float(score))
        elif name == scorer.name:
            others[version] = None
    if not found:
        known = f" of version {scorer.version!r}, only of {', '.join(map(repr, others))}" if others else ""
        raise ScorerError(f"combine: {file}: no scores of {scorer.name}{known} in it")
    return {
        precision: {prompt: float(torch.tensor(scores).quantile(quantile)) for prompt, scores in by_prompt.items()}
        for precision, by_prompt in found.items()
    }


def _known(values: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in values:
        if key not in keys:
            raise ScorerError(f"{where}: unknown key {key!r}. Choices: {', '.join(sorted(keys))}.")


def _number(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ScorerError(f"{where}: {key}: expected a number, found {value!r}")
    return float(value)
