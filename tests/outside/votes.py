"""A data format in a file of its own: each line is a prompt, two images and their votes, separated by tabs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from t2i_align.data.readers import register
from t2i_align.data.schema import Group, Skipped


@register("votes", detects=lambda path: path.suffix == ".votes")
def read_votes(path: Path) -> Iterator[Group | Skipped]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        prompt, one, other, votes_one, votes_other = line.split("\t")
        yield Group(
            id=str(number),
            prompt=prompt,
            candidates=(path.parent / one, path.parent / other),
            scores=(float(votes_one), float(votes_other)),
            origin=f"{path}, line {number}",
        )
