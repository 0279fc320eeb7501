"""Make preference pairs: sample a base, let the oracle judge, keep the clear pairs.

Images become a parquet file with the columns of Pick-a-Pic v2, labelled by a simulated annotator, so it is read like
the real data set: `jpg_0`, `jpg_1` hold encoded bytes; `label_0` is 1 where the first image is preferred, 0 where the
second is, 0.5 for ties. Clips become JSON Lines beside lossless video files.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

import pipelines
from t2i_align.data.media import load_pixels, save_clip, to_bytes
from t2i_align.testbed.oracle import Oracle, Verdict
from t2i_align.testbed.scenes import SIDE
from t2i_align.testbed.world import CLIPS, prompts
from t2i_align.utils.files import atomic_file, atomic_folder
from t2i_align.utils.settings import Count, NonNegative, Share, Whole, build, settings, with_overrides
from tools.testbed.annotators import Annotator, biased
from tools.testbed.sampling import GUIDANCE, model_folder, output_options, sample

SCHEMA = pa.schema(
    {
        **dict.fromkeys(("are_different", "has_label"), pa.bool_()),
        **dict.fromkeys(("best_image_uid", "caption"), pa.string()),
        "created_at": pa.timestamp("ns"),
        **dict.fromkeys([f"image_{side}_{name}" for side in (0, 1) for name in ("uid", "url")], pa.string()),
        **dict.fromkeys(("jpg_0", "jpg_1"), pa.binary()),
        **dict.fromkeys(("label_0", "label_1"), pa.float64()),
        **dict.fromkeys(("model_0", "model_1"), pa.string()),
        **dict.fromkeys(("ranking_id", "user_id", "num_example_per_prompt"), pa.int64()),
        # Not in Pick-a-Pic: what a simulation knows besides.
        **dict.fromkeys(("seed_0", "seed_1"), pa.int64()),
        **{f"{name}_{side}": pa.float64() for name in ("reward", "faithfulness", "quality") for side in (0, 1)},
        "oracle": pa.string(),
    }
)
FPS = 8
LINES, FOLDER = "pairs.jsonl", "clips"


@settings
class PairsConfig:
    """How pairs are sampled and chosen.

    Of `candidates` samples per prompt the best and the worst make a pair, the second best and the second worst another,
    and so on up to `per_prompt`, where rewards differ by `margin` at least. Of the pairs that differ in quality only,
    the share `quality_only` is kept: less than 1 where the base is so weak that quality differs far more often than
    faithfulness and would drown it. The samples of a prompt take their scale of `guidance` in turn, as people's images
    come with several.
    """

    candidates: Count = 4
    per_prompt: Count = 1
    margin: NonNegative = 0.1
    quality_only: Share = 1.0
    steps: Count = 12
    guidance: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (GUIDANCE,)
    prompts_per_batch: Count = 32
    seed: Whole = 0


@dataclasses.dataclass(frozen=True)
class Samples:
    """A batch of judged samples: prompts, seeds and stored samples [N], and (better, worse) indices."""

    captions: list[str]
    seeds: range
    stored: list[Any]
    verdict: Any
    pairs: list[tuple[int, int]]
    rng: np.random.Generator


def encode_jpeg(image: Tensor) -> bytes:
    """An image [3, H, W] in [0, 1] as JPEG, quality 95 without chroma subsampling, which blurs hues."""
    buffer = io.BytesIO()
    Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy()).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes) -> Tensor:
    """Encoded bytes to float [3, 64, 64] in [0, 1]."""
    return load_pixels(data, SIDE, SIDE)


def take(verdict: Verdict, index: Sequence[int]) -> Verdict:
    """The verdict on a selection of the images."""
    rows = np.asarray(index, int)
    columns = {name: getattr(verdict, name)[rows] for name in ("reward", "faithfulness", "strict", "quality")}
    attributes = {name: values[rows] for name, values in verdict.attributes.items()}
    return Verdict(**columns, attributes=attributes, views=tuple(verdict.views[i] for i in rows))


def choose(verdict: Verdict, number: int, config: PairsConfig, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(winner, loser) indices into a verdict on number x candidates samples, grouped by prompt."""
    pairs = []
    for p in range(number):
        rows = np.arange(p * config.candidates, (p + 1) * config.candidates)
        order = rows[np.argsort(-verdict.reward[rows], kind="stable")]
        most = min(config.per_prompt, config.candidates // 2)
        for better, worse in zip(order[:most], order[::-1][:most], strict=True):
            if verdict.reward[better] - verdict.reward[worse] < config.margin:
                continue
            faithful = verdict.faithfulness[better] - verdict.faithfulness[worse] > 1e-6
            if faithful or rng.random() < config.quality_only:
                pairs.append((int(better), int(worse)))
    return pairs


def sample_in_turn(family: Any, captions: Sequence[str], seeds: Sequence[int], config: PairsConfig) -> Tensor:
    """A sample of each caption, whose prompts have `candidates` in a row; each of these takes its own guidance."""
    scales = [config.guidance[i % config.candidates % len(config.guidance)] for i in range(len(captions))]
    drawn: dict[int, Tensor] = {}
    for scale in sorted(set(scales)):
        rows = [i for i, own in enumerate(scales) if own == scale]
        texts, numbers = [captions[i] for i in rows], [seeds[i] for i in rows]
        samples = sample(family, texts, numbers, steps=config.steps, guidance=scale)
        drawn |= dict(zip(rows, samples, strict=True))
    return torch.stack([drawn[i] for i in range(len(captions))])


def sample_pairs(
    family: Any,
    captions: Sequence[str],
    config: PairsConfig,
    oracle: Oracle,
    store: Callable[[Tensor], tuple[list[Any], Tensor]],
) -> Iterator[Samples]:
    """Batches of judged samples; `store` returns what is written of them, and the pixels that a reader will see."""
    for first in tqdm(range(0, len(captions), config.prompts_per_batch), desc="sampling pairs", unit="batch"):
        batch = captions[first : first + config.prompts_per_batch]
        repeated = [caption for caption in batch for _ in range(config.candidates)]
        first_seed = 1_000_000 * (config.seed + 1) + first * config.candidates
        seeds = range(first_seed, first_seed + len(repeated))
        stored, pixels = store(sample_in_turn(family, repeated, seeds, config))
        verdict = oracle.judge(pixels, repeated)
        rng = np.random.default_rng((config.seed, first))
        yield Samples(repeated, seeds, stored, verdict, choose(verdict, len(batch), config, rng), rng)


def make_pairs(
    family: Any, captions: Sequence[str], annotator: Annotator, config: PairsConfig, *, model: str = "tiny-sd"
) -> Iterator[dict[str, Any]]:
    """Rows of `SCHEMA`; the left or right place of the winner is random. The oracle judges the images after JPEG."""

    def store(images: Tensor) -> tuple[list[bytes], Tensor]:
        encoded = [encode_jpeg(image) for image in images]
        return encoded, torch.stack([decode(data) for data in encoded])

    oracle, numbers = Oracle(), itertools.count()
    for batch in sample_pairs(family, captions, config, oracle, store):
        swapped = batch.rng.random(len(batch.pairs)) < 0.5
        sides = [pair[::-1] if swap else pair for pair, swap in zip(batch.pairs, swapped, strict=True)]
        left, right = (take(batch.verdict, [pair[side] for pair in sides]) for side in (0, 1))
        for pair, label in zip(sides, annotator.label(left, right, batch.rng).tolist(), strict=True):
            number = next(numbers)
            row: dict[str, Any] = {
                "are_different": label != 0.5,
                "caption": batch.captions[pair[0]],
                # A fixed date: the same command must write the same bytes.
                "created_at": datetime.datetime(2024, 1, 1) + datetime.timedelta(seconds=number),
                "has_label": True,
                "num_example_per_prompt": 1,
                "ranking_id": number,
                "user_id": annotator.user_id,
                "oracle": signature(oracle),
            }
            for side, i in enumerate(pair):
                # The seed is part of the name: two samples may well be the same bytes.
                uid = hashlib.sha256(batch.stored[i] + str(batch.seeds[i]).encode()).hexdigest()[:32]
                values = {"jpg": batch.stored[i], "model": model, "seed": batch.seeds[i]}
                values["label"] = 1.0 - label if side else label
                values |= {name: getattr(batch.verdict, name)[i] for name in ("reward", "faithfulness", "quality")}
                row |= {f"{name}_{side}": value for name, value in values.items()}
                row |= {f"image_{side}_uid": uid, f"image_{side}_url": ""}
            row["best_image_uid"] = row[f"image_{int(label < 0.5)}_uid"] if row["are_different"] else ""
            yield row


def signature(oracle: Oracle) -> str:
    """What a row keeps of the oracle that judged it."""
    return f"{oracle.version} faithfulness {oracle.faithfulness_weight}"


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows in groups of 512, atomically."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=512)


def make_clip_pairs(family: Any, captions: Sequence[str], config: PairsConfig, out: Path) -> Iterator[dict[str, Any]]:
    """Lines of JSON, each yielded when its two clips lie under `out`; the oracle sees what is written, 8 bits."""

    def store(clips: Tensor) -> tuple[list[Tensor], Tensor]:
        stored = to_bytes(clips)
        return list(stored), stored.float() / 255

    oracle = CLIPS.oracle()
    for batch in sample_pairs(family, captions, config, oracle, store):
        for pair in batch.pairs:
            seeds = [batch.seeds[i] for i in pair]
            names = [f"{FOLDER}/{seed}.mp4" for seed in seeds]
            for name, i in zip(names, pair, strict=True):
                save_clip(batch.stored[i], out / name, FPS, lossless=True)
            reward, faithfulness, frames = batch.verdict.reward, batch.verdict.faithfulness, batch.verdict.frames
            yield {
                "id": "{}-{}".format(*seeds),
                "prompt": batch.captions[pair[0]],
                "chosen": names[0],
                "rejected": names[1],
                "scores": [round(float(reward[i]), 4) for i in pair],
                "faithfulness": [round(float(faithfulness[i]), 4) for i in pair],
                "frame_scores": [frames[i].round(4).tolist() for i in pair],
                "seeds": seeds,
                "oracle": signature(oracle),
            }


def options(p: argparse.ArgumentParser, video: bool) -> None:
    p.add_argument("model", type=model_folder, help="folder of a diffusers pipeline, testbed:sd or another base")
    output_options(p, f"folder to write {LINES} and {FOLDER}/ to" if video else "parquet file to write")
    p.add_argument("--prompts", type=int, default=1000 if video else 2400, help="how many train prompts to sample")
    p.add_argument("--first", type=int, default=0, help="the first train prompt")
    p.add_argument("--limit", type=int, help="stop after so many pairs")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="such as margin=0.05, see PairsConfig")
    if not video:
        p.add_argument("--annotator", choices=["expert", "noisy", "biased"], default="expert")
        p.add_argument("--flip", type=float, default=0.2, help="of the noisy annotator")
        p.add_argument("--temperature", type=float, help="of the noisy annotator; replaces --flip")


def run(args: argparse.Namespace) -> None:
    """Sample train prompts from a base and write the pairs."""
    config = build(PairsConfig, with_overrides({}, args.overrides))
    captions = prompts("video-train" if args.video else "train")[args.first : args.first + args.prompts]
    family = pipelines.load(args.model)
    if args.video:
        with atomic_folder(args.out) as folder:
            (folder / FOLDER).mkdir()
            rows = list(itertools.islice(make_clip_pairs(family, captions, config, folder), args.limit))
            (folder / LINES).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        differ = sum(len(set(row["faithfulness"])) > 1 for row in rows)
    else:
        noise = {"flip": args.flip} if args.temperature is None else {"temperature": args.temperature}
        annotator = {"expert": Annotator(), "noisy": Annotator(**noise), "biased": biased()}[args.annotator]
        pairs = make_pairs(family, captions, annotator, config, model=args.model.name)
        rows = list(itertools.islice(pairs, args.limit))
        write_parquet(rows, args.out)
        differ = sum(row["faithfulness_0"] != row["faithfulness_1"] for row in rows)
    print(f"{len(rows)} pairs of {len(captions)} prompts, {differ} differ in faithfulness: {args.out}")
