"""The raw module that VMamba builds for 16-bit inputs and an fp32 output."""

from cobra_kernels.compat.raw import vmamba_scan_bwd as bwd
from cobra_kernels.compat.raw import vmamba_scan_fwd as fwd

__all__ = ["bwd", "fwd"]
