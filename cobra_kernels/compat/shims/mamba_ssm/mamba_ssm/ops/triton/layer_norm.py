"""Norms under the module name and in the argument order of mamba_ssm 2.x."""

from __future__ import annotations

from cobra_kernels.compat.absent import function
from cobra_kernels.compat.norms import RMSNorm, layer_norm_linear, parallel_norm
from cobra_kernels.compat.references import layer_norm_ref, rms_norm_ref

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


def layer_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None, prenorm=False,
    residual_in_fp32=False, is_rms_norm=False, return_dropout_mask=False,
):  # fmt: skip
    """See `cobra_kernels.rms_norm`; a second input, a second weight, dropout and rowscale are torch around it."""
    return parallel_norm(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, is_rms_norm, return_dropout_mask
    )


def rms_norm_fn(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None, prenorm=False,
    residual_in_fp32=False, return_dropout_mask=False,
):  # fmt: skip
    """See `layer_norm_fn`."""
    return parallel_norm(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, True, return_dropout_mask
    )


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


_layer_norm_fwd = function("mamba_ssm.ops.triton.layer_norm._layer_norm_fwd", "layer_norm_fn")
_layer_norm_bwd = function("mamba_ssm.ops.triton.layer_norm._layer_norm_bwd", "layer_norm_fn")
