"""selective_scan in plain torch, one step at a time in fp32 (fp64 for fp64 input): the definition; autograd of it defines the gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens):
    """Returns out (batch, dim, seqlen) in u's dtype and layout, last_state (batch | num_seqs, dim, dstate) in the compute dtype."""
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, dim, seqlen = u.shape
    bounds = [0, seqlen] if cu_seqlens is None else cu_seqlens.tolist()
    compute = A.dtype if A.is_complex() else real
    A = A.to(compute)  # (dim, dstate)
    B_of, C_of = (_per_step(m, dim, seqlen, compute) for m in (B, C))
    us, deltas, zs = (None if x is None else _steps(x, real) for x in (u, delta, z))

    rows = batch if cu_seqlens is None else len(bounds) - 1
    h0 = A.new_zeros(rows, dim, A.shape[1]) if initial_state is None else initial_state.to(compute, copy=True)
    states = [h0] if cu_seqlens is None else [h0[i : i + 1] for i in range(rows)]
    outs = []  # (batch, dim) each
    for i, h in enumerate(states):
        for t in range(bounds[i], bounds[i + 1]):
            dt = step_size(deltas[t], delta_bias, delta_softplus)
            h = torch.exp(dt[..., None] * A) * h + (dt * us[t])[..., None] * B_of(t)  # (batch, dim, dstate)
            y = (C_of(t) * h).sum(-1)
            y = 2 * y.real if y.is_complex() else y
            if D is not None:
                y = y + D.to(real) * us[t]
            outs.append(y if z is None else y * F.silu(zs[t]))
        states[i] = h

    padding = F.pad(u[..., :0].to(real), (0, seqlen - bounds[-1]))  # zeros; made of u, so that no steps at all have a gradient too
    out = torch.empty_like(u).copy_(torch.cat([torch.stack(outs, -1), padding], -1) if outs else padding)
    return out, torch.cat(states) if states else h0


def step_size(delta, delta_bias, delta_softplus):
    """dt of one step: (batch, dim) in compute precision."""
    dt = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)
    if not delta_softplus:
        return dt
    # log1p(exp) sees no large argument, so that its unused branch cannot turn a gradient into inf * 0
    return torch.where(dt > 20, dt, torch.log1p(torch.exp(dt.clamp(max=20))))


def _steps(x, real):
    """The steps of (batch, dim, seqlen), each contiguous: the same arithmetic wherever a step lies in a sequence."""
    return x.to(real).movedim(-1, 0).contiguous().unbind(0)


def _per_step(m, dim, seqlen, compute):
    """t -> B_t or C_t, (batch or 1, dim, dstate), of a constant or variable B or C in any of their forms."""
    if m.dim() == 2:  # (dim, dstate)
        constant = m.to(compute)[None]
        return lambda t: constant
    if m.dim() == 3:  # (batch, dstate, seqlen): one group
        m = m[:, None]
    if compute.is_complex:  # (..., 2 * seqlen): real and imaginary parts interleaved
        part = torch.float64 if compute == torch.complex128 else torch.float32
        m = torch.view_as_complex(m.to(part).unflatten(-1, (seqlen, 2)).contiguous())
    steps = m.to(compute).unbind(-1)  # of (batch, groups, dstate)
    return lambda t: steps[t].repeat_interleave(dim // m.shape[1], dim=1)
