"""The projectors in Triton.

Linear: a program owns a tile of outputs, or one of SPLIT parts of its depth, in fp32; the features are read as two segments side by
side, each in its own loop. Parts are added in order by a second kernel, whose programs own rows. Pool and encoding: a program
owns one token of the output and a block of channels.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

from ...triton_utils import on_device_of

TILE = {"BLOCK_ROWS": 128, "BLOCK_COLS": 128, "BLOCK_DEPTH": 64}  # 8 warps; 16-bit products
SMALL_TILE = {"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_DEPTH": 32}  # fp32 products, and pointers that no 16 bytes share: no spill
BLOCK_CHANNELS = 256
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _gelu(x):
    """x Phi(x); Phi(-a) = exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.3 a): no cancellation in the negative tail."""
    a = tl.abs(x)
    t = 1.0 / (1.0 + 0.3 * a)
    p = 0.035932042
    p = p * t - 0.15827717
    p = p * t + 0.20820843
    p = p * t - 0.055395365
    p = p * t + 0.12946992
    p = p * t + 0.0996373
    p = p * t + 0.12079839
    p = p * t + 0.11962639
    tail = tl.exp(-0.5 * a * a) * (t * p)
    return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _add_segment(
    sums, x, x_row, x_step, weight, weight_row, weight_step, row_mask, col_mask, begin, end,
    WIDEN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """sums += x[:, begin:end] @ weight[:, begin:end]^T; x and weight point at channel 0, x_row and weight_row are offsets of rows."""
    for start in range(begin, end, BLOCK_DEPTH):
        k = start + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        inside = k < end
        a = tl.load(x + x_row[:, None] + (k * x_step)[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight + weight_row[None, :] + (k * weight_step)[:, None], mask=col_mask[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
        else:
            sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def _linear_kernel(
    x0, x1, weight, bias, y,  # x0 (rows, width0), x1 (rows, width1), weight (cols, width0 + width1), y (rows, cols) | (SPLIT, rows, cols)
    rows, cols, width0, width1, x0_row, x0_step, x1_row, x1_step, weight_row, weight_step, bias_step,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    tile = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    row = tile % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)  # neighbours share columns of the weight
    col = tile // row_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS).to(tl.int64)
    row_mask = row < rows
    col_mask = col < cols

    # The part's share of the steps of both segments.
    steps0 = tl.cdiv(width0, BLOCK_DEPTH)
    steps = steps0 + tl.cdiv(width1, BLOCK_DEPTH)
    first = steps * part // SPLIT
    last = steps * (part + 1) // SPLIT
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    sums = _add_segment(
        sums, x0, row * x0_row, x0_step, weight, col * weight_row, weight_step, row_mask, col_mask,
        tl.minimum(first, steps0) * BLOCK_DEPTH, tl.minimum(tl.minimum(last, steps0) * BLOCK_DEPTH, width0), WIDEN, BLOCK_DEPTH,
    )  # fmt: skip
    sums = _add_segment(
        sums, x1, row * x1_row, x1_step, weight + (part * 0 + width0) * weight_step,  # in 64 bits
        col * weight_row, weight_step, row_mask, col_mask,
        tl.maximum(first - steps0, 0) * BLOCK_DEPTH, tl.minimum(tl.maximum(last - steps0, 0) * BLOCK_DEPTH, width1), WIDEN, BLOCK_DEPTH,
    )  # fmt: skip

    if SPLIT == 1:
        if HAS_BIAS:
            sums += tl.load(bias + col * bias_step, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if GELU:
            sums = _gelu(sums)
    out = y + part * rows * cols + row[:, None] * cols + col[None, :]
    tl.store(out, sums.to(y.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def _parts_kernel(parts, bias, y, rows, cols, bias_step, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(the sum of parts (SPLIT, rows, cols) + bias)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = col < cols
    sums = tl.zeros([BLOCK], tl.float32)
    for part in range(SPLIT):
        sums += tl.load(parts + (part * rows + row) * cols + col, mask=mask, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + col * bias_step, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        sums = _gelu(sums)
    tl.store(y + row * cols + col, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _pool_kernel(hidden, pooled, height, width, out_height, out_width, channels, BLOCK: tl.constexpr):
    """pooled[b, i w + j] = mean of hidden (batch, height * width, channels) over bin (i, j)."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = channel < channels
    j = token % out_width
    i = token // out_width % out_height
    batch = token // out_width // out_height
    y0 = i * height // out_height
    y1 = ((i + 1) * height + out_height - 1) // out_height
    x0 = j * width // out_width
    x1 = ((j + 1) * width + out_width - 1) // out_width
    sums = tl.zeros([BLOCK], tl.float32)
    for y in range(y0, y1):
        for x in range(x0, x1):
            sums += tl.load(hidden + ((batch * height + y) * width + x) * channels + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(pooled + token * channels + channel, (sums / ((y1 - y0) * (x1 - x0)).to(tl.float32)).to(pooled.dtype.element_ty), mask=mask)


@triton.jit
def _peg_kernel(
    p, weight, bias, out, height, width, channels, weight_channel, weight_row, weight_column, bias_step,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = p + bias + depthwise 3x3 of p (batch, height * width, channels), zero padding 1."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = channel < channels
    x = token % width
    y = token // width % height
    sums = tl.load(p + token * channels + channel, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + channel * bias_step, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            if (y + i >= 1) & (y + i <= height) & (x + j >= 1) & (x + j <= width):
                near = tl.load(p + (token + (i - 1) * width + j - 1) * channels + channel, mask=mask, other=0.0).to(tl.float32)
                tap = tl.load(weight + channel * weight_channel + i * weight_row + j * weight_column, mask=mask, other=0.0)
                sums += near * tap.to(tl.float32)
    tl.store(out + token * channels + channel, sums.to(out.dtype.element_ty), mask=mask)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def linear_split(tiles: int, steps: int, multiprocessors: int) -> int:
    """Parts of the depth, so that the tiles fill the GPU: as many as keep all parts on it at once, each of 8 steps or more."""
    return max(1, min(multiprocessors // tiles, steps // 8, 16))


def _bias(bias, like) -> tuple[torch.Tensor, int]:
    return (like, 0) if bias is None else (bias, bias.stride(0))


def linear(x: list[torch.Tensor], weight, bias, gelu: bool) -> torch.Tensor:
    """act([x_1, .., x_K] @ weight.T + bias) in the dtype of x, (..., out)."""
    lead, dtype, (cols, depth) = x[0].shape[:-1], x[0].dtype, weight.shape
    rows = lead.numel()
    if len(x) > 2:
        x = [torch.cat(x, -1)]
    x0, x1 = x[0], x[-1]
    x0, x1 = (t.reshape(rows, t.shape[-1]) for t in (x0, x1))  # a copy only where leading dims do not merge
    y = x0.new_empty((rows, cols))
    if rows == 0 or cols == 0:
        return y.view(*lead, cols)
    width1 = x1.shape[1] if len(x) == 2 else 0
    widen = INTERPRETED or dtype == torch.float32 or weight.dtype != dtype
    strides = (*x0.stride(), *x1.stride(), *weight.stride())
    tile = SMALL_TILE if widen or any(n % 16 and n != 1 for n in strides) else TILE
    tiles = triton.cdiv(rows, tile["BLOCK_ROWS"]) * triton.cdiv(cols, tile["BLOCK_COLS"])
    split = linear_split(tiles, triton.cdiv(depth, tile["BLOCK_DEPTH"]), _multiprocessors(y.device))
    sums = y if split == 1 else y.new_empty((split, rows, cols), dtype=torch.float32)
    bias_tensor, bias_step = _bias(bias, y)
    with on_device_of(y):
        _linear_kernel[(tiles, split)](
            x0, x1, weight, bias_tensor, sums, rows, cols, x0.shape[1], width1, *strides, bias_step,
            SPLIT=split, HAS_BIAS=bias is not None, GELU=gelu, WIDEN=widen, **tile, num_warps=8, num_stages=3,
        )  # fmt: skip
        if split > 1:
            block = min(1024, triton.next_power_of_2(cols))
            _parts_kernel[(rows, triton.cdiv(cols, block))](
                sums, bias_tensor, y, rows, cols, bias_step, SPLIT=split, HAS_BIAS=bias is not None, GELU=gelu, BLOCK=block, num_warps=4
            )
    return y.view(*lead, cols)


def pool(hidden: torch.Tensor, grid, out_grid) -> torch.Tensor:
    """Adaptive average pool of (batch, H*W, channels), contiguous, to (batch, h*w, channels)."""
    batch, _, channels = hidden.shape
    pooled = hidden.new_empty((batch, out_grid[0] * out_grid[1], channels))
    if pooled.numel():
        blocks = (batch * out_grid[0] * out_grid[1], triton.cdiv(channels, BLOCK_CHANNELS))
        with on_device_of(hidden):
            _pool_kernel[blocks](hidden, pooled, *grid, *out_grid, channels, BLOCK=BLOCK_CHANNELS, num_warps=4)
    return pooled


def peg(p: torch.Tensor, weight, bias, grid) -> torch.Tensor:
    """p + bias + depthwise 3x3 of p (batch, h*w, channels), contiguous."""
    channels, out = p.shape[2], torch.empty_like(p)
    if p.numel():
        bias_tensor, bias_step = _bias(bias, p)
        strides = weight.stride()
        with on_device_of(p):
            _peg_kernel[(p.shape[0] * p.shape[1], triton.cdiv(channels, BLOCK_CHANNELS))](
                p, weight, bias_tensor, out, *grid, channels, strides[0], strides[2], strides[3], bias_step,
                HAS_BIAS=bias is not None, BLOCK=BLOCK_CHANNELS, num_warps=4,
            )  # fmt: skip
    return out


@torch.no_grad()
def mlp_projector_fwd(features, weights, biases):
    h = list(features)
    for i, (weight, bias) in enumerate(zip(weights, biases), 1):
        h = [linear(h, weight, bias, gelu=i < len(weights))]
    return h[0]


@torch.no_grad()
def ldp_projector_fwd(features, weights, biases, peg_weight, peg_bias, grid, out_grid):
    h = linear(list(features), weights[0], biases[0], gelu=True)
    p = linear([pool(h, grid, out_grid)], weights[1], biases[1], gelu=False)
    return peg(p, peg_weight, peg_bias, out_grid)
