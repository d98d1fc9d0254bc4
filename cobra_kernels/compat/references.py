"""The `_ref` functions of mamba_ssm and causal_conv1d, in plain torch, written from the formulas and sharing nothing with our ops.

They are what test suites of those packages compare with, and a fallback that needs no kernel. fp32 inside, fp64 for fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _wide(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None or t.dtype in (torch.float64, torch.complex64, torch.complex128) else t.float()


def _every_channel(m: torch.Tensor, batch: int, dim: int, seqlen: int, is_complex: bool) -> torch.Tensor:
    """B or C in any form as (batch, dim, dstate, seqlen)."""
    if m.dim() == 2:
        return m[None, :, :, None].expand(batch, dim, m.shape[1], seqlen)
    m = m if m.dim() == 4 else m.unsqueeze(1)
    if is_complex:
        m = torch.view_as_complex(_wide(m).reshape(*m.shape[:-1], -1, 2).contiguous())
    return _wide(m).repeat_interleave(dim // m.shape[1], dim=1)


def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The scan, a step at a time: u, delta, z (batch, dim, seqlen), A (dim, dstate), B and C in every form of selective_scan_fn."""
    batch, dim, seqlen = u.shape
    x, dt, A = _wide(u), _wide(delta), _wide(A)
    if delta_bias is not None:
        dt = dt + _wide(delta_bias)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = (_every_channel(m, batch, dim, seqlen, A.is_complex()) for m in (B, C))
    decay = torch.exp(dt[:, :, None] * A[None, :, :, None])  # (batch, dim, dstate, seqlen)
    drive = (dt * x)[:, :, None] * B
    h = torch.zeros_like(drive[..., 0]) if seqlen else A.new_zeros(batch, dim, A.shape[1])
    ys = []
    for t in range(seqlen):
        h = decay[..., t] * h + drive[..., t]
        y = torch.einsum("bdn,bdn->bd", h, C[..., t])
        ys.append(2 * y.real if y.is_complex() else y)
    out = torch.stack(ys, -1) if ys else x.new_zeros(batch, dim, 0)
    if D is not None:
        out = out + x * _wide(D)[:, None]
    if z is not None:
        out = out * F.silu(_wide(z))
    out = out.to(u.dtype)
    return (out, h) if return_last_state else out


def selective_state_update_ref(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """One step; `state` (batch, dim, dstate), or with heads (batch, heads, dim, dstate), is written in place."""
    heads = state.dim() == 4
    if not heads:  # one head
        one = [None if t is None else t.unsqueeze(1) for t in (state, x, dt, z)]
        state_, x_, dt_, z_ = one
        A, B, C = A[None], B.unsqueeze(1), C.unsqueeze(1)
        D, dt_bias = (None if t is None else t[None] for t in (D, dt_bias))
    else:
        state_, x_, dt_, z_ = state, x, dt, z
    step = _wide(dt_) if dt_bias is None else _wide(dt_) + _wide(dt_bias)
    step = F.softplus(step) if dt_softplus else step
    B, C = (_wide(m).repeat_interleave(state_.shape[1] // m.shape[1], dim=1)[:, :, None] for m in (B, C))  # (batch, heads, 1, dstate)
    h = _wide(state_) * torch.exp(step[..., None] * _wide(A)) + (step * _wide(x_))[..., None] * B
    state_.copy_(h)
    out = (_wide(state_) * C).sum(-1)
    if D is not None:
        out = out + _wide(x_) * _wide(D)
    if z_ is not None:
        out = out * F.silu(_wide(z_))
    out = out.to(x.dtype)
    return out if heads else out.squeeze(1)


def causal_conv1d_ref(
    x, weight, bias=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None, seq_idx=None
):
    """x (batch, dim, seqlen), weight (dim, width): each output is the sum over the last `width` inputs.

    seq_idx (batch, seqlen): inputs of another number than the output's count 0, and an output of a negative number is 0. Initial states
    are of the first number.
    """
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError("activation must be None, silu, or swish")
    dim, width = weight.shape
    dtype, x = x.dtype, x.to(weight.dtype)
    history = F.pad(x, (width - 1, 0)) if initial_states is None else torch.cat([initial_states.to(x.dtype), x], dim=-1)
    if seq_idx is None:
        out = F.conv1d(history, weight.unsqueeze(1), bias, groups=dim)
    else:
        taps = history.unfold(2, width, 1)  # (batch, dim, seqlen, width)
        numbers = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=1).unfold(1, width, 1)
        same = (numbers == seq_idx[:, :, None])[:, None]
        out = (taps.masked_fill(~same, 0.0) * weight[:, None]).sum(-1)
        out = out if bias is None else out + bias[:, None]
    out = out if activation is None else F.silu(out)
    if seq_idx is not None:
        out = out.masked_fill((seq_idx < 0)[:, None], 0.0)
    if not return_final_states:
        return out.to(dtype)
    final_states = history[..., history.shape[-1] - (width - 1) :].to(dtype)
    if final_states_out is not None:
        final_states = final_states_out.copy_(final_states)
    return out.to(dtype), final_states


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """x (batch, dim) or (batch, dim, steps); `conv_state` (batch, dim, state_len) is written in place."""
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError("activation must be None, silu, or swish")
    dtype, one = x.dtype, x.dim() == 2
    x = x.unsqueeze(-1) if one else x
    (_, dim, steps), width, state_len = x.shape, weight.shape[1], conv_state.shape[-1]
    if cache_seqlens is None:
        history = torch.cat([conv_state, x], dim=-1).to(weight.dtype)
        conv_state.copy_(history[..., -state_len:])
    else:
        columns = (cache_seqlens.long()[:, None] + torch.arange(1 - width, 0, device=x.device)) % state_len  # of the inputs before x
        history = torch.cat([conv_state.gather(2, columns[:, None].expand(-1, dim, -1)), x], dim=-1).to(weight.dtype)
        kept = min(steps, state_len)
        columns = (cache_seqlens.long()[:, None] + torch.arange(steps - kept, steps, device=x.device)) % state_len
        conv_state.scatter_(2, columns[:, None].expand(-1, dim, -1), x[..., steps - kept :].to(conv_state.dtype))
    out = F.conv1d(history, weight.unsqueeze(1), bias, groups=dim)[..., -steps:]
    out = (out if activation is None else F.silu(out)).to(dtype)
    return out.squeeze(-1) if one else out


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """x (total, dim) -> (sequences, dim, state_len): the last inputs of each sequence, zeros before its first."""
    states = x.new_zeros(cu_seqlens.numel() - 1, x.shape[1], state_len)
    bounds = cu_seqlens.tolist()
    for state, begin, end in zip(states, bounds, bounds[1:]):
        count = min(state_len, end - begin)
        state[:, state_len - count :] = x[end - count : end].T
    return states


def mamba_inner_ref(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None, D=None,
    delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None,
    b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    """The training block, from the references above. xz (batch, 2 * dim, seqlen) -> (batch, seqlen, d_model)."""
    dstate, rank = A.shape[1] * (2 if A.is_complex() else 1), delta_proj_weight.shape[1]
    x, z = xz.chunk(2, dim=1)
    u = causal_conv1d_ref(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    projected = u.transpose(1, 2) @ x_proj_weight.T  # (batch, seqlen, dt [B] [C])
    delta = projected[..., :rank] @ delta_proj_weight.T

    def made(given, columns, bias, weight):
        if given is None:
            given = columns if bias is None else columns + bias.to(columns.dtype)
            given = given if weight is None else rms_norm_ref(given, weight, None, eps=b_c_dt_rms_eps)
            if A.is_complex():  # (re, im) of each state side by side -> of each step
                given = given.unflatten(-1, (-1, 2)).permute(0, 2, 1, 3).flatten(2)
                return given.contiguous()
            return given.transpose(1, 2).contiguous()
        return given

    B, C = (
        made(B, projected[..., rank : rank + dstate], B_proj_bias, b_rms_weight),
        made(C, projected[..., -dstate:], C_proj_bias, c_rms_weight),
    )
    if dt_rms_weight is not None:
        delta = rms_norm_ref(delta, dt_rms_weight, None, eps=b_c_dt_rms_eps)
    y = selective_scan_ref(u, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def layer_norm_ref(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None, prenorm=False,
    dropout_mask=None, dropout_mask1=None, upcast=False,
):  # fmt: skip
    """LayerNorm of x (+ x1) (+ residual), by torch, in the argument order of mamba_ssm 2.x; see `_norm_ref`."""
    return _norm_ref(
        _layer_norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask, dropout_mask1, upcast
    )


def rms_norm_ref(
    x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-6, dropout_p=0.0, rowscale=None, prenorm=False,
    dropout_mask=None, dropout_mask1=None, upcast=False,
):  # fmt: skip
    """RMSNorm of x (+ x1) (+ residual), by torch, in the argument order of mamba_ssm 2.x; see `_norm_ref`."""
    return _norm_ref(
        _rms_norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask, dropout_mask1, upcast
    )


def layer_norm_ref_v1(x, weight, bias, residual=None, eps=1e-6, prenorm=False, upcast=False):
    """LayerNorm in the argument order of mamba_ssm 1.x."""
    return layer_norm_ref(x, weight, bias, residual, eps=eps, prenorm=prenorm, upcast=upcast)


def rms_norm_ref_v1(x, weight, bias, residual=None, eps=1e-6, prenorm=False, upcast=False):
    """RMSNorm in the argument order of mamba_ssm 1.x."""
    return rms_norm_ref(x, weight, bias, residual, eps=eps, prenorm=prenorm, upcast=upcast)


def _layer_norm(s, weight, bias, eps):
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps)


def _rms_norm(s, weight, bias, eps):
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


def _norm_ref(norm, x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, mask, mask1, upcast):
    """y, or (y, y1) with a second weight, and the sum with prenorm. A mask (rows, dim) says what dropout kept."""
    dtype = x.dtype
    if upcast:
        x, x1, residual, weight, bias, weight1, bias1 = (_wide(t) for t in (x, x1, residual, weight, bias, weight1, bias1))
    s = x if rowscale is None else x * rowscale[..., None]
    s = _dropped(s, mask, dropout_p)
    if x1 is not None:
        s = s + _dropped(x1, mask1, dropout_p)
    if residual is not None:
        s = (s + residual).to(s.dtype)
    ys = [norm(s.to(weight.dtype) if upcast else s, weight, bias, eps).to(dtype)]
    if weight1 is not None:
        ys.append(norm(s.to(weight1.dtype) if upcast else s, weight1, bias1, eps).to(dtype))
    out = [*ys, s] if prenorm else ys
    return out[0] if len(out) == 1 else tuple(out)


def _dropped(x, mask, p):
    if p == 0:
        return x
    return F.dropout(x, p) if mask is None else x.masked_fill(~mask.bool(), 0.0) / (1 - p)
