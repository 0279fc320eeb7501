"""Retrieval of long captions: the features that are compared, R@1, and what cannot be retrieved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from reward_scorers.towers import TwoTowers, unit
from t2i_align.errors import UserError
from t2i_align.reward_models.retrieval import recall, retrieval, text_kinds
from tests.reward_scorers.small import write_hf_clip
from tests.runs import image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Hues(TwoTowers):
    """Texts by the first colour that they name, as a text tower that reads their beginning alone; and a strong V."""

    name, version = "hues", "1"

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)

    def encode_images(self, inputs: Tensor) -> Tensor:
        rgb = inputs.mean((2, 3))
        return unit(torch.cat([rgb, rgb[:, :1]], 1))  # red images also score along what all texts share

    def encode_texts(self, prompts: Sequence[str]) -> Tensor:
        named = [
            next(word for word in prompt.lower().replace(".", "").split() if word in COLOURS) for prompt in prompts
        ]
        rows = [[float(colour == name) for colour in COLOURS] for name in named]
        return unit(torch.cat([torch.tensor(rows), 2 * torch.ones(len(rows), 1)], 1))


CAPTIONS = {"Red is here. Red again.": (255, 0, 0), "Red begins. Green ends. Green.": (85, 170, 0),
            "Red begins. Blue ends. Blue.": (85, 0, 170)}  # fmt: skip


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    rows = []
    for number, (caption, colour) in enumerate(CAPTIONS.items()):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": caption})
    rows.append({"image": "0.png", "prompt": "Red begins. Green ends. Green."})  # a caption that occurs again
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_sentences_see_the_end_and_without_v_an_image_no_longer_wins_by_what_all_share(
    listed: Path, tmp_path: Path
) -> None:
    found = retrieval(listed, Hues(), tmp_path / "out.json", progress=False, batch_size=2)
    shares = {name: result.recall for name, result in found.items()}
    assert shares["hues, whole, to image"] == pytest.approx(1 / 3)  # all three texts are "red": the red image wins
    assert shares["hues, sentences, to image"] < 1 and shares["hues, without V, to image"] == 1
    low, high = found["hues, without V, to image"].interval
    assert low < 1 and high == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["captions"] == 3 and written["recall"]["hues, without V, to image"]["recall"] == 1
    assert retrieval(listed, Hues(), tmp_path / "out.json", limit=2, progress=False)  # its own file is replaced


def test_v_is_the_captions_or_the_scorers_own() -> None:
    towers, captions = Hues(), list(CAPTIONS)
    kinds = text_kinds(towers, captions, None)
    mean = kinds["sentences"].mean(0)
    torch.testing.assert_close(kinds["without V"] @ mean, torch.zeros(3), rtol=0, atol=1e-6)
    given = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert text_kinds(towers, captions, given)["without V"][:, 3].abs().max() == 0


def test_recall_by_hand() -> None:
    assert recall(np.array([[2.0, 1.0], [3.0, 1.0]])).recall == 0.5
    assert recall(np.ones((4, 4))).recall == 0.25  # of equals one is drawn


def test_a_published_scorer_and_its_decomposition_agree(tmp_path: Path) -> None:
    for number in range(4):
        image(number).save(tmp_path / f"{number}.png")
    rows = [
        {"prompt": f"A house {i}. A dog.", "images": [f"{i}.png", f"{(i + 1) % 4}.png"], "scores": [0, 1]}
        for i in range(4)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = f"hf-clip:{write_hf_clip(tmp_path / 'clip')}"
    plain, dense = (retrieval(tmp_path / "pairs.jsonl", one, progress=False) for one in (spec, f"denscore:{spec}"))
    assert [value.recall for value in plain.values()] == [value.recall for value in dense.values()]


def test_what_cannot_be_retrieved_is_refused(listed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="retrieval takes CLIP-style scorers such as pickscore, found oracle"):
        retrieval(listed, "oracle")
    with pytest.raises(UserError, match="retrieval needs at least two captions with an image, found 1"):
        retrieval(listed, Hues(), limit=1)
    with pytest.raises(UserError, match=r"captions\.jsonl: exists, and was not written by t2i-align retrieval"):
        retrieval(listed, Hues(), listed)
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^1\.png: "):
        retrieval(listed, Hues(), progress=False)
