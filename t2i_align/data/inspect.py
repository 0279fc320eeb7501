"""`t2i-align data inspect`: what a source holds and how far it can be trusted, on one page."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i_align.data import readers, sheets, tables
from t2i_align.data.annotations import Annotations
from t2i_align.data.media import ImageError, decode
from t2i_align.data.opening import Survey
from t2i_align.data.schema import Group, Items, Media, Selection, Skipped
from t2i_align.data.store import REASONS_SHOWN
from t2i_align.diffusion.randomness import stable_seed
from t2i_align.errors import UserError, printable
from t2i_align.inference.models import resolve_model
from t2i_align.utils import html
from t2i_align.utils.files import check_own, write_text

SHOWN_SIDE = 256  # pixels of an example's longer side
BINS = 24
SIZES_SHOWN = 12


@dataclass
class Findings(Survey):
    """A survey with users, prompts and images, the last over the first so many groups (`opened`).

    judged: per prompt and images, the preference of each group with them. by_scorer: each scorer's scores of groups,
    with the labels. shares: of votes for the loser of a pair. lengths, limits: prompt lengths in words or in an
    encoder's tokens, and how many it takes.
    """

    source: str = ""
    format: str = ""
    names: Sequence[str] = ()
    opened: int = 0
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
        """Images with the fingerprint of an earlier one."""
        return sum(count - 1 for count in self.images.values())

    @property
    def disagreement(self) -> tuple[int, float | None]:
        """How many pairs were judged more than once, and the share of two judgements of them that differ."""
        again = [votes for votes in self.judged.values() if len(votes) > 1]
        differing = [a != b for votes in again for a, b in combinations(votes, 2)]
        return len(again), sum(differing) / len(differing) if differing else None

    def __repr__(self) -> str:
        return f"Findings({self.groups} groups of {self.source}, {self.skips.total()} rows skipped)"

    def _repr_html_(self) -> str:
        return html.page(render(self))

    def agreement(self) -> dict[tuple[str, str], float]:
        """The share of candidate pairs, without ties, that two scorers order alike; `label` is the source's own."""
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
            f"{self.source}: {self.format}, columns {', '.join(self.names) or 'none'}",
            f"{self.groups} groups, {self.skips.total()} rows skipped, {self.ties.total()} ties, "
            f"{len(self.prompts)} prompts, {len(self.users)} users",
            f"{self.opened} groups opened: {self.sizes.total()} images, {self.duplicates} like an earlier one, "
            f"{self.twins} groups with two that look alike, {self.unreadable.total()} unreadable",
        ]
        for name, limit in self.limits.items():
            lines.append(f"{sum(length > limit for length in self.lengths[name])} prompts exceed {limit} {name}")
        if differing is not None:
            lines.append(f"{again} pairs were judged more than once; two judgements differ in {differing:.1%}")
        return "\n".join(lines)

    def add(self, item: Group | Skipped) -> None:
        super().add(item)
        if isinstance(item, Group):
            self.prompts[item.prompt] += 1
            self.users.update([] if item.user is None else [item.user])
            if len(item.scores) == 2 and abs(sum(item.scores) - 1) < 1e-6 and min(item.scores) >= 0:
                self.shares.append(min(item.scores))

    def count_images(self, group: Group) -> None:
        """Decode a group's images and compare their fingerprints."""
        self.opened += 1
        try:
            images = [decode(media) for media in group.candidates]
        except ImageError as error:
            self.unreadable[str(error)] += 1
            return
        self.sizes.update(image.size for image in images)
        prints = [fingerprint(image) for image in images]
        self.images.update(prints)
        self.twins += len(set(prints)) < len(prints)
        if len(prints) == 2:  # the same pair may be listed the other way round
            preferred = (group.scores[0] > group.scores[1]) - (group.scores[0] < group.scores[1])
            key = (group.prompt, *sorted(prints))
            self.judged[key].append(preferred if prints == sorted(prints) else -preferred)


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
    check_own("data inspect", target)
    path = readers.resolve(source)
    name = readers.detect(path, format)
    names = [printable(column) for column in next(map(tables.header, tables.files(path)), [])]
    findings = Findings(source=printable(str(source)), format=name, names=names)
    scorers = dict(entry for file in (path, *map(Path, annotations)) for entry in _by_scorer(file))
    for item in _items(partial(readers.read, path, name, Annotations.load(annotations), best_first=False), images):
        findings.add(item)
        if not isinstance(item, Group):
            continue
        if item.id in scorers:
            findings.by_scorer.append({"label": item.scores, **scorers[item.id]})
        if findings.opened < images:
            findings.count_images(item)
            # The groups with the smallest hashes are a sample that depends on neither order nor number.
            shown = sorted([*findings.examples, item], key=lambda group: stable_seed(0, group.id))
            findings.examples = shown[:examples]
    findings.check_usable(source)
    _measure_prompts(findings, model)
    write_text(target, render(findings))
    return findings


def render(findings: Findings) -> str:
    """The page as HTML text."""
    sizes = {f"{width} x {height}": count for (width, height), count in findings.sizes.most_common(SIZES_SHOWN)}
    ratios = [round(100 * width / height) for (width, height), count in findings.sizes.items() for _ in range(count)]
    return html.ENVIRONMENT.get_template("data/inspect.html.jinja").render(
        findings=findings,
        lengths={name: _histogram(values, findings.limits.get(name)) for name, values in findings.lengths.items()},
        sizes=_bars(sizes),
        bins=BINS,
        ratios=_histogram(ratios),
        candidates=_bars({str(k): count for k, count in sorted(findings.candidates.items())}),
        users=_histogram(list(findings.users.values())),
        shares=_histogram([round(100 * share) for share in findings.shares] if {*findings.shares} - {0, 0.5} else []),
        disagreement=findings.disagreement,
        agreement=sorted(findings.agreement().items()),
        skips=findings.skips.most_common(SIZES_SHOWN),
        unreadable=findings.unreadable.most_common(REASONS_SHOWN),
        repeated=[(prompt, count) for prompt, count in findings.prompts.most_common(REASONS_SHOWN) if count > 1],
        examples=[{**vars(group), "user": group.user, "images": [_inline(media) for media in group.candidates]}
                  for group in (example.best_first() for example in findings.examples)],
    )  # fmt: skip


def fingerprint(image: Image.Image) -> str:
    """A perceptual hash: where brightness rises from left to right on 9 x 8 pixels (dHash), and the mean colour.

    Equal for an image that was scaled or saved again; the colour tells plain images apart.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    rises = np.packbits(small[:, 1:] > small[:, :-1] + 2).tobytes().hex()
    colour = np.asarray(image.resize((1, 1), Image.Resampling.BOX)).reshape(-1) // 16
    return rises + bytes(colour.astype(np.uint8)).hex()


def _items(read: Callable[..., Items], images: int) -> Items:
    """The first groups with their images, all others without: a source may hold terabytes of them."""
    rows = 0
    for rows, item in enumerate(read(selection=Selection(limit=images)), start=1):  # noqa: B007 - used below
        yield item
    yield from islice(read(images=False), rows, None)


def _by_scorer(file: Path) -> Iterator[tuple[str, dict[str, Sequence[float]]]]:
    """What `relabel` and `synthesize` wrote beside the scores that decide, by group id."""
    if tables.kind(file) == ".jsonl" and file.is_file():
        for number, _, entry in sheets.json_entries(file):
            if isinstance(scores := entry.get("by_scorer"), dict):
                yield str(entry.get("id", f"{file.name}:{number}")), {key: scores[key]["scores"] for key in scores}


def _measure_prompts(findings: Findings, model: str | None) -> None:
    """Prompt lengths in the tokens of each of a model's encoders, or in words."""
    prompts = list(findings.prompts)
    if model is None:
        findings.lengths["words"] = [len(prompt.split()) for prompt in prompts]
        return
    from transformers import AutoTokenizer

    folders = sorted(folder for folder in Path(resolve_model(model)).glob("tokenizer*") if folder.is_dir())
    if not folders:
        raise UserError(f"{model}: no tokenizer in it; name the folder of a diffusers model")
    for folder in folders:
        tokenizer, name = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), f"tokens of {folder.name}"
        findings.lengths[name] = [len(ids) for ids in tokenizer(prompts, truncation=False)["input_ids"]]
        findings.limits[name] = tokenizer.model_max_length


def _histogram(values: Sequence[int], limit: int | None = None) -> dict[str, Any] | None:
    """Bars of equal width over whole numbers; `limit` is where a line is drawn."""
    if not values:
        return None
    low, high = min(values), max(*values, limit or 0)
    width = -(-(high - low + 1) // BINS)
    counts = Counter((value - low) // width for value in values)
    bars = {f"{low + b * width}": counts[b] for b in range((high - low) // width + 1)}
    line = None if limit is None else (limit - low + 1) / (width * len(bars))
    over = sum(value > limit for value in values) if limit else 0
    return {**_bars(bars), "median": statistics.median(values), "high": max(values), "line": line, "over": over,
            "limit": limit}  # fmt: skip


def _bars(counts: Mapping[str, int]) -> dict[str, Any]:
    most = max(counts.values(), default=1)
    return {"bars": [{"label": label, "count": count, "share": count / most} for label, count in counts.items()]}


def _inline(media: Media) -> dict[str, Any] | None:
    """A small copy as a data URI; None for an image that cannot be read."""
    try:
        image = decode(media)
    except ImageError:
        return None
    pixelated = max(image.size) < html.PIXELATED_BELOW
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    return {"uri": html.data_uri(image), "pixelated": pixelated}
