"""causal_conv1d in Triton.

A program owns a tile of time steps and channels of one batch row and reads it once per tap, all but the first time from cache. Lanes
run along whichever of the two has stride 1. Final states are copied by a second, small kernel, whose programs own channels of a sequence.

Backward: a program owns TILES tiles that follow each other in time, computes g for each of the `width` steps that reach a dx, and sums
dweight and dbias of its steps; a last kernel adds the programs' sums in a fixed tree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_utils import on_device_of

TILE = 2048  # outputs of a program: 16 per thread, two 16-byte accesses in 16 bits
FINAL_CHANNELS = 256
TILE_BWD, TILES = 1024, 8  # steps times channels of a backward tile; tiles of a program: one row of partial sums for all of them
REDUCE_COLUMNS, REDUCE_ROWS = 64, 32


@triton.jit
def _boundary(cu_seqlens, cu_stride, i, seqlen, mask):
    """Boundaries of the packed sequences, inside [0, seqlen] whatever cu_seqlens holds."""
    at = tl.load(cu_seqlens + i * cu_stride, mask=mask, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(at, 0), seqlen)


@triton.jit
def _sequence(cu_seqlens, cu_stride, num_seqs, search_steps, seqlen, b, t, PACKED: tl.constexpr):
    """(start, end, row of the states) of the sequence of every step; row -1 is padding."""
    start = t * 0
    end = start + seqlen
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
        end = _boundary(cu_seqlens, cu_stride, low + 1, seqlen, found)
        state = tl.where(found, low, -1)
    return start, end, state


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

    start, _, state = _sequence(cu_seqlens, cu_stride, num_seqs, search_steps, seqlen, b, t, PACKED)
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


@triton.jit
def _tap(
    x, seq_idx, initial, own, start, state, t, live, d, in_dim, w, x_dim, x_time, idx_time, initial_state, initial_dim, initial_column,
    WIDTH: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """(time, channels) fp32: the input that weight[:, w] sees at steps t, 0 where not `live`; x and seq_idx point at the batch row."""
    tap = t - (WIDTH - 1) + w
    counts = live & (tap >= start)
    if HAS_SEQ_IDX:
        counts &= tl.load(seq_idx + tap * idx_time, mask=counts, other=-1).to(tl.int64) == own
    v = tl.load(x + (tap[:, None] * x_time + d[None, :] * x_dim), mask=counts[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
    if HAS_INITIAL:
        before = live & (tap < start)
        at = initial + (state * initial_state + (tap - start + (WIDTH - 1)) * initial_column)[:, None] + (d * initial_dim)[None, :]
        v += tl.load(at, mask=before[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
    return v


@triton.jit
def _gradient(
    dy, x, weight, bias, seq_idx, initial, own, start, state, t, live, d, in_dim, dy_dim, dy_time, x_dim, x_time, weight_dim, weight_width,
    bias_stride, idx_time, initial_state, initial_dim, initial_column,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, HAS_INITIAL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """(time, channels) fp32: g = dL/dp at steps t of the given sequences, 0 where not `live`."""
    at = dy + (t[:, None] * dy_time + d[None, :] * dy_dim)
    g = tl.load(at, mask=live[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
    if SILU:
        p = g * 0.0
        if HAS_BIAS:
            p += tl.load(bias + d * bias_stride, mask=in_dim, other=0.0).to(tl.float32)[None, :]
        for w in range(WIDTH):
            v = _tap(x, seq_idx, initial, own, start, state, t, live, d, in_dim, w, x_dim, x_time, idx_time, initial_state, initial_dim,
                     initial_column, WIDTH, HAS_SEQ_IDX, HAS_INITIAL)  # fmt: skip
            p += tl.load(weight + d * weight_dim + w * weight_width, mask=in_dim, other=0.0).to(tl.float32)[None, :] * v
        s = 1.0 / (1.0 + tl.exp(-p))
        g = tl.where(live[:, None], g * (s * (1.0 + p * (1.0 - s))), 0.0)
    return g


@triton.jit
def _bwd_kernel(
    dy, dfinal, x, weight, bias, seq_idx, initial, cu_seqlens, dx, partial,  # partial (programs along time, WIDTH + 1, dim) fp32
    dim, seqlen, num_seqs, search_steps, time_programs,
    dy_batch, dy_dim, dy_time, dfinal_state, dfinal_dim, dfinal_column, x_batch, x_dim, x_time, dx_batch, dx_dim, dx_time,
    weight_dim, weight_width, bias_stride, idx_batch, idx_time, initial_state, initial_dim, initial_column, cu_stride,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ_IDX: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles of dx and their share of dweight and dbias; ROWS is WIDTH + 1 or the power of 2 above."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(dim, BLOCK_D)
    d = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot = pid // blocks
    b = slot // time_programs
    first = (slot % time_programs) * TILES * BLOCK_T
    in_dim = d < dim
    x += b * x_batch
    dy += b * dy_batch
    dx += b * dx_batch
    if HAS_SEQ_IDX:
        seq_idx += b * idx_batch
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)

    for tile in range(0, tl.minimum(tl.cdiv(seqlen - first, BLOCK_T), TILES)):
        t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        in_time = t < seqlen
        start, end, state = _sequence(cu_seqlens, cu_stride, num_seqs, search_steps, seqlen, b, t, PACKED)
        own = t * 0
        if HAS_SEQ_IDX:
            own = tl.load(seq_idx + t * idx_time, mask=in_time, other=-1).to(tl.int64)
            state = tl.where(own >= 0, state, -1)
        live = in_time & (state >= 0)
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        if HAS_DFINAL:
            column = t - (end - (WIDTH - 1))
            at = dfinal + (state * dfinal_state + column * dfinal_column)[:, None] + (d * dfinal_dim)[None, :]
            total += tl.load(at, mask=(live & (column >= 0))[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
        for r in range(WIDTH):
            later = live & (t + r < end)
            if HAS_SEQ_IDX:
                later &= tl.load(seq_idx + (t + r) * idx_time, mask=later, other=-1).to(tl.int64) == own
            g = _gradient(dy, x, weight, bias, seq_idx, initial, own, start, state, t + r, later, d, in_dim, dy_dim, dy_time, x_dim, x_time,
                          weight_dim, weight_width, bias_stride, idx_time, initial_state, initial_dim, initial_column,
                          WIDTH, HAS_BIAS, HAS_SEQ_IDX, HAS_INITIAL, SILU)  # fmt: skip
            total += tl.load(weight + d * weight_dim + (WIDTH - 1 - r) * weight_width, mask=in_dim, other=0.0).to(tl.float32)[None, :] * g
            if r == 0:
                for w in range(WIDTH):
                    v = _tap(x, seq_idx, initial, own, start, state, t, live, d, in_dim, w, x_dim, x_time, idx_time, initial_state,
                             initial_dim, initial_column, WIDTH, HAS_SEQ_IDX, HAS_INITIAL)  # fmt: skip
                    sums += tl.where((row == w)[:, None], tl.sum(g * v, 0)[None, :], 0.0)
                sums += tl.where((row == WIDTH)[:, None], tl.sum(g, 0)[None, :], 0.0)
        at = dx + (t[:, None] * dx_time + d[None, :] * dx_dim)
        tl.store(at, tl.where(live[:, None], total, 0.0).to(dx.dtype.element_ty), mask=in_time[:, None] & in_dim[None, :])

    at = partial + (slot * (WIDTH + 1) + row)[:, None] * dim + d[None, :]
    tl.store(at, sums, mask=(row < WIDTH + 1)[:, None] & in_dim[None, :])


@triton.jit
def _initial_kernel(
    dy, dfinal, x, weight, bias, initial, cu_seqlens, dinitial,  # dinitial (states, dim, WIDTH - 1) contiguous
    dim, seqlen,
    dy_batch, dy_dim, dy_time, dfinal_state, dfinal_dim, dfinal_column, x_batch, x_dim, x_time,
    weight_dim, weight_width, bias_stride, initial_state, initial_dim, initial_column, cu_stride,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DFINAL: tl.constexpr, PACKED: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx of the WIDTH - 1 steps before one sequence."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(dim, BLOCK_D)
    state = pid // blocks
    d = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = d < dim
    start = state * 0
    end = start + seqlen
    b = state
    if PACKED:
        end = _boundary(cu_seqlens, cu_stride, state + 1, seqlen, True)
        start = tl.minimum(_boundary(cu_seqlens, cu_stride, state, seqlen, True), end)
        b = start * 0
    x += b * x_batch
    dy += b * dy_batch
    column = tl.arange(0, BLOCK_T).to(tl.int64)
    t = start - (WIDTH - 1) + column
    live = column < WIDTH - 1
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if HAS_DFINAL:
        from_end = t - (end - (WIDTH - 1))
        at = dfinal + state * dfinal_state + (from_end * dfinal_column)[:, None] + (d * dfinal_dim)[None, :]
        total += tl.load(at, mask=(live & (from_end >= 0))[:, None] & in_dim[None, :], other=0.0).to(tl.float32)
    for r in range(WIDTH):
        later = live & (t + r >= start) & (t + r < end)
        g = _gradient(dy, x, weight, bias, x, initial, column, column * 0 + start, column * 0 + state, t + r, later, d, in_dim, dy_dim, dy_time,
                      x_dim, x_time, weight_dim, weight_width, bias_stride, 0, initial_state, initial_dim, initial_column,
                      WIDTH, HAS_BIAS, False, True, SILU)  # fmt: skip
        total += tl.load(weight + d * weight_dim + (WIDTH - 1 - r) * weight_width, mask=in_dim, other=0.0).to(tl.float32)[None, :] * g
    at = dinitial + (state * dim + d)[None, :] * (WIDTH - 1) + column[:, None]
    tl.store(at, total.to(dinitial.dtype.element_ty), mask=live[:, None] & in_dim[None, :])


@triton.jit
def _reduce_kernel(partial, dweight, dbias, rows, dim, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of partial (rows, WIDTH + 1, dim) over its rows, for COLUMNS channels of one tap, or of dbias."""
    d = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + lane
        at = partial + (row * (WIDTH + 1) + w)[:, None] * dim + d[None, :]
        total += tl.load(at, mask=(row < rows)[:, None] & (d < dim)[None, :], other=0.0)
    out = tl.sum(total, 0)
    if w < WIDTH:
        tl.store(dweight + d * WIDTH + w, out.to(dweight.dtype.element_ty), mask=d < dim)
    elif HAS_BIAS:
        tl.store(dbias + d, out.to(dbias.dtype.element_ty), mask=d < dim)


def _tile(dim: int, seqlen: int, channel_last: bool, size: int = TILE) -> dict[str, int]:
    """Sizes of a tile, long in the direction of the lanes."""
    if channel_last:
        block_d = min(triton.next_power_of_2(dim), 128)
        block_t = min(triton.next_power_of_2(seqlen), size // block_d)
    else:
        block_t = min(triton.next_power_of_2(seqlen), size // 4)
        block_d = min(triton.next_power_of_2(dim), size // block_t)
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


def causal_conv1d_bwd(dy, dfinal_states, x, weight, bias, seq_idx, initial_states, silu, cu_seqlens):
    """Returns dx like x, dweight, dbias and dinitial_states contiguous in their inputs' dtypes, or empty tensors in place of the last two."""
    dx = torch.empty_like(x)
    dweight = weight.new_empty(weight.shape)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dinitial = x.new_empty(0) if initial_states is None else initial_states.new_empty(initial_states.shape)
    batch, dim, seqlen = x.shape
    width, packed = weight.shape[1], cu_seqlens is not None
    states = cu_seqlens.shape[0] - 1 if packed else batch
    cu_stride = cu_seqlens.stride(0) if packed else 0
    bias_stride = 0 if bias is None else bias.stride(0)
    initial_strides, dfinal_strides = ((0, 0, 0) if t is None else t.stride() for t in (initial_states, dfinal_states))
    if dim == 0:
        return dx, dweight, dbias, dinitial
    flags = {"HAS_BIAS": bias is not None, "HAS_DFINAL": dfinal_states is not None, "PACKED": packed, "SILU": silu}
    optional = [x if t is None else t for t in (dfinal_states, bias, seq_idx, initial_states, cu_seqlens)]
    tile = _tile(dim, max(seqlen, 1), x.stride(1) == 1 and x.stride(2) != 1, TILE_BWD)
    time_programs = triton.cdiv(seqlen, tile["BLOCK_T"] * TILES)
    rows = batch * time_programs
    partial = x.new_empty((rows, width + 1, dim), dtype=torch.float32)
    with on_device_of(x):
        if rows:
            _bwd_kernel[(rows * triton.cdiv(dim, tile["BLOCK_D"]),)](
                dy, optional[0], x, weight, *optional[1:], dx, partial,
                dim, seqlen, states, states.bit_length(), time_programs,
                *dy.stride(), *dfinal_strides, *x.stride(), *dx.stride(), *weight.stride(), bias_stride,
                *((0, 0) if seq_idx is None else seq_idx.stride()), *initial_strides, cu_stride,
                WIDTH=width, HAS_SEQ_IDX=seq_idx is not None, HAS_INITIAL=initial_states is not None, **flags, **tile,
                ROWS=triton.next_power_of_2(width + 1), TILES=TILES,
            )  # fmt: skip
        if dinitial.numel():
            block_t = triton.next_power_of_2(width - 1)
            block_d = max(min(triton.next_power_of_2(dim), 512 // block_t), 1)
            _initial_kernel[(states * triton.cdiv(dim, block_d),)](
                dy, optional[0], x, weight, optional[1], initial_states, optional[4], dinitial,
                dim, seqlen, *dy.stride(), *dfinal_strides, *x.stride(), *weight.stride(), bias_stride, *initial_strides, cu_stride,
                WIDTH=width, **flags, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
        _reduce_kernel[(triton.cdiv(dim, REDUCE_COLUMNS), width + 1)](
            partial, dweight, dbias if bias is not None else dweight, rows, dim,
            WIDTH=width, HAS_BIAS=bias is not None, ROWS=REDUCE_ROWS, COLUMNS=REDUCE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return dx, dweight, dbias, dinitial
