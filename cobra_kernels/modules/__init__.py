"""Mamba as modules: the block, the language model, sampling and generation."""

from cobra_kernels.modules.generation import Generation, generate, stream_tokens
from cobra_kernels.modules.lm import CausalLMOutput, MambaConfig, MambaLMHeadModel, MixerModel
from cobra_kernels.modules.mamba import Block, InferenceParams, Mamba, MambaState, RMSNorm
from cobra_kernels.modules.sampling import Sampling, sample

__all__ = [
    "Block",
    "CausalLMOutput",
    "Generation",
    "InferenceParams",
    "Mamba",
    "MambaConfig",
    "MambaLMHeadModel",
    "MambaState",
    "MixerModel",
    "RMSNorm",
    "Sampling",
    "generate",
    "sample",
    "stream_tokens",
]
