"""Scorers by name: `build("clip:ViT-B-32:laion400m_e32")`."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from reward_scorers.base import Scorer
from reward_scorers.errors import ScorerError

Factory = TypeVar("Factory", bound=Callable[..., Scorer])

# "module:factory" is imported when a scorer of that name is first built: their libraries are slow to import.
FACTORIES: dict[str, str | Callable[..., Scorer]] = {
    "aesthetic": "reward_scorers.aesthetic:aesthetic",
    "clip": "reward_scorers.clip:clip",
    "combine": "reward_scorers.combine:from_file",
    "consistency": "reward_scorers.video:consistency",
    "denscore": "reward_scorers.denscore:denscore",
    "hf-clip": "reward_scorers.hf_clip:hf_clip",
    "hpsv2.0": "reward_scorers.clip:hpsv2_0",
    "hpsv2.1": "reward_scorers.clip:hpsv2_1",
    "imagereward": "reward_scorers.imagereward:imagereward",
    "motion": "reward_scorers.video:Motion",
    "pickscore": "reward_scorers.hf_clip:pickscore",
    "smoothness": "reward_scorers.video:Smoothness",
    "trained": "reward_scorers.trained:trained",
    "vlm": "reward_scorers.vlm:VLMScorer",
}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: `build` calls the factory with the text after `name:` ("" without one), if it takes an argument."""

    def add(factory: Factory) -> Factory:
        FACTORIES[name] = factory
        return factory

    return add


def names() -> list[str]:
    """The registered names."""
    return sorted(FACTORIES)


def check_spec(spec: str) -> None:
    """Raise ScorerError unless `spec` begins with a registered name; builds nothing."""
    name = spec.partition(":")[0] if isinstance(spec, str) else spec
    if name not in FACTORIES:
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ScorerError(f"unknown scorer {name!r}.{hint} Choices: {', '.join(names())}.")


def build_all(specs: Sequence[str | Scorer]) -> list[Scorer]:
    """Scorers of which no two have one name; of checkpoints with one file name, the specs are the names.

    Raises:
        ScorerError: what `build` raises; two scorers of the same name.
    """
    for spec in specs:
        if not isinstance(spec, Scorer):
            check_spec(spec)  # before the first is loaded
    built = [spec if isinstance(spec, Scorer) else build(spec) for spec in specs]
    counts = Counter(scorer.name for scorer in built)
    for spec, scorer in zip(specs, built, strict=True):
        if isinstance(spec, str) and counts[scorer.name] > 1:
            scorer.name = spec
    if len({scorer.name for scorer in built}) < len(built):
        raise ScorerError(f"two scorers of the same name among {', '.join(scorer.name for scorer in built)}")
    return built


def build(spec: str) -> Scorer:
    """A scorer from `name` or `name:argument`; the scorer interprets the argument, in which `~` is the home folder.

    Raises:
        ScorerError: a name that is not registered, or an argument that the scorer cannot use.
    """
    check_spec(spec)
    name, _, argument = spec.partition(":")
    factory = FACTORIES[name]
    if isinstance(factory, str):
        factory = pkgutil.resolve_name(factory)
    if inspect.signature(factory).parameters:
        return factory(re.sub("(^|:)~/", rf"\1{Path.home()}/", argument))  # shells expand no ~ after a colon
    if argument:
        raise ScorerError(f"{name}: takes no argument, found {argument!r}")
    return factory()
