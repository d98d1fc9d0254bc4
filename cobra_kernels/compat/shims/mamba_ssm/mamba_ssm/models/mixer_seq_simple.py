"""The language model of cobra_kernels.modules, with upstream's ways to build, load and save it."""

from __future__ import annotations

from cobra_kernels.compat.lm import MambaLMHeadModel, MixerModel, create_block
from cobra_kernels.modules.lm import _init_weights

__all__ = ["MambaLMHeadModel", "MixerModel", "_init_weights", "create_block"]
