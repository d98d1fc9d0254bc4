"""Importable, not provided: constructing Mamba2Simple raises NotImplementedError."""

from cobra_kernels.compat.absent import module

Mamba2Simple = module("mamba_ssm.modules.mamba2_simple.Mamba2Simple")
