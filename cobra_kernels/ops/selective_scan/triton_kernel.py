"""selective_scan in Triton: the portable kernels, a recurrence in registers.

Forward: a program owns one sequence and BLOCK_D channels that share a group of B and of C, with all their states (dstate padded to
a power of two), and walks the time steps four at a time: while four are computed, the next four are under way. A lane is a channel and
holds its states in registers, so that y needs no sum over lanes; what is per (channel, step) - softplus, skip, gate - is done on whole tiles of
four steps. The tile depends on dstate and on the channels of a group alone: bits do not depend on batch, packing or layout.

Backward: a program owns the same, and walks the chunks of CHUNK steps from the last to the first. It replays a chunk from the state that
the forward saved and leaves the state before every four steps in a scratch of its own, 1 / 4 of the chunk's states that never leaves the
L2 cache; then it walks back, four steps at a time, whose states and decays are in registers. The sums over channels (dB, dC) and over
sequences (dA, dD, ddelta_bias, constant dB, dC) are written once per program and added by a second kernel in an order that depends on
the sizes only.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...triton_math import softplus
from ...triton_utils import on_device_of

STEPS = tl.constexpr(4)
CHUNK = tl.constexpr(64)  # steps between two saved states: STATE_CHUNK of op.py
GROUPS = tl.constexpr(16)  # of STEPS in a chunk
SUM_SHARES, SUM_ELEMENTS = 8, 128  # tile of the kernel that adds shares
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def _split_steps(tile):
    """The four columns of a tile (rows, 4)."""
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _join_steps(first, second, third, fourth):
    """A tile (rows, 4) of its columns."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [first.shape[0], 4])


@triton.jit
def _bounds(cu_seqlens, cu_stride, row, seqlen, PACKED: tl.constexpr):
    """(batch row, begin, end) of a sequence. Bounds are clamped: wrong ones give wrong numbers, no stray access."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + row * cu_stride).to(tl.int64), 0), seqlen)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + (row + 1) * cu_stride).to(tl.int64), begin), seqlen)
        return row * 0, begin, end
    else:
        return row, row * 0, row * 0 + seqlen


@triton.jit
def _slot(begin, sequence, PACKED: tl.constexpr):
    """The first saved state of a sequence in its batch row: state_slot of csrc/selective_scan/selective_scan.h."""
    if PACKED:
        return begin // CHUNK + sequence
    else:
        return sequence * 0


@triton.jit
def _advance(h, A, dt, dtx, B, C):
    """One step: the state (BLOCK_N, BLOCK_D) after it and y (BLOCK_D,)."""
    h = tl.exp2(A * dt[None, :]) * h + B * dtx[None, :]
    return h, tl.sum(h * C, 0)


@triton.jit
def _load_tile(at, mask, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile (BLOCK_N, BLOCK_D) in fp32, read as one row of its elements: read as a matrix, the compiler would spread the states of
    a channel, which lie side by side, over lanes, in the loop too, where a sum over lanes in every step costs far more than this load.
    """
    return tl.reshape(tl.load(at, mask=mask, other=0.0).to(tl.float32), [BLOCK_N, BLOCK_D])


@triton.jit
def _scan_kernel(
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, out, last_state, saved,  # saved (batch, slots, dstate, dim)
    dim, seqlen, dstate, num_seqs, slots, span, channels_per_B, channels_per_C, cu_stride,
    u_batch, u_dim, u_seq, delta_batch, delta_dim, delta_seq, z_batch, z_dim, z_seq, out_batch, out_dim, out_seq,
    A_dim, A_state, B_batch, B_group, B_state, B_seq, C_batch, C_group, C_state, C_seq, D_dim, bias_dim,
    initial_row, initial_dim, initial_states,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """span: channels that share a group of B and of C. Constant B or C: B_group, C_group are the strides of a channel."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(span, BLOCK_D)  # of a span
    first = pid // blocks % (dim // span) * span
    row = pid // blocks // (dim // span)  # of the states
    begin_d = first + pid % blocks * BLOCK_D
    d, n = begin_d + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N).to(tl.int64)
    step = tl.arange(0, STEPS).to(tl.int64)
    channels, states = d < first + span, n < dstate
    element = tl.arange(0, BLOCK_N * BLOCK_D).to(tl.int64)  # of a tile (BLOCK_N, BLOCK_D), row by row
    tile_n, tile_d = element // BLOCK_D, begin_d + element % BLOCK_D
    tile = (tile_n < dstate) & (tile_d < first + span)

    batch, begin, end = _bounds(cu_seqlens, cu_stride, row, seqlen, PACKED)

    # Finite, so that a step of 0 beyond the end keeps the state: 0 * inf would not.
    a = _load_tile(A + (tile_n * A_state + tile_d * A_dim), tile, BLOCK_N, BLOCK_D) * LOG2E
    a = tl.where(a == -float("inf"), -3e38, a)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_INITIAL:
        at = row * initial_row + tile_n * initial_states + tile_d * initial_dim
        h = _load_tile(initial_state + at, tile, BLOCK_N, BLOCK_D)
    if B_CONSTANT:
        B_step = _load_tile(B + (tile_n * B_state + tile_d * B_group), tile, BLOCK_N, BLOCK_D)
    else:
        B += batch * B_batch + first // channels_per_B * B_group
        B_at = B + (n[:, None] * B_state + step[None, :] * B_seq)
        B_next = tl.load(B_at + begin * B_seq, mask=states[:, None] & (step < end - begin)[None, :], other=0.0)
    if C_CONSTANT:
        C_step = _load_tile(C + (tile_n * C_state + tile_d * C_group), tile, BLOCK_N, BLOCK_D)
    else:
        C += batch * C_batch + first // channels_per_C * C_group
        C_at = C + (n[:, None] * C_state + step[None, :] * C_seq)
        C_next = tl.load(C_at + begin * C_seq, mask=states[:, None] & (step < end - begin)[None, :], other=0.0)
    inside = channels[:, None] & (step < end - begin)[None, :]
    delta_at = delta + batch * delta_batch + (d[:, None] * delta_dim + step[None, :] * delta_seq)
    delta_next = tl.load(delta_at + begin * delta_seq, mask=inside, other=0.0)
    u_at = u + batch * u_batch + (d[:, None] * u_dim + step[None, :] * u_seq)
    u_next = tl.load(u_at + begin * u_seq, mask=inside, other=0.0)
    if HAS_Z:
        z_at = z + batch * z_batch + (d[:, None] * z_dim + step[None, :] * z_seq)
        z_next = tl.load(z_at + begin * z_seq, mask=inside, other=0.0)
    out_at = out + batch * out_batch + (d[:, None] * out_dim + step[None, :] * out_seq)
    slot = batch * slots + _slot(begin, row, PACKED)

    for t in range(begin, end, STEPS):
        if SAVE:
            if (t - begin) % CHUNK == 0:
                chunk = slot + (t - begin) // CHUNK
                tl.store(saved + ((chunk * dstate + tile_n) * dim + tile_d), tl.reshape(h, [BLOCK_N * BLOCK_D]), mask=tile)
        inside = channels[:, None] & (step < end - t)[None, :]
        dt = delta_next.to(tl.float32)
        x = u_next.to(tl.float32)
        if HAS_Z:
            gate = z_next.to(tl.float32)
        if not B_CONSTANT:
            B0, B1, B2, B3 = _split_steps(B_next.to(tl.float32))
        if not C_CONSTANT:
            C0, C1, C2, C3 = _split_steps(C_next.to(tl.float32))

        ahead = step < end - t - STEPS
        delta_next = tl.load(delta_at + (t + STEPS) * delta_seq, mask=channels[:, None] & ahead[None, :], other=0.0)
        u_next = tl.load(u_at + (t + STEPS) * u_seq, mask=channels[:, None] & ahead[None, :], other=0.0)
        if HAS_Z:
            z_next = tl.load(z_at + (t + STEPS) * z_seq, mask=channels[:, None] & ahead[None, :], other=0.0)
        if not B_CONSTANT:
            B_next = tl.load(B_at + (t + STEPS) * B_seq, mask=states[:, None] & ahead[None, :], other=0.0)
        if not C_CONSTANT:
            C_next = tl.load(C_at + (t + STEPS) * C_seq, mask=states[:, None] & ahead[None, :], other=0.0)

        if HAS_BIAS:
            dt += tl.load(delta_bias + d * bias_dim, mask=channels, other=0.0).to(tl.float32)[:, None]
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.where(inside, dt, 0.0)  # beyond the end the state stays as it is
        dt0, dt1, dt2, dt3 = _split_steps(dt)
        dtx0, dtx1, dtx2, dtx3 = _split_steps(dt * x)
        if B_CONSTANT:
            B0s, B1s, B2s, B3s = B_step, B_step, B_step, B_step
        else:
            B0s, B1s, B2s, B3s = B0[:, None], B1[:, None], B2[:, None], B3[:, None]
        if C_CONSTANT:
            C0s, C1s, C2s, C3s = C_step, C_step, C_step, C_step
        else:
            C0s, C1s, C2s, C3s = C0[:, None], C1[:, None], C2[:, None], C3[:, None]
        h, y0 = _advance(h, a, dt0, dtx0, B0s, C0s)
        h, y1 = _advance(h, a, dt1, dtx1, B1s, C1s)
        h, y2 = _advance(h, a, dt2, dtx2, B2s, C2s)
        h, y3 = _advance(h, a, dt3, dtx3, B3s, C3s)
        y = _join_steps(y0, y1, y2, y3)
        if HAS_D:
            y += tl.load(D + d * D_dim, mask=channels, other=0.0).to(tl.float32)[:, None] * x
        if HAS_Z:
            y *= gate * tl.sigmoid(gate)
        tl.store(out_at + t * out_seq, y.to(out.dtype.element_ty), mask=inside)

    tl.store(last_state + (tile_n + (row * dim + tile_d) * dstate), tl.reshape(h, [BLOCK_N * BLOCK_D]), mask=tile)
    if PACKED:  # the last sequence's program clears what lies behind it
        for t in range(tl.where(row == num_seqs - 1, end, seqlen), seqlen, STEPS):
            nothing = tl.zeros([BLOCK_D, STEPS], tl.float32).to(out.dtype.element_ty)
            tl.store(out_at + t * out_seq, nothing, mask=channels[:, None] & (step < seqlen - t)[None, :])


@triton.jit
def _unfold(row, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile (BLOCK_N, BLOCK_D) of a row of its elements, channel by channel. The compiler gives a thread four neighbours of that
    row, so four threads hold 16 states and eight channels lie side by side in a warp: no sum, over states or over channels, is long.
    """
    return tl.trans(tl.reshape(row, [BLOCK_D, BLOCK_N]))


@triton.jit
def _fold(tile, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of _unfold."""
    return tl.reshape(tl.trans(tile), [BLOCK_N * BLOCK_D])


@triton.jit
def _step_sizes(at, delta_bias, inside, channels, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    """(delta + bias, dt) of a tile (BLOCK_D, 4); dt is 0 outside, where the state stays as it is."""
    raw = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(delta_bias, mask=channels, other=0.0).to(tl.float32)[:, None]
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw)
    return raw, tl.where(inside, dt, 0.0)


@triton.jit
def _load_projection(at, constant, mask, CONSTANT: tl.constexpr):
    """Four steps of B or C, (BLOCK_N, 1) each, or (BLOCK_N, BLOCK_D) when constant."""
    if CONSTANT:
        return constant, constant, constant, constant
    else:
        first, second, third, fourth = _split_steps(tl.load(at, mask=mask, other=0.0).to(tl.float32))
        return first[:, None], second[:, None], third[:, None], fourth[:, None]


@triton.jit
def _replay_step(h, a, dt, dtx, B, C, dy, HAS_Z: tl.constexpr, C_CONSTANT: tl.constexpr):
    """One step forward: its decay, the state after it, the sum over states for y and the gradient of C, summed over the channels."""
    decay = tl.exp2(a * dt[None, :])
    h = decay * h + B * dtx[None, :]
    y = dy
    if HAS_Z:
        y = tl.sum(h * C, 0)
    dC = h * dy[None, :]
    if not C_CONSTANT:
        dC = tl.sum(dC, 1)
    return decay, h, y, dC


@triton.jit
def _reverse_step(g, dA, h, decay, a, dt, dtx, B, C, dy, B_CONSTANT: tl.constexpr):
    """One step back, h the state before it: g before it, dA with it, the sums over states for dt and dt u, the gradient of B."""
    g += C * dy[None, :]
    ddtx = tl.sum(g * B, 0)
    dB = g * dtx[None, :]
    if not B_CONSTANT:
        dB = tl.sum(dB, 1)
    g *= decay
    exponent = g * h  # the gradient of dt A
    return g, dA + exponent * dt[None, :], tl.sum(exponent * a, 0), ddtx, dB


@triton.jit
def _bwd_kernel(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, saved, cu_seqlens, du, ddelta, dz, dinitial_state,
    scratch,  # (programs, GROUPS, BLOCK_N, BLOCK_D)
    dA, dB, dC, dD, ddelta_bias,  # shares: (rows, dim, dstate), twice (batch, blocks of channels, seqlen, dstate), twice (rows, dim)
    dim, seqlen, dstate, num_seqs, slots, span, channels_per_B, channels_per_C, cu_stride,
    dout_batch, dout_dim, dout_seq, u_batch, u_dim, u_seq, delta_batch, delta_dim, delta_seq, z_batch, z_dim, z_seq,
    du_batch, du_dim, du_seq, ddelta_batch, ddelta_dim, ddelta_seq, dz_batch, dz_dim, dz_seq,
    A_dim, A_state, B_batch, B_group, B_state, B_seq, C_batch, C_group, C_state, C_seq, D_dim, bias_dim,
    dlast_row, dlast_dim, dlast_states, dinitial_row, dinitial_dim, dinitial_states,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr, PACKED: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """span, B_group, C_group as in _scan_kernel. Constant B or C: dB or dC is (rows, dim, dstate)."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(span, BLOCK_D)  # of a span
    first = pid // blocks % (dim // span) * span
    row = pid // blocks // (dim // span)  # of the states
    begin_d = first + pid % blocks * BLOCK_D
    d, n = begin_d + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N).to(tl.int64)
    step = tl.arange(0, STEPS).to(tl.int64)
    channels, states = d < first + span, n < dstate
    element = tl.arange(0, BLOCK_N * BLOCK_D)  # of a tile, channel by channel
    tile_n, tile_d = (element % BLOCK_N).to(tl.int64), begin_d + element // BLOCK_N
    scratch += pid * (GROUPS * BLOCK_N * BLOCK_D)
    tile = (tile_n < dstate) & (tile_d < first + span)
    share = (row * dim + tile_d) * dstate + tile_n

    batch, begin, end = _bounds(cu_seqlens, cu_stride, row, seqlen, PACKED)
    slot = batch * slots + _slot(begin, row, PACKED)

    # Finite, as in _scan_kernel.
    a = tl.load(A + (tile_n * A_state + tile_d * A_dim), mask=tile, other=0.0).to(tl.float32) * LOG2E
    a = _unfold(tl.where(a == -float("inf"), -3e38, a), BLOCK_N, BLOCK_D)
    g = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if HAS_LAST:
        at = dlast_state + (row * dlast_row + tile_n * dlast_states + tile_d * dlast_dim)
        g = _unfold(tl.load(at, mask=tile, other=0.0).to(tl.float32), BLOCK_N, BLOCK_D)
    dA_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    B_step, C_step = a, a
    B_at, C_at = B, C
    dB_at, dC_at = dB, dC
    block_at = (batch * (blocks * (dim // span)) + pid % (blocks * (dim // span))) * seqlen * dstate + (n[:, None] + step[None, :] * dstate)
    if B_CONSTANT:
        B_step = tl.load(B + (tile_n * B_state + tile_d * B_group), mask=tile, other=0.0).to(tl.float32)
        B_step = _unfold(B_step, BLOCK_N, BLOCK_D)
        dB_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    else:
        B_at += batch * B_batch + first // channels_per_B * B_group + (n[:, None] * B_state + step[None, :] * B_seq)
        dB_at += block_at
    if C_CONSTANT:
        C_step = tl.load(C + (tile_n * C_state + tile_d * C_group), mask=tile, other=0.0).to(tl.float32)
        C_step = _unfold(C_step, BLOCK_N, BLOCK_D)
        dC_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    else:
        C_at += batch * C_batch + first // channels_per_C * C_group + (n[:, None] * C_state + step[None, :] * C_seq)
        dC_at += block_at
    u_at = u + batch * u_batch + (d[:, None] * u_dim + step[None, :] * u_seq)
    delta_at = delta + batch * delta_batch + (d[:, None] * delta_dim + step[None, :] * delta_seq)
    dout_at = dout + batch * dout_batch + (d[:, None] * dout_dim + step[None, :] * dout_seq)
    du_at = du + batch * du_batch + (d[:, None] * du_dim + step[None, :] * du_seq)
    ddelta_at = ddelta + batch * ddelta_batch + (d[:, None] * ddelta_dim + step[None, :] * ddelta_seq)
    if HAS_Z:
        z_at = z + batch * z_batch + (d[:, None] * z_dim + step[None, :] * z_seq)
        dz_at = dz + batch * dz_batch + (d[:, None] * dz_dim + step[None, :] * dz_seq)
    dD_sum = tl.zeros([BLOCK_D, STEPS], tl.float32)
    dbias_sum = tl.zeros([BLOCK_D, STEPS], tl.float32)

    chunks = tl.cdiv(end - begin, CHUNK)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        start = begin + chunk * CHUNK
        groups = tl.cdiv(tl.minimum(end - start, CHUNK), STEPS)

        h = tl.load(saved + (((slot + chunk) * dstate + tile_n) * dim + tile_d), mask=tile, other=0.0)
        tl.store(scratch + element, h)
        h = _unfold(h, BLOCK_N, BLOCK_D)
        for group in range(1, groups):  # the steps of all groups but the last, which lie before end
            t = start + (group - 1) * STEPS
            inside = channels[:, None] & (step < end - t)[None, :]
            x = tl.load(u_at + t * u_seq, mask=inside, other=0.0).to(tl.float32)
            raw, dt = _step_sizes(delta_at + t * delta_seq, delta_bias + d * bias_dim, inside, channels, HAS_BIAS, SOFTPLUS)
            within = states[:, None] & (step < end - t)[None, :]
            B0, B1, B2, B3 = _load_projection(B_at + t * B_seq, B_step, within, B_CONSTANT)
            dt0, dt1, dt2, dt3 = _split_steps(dt)
            dtx0, dtx1, dtx2, dtx3 = _split_steps(dt * x)
            h = tl.exp2(a * dt0[None, :]) * h + B0 * dtx0[None, :]
            h = tl.exp2(a * dt1[None, :]) * h + B1 * dtx1[None, :]
            h = tl.exp2(a * dt2[None, :]) * h + B2 * dtx2[None, :]
            h = tl.exp2(a * dt3[None, :]) * h + B3 * dtx3[None, :]
            tl.store(scratch + group * (BLOCK_N * BLOCK_D) + element, _fold(h, BLOCK_N, BLOCK_D))
        tl.debug_barrier()  # between threads of the program, should they read what others wrote

        for back_group in range(0, groups):
            group = groups - 1 - back_group
            t = start + group * STEPS
            h0 = _unfold(tl.load(scratch + group * (BLOCK_N * BLOCK_D) + element), BLOCK_N, BLOCK_D)
            inside = channels[:, None] & (step < end - t)[None, :]
            x = tl.load(u_at + t * u_seq, mask=inside, other=0.0).to(tl.float32)
            raw, dt = _step_sizes(delta_at + t * delta_seq, delta_bias + d * bias_dim, inside, channels, HAS_BIAS, SOFTPLUS)
            dgated = tl.load(dout_at + t * dout_seq, mask=inside, other=0.0).to(tl.float32)
            dy = dgated
            if HAS_Z:
                gate = tl.load(z_at + t * z_seq, mask=inside, other=0.0).to(tl.float32)
                sigmoid = tl.sigmoid(gate)
                dy = dgated * (gate * sigmoid)
            within = states[:, None] & (step < end - t)[None, :]
            B0, B1, B2, B3 = _load_projection(B_at + t * B_seq, B_step, within, B_CONSTANT)
            C0, C1, C2, C3 = _load_projection(C_at + t * C_seq, C_step, within, C_CONSTANT)
            dt0, dt1, dt2, dt3 = _split_steps(dt)
            dtx0, dtx1, dtx2, dtx3 = _split_steps(dt * x)
            dy0, dy1, dy2, dy3 = _split_steps(dy)

            decay0, h1, y0, dC0 = _replay_step(h0, a, dt0, dtx0, B0, C0, dy0, HAS_Z, C_CONSTANT)
            decay1, h2, y1, dC1 = _replay_step(h1, a, dt1, dtx1, B1, C1, dy1, HAS_Z, C_CONSTANT)
            decay2, h3, y2, dC2 = _replay_step(h2, a, dt2, dtx2, B2, C2, dy2, HAS_Z, C_CONSTANT)
            decay3, h4, y3, dC3 = _replay_step(h3, a, dt3, dtx3, B3, C3, dy3, HAS_Z, C_CONSTANT)
            if C_CONSTANT:
                dC_sum += (dC0 + dC1) + (dC2 + dC3)
            else:
                tl.store(dC_at + t * dstate, _join_steps(dC0, dC1, dC2, dC3), mask=within)
            if HAS_D:
                skip = tl.load(D + d * D_dim, mask=channels, other=0.0).to(tl.float32)[:, None]
                dD_sum += dy * x
            if HAS_Z:
                y = _join_steps(y0, y1, y2, y3)
                if HAS_D:
                    y += skip * x
                dgate = dgated * y * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
                tl.store(dz_at + t * dz_seq, dgate.to(dz.dtype.element_ty), mask=inside)

            g, dA_sum, ddt3, ddtx3, dB3 = _reverse_step(g, dA_sum, h3, decay3, a, dt3, dtx3, B3, C3, dy3, B_CONSTANT)
            g, dA_sum, ddt2, ddtx2, dB2 = _reverse_step(g, dA_sum, h2, decay2, a, dt2, dtx2, B2, C2, dy2, B_CONSTANT)
            g, dA_sum, ddt1, ddtx1, dB1 = _reverse_step(g, dA_sum, h1, decay1, a, dt1, dtx1, B1, C1, dy1, B_CONSTANT)
            g, dA_sum, ddt0, ddtx0, dB0 = _reverse_step(g, dA_sum, h0, decay0, a, dt0, dtx0, B0, C0, dy0, B_CONSTANT)
            if B_CONSTANT:
                dB_sum += (dB0 + dB1) + (dB2 + dB3)
            else:
                tl.store(dB_at + t * dstate, _join_steps(dB0, dB1, dB2, dB3), mask=within)

            ddtx = _join_steps(ddtx0, ddtx1, ddtx2, ddtx3)
            dx = dt * ddtx
            if HAS_D:
                dx += skip * dy
            tl.store(du_at + t * du_seq, dx.to(du.dtype.element_ty), mask=inside)
            draw = _join_steps(ddt0, ddt1, ddt2, ddt3) * LN2 + x * ddtx  # a is A log2 e
            if SOFTPLUS:
                draw *= tl.where(raw > 20.0, 1.0, tl.sigmoid(raw))
            dbias_sum += tl.where(inside, draw, 0.0)
            tl.store(ddelta_at + t * ddelta_seq, draw.to(ddelta.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the next chunk's states take the place of these

    tl.store(dA + share, _fold(dA_sum, BLOCK_N, BLOCK_D), mask=tile)
    if B_CONSTANT:
        tl.store(dB + share, _fold(dB_sum, BLOCK_N, BLOCK_D), mask=tile)
    if C_CONSTANT:
        tl.store(dC + share, _fold(dC_sum, BLOCK_N, BLOCK_D), mask=tile)
    if HAS_D:
        tl.store(dD + row * dim + d, tl.sum(dD_sum, 1), mask=channels)
    if HAS_BIAS:
        tl.store(ddelta_bias + row * dim + d, tl.sum(dbias_sum, 1), mask=channels)
    if HAS_INITIAL:
        at = dinitial_state + (row * dinitial_row + tile_n * dinitial_states + tile_d * dinitial_dim)
        tl.store(at, _fold(g, BLOCK_N, BLOCK_D).to(dinitial_state.dtype.element_ty), mask=tile)
    if PACKED:  # the last sequence's program clears what lies behind it
        for t in range(tl.where(row == num_seqs - 1, end, seqlen), seqlen, STEPS):
            behind = channels[:, None] & (step < seqlen - t)[None, :]
            nothing = tl.zeros([BLOCK_D, STEPS], tl.float32)
            tl.store(du_at + t * du_seq, nothing.to(du.dtype.element_ty), mask=behind)
            tl.store(ddelta_at + t * ddelta_seq, nothing.to(ddelta.dtype.element_ty), mask=behind)
            if HAS_Z:
                tl.store(dz_at + t * dz_seq, nothing.to(dz.dtype.element_ty), mask=behind)


@triton.jit
def _sum_kernel(
    shares, out, cu_seqlens,  # shares (batch, groups, count, size), an element of size is (i, j)
    count, size, columns, groups, num_seqs, cu_stride, out_batch, out_group, out_row, out_column,
    PACKED: tl.constexpr, SHARES: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """out (batch, groups, i, j) = the sum over count of ELEMENTS elements: every SHARES-th in turn, then those sums in a tree.

    Packed: i is a step, and those behind the last sequence have no shares; their sum is 0.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(size, ELEMENTS)
    outer = pid // blocks  # batch and group
    element = pid % blocks * ELEMENTS + tl.arange(0, ELEMENTS).to(tl.int64)
    part = tl.arange(0, SHARES).to(tl.int64)
    there = element < size
    if PACKED:
        there = there & (element // columns < tl.load(cu_seqlens + num_seqs * cu_stride).to(tl.int64))
    total = tl.zeros([SHARES, ELEMENTS], tl.float32)
    for start in range(0, count, SHARES):
        at = shares + (outer * count + start + part)[:, None] * size + element[None, :]
        total += tl.load(at, mask=(start + part < count)[:, None] & there[None, :], other=0.0)
    at = outer // groups * out_batch + outer % groups * out_group + element // columns * out_row + element % columns * out_column
    tl.store(out + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=element < size)


def _config(span: int, dstate: int) -> dict[str, int]:
    """Tile and warps by size: 16 states per thread; up to 128 of them a warp is 32 channels, beyond that channels make room."""
    block_n = triton.next_power_of_2(dstate)
    block_d = min(triton.next_power_of_2(span), max(min(32, 4096 // block_n), 1))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": min(max(block_n // 16, 1), 8)}


def _bwd_config(span: int, dstate: int) -> dict[str, int]:
    """Four states per thread, two beyond 16 states: gradients, decays, rates and sums over time are in registers too.

    32 channels of up to 16 states: a share of dB and dC is per step, and the more channels it sums, the fewer its bytes.
    """
    block_n = triton.next_power_of_2(dstate)
    block_d = min(triton.next_power_of_2(span), max(min(32, 512 // block_n), 1))
    states_per_warp = 128 if block_n <= 16 else 64
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": min(max(block_n * block_d // states_per_warp, 1), 8)}


def _projected(m, dim):
    """(channels that share a group, strides over batch, group, state and step); of a constant, a channel is a group of its own."""
    if m.dim() == 2:
        return dim, (0, m.stride(0), m.stride(1), 0)
    groups = m.shape[1] if m.dim() == 4 else 1
    return dim // groups, (m.stride(0), m.stride(1) if m.dim() == 4 else 0, m.stride(-2), m.stride(-1))


def _strides(t, dims=3):
    return (0,) * dims if t is None else t.stride()


def selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, state_slots=None):
    """Returns out (batch, dim, seqlen) like u and last_state (batch | num_seqs, dim, dstate) fp32.

    With state_slots also the saved states (batch, state_slots, dstate, dim) fp32; slots that packed sequences leave unused are 0.
    """
    batch, dim, seqlen = u.shape
    rows, dstate = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, A.shape[1]
    out, last_state = torch.empty_like(u), u.new_empty((rows, dim, dstate), dtype=torch.float32)
    saved = None
    if state_slots is not None:
        new = u.new_empty if cu_seqlens is None else u.new_zeros
        saved = new((batch, state_slots, dstate, dim), dtype=torch.float32)
    if rows == 0 or dim == 0:
        out.zero_()
        return (out, last_state) if saved is None else (out, last_state, saved)

    channels_per_B, B_strides = _projected(B, dim)
    channels_per_C, C_strides = _projected(C, dim)
    span = math.gcd(channels_per_B, channels_per_C)
    config = _config(span, dstate)
    with on_device_of(u):
        _scan_kernel[(rows * (dim // span) * triton.cdiv(span, config["BLOCK_D"]),)](
            u, delta, A, B, C, u if D is None else D, u if z is None else z, u if delta_bias is None else delta_bias,
            u if initial_state is None else initial_state, u if cu_seqlens is None else cu_seqlens, out, last_state,
            last_state if saved is None else saved,
            dim, seqlen, dstate, rows, state_slots or 0, span, channels_per_B, channels_per_C, *_strides(cu_seqlens, 1),
            *u.stride(), *delta.stride(), *_strides(z), *out.stride(), *A.stride(), *B_strides, *C_strides,
            *_strides(D, 1), *_strides(delta_bias, 1), *_strides(initial_state),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=bool(delta_softplus),
            HAS_INITIAL=initial_state is not None, PACKED=cu_seqlens is not None, B_CONSTANT=B.dim() == 2, C_CONSTANT=C.dim() == 2,
            SAVE=saved is not None, **config,
        )  # fmt: skip
    return (out, last_state) if saved is None else (out, last_state, saved)


def selective_scan_bwd(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, states):
    """Gradients of (u, delta, A, B, C, D, z, delta_bias, initial_state), each like its input; empty for what is absent.

    dout like u in shape and dtype, or None; dlast_state (batch | num_seqs, dim, dstate) or None: zeros. states: what the forward saved.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = tuple(u.new_empty(0) if t is None else torch.empty_like(t) for t in inputs)
    du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state = grads
    batch, dim, seqlen = u.shape
    rows, dstate = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, A.shape[1]
    if rows == 0 or dim == 0:
        return tuple(gradient.zero_() for gradient in grads)
    if dout is None:
        dout = u.new_zeros(()).expand(u.shape)

    channels_per_B, B_strides = _projected(B, dim)
    channels_per_C, C_strides = _projected(C, dim)
    span = math.gcd(channels_per_B, channels_per_C)
    config = _bwd_config(span, dstate)
    blocks = dim // span * triton.cdiv(span, config["BLOCK_D"])

    def new(*shape):
        return u.new_empty(shape, dtype=torch.float32)

    def shares_of(m):
        return new(rows, dim, dstate) if m.dim() == 2 else new(batch, blocks, seqlen, dstate)

    scratch = new(rows * blocks, GROUPS.value, config["BLOCK_N"] * config["BLOCK_D"])
    dA_shares, dB_shares, dC_shares = new(rows, dim, dstate), shares_of(B), shares_of(C)
    dD_shares, dbias_shares = new(rows, dim), new(rows, dim)
    cu_stride = _strides(cu_seqlens, 1)
    with on_device_of(u):
        _bwd_kernel[(rows * blocks,)](
            dout, u if dlast_state is None else dlast_state, u, delta, A, B, C, u if D is None else D, u if z is None else z,
            u if delta_bias is None else delta_bias, states, u if cu_seqlens is None else cu_seqlens,
            du, ddelta, du if z is None else dz, du if initial_state is None else dinitial_state,
            scratch, dA_shares, dB_shares, dC_shares, dD_shares, dbias_shares,
            dim, seqlen, dstate, rows, states.shape[1], span, channels_per_B, channels_per_C, *cu_stride,
            *dout.stride(), *u.stride(), *delta.stride(), *_strides(z),
            *du.stride(), *ddelta.stride(), *_strides(None if z is None else dz),
            *A.stride(), *B_strides, *C_strides, *_strides(D, 1), *_strides(delta_bias, 1), *_strides(dlast_state),
            *_strides(None if initial_state is None else dinitial_state),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=bool(delta_softplus),
            HAS_INITIAL=initial_state is not None, HAS_LAST=dlast_state is not None, PACKED=cu_seqlens is not None,
            B_CONSTANT=B.dim() == 2, C_CONSTANT=C.dim() == 2, **config,
        )  # fmt: skip

        def add(shares, out, outer, count, columns, strides, packed=False):
            size = math.prod(shares.shape) // (outer[0] * outer[1] * count)
            if out.numel() == 0:
                return
            _sum_kernel[(outer[0] * outer[1] * triton.cdiv(size, SUM_ELEMENTS),)](
                shares, out, cu_seqlens if packed else shares, count, size, columns, outer[1], rows, cu_stride[0], *strides,
                PACKED=packed, SHARES=SUM_SHARES, ELEMENTS=SUM_ELEMENTS, num_warps=4,
            )  # fmt: skip

        add(dA_shares, dA, (1, 1), rows, dstate, (0, 0, *dA.stride()))
        for m, shares, out in ((B, dB_shares, dB), (C, dC_shares, dC)):
            if m.dim() == 2:
                add(shares, out, (1, 1), rows, dstate, (0, 0, *out.stride()))
            else:
                groups, (of_batch, of_group, of_state, of_step) = dim // _projected(out, dim)[0], _projected(out, dim)[1]
                add(shares, out, (batch, groups), blocks // groups, dstate, (of_batch, of_group, of_step, of_state), cu_seqlens is not None)
        if D is not None:
            add(dD_shares, dD, (1, 1), rows, 1, (0, 0, dD.stride(0), 0))
        if delta_bias is not None:
            add(dbias_shares, ddelta_bias, (1, 1), rows, 1, (0, 0, ddelta_bias.stride(0), 0))
    return grads
