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

FINDERS: list[Callable[[str], None]] = []  # called with a spec of no known name, which they may register
# "module:factory" is imported when a scorer of that name is first built: their libraries are slow to import.
FACTORIES: dict[str, str | Callable[..., Scorer]] = {
    "aesthetic": "reward_scorers.aesthetic:aesthetic",
    "background_consistency": "reward_scorers.video:background_consistency",
    "clip": "reward_scorers.clip:clip",
    "combine": "reward_scorers.combine:from_file",
    "denscore": "reward_scorers.denscore:denscore",
    "dynamic_degree": "reward_scorers.flow:dynamic_degree",
    "frames": "reward_scorers.video:frames",
    "hf-clip": "reward_scorers.hf_clip:hf_clip",
    "hpsv2.0": "reward_scorers.clip:hpsv2_0",
    "hpsv2.1": "reward_scorers.clip:hpsv2_1",
    "imagereward": "reward_scorers.imagereward:imagereward",
    "motion_smoothness": "reward_scorers.flow:MotionSmoothness",
    "overall_consistency": "reward_scorers.video:overall_consistency",
    "pickscore": "reward_scorers.hf_clip:pickscore",
    "subject_consistency": "reward_scorers.video:subject_consistency",
    "temporal_flickering": "reward_scorers.video:TemporalFlickering",
    "trained": "reward_scorers.trained:trained",
    "vlm": "reward_scorers.vlm:VLMScorer",
}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: `build` calls the factory with the text after `name:` ("" without one), if it takes an argument.

    Defined again, as when a notebook's cell runs again, a factory replaces itself.

    Raises:
        ScorerError: another one has that name.
    """

    def add(factory: Factory) -> Factory:
        known = FACTORIES.get(name, factory)
        if isinstance(known, str) or (known.__module__, known.__qualname__) != (
            factory.__module__,
            factory.__qualname__,
        ):
            raise ScorerError(f"there is a scorer {name!r} already: {known}; choose another name")
        FACTORIES[name] = factory
        return factory

    return add


def names() -> list[str]:
    """The registered names."""
    return sorted(FACTORIES)


def check_spec(spec: str) -> None:
    """Raise ScorerError unless `spec` begins with a registered name; builds nothing."""
    _split(spec)


def build_all(specs: Sequence[str | Scorer]) -> list[Scorer]:
    """Scorers of which no two have one name; of checkpoints with one file name, the specs are the names.

    Raises:
        ScorerError: what `build` raises; two scorers of the same name.
    """
    for spec in specs:
        if not isinstance(spec, Scorer):
            check_spec(spec)  # before the first is loaded
    built = [build(spec) if isinstance(spec, str) else checked(spec) for spec in specs]
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
        ScorerError: a name that is not registered, an argument that the scorer cannot use, no name or version.
    """
    name, argument = _split(spec)
    factory = FACTORIES[name]
    if isinstance(factory, str):
        factory = pkgutil.resolve_name(factory)
    takes_argument = bool(inspect.signature(factory).parameters)
    if argument and not takes_argument:
        raise ScorerError(f"{name}: takes no argument, found {argument!r}")
    argument = re.sub("(^|:)~/", rf"\1{Path.home()}/", argument)  # shells expand no ~ after a colon
    try:
        return checked(factory(argument) if takes_argument else factory(), name)
    except RecursionError:
        raise ScorerError(f"{name}: {argument}: it is among its own scorers, or nested too deeply") from None
    except OSError as error:  # such as a name that no file can have
        raise ScorerError(f"{name}: {error.strerror or error}: {argument:.200}") from error


def checked(scorer: Scorer, shown: str = "scorers") -> Scorer:
    """The scorer; raises ScorerError for one that no score could be recorded of, or for something else."""
    if not isinstance(scorer, Scorer):
        raise ScorerError(f"{shown}: expected a Scorer, found {type(scorer).__name__}")
    if missing := [key for key in ("name", "version") if not isinstance(getattr(scorer, key, None), str)]:
        raise ScorerError(f"{shown}: {type(scorer).__name__} sets no {' and no '.join(missing)} (a string)")
    return scorer


def _split(spec: str) -> tuple[str, str]:
    """The registered name that a spec begins with, which may have a colon in it, and its argument."""
    for find in (*FINDERS, None):
        known = [name for name in FACTORIES if f"{spec}:".startswith(f"{name}:")]
        if known:
            name = max(known, key=len)
            return name, spec[len(name) + 1 :]
        if find is not None:
            find(spec)
    near = difflib.get_close_matches(str(spec).partition(":")[0], names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ScorerError(f"unknown scorer {str(spec).partition(':')[0]!r}.{hint} Choices: {', '.join(names())}.")
