"""What lies beside a plugin can be imported by it."""

from torch import Tensor


def scaled(difference: Tensor, beta: float) -> Tensor:
    return beta * difference
