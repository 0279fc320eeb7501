"""Column maps: which column of a table holds what; those of published data sets are recognised by their columns.

    Columns(candidates=["left", "right"], votes=["votes_left", "votes_right"], prompt="text")
    Columns(candidates="image_path", ranks="rank", group="prompt_id")

JSON Lines with paths is a published layout too:

    {"prompt": "a red fox", "chosen": "a.png", "rejected": "b.png"}
    {"prompt": "a red fox", "images": ["a.png", "b.png", "c.png"], "scores": [3, 1, 2]}
    {"prompt": "a red fox runs", "videos": ["a.mp4", "folder of frames"], "scores": [1, 0]}

Optional keys are "id" and those of `schema.COLUMNS`; others are left alone. Paths are relative to the file's own folder
and may not leave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path

from t2i_align.data import tables
from t2i_align.data.schema import COLUMNS
from t2i_align.errors import UserError, unknown
from t2i_align.utils.settings import Bool, settings

ORDERS = ("scores", "ranks", "votes", "shares", "winner", "best_first")
Names = list[str] | str
KINDS = {
    "jsonl": tables.JSON,
    "webdataset": (".tar",),
    "pickapic": (".parquet",),
}  # layouts recognised by their kind of file


@settings
class Columns:
    """Column names. A list of names has one per candidate; a single name is of a column that holds a list.

    candidates: images or clips: their bytes, or paths in `folder`, which is relative to the table's own.
    prompt: where a row has none, the caption of its best candidate stands in; None: always.
    Exactly one of these says which is better:
        scores: numbers, higher is better.
        ranks: numbers, 1 is the best. They become the share of the other candidates that one beats, ties counting half.
        votes: how many voted for each; they become shares of all votes.
        shares: of votes, which add up to 1.
        winner: the name of a candidate's column, its place from 0, its own value, or `tie`.
        best_first: true where candidates are listed in that order.
    judged: a column that is false for rows without a judgement.
    id: unique per row; with `id_if_unique`, only where all rows of the table differ in it.
    group: rows with the same value here are one group, with one candidate a row and no lists.
    columns: where optional columns are found, by their names in `schema.COLUMNS`; with `own_names`, all others are
        looked for under these names.
    """

    candidates: Names
    prompt: str | None = "prompt"
    scores: Names | None = None
    ranks: Names | None = None
    votes: Names | None = None
    shares: Names | None = None
    winner: str | None = None
    best_first: Bool = False
    judged: str | None = None
    id: str | None = None
    id_if_unique: Bool = False
    group: str | None = None
    folder: str = "."
    columns: dict[str, Names] = field(default_factory=dict)
    own_names: Bool = False

    def __post_init__(self) -> None:
        given = [name for name in ORDERS if getattr(self, name)]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise UserError(f"columns: exactly one of {', '.join(ORDERS)} says which is better; found {found}")
        if unknown_names := self.columns.keys() - COLUMNS.keys():
            raise unknown("column", min(unknown_names), COLUMNS)
        if not self.prompt and "captions" not in self.columns:
            raise UserError("columns: prompt names no column, and there are no captions that could stand in for it")
        per_candidate = {name: getattr(self, name) for name in ORDERS[:4]}
        per_candidate |= {name: value for name, value in self.columns.items() if COLUMNS[name].per_candidate}
        for name, value in per_candidate.items():
            alike = isinstance(self.candidates, list) and isinstance(value, list)
            if isinstance(value, list) and not (alike and len(value) == len(self.candidates)):
                raise UserError(f"columns: {name} names {len(value)} columns, candidates {self.candidates!r}")
        if self.group and (isinstance(self.candidates, list) or given[0] not in ORDERS[:4]):
            raise UserError("columns: with group, candidates is one column and scores, ranks or votes another")

    @property
    def order(self) -> str:
        """Which of ORDERS is given."""
        return next(name for name in ORDERS if getattr(self, name))

    @property
    def required(self) -> list[str]:
        """The columns without which there are no groups."""
        better = None if self.best_first else getattr(self, self.order)
        return _flat(self.candidates, better, self.prompt or self.columns["captions"], self.group)

    @property
    def names(self) -> list[str]:
        """All columns that are read."""
        return [*dict.fromkeys([*self.required, *_flat(self.judged, self.id, *self.optional.values())])]

    @property
    def optional(self) -> Mapping[str, Names]:
        """Where each optional column is looked for."""
        return {**{name: name for name in COLUMNS if self.own_names}, **self.columns}

    def missing(self, names: Sequence[str]) -> list[str]:
        """The required columns that are not among `names`."""
        return [name for name in self.required if name not in names]


def _flat(*names: Names | None) -> list[str]:
    return [one for name in names if name for one in (name if isinstance(name, list) else [name])]


PAIRS = Columns(candidates=["chosen", "rejected"], best_first=True, id="id", own_names=True)
RANKINGS = Columns(candidates="images", scores="scores", id="id", own_names=True)
# Pick-a-Pic v1 and v2 (arXiv 2305.01569): a label of 1 is the preferred image, 0.5 and 0.5 a tie. With `caption_0` and
# `caption_1` it is Pick-Double-Caption (arXiv 2502.06023), whose authors publish no list of columns.
PICKAPIC = Columns(
    candidates=["jpg_0", "jpg_1"],
    shares=["label_0", "label_1"],
    prompt="caption",
    judged="has_label",
    id="ranking_id",
    id_if_unique=True,
    columns={"user": "user_id", "captions": ["caption_0", "caption_1"]},
)
RAPIDATA = Columns(
    candidates=["image1", "image2"],
    votes=["weighted_results_image1_preference", "weighted_results_image2_preference"],
)

PUBLISHED: dict[str, Sequence[Columns]] = {
    # ImageRewardDB (arXiv 2304.05977): a row per image, ranked among those of its prompt. Before HPDv2, whose columns
    # it has as well.
    "imagereward": [Columns(candidates="image_path", ranks="rank", group="prompt_id")],
    # HPDv2 (arXiv 2306.09341): train.json with `human_preference` 1 for the better of two, test.json with ranks.
    "hpdv2": [
        Columns(candidates="file_path", scores="human_preference"),
        Columns(candidates="image_path", scores="human_preference"),
        Columns(candidates="image_path", ranks="rank"),
    ],
    # HPDv3 (arXiv 2508.03789): `path1` is the better image; `confidence` and `choice_dist`, which many rows lack, are
    # left alone.
    "hpdv3": [Columns(candidates=["path1", "path2"], best_first=True)],
    # Rapidata: counts of answers, or their sums weighted by annotator.
    "rapidata": [RAPIDATA, replace(RAPIDATA, votes=["votes_image1", "votes_image2"])],
    # One person's choice between two per row, as the demo writes them.
    "demo": [Columns(candidates=["left", "right"], winner="vote", id="id", columns={"user": "user"})],
    "pairs": [PAIRS, RANKINGS],
    "jsonl": [PAIRS, replace(RANKINGS, candidates="videos"), RANKINGS],
    # Samples with images `chosen` and `rejected`, or any with `winner`, `scores`, or `label_0` and so on.
    "webdataset": [
        replace(PAIRS, id=None),
        replace(RANKINGS, id=None, scores=None, winner="winner"),
        replace(RANKINGS, id=None),
    ],
    "pickapic": [PICKAPIC, replace(PICKAPIC, prompt=None)],
}


def detects(path: Path, *, name: str) -> bool:
    """Whether a table looks like the layout `name`."""
    parts = tables.files(path)
    if not parts:
        return False
    if name in KINDS:  # so that the errors of such a file name what is expected
        return parts[0].suffix in KINDS[name]
    if parts[0].suffix == ".tar" or (name == "pairs" and parts[0].suffix in tables.JSON):
        return False
    names = tables.columns(parts[0])
    return any(not columns.missing(names) for columns in PUBLISHED[name])


def maps_of(path: Path, name: str) -> Sequence[Columns]:
    """The column maps of the layout `name`, for a table at `path`."""
    if name == "hpdv2" and (path.parent / path.stem).is_dir():  # the images lie in `train/` or `test/` beside the file
        return [replace(columns, folder=path.stem) for columns in PUBLISHED[name]]
    return PUBLISHED[name]
