"""Pick-a-Pic v1 and v2 (arXiv 2305.01569): parquet with two JPEGs, a caption and a label for each of them.

A label of 1 is the preferred image, 0.5 and 0.5 a tie. Rows that say `has_label: false` were never judged. With
`caption_0` and `caption_1` it is Pick-Double-Caption (arXiv 2502.06023): a caption for each image; where there is no
`caption`, the preferred image's is the prompt. Its authors publish no list of columns: these names follow
Pick-a-Pic's, and a file with others is told as such.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from t2i_align.data.formats import inside
from t2i_align.data.parquet import open_parquet, rows
from t2i_align.data.schema import Group, Items, Media, Skipped
from t2i_align.data.tables import below, missing_shards
from t2i_align.errors import UserError

IMAGES = ("jpg_0", "jpg_1")
LABELS = ("label_0", "label_1")
REQUIRED = (*IMAGES, "caption", *LABELS)
CAPTIONS = ("caption_0", "caption_1")
OPTIONAL = ("has_label", "user_id", "ranking_id", *CAPTIONS)
LABEL_SUM_TOLERANCE = 1e-3


def detects(path: Path) -> bool:
    """A parquet file, or a folder with one somewhere below it."""
    if path.is_dir():
        return next(path.rglob("*.parquet"), None) is not None
    return path.suffix == ".parquet"


def files(path: Path) -> list[Path]:
    """The parquet files of a source: itself, or all below a folder."""
    return below(path, ".parquet") if path.is_dir() else [path]


def read_pickapic(path: Path) -> Items:
    """Pairs of one parquet file or a folder of them, streamed in bounded memory.

    Ids are the rows' `ranking_id` where all of these differ, else "<file>:<row>".

    Raises:
        UserError: before anything is read: not a parquet, no rows, a column missing or of the wrong type; while
            reading: a damaged page, or a label outside [0, 1] (the column does not mean what we take it for).
    """
    return _groups(path, _checked_files(path), images=True)


def outline(path: Path) -> Items:
    """The same items as `read_pickapic` without reading the images' columns (an empty image is not noticed)."""
    return _groups(path, _checked_files(path), images=False)


def _checked_files(path: Path) -> list[Path]:
    found = files(path)
    if not found:
        raise UserError(f"{path}: no .parquet files in this folder")
    for file in found:
        parquet = open_parquet(file)
        _check_columns(file, parquet.schema_arrow)
        if parquet.metadata.num_rows == 0:
            raise UserError(f"{file}: no rows in it")
    return found


def _check_columns(file: Path, schema: pa.Schema) -> None:
    types = pa.types
    for name in REQUIRED:
        if name == "caption" and {*CAPTIONS} <= {*schema.names}:
            continue
        if name not in schema.names:
            raise UserError(
                f"{file}: column {name!r} is missing. Columns found: {', '.join(schema.names) or 'none'}. If this is "
                "no Pick-a-Pic, a source file can say which column holds what (docs/data.md)."
            )
        kind = schema.field(name).type
        if name in IMAGES:
            expected = "encoded images (binary, or a struct with `bytes` and `path`)"
            fits = types.is_binary(kind) or types.is_large_binary(kind)
            fits = fits or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
        elif name in LABELS:
            expected, fits = "numbers", types.is_floating(kind) or types.is_integer(kind)
        else:
            inner = kind.value_type if types.is_dictionary(kind) else kind
            expected, fits = "text", types.is_string(inner) or types.is_large_string(inner)
        if not fits and not types.is_null(kind):  # a column of nulls only: each row is skipped for its own reason
            raise UserError(f"{file}: column {name!r} should hold {expected}, found {kind}")


def _groups(path: Path, found: list[Path], images: bool) -> Items:
    root = path if path.is_dir() else path.parent
    ranked = _ranking_ids_differ(found)
    columns = (*(REQUIRED if images else ("caption", *LABELS)), *OPTIONAL)
    missing = missing_shards(found)
    for file in found:
        yield from missing.get(file, [])
        name = file.relative_to(root).as_posix()
        for number, row in enumerate(rows(file, columns)):
            group_id = str(row["ranking_id"]) if ranked else f"{name}:{number}"
            yield _group(row, group_id, f"{file}, row {number}", root, images)


def _ranking_ids_differ(found: list[Path]) -> bool:
    columns = []
    for file in found:
        parquet = open_parquet(file)
        if "ranking_id" not in parquet.schema_arrow.names:
            return False
        try:
            columns.append(parquet.read(columns=["ranking_id"]).column(0))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: column 'ranking_id' cannot be read (damaged?): {error}") from error
    ids = pa.chunked_array([chunk.cast(pa.string()) for column in columns for chunk in column.chunks], pa.string())
    return ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids)


def _group(row: dict[str, Any], group_id: str, origin: str, root: Path, images: bool) -> Group | Skipped:
    def skipped(reason: str) -> Skipped:
        return Skipped(id=group_id, origin=origin, reason=reason)

    if row.get("has_label") is not None and not row["has_label"]:
        return skipped("not labelled (has_label is false)")
    labels = (row["label_0"], row["label_1"])
    if any(label is None or math.isnan(label) for label in labels):
        return skipped(f"a label is missing: label_0 is {labels[0]}, label_1 is {labels[1]}")
    for name, label in zip(LABELS, labels, strict=True):
        if not 0 <= label <= 1:
            raise UserError(f"{origin}: {name} must lie in [0, 1], found {label}")
    if abs(sum(labels) - 1) > LABEL_SUM_TOLERANCE:
        return skipped(f"label_0 and label_1 must add up to 1, found {labels[0]} and {labels[1]}")
    captions: Any = None if row.get("caption_0") is None else (row["caption_0"], row.get("caption_1"))
    prompt = row.get("caption")
    if prompt is None and captions:
        prompt = captions[labels[1] > labels[0]]
    if prompt is None or (captions and None in captions):
        return skipped("the caption is missing")
    candidates: list[Media] = []
    for name in IMAGES:
        image = _image(row[name], root, origin) if images else b"left out"
        if not image:
            return skipped(f"{name} is empty")
        candidates.append(image)
    user = row.get("user_id")
    return Group(
        id=group_id,
        prompt=prompt,
        candidates=tuple(candidates),
        scores=(float(labels[0]), float(labels[1])),
        origin=origin,
        columns={
            "captions": captions,
            "user": None if user is None else str(user),
        },
    )


def _image(value: Any, root: Path, origin: str) -> Media | None:
    if isinstance(value, dict):  # the Image feature of `datasets`
        if not value["bytes"] and value.get("path"):
            return inside(root, value["path"], origin)
        return value["bytes"]
    return value
