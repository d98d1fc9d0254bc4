"""Importable, not provided: a name of this module raises NotImplementedError when it is called."""

from cobra_kernels.compat.absent import functions_of

__getattr__ = functions_of("mamba_ssm.utils.determinism")
