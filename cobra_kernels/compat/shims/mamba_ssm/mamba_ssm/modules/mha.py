"""Importable, not provided: constructing MHA raises NotImplementedError."""

from cobra_kernels.compat.absent import module

MHA = module("mamba_ssm.modules.mha.MHA")
