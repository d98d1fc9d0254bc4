"""One step of the recurrence under upstream's names."""

from __future__ import annotations

import cobra_kernels
from cobra_kernels.compat.absent import kernel
from cobra_kernels.compat.references import selective_state_update_ref

__all__ = ["selective_state_update", "selective_state_update_ref"]


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None):
    """See `cobra_kernels.selective_state_update`; `state` is written in place."""
    return cobra_kernels.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


_selective_scan_update_kernel = kernel(
    "mamba_ssm.ops.triton.selective_state_update._selective_scan_update_kernel", "selective_state_update"
)
