"""Models, adapters and prompts as a user writes them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from t2i_align.config import ModelConfig
from t2i_align.errors import UserError
from t2i_align.inference.models import Aligned, resolve_adapter, resolve_aligned, resolve_base, resolve_model
from t2i_align.inference.options import resolve_prompts


@pytest.mark.parametrize("text", ["./foxs", "~/foxs", "/foxs", "a/b/foxs", "runs/foxs", "foxs"])
def test_a_mistyped_path_is_not_taken_for_a_hub_id(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.utils.cached_file", lambda *arguments: pytest.fail("the Hub was asked"))
    for resolve, what in ((resolve_model, "model"), (resolve_aligned, "model"), (resolve_adapter, "LoRA")):
        with pytest.raises(UserError, match=f"{text}: no such {what}: no such file or folder"):
            resolve(text)
    assert resolve_model("somebody/foxs") == "somebody/foxs"


def test_a_hub_repository_is_identified_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {("somebody/model", "model_index.json"), ("somebody/lora", "pytorch_lora_weights.safetensors")}

    def cached_file(repository: str, name: str) -> str:
        if (repository, name) in there:
            return str(tmp_path / name)
        raise OSError(f"{repository} does not appear to have a file named {name}.\nMore of it.")

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert resolve_aligned("somebody/model") == Aligned("model", "somebody/model")
    assert resolve_adapter("somebody/lora") == Aligned("lora", str(tmp_path / "pytorch_lora_weights.safetensors"))
    with pytest.raises(UserError, match="somebody/model: this is a whole model, not a LoRA"):
        resolve_adapter("somebody/model")
    with pytest.raises(UserError, match=r"somebody/foxs: no such LoRA: .*does not appear to have a file named .*\.$"):
        resolve_adapter("somebody/foxs")


def test_the_base_of_a_training_run_comes_with_its_revision(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "lora").mkdir(parents=True)
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, run / "lora" / "weights.safetensors")
    loose = Aligned("lora", str(run / "lora" / "weights.safetensors"))
    with pytest.raises(UserError, match="no base model given"):
        resolve_base(None, loose)
    (run / "run.yaml").write_text("model: {path: somebody/base, revision: r1, variant: fp16}\nsteps: 7\n")
    own = ModelConfig(path="somebody/base", revision="r1", variant="fp16")
    for aligned in (run, run / "lora", run / "lora" / "weights.safetensors"):
        weights = resolve_aligned(aligned)
        assert resolve_base(None, weights) == resolve_base("somebody/base", weights, revision=None) == own
        changed = resolve_base("somebody/base", weights, revision="main", variant=None)
        assert changed == ModelConfig(path="somebody/base", revision="main", variant="fp16")
        assert resolve_base("somebody/other", weights) == ModelConfig(path="somebody/other")
    assert resolve_base("somebody/base", revision="r2") == ModelConfig(path="somebody/base", revision="r2")


def test_an_ambiguous_folder_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds 2 models or LoRAs; name one: a.safetensors, b.safetensors"):
        resolve_aligned(tmp_path)
    assert resolve_aligned(tmp_path / "a.safetensors").kind == "lora"
    save_file({"model.diffusion_model.weight": torch.zeros(1)}, tmp_path / "single.safetensors")
    assert resolve_aligned(tmp_path / "single.safetensors").kind == "model"
    for name in ("lora", "model"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="name one: lora/, model/"):
        resolve_aligned(tmp_path / "run")


def test_prompts_keep_unusual_characters_within_a_line(tmp_path: Path) -> None:
    """Only a line break ends a prompt; Unicode's other separators are text."""
    file = tmp_path / "prompts.txt"
    file.write_text("a\u2028b\x0bc\n猫 🐈\n", encoding="utf-8")
    assert resolve_prompts(file) == ["a\u2028b\x0bc", "猫 🐈"]


PROMPT_FILES: list[tuple[str, str, list[str]]] = [
    ("geneval.jsonl", '{"tag": "single_object", "prompt": "a bench"}\n\n{"tag": "two", "prompt": " two, cows"}', []),
    ("parti.tsv", "Prompt\tCategory\na bench\tAbstract\ntwo, cows\tAnimals\n", []),
    ("quotes.tsv", 'Prompt\tNote\n"Go" on a sign\t\n', ['"Go" on a sign']),  # as in PartiPrompts itself
    ("quoted.tsv", 'prompt\tnote\n"a\tb ""c"""\tx\n', ['a\tb "c"']),
    ("a.csv", 'id,Caption\n1,a bench\n2,"two, cows"\n', []),
    ("b.CSV", '\ufefftext\r\na bench\r\n"two, cows"\r\n', []),
    ("a.json", '["a bench", "two, cows"]', []),
    ("b.json", '[{"text": "a bench", "caption": "x", "prompt": "a bench"}, {"text": "two, cows"}]', []),
    ("lines.json", '{"text": "a bench"}\n{"text": "two, cows"}\n', []),
    ("strings.jsonl", '"a bench"\n"two, cows"\n', []),
    ("lines.txt", '{"prompt": "a bench"}\n{"prompt": "two, cows"}\n', []),
    ("plain.txt", "a bench\n{two, cows}\n", ["a bench", "{two, cows}"]),
    ("plain", "a bench\n\n two, cows \r\n", []),
]


@pytest.mark.parametrize(("name", "text", "expected"), PROMPT_FILES)
def test_prompts_of_benchmarks_own_files(name: str, text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert resolve_prompts(tmp_path / name) == (expected or ["a bench", "two, cows"])


def test_prompts_of_a_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "caption": ["a bench", "two, cows"]}), tmp_path / "a.parquet")
    assert resolve_prompts(tmp_path / "a.parquet") == ["a bench", "two, cows"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"prompt_en": "x", "id": 1}', r"line 1: expected one of 'prompt', .* the keys 'prompt_en', 'id'"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": null}', r"line 2: expected a prompt, found None"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', r"line 2: not valid JSON"),
        ("a.jsonl", "a prompt", r"line 1: not valid JSON"),
        ("a.json", '{"prompts":\n ["x"]}', r"entry 0: expected one of .*, found the keys 'prompts'"),
        ("a.json", '["x", 5]', r"entry 1: expected a prompt, found 5"),
        ("a.csv", "a red circle\na blue square\n", r"row 0: expected one of .*, found the keys 'a red circle'"),
        ("a.csv", "prompt,category\na red circle, big,shapes\n", r"row 0: 3 fields, but 2 columns"),
        ("a.csv", "prompt,category\n ,shapes\n", r"row 0: expected a prompt, found ' '"),
        ("a.csv", 'prompt\n"never closed\n', r"line 2: not valid CSV"),
        ("a.csv", "prompt\n", r"no prompt in it"),
        ("a.tsv", "", r"the file is empty; expected a first line with the columns' names"),
        ("a.yaml", "prompts: [x]\n", r"expected a text file, .jsonl"),
        ("a.txt", "caf\xe9", r"not UTF-8 text \(byte 3\)"),
    ],
)  # fmt: skip
def test_prompt_files_of_another_kind_are_refused(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=f"{name}.*{says}"):
        resolve_prompts(tmp_path / name)


def test_hpsv2_benchmark_prompts_are_fetched_by_style(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repository: str, name: str, subfolder: str, repo_type: str) -> str:
        assert (repository, subfolder, repo_type) == ("zhwang/HPDv2", "benchmark", "dataset")
        if name != "photo.json":
            raise ConnectionError("no connection")
        (tmp_path / name).write_text('["a cat", "\\u732b"]')
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert resolve_prompts("hpsv2:photo") == ["a cat", "猫"]
    with pytest.raises(UserError, match="hpsv2:anime: could not be fetched: no connection"):
        resolve_prompts("hpsv2:anime")
    with pytest.raises(UserError, match=r"unknown style 'foto'. Did you mean 'photo'"):
        resolve_prompts("hpsv2:foto")
