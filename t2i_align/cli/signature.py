"""The options of a command, from the signature and docstring of the function that it calls.

The source is parsed and not imported: these modules load torch and diffusers, for which `--help` and shell completion
cannot wait. A list means one option with several values, a Literal its choices, the first positional parameter and
`overrides` are arguments, and what is loaded in Python only (a pipeline, a scorer) is left out of a union.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
PYTHON_ONLY = ("progress", "settings")  # parameters that are for callers in Python
SCALARS = {"str": str, "int": int, "float": float, "bool": bool, "Path": str}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One argument or option. type: for typer, `list[...]` where it takes several values; default: as it is shown."""

    name: str
    type: Any
    help: str
    default: str | None
    required: bool
    positional: bool


def parameters(function: str) -> list[Parameter]:
    """The parameters of `package.module:function`."""
    module, node = _function(function)
    described = _descriptions(module, node)
    return [
        Parameter(
            name=argument.arg,
            type=_type(module, argument.annotation),
            help=described.get(argument.arg, ""),
            default=_shown(module, default),
            required=default is None,
            positional=first or argument.arg == "overrides",
        )
        for argument, default, first in _arguments(node)
        if argument.arg not in PYTHON_ONLY
    ]


def _arguments(node: ast.FunctionDef) -> Iterator[tuple[ast.arg, ast.expr | None, bool]]:
    """Each argument with its default, and whether it is the first that may be given by position."""
    required = len(node.args.args) - len(node.args.defaults)
    for index, argument in enumerate(node.args.args):
        yield argument, node.args.defaults[index - required] if index >= required else None, index == 0
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        yield argument, default, False


def _function(path: str) -> tuple[str, ast.FunctionDef]:
    module, _, name = path.partition(":")
    node = _definition(module, name)
    assert node is not None and isinstance(node[1], ast.FunctionDef), f"{path} is no function"
    return node[0], node[1]


@cache
def _body(module: str) -> list[ast.stmt]:
    file = ROOT / module.replace(".", "/")
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body


def _definition(module: str, name: str) -> tuple[str, ast.AST] | None:
    """Where our own code defines a function, class or constant, following imports; None for anything else."""
    for node in _body(module):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("t2i_align"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name)
    return None


def _value(module: str, node: ast.AST | None) -> Any:
    """A default or choice: a literal, or a constant of our own."""
    if isinstance(node, ast.Name) and (defined := _definition(module, node.id)):
        return _value(*defined)
    return ast.literal_eval(node)  # type: ignore[arg-type]


def _shown(module: str, default: ast.expr | None) -> str | None:
    """A default as `--help` shows it; None where the function itself chooses, or there is none."""
    value = None if default is None else _value(module, default)
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or None
    return None if value is None or value is False or value == "" else str(value)


def _type(module: str, node: ast.AST | None) -> Any:
    """The type on the command line; None where a value cannot be written there."""
    if isinstance(node, ast.BinOp):  # of a union, a path or a list stands for its other forms
        members = [_type(module, side) for side in (node.left, node.right)]
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        lists = [member for member in members if getattr(member, "__origin__", None) is list]
        if lists and not ("Path" in names and any(member is str for member in members)):
            return lists[0]
        return next((member for member in members if member not in (None, *lists)), None)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        if node.value.id in ("Sequence", "list"):
            return list[str]
        if node.value.id == "Literal":
            value = _value(module, node.slice)
            return Literal[value if isinstance(value, tuple) else (value,)]
    if isinstance(node, ast.Name):
        defined = None if node.id in SCALARS else _definition(module, node.id)
        return _type(*defined) if defined else SCALARS.get(node.id)
    return None


def _descriptions(module: str, node: ast.FunctionDef) -> dict[str, str]:
    """The `Args:` section of a docstring by parameter; names that share an entry share its text.

    The rest are described where a line such as "Others as in `package.module.function`." says.
    """
    doc = inspect.cleandoc(ast.get_docstring(node) or "")
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.M | re.S)
    other = re.search(r"Others as in `(?:([\w.]+)\.)?(\w+)`", doc)
    out = _descriptions(*_function(f"{other[1] or module}:{other[2]}")) if other else {}
    for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.*?)(?=^ {4}\w|\Z)", section[1] if section else "", re.M | re.S):
        out |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return out
