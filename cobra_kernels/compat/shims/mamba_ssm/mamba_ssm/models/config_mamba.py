"""The configuration of a language model."""

from cobra_kernels.compat.lm import MambaConfig

__all__ = ["MambaConfig"]
