"""The data layer: opening a million groups, `prepare` against the VAE alone, and kills at random moments.

    python benchmarks/data.py                      # all three; writes benchmarks/results/data_<device>.md
    python benchmarks/data.py --only kills --kills 20

- size: a fresh process opens a cache of synthetic latents, selects and shuffles groups and loads the first batch.
  Then batches are timed with all shards open, interleaved with batches from a cache of a thousand groups.
- prepare: images per second of `store.write`, which also decodes images and encodes prompts (one per 15 pairs, as in
  Pick-a-Pic v2), against a loop that only runs the same VAE over the same pixels in memory; interleaved.
- kills: `prepare` is killed with SIGKILL at random moments, continued and killed again; in the end every file must
  equal that of an uninterrupted `prepare`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL

import pipelines
from t2i_align.config import DataConfig
from t2i_align.data import encode, readers
from t2i_align.data.encode import Encoder, Row
from t2i_align.data.loader import PreparedDataset
from t2i_align.data.media import load_pixels
from t2i_align.data.opening import choose
from t2i_align.data.schema import Group
from t2i_align.data.store import Store, write
from t2i_align.inference.models import resolve_model
from t2i_align.objectives.base import Requirements
from t2i_align.utils.files import LOCK

RESULTS = Path(__file__).parent / "results"
SHAPE, PROMPT_SHAPE = (4, 4, 4), (2, 8)  # small latents and embeddings: a batch costs what finding its rows costs
PROMPTS_EVERY = 15  # groups per prompt, as in Pick-a-Pic v2
BATCH = 8


class Synthetic(Encoder):
    """An encoder that returns random latents and runs no model."""

    columns = {"latents": pa.large_binary(), "shape": pa.list_(pa.int32()), "size": pa.list_(pa.int32())}
    text_columns = {"text": pa.string(), "embedding:prompt_embeds": pa.large_binary()}
    rows_per_shard, rows_at_once = 1024, 256
    description = {"conditioning": {"prompt_embeds": {"shape": list(PROMPT_SHAPE), "dtype": "float16"}}}

    def __init__(self) -> None:
        self.values = np.random.default_rng(0).standard_normal((64, *SHAPE)).astype(np.float16)

    def encode(self, groups: Sequence[Group]) -> list[Row | str]:
        return [
            {"latents": b"".join(self.values[(2 * int(group.id) + n) % 64].tobytes() for n in range(2)),
             "shape": SHAPE, "size": (16, 16)}
            for group in groups
        ]  # fmt: skip

    def encode_texts(self, texts: Sequence[str]) -> list[Row | None]:
        embedding = np.zeros(PROMPT_SHAPE, np.float16).tobytes()
        return [{"text": text, "embedding:prompt_embeds": embedding} for text in texts]


def synthetic(folder: Path, groups: int) -> Path:
    """A finished cache of `groups` pairs; reused if it exists."""
    out = folder / f"synthetic-{groups}"
    items = (
        Group(id=str(n), prompt=f"prompt {n // PROMPTS_EVERY}", candidates=(b"", b""), scores=(1.0, 0.0), origin="")
        for n in range(groups)
    )
    write(items, Synthetic(), out, fingerprint={"groups": groups}, total=groups)
    return out


def opened(folder: Path) -> tuple[PreparedDataset, Iterator[Any]]:
    """The dataset with its groups selected, and its shuffled loader, as training opens them."""
    source = choose(Store(folder), Requirements(candidates=2, ties=False), DataConfig(path=str(folder)))
    return source, source.loader(seed=0, start_step=0, batch_size=BATCH)


def first_batch(folder: Path) -> None:
    """Print the seconds to the first batch and the resident memory before and at its peak; run in a fresh process."""
    before = resident()
    start = time.perf_counter()
    source, loader = opened(folder)
    source.to_batch(next(loader), torch.device("cpu"))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "before": before, "peak": resident("VmHWM")}))


def resident(what: str = "VmRSS") -> float:
    """This process's resident memory in GB (VmHWM: its peak; `getrusage` would include the parent's)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024 / 1e9


def size(folder: Path, groups: int, batches: int) -> list[tuple[str, str, str]]:
    large, small = synthetic(folder, groups), synthetic(folder, 1000)
    command = [sys.executable, __file__, "--first-batch", str(large)]
    opening_process = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    times: dict[Path, list[float]] = {large: [], small: []}
    loaders = {path: opened(path) for path in times}
    shards = len(loaders[large][0].store.manifest["shards"])
    start = time.perf_counter()
    for number in range(shards):
        loaders[large][0].store.locate(1024 * number)
    opening = (time.perf_counter() - start) / shards
    for _ in range(batches):
        for path, (source, loader) in loaders.items():
            start = time.perf_counter()
            source.to_batch(next(loader), torch.device("cpu"))
            times[path].append(time.perf_counter() - start)
    each = {path: f"{1000 * statistics.median(of):.2f} ms" for path, of in times.items()}
    return [
        (f"{groups:,} groups: open, select, shuffle, first batch", f"{opening_process['seconds']:.2f} s", "<= 3 s"),
        ("resident memory then, including imports", f"{opening_process['peak']:.2f} GB", "<= 1 GB"),
        ("imports alone", f"{opening_process['before']:.2f} GB", ""),
        (f"a batch of {BATCH}, {shards} shards open, median of {batches}", each[large], "as with 1 k"),
        ("the same from a cache of 1,000 groups", each[small], ""),
        ("opening a shard, once per process at first access", f"{1000 * opening:.2f} ms", ""),
    ]


def pairs(count: int) -> list[Group]:
    """The first bundled pairs, with one prompt per 15 pairs as in Pick-a-Pic."""
    groups = [item for item in islice(readers.read("testbed:pairs"), count) if isinstance(item, Group)]
    return [replace(group, prompt=groups[n - n % PROMPTS_EVERY].prompt) for n, group in enumerate(groups)]


def prepare(folder: Path, groups: int, rounds: int) -> list[tuple[str, str, str]]:
    """With the tiny base, whose VAE is about as fast as decoding a JPEG, and with Stable Diffusion's VAE."""
    tiny = pipelines.load(resolve_model("testbed:sd"))
    rows = prepare_against_bare(folder, "the tiny VAE", tiny, groups, rounds, *tiny.default_size)
    tiny.pipe.register_modules(vae=random_vae())
    real = pipelines.wrap(tiny.pipe)
    return rows + prepare_against_bare(folder, "SD's VAE", real, max(1, groups // 16), min(rounds, 3), 128, 128)


def random_vae() -> AutoencoderKL:
    """Stable Diffusion's VAE with random weights."""
    torch.manual_seed(0)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    return AutoencoderKL(
        down_block_types=down, up_block_types=up, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        latent_channels=4, sample_size=512,
    ).eval()  # fmt: skip


def prepare_against_bare(
    folder: Path, what: str, pipeline: pipelines.TrainablePipeline, groups: int, rounds: int, height: int, width: int
) -> list[tuple[str, str, str]]:
    data = pairs(groups)
    pixels = torch.stack([load_pixels(media, height, width) for group in data for media in group.candidates])
    ours, bare = [], []
    for turn in range(rounds):
        out = folder / f"prepare-{turn}"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        encoder = encode.Latents(pipeline, [(height, width)], batch_size=BATCH)
        write(data, encoder, out, fingerprint={"turn": turn}, progress=False)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        for part in pixels.split(BATCH):
            pipeline.encode_pixels(part).half().numpy()
        bare.append(time.perf_counter() - start)
    ratio = statistics.median(b / o for o, b in zip(ours, bare, strict=True))
    rate = len(pixels) / statistics.median(ours)
    return [
        (f"prepare by {what}, {len(pixels)} images of {height} x {width}, {len({g.prompt for g in data})} prompts",
         f"{rate:.3g} images/s", ""),
        ("relative to the VAE alone", f"{ratio:.2f} x", ">= 0.9 x"),
    ]  # fmt: skip


def kills(folder: Path, groups: int, number: int) -> list[tuple[str, str, str]]:
    pipeline = pipelines.load(resolve_model("testbed:sd"))
    data = pairs(groups)
    height, width = pipeline.default_size
    encode.MAX_ROWS_PER_SHARD = max(1, groups // 16)

    def run(out: Path) -> None:
        encoder = encode.Latents(pipeline, [(height, width)], batch_size=BATCH)
        write(data, encoder, out, fingerprint={"kills": 0}, progress=False)

    whole, killed = folder / "whole", folder / "killed"
    for out in (whole, killed):
        shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    run(whole)
    duration = time.perf_counter() - start
    rng, done, finished = random.Random(0), 0, 0
    while done < number:
        child = os.fork()
        if child == 0:
            run(killed)
            os._exit(0)
        time.sleep(rng.uniform(0, duration * 0.9))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        done += os.WIFSIGNALED(status)
        if (killed / "manifest.json").exists():  # finished before the kill: compare it and begin a new one
            finished += check(whole, killed)
            shutil.rmtree(killed)
    run(killed)
    finished += check(whole, killed)
    return [(f"kill -9 at {number} random moments, continued each time", f"{finished} caches finished, identical", "")]


def check(one: Path, other: Path) -> bool:
    """True if two folders hold the same files, byte for byte; otherwise exits with the name of one that differs."""
    hashes = [
        {
            file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in folder.rglob("*")
            if file.is_file() and file.name != LOCK
        }
        for folder in (one, other)
    ]
    differing = {name for name in hashes[0].keys() | hashes[1].keys() if hashes[0].get(name) != hashes[1].get(name)}
    if differing:
        raise SystemExit(f"{min(differing)} differs in {len(differing)} files")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("size", "prepare", "kills"), help="default: all three")
    parser.add_argument("--groups", type=int, default=1_000_000, help="in the large cache (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=300, help="timed batches (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=128, help="prepared pairs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of prepare (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where caches are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--first-batch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.first_batch:
        first_batch(options.first_batch)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            "size": lambda: size(folder, options.groups, options.batches),
            "prepare": lambda: prepare(folder, options.pairs, options.rounds),
            "kills": lambda: kills(folder, options.pairs, options.kills),
        }
        rows = [row for name, part in parts.items() if options.only in (None, name) for row in part()]
    table = ["| what | measured | target |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    arguments = " ".join(["python benchmarks/data.py", *sys.argv[1:]])
    text = "\n".join([f"`{arguments}`", "", f"{platform.processor() or platform.machine()}, one thread, torch "
                      f"{torch.__version__}", "", *table, ""])  # fmt: skip
    print(text)
    file = options.out / f"data_{options.only or 'cpu'}.md"
    file.write_text(text)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
