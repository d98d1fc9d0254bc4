"""causal_conv1d_update in plain torch, fp32 (fp64 for fp64 input): the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_conv1d_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    """Out like x; writes conv_state (batch | pool, dim, state_len). x (batch, dim) or (batch, dim, steps)."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    width, state_len = weight.shape[1], conv_state.shape[2]
    steps = 1 if x.dim() == 2 else x.shape[2]
    if conv_state_indices is None:
        rows = live = torch.arange(x.shape[0], device=x.device)
    else:
        live = torch.nonzero(conv_state_indices >= 0).flatten()  # batch rows that are not padding
        rows = conv_state_indices[live].long()  # their rows of the pool
    new = x[live].reshape(len(live), x.shape[1], steps)
    state = conv_state[rows]  # (live, dim, state_len)

    if cache_seqlens is None:
        past = state[:, :, state_len - (width - 1) :]
        kept = state[:, :, min(steps, state_len) :]
        state = torch.cat([kept, new[:, :, max(0, steps - state_len) :].to(state.dtype)], 2)
    else:
        seen = cache_seqlens[live].long()[:, None]  # (live, 1)

        def columns(first, count):  # (live, dim, count): circular columns seen + first, ...
            t = (seen + torch.arange(first, first + count, device=x.device)) % state_len
            return t[:, None].expand(-1, x.shape[1], -1)

        past = state.gather(2, columns(1 - width, width - 1))
        state = state.scatter(2, columns(0, steps), new.to(state.dtype))

    full = torch.cat([past.to(compute), new.to(compute)], 2)  # (live, dim, width - 1 + steps)
    y = torch.zeros_like(new, dtype=compute) if bias is None else bias.to(compute)[:, None].expand_as(new)
    for w in range(width):
        y = y + weight[:, w, None].to(compute) * full[:, :, w : w + steps]
    if silu:
        y = F.silu(y)

    conv_state[rows] = state
    out = torch.zeros_like(x)
    out[live] = y.reshape(len(live), *x.shape[1:]).to(x.dtype)
    return out
