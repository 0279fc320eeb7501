"""GPUs by name: memory and peak rates, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from t2i_align.errors import UserError, unknown

UTILISATION = 0.4  # of the peak rate; assumed, to be measured on each card
RESERVE = 2**30  # bytes for the CUDA context and the libraries' workspaces; assumed
FRAGMENTATION = 1.05  # what the allocator wastes between blocks; assumed


@dataclass(frozen=True)
class Card:
    """A GPU.

    memory: GiB. bf16, fp32: dense peak rates in TFLOP/s, of the tensor cores with accumulation in float32, and of the
    other cores. TF32 is taken for half the bf16 rate.
    """

    name: str
    memory: float
    bf16: float
    fp32: float

    def fits(self, peak: int) -> bool:
        """Whether tensors of so many bytes fit beside the context and the allocator's waste."""
        return FRAGMENTATION * peak + RESERVE <= self.memory * 2**30

    def seconds(self, flops: float, precision: str) -> float:
        """Seconds that so many operations take at the assumed utilisation."""
        rate = {"fp32": self.fp32, "tf32": self.bf16 / 2}.get(precision, self.bf16)
        return flops / (rate * 1e12 * UTILISATION)


CARDS = (
    Card("RTX 3090", 24, 71, 35.6),
    Card("RTX 4090", 24, 165, 82.6),
    Card("RTX 5090", 32, 209, 105),
    Card("L4", 24, 121, 30.3),
    Card("L40S", 48, 362, 91.6),
    Card("A100 40 GB", 40, 312, 19.5),
    Card("A100 80 GB", 80, 312, 19.5),
    Card("H100", 80, 989, 67),
    Card("H200", 141, 989, 67),
)


def card_named(name: str) -> Card:
    """A card by its name, or one of so many GiB by a number; its rates are then those of the RTX 4090.

    Raises:
        UserError: neither.
    """
    known = {card.name.lower(): card for card in CARDS}
    if name.lower() in known:
        return known[name.lower()]
    try:
        return Card(f"{float(name):g} GiB", float(name), known["rtx 4090"].bf16, known["rtx 4090"].fp32)
    except ValueError as error:
        raise UserError(f"{unknown('card', name, [card.name for card in CARDS])} Or give its GiB.") from error
