"""Importable, not provided: constructing Mamba2 raises NotImplementedError."""

from cobra_kernels.compat.absent import module

Mamba2 = module("mamba_ssm.modules.mamba2.Mamba2")
