"""Importable, not provided: constructing Mamba3 raises NotImplementedError."""

from cobra_kernels.compat.absent import module

Mamba3 = module("mamba_ssm.modules.mamba3.Mamba3")
