"""mamba_inner in plain torch: the references of the convolution and of the scan with products between them. Gradients are autograd's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...checks import without_autocast
from ..causal_conv1d import reference as conv
from ..rms_norm import reference as norm
from ..selective_scan import reference as scan
from .arguments import Arguments, inside


def mamba_inner(a: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (batch, seqlen, d_model), conv_state (batch | num_seqs, dim, width - 1), ssm_state (batch | num_seqs, dim, dstate)."""
    with without_autocast(a.xz.device):
        x, z = a.xz.chunk(2, dim=1)  # (batch, dim, seqlen)
        u, conv_state = conv.causal_conv1d(x, a.conv1d_weight.squeeze(1), a.conv1d_bias, None, a.initial_conv_state, True, a.cu_seqlens)
        rank, dstate = a.delta_proj_weight.shape[1], a.A.shape[1] * (2 if a.A.is_complex() else 1)

        x_dbl = _product(a, u.transpose(1, 2), a.x_proj_weight)  # (batch, seqlen, dt_rank [+ dstate] [+ dstate])
        delta = _product(a, x_dbl[..., :rank], a.delta_proj_weight)  # (batch, seqlen, dim)
        if a.dt_rms_weight is not None:
            delta = _norm(a, delta, a.dt_rms_weight)
        B = a.B if a.B is not None else _projected(a, x_dbl[..., rank : rank + dstate], a.B_proj_bias)
        C = a.C if a.C is not None else _projected(a, x_dbl[..., x_dbl.shape[-1] - dstate :], a.C_proj_bias)
        if a.b_rms_weight is not None:
            B = _norm(a, B.transpose(-1, -2), a.b_rms_weight).transpose(-1, -2)
        if a.c_rms_weight is not None:
            C = _norm(a, C.transpose(-1, -2), a.c_rms_weight).transpose(-1, -2)

        y, ssm_state = scan.selective_scan(
            u, delta.transpose(1, 2), a.A, B, C, a.D, z, a.delta_bias, a.delta_softplus, a.initial_ssm_state, a.cu_seqlens
        )  # fmt: skip
        out = _product(a, y.transpose(1, 2), a.out_proj_weight, a.out_proj_bias)
        if a.cu_seqlens is not None:
            out = torch.where(inside(a)[:, None], out, 0)
        return out, conv_state, ssm_state


def _product(a, x, weight, bias=None):
    """x @ weight.T + bias in the wider dtype of the two, or in autocast's; rounded to autocast's dtype or xz's."""
    dtype = a.gemm_dtype or torch.promote_types(x.dtype, weight.dtype)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(a.gemm_dtype or a.xz.dtype)


def _norm(a, x, weight):
    return norm.rms_norm(x, weight, None, None, None, a.eps, True)[0]


def _projected(a, columns, bias):
    """(batch, seqlen, dstate) -> (batch, dstate, seqlen); complex: (batch, seqlen, 2 dstate) -> (batch, dstate, 2 seqlen), interleaved."""
    if bias is not None:
        columns = columns + bias.to(columns.dtype)
    if a.A.is_complex():
        return columns.unflatten(-1, (a.A.shape[1], 2)).permute(0, 2, 1, 3).flatten(2)
    return columns.transpose(1, 2)
