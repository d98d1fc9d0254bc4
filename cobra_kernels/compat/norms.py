"""Norm functions of mamba_ssm as calls of cobra_kernels.rms_norm: what upstream fuses around the norm is plain torch here."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import cobra_kernels
from cobra_kernels.modules import mamba


def layer_norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, residual, eps, prenorm, residual_in_fp32, is_rms_norm):
    """A norm, then a linear layer in the autocast dtype, if any: y, or (y, sum) with prenorm."""
    out = cobra_kernels.rms_norm(x, norm_weight, norm_bias, residual, prenorm, residual_in_fp32, eps, is_rms_norm=is_rms_norm)
    y, *s = out if prenorm else (out,)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else y.dtype
    y = F.linear(y.to(dtype), linear_weight.to(dtype), None if linear_bias is None else linear_bias.to(dtype))
    return (y, *s) if prenorm else y


def parallel_norm(
    x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, is_rms_norm, return_dropout_mask
):
    """mamba_ssm 2.x: the norm of dropout(x * rowscale) + dropout(x1) + residual under one weight or two.

    Returns y (, y1) (, the sum) (, which elements of x and of x1 dropout kept), a tuple if more than one.
    """
    masks: list[torch.Tensor | None] = []

    def branch(t):
        keep = None
        if dropout_p > 0:
            keep = torch.rand(t.shape, device=t.device) >= dropout_p
            t = t.masked_fill(~keep, 0.0) / (1 - dropout_p)
        masks.append(keep)
        return t

    dtype = x.dtype
    s = branch(x if rowscale is None else x * rowscale[..., None].to(dtype))
    if x1 is not None:
        s = s + branch(x1)
    plain = cobra_kernels.rms_norm(s, weight, bias, residual, prenorm, residual_in_fp32, eps, is_rms_norm=is_rms_norm)
    out = list(plain) if prenorm else [plain]
    if weight1 is not None:
        out.insert(1, cobra_kernels.rms_norm(s, weight1, bias1, residual, False, residual_in_fp32, eps, is_rms_norm=is_rms_norm))
    if return_dropout_mask:
        out += [masks[0], masks[1] if x1 is not None else None]
    return out[0] if len(out) == 1 else tuple(out)


class RMSNorm(mamba.RMSNorm):
    """mamba_ssm 2.x's: in training, dropout of what is added to the residual."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device=None, dtype=None):
        super().__init__(hidden_size, eps, device, dtype)
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0 else None

    def reset_parameters(self):
        """The weight as constructed: ones."""
        torch.nn.init.ones_(self.weight)

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        """x, residual (..., hidden_size) -> y like x; with prenorm (y, x + residual)."""
        if self.drop is not None:
            x = self.drop(x)
        return super().forward(x, residual, prenorm, residual_in_fp32)
