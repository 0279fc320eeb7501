"""A Z-Image of random weights for 32 x 32 pixels."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers

from tests.tiny import image_vae, letter_tokenizer, saved


def tiny_zimage(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = letter_tokenizer(64)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %} :"
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=64, **sizes)
    )
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 2, 2], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for parameter in transformer.parameters():  # its pads and gates start at values that hide what is fed
        torch.nn.init.normal_(parameter, std=0.2)
    transformer.register_to_config(_default_size=(32, 32))
    pipe = diffusers.ZImagePipeline(
        vae=image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=encoder, tokenizer=tokenizer, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return saved(pipe, folder)
