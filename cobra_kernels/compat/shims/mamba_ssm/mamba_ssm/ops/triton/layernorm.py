"""Norms under the module name and in the argument order of mamba_ssm 1.x."""

from __future__ import annotations

import cobra_kernels
from cobra_kernels.compat.absent import function
from cobra_kernels.compat.norms import layer_norm_linear
from cobra_kernels.compat.references import layer_norm_ref_v1 as layer_norm_ref
from cobra_kernels.compat.references import rms_norm_ref_v1 as rms_norm_ref
from cobra_kernels.modules.mamba import RMSNorm

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]


def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
    """See `cobra_kernels.rms_norm`."""
    return cobra_kernels.rms_norm(x, weight, bias, residual, prenorm, residual_in_fp32, eps, is_rms_norm=is_rms_norm)


def rms_norm_fn(x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):
    """See `cobra_kernels.rms_norm`."""
    return cobra_kernels.rms_norm(x, weight, bias, residual, prenorm, residual_in_fp32, eps)


def layer_norm_linear_fn(
    x, norm_weight, norm_bias, linear_weight, linear_bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False
):
    """A norm, then a linear layer."""
    return layer_norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm)


class LayerNormFn:
    """Upstream's autograd function, as far as callers see it."""

    apply = staticmethod(layer_norm_fn)


class LayerNormLinearFn:
    """Upstream's autograd function, as far as callers see it."""

    apply = staticmethod(layer_norm_linear_fn)


_layer_norm_fwd = function("mamba_ssm.ops.triton.layernorm._layer_norm_fwd", "layer_norm_fn")
_layer_norm_bwd = function("mamba_ssm.ops.triton.layernorm._layer_norm_bwd", "layer_norm_fn")
