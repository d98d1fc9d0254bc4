"""selective_state_update in Triton.

A program owns BLOCK_D channels of one head in one row of the batch, and walks their states BLOCK_N at a time; Mamba-1's 16 states
are one tile. A Mamba-1 tensor with groups is seen as one with that many heads, its channels split by strides alone. Not autotuned:
tuning runs would advance the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_math import softplus
from ...triton_utils import on_device_of

TILE = 1024  # states of a program's tile: 8 per thread, two 16-byte accesses in fp32
MAX_BLOCK_N = 128


@triton.jit
def _update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, indices, out,
    heads, dim, dstate, heads_per_group, pool, indices_stride,
    state_batch, state_head, state_dim, state_state, x_batch, x_head, x_dim, dt_batch, dt_head, dt_dim,
    A_head, A_dim, A_state, B_batch, B_group, B_state, C_batch, C_group, C_state, D_head, D_dim,
    z_batch, z_head, z_dim, bias_head, bias_dim, out_batch, out_head, out_dim,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_INDICES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h = exp(dt A) h + dt B x in place; out = (sum_n C h + D x) * silu(z). Strides are int64 where they need be."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(dim, BLOCK_D)
    row = pid // blocks
    batch, head = row // heads, row % heads
    channel = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)

    pool_row = batch
    live_dim, live_states = dim, dstate  # 0 for padding: nothing of it is read
    if HAS_INDICES:
        pool_row = tl.minimum(tl.load(indices + batch * indices_stride).to(tl.int64), pool - 1)  # clamped: no stray access
        live_dim = tl.where(pool_row >= 0, dim, 0)
        live_states = tl.where(pool_row >= 0, dstate, 0)
    mask = channel < live_dim
    u = tl.load(x + (batch * x_batch + head * x_head + channel * x_dim), mask=mask, other=0.0).to(tl.float32)
    step = tl.load(dt + (batch * dt_batch + head * dt_head + channel * dt_dim), mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        step += tl.load(dt_bias + (head * bias_head + channel * bias_dim), mask=mask, other=0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)

    state += pool_row * state_batch + head * state_head
    A += head * A_head
    B += batch * B_batch + head // heads_per_group * B_group
    C += batch * C_batch + head // heads_per_group * C_group
    y = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, dstate, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = n < live_states
        tile = mask[:, None] & inside[None, :]
        at = state + (channel[:, None] * state_dim + n[None, :] * state_state)
        h = tl.load(at, mask=tile, other=0.0).to(tl.float32)
        a = tl.load(A + (channel[:, None] * A_dim + n[None, :] * A_state), mask=tile, other=0.0).to(tl.float32) * 1.4426950408889634
        b = tl.load(B + n * B_state, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(C + n * C_state, mask=inside, other=0.0).to(tl.float32)
        h = tl.exp2(step[:, None] * a) * h + (step * u)[:, None] * b[None, :]
        tl.store(at, h.to(state.dtype.element_ty), mask=tile)
        y += tl.sum(h * c[None, :], 1)
    if HAS_D:
        y += tl.load(D + (head * D_head + channel * D_dim), mask=mask, other=0.0).to(tl.float32) * u
    if HAS_Z:
        gate = tl.load(z + (batch * z_batch + head * z_head + channel * z_dim), mask=mask, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(out + (batch * out_batch + head * out_head + channel * out_dim), y.to(out.dtype.element_ty), mask=channel < dim)


def _config(dim: int, dstate: int) -> dict[str, int]:
    """Tile and warps by size."""
    block_n = min(triton.next_power_of_2(dstate), MAX_BLOCK_N)
    block_d = min(triton.next_power_of_2(dim), TILE // block_n)
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": max(min(block_d * block_n // 256, 4), 1)}


def selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, indices):
    """Writes state, returns out like x."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, multi_head, dstate = x.shape[0], x.dim() == 3, state.shape[-1]
    groups = B.shape[1] if B.dim() == 3 else 1
    heads = x.shape[1] if multi_head else groups
    dim = x.shape[-1] if multi_head else x.shape[1] // groups

    def channels(t, first=0):
        """Strides over (head, channel) of t, whose channel dims start at `first`."""
        if t is None:
            return 0, 0
        return (t.stride(first), t.stride(first + 1)) if multi_head else (t.stride(first) * dim, t.stride(first))

    def rows(t):
        return (0, 0, 0) if t is None else (t.stride(0), *channels(t, 1))

    def projected(t):
        return t.stride(0), t.stride(1) if t.dim() == 3 else 0, t.stride(-1)

    config = _config(dim, dstate)
    with on_device_of(x):
        _update_kernel[(batch * heads * triton.cdiv(dim, config["BLOCK_D"]),)](
            state, x, dt, A, B, C, x if D is None else D, x if z is None else z, x if dt_bias is None else dt_bias,
            x if indices is None else indices, out,
            heads, dim, dstate, heads // groups, state.shape[0], 0 if indices is None else indices.stride(0),
            *rows(state), state.stride(-1), *rows(x), *rows(dt), *channels(A), A.stride(-1), *projected(B), *projected(C), *channels(D),
            *rows(z), *channels(dt_bias), *rows(out),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=bool(dt_softplus),
            HAS_INDICES=indices is not None, **config,
        )  # fmt: skip
    return out
