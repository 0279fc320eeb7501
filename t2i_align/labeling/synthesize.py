"""Preferences made from prompts alone: models x seeds -> images -> scorers -> groups (Syn-Pic, arXiv 2410.18013).

    <out>/settings.json       what it is made with; another run with other settings is refused
          images/000012/    one folder a prompt: <model>-<seed>.png, complete once it has this name
          scores/000000.json  what each scorer says of a block of prompts
          groups.jsonl        the groups, as the `jsonl` reader takes them, with each scorer's scores, seeds and models
          skipped.jsonl       what is not in there, and why

Images and scores that are there are not made again, so it continues after a kill. Several processes (torchrun,
accelerate launch, on several machines that share the folder) each take every so-many-th block; who finds all blocks
done writes `groups.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from tqdm import tqdm

from t2i_align.data.schema import Group, Skipped
from t2i_align.data.store import SKIPPED
from t2i_align.errors import UserError, unknown
from t2i_align.inference.generate import sample, sample_seed, save_image
from t2i_align.inference.models import adapter_on, load_pipeline, resolve_aligned, resolve_base
from t2i_align.inference.options import check_counts, check_precision, pick_device
from t2i_align.inference.prompts import resolve_prompts
from t2i_align.inference.scorers import build_scorers, unscorable
from t2i_align.labeling.annotate import Batch, raw_scores
from t2i_align.labeling.votes import majority, shares
from t2i_align.utils.files import differences, write_json

if TYPE_CHECKING:
    from pipelines import TrainablePipeline
    from reward_scorers import Scorer

SCORED_AT_ONCE = 8  # images, where no batch size is given
BLOCK = 32  # prompts that one process makes and scores before what it knows is written down
SETTINGS, GROUPS = "settings.json", "groups.jsonl"
PAIRS = ("best_worst", "all")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What came of it. missing: blocks that other processes have not finished; while there are any, nothing is out."""

    out: Path
    groups: int = 0
    skipped: int = 0
    missing: int = 0


def synthesize(
    prompts: str | Path | Sequence[str],
    models: Sequence[str | Path],
    scorers: str | Sequence[str | Scorer],
    out: str | Path,
    *,
    per_prompt: int = 4,
    pairs: str | None = None,
    agree: float = 0.0,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    precision: str = "fp32",
    device: str | None = None,
    progress: bool = True,
) -> Summary:
    """Make preference data from prompts.

    A candidate's score is the share of comparisons with the other candidates that it wins, over all scorers
    (phi of arXiv 2410.18013; a difference within a scorer's tie margin is half a win).

    Args:
        prompts: text file with one prompt per line, `testbed:dev`, or a list; each distinct one is used once.
        models: paths, Hub ids, training runs or LoRAs, `testbed:sd`.
        scorers: their specs.
        out: folder.
        per_prompt: images of each prompt by each model.
        pairs: `best_worst` or `all` pairs instead of groups of all candidates.
        agree: of a pair, at least this share of the scorers must prefer the better one; of a group, its best to its
            worst.
        seed, steps, guidance, negative_prompt, height, width, batch_size, precision, device: as for `generate`; each
            model's own where it is not given.

    Raises:
        UserError: anything above that cannot be used, or a folder begun with other settings.
    """
    texts = list(dict.fromkeys(resolve_prompts(prompts)))
    check_counts(per_prompt=per_prompt, steps=steps, batch_size=batch_size)
    check_precision(precision)
    if pairs is not None and pairs not in PAIRS:
        raise unknown("pairs", pairs, PAIRS)
    if not 0 <= agree <= 1:
        raise UserError(f"agree must lie in [0, 1], found {agree!r}")
    names = [str(model) for model in models]
    if len(set(names)) < len(names) or len(names) * per_prompt < 2:
        raise UserError(f"models: expected different ones that make 2 candidates or more, found {', '.join(names)}")
    for name in names:
        resolve_aligned(name)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = pick_device(device or _own_device())
    built = [scorer.to(place) for scorer in build_scorers(scorers)]
    work = _Work(
        Path(out).expanduser(), texts, names, per_prompt, seed, range(rank, -(-len(texts) // BLOCK), world), progress
    )
    sampling = {"steps": steps, "guidance": guidance, "negative_prompt": negative_prompt, "height": height,
                "width": width}  # fmt: skip
    work.begin({**sampling, "precision": precision}, {scorer.name: scorer.version for scorer in built})
    refused = work.refused(built)
    for number, name in enumerate(names):
        work.draw(number, name, refused, {**sampling, "batch_size": batch_size}, precision, place)
    work.score(built, refused, batch_size or SCORED_AT_ONCE)
    return work.finish(built, pairs, agree)


@dataclass
class _Work:
    """One process's share of the work, and the files that it comes to."""

    out: Path
    prompts: list[str]
    models: list[str]
    per_prompt: int
    seed: int
    blocks: range
    progress: bool

    def begin(self, sampling: dict[str, Any], scorers: dict[str, str]) -> None:
        """Start the folder, or continue one that was begun with the same settings."""
        text = "\n".join(self.prompts)
        wanted = {
            "prompts": hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16],
            "models": self.models,
            "per_prompt": self.per_prompt,
            "seed": self.seed,
            **sampling,
            "scorers": scorers,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        with FileLock(self.out / ".lock"):
            file = self.out / SETTINGS
            if not file.exists():
                if any(entry.name != ".lock" for entry in self.out.iterdir()):
                    raise UserError(f"{self.out}: the folder is not empty and holds no synthesis; choose another")
                write_json(file, wanted)
            elif differing := differences(json.loads(file.read_text()), wanted):
                raise UserError(f"{self.out}: this folder was begun with other settings: {'; '.join(differing)}.")

    def refused(self, scorers: Sequence[Scorer]) -> dict[int, str]:
        """Prompts that a scorer cannot judge, found before images are made of them."""
        reasons = {number: unscorable(scorers, self.prompts[number]) for number in self._own()}
        return {number: reason for number, reason in reasons.items() if reason}

    def draw(
        self, number: int, name: str, refused: dict[int, str], sampling: dict[str, Any], precision: str, device: str
    ) -> None:
        """This process's images by one model, which is loaded only where some are missing."""
        rows = [
            (prompt, k)
            for prompt in self._own()
            for k in range(self.per_prompt)
            if prompt not in refused and not self.image(prompt, number, k).exists()
        ]
        if not rows:
            return
        with _loaded(name, precision, device) as pipeline, self._bar(len(rows), f"draw {name}", "img") as bar:
            if pipeline.video:
                raise UserError(f"{name}: this model makes clips; preferences are made of images here")
            self._identify(name, pipeline.denoiser)
            *_, batch_size = pipeline.sampling(batch_size=sampling["batch_size"])
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                seeds = [sample_seed(self.seed, prompt, k) for prompt, k in part]
                made = sample(pipeline, [self.prompts[prompt] for prompt, _ in part], seeds, **sampling)
                for (prompt, k), image in zip(part, made, strict=True):
                    file = self.image(prompt, number, k)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    save_image(image, file)
                bar.update(len(part))

    def score(self, scorers: Sequence[Scorer], refused: dict[int, str], batch_size: int) -> None:
        """This process's blocks, each scored as a whole: [scorers, k] a prompt, or why there is none."""
        (self.out / "scores").mkdir(exist_ok=True)
        blocks = [block for block in self.blocks if not self._scores(block).exists()]
        with self._bar(len(blocks), "score", "block") as bar:
            for block in blocks:
                numbers = self._numbers(block)
                batch = Batch([self.group(number) for number in numbers if number not in refused])
                raw = raw_scores(batch, scorers, batch_size)
                found = {group.id: raw[group.id].tolist() for group in batch.left}
                skipped = {_name(n): refused[n] for n in numbers if n in refused} | batch.reasons
                write_json(self._scores(block), {"scores": found, "skipped": skipped})
                bar.update()

    def finish(self, scorers: Sequence[Scorer], pairs: str | None, agree: float) -> Summary:
        """Write the groups, if all blocks are there."""
        files = [self._scores(block) for block in range(-(-len(self.prompts) // BLOCK))]
        if missing := sum(not file.exists() for file in files):
            return Summary(out=self.out / GROUPS, missing=missing)
        rows: list[dict[str, Any]] = []
        skipped: list[Skipped] = []
        known = {name: self._identity(name) for name in self.models}  # none where a scorer refused all prompts
        identities = {name: json.loads(file.read_text()) for name, file in known.items() if file.exists()}
        for block, file in enumerate(files):
            stored = json.loads(file.read_text())
            for number in self._numbers(block):
                group = self.group(number)
                if group.id in stored["skipped"]:
                    skipped.append(Skipped(id=group.id, origin=group.origin, reason=stored["skipped"][group.id]))
                    continue
                raw = np.array(stored["scores"][group.id])
                for row in _rows(group, raw, scorers, pairs, agree):
                    if isinstance(row, Skipped):
                        skipped.append(row)
                    else:
                        rows.append(self._row(number, group, raw, row, scorers, identities))
        with FileLock(self.out / ".lock"):
            _write_lines(self.out / SKIPPED, map(asdict, skipped))
            _write_lines(self.out / GROUPS, rows)
        if not rows:
            raise UserError(f"{self.out}: no group is left of {len(self.prompts)} prompts; {SKIPPED} says why")
        return Summary(out=self.out / GROUPS, groups=len(rows), skipped=len(skipped))

    def group(self, number: int) -> Group:
        """A prompt's group, its candidates in the order of models and seeds."""
        media = [self.image(number, model, k) for model in range(len(self.models)) for k in range(self.per_prompt)]
        return Group(id=_name(number), prompt=self.prompts[number], candidates=tuple(media),
                     scores=(0.0,) * len(media), origin=f"{self.out}, prompt {number}")  # fmt: skip

    def image(self, prompt: int, model: int, k: int) -> Path:
        return self.out / "images" / _name(prompt) / f"{model}-{k}.png"

    def _row(
        self, number: int, group: Group, raw: np.ndarray, chosen: tuple[int, ...], scorers: Sequence[Scorer],
        identities: dict[str, dict[str, str]],
    ) -> dict[str, Any]:  # fmt: skip
        share = majority(raw, [scorer.tie_margin for scorer in scorers])
        places = [divmod(place, self.per_prompt) for place in chosen]
        return {
            "id": group.id if len(chosen) == len(group.candidates) else f"{group.id}#{chosen[0]}-{chosen[1]}",
            "prompt": group.prompt,
            "images": [self.image(number, model, k).relative_to(self.out).as_posix() for model, k in places],
            "scores": [float(share[place]) for place in chosen],
            "by_scorer": {
                scorer.name: {"version": scorer.version, "scores": [float(scores[place]) for place in chosen]}
                for scorer, scores in zip(scorers, raw, strict=True)
            },
            "seeds": [sample_seed(self.seed, number, k) for _, k in places],
            "models": [identities[self.models[model]] for model, _ in places],
        }

    def _own(self) -> list[int]:
        return [number for block in self.blocks for number in self._numbers(block)]

    def _numbers(self, block: int) -> range:
        return range(block * BLOCK, min((block + 1) * BLOCK, len(self.prompts)))

    def _scores(self, block: int) -> Path:
        return self.out / "scores" / f"{block:06d}.json"

    def _identity(self, name: str) -> Path:
        return self.out / f"model-{self.models.index(name)}.json"

    def _identify(self, name: str, denoiser: nn.Module) -> None:
        """Write down which weights a model's name stands for, and refuse others in the middle of the work."""
        found = {"model": name, "sha256": weights_hash(denoiser)}
        with FileLock(self.out / ".lock"):
            file = self._identity(name)
            if file.exists() and (stored := json.loads(file.read_text())) != found:
                raise UserError(f"{self.out}: {name} has other weights now; begun with {stored['sha256']}")
            write_json(file, found)

    def _bar(self, total: int, what: str, unit: str) -> Any:
        return tqdm(total=total, desc=what, unit=unit, disable=not self.progress)


def weights_hash(module: nn.Module) -> str:
    """A hash of a module's parameters, an adapter's with them: names, types and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _rows(
    group: Group, raw: np.ndarray, scorers: Sequence[Scorer], pairs: str | None, agree: float
) -> Iterator[tuple[int, ...] | Skipped]:
    """The places of the candidates of each group that is wanted, or why there is none."""
    margins = [scorer.tie_margin for scorer in scorers]
    order = np.argsort(-majority(raw, margins), kind="stable").tolist()
    prefers = shares(raw, margins)
    chosen = list(combinations(order, 2)) if pairs == "all" else [(order[0], order[-1])]
    for better, worse in chosen:
        name = group.id if pairs is None else f"{group.id}#{better}-{worse}"
        if pairs is not None and prefers[better, worse] == prefers[worse, better]:
            yield Skipped(id=name, origin=group.origin, reason="the scorers prefer neither")
        elif prefers[better, worse] < agree:
            reason = f"{prefers[better, worse]:.2f} of the scorers prefer the better one, {agree:g} were asked for"
            yield Skipped(id=name, origin=group.origin, reason=reason)
        else:
            yield (better, worse) if pairs else tuple(range(raw.shape[1]))


@contextmanager
def _loaded(name: str, precision: str, device: str) -> Iterator[TrainablePipeline]:
    found = resolve_aligned(name)
    if found.kind == "model":
        yield load_pipeline(found.path, precision, device)
        return
    pipeline = load_pipeline(resolve_base(None, found), precision, device)
    with adapter_on(pipeline, found):
        yield pipeline


def _own_device() -> str | None:
    """Of several processes on one machine, each has a GPU of its own."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


def _name(prompt: int) -> str:
    return f"{prompt:06d}"


def _write_lines(file: Path, rows: Any) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(temporary, file)
