"""T5 through a trained adapter: what the denoiser reads, runs that train it, and what is built on a trained one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines import TrainablePipeline
from t2i_align import align
from t2i_align.conditioning import segments, t5
from t2i_align.conditioning.adapter import files_of
from t2i_align.conditioning.config import SegmentsConfig
from t2i_align.config import ModelConfig
from t2i_align.data.memory import encoders_digest
from t2i_align.errors import UserError
from t2i_align.inference.generate import generate
from t2i_align.inference.models import adapter_on, open_model, resolve_aligned
from tests.runs import jsonl_pairs, run_values, same

LONG = "a cat. a dog sleeps. " * 4
PROMPTS = ["a cat", LONG, LONG + "a red house."]


@pytest.fixture(scope="module")
def t5_path(path: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "t5"
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.copytree(path("sd3") / part, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipeline(request: pytest.FixtureRequest, path: Callable[[str], Path], t5_path: Path) -> TrainablePipeline:
    options = SegmentsConfig(tokens=24, t5=str(t5_path))
    return open_model(ModelConfig(path=str(path(request.param)), segments=options))


def predicted(pipeline: TrainablePipeline, prompts: list[str]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=generator).expand(len(prompts), -1, -1, -1)
    with torch.no_grad():
        return pipeline.predict(latents, torch.full((len(prompts),), 500), pipeline.encode_prompts(prompts))


def test_the_denoiser_reads_clips_rows_and_then_t5s_through_the_adapter(pipeline: TrainablePipeline) -> None:
    plain = segments.encode(pipeline, SegmentsConfig(tokens=24), PROMPTS)
    conditioning = pipeline.encode_prompts(PROMPTS)
    rows = t5.pipeline_t5(pipeline).encode(PROMPTS, plain["prompt_embeds"])
    width, lengths = plain["prompt_embeds"].shape[-1], plain["prompt_mask"].sum(1).int().tolist()
    assert len(rows[0]) < len(rows[1]) == 24  # no padding; and cut as told
    adapter = t5.T5Adapter(rows[0].shape[-1], width).eval()
    read: dict[str, Tensor] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.update(kwargs)

    t5.attach(pipeline.denoiser, adapter)
    handle = pipeline.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipeline.predict(torch.zeros(3, 4, 16, 16), torch.full((3,), 500), conditioning)
    finally:
        handle.remove()
        delattr(pipeline.denoiser, t5.NAME)
    for i, length in enumerate(lengths):
        whole = torch.cat([plain["prompt_embeds"][i, :length], adapter(rows[i])])
        torch.testing.assert_close(read["encoder_hidden_states"][i, : len(whole)], whole)
        assert read["encoder_attention_mask"][i].sum() == len(whole)


def test_without_an_adapter_it_is_the_base_model(pipeline: TrainablePipeline) -> None:
    both = predicted(pipeline, PROMPTS)
    encode = pipeline.long_prompts
    pipeline.long_prompts = lambda prompts: t5_free(encode, prompts)
    try:
        torch.testing.assert_close(predicted(pipeline, PROMPTS), both, rtol=0, atol=1e-5)
    finally:
        pipeline.long_prompts = encode


def t5_free(encode: Any, prompts: Any) -> Any:
    """The same rows with T5's masked by the conditioning itself."""
    conditioning = encode(prompts)
    keep = conditioning["prompt_embeds"][..., -1] < 0.5
    return {**conditioning, "prompt_mask": conditioning["prompt_mask"] * keep}


def long_pairs(folder: Path) -> Path:
    file = jsonl_pairs(folder, count=4)
    file.write_text(file.read_text().replace("prompt ", LONG))
    return file


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2.0}])
def test_an_adapter_is_trained_saved_and_generates(
    lora: dict[str, Any] | None, sd_path: Path, t5_path: Path, tmp_path: Path
) -> None:
    values = run_values(sd_path, long_pairs(tmp_path), tmp_path / "run", objective={"name": "sft"}, lora=lora)
    values["model"]["segments"] = {"tokens": 24, "t5": str(t5_path)}
    result = align(values, progress=False)
    assert result.weights == tmp_path / "run" / "t5" / t5.FILE
    assert result.weights.with_name("pytorch_lora_weights.safetensors").exists() == bool(lora)
    aligned = resolve_aligned(tmp_path / "run")
    assert (aligned.kind, aligned.path) == ("t5", str(result.weights))
    files = ["t5_adapter.safetensors", *(["pytorch_lora_weights.safetensors"] if lora else [])]
    assert [file.name for file in files_of(aligned.kind, aligned.path)] == files  # of which `evaluate` keeps hashes
    options: dict[str, Any] = {"out": None, "steps": 2, "progress": False}
    alone = generate(sd_path, PROMPTS[2:], lora=tmp_path / "run", **options)
    images = generate(sd_path, [PROMPTS[2], "a cat"], lora=tmp_path / "run", **options)
    assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(alone[0])).max() <= 1  # whatever its neighbours
    pipeline = open_model(ModelConfig(path=str(sd_path), segments=SegmentsConfig(tokens=24, t5=str(t5_path))))
    before = predicted(pipeline, PROMPTS)
    with adapter_on(pipeline, aligned):
        assert (predicted(pipeline, PROMPTS) - before).abs().max() > 1e-4
        assert not pipeline.denoiser.training or not getattr(pipeline.denoiser, t5.NAME).training
    assert torch.equal(predicted(pipeline, PROMPTS), before)


def test_a_lora_is_trained_on_a_trained_adapter(sd_path: Path, t5_path: Path, tmp_path: Path) -> None:
    pairs = long_pairs(tmp_path)
    first = run_values(sd_path, pairs, tmp_path / "first", objective={"name": "sft"}, lora=None, train__steps=2)
    first["model"]["segments"] = {"tokens": 24, "t5": str(t5_path)}
    weights = align(first, progress=False).weights
    trained = load_file(weights)
    second = run_values(sd_path, pairs, tmp_path / "second", train__steps=2)
    second["model"]["segments"] = {"tokens": 24, "t5": str(t5_path), "adapter": str(weights)}
    result = align(second, progress=False)
    line = result.history[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the reference reads T5 as the policy does
    assert result.weights.parent.name == "lora" and same(load_file(weights), trained)
    assert not any("t5" in name for name in load_file(result.weights))
    (image,) = generate(sd_path, [LONG], lora=tmp_path / "second", out=None, steps=2, progress=False)
    pipeline = open_model(ModelConfig(path=str(sd_path), segments=SegmentsConfig(**second["model"]["segments"])))
    assert pipeline.denoiser.t5_adapter.base
    (other,) = generate(pipeline, [LONG], lora=result.weights, out=None, steps=2, progress=False)
    assert image.tobytes() == other.tobytes()


def test_another_t5_at_the_same_path_is_noticed(sd_path: Path, t5_path: Path, tmp_path: Path) -> None:
    """By a run, whose cache holds its states, and by one of a model in memory."""
    folder = Path(shutil.copytree(t5_path, tmp_path / "t5"))
    values = run_values(sd_path, long_pairs(tmp_path), tmp_path / "run", objective={"name": "sft"}, lora=None,
                        train__steps=1)  # fmt: skip
    values["model"]["segments"] = {"tokens": 24, "t5": str(folder)}
    align(values, progress=False)
    config = ModelConfig(path=str(sd_path), segments=SegmentsConfig(tokens=24, t5=str(folder)))
    before = encoders_digest(open_model(config))
    weights = folder / "model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="data"):
        align({**values, "resume": True}, progress=False)
    assert encoders_digest(open_model(config)) != before != encoders_digest(open_model(ModelConfig(path=str(sd_path))))


def test_what_does_not_fit_is_refused(
    sd_path: Path, t5_path: Path, path: Callable[[str], Path], tmp_path: Path
) -> None:
    def segmented(**changes: Any) -> ModelConfig:
        return ModelConfig(path=str(sd_path), segments=SegmentsConfig(**{"t5": str(t5_path), **changes}))

    with pytest.raises(
        UserError, match=r"model\.segments\.t5: .*/text_encoder: expected a T5, found 'clip_text_model'"
    ):
        open_model(segmented(t5=str(sd_path / "text_encoder")))
    with pytest.raises(UserError, match=r"model\.segments\.t5: .*nowhere: no model there"):
        open_model(segmented(t5=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no such T5 adapter"):
        open_model(segmented(adapter=str(tmp_path / "none.safetensors")))
    with pytest.raises(UserError, match=r"model\.segments\.adapter needs the T5"):
        SegmentsConfig(adapter="adapter.safetensors")
    other = torch.nn.Module()
    other.t5_adapter = t5.T5Adapter(8, 16)
    file = t5.save(other, tmp_path)
    with pytest.raises(UserError, match=r"an adapter from a T5 of width 8 to 16; .* is of width 32"):
        open_model(segmented(adapter=str(file)))
    with pytest.raises(UserError, match=r"names it in model\.segments\.t5, is not with it"):
        generate(sd_path, ["a cat"], lora=file, out=None)
    values = run_values(sd_path, tmp_path, tmp_path / "run")
    values["model"]["segments"] = {"t5": str(t5_path)}
    with pytest.raises(
        UserError, match=r"trains an adapter, for objectives without a reference; diffusion_dpo has one"
    ):
        align(values, progress=False)
    values["model"]["segments"] |= {"adapter": str(file)}
    with pytest.raises(UserError, match=r"model\.segments\.adapter needs a LoRA"):
        align({**values, "lora": None}, progress=False)
