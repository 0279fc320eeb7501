"""What is added to the denoiser or its text, and how it is trained, saved and loaded."""

from __future__ import annotations

from t2i_align.conditioning.adapter import Adapter, Kind, LoRA, Trained, WholeModel
from t2i_align.conditioning.soft_tokens import SoftTokensAdapter

ADAPTERS: dict[Kind, Adapter] = {adapter.kind: adapter for adapter in (LoRA(), SoftTokensAdapter())}
TRAINED: dict[Kind, Trained] = {**ADAPTERS, WholeModel.kind: WholeModel()}
