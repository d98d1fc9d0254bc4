"""The configuration of a language model."""

from cobra_kernels.modules.lm import MambaConfig

__all__ = ["MambaConfig"]
