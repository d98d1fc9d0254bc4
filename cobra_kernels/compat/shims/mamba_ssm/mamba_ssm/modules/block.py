"""The Block of mamba_ssm 2.x, which takes an mlp_cls."""

from cobra_kernels.compat.lm import Block

__all__ = ["Block"]
