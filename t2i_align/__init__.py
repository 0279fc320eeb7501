"""t2i-align: align diffusion models with human preferences."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from t2i_align.utils import shadows

if TYPE_CHECKING:
    from t2i_align.data.memory import batches
    from t2i_align.evaluation.compare import evaluate
    from t2i_align.inference.generate import generate
    from t2i_align.inference.models import load_pipeline
    from t2i_align.plugins import load as load_plugin
    from t2i_align.training.run import align

shadows.install()
__version__ = "0.1.0"
# Imported when they are first used, so that `import t2i_align.objectives` loads no diffusers.
_PLACES = {
    "align": "training.run:align",
    "batches": "data.memory:batches",
    "evaluate": "evaluation.compare:evaluate",
    "generate": "inference.generate:generate",
    "load_pipeline": "inference.models:load_pipeline",
    "load_plugin": "plugins:load",
}
_MODULES = ("losses", "objectives")
__all__ = [
    "__version__",
    "align",
    "batches",
    "evaluate",
    "generate",
    "load_pipeline",
    "load_plugin",
    "losses",
    "objectives",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(f"{__name__}.{module}"), attribute)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
