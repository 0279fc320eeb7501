"""`pipelines` and `reward_scorers` are ours, whatever folders of these names lie beside a user's script."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OWN = ("pipelines", "reward_scorers")
NEED_THEM = ("training", "inference", "evaluation", "labeling", "reward_models")  # packages of t2i_align


class OwnPackages:
    """A finder, first on `sys.meta_path`, that takes these packages from beside `t2i_align`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in OWN:
            folder = ROOT / name
            return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        parent, _, rest = name.partition(".")
        if parent == "t2i_align" and rest in NEED_THEM:
            self.check()
        if parent in OWN and "." not in rest and PathFinder.find_spec(name, path) is None:
            for folder in (Path(entry) / parent for entry in sys.path):
                if folder != ROOT / parent and PathFinder.find_spec(name, [str(folder)]) is not None:
                    raise ImportError(self.message(parent, folder))
        return None

    def check(self) -> None:
        """Raise ImportError where another package of such a name has been imported."""
        for name in OWN:
            folders = list(getattr(sys.modules.get(name), "__path__", ()))
            if folders and str(ROOT / name) not in folders:
                raise ImportError(self.message(name, Path(folders[0])))

    @staticmethod
    def message(name: str, folder: Path) -> str:
        """What is in whose way, and what to do."""
        return (
            f"{folder} has the name of a package of t2i-align ({ROOT / name}), and one program cannot import both. "
            f"Rename your folder, say to my_{name}, or do not import it in a program that trains or samples with "
            "t2i-align."
        )


def install() -> None:
    """Put the finder first."""
    if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages())
