"""Model families under one contract. Imports nothing of `t2i_align`, so it can be used alone."""

from pipelines.base import Conditioning, PipelineError
from pipelines.check import check
from pipelines.load import FAMILIES, encoder_fingerprint, family_of, load, register, wrap
from pipelines.pipeline import TrainablePipeline
from pipelines.process import ForwardProcess, RectifiedFlow, VariancePreserving

__all__ = [
    "FAMILIES",
    "Conditioning",
    "ForwardProcess",
    "PipelineError",
    "RectifiedFlow",
    "TrainablePipeline",
    "VariancePreserving",
    "check",
    "encoder_fingerprint",
    "family_of",
    "load",
    "register",
    "wrap",
]
