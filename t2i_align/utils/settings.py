"""Typed settings: pydantic dataclasses from YAML, mappings and `key=value`, with every error in one message.

A section is a class under `@settings`: its annotations are the only description of types, choices and ranges. A key
that is unknown, missing or wrong is one line of a `UserError`: the dotted key, what was expected and what was given.
Floats may be strings, because YAML reads 5e-6 as one; nothing else is converted silently.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import field, fields
from functools import cache, reduce, wraps
from itertools import chain
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_args, get_origin

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, PydanticCustomError

from t2i_align.errors import UserError, nearest, shown
from t2i_align.utils.files import read_bytes

T = TypeVar("T")
MAX_VALUES = 100_000  # of a YAML file; a few lines of aliases of aliases stand for billions


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "Input should be a valid number")
    return value


def _path(value: str) -> str:
    if not value or "\0" in value:
        raise PydanticCustomError("path", "Input should be a path")
    return os.path.expanduser(value)  # in YAML and in `key=~/value` no shell does it


Int = Annotated[int, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
Float = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[Int, Field(ge=1, description="a whole number of at least 1")]
Whole = Annotated[Int, Field(ge=0, description="a whole number of 0 or more")]
Positive = Annotated[Float, Field(gt=0, allow_inf_nan=False, description="a positive number")]
NonNegative = Annotated[Float, Field(ge=0, allow_inf_nan=False, description="a number of 0 or more")]
Limit = Annotated[Float, Field(gt=0, description="a positive number")]  # infinity is no limit
Share = Annotated[Float, Field(ge=0, le=1, description="a number in [0, 1]")]
Decay = Annotated[Float, Field(ge=0, lt=1, description="a number in [0, 1)")]
UserPath = Annotated[str, AfterValidator(_path)]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field, Field))
def settings(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose fields are checked, also where Python code builds it.

    Raises (when instantiated):
        UserError: any field that cannot be used, or a check in the class's own `__post_init__`.
    """
    section = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))(cls)
    validate = section.__init__

    @wraps(validate)
    def __init__(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            raise _user_error(error, section, values, where=cls.__name__) from None

    section.__init__ = __init__  # type: ignore[method-assign]
    return cast(type[T], section)


def load_as(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file and apply `key=value` overrides (dots reach inside: `objective.beta=2000`)."""
    return build(cls, with_overrides(read_mapping(path), overrides))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file; raises UserError naming it."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such configuration file")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return values


class Loader(yaml.SafeLoader):
    """YAML without dates, as `output_dir=2026-11-29` is a name, and without keys that replace an earlier one."""

    yaml_implicit_resolvers = {
        start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping. Raises ConstructorError where a key is there twice."""
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: str | Path) -> Any:
    """What a YAML file holds; raises UserError naming it."""
    try:
        return parse_yaml(read_bytes(file).decode(), str(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def parse_yaml(text: str, origin: str) -> Any:
    """The value in a text; raises UserError, which names `origin`, for what is no YAML or too large."""
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        small = node is None or _size(node, {}) <= MAX_VALUES
        value = loader.construct_document(node) if node is not None and small else None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{origin}: not valid YAML: {error}") from error
    if not small:
        raise UserError(f"{origin}: more than {MAX_VALUES} values, counting those of each alias")
    return value


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values below a node, counted again for each alias."""
    if id(node) not in known:
        parts = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, known) for part in parts))
    return known[id(node)]


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `values` with each `a.b=value` applied, `a.b+=value` to a list; values are read as YAML."""
    out = deepcopy(dict(values))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"{override!r}: an override has the form key=value, such as train.steps=200")
        *parents, last = key.split(".")
        node = out
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                bare_name = parents == ["objective"] and isinstance(node.get(parent), str)
                node[parent] = {"name": node[parent]} if bare_name else {}
            node = node[parent]
        value = parse_yaml(text, shown(override))
        if last.endswith("+"):
            last, value = last[:-1], [*(node.get(last[:-1]) or []), value]
        node[last] = value
    return out


def build(cls: type[T], values: Any, where: str = "") -> T:
    """An instance of a `@settings` class from plain nested values; `where` is the dotted key of the section."""
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise _user_error(error, cls, values, where) from None


def expected(cls: type, name: str) -> str:
    """What a field of a `@settings` class takes, in words."""
    annotation = cls.__pydantic_fields__[name].annotation  # type: ignore[attr-defined]
    choices = " or ".join(map(repr, get_args(annotation))) if get_origin(annotation) is Literal else None
    return str(_described(cls, name) or choices or getattr(annotation, "__name__", annotation))


@cache
def elsewhere() -> dict[str, str]:
    """Which of our keys other trainers' keys are, or in words what there is instead."""
    keys: dict[str, str] = read_yaml(Path(__file__).parents[1] / "assets" / "foreign_keys.yaml")
    return keys


# Error messages -----------------------------------------------------------------------------------------------------


def _user_error(error: ValidationError, cls: type, values: Any, where: str) -> UserError:
    """One line per key. The members of a union fail one by one: their errors are one line."""
    by_key: dict[tuple[Any, ...], list[ErrorDetails]] = defaultdict(list)
    for detail in error.errors(include_url=False):
        by_key[_key(cls, detail["loc"])].append(detail)
    lines = [_line(cls, key, details, values, where) for key, details in by_key.items()]
    return UserError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} errors:", *lines]))


def _line(cls: type, key: tuple[Any, ...], details: list[ErrorDetails], values: Any, where: str) -> str:
    name = ".".join(map(str, (where, *key) if where else key)) or "configuration"
    first = details[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    *parents, last = key or ("",)
    section = _section(cls, parents)
    if first["type"] in ("unexpected_keyword_argument", "invalid_key"):
        known = sorted(f.name for f in fields(section))
        if (ours := elsewhere().get(str(last))) is not None:
            return f"{name}: unknown key. It is another trainer's; here there is {ours}."
        return f"{name}: unknown key.{nearest(last, known)} Choices: {', '.join(known)}."
    if first["type"] == "missing" and len(first["loc"]) == len(key):
        return f"{name}: missing key"
    given = reduce(getitem, key, values)
    found = "null" if given is None else shown(given)
    description = _described(section, last)
    if not description and not first["msg"].startswith("Input should be"):
        return f"{name}: {first['msg']}, found {found}"
    expected = description or " or ".join(dict.fromkeys(map(_expected, details)))
    hint = nearest(given, re.findall(r"'(.*?)'", expected))
    return f"{name} must be {expected}, found {found}{'.' * bool(hint)}{hint}"


def _described(section: Any, name: str) -> str | None:
    """The description of a field's type, which is in the type itself where the field may also be null."""
    info = section.__pydantic_fields__.get(name) if section else None
    if info is None or info.description:
        return info and info.description
    inner = [m.description for part in get_args(info.annotation) for m in getattr(part, "__metadata__", ())
             if getattr(m, "description", None)]  # fmt: skip
    return f"{inner[-1]} or null" if inner and type(None) in get_args(info.annotation) else None


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "dataclass_type":
        return "a mapping of keys"
    text = detail["msg"].removeprefix("Input should be ")
    return re.sub(r", (unable|got) .*", "", text).replace("valid integer", "whole number").replace("valid ", "")


def _key(cls: type, loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """The dotted key of an error: its location without the labels that pydantic adds for members of a union.

    It ends at a field with a description, which covers what is inside.
    """
    key: list[Any] = []
    for part in loc:
        described = key and _described(_section(cls, key[:-1]), key[-1])
        if _section(cls, key) is None and (described or not isinstance(part, int)):
            break
        key.append(part)
    return tuple(key)


def _section(cls: type, key: Sequence[Any]) -> Any:
    """The class that holds the fields below `key`; None where these are plain values."""
    section: Any = cls
    for part in key:
        info = getattr(section, "__pydantic_fields__", {}).get(part)
        annotation = info.annotation if info else None
        section = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "__pydantic_fields__")), None)
    return section
