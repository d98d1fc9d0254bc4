"""The projectors in plain torch: the definition that the kernels are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class _Round(torch.autograd.Function):
    """Rounds to `dtype` and comes back; the gradient passes unrounded."""

    @staticmethod
    def forward(h: Tensor, dtype: torch.dtype) -> Tensor:
        return h.to(dtype).to(h.dtype, copy=True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _layers(features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Linear, GELU, ..., Linear in the compute dtype; what a layer hands to the next one is rounded to T."""
    dtype = features[0].dtype
    compute = _compute_dtype(dtype)
    h = torch.cat(list(features), dim=-1).to(compute)  # (..., in_0)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        if i > 0:
            h = _Round.apply(F.gelu(h), dtype)
        h = F.linear(h, weight.to(compute), None if bias is None else bias.to(compute))  # (..., out_i)
    return h


def mlp_projector(features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return _layers(features, weights, biases).to(features[0].dtype).contiguous()


def ldp_projector(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    peg_weight: Tensor,
    peg_bias: Tensor | None,
    grid: tuple[int, int],
    out_grid: tuple[int, int],
) -> Tensor:
    compute = _compute_dtype(features[0].dtype)
    h = _layers(features, weights, biases)  # (batch, H*W, out)
    batch, _, out = h.shape
    h = h.transpose(1, 2).reshape(batch, out, *grid)
    p = F.adaptive_avg_pool2d(h, out_grid)  # (batch, out, h, w)
    peg_bias = None if peg_bias is None else peg_bias.to(compute)
    y = p + F.conv2d(p, peg_weight.to(compute), peg_bias, padding=1, groups=out)
    return y.flatten(2).transpose(1, 2).to(features[0].dtype).contiguous()  # (batch, h*w, out)
