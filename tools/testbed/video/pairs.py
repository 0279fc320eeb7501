"""Make preference pairs of clips: sample the video base, let the oracle judge, write JSON Lines and lossless clips.

Of a prompt's samples the best and the worst make a pair where their rewards differ clearly. Beside what a reader of
JSON Lines takes, a line has what a simulation can tell: rewards, the quality of every frame, seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from t2i_align.data.media import save_clip, to_bytes
from t2i_align.testbed.clip_oracle import ClipOracle
from t2i_align.testbed.prompts import prompts
from tools.testbed.pairs import PairsConfig, begin, choose, sampling_arguments
from tools.testbed.sampling import load, sample

FPS = 8
PAIRS, CLIPS = "pairs.jsonl", "clips"


def make_pairs(pipeline: Any, captions: Sequence[str], config: PairsConfig, out: Path) -> Iterator[dict[str, object]]:
    """Lines of `PAIRS`, each yielded when its two clips lie under `out`; the oracle sees what is written, 8 bits."""
    oracle = ClipOracle()
    for start in tqdm(range(0, len(captions), config.prompts_per_batch), desc="sampling pairs", unit="batch"):
        some = list(captions[start : start + config.prompts_per_batch])
        repeated = list(itertools.chain.from_iterable([caption] * config.candidates for caption in some))
        first = 1_000_000 * (config.seed + 1) + start * config.candidates
        seeds = range(first, first + len(repeated))
        clips = to_bytes(sample(pipeline, repeated, seeds, steps=config.steps, guidance=config.guidance))
        verdict = oracle.judge(clips.float() / 255, repeated)
        rng = np.random.default_rng((config.seed, start))
        for pair in choose(verdict, len(some), config, rng):
            names = [f"{CLIPS}/{seeds[i]}.mp4" for i in pair]
            for name, i in zip(names, pair, strict=True):
                save_clip(clips[i], out / name, FPS, lossless=True)
            yield {
                "id": f"{seeds[pair[0]]}-{seeds[pair[1]]}",
                "prompt": repeated[pair[0]],
                "chosen": names[0],
                "rejected": names[1],
                "scores": [round(float(verdict.reward[i]), 4) for i in pair],
                "faithfulness": [round(float(verdict.faithfulness[i]), 4) for i in pair],
                "frame_scores": [verdict.frames[i].round(4).tolist() for i in pair],
                "seeds": [seeds[i] for i in pair],
                "oracle": f"{oracle.version} faithfulness {oracle.faithfulness_weight}",
            }


def main(argv: list[str] | None = None) -> None:
    """Sample train prompts from a base and write the pairs."""
    p = argparse.ArgumentParser(prog="python -m tools.testbed pairs-video", description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help=f"folder to write {PAIRS} and {CLIPS}/ to")
    sampling_arguments(p, number=1000, bases="testbed:wan")
    args = p.parse_args(argv)
    config = begin(args)
    captions = prompts("video-train")[args.first : args.first + args.prompts]
    temporary = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / CLIPS).mkdir(parents=True)
    made = make_pairs(load(args.model), captions, config, temporary)
    lines = list(itertools.islice(made, args.limit))
    (temporary / PAIRS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if args.out.exists():
        shutil.rmtree(args.out)
    temporary.rename(args.out)
    differ = sum(line["faithfulness"][0] != line["faithfulness"][1] for line in lines)  # type: ignore[index]
    print(f"{len(lines)} pairs of {len(captions)} prompts, {differ} differ in faithfulness: {args.out / PAIRS}")
