"""The CLIP score (arXiv 2104.08718) and HPSv2 through open_clip: any of its models and any checkpoint that fits.

score = 100 · cos(image, text), unclipped. This is open_clip's and OpenAI's logit (their trained logit scale is at its
bound of 100) and torchmetrics' CLIPScore without its cut at zero, which would stop gradients. Hessel et al. write
2.5 · max(cos, 0) for the same ranking. Prompts beyond the context length (77 tokens for most) are cut, as open_clip
does.

PIL images and tensors take open_clip's own transform, whose steps work on both. What is left between them is PIL's
rounding to 8 bits after the resize: at most 0.08 of a score that reaches from -100 to 100, on 24 images of white noise
(the worst case) and a small random CLIP (tests/reward_scorers/test_published.py).
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as F
from transformers import dynamic_module_utils

from reward_scorers.errors import ScorerError
from reward_scorers.images import to_pixels
from reward_scorers.towers import BICUBIC, Preprocess, TwoTowers, unit
from reward_scorers.weights import digest_of_tensors, from_hub, load_checkpoint, loading

logger = logging.getLogger(__name__)
DEFAULT = "ViT-L-14-quickgelu:openai"  # the model of torchmetrics' CLIPScore
SCHEMES, CONFIG = ("hf-hub:", "local-dir:"), "open_clip_config.json"
QUICK = "-quickgelu"  # open_clip's ending of architectures with the activation of OpenAI's weights
HPSV2_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


def clip(argument: str) -> ClipScorer:
    """`clip`, `clip:MODEL:TAG`, `clip:MODEL:/path/weights.pt`, `clip:hf-hub:owner/name` or `clip:local-dir:/folder`."""
    argument = argument or DEFAULT
    if argument.startswith(SCHEMES):
        return ClipScorer(argument)
    model, _, pretrained = argument.partition(":")
    if Path(pretrained).is_file() and (other := _twin(model)):
        quick, plain = sorted((model, other), key=len, reverse=True)
        logger.warning(
            "clip: %s does not record its activation; as %r it is scored with %s. OpenAI's weights and those trained "
            "from them need %r, others %r", pretrained, model, "QuickGELU" if model == quick else "GELU", quick, plain,
        )  # fmt: skip
    return ClipScorer(model, pretrained or None)


class ClipScorer(TwoTowers):
    """100 · cos(image, text).

    Args:
        model: a name of `open_clip.list_models()`, `hf-hub:owner/name` or `local-dir:/folder`.
        pretrained: a tag of open_clip, a local .safetensors or .pt file (loaded with weights_only), or "random" for
            tests. Not given only with `hf-hub:` and `local-dir:`, which bring their weights.

    Raises:
        ScorerError: no such model or tag, or weights that do not fit the model exactly.
    """

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        self.model, weights = _load(model, pretrained)
        self.name = ":".join(["clip", model, *([Path(pretrained).name] if pretrained else [])])
        activation = "QuickGELU, " if any(isinstance(part, QuickGELU) for part in self.model.modules()) else ""
        self.version = f"open_clip {open_clip.__version__}, {activation}{weights}"
        with loading(f"clip: the tokenizer of {model!r} could not be loaded"), _no_remote_code():
            self.tokenizer = open_clip.get_tokenizer(model)
        self.token_limit = self.tokenizer.context_length
        config = PreprocessCfg(**open_clip.get_model_preprocess_cfg(self.model))
        *steps, normalize = image_transform_v2(config, is_train=False).transforms
        self.preprocess = Preprocess(*steps, mean=normalize.mean, std=normalize.std)

    def encode_images(self, inputs: Tensor) -> Tensor:
        return unit(self.model.encode_image(inputs, normalize=False))

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        return unit(self.model.encode_text(self.tokenizer(list(prompts)).to(self.device), normalize=False))

    def is_cut(self, prompts: Sequence[str]) -> list[bool]:
        limit: int = self.tokenizer.context_length
        whole, longer = (self.tokenizer(list(prompts), context_length=limit + more) for more in (0, 1))
        return [not torch.equal(*rows) for rows in zip(whole, longer[:, :limit], strict=True)]


class HPSv2Scorer(ClipScorer):
    """Human Preference Score v2.0 and v2.1 (arXiv 2306.09341): ViT-H-14, fine-tuned on HPDv2.

    score = cos(image, text), without a logit scale: about 0.2 to 0.3 for ordinary images. The original's package keeps
    a copy of open_clip; the genuine one computes the same from the same checkpoint. Its preprocessing is not
    open_clip's: the long side is fitted to 224 and the short one padded with black, on floats, so PIL images and
    tensors take one path. What differs on purpose: an image so thin that it would shrink to nothing keeps one pixel.

    Args:
        hps: "2.0" or "2.1". They differ in nothing but their weights, so only the file tells them apart.
        checkpoint: .pt (loaded with weights_only) or .safetensors; "" is the Hub's, "random" is for tests.
        model: of open_clip; another than ViT-H-14 is for tests.

    Raises:
        ScorerError: a checkpoint that does not fit, is damaged, or by its name is the other version's.
    """

    scale = 1.0

    def __init__(self, hps: str, checkpoint: str = "", model: str = "ViT-H-14") -> None:
        other = next(name for version, name in HPSV2_FILES.items() if version != hps)
        if checkpoint and Path(checkpoint).stem == Path(other).stem:
            raise ScorerError(
                f"hpsv{hps}: {checkpoint} is the checkpoint of the other version; {hps} is {HPSV2_FILES[hps]}"
            )
        path = str(checkpoint or from_hub("xswu/HPSv2", HPSV2_FILES[hps], f"hpsv{hps}"))
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


def _load(model: str, pretrained: str | None) -> tuple[Any, str]:
    """The frozen model with its weights, and what identifies the weights."""
    if model.startswith(SCHEMES):
        scheme, _, place = model.partition(":")
        file = Path(place, CONFIG) if scheme == "local-dir" else from_hub(place, CONFIG, "clip")
        with loading(f"clip: {file}"):
            if file.is_file() and "trust_remote_code" in str(json.loads(file.read_text(encoding="utf-8"))):
                raise ScorerError(f"clip: {file}: asks for trust_remote_code; code of others is never run")
        network = _create(model, require_pretrained=True)
        # A folder's or repository's name stays when its weights change.
        return network, f"weights {model}, sha256 {digest_of_tensors(network.state_dict())}"
    known, model = open_clip.list_models(), model.replace("/", "-")
    if model not in known:
        near = ", ".join(difflib.get_close_matches(model, known, n=5, cutoff=0.4))
        raise ScorerError(f"clip: unknown model {model!r}. Nearest: {near}. All: open_clip.list_models()")
    tags = open_clip.list_pretrained_tags_by_model(model)
    choices = f"Tags: {', '.join(tags) or 'none'}"
    if pretrained is None:
        raise ScorerError(f"clip: {model!r} needs weights: clip:{model}:TAG or clip:{model}:/path. {choices}")
    if pretrained == "random" or Path(pretrained).is_file():
        return _load_file(model, pretrained, tags)
    if pretrained not in tags:
        raise ScorerError(f"clip: {pretrained!r} is no weights file and no tag of {model!r}. {choices}")
    gelu = bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu"))
    if gelu != bool(open_clip.get_model_config(model).get("quick_gelu")):  # open_clip warns and scores wrongly
        if not (other := _twin(model)):
            raise ScorerError(f"clip: the weights {pretrained!r} have another activation than {model!r}")
        logger.warning("clip: the weights %r belong to %r, which is used instead of %r", pretrained, other, model)
        model = other
    return _create(model, pretrained=pretrained, require_pretrained=True), f"weights {pretrained}"


def _create(model: str, **options: Any) -> nn.Module:
    with loading(f"clip: {model!r} could not be loaded"), _no_remote_code():
        return open_clip.create_model(model, **options).eval().requires_grad_(False)


@contextmanager
def _no_remote_code() -> Iterator[None]:
    """Where open_clip calls transformers without trust_remote_code=False, refuse to run code rather than ask."""
    asked_for, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = asked_for


def _twin(model: str) -> str | None:
    """The same architecture with the other activation (GELU or QuickGELU), if open_clip has it."""
    other = model.removesuffix(QUICK) if model.endswith(QUICK) else f"{model}{QUICK}"
    return other if other in open_clip.list_models() else None


def _load_file(model: str, path: str, tags: Sequence[str]) -> tuple[nn.Module, str]:
    """A local checkpoint: every key and shape has to fit (open_clip itself resizes position embeddings unasked)."""
    # A file does not record how its images were normalised; where all published weights of the model agree, it is so.
    known = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    keys = ("mean", "std", "interpolation", "resize_mode")
    settings = [{key: cfg[key] for key in keys if cfg.get(key) is not None} for cfg in known]
    agreed = settings[0] if settings and all(other == settings[0] for other in settings) else {}
    network = _create(model, pretrained_text=False, force_preprocess_cfg=agreed)

    def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = convert_state_dict(network, state)  # some publishers name their tensors differently
        custom = "positional_embedding" in state and not hasattr(network, "positional_embedding")
        return convert_to_custom_text_state_dict(state) if custom else state

    return network, f"weights {load_checkpoint(network, path, 'clip', target=repr(model), rename=rename)}"
