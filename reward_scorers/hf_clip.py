"""CLIP through transformers: PickScore (arXiv 2305.01569), and any other checkpoint.

score = exp(logit_scale) · cos(image, text), as PickScore's published recipe computes it before its softmax over a
prompt's images: around 20 for ordinary images. PIL images take the steps of transformers' PIL processor, with
which the scores were published; since version 5 transformers itself resizes tensors, which moves a score a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F
from transformers import CLIPImageProcessor, CLIPModel

from reward_scorers.errors import ScorerError
from reward_scorers.towers import Preprocess, TwoTowers, shortest_side, unit
from reward_scorers.weights import identity, load_pretrained, load_tokenizer, loading, longer_than

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # its tokenizer and preprocessing, as published


def pickscore(argument: str) -> HFClipScorer:
    """`pickscore`, or `pickscore:/folder` with the model, and in it or else on the Hub its tokenizer."""
    path = argument or PICKSCORE
    own = (Path(path) / "tokenizer_config.json").is_file()
    return HFClipScorer(path, processor=path if own else PICKSCORE_PROCESSOR, name="pickscore")


def hf_clip(argument: str) -> HFClipScorer:
    """`hf-clip:FOLDER` or `hf-clip:owner/name`: a CLIPModel with its tokenizer and its preprocessor_config.json."""
    if not argument:
        raise ScorerError("hf-clip: needs a folder or Hub id: hf-clip:owner/name")
    return HFClipScorer(argument)


class HFClipScorer(TwoTowers):
    """exp(logit_scale) · cos(image, text).

    Args:
        path: folder or Hub id of a CLIPModel.
        processor: where its tokenizer and preprocessing are; None: there as well.
        name: recorded with scores; None: from the path.

    Raises:
        ScorerError: no such model, another architecture, weights missing, or preprocessing that is not CLIP's.
    """

    def __init__(self, path: str, processor: str | None = None, name: str | None = None) -> None:
        self.name = name or f"hf-clip:{Path(path).name if Path(path).exists() else path}"
        self.model: Any = load_pretrained(CLIPModel.from_pretrained, path, self.name, kind="clip", dtype="float32")
        self.version = f"transformers {transformers.__version__}, {identity(self.model)}"
        self.scale = float(self.model.logit_scale.exp())
        self.tokenizer = load_tokenizer(processor or path, self.name)
        self.token_limit = self.model.config.text_config.max_position_embeddings
        side = self.model.config.vision_config.image_size
        self.processor = _processor(processor or path, side, self.name)
        resize, crop = shortest_side(self.processor.size.shortest_edge), partial(centre, side=side)
        self.preprocess = Preprocess(resize, crop, mean=self.processor.image_mean, std=self.processor.image_std)

    def encode_images(self, inputs: Tensor) -> Tensor:
        return unit(self.model.get_image_features(pixel_values=inputs).pooler_output)

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = {name: tensor.to(self.device) for name, tensor in self.tokens(prompts).items()}
        return unit(self.model.get_text_features(**tokens).pooler_output)

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask [B, L] of prompts, cut where they are too long."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.token_limit, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        return longer_than(self.model.config.text_config.max_position_embeddings, self.tokenizer, prompts)

    def save_processor(self, folder: Path) -> None:
        """Write the tokenizer and the preprocessing beside a model that was trained from this one."""
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def centre(image: Any, side: int) -> Any:
    """The square in the middle, its offsets rounded down as transformers does; torchvision rounds to even."""
    width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
    return F.crop(image, (height - side) // 2, (width - side) // 2, side, side)


def _processor(path: str, side: int, scorer: str) -> Any:
    """transformers' description of the preprocessing; raises ScorerError where it is not CLIP's at this size."""
    where = f"{scorer}: {path}: preprocessor_config.json"
    with loading(f"{where}: the preprocessing cannot be read"):
        processor: Any = CLIPImageProcessor.from_pretrained(path)
    usual = all(getattr(processor, f"do_{step}") for step in ("resize", "center_crop", "rescale", "normalize"))
    if not (usual and processor.size.shortest_edge and processor.crop_size.height == side and processor.resample == 3):
        raise ScorerError(
            f"{where}: expected CLIP's preprocessing (shortest edge resized, bicubic, centre cut out at {side}), "
            f"found {processor.to_dict()}"
        )
    return processor
