"""InPO: Diffusion-DPO on the noise that inversion finds in each image, not on a random one (arXiv 2503.18454).

    x_tau by DDIM inversion of x,    noise* = (x_tau - alpha_tau x) / sigma_tau
    h = -1/2 beta [ (err_w - ref_err_w) - (err_l - ref_err_l) ],    err to the native target of noise*

For flow matching, which the paper does not cover, x_tau follows Euler's method and v* = (x_tau - x) / tau.
The paper trains 400 steps of 1024 pairs, which is what the method is for: few steps, each dearer than Diffusion-DPO's
by up to `levels` calls without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from t2i_align.data.schema import Batch, Model
from t2i_align.diffusion.inversion import inverted_noise
from t2i_align.diffusion.noising import Noised
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.errors import UserError, unknown
from t2i_align.objectives.pairwise import Pairwise

INVERSION_MODELS = ("reference", "policy")


@dataclass(frozen=True, kw_only=True)
class InPO(Pairwise):
    """InPO on pairs. The paper uses beta 2000 (SD1.5, from an SFT model) and 5000 (SDXL), and 10 steps of inversion.

    levels: of the grid that training times are drawn from, and at most so many steps of inversion.
    inversion_model: whose predictions it follows; the released code follows the `policy`.
    inversion_guidance: classifier-free guidance of the inversion; 1 is none, as released.
    eta: fresh noise in the inversion: 0 is none, 1 is Diffusion-DPO's random noise; the released code adds about 0.1.
        `noise` says whether a pair shares it.
    renoise: corrections of each step, one call more each.
    """

    levels: int = 10
    inversion_model: Literal["reference", "policy"] = "reference"
    inversion_guidance: float = 1.0
    eta: float = 0.0
    renoise: int = 0

    name = "inpo"
    paper = "arXiv 2503.18454"
    config = "sd15_inpo.yaml"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 1:
            raise UserError(f"objective.levels must be at least 1, found {self.levels!r}")
        if self.inversion_model not in INVERSION_MODELS:
            raise unknown("inversion_model", self.inversion_model, INVERSION_MODELS)
        if not 0 <= self.eta <= 1:
            raise UserError(f"objective.eta must be in [0, 1], found {self.eta!r}")
        if self.renoise < 0:
            raise UserError(f"objective.renoise must be 0 or more, found {self.renoise!r}")

    def noised(self, policy: Model, reference: Model, batch: Batch, draw: SampleRNG) -> Noised:
        return inverted_noise(
            policy if self.inversion_model == "policy" else reference,
            batch,
            draw,
            levels=self.levels,
            guidance=self.inversion_guidance,
            eta=self.eta,
            renoise=self.renoise,
            sharing=self.noise,
        )
