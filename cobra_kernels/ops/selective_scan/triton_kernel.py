"""selective_scan in Triton: the portable kernel, a recurrence in registers.

A program owns one sequence and BLOCK_D channels that share a group of B and of C, with all their states (dstate padded to a power of
two), and walks the time steps four at a time: while four are computed, the next four are under way. A lane is a channel and holds its
states in registers, so that y needs no sum over lanes; what is per (channel, step) - softplus, skip, gate - is done on whole tiles of
four steps. The tile depends on dstate and on the channels of a group alone: bits do not depend on batch, packing or layout.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...triton_math import softplus
from ...triton_utils import on_device_of

STEPS = tl.constexpr(4)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _split_steps(tile):
    """The four columns of a tile (rows, 4)."""
    even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


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
    u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, out, last_state,
    dim, seqlen, dstate, num_seqs, span, channels_per_B, channels_per_C, cu_stride,
    u_batch, u_dim, u_seq, delta_batch, delta_dim, delta_seq, z_batch, z_dim, z_seq, out_batch, out_dim, out_seq,
    A_dim, A_state, B_batch, B_group, B_state, B_seq, C_batch, C_group, C_state, C_seq, D_dim, bias_dim,
    initial_row, initial_dim, initial_states,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr, B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
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

    batch, begin, end = row, row * 0, row * 0 + seqlen
    if PACKED:  # bounds are clamped: wrong ones give wrong numbers, no stray access
        batch = row * 0
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + row * cu_stride).to(tl.int64), 0), seqlen)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + (row + 1) * cu_stride).to(tl.int64), begin), seqlen)

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

    for t in range(begin, end, STEPS):
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
        y = tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), [BLOCK_D, STEPS])
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


def _config(span: int, dstate: int) -> dict[str, int]:
    """Tile and warps by size: 16 states per thread; up to 128 of them a warp is 32 channels, beyond that channels make room."""
    block_n = triton.next_power_of_2(dstate)
    block_d = min(triton.next_power_of_2(span), max(min(32, 4096 // block_n), 1))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": min(max(block_n // 16, 1), 8)}


def selective_scan_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens):
    """Returns out (batch, dim, seqlen) like u and last_state (batch | num_seqs, dim, dstate) fp32."""
    batch, dim, seqlen = u.shape
    rows, dstate = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1, A.shape[1]
    out, last_state = torch.empty_like(u), u.new_empty((rows, dim, dstate), dtype=torch.float32)
    if rows == 0 or dim == 0:
        return out.zero_(), last_state

    def projected(m):
        """(channels that share a group, strides over batch, group, state and step); of a constant, a channel is a group of its own."""
        if m.dim() == 2:
            return dim, (0, m.stride(0), m.stride(1), 0)
        groups = m.shape[1] if m.dim() == 4 else 1
        return dim // groups, (m.stride(0), m.stride(1) if m.dim() == 4 else 0, m.stride(-2), m.stride(-1))

    def strides(t):
        return (0, 0, 0) if t is None else t.stride()

    channels_per_B, B_strides = projected(B)
    channels_per_C, C_strides = projected(C)
    span = math.gcd(channels_per_B, channels_per_C)
    config = _config(span, dstate)
    with on_device_of(u):
        _scan_kernel[(rows * (dim // span) * triton.cdiv(span, config["BLOCK_D"]),)](
            u, delta, A, B, C, u if D is None else D, u if z is None else z, u if delta_bias is None else delta_bias,
            u if initial_state is None else initial_state, u if cu_seqlens is None else cu_seqlens, out, last_state,
            dim, seqlen, dstate, rows, span, channels_per_B, channels_per_C, 0 if cu_seqlens is None else cu_seqlens.stride(0),
            *u.stride(), *delta.stride(), *strides(z), *out.stride(), *A.stride(), *B_strides, *C_strides,
            0 if D is None else D.stride(0), 0 if delta_bias is None else delta_bias.stride(0), *strides(initial_state),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=bool(delta_softplus),
            HAS_INITIAL=initial_state is not None, PACKED=cu_seqlens is not None, B_CONSTANT=B.dim() == 2, C_CONSTANT=C.dim() == 2, **config,
        )  # fmt: skip
    return out, last_state
