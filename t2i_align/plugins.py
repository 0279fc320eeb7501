"""What people bring from outside the package: objectives, model families, scorers and data formats.

`file.py:name` or `package.module:name` stands wherever a built-in name may stand; the name is one that the file
registers, or that of a class or function in it. A file listed in `plugins:` or given with `--plugin` runs first, so
that what it registers is known by its bare name. Modules that installed packages name as entry points of the group
`t2i_align.plugins` run when a name is not known otherwise.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from t2i_align.errors import UserError, unknown

GROUP = "t2i_align.plugins"
OWN = ("t2i_align", "pipelines", "reward_scorers")
FILES: dict[str, tuple[Path, int]] = {}  # name of a module that `load` made of a file -> the file, and when it changed


def load(place: str) -> ModuleType:
    """The module of a Python file or of an importable name; a file runs again when it has changed.

    Raises:
        UserError: no such file or module, or it cannot be run.
    """
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        file = Path(place).expanduser().resolve()
        if not file.is_file():
            raise UserError(f"plugin {place}: no such file")
        return _run(file)
    except UserError:
        raise
    except Exception as error:  # whatever the code of a plugin raises
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f" (line {last.lineno} of {last.filename})" if last.filename.startswith("/") else ""
        raise UserError(f"plugin {place} cannot be used: {type(error).__name__}: {error}{where}") from error


def _run(file: Path) -> ModuleType:
    for name, module in list(sys.modules.items()):  # imported by its name already, or run before
        if name != "__main__" and getattr(module, "__file__", None) == str(file):
            if name not in FILES or FILES[name][1] == file.stat().st_mtime_ns:
                return module
            break
    else:
        known = importlib.util.find_spec(file.stem) if file.stem.isidentifier() else None
        taken = not file.stem.isidentifier() or (known is not None and known.origin != str(file))
        name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}" if taken else file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(file.parent)
    sys.modules[name], FILES[name] = module, (file, file.stat().st_mtime_ns)
    sys.path.insert(0, folder)  # what lies beside it can be imported, and goes before installed packages
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name], FILES[name]
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:  # also later, from within its functions
            sys.path.append(folder)
    return module


@cache
def load_installed() -> None:
    """Run the modules that installed packages name as entry points."""
    from importlib.metadata import entry_points  # which takes as long as all else that a command's help needs

    for entry in entry_points(group=GROUP):
        load(entry.value)


def find(what: str, spec: Any, table: Mapping[str, Any]) -> Any:
    """What a name in `table`, or a place outside the package, stands for. what: the noun in messages.

    Raises:
        UserError: nothing has that name.
    """
    if not isinstance(spec, str):
        raise unknown(what, spec, table)
    place, _, name = spec.rpartition(":")
    if spec not in table and _is_place(place):
        module = load(place)
        found = getattr(module, name, None) or table.get(name)
        if found is None or (name in table and found is table[name] and own(found)):
            names = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
            raise UserError(f"{place}: no {what} {name!r} in this plugin. It defines: {', '.join(names) or 'nothing'}.")
        return found
    if spec not in table:
        load_installed()
    if spec not in table:
        raise unknown(what, spec, table)
    return table[spec]


def find_scorer(spec: str) -> None:
    """Let `reward_scorers` know the scorer that a spec begins with: `file.py:name`, with or without `:argument`."""
    from reward_scorers.registry import FACTORIES

    if place := re.match(r"(.+?\.py|\w+(\.\w+)+):\w+", spec):
        FACTORIES[place[0]] = find("scorer", place[0], FACTORIES)
    else:
        load_installed()


def register(table: MutableMapping[str, Any], name: str, thing: Any, what: str) -> None:
    """Enter a class or function in a table. Defined again, as when a notebook's cell runs again, it replaces itself.

    Raises:
        UserError: something else has that name.
    """
    if name in table and _defined(table[name]) != _defined(thing):
        raise UserError(f"there is a {what} {name!r} already: {_shown(table[name])}; choose another name")
    table[name] = thing


def has_run(spec: str) -> bool:
    """Whether using a spec runs no code: it is a name, or of a file or module that has run already."""
    place, _, _ = located(spec).rpartition(":")
    files = [getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name != "__main__"]
    return not _is_place(place) or place in sys.modules or str(Path(place).resolve()) in files


def _is_place(place: str) -> bool:
    return place.endswith(".py") or re.fullmatch(r"\w+(\.\w+)+", place) is not None


def located(spec: str) -> str:
    """A spec with the path of its Python file, where it has one, made absolute."""
    file, ending, rest = spec.partition(".py")
    if not ending or rest[:1] not in ("", ":"):
        return spec
    return f"{Path(file + ending).expanduser().absolute()}{rest}"


def required(place: str) -> str:
    """The same for a whole file or module, which is run."""
    load(place)
    return located(place)


def place_of(thing: Any) -> str | None:
    """`file.py:name` or `package.module:name` of a class or function; None for one of our own or of a notebook."""
    module, name = thing.__module__, thing.__qualname__
    if own(thing) or module == "__main__" or "<locals>" in name:
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    return f"{file}:{name}" if file and (module in FILES or "." not in module) else f"{module}:{name}"


def own(thing: Any) -> bool:
    """Whether an entry of a table is the package's own; those are listed by module and name, to be imported late."""
    return isinstance(thing, str) or _defined(thing)[0].partition(".")[0] in OWN


def _defined(thing: Any) -> tuple[str, str]:
    thing = getattr(thing, "function", None) or thing  # a reader's
    thing = thing if hasattr(thing, "__qualname__") or isinstance(thing, str) else type(thing)
    return (thing, "") if isinstance(thing, str) else (thing.__module__, thing.__qualname__)


def _shown(thing: Any) -> str:
    return "a built-in one" if own(thing) else ".".join(_defined(thing))
