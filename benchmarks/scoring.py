"""Batched scoring against the originals' one-image calls and against a bare batched forward pass.

    python benchmarks/scoring.py                        # ViT-H-14, random weights; writes benchmarks/results/
    python benchmarks/scoring.py --model ViT-B-32 --images 32

For HPSv2 and PickScore, interleaved over the same images in memory (512 x 512, PIL):

- ours: `score_images` in batches, text features cached, images preprocessed in threads;
- one at a time: the published recipe, image and text towers for every image;
- as its package is called: the same, where the hpsv2 package also reloads its checkpoint on every call;
- bare: the image tower alone on a batch that is already on the device, the upper bound.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from reward_scorers.clip import HPSv2Scorer
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.towers import TwoTowers

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-H-14", help="open_clip architecture (default: %(default)s)")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=8, help="distinct prompts among the images")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one warm-up")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--bf16", action="store_true", help="run everything under bf16 autocast")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)) for _ in range(options.images)]
    prompts = [f"a photo of thing number {i % options.prompts}" for i in range(options.images)]
    rows = []
    for name, make in (("HPSv2.1", hpsv2), ("PickScore", pickscore)):
        with tempfile.TemporaryDirectory() as folder:
            scorer, one, reload = make(options.model, Path(folder))
            scorer.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16), torch.no_grad():
                rows.append((name, *measure(scorer, one, reload, images, prompts, options)))
    text = report(options, device, rows)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"scoring_{options.model}_{device.type}{'_bf16' if options.bf16 else ''}.md"
    file.write_text(text)
    print(text)
    return 0


One = Callable[[Image.Image, str], Tensor]
Reload = Callable[[], object]


def hpsv2(model: str, folder: Path) -> tuple[TwoTowers, One, Reload]:
    """The scorer with random weights, a one-image call as in the hpsv2 package, and that package's reload."""
    file = random_file(model, folder)
    scorer = HPSv2Scorer("2.1", file, model=model)

    def one(pil_image: Image.Image, prompt: str) -> Tensor:
        inputs = scorer.preprocess(pil_image)[None].to(scorer.device)
        images, texts, _ = scorer.model(inputs, scorer.tokenizer([prompt]).to(scorer.device))
        return torch.diagonal(images @ texts.T).cpu()

    def reload() -> object:
        return scorer.model.load_state_dict(torch.load(file, map_location=scorer.device)["state_dict"])

    return scorer, one, reload


def random_file(model: str, folder: Path) -> str:
    file = folder / "HPS_v2.1_compressed.pt"
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.create_model(model).state_dict()}, file)
    return str(file)


def pickscore(model: str, folder: Path) -> tuple[TwoTowers, One, Reload]:
    """The same for a transformers CLIP of open_clip's sizes, with the recipe of PickScore's model card."""
    sizes = open_clip.get_model_config(model)
    vision, text = sizes["vision_cfg"], sizes["text_cfg"]
    heads = vision["width"] // vision.get("head_width", 64)
    config = CLIPConfig(
        vision_config={"hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "hidden_act": "gelu",
                       "num_hidden_layers": vision["layers"], "num_attention_heads": heads,
                       "image_size": vision["image_size"], "patch_size": vision["patch_size"]},
        text_config={"hidden_size": text["width"], "intermediate_size": 4 * text["width"], "hidden_act": "gelu",
                     "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"]},
        projection_dim=sizes["embed_dim"],
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    vocabulary = open_clip.tokenizer.SimpleTokenizer()
    merges = [tuple(pair) for pair in vocabulary.bpe_ranks]
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # names in transformers
    words = {named.get(word, word): number for word, number in vocabulary.encoder.items()}
    CLIPTokenizer(vocab=words, merges=merges, pad_token="<|endoftext|>").save_pretrained(folder)
    processor = CLIPImageProcessorPil()
    processor.save_pretrained(folder)
    scorer = HFClipScorer(str(folder), name="pickscore")

    def one(pil_image: Image.Image, prompt: str) -> Tensor:
        image = processor(images=pil_image, return_tensors="pt").pixel_values.to(scorer.device)
        tokens = {name: value.to(scorer.device) for name, value in scorer.tokens([prompt]).items()}
        out = scorer.model(pixel_values=image, **tokens)
        return (scorer.model.logit_scale.exp() * (out.text_embeds @ out.image_embeds.T))[0].cpu()

    return scorer, one, lambda: None


def measure(
    scorer: TwoTowers,
    one: One,
    reload: Reload,
    images: list[Image.Image],
    prompts: list[str],
    options: argparse.Namespace,
) -> tuple[dict[str, list[float]], float]:
    """Seconds per image of each variant in each round, and the largest difference between ours and one at a time."""
    starts = range(0, len(images), options.batch_size)
    batches = [(images[i : i + options.batch_size], prompts[i : i + options.batch_size]) for i in starts]
    ready = [torch.stack([scorer.preprocess(image) for image in part]).to(scorer.device) for part, _ in batches]

    def ours() -> Tensor:
        scorer._texts.clear()
        return torch.cat([scorer.score_images(part, texts).cpu() for part, texts in batches])

    def single() -> Tensor:
        return torch.cat([one(image, prompt) for image, prompt in zip(images, prompts, strict=True)])

    def bare() -> Tensor:
        return torch.cat([scorer.encode_images(inputs).cpu() for inputs in ready])

    variants: dict[str, Callable[[], Any]] = {"ours": ours, "one at a time": single, "bare": bare, "reload": reload}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.rounds + 1):
        scores = {}
        for name, variant in variants.items():
            start = time.perf_counter()
            scores[name] = variant()
            if turn:
                # one reload is timed; it is the same for each image
                seconds[name].append((time.perf_counter() - start) / (1 if name == "reload" else len(images)))
    return seconds, (scores["ours"] - scores["one at a time"]).abs().max().item()


def report(
    options: argparse.Namespace, device: torch.device, rows: list[tuple[str, dict[str, list[float]], float]]
) -> str:
    """The table as markdown."""
    cpu = f"{os.cpu_count()}-core {platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    precision = "bf16" if options.bf16 else "float32"
    lines = ["# Scoring", "", f"`{' '.join(['python', 'benchmarks/scoring.py', *sys.argv[1:]])}`", "",
             f"{machine}. Python {platform.python_version()}, torch {torch.__version__}. {options.model}, {precision}, "
             f"{options.images} images of 512 x 512 under {options.prompts} prompts in batches of "
             f"{options.batch_size}; medians of {options.rounds} rounds.", "",
             "| scorer | ours, ms per image | one at a time | as its package is called | bare | one at a time / ours | "
             "package / ours | ours / bare | largest score difference |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, seconds, difference in rows:
        ours, single, bare, reload = (statistics.median(values) for values in seconds.values())
        package = single + reload
        lines.append(
            f"| {name} | {1000 * ours:.1f} | {1000 * single:.1f} | {1000 * package:.1f} | {1000 * bare:.1f} | "
            f"{single / ours:.2f} | {package / ours:.2f} | {ours / bare:.2f} | {difference:.1e} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
