"""Human Preference Score v2.0 and v2.1 (arXiv 2306.09341): ViT-H-14 of open_clip, fine-tuned on HPDv2.

score = cos(image, text), without a logit scale: about 0.2 to 0.3 for ordinary images. The original's package keeps a
copy of open_clip; the genuine one computes the same from the same checkpoint. Its preprocessing is not open_clip's: the
long side is fitted to 224 and the short one padded with black, on floats, so PIL images and tensors take one path.
What differs on purpose: an image so thin that it would shrink to nothing keeps one pixel.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import open_clip
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from reward_scorers.clip import ClipScorer
from reward_scorers.errors import ScorerError
from reward_scorers.images import to_pixels
from reward_scorers.towers import BICUBIC, Preprocess
from reward_scorers.weights import from_hub

REPOSITORY = "xswu/HPSv2"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
MODEL = "ViT-H-14"


class HPSv2Scorer(ClipScorer):
    """cos(image, text) of HPSv2.

    Args:
        hps: "2.0" or "2.1". They differ in nothing but their weights, so only the file tells them apart.
        checkpoint: .pt (loaded with weights_only) or .safetensors; "" is the Hub's, "random" is for tests.
        model: of open_clip; another than ViT-H-14 is for tests.

    Raises:
        ScorerError: a checkpoint that does not fit, is damaged, or by its name is the other version's.
    """

    scale = 1.0

    def __init__(self, hps: str, checkpoint: str = "", model: str = MODEL) -> None:
        other = next(name for version, name in FILES.items() if version != hps)
        if checkpoint and Path(checkpoint).stem == Path(other).stem:
            raise ScorerError(f"hpsv{hps}: {checkpoint} is the checkpoint of the other version; {hps} is {FILES[hps]}")
        path = str(checkpoint or from_hub(REPOSITORY, FILES[hps], f"hpsv{hps}"))
        if path != "random" and not Path(path).is_file():
            raise ScorerError(f"hpsv{hps}: {path}: no such file")
        super().__init__(model, path)
        self.name = f"hpsv{hps}"
        size = open_clip.get_model_preprocess_cfg(self.model)["size"]
        self.preprocess = Preprocess(partial(padded, side=size if isinstance(size, int) else size[0]), clip=False)


hpsv2_0, hpsv2_1 = partial(HPSv2Scorer, "2.0"), partial(HPSv2Scorer, "2.1")


def padded(image: Image.Image | Tensor, side: int) -> Tensor:
    """The long side resized to `side` pixels, unless it has that already, and the short one filled with black."""
    pixels = to_pixels(image)
    height, width = pixels.shape[-2:]
    scale = side / max(height, width)
    if scale != 1.0:
        height, width = (max(1, round(length * scale)) for length in (height, width))
        pixels = F.resize(pixels, [height, width], BICUBIC, antialias=True)
    left, top = (side - width) // 2, (side - height) // 2
    return F.pad(pixels, [left, top, side - width - left, side - height - top])
