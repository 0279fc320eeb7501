"""The layouts of published data sets and of this project's own votes: formats that are told by their columns.

HPDv2 (arXiv 2306.09341): train.json with `human_preference` 1 for the better of two, test.json with ranks of many; the
images lie in `train/` or `test/` beside it. HPDv3 (arXiv 2508.03789): `path1` is the better image; `confidence` and
`choice_dist`, which many rows lack, are left alone. ImageRewardDB (arXiv 2304.05977): a row per image, ranked among
those of its prompt. Rapidata: counts of answers, or their sums weighted by who gave them. Demo: one person's choice
between two a row, as the demo writes them. Pick-a-Pic in webdataset shards: `original_prompt`, `jpg_0`, `label_0` ….
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from t2i_align.data import columns, jsonl, tables
from t2i_align.data.columns import Columns
from t2i_align.data.media import MEDIA_SUFFIXES
from t2i_align.data.schema import Group, Items, Skipped
from t2i_align.data.tables import Row
from t2i_align.errors import UserError

LAYOUTS: dict[str, tuple[Columns, ...]] = {
    # Before HPDv2, whose columns it has as well.
    "imagereward": (Columns(candidates="image_path", ranks="rank", group="prompt_id"),),
    "hpdv2": (
        Columns(candidates="file_path", scores="human_preference"),
        Columns(candidates="image_path", scores="human_preference"),
        Columns(candidates="image_path", ranks="rank"),
    ),
    "hpdv3": (Columns(candidates=["path1", "path2"], best_first=True),),
    "rapidata": (
        Columns(
            candidates=["image1", "image2"],
            votes=["weighted_results_image1_preference", "weighted_results_image2_preference"],
        ),
        Columns(candidates=["image1", "image2"], votes=["votes_image1", "votes_image2"]),
    ),
    "demo": (Columns(candidates=["left", "right"], winner="vote", user="user", id="id"),),
    "pairs": (
        Columns(candidates=["chosen", "rejected"], best_first=True, user="user", id="id"),
        Columns(candidates="images", scores="scores", user="user", id="id"),
    ),
}
ANY = Columns(candidates="candidates", scores="scores", user="user", captions="captions")
PROMPTS = ("prompt", "caption", "txt", "original_prompt")
ROLES = ("chosen", "rejected")


def detects(path: Path, *, name: str) -> bool:
    """Whether a table has the layout `name`. JSON with chosen and rejected has a reader of its own."""
    return (name != "pairs" or not jsonl.detects(path)) and detect(path, name) is not None


def detect(path: Path, name: str) -> Columns | None:
    """The layout `name` that fits a table, if one of them does."""
    found = tables.columns(path)
    return next((layout for layout in LAYOUTS[name] if found and {*layout.needed} <= {*found}), None)


def read(path: Path, *, name: str, images: bool = True) -> Items:
    """The groups of a table in the layout `name`.

    Raises:
        UserError: it has other columns; and as `columns.read` does.
    """
    return columns.read(path, _layout(path, name), images=images)


def files(path: Path, *, name: str) -> list[Path]:
    """The table's files and the images that they name."""
    return columns.files(path, _layout(path, name))


def _layout(path: Path, name: str) -> Columns:
    layout = detect(path, name)
    if layout is None:
        expected = " or ".join(", ".join(layout.needed) for layout in LAYOUTS[name])
        found = ", ".join(tables.columns(path)) or "none"
        raise UserError(f"{path}: format {name!r} has the columns {expected}; found: {found}")
    beside = name == "hpdv2" and (path.parent / path.stem).is_dir()
    return replace(layout, folder=path.stem) if beside else layout


def read_webdataset(path: Path, *, images: bool = True) -> Items:
    """Samples whose images are `chosen` and `rejected`, or any with one of `scores`, `label_0` and so on, `winner`.

    Images come in the order of their names. The prompt is `prompt` or `caption` of the JSON member, or the text
    member; `captions` (or `caption_0` and so on) and `user` are of the JSON member.
    """
    for row in tables.rows(path, images=images):
        yield row if isinstance(row, Skipped) else _sample(row, path)


def is_webdataset(path: Path) -> bool:
    """A tar file, or a folder with some below it."""
    return path.suffix == ".tar" if path.is_file() else bool(next(path.rglob("*.tar"), None))


def _sample(row: Row, path: Path) -> Group | Skipped:
    values = row.values
    names = sorted(name for name in values if name.lower().endswith(MEDIA_SUFFIXES))
    stems = [name.rpartition(".")[0] for name in names]
    made = {"candidates": [values[name] for name in names], "user": values.get("user")}
    made["prompt"] = next((values[name] for name in PROMPTS if values.get(name)), None)
    layout = ANY if "captions" in values or "caption_0" in values else replace(ANY, captions=None)
    for name in ("scores", "captions"):
        label = "label" if name == "scores" else "caption"
        made[name] = values.get(name) or [values.get(f"{label}_{place}") for place in range(len(names))]
    if tuple(stems) == ROLES:
        layout = replace(layout, scores=None, best_first=True)
    elif "winner" in values:
        layout = replace(layout, scores=None, winner="winner")
        made["winner"] = stems.index(values["winner"]) if values["winner"] in stems else values["winner"]
    row = Row(row.id, row.origin, made)
    return columns.group_of(row, [row], layout, path.parent)
