"""LAION's aesthetic predictor, v2: a small head on the features of OpenAI's CLIP ViT-L/14, about 1 to 10.

https://github.com/christophschuhmann/improved-aesthetic-predictor. It sees the image alone; prompts are not used.
Images take CLIP's preprocessing, as in the original.
"""

from __future__ import annotations

from reward_scorers.clip import DEFAULT, clip
from reward_scorers.heads import HeadScorer, RatingHead
from reward_scorers.weights import load_checkpoint

HUB = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")  # the v2 head, as DDPO used it


def aesthetic(argument: str) -> HeadScorer:
    """`aesthetic`, `aesthetic:HEAD`, or `aesthetic:HEAD:MODEL:WEIGHTS` with another source of CLIP's weights.

    HEAD is .pth or .safetensors; "" is the Hub's, "random" is for tests. MODEL and WEIGHTS are those of `ClipScorer`;
    the head belongs to OpenAI's ViT-L/14.

    Raises:
        ScorerError: a head or weights that do not fit.
    """
    checkpoint, _, model = argument.partition(":")
    towers = clip(model or DEFAULT)
    width = towers.text_features(["any"]).shape[-1]
    head = RatingHead(width)
    weights = load_checkpoint(
        head, checkpoint, "aesthetic", HUB, target=f"features of {width}",
        rename=lambda state: {key.removeprefix("layers."): value for key, value in state.items()},
    )  # fmt: skip
    return HeadScorer(towers, head, "aesthetic", f"head {weights}", reads_prompts=False)
