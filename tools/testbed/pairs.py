"""Make preference pairs: sample a base, let the oracle score, let an annotator label, write parquet.

The file has the columns of Pick-a-Pic v2, so it is read like the real data set. `jpg_0`, `jpg_1` hold
encoded bytes; `label_0` is 1 where the first image is preferred, 0 where the second is, 0.5 for ties.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from t2i_align.testbed.annotators import Annotator, Biased, Expert, Noisy
from t2i_align.testbed.clip_oracle import ClipVerdict
from t2i_align.testbed.oracle import Oracle, Verdict
from t2i_align.testbed.prompts import prompts
from tools.testbed.sampling import GUIDANCE, load, model_folder, sample

_TEXT, _FLOAT, _BOOL, _INT = pa.string(), pa.float64(), pa.bool_(), pa.int64()
SCHEMA = pa.schema(
    {
        "are_different": _BOOL,
        "best_image_uid": _TEXT,
        "caption": _TEXT,
        "created_at": pa.timestamp("ns"),
        "has_label": _BOOL,
        "image_0_uid": _TEXT,
        "image_0_url": _TEXT,
        "image_1_uid": _TEXT,
        "image_1_url": _TEXT,
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": _FLOAT,
        "label_1": _FLOAT,
        "model_0": _TEXT,
        "model_1": _TEXT,
        "ranking_id": _INT,
        "user_id": _INT,
        "num_example_per_prompt": _INT,
        # Not in Pick-a-Pic: what a simulation can tell besides.
        "seed_0": _INT,
        "seed_1": _INT,
        "reward_0": _FLOAT,
        "reward_1": _FLOAT,
        "faithfulness_0": _FLOAT,
        "faithfulness_1": _FLOAT,
        "quality_0": _FLOAT,
        "quality_1": _FLOAT,
        "oracle": _TEXT,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """How pairs are sampled and chosen.

    Of `candidates` images a prompt the best and the worst make a pair, the second best and the second
    worst another, and so on up to `per_prompt`, where rewards differ by `margin` at least. Of the pairs
    that differ in quality only, the share `quality_only` is kept: less than 1 where the base is so weak
    that quality differs far more often than faithfulness and would drown it.
    """

    candidates: int = 4
    per_prompt: int = 1
    margin: float = 0.1
    quality_only: float = 1.0
    steps: int = 12
    guidance: float = GUIDANCE
    prompts_per_batch: int = 32
    seed: int = 0


def encode_jpeg(image: Tensor) -> bytes:
    """An image [3, H, W] in [0, 1] as JPEG, quality 95 without chroma subsampling, which blurs hues."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes) -> Tensor:
    """Encoded bytes to float [3, H, W] in [0, 1]."""
    array = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255.0


def take(verdict: Verdict, index: Sequence[int] | np.ndarray) -> Verdict:
    """The verdict on a selection of the images."""
    index = np.asarray(index, int)
    return Verdict(
        reward=verdict.reward[index],
        faithfulness=verdict.faithfulness[index],
        strict=verdict.strict[index],
        quality=verdict.quality[index],
        attributes={name: values[index] for name, values in verdict.attributes.items()},
        views=tuple(verdict.views[i] for i in index),
    )


def choose(
    verdict: Verdict | ClipVerdict, number: int, config: PairsConfig, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """(winner, loser) indices into a verdict on number x candidates images, grouped by prompt."""
    pairs = []
    for p in range(number):
        rows = np.arange(p * config.candidates, (p + 1) * config.candidates)
        order = rows[np.argsort(-verdict.reward[rows], kind="stable")]
        for better, worse in list(zip(order, order[::-1], strict=True))[
            : min(config.per_prompt, config.candidates // 2)
        ]:
            if verdict.reward[better] - verdict.reward[worse] < config.margin:
                continue
            faithful = verdict.faithfulness[better] - verdict.faithfulness[worse] > 1e-6
            if faithful or rng.random() < config.quality_only:
                pairs.append((int(better), int(worse)))
    return pairs


def make_pairs(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    annotator: Annotator,
    config: PairsConfig,
    *,
    model: str = "tiny-sd",
    limit: int | None = None,
    oracle: Oracle | None = None,
) -> list[dict[str, object]]:
    """Rows of `SCHEMA`, at most `limit`; the left or right place of the winner is random.

    The oracle judges the images after JPEG, which is what a reader of the file sees.
    """
    oracle = oracle or Oracle()
    rows: list[dict[str, object]] = []
    starts = range(0, len(captions), config.prompts_per_batch)
    for start in tqdm(starts, desc="sampling pairs", unit="batch"):
        some = list(captions[start : start + config.prompts_per_batch])
        repeated = list(itertools.chain.from_iterable([p] * config.candidates for p in some))
        first = 1_000_000 * (config.seed + 1) + start * config.candidates
        seeds = range(first, first + len(repeated))
        images = sample(pipeline, repeated, seeds, steps=config.steps, guidance=config.guidance, batch=len(repeated))
        encoded = [encode_jpeg(image) for image in images]
        verdict = oracle.judge(torch.stack([decode(data) for data in encoded]), repeated)
        rng = np.random.default_rng((config.seed, start))
        chosen = choose(verdict, len(some), config, rng)
        swapped = rng.random(len(chosen)) < 0.5
        sides = [(b, a) if swap else (a, b) for (a, b), swap in zip(chosen, swapped, strict=True)]
        left, right = (take(verdict, [side[k] for side in sides]) for k in (0, 1))
        labels = annotator.label(left, right, rng)
        for (a, b), label in zip(sides, labels, strict=True):
            number = len(rows)
            rows.append(
                _row(repeated[a], (a, b), float(label), verdict, encoded, seeds, model, number, oracle, annotator)
            )
            if limit is not None and len(rows) >= limit:
                return rows
    return rows


def _row(
    caption: str,
    pair: tuple[int, int],
    label: float,
    verdict: Verdict,
    encoded: list[bytes],
    seeds: range,
    model: str,
    number: int,
    oracle: Oracle,
    annotator: Annotator,
) -> dict[str, object]:
    row: dict[str, object] = {
        "are_different": label != 0.5,
        "caption": caption,
        # A fixed date: the same command must write the same bytes.
        "created_at": datetime.datetime(2024, 1, 1) + datetime.timedelta(seconds=number),
        "has_label": True,
        "ranking_id": number,
        "user_id": getattr(annotator, "user_id", 0),
        "num_example_per_prompt": 1,
        "label_0": label,
        "label_1": 1.0 - label,
        "oracle": f"{oracle.version} faithfulness {oracle.faithfulness_weight}",
    }
    for side, i in enumerate(pair):
        # The seed is part of the name: two samples may well be the same bytes.
        uid = hashlib.sha256(encoded[i] + str(seeds[i]).encode()).hexdigest()[:32]
        row |= {
            f"jpg_{side}": encoded[i],
            f"image_{side}_uid": uid,
            f"image_{side}_url": "",
            f"model_{side}": model,
            f"seed_{side}": seeds[i],
            f"reward_{side}": float(verdict.reward[i]),
            f"faithfulness_{side}": float(verdict.faithfulness[i]),
            f"quality_{side}": float(verdict.quality[i]),
        }
    row["best_image_uid"] = row["image_0_uid"] if label > 0.5 else row["image_1_uid"] if label < 0.5 else ""
    return row


def write_parquet(rows: list[dict[str, object]], path: Path, *, force: bool = False) -> None:
    """Write rows in groups of 512, to a temporary name first.

    Raises:
        FileExistsError: `path` exists and `force` is not set.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; pass --force to replace it")
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, temporary, compression="zstd", row_group_size=512)
    temporary.replace(path)


def _annotator(args: argparse.Namespace) -> Annotator:
    if args.annotator == "expert":
        return Expert()
    if args.annotator == "noisy":
        return Noisy(flip=args.flip) if args.temperature is None else Noisy(temperature=args.temperature)
    return Biased()


def sampling_arguments(p: argparse.ArgumentParser, *, number: int, bases: str) -> None:
    """What `pairs` and `pairs-video` are both told; `begin` reads it."""
    p.add_argument("model", type=model_folder, help=f"folder of a diffusers pipeline, or {bases}")
    p.add_argument("--prompts", type=int, default=number, help="how many train prompts to sample")
    p.add_argument("--first", type=int, default=0, help="the first train prompt")
    p.add_argument("--limit", type=int, help="stop after so many pairs")
    p.add_argument("--candidates", type=int, default=PairsConfig.candidates)
    p.add_argument("--per-prompt", type=int, default=PairsConfig.per_prompt, help="most pairs of one prompt")
    p.add_argument("--steps", type=int, default=PairsConfig.steps, help="of the sampler")
    p.add_argument("--margin", type=float, default=PairsConfig.margin, help="smallest difference of reward")
    p.add_argument("--guidance", type=float, default=PairsConfig.guidance)
    p.add_argument("--seed", type=int, default=PairsConfig.seed)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--force", action="store_true", help="replace what --out holds")


def begin(args: argparse.Namespace) -> PairsConfig:
    """The configuration, once `--out` is known to be free."""
    if args.out.exists() and not args.force:
        raise SystemExit(f"{args.out} exists; pass --force to replace it")
    torch.set_num_threads(args.threads)
    told = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(PairsConfig) if hasattr(args, field.name)
    }
    return PairsConfig(**told)


def main(argv: list[str] | None = None) -> None:
    """Sample train prompts from a base and write the pairs."""
    p = argparse.ArgumentParser(prog="python -m tools.testbed pairs", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="parquet file to write")
    sampling_arguments(p, number=2400, bases="testbed:sd")
    p.add_argument("--quality-only", type=float, default=PairsConfig.quality_only, help="share kept of such pairs")
    p.add_argument("--annotator", choices=["expert", "noisy", "biased"], default="expert")
    p.add_argument("--flip", type=float, default=0.2, help="of the noisy annotator")
    p.add_argument("--temperature", type=float, help="of the noisy annotator; replaces --flip")
    args = p.parse_args(argv)
    config = begin(args)
    captions = prompts("train")[args.first : args.first + args.prompts]
    rows = make_pairs(load(args.model), captions, _annotator(args), config, model=args.model.name, limit=args.limit)
    write_parquet(rows, args.out, force=args.force)
    differ = sum(row["faithfulness_0"] != row["faithfulness_1"] for row in rows)
    print(f"{len(rows)} pairs of {len(captions)} prompts, {differ} differ in faithfulness: {args.out}")
