"""causal_conv1d_update in Triton.

A program owns BLOCK_D channels of one batch row: it computes their outputs from the state and x, and only then moves the state, which
its threads may hold in another order. Not autotuned: tuning runs would advance the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_utils import on_device_of

TILE = 1024  # elements of state per program: two 16-byte accesses per thread in 16 bits
MAX_COLUMNS = 256  # of a state that shifts in one piece; a longer one shifts piece by piece


@triton.jit
def _update_kernel(
    x, state, weight, bias, cache_seqlens, indices, y,
    dim, steps, state_len, pool,
    x_batch, x_dim, x_step, y_batch, y_dim, y_step, state_row, state_dim, state_column, weight_dim, weight_width, bias_stride,
    seen_stride, indices_stride,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, CIRCULAR: tl.constexpr, HAS_INDICES: tl.constexpr, SAME_DTYPE: tl.constexpr,
    SILU: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Outputs, then state, of BLOCK_D channels of one batch row."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(dim, BLOCK_D)
    b = pid // blocks
    d = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += b * x_batch
    y += b * y_batch
    row = b
    live_dim = dim  # 0 for padding: nothing of it is read
    if HAS_INDICES:
        row = tl.minimum(tl.load(indices + b * indices_stride).to(tl.int64), pool - 1)  # clamped: no stray access
        live_dim = tl.where(row >= 0, dim, 0)
    live = d < live_dim
    state += row * state_row
    seen = b * 0  # column of the next input, modulo state_len
    if CIRCULAR:
        seen = (tl.load(cache_seqlens + b * seen_stride).to(tl.int64) % state_len + state_len) % state_len

    for s in range(steps):
        total = tl.zeros([BLOCK_D], tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + d * bias_stride, mask=live, other=0.0).to(tl.float32)
        for w in tl.static_range(WIDTH):
            t = seen * 0 + s - (WIDTH - 1 - w)  # int64
            if CIRCULAR:
                column = (seen + t + state_len) % state_len
            else:
                column = state_len + t
            old = tl.load(state + (d * state_dim + column * state_column), mask=d < tl.where(t < 0, live_dim, 0), other=0.0).to(tl.float32)
            new = tl.load(x + (d * x_dim + t * x_step), mask=d < tl.where(t < 0, 0, live_dim), other=0.0).to(tl.float32)
            taps = tl.load(weight + (d * weight_dim + w * weight_width), mask=live, other=0.0).to(tl.float32)
            total = tl.fma(taps, old + new, total)
        if SILU:
            total = total / (1.0 + tl.exp(-total))
        total = tl.where(live, total, 0.0)
        tl.store(y + (d * y_dim + (seen * 0 + s) * y_step), total.to(y.dtype.element_ty), mask=d < dim)

    j = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    channel = d[:, None]
    if CIRCULAR:
        tl.debug_barrier()
        for first in range(0, steps, COLUMNS):
            step = first + j
            mask = live[:, None] & (step < steps)
            new = tl.load(x + (channel * x_dim + step * x_step), mask=mask, other=0.0)
            if not SAME_DTYPE:
                new = new.to(tl.float32).to(state.dtype.element_ty)
            tl.store(state + (channel * state_dim + (seen + step) % state_len * state_column), new, mask=mask)
    else:
        for first in range(0, state_len, COLUMNS):
            column = first + j
            step = column + steps - state_len  # step of x that ends up there, or the column it comes from
            mask = live[:, None] & (column < state_len)
            from_state = state + (channel * state_dim + (column + steps) * state_column)
            kept = tl.load(from_state, mask=mask & (step < 0), other=0.0)
            new = tl.load(x + (channel * x_dim + step * x_step), mask=mask & (step >= 0), other=0.0)
            if not SAME_DTYPE:
                new = new.to(tl.float32).to(state.dtype.element_ty)
            tl.debug_barrier()
            tl.store(state + (channel * state_dim + column * state_column), tl.where(step < 0, kept, new), mask=mask)


def _config(dim: int, state_len: int) -> dict[str, int]:
    """Tile and warps by size."""
    columns = min(triton.next_power_of_2(max(state_len, 1)), MAX_COLUMNS)
    block_d = min(triton.next_power_of_2(dim), TILE // columns)
    return {"BLOCK_D": block_d, "COLUMNS": columns, "num_warps": max(min(block_d * columns // 256, 4), 1)}


def causal_conv1d_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    """Writes conv_state, returns out like x."""
    y = torch.empty_like(x)
    batch, dim = x.shape[:2]
    if x.numel() == 0:
        return y
    steps = x.shape[2] if x.dim() == 3 else 1
    strides = [(t.stride(0), t.stride(1), t.stride(2) if t.dim() == 3 else 0) for t in (x, y)]
    config = _config(dim, conv_state.shape[2])
    with on_device_of(x):
        _update_kernel[(batch * triton.cdiv(dim, config["BLOCK_D"]),)](
            x, conv_state, weight, x if bias is None else bias, x if cache_seqlens is None else cache_seqlens,
            x if conv_state_indices is None else conv_state_indices, y,
            dim, steps, conv_state.shape[2], conv_state.shape[0],
            *strides[0], *strides[1], *conv_state.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
            0 if cache_seqlens is None else cache_seqlens.stride(0), 0 if conv_state_indices is None else conv_state_indices.stride(0),
            WIDTH=weight.shape[1], HAS_BIAS=bias is not None, CIRCULAR=cache_seqlens is not None, HAS_INDICES=conv_state_indices is not None,
            SAME_DTYPE=x.dtype == conv_state.dtype, SILU=silu, **config,
        )  # fmt: skip
    return y
