"""Small networks on frozen features: a published rating head, a linear head, and PAL's shared tastes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_SCALE = 100.0  # of the angle's exponent, CLIP's own bound
RATING_WIDTHS = (1024, 128, 64, 16, 1)
RATING_PLACES = (0, 2, 4, 6, 7)  # of the linear layers among the dropouts, by which checkpoints name them


def rating_layers(width: int) -> nn.Sequential:
    """The head of the aesthetic predictor and of ImageReward: [N, width] to [N, 1], without its training's dropout.

    The layers follow each other without activations, so it is one linear map.
    """
    head = nn.Sequential()
    for place, wide, narrow in zip(RATING_PLACES, (width, *RATING_WIDTHS), RATING_WIDTHS, strict=False):
        head.add_module(str(place), nn.Linear(wide, narrow))
    return head


class LinearHead(nn.Module):
    """r = w · [image, image ⊙ text] + b: few-shot. What depends on the prompt alone cancels between its images.

    Args:
        width: of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        with torch.no_grad():
            self.linear.weight[:, width:] = 1.0  # the untrained head is the cosine

    def forward(self, images: Tensor, texts: Tensor, users: Tensor | None = None) -> Tensor:
        """Scores [N] of unit features [N, D] each; the same for all users."""
        return self.linear(torch.cat([images, images * texts], -1)).squeeze(-1)


class PAL(nn.Module):
    """Pluralistic alignment (arXiv 2406.08469): a user is a mixture of K tastes that all users share.

    z = MLP([image, text, image ⊙ text]); a_u = Σ_k softmax(w_u)_k p_k; score = -‖z - a_u‖ ("distance", model A of the
    paper), or exp(s) · cos(z, a_u) ("angle"). The p_k are points, or functions of the prompt ("prompt", model B). With
    K = 1 users do not matter, and it is a plain Bradley-Terry model on the same features.

    Args:
        width: of the features. users: how many rows w has; the last row of `mixture`'s table is the mean user.
        prototypes: K. latent: dimensions of z. hidden: of the MLP.
    """

    def __init__(
        self,
        width: int,
        users: int,
        *,
        prototypes: int = 2,
        latent: int = 64,
        hidden: int = 256,
        source: Literal["points", "prompt"] = "points",
        score: Literal["distance", "angle"] = "distance",
    ) -> None:
        super().__init__()
        self.score = score
        self.f = nn.Sequential(nn.Linear(3 * width, hidden), nn.GELU(), nn.Linear(hidden, latent))
        self.points = nn.Parameter(torch.randn(prototypes, latent)) if source == "points" else None
        self.g = nn.Linear(width, prototypes * latent) if source == "prompt" else None
        self.w = nn.Parameter(torch.zeros(users, prototypes))
        nn.init.normal_(self.w, std=0.1)  # with equal rows all users would get the same first steps
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, texts: Tensor, users: Tensor | None = None) -> Tensor:
        """Scores [N] of unit features [N, D] each, for users [N] (row numbers of w; None or -1: the mean of all)."""
        mixture = self.mixture(users, len(images))
        return self.scored(*self.placed(images, texts), mixture)

    def placed(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of images, [N, d], and of the tastes, [N, K, d]: all that does not depend on the user."""
        z = self.f(torch.cat([images, texts, images * texts], -1))
        if self.g is not None:
            return z, self.g(texts).unflatten(-1, (-1, z.shape[-1]))
        assert self.points is not None
        return z, self.points.expand(len(z), -1, -1)

    def mixture(self, users: Tensor | None, count: int) -> Tensor:
        """Each row's weights over the tastes, [N, K]."""
        shares = self.w.softmax(-1)
        table = torch.cat([shares, shares.mean(0, keepdim=True)])
        return table[-1].expand(count, -1) if users is None else table[users]

    def scored(self, z: Tensor, tastes: Tensor, mixture: Tensor) -> Tensor:
        """Scores [N] from `placed` and mixtures [N, K]."""
        ideal = (mixture[..., None] * tastes).sum(1)
        if self.score == "angle":
            return self.scale.exp().clamp(max=MAX_SCALE) * F.cosine_similarity(z, ideal, dim=-1)
        return -((z - ideal).square().sum(-1) + 1e-8).sqrt()  # the root has no gradient at zero
