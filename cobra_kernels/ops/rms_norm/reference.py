"""rms_norm in plain torch, fp32 (fp64 for fp64 input): the definition. Gradients are autograd's."""

from __future__ import annotations

import torch


def rms_norm(x, weight, bias, residual, s_dtype, eps, is_rms_norm):
    """Returns y (..., dim) in x's dtype and s = x + residual (..., dim) in `s_dtype` (None: compute dtype)."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = x.to(compute)  # (..., dim)
    if residual is not None:
        s = s + residual.to(compute)
    centred = s if is_rms_norm else s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype), s.to(s_dtype or compute)
