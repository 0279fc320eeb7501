"""From real clips to a trained video model, on a tiny model of every family."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reward_scorers import Scorer
from t2i_align import align
from t2i_align.data.media import save_clip
from t2i_align.errors import UserError
from t2i_align.labeling.curate import pairs
from t2i_align.labeling.segments import label
from tests.runs import jsonl_clips, moving_clip, run_values

LABELS = {"segment_scores": [[1, 0, 0.5, 1], [0, 1, 0.5, 0]], "segment_seconds": 0.3}


class Red(Scorer):
    """How red frames are."""

    name, version = "red", "1"

    def rate(self, inputs: Tensor, prompts: Sequence[str]) -> Tensor:
        return inputs[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs of clips of 17 frames, and their labels."""
    folder = tmp_path_factory.mktemp("labelled")
    clips, labels = jsonl_clips(folder, frames=17, count=4), folder / "labels.jsonl"
    labels.write_text("".join(json.dumps({"id": f"clips.jsonl:{n}", **LABELS}) + "\n" for n in range(1, 5)))
    return clips, labels


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("wan", {}),
        ("wan", {"variant": "per_clip", "chunk": 2, "guard": 0.5}),
        ("wan-ti2v", {"chunk": 1}),
        ("cogvideox", {}),
        ("cogvideox-1.5", {"chunk": 2}),
        ("ltx", {"link": "robust", "label_smoothing": 0.1, "target_gradient": 0.4}),
    ],
)
def test_dense_dpo_trains_every_family(
    name: str, objective: dict[str, Any], path: Callable[[str], Path], labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    clips, labels = labelled
    values = run_values(
        path(name), clips, tmp_path / "run", objective={"name": "dense_dpo", **objective}, train__steps=2,
        data__annotations=[str(labels)], train__batch_size=2, train__timestep_sampling="logit_normal",
    )  # fmt: skip
    result = align(values, progress=False)
    assert result.steps == 2 and math.isfinite(result.metrics["loss"]) and result.metrics["update_norm"] > 0
    assert any(tensor.abs().max() > 0 for key, tensor in load_file(result.weights).items() if "lora_B" in key)


def test_from_real_clips_to_a_trained_model(path: Callable[[str], Path], tmp_path: Path) -> None:
    """The commands of docs/video.md, one after another."""
    (real := tmp_path / "real").mkdir()
    for number, name in enumerate(("fox", "owl", "cat")):
        save_clip(moving_clip(number, 20), real / f"{name}.mp4", 16)
        (real / f"{name}.txt").write_text(f"a {name}")
    pairs(real, tmp_path / "pairs", model=path("wan"), steps=6, guidance=1.0, progress=False)
    data, labels = tmp_path / "pairs" / "pairs.jsonl", tmp_path / "pairs" / "labels.jsonl"
    label(data, labels, scorers=[Red()], seconds=0.25, whole=True, progress=False)
    results = []
    for objective in ("dense_dpo", "diffusion_dpo"):
        values = run_values(
            path("wan"), data, tmp_path / objective, objective={"name": objective, "beta": 500.0}, train__steps=2,
            data__annotations=[str(labels)], train__batch_size=3,
        )  # fmt: skip
        results.append(align(values, progress=False))
    one, other = (load_file(result.weights) for result in results)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_pairs_without_labels_are_refused_with_the_command_that_makes_them(
    path: Callable[[str], Path], labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"needs 'segment_scores'.*`t2i-align video segments` makes it"):
        align(run_values(path("wan"), labelled[0], tmp_path / "run", objective={"name": "dense_dpo"}), progress=False)
