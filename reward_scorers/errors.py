"""The error of this package."""


class ScorerError(ValueError):
    """A scorer, checkpoint, image or prompt that cannot be used; says what was expected and found."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]  # all that IPython and Jupyter show
