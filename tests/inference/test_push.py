"""`t2i-align push`, up to the network: what would be uploaded, its card, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from t2i_align import config
from t2i_align.errors import UserError
from t2i_align.inference.push import push
from t2i_align.utils.files import write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, with a data path that is nobody else's business."""
    folder = tmp_path / "secret" / "run"
    (folder / "lora").mkdir(parents=True)
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, folder / "lora" / "pytorch_lora_weights.safetensors")
    values = {"objective": {"name": "diffusion_dpo", "beta": 300}, "output_dir": str(folder), "train": {"steps": 7},
              "model": {"path": "somebody/sd"}, "data": {"path": str(tmp_path / "secret" / "pairs.jsonl")}}  # fmt: skip
    settings = config.to_mapping(config.from_mapping(values))
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_what_would_be_uploaded_is_the_lora_and_its_card(run: Path, tmp_path: Path) -> None:
    scores = {"win_rate": 0.62, "win_rate_ci": [0.55, 0.69], "n": 200}
    write_json(tmp_path / "result.json", {"scorers": {"pickscore": scores}})
    push(run, "me/foxes", evaluation=tmp_path, out=tmp_path / "card")
    names = sorted(file.name for file in (tmp_path / "card").iterdir())
    assert names == ["README.md", "pytorch_lora_weights.safetensors"]
    assert load_file(tmp_path / "card" / names[1])["unet.x.lora_A.weight"] == 1
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.data.base_model == "somebody/sd" and card.data.library_name == "diffusers"
    assert {"lora", "diffusion_dpo", "t2i-align"} <= set(card.data.tags)
    assert (
        'pipe.load_lora_weights("me/foxes")' in card.text and "beta=300.0" in card.text and "| steps | 7 |" in card.text
    )
    assert "| pickscore | 62.0% | 55.0% to 69.0% | 200 |" in card.text
    assert "secret" not in card.content
    with pytest.raises(UserError, match="card: exists already"):
        push(run, "me/foxes", out=tmp_path / "card")


def test_bad_names_and_things_that_are_no_run_are_refused(run: Path) -> None:
    for name in ("foxes", "me/fo xes", "a/b/c"):
        with pytest.raises(UserError, match="repo: expected owner/name"):
            push(run, name)
    (run / "run.yaml").unlink()
    with pytest.raises(UserError, match="not a training run or a step of one"):
        push(run, "me/foxes")


def test_without_a_network_the_message_says_so(run: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-m", "t2i_align", "push", str(run), "--repo", "me/foxes"], env=environment,
                          capture_output=True, text=True, cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 2 and "me/foxes: could not be uploaded: the Hub cannot be reached" in done.stderr
