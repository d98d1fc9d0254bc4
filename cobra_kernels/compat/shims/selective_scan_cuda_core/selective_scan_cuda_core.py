"""The raw module that VMamba builds."""

from cobra_kernels.compat.raw import vmamba_scan_bwd as bwd
from cobra_kernels.compat.raw import vmamba_scan_fwd as fwd

__all__ = ["bwd", "fwd"]
