"""Scorers by name: `build("clip:ViT-B-32:laion400m_e32")`."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from reward_scorers.base import Scorer
from reward_scorers.errors import ScorerError

Factory = Callable[[str], Scorer]
AnyFactory = TypeVar("AnyFactory", bound=Callable[..., Scorer])
_FACTORIES: dict[str, Factory] = {}

# Modules register their names when imported, which is when one of them is first built: their libraries are slow.
MODULES = {
    "aesthetic": "reward_scorers.aesthetic",
    "clip": "reward_scorers.clip",
    "combine": "reward_scorers.combine",
    "consistency": "reward_scorers.video",
    "hf-clip": "reward_scorers.hf_clip",
    "hpsv2.0": "reward_scorers.hpsv2",
    "hpsv2.1": "reward_scorers.hpsv2",
    "imagereward": "reward_scorers.imagereward",
    "motion": "reward_scorers.video",
    "pickscore": "reward_scorers.hf_clip",
    "smoothness": "reward_scorers.video",
    "trained": "reward_scorers.trained",
    "vlm": "reward_scorers.vlm",
}


def register(name: str, *, argument: bool = True) -> Callable[[AnyFactory], AnyFactory]:
    """Decorator: `build` calls the factory with the text after `name:` ("" where there is none).

    argument: False for a factory that takes none; `name:something` is then an error.
    """

    def add(factory: AnyFactory) -> AnyFactory:
        def without(text: str) -> Scorer:
            if text:
                raise ScorerError(f"{name}: takes no argument, found {text!r}")
            return factory()

        _FACTORIES[name] = factory if argument else without
        return factory

    return add


def names() -> list[str]:
    """The registered names."""
    return sorted({*_FACTORIES, *MODULES})


def check_spec(spec: str) -> None:
    """Raise ScorerError unless `spec` begins with a registered name; builds nothing."""
    name = spec.partition(":")[0] if isinstance(spec, str) else spec
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ScorerError(f"unknown scorer {name!r}.{hint} Choices: {', '.join(names())}.")


def build(spec: str) -> Scorer:
    """A scorer from `name` or `name:argument`; what the argument means is the scorer's own business, but `~` is home.

    Raises:
        ScorerError: a name that is not registered, or an argument that the scorer cannot use.
    """
    check_spec(spec)
    name, _, argument = spec.partition(":")
    if name not in _FACTORIES:
        importlib.import_module(MODULES[name])
    return _FACTORIES[name](re.sub("(^|:)~/", rf"\1{Path.home()}/", argument))  # shells expand no ~ after a colon
