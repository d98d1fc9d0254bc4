"""Importable, not provided: constructing GatedMLP raises NotImplementedError."""

from cobra_kernels.compat.absent import module

GatedMLP = module("mamba_ssm.modules.mlp.GatedMLP")
