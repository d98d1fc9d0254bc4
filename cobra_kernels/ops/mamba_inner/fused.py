"""mamba_inner out of the kernels of its parts: the forward, and one backward written by hand.

Everything is token-major, (batch, seqlen, channels), as the products want it; convolution and scan read the (batch, channels, seqlen)
views of it in place, as channel-last. Only an xz that is not channel-last is copied, once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import without_autocast
from ...linear import linear
from ..causal_conv1d import op as conv
from ..rms_norm import op as norm
from ..selective_scan import op as scan
from .arguments import Arguments, inside


class Saved(NamedTuple):
    """What a forward leaves for its backward: x_dbl always; the rest with checkpoint_lvl 0, empty with 1."""

    x_dbl: Tensor  # (batch, seqlen, dt_rank [+ dstate] [+ dstate])
    u: Tensor  # (batch, dim, seqlen), the convolution's output
    delta: Tensor  # (batch, seqlen, dim), before its norm
    y: Tensor  # (batch, dim, seqlen), the scan's output
    states: Tensor  # the scan's, every 64 steps


def forward(a: Arguments) -> tuple[Tensor, ...]:
    """(out, conv_state, ssm_state, *Saved)."""
    with without_autocast(a.xz.device):
        x, z = _halves(a)
        u, conv_state = _convolved(a, x, a.return_states)
        x_dbl = _product(a, u.transpose(1, 2), a.x_proj_weight)
        delta = _product(a, x_dbl[..., : _rank(a)], a.delta_proj_weight)
        given = _scan_arguments(a, u, z, x_dbl, delta)
        if a.checkpoint_lvl == 0:
            y, ssm_state, states = scan._FORWARD_STATES[a.backend](*given)
            kept = (u, delta, y, states)
        else:
            y, ssm_state = scan._FORWARD[a.backend](*given)
            kept = tuple(y.new_empty(0) for _ in range(4))
        out = _product(a, y.transpose(1, 2), a.out_proj_weight, a.out_proj_bias)
        if a.cu_seqlens is not None and a.out_proj_bias is not None:
            out = torch.where(inside(a)[:, None], out, 0)
        return out, conv_state, ssm_state, x_dbl, *kept


def backward(
    dout: Tensor | None, dconv_state: Tensor | None, dssm_state: Tensor | None, a: Arguments, saved: Saved, wanted: dict[str, bool]
) -> dict[str, Tensor]:
    """The gradient of every tensor argument that is given, but for weights of products that are not wanted."""
    with without_autocast(a.xz.device):
        grads: dict[str, Tensor] = {}
        batch, width, seqlen = a.xz.shape
        dim, rank, dstate = width // 2, _rank(a), a.A.shape[1]
        x, z = _halves(a)

        # Made again, from the same operands by the same kernels: the same bits.
        x_dbl = saved.x_dbl
        dt = x_dbl[..., :rank]
        recompute = a.checkpoint_lvl == 1
        u = _convolved(a, x, False)[0] if recompute else saved.u
        delta = _product(a, dt, a.delta_proj_weight) if recompute else saved.delta
        given = _scan_arguments(a, u, z, x_dbl, delta)
        y, states = scan._FORWARD_STATES[a.backend](*given)[::2] if recompute else (saved.y, saved.states)

        if dout is None:
            dout = a.xz.new_zeros((), dtype=a.gemm_dtype).expand(batch, seqlen, a.out_proj_weight.shape[0])
        if a.cu_seqlens is not None:
            dout = torch.where(inside(a)[:, None], dout, 0)
        dy = _product(a, dout, a.out_proj_weight.t()).to(y.dtype)
        if wanted["out_proj_weight"]:
            grads["out_proj_weight"] = _weight_gradient(a, dout, y.transpose(1, 2), a.out_proj_weight)
        if a.out_proj_bias is not None:
            grads["out_proj_bias"] = _summed(dout, a.out_proj_bias)
        del y, dout

        du, ddelta, grads["A"], dB, dC, dD, dz, ddelta_bias, dinitial = scan._BACKWARD[a.backend](
            dy.transpose(1, 2), dssm_state, *given, states
        )  # fmt: skip
        del dy, states, given
        grads.update({"D": dD, "delta_bias": ddelta_bias, "initial_ssm_state": dinitial})

        ddelta = ddelta.transpose(1, 2)  # (batch, seqlen, dim)
        if a.dt_rms_weight is not None:
            ddelta, grads["dt_rms_weight"] = _norm_gradients(a, ddelta, delta, a.dt_rms_weight)
        del delta
        if wanted["delta_proj_weight"]:
            grads["delta_proj_weight"] = _weight_gradient(a, ddelta, dt, a.delta_proj_weight)
        dx_dbl = torch.empty_like(x_dbl)
        dx_dbl[..., :rank] = _product(a, ddelta, a.delta_proj_weight.t())
        del ddelta
        begin = rank
        for name, d in (("B", dB), ("C", dC)):
            columns = x_dbl[..., begin : begin + dstate]
            weight, bias, present = getattr(a, f"{name.lower()}_rms_weight"), getattr(a, f"{name}_proj_bias"), getattr(a, name)
            if weight is not None:
                before = _biased(columns, bias) if present is None else present.transpose(-1, -2)
                d, grads[f"{name.lower()}_rms_weight"] = _norm_gradients(a, d.transpose(-1, -2), before, weight)
                d = d.transpose(-1, -2)
            if present is not None:
                grads[name] = d
                continue
            if bias is not None:
                grads[f"{name}_proj_bias"] = _summed(d.transpose(1, 2), bias)
            dx_dbl[..., begin : begin + dstate] = d.transpose(1, 2)
            begin += dstate
        del dB, dC, d

        if wanted["x_proj_weight"]:
            grads["x_proj_weight"] = _weight_gradient(a, dx_dbl, u.transpose(1, 2), a.x_proj_weight)
        del u
        du = _plus_product(a, du, dx_dbl, a.x_proj_weight)
        dx, dweight, dbias, dpast = conv._BACKWARD[a.backend](
            du, dconv_state, x, a.conv1d_weight.squeeze(1), a.conv1d_bias, None, a.initial_conv_state, True, a.cu_seqlens
        )  # fmt: skip
        del du
        grads.update({"conv1d_weight": dweight.unsqueeze(1), "conv1d_bias": dbias, "initial_conv_state": dpast})
        dxz = torch.empty_like(a.xz)
        dxz[:, :dim].copy_(dx)  # the kernels return tensors of their own: one copy of each half
        dxz[:, dim:].copy_(dz)
        grads["xz"] = dxz
        return grads


# --- parts -----------------------------------------------------------------------------------------------------------


def _rank(a) -> int:
    return a.delta_proj_weight.shape[1]


def _halves(a) -> list[Tensor]:
    """x and z (batch, dim, seqlen), both channel-last."""
    tokens = a.xz.transpose(1, 2)
    if tokens.shape[2] > 1 and tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    dim = tokens.shape[2] // 2
    return [half.transpose(1, 2) for half in tokens.split((dim, dim), dim=2)]


def _convolved(a, x, return_state) -> tuple[Tensor, Tensor]:
    return conv._FORWARD[a.backend](
        x, a.conv1d_weight.squeeze(1), a.conv1d_bias, None, a.initial_conv_state, return_state, True, a.cu_seqlens
    )  # fmt: skip


def _scan_arguments(a, u, z, x_dbl, delta) -> tuple:
    """Those of selective_scan's ops. Without biases and norms B and C are columns of x_dbl, read where they lie."""
    rank, dstate = _rank(a), a.A.shape[1]
    if a.dt_rms_weight is not None:
        delta = _normed(a, delta, a.dt_rms_weight)
    B, C = a.B, a.C
    if B is None:
        B = _biased(x_dbl[..., rank : rank + dstate], a.B_proj_bias).transpose(1, 2)  # (batch, dstate, seqlen)
    if C is None:
        C = _biased(x_dbl[..., x_dbl.shape[2] - dstate :], a.C_proj_bias).transpose(1, 2)
    if a.b_rms_weight is not None:
        B = _normed(a, B.transpose(-1, -2), a.b_rms_weight).transpose(-1, -2)
    if a.c_rms_weight is not None:
        C = _normed(a, C.transpose(-1, -2), a.c_rms_weight).transpose(-1, -2)
    return u, delta.transpose(1, 2), a.A, B, C, a.D, z, a.delta_bias, a.delta_softplus, a.initial_ssm_state, a.cu_seqlens


def _biased(columns, bias) -> Tensor:
    return columns if bias is None else columns + bias.to(columns.dtype)


def _normed(a, x, weight) -> Tensor:
    return norm._FORWARD[a.backend](x, weight, None, None, None, a.eps, True)[0]


def _norm_gradients(a, dy, x, weight) -> tuple[Tensor, Tensor]:
    dx, _, dweight, _ = norm._BACKWARD[a.backend](dy, None, x, weight, None, None, a.eps, True)
    return dx, dweight


# --- products --------------------------------------------------------------------------------------------------------


def _product(a, x, weight, bias=None) -> Tensor:
    """x @ weight.T + bias in the wider dtype of the two, or in autocast's; rounded to autocast's dtype or xz's."""
    dtype = a.gemm_dtype or torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    return linear(x.to(dtype), weight.to(dtype), bias).to(a.gemm_dtype or a.xz.dtype)


def _weight_gradient(a, dy, x, weight) -> Tensor:
    """dy.T @ x over all tokens, of dy (batch, seqlen, out) and x (batch, seqlen, in): (out, in) in the weight's dtype."""
    dtype = a.gemm_dtype or torch.promote_types(x.dtype, weight.dtype)
    tokens = x.shape[0] * x.shape[1]
    dy, x = (t.to(dtype).reshape(tokens, t.shape[2]) for t in (dy, x))
    return linear(dy.t(), x.t()).to(weight.dtype)


def _plus_product(a, du, dx_dbl, weight) -> Tensor:
    """du (batch, dim, seqlen) + (dx_dbl @ weight) as its transpose, rounded to du's dtype."""
    batch, dim, seqlen = du.shape
    rows, dx_dbl = du.transpose(1, 2).reshape(batch * seqlen, dim), dx_dbl.reshape(batch * seqlen, dx_dbl.shape[2])
    if du.dtype == dx_dbl.dtype == weight.dtype:
        rows = rows.addmm_(dx_dbl, weight)
    else:
        dtype = a.gemm_dtype or torch.promote_types(dx_dbl.dtype, weight.dtype)
        rows = rows + linear(dx_dbl.to(dtype), weight.to(dtype).t())
    return rows.to(du.dtype).view(batch, seqlen, dim).transpose(1, 2)


def _summed(dy, bias) -> Tensor:
    """dy (batch, seqlen, out) over all tokens, in the compute dtype, in the bias's dtype."""
    compute = torch.float64 if dy.dtype == torch.float64 else torch.float32
    return dy.sum((0, 1), dtype=compute).to(bias.dtype)
