"""The error of this package."""


class ScorerError(ValueError):
    """A scorer, checkpoint, image or prompt that cannot be used; says what was expected and found."""
