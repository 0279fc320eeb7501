"""The objectives' equations, for training loops of your own: pure functions of errors, residuals or logits.

Tensors are positional, hyper-parameters keyword-only. An error `err` is a candidate's mean squared difference between
prediction and target, [B]; `_w` is the preferred candidate, `_l` the other, `ref_` the reference's; `h` is a logit,
positive where the policy agrees with the label. Lists of k candidates are [B, k]. Losses are one number a group, [B],
not averaged. SFT's is `err_w` itself; DCPO, InPO and NCP-DPO are Diffusion-DPO on other captions, noise and errors.
DenseDPO's errors and labels l are a latent frame's, [B, f]; its `per_clip` exchanges `decided_mean` and `link_loss`.

| objective | |
|---|---|
| `diffusion_dpo`, `dcpo`, `inpo`, `ncp_dpo` | `link_loss(dpo_logit(err_w, err_l, ref_err_w, ref_err_l, beta=beta))` |
| `smpo` | the same with `beta * gamma * certainty(score_w, score_l, score_min=..., score_max=...)` |
| `dense_dpo` | `decided_mean(link_loss(l * dpo_logit(err_a, err_b, ref_err_a, ref_err_b, beta=beta)), l != 0)` |
| `tdpo` | `link_loss(tdpo_logit(...))` |
| `dmpo` | `dmpo_loss(h, alpha=alpha)` |
| `lcpo` | `lcpo_loss(h, trust(h, eta))` |
| `dspo` | `dspo_loss(residual_w, ref_residual_w, h, beta=beta)` |
| `mapo` | `mapo_loss(err_w, err_l, ...)` |
| `kto`, `tkto` | `kto_loss(g, liked, z, ...)` |
| `rankdpo` | `rankdpo_loss(s, dcg_weights(scores, win_rates(scores)), beta=beta, normalise=True)` |
| `lpo` | `plackett_luce_loss(h, scores)` |
| `softrepa` | `contrastive_loss(errors, other, ...)` |

`safeguard` and `scale_gradient` are SDPO's guard.
"""

from t2i_align.diffusion.noising import squared_error
from t2i_align.objectives.dense_dpo import decided_mean
from t2i_align.objectives.diffusion_dpo import dpo_logit, link_loss
from t2i_align.objectives.dmpo import dmpo_loss
from t2i_align.objectives.dspo import dspo_loss
from t2i_align.objectives.kto import kto_loss
from t2i_align.objectives.lcpo import lcpo_loss, trust
from t2i_align.objectives.lpo import plackett_luce_loss
from t2i_align.objectives.mapo import mapo_loss
from t2i_align.objectives.pairwise import safeguard, scale_gradient
from t2i_align.objectives.rankdpo import dcg_weights, rankdpo_loss, win_rates
from t2i_align.objectives.smpo import certainty
from t2i_align.objectives.softrepa import contrastive_loss
from t2i_align.objectives.tdpo import tdpo_logit

__all__ = [
    "certainty",
    "contrastive_loss",
    "dcg_weights",
    "decided_mean",
    "dmpo_loss",
    "dpo_logit",
    "dspo_loss",
    "kto_loss",
    "lcpo_loss",
    "link_loss",
    "mapo_loss",
    "plackett_luce_loss",
    "rankdpo_loss",
    "safeguard",
    "scale_gradient",
    "squared_error",
    "tdpo_logit",
    "trust",
    "win_rates",
]
