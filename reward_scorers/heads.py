"""Small networks on frozen features: a published rating head, a linear head, and PAL's shared tastes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reward_scorers.base import Scorer, single
from reward_scorers.towers import TwoTowers

MAX_SCALE = 100.0  # of the angle's exponent, CLIP's own bound
RATING_WIDTHS = (1024, 128, 64, 16, 1)
RATING_PLACES = (0, 2, 4, 6, 7)  # of the linear layers among the dropouts, by which checkpoints name them


class HeadScorer(Scorer):
    """A head on the features of a CLIP-style scorer.

    Args:
        head: ratings [B] of unit features of images [B, D] and, if it reads prompts, of texts [B, D] and users [B].
        version: of the head; the scorer's also names the towers.
        user: row of the user in PAL's table; -1 is the mean of the users of its training.
    """

    differentiable = True

    def __init__(
        self, towers: TwoTowers, head: nn.Module, name: str, version: str, *, reads_prompts: bool = True, user: int = -1
    ) -> None:
        self.towers, self.head, self.preprocess = towers, head, towers.preprocess
        self.reads_prompts, self.user = reads_prompts, user
        self.token_limit = towers.token_limit if reads_prompts else None
        self.name, self.version = name, f"{version}, {towers.name}, {towers.version}"

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        return self.towers.is_cut(prompts)

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        images = self.towers.encode_images(inputs)
        if not self.reads_prompts:
            return rated(self.head, images)
        users = torch.full((len(inputs),), self.user, device=inputs.device)
        return rated(self.head, images, self.towers.text_features(prompts), users=users)


def rated(head: Callable[..., Tensor], *features: Tensor, **more: Any) -> Tensor:
    """A head's ratings of features, outside of autocast: in half precision distinct ratings collapse to ties."""
    with torch.autocast(features[0].device.type, enabled=False):
        return head(*map(single, features), **more)


class RatingHead(nn.Sequential):
    """The head of the aesthetic predictor and of ImageReward: [N, width] to [N], without its training's dropout.

    The layers follow each other without activations, so it is one linear map.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        for place, wide, narrow in zip(RATING_PLACES, (width, *RATING_WIDTHS), RATING_WIDTHS, strict=False):
            self.add_module(str(place), nn.Linear(wide, narrow))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).squeeze(-1)


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
        width: of the features. users: how many rows w has.
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
        # Several processes wait for the gradient of every trained parameter, and distances have no scale.
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=score == "angle")

    def forward(self, images: Tensor, texts: Tensor, users: Tensor | None = None) -> Tensor:
        """Scores [N] of unit features [N, D] each, for users [N] (row numbers of w; None or -1: the mean of all)."""
        z = self.f(torch.cat([images, texts, images * texts], -1))
        tastes: Any = self.points if self.g is None else self.g(texts).unflatten(-1, (-1, z.shape[-1]))  # [(N,) K, d]
        shares = self.w.softmax(-1)
        table = torch.cat([shares, shares.mean(0, keepdim=True)])  # the last row is the mean user
        mixture = table[-1:] if users is None else table[users]
        ideal = (mixture[..., None] * tastes).sum(1)
        if self.score == "angle":
            return self.scale.exp().clamp(max=MAX_SCALE) * F.cosine_similarity(z, ideal, dim=-1)
        return -((z - ideal).square().sum(-1) + 1e-8).sqrt()  # the root has no gradient at zero
