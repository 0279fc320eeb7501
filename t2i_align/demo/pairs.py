"""Pairs to vote on, from folders of images, from what `generate` wrote, and from preference data."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from t2i_align.data import readers
from t2i_align.data.paths import inside
from t2i_align.data.schema import Group, Media, Selection
from t2i_align.demo.votes import Pair
from t2i_align.diffusion.randomness import permutation, stable_seed
from t2i_align.errors import UserError
from t2i_align.inference.generate import LIST
from t2i_align.utils.files import whole_lines

MAX_PAIRS = 1000
MAX_GROUPS = 4000  # of preference data, whose images may lie in the source itself and are then held in memory


class Candidate(NamedTuple):
    """An image or clip; name: where it lies in its source, model: what made it."""

    name: str
    media: Media | str
    prompt: str
    model: str
    seed: Any = None


def pairs_of(sources: Sequence[str | Path], limit: int = MAX_PAIRS) -> list[Pair]:
    """Pairs of the same prompt: within one source; of several folders, across them and with the same seed.

    Args:
        sources: folders of `generate`, or one source as `train` reads it, such as a folder of images with
            captions, or preference data.
        limit: of more, so many are drawn at random, always the same ones.

    Raises:
        UserError: a source that is none of these, or no two candidates for the same prompt.
    """
    read = [_candidates(source) for source in sources]
    if len(read) == 1:
        labelled = read[0]
        couples = _couples(labelled, lambda one: one.prompt)
    else:
        labels = _labels(sources)
        labelled = [one._replace(model=label) for label, part in zip(labels, read, strict=True) for one in part]
        couples = [
            couple
            for couple in _couples(labelled, lambda one: (one.prompt, one.seed))
            if couple[0].model != couple[1].model
        ]
    if not couples:
        need = "the same prompt and seed in two of the folders" if len(read) > 1 else "two images of the same prompt"
        raise UserError(f"{', '.join(map(str, sources))}: nothing to vote on: {need} are needed")
    kept = sorted(permutation(len(couples), "demo pairs").tolist()[:limit])
    return [pair(one.prompt, (one, other)) for one, other in (couples[place] for place in kept)]


def pair(prompt: str, candidates: Sequence[Candidate]) -> Pair:
    """A pair of candidates, whose id does not depend on their order."""
    one, other = sorted(candidates, key=lambda candidate: (candidate.model, candidate.name))
    key = stable_seed(prompt, one.model, one.name, other.model, other.name)
    return Pair(id=f"{key:016x}", prompt=prompt, media=(one.media, other.media), models=(one.model, other.model))


def _couples(candidates: Sequence[Candidate], key: Any) -> list[tuple[Candidate, Candidate]]:
    groups: dict[Hashable, list[Candidate]] = {}
    for one in candidates:
        groups.setdefault(key(one), []).append(one)
    return [couple for group in groups.values() for couple in combinations(group, 2)]


def _candidates(source: str | Path) -> list[Candidate]:
    folder = Path(source).expanduser()
    if (folder / LIST).is_file():
        return list(_generated(folder))
    try:
        items = readers.read(source, best_first=False, selection=Selection(limit=MAX_GROUPS))
    except UserError as error:
        raise UserError(f"{error} A folder of images needs a caption for each: fox.txt beside fox.png.") from error
    groups = (item for item in items if isinstance(item, Group))
    return [
        Candidate(f"{group.id}#{place}", media, group.prompt, "")
        for group in groups
        for place, media in enumerate(group.candidates)
    ]


def _generated(folder: Path) -> Iterator[Candidate]:
    """The samples of `generate`."""
    for number, row in enumerate(whole_lines(folder / LIST, repair=False), 1):
        origin = f"{folder / LIST}, line {number}"
        name, prompt = row.get("file"), row.get("prompt")
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise UserError(f"{origin}: expected texts under 'file' and 'prompt', found the keys {', '.join(row)}")
        model = row.get("lora") or row.get("model") or ""
        yield Candidate(name, inside(folder, name, origin), prompt, str(model), row.get("seed"))


def _labels(sources: Sequence[str | Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [Path(source).expanduser().absolute().parts for source in sources]
    if len({*parts}) < len(parts):
        raise UserError(f"{', '.join(map(str, sources))}: the same source twice")
    length = next(n for n in range(1, 1 + max(map(len, parts))) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-length:]) for part in parts]
