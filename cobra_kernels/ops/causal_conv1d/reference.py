"""causal_conv1d in plain torch, fp32 (fp64 for fp64 input): the definition. Its gradients are autograd's."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _compute(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _taps(x, past, seq_idx, width):
    """[width] of (batch, dim, seqlen): the input that weight[:, w] sees at every step. past (batch, dim, width - 1)."""
    seqlen = x.shape[2]
    full = torch.cat([past, x], 2)  # (batch, dim, width - 1 + seqlen)
    taps = [full[:, :, w : w + seqlen] for w in range(width)]
    if seq_idx is None:
        return taps
    return [torch.where(same, tap, 0) for tap, same in zip(taps, _same(seq_idx, width))]


def _same(seq_idx, width):
    """[width] of (batch, 1, seqlen): whether the tap lies in the sequence of the step it serves."""
    batch, seqlen = seq_idx.shape
    before = torch.full((batch, width - 1), -1, dtype=seq_idx.dtype, device=seq_idx.device)
    full = torch.cat([before, seq_idx], 1)
    return [(full[:, w : w + seqlen] == seq_idx)[:, None] for w in range(width)]


def _past(x, initial_states, width):
    """(batch, dim, width - 1) in the compute dtype: the inputs before step 0."""
    if initial_states is None:
        return x.new_zeros((*x.shape[:2], width - 1), dtype=_compute(x))
    return initial_states.to(_compute(x))


def _preactivation(taps, weight, bias):
    y = torch.zeros_like(taps[0]) if bias is None else bias[:, None].expand_as(taps[0])
    for w, tap in enumerate(taps):
        y = y + weight[:, w, None] * tap
    return y


def causal_conv1d(x, weight, bias, seq_idx, initial_states, silu, cu_seqlens):
    """y (batch, dim, seqlen) with the layout of x, and final_states (batch | num_seqs, dim, width - 1), both in x's dtype."""
    if cu_seqlens is not None:
        y, final_states = _packed(x, weight, bias, initial_states, silu, cu_seqlens.tolist())
    else:
        compute, width = _compute(x), weight.shape[1]
        past = _past(x, initial_states, width)
        taps = _taps(x.to(compute), past, seq_idx, width)
        y = _preactivation(taps, weight.to(compute), None if bias is None else bias.to(compute))
        if silu:
            y = F.silu(y)
        if seq_idx is not None:
            y = torch.where(seq_idx[:, None] < 0, 0, y)
        final_states = torch.cat([past, x.to(compute)], 2)[:, :, x.shape[2] :].to(x.dtype)
    return torch.empty_like(x).copy_(y), final_states.contiguous()


def _packed(x, weight, bias, initial_states, silu, bounds):
    """Every sequence on its own."""
    ys, finals = [], [x.new_empty((0, x.shape[1], weight.shape[1] - 1))]
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        initial = None if initial_states is None else initial_states[i : i + 1]
        y, final = causal_conv1d(x[:, :, begin:end], weight, bias, None, initial, silu, None)
        ys.append(y)
        finals.append(final)
    ys.append(x.new_zeros((*x.shape[:2], x.shape[2] - bounds[-1])))  # padding after the last sequence
    return torch.cat(ys, 2), torch.cat(finals)
