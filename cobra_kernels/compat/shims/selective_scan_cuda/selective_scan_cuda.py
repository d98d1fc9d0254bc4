"""The raw module of mamba_ssm, as VMamba and Vim call it."""

from cobra_kernels.compat.raw import scan_bwd as bwd
from cobra_kernels.compat.raw import scan_fwd as fwd

__all__ = ["bwd", "fwd"]
