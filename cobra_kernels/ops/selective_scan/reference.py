"""selective_scan in plain torch, one step at a time in fp32 (fp64 for fp64 input): the definition, and its gradients."""

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


def selective_scan_bwd(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens):
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state), None for what is absent; real A. README: derivation.

    A torch op cannot record autograd inside itself, so the backward of the kernels needs the formula. dout or dlast_state may be None.
    """
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, dim, seqlen = u.shape
    bounds = [0, seqlen] if cu_seqlens is None else cu_seqlens.tolist()
    end = bounds[-1]

    x = u[..., :end].to(real)
    raw = delta[..., :end].to(real)  # before softplus
    if delta_bias is not None:
        raw = raw + delta_bias.to(real)[:, None]
    dt = step_size(raw, None, delta_softplus)
    rate = A.to(real)
    B_of, C_of = (_per_step(m, dim, seqlen, real) for m in (B, C))
    gate = None if z is None else z[..., :end].to(real)
    dgated = x.new_zeros(x.shape) if dout is None else dout[..., :end].to(real)
    dy = dgated if gate is None else dgated * F.silu(gate)

    rows = batch if cu_seqlens is None else len(bounds) - 1
    h0 = rate.new_zeros(rows, dim, A.shape[1]) if initial_state is None else initial_state.to(real)
    g0 = torch.zeros_like(h0) if dlast_state is None else dlast_state.to(real)
    y = torch.zeros_like(x)  # sum_n C h, for dz
    dx, ddt = torch.zeros_like(x), torch.zeros_like(x)
    dA = torch.zeros_like(rate)
    dB, dC = _Gradient(B, real), _Gradient(C, real)
    dinitial = []
    for i, (h, g) in enumerate([(h0, g0)] if cu_seqlens is None else [(h0[i : i + 1], g0[i : i + 1]) for i in range(rows)]):
        span = range(bounds[i], bounds[i + 1])
        before = []  # the states that the steps start from
        for t in span:
            before.append(h)
            h = torch.exp(dt[..., t, None] * rate) * h + (dt[..., t] * x[..., t])[..., None] * B_of(t)
            y[..., t] = (C_of(t) * h).sum(-1)
            dC.add(t, dy[..., t, None] * h)
        for t in reversed(span):  # g is the gradient of h_t
            g = g + dy[..., t, None] * C_of(t)
            decay = torch.exp(dt[..., t, None] * rate)
            dexponent = g * decay * before.pop()  # of dt_t A
            dA += (dexponent * dt[..., t, None]).sum(0)
            ddtu = (g * B_of(t)).sum(-1)
            dB.add(t, g * (dt[..., t] * x[..., t])[..., None])
            ddt[..., t] = (dexponent * rate).sum(-1) + ddtu * x[..., t]
            dx[..., t] = ddtu * dt[..., t]
            g = g * decay
        dinitial.append(g)

    dD = dz = dbias = None
    if D is not None:
        y = y + D.to(real)[:, None] * x
        dx = dx + D.to(real)[:, None] * dy
        dD = (dy * x).sum((0, 2))
    if gate is not None:
        sigmoid = torch.sigmoid(gate)
        dz = dgated * y * sigmoid * (1 + gate * (1 - sigmoid))
    draw = ddt * torch.where(raw > 20, 1.0, torch.sigmoid(raw)) if delta_softplus else ddt
    if delta_bias is not None:
        dbias = draw.sum((0, 2))
    pad = (0, seqlen - end)
    dstate = None if initial_state is None else torch.cat(dinitial) if dinitial else g0
    return F.pad(dx, pad), F.pad(draw, pad), dA, dB.total, dC.total, dD, None if dz is None else F.pad(dz, pad), dbias, dstate


class _Gradient:
    """The gradient of B or C in its own form, summed from the (batch, dim, dstate) of each step."""

    def __init__(self, m, real):
        self.total = m.new_zeros(m.shape, dtype=real)

    def add(self, t, step):
        if self.total.dim() == 2:
            self.total += step.sum(0)
        elif self.total.dim() == 3:
            self.total[..., t] += step.sum(1)
        else:
            self.total[..., t] += step.unflatten(1, (self.total.shape[1], step.shape[1] // self.total.shape[1])).sum(2)
