"""Mamba, and the Block of mamba_ssm 1.x: the very classes of cobra_kernels.modules."""

from cobra_kernels.modules.mamba import Block, Mamba

__all__ = ["Block", "Mamba"]
