"""Weights from files and folders: every key and shape has to fit, and the version identifies them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

import reward_scorers
from reward_scorers import Scorer, ScorerError, build, build_all
from reward_scorers.clip import HPSv2Scorer
from reward_scorers.combine import from_mapping
from reward_scorers.hf_clip import HFClipScorer
from reward_scorers.imagereward import ImageRewardScorer
from reward_scorers.weights import read_state
from t2i_align.labeling.models import load_captioner, load_perturber
from tests.reward_scorers.small import NAME, TEXT, TINY, VISION, hundred, noise, write_hf_clip


@pytest.fixture
def state(folder: Path, scorers: dict[str, Scorer]) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_open_clip_weights_that_do_not_fit_are_refused(suffix: str, state: dict[str, Any], tmp_path: Path) -> None:
    short = {key: value for key, value in state.items() if key != "visual.proj"}
    cases = [
        (short, r"does not fit .*: 1 keys missing \(visual.proj\)"),
        ({**state, "extra": torch.zeros(1)}, r"1 unknown \(extra\)"),
        # open_clip itself would silently interpolate these to the model's grid.
        ({**state, "visual.positional_embedding": torch.zeros(5, 64)}, r"positional_embedding is \[5, 64\]"),
        ({**state, "visual.proj": state["visual.proj"] * float("nan")}, "1 with NaN or infinite values"),
        ({k: (10 * v).to(torch.int8) for k, v in state.items()}, r"\d+ not floating-point \(.* is of torch.int8"),
    ]
    file = tmp_path / f"bad{suffix}"
    for content, match in cases:
        save_file(content, file) if suffix == ".safetensors" else torch.save({"state_dict": content}, file)
        with pytest.raises(ScorerError, match=match):
            build(f"clip:{NAME}:{file}")
        with pytest.raises(ScorerError, match=match):
            HPSv2Scorer("2.0", str(file), model=NAME)
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ScorerError, match="not a readable checkpoint"):
        build(f"clip:{NAME}:{file}")


def test_pickles_of_anything_but_tensors_are_refused(state: dict[str, Any], tmp_path: Path) -> None:
    cases = [
        ([1, 2], "bad.pt", "expected named tensors, found list"),
        ({0: state["visual.proj"]}, "bad.pt", "expected named tensors, found dict"),
        ({"state_dict": state, "args": Path("x")}, "bad.pt", "more than tensors"),  # weights_only refuses the class
        (state, "HPS_v2.1_compressed.pt", "is the checkpoint of the other version; 2.0 is HPS_v2_compressed.pt"),
    ]
    for content, name, match in cases:
        torch.save(content, tmp_path / name)
        with pytest.raises(ScorerError, match=match):
            HPSv2Scorer("2.0", str(tmp_path / name), model=NAME)


def test_training_checkpoints_and_torchscript(state: dict[str, Any], tmp_path: Path) -> None:
    """Numbers of numpy beside the tensors do no harm, under numpy 1's names either; a program is named as one."""
    extra = {"best": np.float64(0.5), "epoch": np.int64(3), "losses": np.zeros(3, np.float32), "done": np.bool_(True)}
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in state.items()}, **extra}, tmp_path / "epoch_3.pt"
    )
    with zipfile.ZipFile(tmp_path / "epoch_3.pt") as new, zipfile.ZipFile(tmp_path / "older.pt", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    for file in ("epoch_3.pt", "older.pt"):
        assert read_state(tmp_path / file, "clip").keys() == state.keys()
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-32.pt")
    named = r"TorchScript program.*clip:ViT-B-32-quickgelu:openai"
    with warnings.catch_warnings(), pytest.raises(ScorerError, match=named):
        warnings.simplefilter("error")
        build(f"clip:{NAME}:{tmp_path}/ViT-B-32.pt")


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Any]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(state, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ScorerError, match=r"tokenizer.*custom code"):
        HFClipScorer(str(write_hf_clip(tmp_path / "hf")), processor=str(tmp_path))
    text = {**TINY["text_cfg"], "hf_tokenizer_name": str(tmp_path)}
    for options, match in (
        ({}, "execute custom code|contains custom code"),
        ({"trust_remote_code": True}, "asks for trust_remote_code"),
    ):
        config = {"model_cfg": {**TINY, "text_cfg": {**text, "tokenizer_kwargs": options}}, "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ScorerError, match=match):
            build(f"clip:local-dir:{tmp_path}")
    own = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoModelForCausalLM")}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": own}))
    for load in (lambda path: build(f"vlm:{path}"), load_captioner, load_perturber):
        with pytest.raises(ValueError, match="custom code"):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_heads_and_imagerewards_checkpoints_that_do_not_fit_are_refused(
    folder: Path, scorers: dict[str, Scorer], tmp_path: Path
) -> None:
    torch.save({"weight": torch.zeros(1, 32), "bias": torch.zeros(1)}, tmp_path / "linear.pth")
    with pytest.raises(ScorerError, match=r"linear.pth does not fit features of 32: 10 keys missing \(0.weight"):
        build(f"aesthetic:{tmp_path}/linear.pth:{NAME}:{folder}/weights.pt")
    whole = torch.load(folder / "ImageReward.pt", weights_only=True)
    whole.pop("mlp.layers.7.bias")
    torch.save(whole, tmp_path / "short.pt")
    with pytest.raises(ScorerError, match=r"short.pt does not fit the network: 1 keys missing \(head.7.bias\)"):
        ImageRewardScorer(str(tmp_path / "short.pt"), str(folder), vision=VISION, text=TEXT)
    with pytest.raises(ScorerError, match="the tokenizer of"):
        ImageRewardScorer(str(folder / "ImageReward.pt"), str(tmp_path / "nowhere"), vision=VISION, text=TEXT)


def test_transformers_never_fills_a_tower_at_random(tmp_path: Path) -> None:
    bad = write_hf_clip(tmp_path / "bad")
    file, state = bad / "model.safetensors", load_file(bad / "model.safetensors")
    for content, match in (
        (
            {k: v for k, v in state.items() if "visual_projection" not in k},
            r"1 weights missing \(visual_projection.weig",
        ),
        ({**state, "vision_model.encoder.layers.2.mlp.fc1.bias": torch.zeros(64)}, "1 weights without a place"),
        ({**state, "visual_projection.weight": torch.full((16, 32), torch.nan)}, "1 with NaN or infinite values"),
    ):
        save_file(content, file, {"format": "pt"})
        with pytest.raises(ScorerError, match=match):
            build(f"hf-clip:{bad}")
    save_file(state, file, {"format": "pt"})
    (bad / "tokenizer.json").rename(bad / "away.json")  # transformers then makes a tokenizer that knows no word
    with pytest.raises(ScorerError, match=r"the tokenizer of .*: no vocabulary there"):
        build(f"hf-clip:{bad}")
    (bad / "away.json").rename(bad / "tokenizer.json")
    processor = bad / "preprocessor_config.json"
    settings = json.loads(processor.read_text())
    for content, match in (
        (json.dumps({**settings, "do_center_crop": False}), "expected CLIP's preprocessing"),
        ("[1]", "the preprocessing cannot be read"),
    ):
        processor.write_text(content)
        with pytest.raises(ScorerError, match=match):
            build(f"hf-clip:{bad}")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ScorerError, match="could not be loaded"):
        build(f"hf-clip:{bad}")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(ScorerError, match="of type 'siglip', expected 'clip'"):
        build(f"hf-clip:{bad}")


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("clib", "unknown scorer 'clib'. Did you mean 'clip'"),
        ("clip:ViT-B-23:random", "Nearest: .*ViT-B-32"),
        ("clip:ViT-B-32", "needs weights.*laion400m_e32"),
        ("clip:ViT-B-32:/no/such/file.pt", "no weights file and no tag"),
        ("clip:roberta-ViT-B-32:laion2b_s12b_b32k", "another activation than 'roberta-ViT-B-32'"),
        ("clip:local-dir:/no/such/folder", "could not be loaded"),
        ("hpsv2.1:/no/such/none.pt", r"hpsv2.1: .*none.pt: no such file"),
        ("imagereward:/no/such/none.pt", r"imagereward: .*none.pt: no such file"),
        ("pickscore:/no/such/folder", "pickscore: /no/such/folder: no such folder"),
        ("hf-clip", "needs a folder or Hub id"),
    ],
)
def test_bad_specs_are_named(spec: str, match: str) -> None:
    with pytest.raises(ScorerError, match=match):
        build(spec)


def test_names_and_versions_identify_scorer_and_weights(folder: Path, scorers: dict[str, Scorer]) -> None:
    assert (scorers["hpsv2"].name, scorers["pickscore"].name) == ("hpsv2.1", "pickscore")
    assert build(f"hf-clip:{folder / 'hf'}").name == "hf-clip:hf" and scorers["clip"].name == f"clip:{NAME}:weights.pt"
    digest = hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest()[:12]
    assert all(f"weights sha256 {digest}" in scorers[name].version for name in ("clip", "hpsv2", "aesthetic"))
    assert "sha256 " in scorers["pickscore"].version and "random" in build(f"clip:{NAME}:random").version


def test_weights_get_the_architecture_with_their_activation(
    folder: Path, scorers: dict[str, Scorer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A published tag has its own, with a notice; a file does not record it, so the notice names the other name."""
    weights, quick = str(folder / "weights.pt"), f"{NAME}-quickgelu"
    tags = {"tag": {"file": weights, "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, quick, tags)
    built = {spec: build(f"clip:{spec}") for spec in (f"{NAME}:tag", f"{quick}:tag", f"{NAME}:{weights}")}
    images, prompts = hundred()
    of_tag, same, plain = (scorer.score_images(images[:5], prompts[:5]) for scorer in built.values())
    assert torch.equal(of_tag, same) and (of_tag - plain).abs().max() > 1e-3
    assert ["QuickGELU" in scorer.version for scorer in built.values()] == [True, True, False]
    used, file = (record.getMessage() for record in caplog.records if record.name == "reward_scorers.clip")
    assert used == f"clip: the weights 'tag' belong to {quick!r}, which is used instead of {NAME!r}"
    assert f"weights.pt does not record its activation; as {NAME!r} it is scored with GELU" in file


def test_checkpoints_of_one_file_name_have_their_specs_as_names(folder: Path, scorers: Any, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = shutil.copy(folder / "weights.pt", tmp_path / "b")
    specs = [f"clip:{NAME}:{folder}/weights.pt", f"clip:{NAME}:{other}", "temporal_flickering"]
    assert [scorer.name for scorer in build_all(specs)] == specs
    assert [scorer.name for scorer in build_all(specs[1:])] == [f"clip:{NAME}:weights.pt", "temporal_flickering"]
    both = from_mapping({"rule": "min", "scorers": specs[:2]}).score_images([noise((9, 9))], ["cat"])
    assert both.isfinite().all()
    with pytest.raises(ScorerError, match="two scorers of the same name among clip:"):
        build_all([specs[0], specs[0]])


def test_a_folders_weights_are_identified_by_their_content(state: dict[str, Any], tmp_path: Path) -> None:
    """The same weights in two folders have one digest; with one number changed they have another."""

    def version(name: str, change: float) -> str:
        folder = tmp_path / name
        folder.mkdir()
        weights = {key: value.clone() for key, value in state.items()}
        weights["text_projection"][0, 0] += change
        save_file(weights, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
        return reward_scorers.build(f"clip:local-dir:{folder}").version.rpartition("sha256 ")[2]

    assert version("one", 0.0) == version("same", 0.0) != version("other", 0.1)
