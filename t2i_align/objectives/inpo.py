"""InPO: Diffusion-DPO on the noise that inversion finds in each image, not on a random one (arXiv 2503.18454).

    x_tau by DDIM inversion of x,    noise* = (x_tau - alpha_tau x) / sigma_tau
    h = -1/2 beta [ (err_w - ref_err_w) - (err_l - ref_err_l) ],    err to the native target of noise*

For flow matching, which the paper does not cover, x_tau follows Euler's method and v* = (x_tau - x) / tau.
The paper trains 400 steps of 1024 pairs, which is what the method is for: few steps, each dearer than Diffusion-DPO's
by up to `levels` calls without gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from t2i_align.data.batch import Batch, Model
from t2i_align.diffusion.inversion import inverted_noise
from t2i_align.diffusion.noising import Noised
from t2i_align.diffusion.randomness import SampleRNG
from t2i_align.objectives.diffusion_dpo import DiffusionDPO
from t2i_align.utils.settings import Count, Float, Share, Whole, settings


@settings
class InPO(DiffusionDPO):
    """InPO on pairs. The paper uses beta 2000 (SD1.5, from an SFT model) and 5000 (SDXL), and 10 steps of inversion.

    levels: of the grid that training times are drawn from, and at most so many steps of inversion.
    inversion_model: whose predictions it follows; the released code follows the `policy`.
    inversion_guidance: classifier-free guidance of the inversion; 1 is none, as released.
    eta: fresh noise in the inversion: 0 is none, 1 is Diffusion-DPO's random noise; the released code adds about 0.1.
        `noise` says whether a pair shares it.
    renoise: corrections of each step, one call more each.
    """

    levels: Count = 10
    inversion_model: Literal["reference", "policy"] = "reference"
    inversion_guidance: Float = 1.0
    eta: Share = 0.0
    renoise: Whole = 0

    name = "inpo"
    paper = "arXiv 2503.18454"
    config = "sd15_inpo.yaml"
    needs = replace(DiffusionDPO.needs, uneven=True)

    def noised(self, policy: Model, reference: Model, batch: Batch, rng: SampleRNG) -> Noised:
        return inverted_noise(
            policy if self.inversion_model == "policy" else reference,
            batch,
            rng,
            levels=self.levels,
            guidance=self.inversion_guidance,
            eta=self.eta,
            renoise=self.renoise,
            sharing=self.noise,
        )
