"""Embedders of choices: CLIP's differences, and a genuine small vision-language model's hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2i_align.conditioning.config import PersonalConfig
from t2i_align.conditioning.preferences import EXAMPLE, TASK, Choice, VLMEmbedder, build_embedder, describe, rebuilt
from t2i_align.errors import UserError
from tests.labeling.test_models import blip, llava
from tests.reward_scorers.small import write_hf_clip
from tests.runs import image

PROMPTS = ["a red fox", "an owl on a <image> branch", "x", "two"]


def choices(count: int = 4) -> list[Choice]:
    return [Choice(PROMPTS[n % 4], image(2 * n), image(2 * n + 1)) for n in range(count)]


def reversed_choice(choice: Choice) -> Choice:
    return Choice(choice.prompt, choice.disliked, choice.liked)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return llava(tmp_path_factory.mktemp("vlm") / "llava")


def test_clip_rows_are_the_difference_of_the_images_beside_the_prompt(tmp_path: Path) -> None:
    embedder = build_embedder(PersonalConfig(embedder=f"hf-clip:{write_hf_clip(tmp_path / 'clip')}"))
    rows = embedder(choices(3))
    assert rows.shape == (3, *embedder.shape)
    features = embedder.shape[1] // 2
    back = embedder([reversed_choice(choice) for choice in choices(3)])
    torch.testing.assert_close(back[..., :features], -rows[..., :features], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back[..., features:], rows[..., features:])
    torch.testing.assert_close(rows[..., features:].norm(dim=-1), torch.full((3, 1), features**0.5))
    torch.testing.assert_close(embedder(choices(3)[1:2]), rows[1:2], atol=1e-5, rtol=1e-4)


def test_vlm_gives_the_hidden_states_at_the_last_step_of_its_greedy_answer(vlm: Path) -> None:
    """Against the model's own loop: the answer token by token, without a cache, all layers of the last forward pass."""
    embedder = VLMEmbedder(str(vlm), together=2, max_new_tokens=3)
    (states,) = embedder(choices(2))
    assert states.shape == embedder.shape == (3, 16)  # the embeddings and two layers
    text = "user: "
    for number, prompt in enumerate(["a red fox", "an owl on a   branch"], 1):
        text += EXAMPLE.format(number=number, prompt=prompt) + "<image><image>"
    images = [one.convert("RGB") for choice in choices(2) for one in (choice.liked, choice.disliked)]
    inputs = embedder.processor(images=[images], text=[f"{text}{TASK} assistant:"], return_tensors="pt")
    ids, end = inputs["input_ids"], embedder.processor.tokenizer.eos_token_id
    with torch.no_grad():
        for _ in range(3):
            out = embedder.model(
                input_ids=ids, pixel_values=inputs["pixel_values"], output_hidden_states=True, use_cache=False
            )
            new = out.logits[0, -1].argmax()
            ids = torch.cat([ids, new.view(1, 1)], dim=1)
            if new == end:
                break
    expected = torch.stack([layer[0, -1] for layer in out.hidden_states])
    expected = torch.nn.functional.layer_norm(expected, (16,))
    torch.testing.assert_close(states, expected, atol=5e-5, rtol=1e-4)
    again = embedder(choices(4))
    torch.testing.assert_close(again[0], states)
    assert (embedder([reversed_choice(c) for c in choices(2)])[0] - states).abs().max() > 1e-4


def test_layers_and_pooling(vlm: Path) -> None:
    some = PersonalConfig(embedder=f"vlm:{vlm}", examples=2, layers=[-1, 0], tokens=None)
    embedder = VLMEmbedder(str(vlm), together=2, layers=some.layers, max_new_tokens=2)
    whole = VLMEmbedder(str(vlm), together=2, max_new_tokens=2)(choices(2))[0]
    torch.testing.assert_close(embedder(choices(2))[0], whole[[-1, 0]])
    mean = VLMEmbedder(str(vlm), together=2, pool="mean", max_new_tokens=2)(choices(2))[0]
    torch.testing.assert_close(mean, whole.mean(0, keepdim=True))
    embedding = describe(some, embedder)
    assert (embedding.together, embedding.rows, embedding.features, embedding.layers) == (2, 2, 16, (-1, 0))


def test_models_that_cannot_embed_are_refused(vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        VLMEmbedder("/no/such/folder")
    with pytest.raises(UserError, match="expected a chat model"):
        VLMEmbedder(str(blip(tmp_path / "blip")))
    with pytest.raises(UserError, match=r"personal\.layers: 9: .* has 3 hidden states"):
        VLMEmbedder(str(vlm), layers=[9], max_new_tokens=2)
    with pytest.raises(UserError, match="expected one number with a VLM"):
        PersonalConfig(embedder=f"vlm:{vlm}", examples=(2, 4))
    clip = write_hf_clip(tmp_path / "clip")
    embedding = describe(config := PersonalConfig(embedder=f"hf-clip:{clip}"), build_embedder(config))
    assert rebuilt(embedding).version == embedding.version
