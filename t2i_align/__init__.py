"""t2i-align: align diffusion models with human preferences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2i_align.evaluation.compare import evaluate
    from t2i_align.training.run import align

__version__ = "0.1.0"
__all__ = ["__version__", "align", "evaluate"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import t2i_align.objectives` loads neither diffusers nor a user's own `pipelines` folder.
    if name == "align":
        from t2i_align.training.run import align

        return align
    if name == "evaluate":
        from t2i_align.evaluation.compare import evaluate

        return evaluate
    raise AttributeError(f"module 't2i_align' has no attribute {name!r}")
