"""Published layouts: the column maps of data sets that are recognised by their columns.

JSON Lines with paths is one of them:

    {"prompt": "a red fox", "chosen": "a.png", "rejected": "b.png"}
    {"prompt": "a red fox", "images": ["a.png", "b.png", "c.png"], "scores": [3, 1, 2]}
    {"prompt": "a red fox runs", "videos": ["a.mp4", "folder of frames"], "scores": [1, 0]}

`caption` or `text` may stand for `prompt`, and `winner`, `loser` and the like for `chosen`, `rejected`. Optional keys
are "id" and those of `schema.COLUMNS`; others are left alone. Paths are relative to the file's own folder (or
`data.root`) and may not leave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from t2i_align.data import sheets
from t2i_align.data.schema import Columns
from t2i_align.data.tables import PROMPT_KEYS

# Layouts that are recognised by the kind of file, so that the errors of such a file name what is expected.
KINDS = {"jsonl": sheets.JSON, "webdataset": (".tar",), "pickapic": (".parquet",)}

PAIRS = Columns(candidates=["chosen", "rejected"], best_first=True, id="id", own_names=True)
RANKINGS = Columns(candidates="images", scores="scores", id="id", own_names=True)
CLIPS = replace(RANKINGS, candidates="videos")
# What other tools call these; found only where the names above are not, which alone are in messages.
OTHER_PAIRS = [replace(PAIRS, candidates=[*names]) for names in (
    ("winner", "loser"), ("win", "lose"), ("image_w", "image_l"), ("chosen_image", "rejected_image"),
    ("preferred", "rejected"), ("good", "bad"),
)]  # fmt: skip
OTHERS = [
    replace(columns, prompt=prompt)
    for prompt in PROMPT_KEYS
    for columns in (PAIRS, *OTHER_PAIRS, CLIPS, RANKINGS)
    if prompt != "prompt" or columns in OTHER_PAIRS
]
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
    "demo": [Columns(candidates=["left", "right"], winner="vote", id="id", own_names=True)],
    "pairs": [PAIRS, RANKINGS, *OTHERS],
    "jsonl": [PAIRS, CLIPS, RANKINGS, *OTHERS],
    # Samples with images `chosen` and `rejected`, or any with `winner`, `scores`, or `label_0` and so on.
    "webdataset": [
        replace(PAIRS, id=None),
        replace(RANKINGS, id=None, scores=None, winner="winner"),
        replace(RANKINGS, id=None),
    ],
    "pickapic": [PICKAPIC, replace(PICKAPIC, prompt=None)],
}
