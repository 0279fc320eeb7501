"""What a source holds and how far it can be trusted: counts, sizes, duplicates, prompts, disagreement; as one page."""

from __future__ import annotations

import base64
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from t2i_align.data import readers, tables
from t2i_align.data.annotations import Annotations
from t2i_align.data.media import ImageError, decode
from t2i_align.data.readers import REASONS_SHOWN
from t2i_align.data.schema import Group, Items, Skipped
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError
from t2i_align.inference.models import resolve_model

SHOWN_SIDE = 256  # pixels of an example's longer side
BINS = 24
SIZES_SHOWN = 12

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("t2i_align.data", "."),
    autoescape=True,  # prompts come from anywhere
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass
class Findings:
    """What was counted. Of images: of the first so many groups only (`opened`).

    judged: for the same prompt and images, what each group with them prefers. by_scorer: each scorer's scores of
    groups, with those that decide. shares: of votes that went to the loser of a pair.
    """

    source: str
    format: str
    columns: list[str]
    groups: int = 0
    opened: int = 0
    ties: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)
    candidates: Counter[int] = field(default_factory=Counter)
    present: Counter[str] = field(default_factory=Counter)
    users: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    twins: int = 0
    judged: dict[tuple[Any, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    shares: list[float] = field(default_factory=list)
    by_scorer: list[dict[str, Sequence[float]]] = field(default_factory=list)
    examples: list[Group] = field(default_factory=list)

    @property
    def duplicates(self) -> int:
        """Images that look like one that was seen before."""
        return sum(count - 1 for count in self.images.values())

    @property
    def disagreement(self) -> tuple[int, float | None]:
        """How many pairs were judged more than once, and the share of two judgements of them that differ."""
        again = [votes for votes in self.judged.values() if len(votes) > 1]
        differing = [a != b for votes in again for a, b in combinations(votes, 2)]
        return len(again), sum(differing) / len(differing) if differing else None

    def agreement(self) -> dict[tuple[str, str], float]:
        """The share of candidate pairs, ties apart, that two scorers order alike; `label` is what decides."""
        same: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for scores in self.by_scorer:
            for one, other in combinations(scores, 2):
                for i, j in combinations(range(len(scores[one])), 2):
                    first, second = scores[one][i] - scores[one][j], scores[other][i] - scores[other][j]
                    if first and second:
                        same[one, other].append((first > 0) == (second > 0))
        return {names: sum(values) / len(values) for names, values in same.items()}

    def summary(self) -> str:
        """A few lines for the terminal."""
        again, differing = self.disagreement
        lines = [
            f"{self.source}: {self.format}, columns {', '.join(self.columns) or 'none'}",
            f"{self.groups} groups, {sum(self.skips.values())} rows skipped, {self.ties} ties, "
            f"{len(self.prompts)} prompts, {len(self.users)} users",
            f"{self.opened} groups opened: {sum(self.sizes.values())} images, {self.duplicates} seen before, "
            f"{self.twins} groups with the same image twice, {sum(self.unreadable.values())} unreadable",
        ]
        for name, lengths in self.lengths.items():
            if limit := self.limits.get(name):
                lines.append(f"{sum(length > limit for length in lengths)} prompts exceed {limit} {name}")
        if differing is not None:
            lines.append(f"{again} pairs were judged more than once; two judgements differ in {differing:.1%}")
        return "\n".join(lines)


def inspect(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    annotations: Sequence[str | Path] = (),
    model: str | None = None,
    images: int = 2000,
    examples: int = 12,
) -> Findings:
    """Count what a source holds and write a page about it.

    Args:
        source: file or folder of preference data, or anything else that `data.path` takes.
        out: HTML file.
        format: format of the source; `auto` detects it.
        annotations: files that add to the source, such as scores.
        model: path of a model whose tokenizers prompts are measured with; without one, words are counted.
        images: groups whose images are opened: the first ones. Those of the rest are not even read.
        examples: groups that are shown, chosen among these by their ids.

    Raises:
        UserError: a source or model that cannot be used.
    """
    target = Path(out).expanduser()
    if target.suffix not in (".html", ".htm"):
        raise UserError(f"{out}: expected the name of an .html file to write")
    path = readers.resolve(source)
    name = readers.detect(path, format)
    added = Annotations.load(annotations)
    found = Findings(str(source), name, tables.columns(path))
    scorers = dict(_by_scorer([path, *map(Path, annotations)]))
    for item in _items(partial(readers.read, path, name, added, best_first=False), images):
        _count(item, found, images, examples, scorers)
    if not found.groups:
        raise UserError(f"{source}: no usable group. First reasons: {'; '.join(found.skips)}")
    _measure(found, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(found), encoding="utf-8")
    return found


def fingerprint(image: Image.Image) -> str:
    """A perceptual hash: where brightness rises from left to right on 9 x 8 pixels (dHash), and the mean colour.

    Equal for an image that was scaled or saved again; the colour tells plain images apart.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    rises = np.packbits(small[:, 1:] > small[:, :-1] + 2).tobytes().hex()
    colour = np.asarray(image.resize((1, 1), Image.Resampling.BOX)).reshape(-1) // 16
    return rises + bytes(colour.astype(np.uint8)).hex()


def render(found: Findings) -> str:
    """The page as HTML text."""
    lengths = {name: _histogram(values, found.limits.get(name)) for name, values in found.lengths.items()}
    per_user = list(found.users.values())
    common = {f"{width} x {height}": count for (width, height), count in found.sizes.most_common(SIZES_SHOWN)}
    ratios = [round(100 * width / height) for (width, height), count in found.sizes.items() for _ in range(count)]
    return _ENVIRONMENT.get_template("inspect.html.jinja").render(
        found=found,
        lengths=lengths,
        sizes=_bars(common),
        bins=BINS,
        ratios=_histogram(ratios),
        candidates=_bars({str(k): count for k, count in sorted(found.candidates.items())}),
        users=_histogram(per_user) if per_user else None,
        shares=_histogram([round(100 * share) for share in found.shares]) if {*found.shares} - {0, 0.5} else None,
        disagreement=found.disagreement,
        agreement=sorted(found.agreement().items()),
        skips=found.skips.most_common(SIZES_SHOWN),
        unreadable=found.unreadable.most_common(REASONS_SHOWN),
        repeated=[(prompt, count) for prompt, count in found.prompts.most_common(REASONS_SHOWN) if count > 1],
        examples=[_example(group) for group in found.examples],
    )


def _items(read: Callable[..., Items], images: int) -> Items:
    """The first groups with their images, all others without: a source may hold terabytes of them."""
    rows = opened = 0
    for item in read():
        if opened == images:
            break
        rows, opened = rows + 1, opened + isinstance(item, Group)
        yield item
    yield from islice(read(images=False), rows, None)


def _count(
    item: Group | Skipped, found: Findings, images: int, examples: int, scorers: dict[str, dict[str, Sequence[float]]]
) -> None:
    if isinstance(item, Skipped):
        found.skips[item.reason] += 1
        return
    found.groups += 1
    found.candidates[len(item.candidates)] += 1
    found.ties += item.is_tie
    found.present.update(item.present)
    found.prompts[item.prompt] += 1
    if item.user is not None:
        found.users[item.user] += 1
    if len(item.scores) == 2 and abs(sum(item.scores) - 1) < 1e-6 and min(item.scores) >= 0:
        found.shares.append(min(item.scores))
    if item.id in scorers:
        found.by_scorer.append({"label": item.scores, **scorers[item.id]})
    if found.opened < images:
        found.opened += 1
        _open(item, found)
        # The groups with the least hashes are a sample that depends on neither order nor number.
        found.examples = sorted([*found.examples, item], key=lambda group: stable_seed(0, group.id))[:examples]


def _open(group: Group, found: Findings) -> None:
    looks = []
    for media in group.candidates:
        try:
            image = decode(media)
        except ImageError as error:
            found.unreadable[str(error)] += 1
            return
        found.sizes[image.size] += 1
        looks.append(fingerprint(image))
    found.images.update(looks)
    found.twins += len(set(looks)) < len(looks)
    if len(looks) == 2:  # the same pair may be listed the other way round
        preferred = (group.scores[0] > group.scores[1]) - (group.scores[0] < group.scores[1])
        key = (group.prompt, *sorted(looks))
        found.judged[key].append(preferred if looks == sorted(looks) else -preferred)


def _by_scorer(files: Iterable[Path]) -> Iterator[tuple[str, dict[str, Sequence[float]]]]:
    """What `relabel` and `synthesize` wrote beside the scores that decide, by group id."""
    for file in files:
        if file.suffix != ".jsonl" or not file.is_file():
            continue
        for number, _, entry in tables.json_entries(file):
            said = entry.get("by_scorer")
            if isinstance(said, dict):
                yield str(entry.get("id", f"{file.name}:{number}")), {key: said[key]["scores"] for key in said}


def _measure(found: Findings, model: str | None) -> None:
    """Prompt lengths in the tokens of each of a model's encoders, or in words."""
    prompts = list(found.prompts)
    if model is None:
        found.lengths["words"] = [len(prompt.split()) for prompt in prompts]
        return
    from transformers import AutoTokenizer

    folders = sorted(folder for folder in Path(resolve_model(model)).glob("tokenizer*") if folder.is_dir())
    if not folders:
        raise UserError(f"{model}: no tokenizer in it; name the folder of a diffusers model")
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        name = f"tokens of {folder.name}"
        found.lengths[name] = [len(ids) for ids in tokenizer(prompts, truncation=False)["input_ids"]]
        found.limits[name] = tokenizer.model_max_length


def _histogram(values: Sequence[int], limit: int | None = None) -> dict[str, Any] | None:
    """Bars of equal width over whole numbers; `limit` is where a line is drawn."""
    if not values:
        return None
    low, high = min(values), max(max(values), limit or 0)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = Counter((value - low) // width for value in values)
    bars = [(f"{low + b * width}", counts[b]) for b in range((high - low) // width + 1)]
    line = None if limit is None else (limit - low + 1) / (width * len(bars))
    return {**_bars(dict(bars)), "median": statistics.median(values), "high": max(values), "line": line,
            "over": sum(value > limit for value in values) if limit else 0, "limit": limit}  # fmt: skip


def _bars(counts: dict[str, int]) -> dict[str, Any]:
    most = max(counts.values(), default=1)
    return {"bars": [{"label": label, "count": count, "share": count / most} for label, count in counts.items()]}


def _example(group: Group) -> dict[str, Any]:
    best = group.best_first()
    shown = [_inline(media) for media in best.candidates]
    return {"prompt": group.prompt, "id": group.id, "user": group.user, "scores": best.scores, "images": shown}


def _inline(media: Any) -> str | None:
    try:
        image = decode(media)
    except ImageError:
        return None
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
