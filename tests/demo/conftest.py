"""Folders of images to vote on, and a demo with the bundled model that is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from t2i_align.demo import app
from t2i_align.demo.session import Demo
from t2i_align.inference.generate import LIST
from t2i_align.utils.files import append_line
from tests.runs import image

PROMPTS = ("a red circle on a white background", "there is a green square")


def generated(folder: Path, prompts: int = 3, per_prompt: int = 2, first: int = 0, model: str = "m") -> Path:
    """A folder as `generate` leaves it."""
    folder.mkdir(parents=True)
    for index in range(prompts * per_prompt):
        image(first + index).save(folder / f"{index:05d}.png")
        row = {"prompt": f"prompt {index // per_prompt}", "seed": 100 + index, "file": f"{index:05d}.png"}
        append_line(folder / LIST, {**row, "model": model, "lora": None})
    return folder


@dataclass(frozen=True)
class Served:
    """A demo and its address."""

    demo: Demo
    url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A demo with the bundled model and 60 pairs to vote on."""
    folder = tmp_path_factory.mktemp("served")
    source = generated(folder / "source", prompts=60)
    with app.opened("testbed:sd", sources=[source], out=folder / "demo", scorers=["oracle"]) as demo:
        gradio = app.import_gradio()
        blocks = app.build(gradio, demo, app.Defaults(prompts=PROMPTS, steps=4, guidance=1.0))
        url = app.launch(blocks, demo)
        yield Served(demo, url)
        blocks.close(verbose=False)
