"""The data of `claims.py`: four images per prompt from the base, and each condition's labels, captions and likes.

pairs           best against worst of four by the oracle's reward
noisy           two of the four at random; scores with Bradley-Terry noise, which flips about a quarter of them
similar         the two nearest in reward, a fifth of the labels flipped
lists           all four with their rewards
likes           unpaired: the winner for half of the prompts, the loser for the others
texts           the winner alone, with its prompt and a perturbed one
captions c p h  pairs with DCPO's captions
wrong prompts   pairs, half of whose prompts are perturbed; captions describe the images
style           an image with a magenta frame against the same without; the base never produces frames
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from t2i_align.inference.generate import sample
from t2i_align.inference.models import load_pipeline
from t2i_align.inference.options import build_scorers
from t2i_align.labeling.models import DRAWN, load_captioner, load_perturber
from t2i_align.testbed import prompts

CANDIDATES = 4
POOL_SEED = 5_000_000  # no other images of the project are sampled with these seeds
MARGIN = 0.1
NOISE = 0.15  # temperature of the Bradley-Terry labels, in units of the reward
FLIPPED = 0.2
FRAME = np.array([220, 30, 200], dtype=np.uint8)
FRAME_WIDTH = 3
DONE = "conditions.json"


def frame_score(image: Image.Image) -> float:
    """How close an image's border is to the frame's colour: 1 where equal, 0 at the distance of black or beyond."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH] = False
    distance = np.linalg.norm(pixels[border] - FRAME, axis=1).mean()
    return float(max(0.0, 1.0 - distance / np.linalg.norm(FRAME)))


def framed(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image.convert("RGB")).copy()
    inner = pixels[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH].copy()
    pixels[:] = FRAME
    pixels[FRAME_WIDTH:-FRAME_WIDTH, FRAME_WIDTH:-FRAME_WIDTH] = inner
    return Image.fromarray(pixels)


def make_conditions(folder: Path, base: str, count: int, *, steps: int) -> None:
    """Sample the images and write one JSONL file per condition, unless they exist."""
    settings = {"base": base, "prompts": count, "steps": steps, "seed": POOL_SEED}
    if (folder / DONE).exists():
        if json.loads((folder / DONE).read_text())["settings"] != settings:
            raise SystemExit(f"{folder}: contains data made with other settings; choose another --work")
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    texts = prompts("train")[:count]
    pool = _pool(folder, base, texts, steps)
    rng = np.random.default_rng(POOL_SEED)
    captioner, perturber = load_captioner(DRAWN), load_perturber("rules")
    chosen = [p for p in range(count) if np.ptp(pool[p]) >= MARGIN]
    best = {p: int(np.argmax(pool[p])) for p in chosen}
    worst = {p: int(np.argmin(pool[p])) for p in chosen}
    perturbed = dict(zip(range(count), perturber(texts, range(count)), strict=True))

    def name(p: int, k: int) -> str:
        return f"images/{p:05d}_{k}.png"

    def described(p: int, k: int) -> str:
        with Image.open(folder / name(p, k)) as image:
            return captioner([image.convert("RGB")], [texts[p]])[0] or texts[p]

    def pair(p: int, better: int, worse: int, **more: Any) -> dict[str, Any]:
        scores = [float(pool[p, better]), float(pool[p, worse])]
        return {"id": str(p), "prompt": texts[p], "images": [name(p, better), name(p, worse)], "scores": scores} | more

    rows: dict[str, list[dict[str, Any]]] = {}
    rows["pairs"] = [pair(p, best[p], worst[p]) for p in chosen]
    rows["lists"] = [
        {
            "id": str(p),
            "prompt": texts[p],
            "images": [name(p, k) for k in range(CANDIDATES)],
            "scores": pool[p].tolist(),
        }
        for p in chosen
    ]
    rows["noisy"], flips = [], 0
    for p in chosen:
        a, b = rng.permutation(CANDIDATES)[:2]
        scores = pool[p, [a, b]] + rng.gumbel(scale=NOISE, size=2)  # the difference is logistic: Bradley-Terry
        flips += (scores[0] - scores[1]) * (pool[p, a] - pool[p, b]) < 0
        rows["noisy"].append(pair(p, a, b, scores=scores.tolist()))
    rows["similar"] = []
    for p in range(count):
        order = np.argsort(pool[p])
        gaps = np.diff(pool[p, order])
        gaps[gaps < 0.01] = np.inf  # ties are not used
        at = int(np.argmin(gaps))
        if np.isfinite(gaps[at]):
            a, b = int(order[at + 1]), int(order[at])
            a, b = (b, a) if rng.random() < FLIPPED else (a, b)
            rows["similar"].append(pair(p, a, b, scores=[1.0, 0.0]))
    rows["likes"] = []
    for i, p in enumerate(chosen):
        k, score = (best[p], 1.0) if i % 2 == 0 else (worst[p], -1.0)
        rows["likes"].append({"id": str(p), "prompt": texts[p], "images": [name(p, k)], "scores": [score]})
    rows["texts"] = [
        {"id": str(p), "prompt": texts[p], "images": [name(p, best[p])], "scores": [1.0],
         "negative_caption": perturbed[p]}
        for p in chosen if perturbed[p] is not None
    ]  # fmt: skip
    descriptions = {p: (described(p, best[p]), described(p, worst[p])) for p in tqdm(chosen, desc="captions")}
    changed = perturber([descriptions[p][1] for p in chosen], chosen)
    rows["captions-c"] = [pair(p, best[p], worst[p], captions=list(descriptions[p])) for p in chosen]
    rows["captions-p"] = [
        pair(p, best[p], worst[p], captions=[texts[p], perturbed[p]]) for p in chosen if perturbed[p] is not None
    ]
    rows["captions-h"] = [
        pair(p, best[p], worst[p], captions=[descriptions[p][0], text])
        for p, text in zip(chosen, changed, strict=True) if text is not None
    ]  # fmt: skip
    rows["wrong-prompts"] = [
        row | ({"prompt": perturbed[p]} if i % 2 and perturbed[p] is not None else {})
        for i, (p, row) in enumerate(zip(chosen, rows["captions-c"], strict=True))
    ]
    rows["style"] = []
    for p in range(count):
        with Image.open(folder / name(p, 0)) as image:
            framed(image).save(folder / f"images/{p:05d}_framed.png")
        images = [f"images/{p:05d}_framed.png", name(p, 0)]
        rows["style"].append({"id": str(p), "prompt": texts[p], "images": images, "scores": [1.0, 0.0]})
    for condition, groups in rows.items():
        (folder / f"{condition}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    facts = {"groups": {condition: len(groups) for condition, groups in rows.items()},
             "noisy_flipped": round(flips / len(chosen), 3)}  # fmt: skip
    (folder / DONE).write_text(json.dumps({"settings": settings, **facts}, indent=1))
    print(json.dumps(facts))


def _pool(folder: Path, base: str, texts: Sequence[str], steps: int) -> np.ndarray:
    """Sample and save the images; returns the oracle's rewards, [prompts, CANDIDATES]."""
    file = folder / "rewards.npy"
    if file.exists():
        rewards: np.ndarray = np.load(file)
        return rewards
    pipeline = load_pipeline(base)
    (oracle,) = build_scorers("oracle")
    rows = []
    at_once = 12
    for start in tqdm(range(0, len(texts), at_once), desc="pool"):
        repeated = [text for text in texts[start : start + at_once] for _ in range(CANDIDATES)]
        seeds = range(POOL_SEED + start * CANDIDATES, POOL_SEED + start * CANDIDATES + len(repeated))
        images = sample(pipeline, repeated, list(seeds), steps=steps, guidance=1.0, batch_size=len(repeated))
        for i, image in enumerate(images):
            image.save(folder / f"images/{start + i // CANDIDATES:05d}_{i % CANDIDATES}.png")
        reward, _ = oracle.judge(images, repeated)
        rows.append(reward.double().numpy().reshape(-1, CANDIDATES))
    np.save(file, np.concatenate(rows))
    return np.concatenate(rows)
