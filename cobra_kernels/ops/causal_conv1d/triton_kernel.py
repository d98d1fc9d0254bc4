"""causal_conv1d in Triton.

A program owns a tile of time steps and channels of one batch row and reads it once per tap, all but the first time from cache. Lanes
run along whichever of the two has stride 1. Final states are copied by a second, small kernel, whose programs own channels of a sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_utils import on_device_of

TILE = 2048  # outputs of a program: 16 per thread, two 16-byte accesses in 16 bits
FINAL_CHANNELS = 256


@triton.jit
def _boundary(cu_seqlens, cu_stride, i, seqlen, mask):
    """Boundaries of the packed sequences, inside [0, seqlen] whatever cu_seqlens holds."""
    at = tl.load(cu_seqlens + i * cu_stride, mask=mask, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(at, 0), seqlen)


@triton.jit
def _fwd_kernel(
    x, weight, bias, seq_idx, initial, cu_seqlens, y,
    dim, seqlen, num_seqs, search_steps,
    x_batch, x_dim, x_time, y_batch, y_dim, y_time, weight_dim, weight_width, bias_stride, idx_batch, idx_time,
    initial_state, initial_dim, initial_column, cu_stride,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
    SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of y."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(dim, BLOCK_D)
    chunks = tl.cdiv(seqlen, BLOCK_T)
    d = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    t = (pid // blocks % chunks) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = pid // blocks // chunks
    in_dim, in_time = d < dim, t < seqlen

    # The sequence of every step: where it starts, its row of the states; -1 is padding.
    start = t * 0
    state = start + b
    if PACKED:
        low = t * 0
        high = low + num_seqs  # the first sequence that ends after t: empty ones are passed over
        for _ in range(search_steps):
            middle = (low + high) // 2
            searching = low < high
            after = _boundary(cu_seqlens, cu_stride, middle + 1, seqlen, searching) > t
            high = tl.where(searching & after, middle, high)
            low = tl.where(searching & (after == 0), middle + 1, low)
        found = low < num_seqs
        start = tl.minimum(_boundary(cu_seqlens, cu_stride, low, seqlen, found), t)
        state = tl.where(found, low, -1)
    if HAS_SEQ_IDX:
        own = tl.load(seq_idx + b * idx_batch + t * idx_time, mask=in_time, other=-1).to(tl.int64)
        state = tl.where(own >= 0, state, -1)
    live = in_time & (state >= 0)

    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + d * bias_stride, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(WIDTH):
        tap = t - (WIDTH - 1 - w)
        counts = live & (tap >= start)
        if HAS_SEQ_IDX:
            counts &= tl.load(seq_idx + b * idx_batch + tap * idx_time, mask=counts, other=-1).to(tl.int64) == own
        at = x + b * x_batch + (tap[:, None] * x_time + d[None, :] * x_dim)
        v = tl.load(at, mask=counts[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
        if HAS_INITIAL:
            before = live & (tap < start)
            column = tap - start + (WIDTH - 1)
            at = initial + (state * initial_state + column * initial_column)[:, None] + (d * initial_dim)[None, :]
            v += tl.load(at, mask=before[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
        taps = tl.load(weight + d * weight_dim + w * weight_width, mask=in_dim, other=0.0).to(tl.float32)
        total = tl.fma(tl.broadcast_to(taps[None, :], [BLOCK_T, BLOCK_D]), v, total)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    total = tl.where((state >= 0)[:, None], total, 0.0)
    at = y + b * y_batch + (t[:, None] * y_time + d[None, :] * y_dim)
    tl.store(at, total.to(y.dtype.element_ty), mask=in_time[:, None] & in_dim[None, :])


@triton.jit
def _final_kernel(
    x, initial, cu_seqlens, final,  # final (states, dim, past) contiguous
    dim, seqlen, past, x_batch, x_dim, x_time, initial_state, initial_dim, initial_column, cu_stride,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The last `past` inputs of one sequence, from its initial state where it is shorter."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(dim * past, BLOCK)
    state = pid // blocks
    element = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    d, column = element // past, element % past
    inside = d < dim
    start = state * 0
    end = start + seqlen
    b = state
    if PACKED:
        end = _boundary(cu_seqlens, cu_stride, state + 1, seqlen, True)
        start = tl.minimum(_boundary(cu_seqlens, cu_stride, state, seqlen, True), end)
        b = start * 0
    t = end - past + column
    v = tl.load(x + b * x_batch + d * x_dim + t * x_time, mask=inside & (t >= start), other=0.0).to(tl.float32)
    if HAS_INITIAL:
        at = initial + state * initial_state + d * initial_dim + (t - start + past) * initial_column
        v = tl.where(t < start, tl.load(at, mask=inside & (t < start), other=0.0).to(tl.float32), v)
    tl.store(final + (state * dim * past + element), v.to(final.dtype.element_ty), mask=inside)


def _tile(dim: int, seqlen: int, channel_last: bool) -> dict[str, int]:
    """Sizes of a tile, long in the direction of the lanes."""
    if channel_last:
        block_d = min(triton.next_power_of_2(dim), 128)
        block_t = min(triton.next_power_of_2(seqlen), TILE // block_d)
    else:
        block_t = min(triton.next_power_of_2(seqlen), 512)
        block_d = min(triton.next_power_of_2(dim), TILE // block_t)
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": max(min(block_t * block_d // 512, 4), 1)}


def causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens):
    """Returns y like x, and the final states or an empty tensor."""
    y = torch.empty_like(x)
    batch, dim, seqlen = x.shape
    width, packed = weight.shape[1], cu_seqlens is not None
    states = cu_seqlens.shape[0] - 1 if packed else batch
    final = x.new_empty((states, dim, width - 1) if return_final_states else 0)
    cu_stride = cu_seqlens.stride(0) if packed else 0
    initial_strides = (0, 0, 0) if initial_states is None else initial_states.stride()
    given = {"HAS_INITIAL": initial_states is not None, "PACKED": packed}
    with on_device_of(x):
        if y.numel():
            tile = _tile(dim, seqlen, x.stride(1) == 1 and x.stride(2) != 1)
            grid = batch * triton.cdiv(dim, tile["BLOCK_D"]) * triton.cdiv(seqlen, tile["BLOCK_T"])
            _fwd_kernel[(grid,)](
                x, weight, x if bias is None else bias, x if seq_idx is None else seq_idx, x if initial_states is None else initial_states,
                cu_seqlens if packed else x, y,
                dim, seqlen, states, states.bit_length(),
                *x.stride(), *y.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
                *((0, 0) if seq_idx is None else seq_idx.stride()), *initial_strides, cu_stride,
                WIDTH=width, HAS_BIAS=bias is not None, HAS_SEQ_IDX=seq_idx is not None, SILU=silu, **given, **tile,
            )  # fmt: skip
        if final.numel():
            _final_kernel[(states * triton.cdiv(dim * (width - 1), FINAL_CHANNELS),)](
                x, x if initial_states is None else initial_states, cu_seqlens if packed else x, final,
                dim, seqlen, width - 1, *x.stride(), *initial_strides, cu_stride, **given, BLOCK=FINAL_CHANNELS, num_warps=4,
            )  # fmt: skip
    return y, final
