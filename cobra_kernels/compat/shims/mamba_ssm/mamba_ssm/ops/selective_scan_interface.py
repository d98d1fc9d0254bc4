"""Scan and training block of Mamba-1 under upstream's names and signatures."""

from __future__ import annotations

import cobra_kernels
from cobra_kernels.compat.absent import asked_by_transformers
from cobra_kernels.compat.references import mamba_inner_ref, selective_scan_ref
from cobra_kernels.compat.transformers import mamba_inner_fn as frozen_aware

__all__ = ["MambaInnerFn", "SelectiveScanFn", "mamba_inner_fn", "mamba_inner_ref", "selective_scan_fn", "selective_scan_ref"]  # noqa: F822


def rms_norm_forward(x, weight, bias, eps=1e-6, is_rms_norm=True):
    """See `cobra_kernels.rms_norm`."""
    return cobra_kernels.rms_norm(x, weight, bias, eps=eps, is_rms_norm=is_rms_norm)


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """See `cobra_kernels.selective_scan`. Unlike upstream's, last_state has memory of its own and carries gradient."""
    return cobra_kernels.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _mamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None, D=None,
    delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """See `cobra_kernels.mamba_inner`. Unlike upstream's, the three rms weights receive gradients."""
    return cobra_kernels.mamba_inner(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias,
        B_proj_bias, C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip


_mamba_inner_fn.__name__ = _mamba_inner_fn.__qualname__ = "mamba_inner_fn"


def __getattr__(name: str):
    """mamba_inner_fn: transformers, which asks by getattr, gets the one that knows of frozen weights."""
    if name != "mamba_inner_fn":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return frozen_aware if asked_by_transformers() else _mamba_inner_fn


class SelectiveScanFn:
    """Upstream's autograd function, as far as callers see it."""

    apply = staticmethod(selective_scan_fn)


class MambaInnerFn:
    """Upstream's autograd function, as far as callers see it."""

    apply = staticmethod(_mamba_inner_fn)
