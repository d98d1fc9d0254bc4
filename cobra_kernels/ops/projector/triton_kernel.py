"""The projectors in Triton.

Linear: a program owns a tile of outputs, or one of SPLIT parts of its depth, in fp32; the features are read as two segments side by
side, each in its own loop. Parts are added in order by a second kernel, whose programs own rows. Pool and encoding: a program
owns one token of the output and a block of channels. Backward: a program owns a block of rows and a block of channels, and adds its
rows' share of the biases' gradients in order; a second kernel adds the blocks of rows in a fixed tree.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

from ...triton_utils import on_device_of
from . import products
from .products import as_dtype

TILE = {"BLOCK_ROWS": 128, "BLOCK_COLS": 128, "BLOCK_DEPTH": 64}  # 8 warps; 16-bit products
SMALL_TILE = {"BLOCK_ROWS": 64, "BLOCK_COLS": 64, "BLOCK_DEPTH": 32}  # fp32 products, and pointers that no 16 bytes share: no spill
BLOCK_CHANNELS, SUM_COLUMNS = 256, 64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _normal(x):
    """Phi(x), exp(-x^2 / 2); Phi(-a) = exp(-a^2 / 2) t P(t) with t = 1 / (1 + 0.3 a): no cancellation in the negative tail."""
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
    bell = tl.exp(-0.5 * a * a)
    tail = bell * (t * p)
    return tl.where(x < 0, tail, 1.0 - tail), bell


@triton.jit
def _gelu(x):
    phi, _ = _normal(x)
    return x * phi


@triton.jit
def _gelu_slope(x):
    """Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)."""
    phi, bell = _normal(x)
    return phi + x * bell * 0.398942280


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


@triton.jit
def _gelu_bwd_kernel(
    d, sums, bias, dz, partial,  # d (rows, cols), or (batch, out_height * out_width, cols); sums, dz (rows, cols); partial (blocks, cols)
    rows, cols, rows_per_block, d_row, d_step, bias_step, height, width, out_height, out_width,
    HAS_SUMS: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_DZ: tl.constexpr, STORE_SUM: tl.constexpr, POOL: tl.constexpr,
    WIDE_GRID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = gelu'(sums + bias) d, and its sum over a block of rows. With a pool d comes from every bin that holds the position."""
    block = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = col < cols
    b = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + col * bias_step, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = block * rows_per_block
    for i in range(0, tl.minimum(rows - first, rows_per_block)):
        row = first + i
        if POOL:
            batch = row // (height * width)
            position = row % (height * width)
            if not WIDE_GRID:
                position = position.to(tl.int32)
            x = position % width
            y = position // width
            v = tl.zeros([BLOCK], tl.float32)
            for bin_y in range(y * out_height // height, ((y + 1) * out_height + height - 1) // height):
                high = ((bin_y + 1) * height + out_height - 1) // out_height - bin_y * height // out_height
                for bin_x in range(x * out_width // width, ((x + 1) * out_width + width - 1) // width):
                    wide = ((bin_x + 1) * width + out_width - 1) // out_width - bin_x * width // out_width
                    of_bin = tl.load(d + ((batch * out_height + bin_y) * out_width + bin_x) * cols + col, mask=mask, other=0.0).to(tl.float32)
                    v += of_bin / (high * wide).to(tl.float32)
        else:
            v = tl.load(d + row * d_row + col * d_step, mask=mask, other=0.0).to(tl.float32)
        if HAS_SUMS:
            v *= _gelu_slope(tl.load(sums + row * cols + col, mask=mask, other=0.0) + b)
        total += v
        if STORE_DZ:
            tl.store(dz + row * cols + col, v.to(dz.dtype.element_ty), mask=mask)
    if STORE_SUM:
        tl.store(partial + block * cols + col, total, mask=mask)


@triton.jit
def _peg_bwd_kernel(
    dy, weight, dp, partial,  # dy, dp (batch, height * width, channels), partial (2, blocks, channels): of dy, of dp
    units, units_per_block, height, width, channels, dy_batch, dy_token, dy_channel, weight_channel, weight_row, weight_column,
    STORE_DP: tl.constexpr, STORE_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dp = dy + depthwise 3x3 of dy with the filter turned round; a unit is a row of a grid."""
    block = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = channel < channels
    of_dy = tl.zeros([BLOCK], tl.float32)
    of_dp = tl.zeros([BLOCK], tl.float32)
    first = block * units_per_block
    for unit in range(first, tl.minimum(first + units_per_block, units)):
        y = unit % height
        image = dy + unit // height * dy_batch + channel * dy_channel
        for x in range(0, width):
            centre = tl.load(image + (y * width + x) * dy_token, mask=mask, other=0.0).to(tl.float32)
            v = centre
            for i in tl.static_range(3):
                for j in tl.static_range(3):
                    if (y + 1 >= i) & (y + 1 - i < height) & (x + 1 >= j) & (x + 1 - j < width):
                        near = tl.load(image + ((y + 1 - i) * width + x + 1 - j) * dy_token, mask=mask, other=0.0).to(tl.float32)
                        tap = tl.load(weight + channel * weight_channel + i * weight_row + j * weight_column, mask=mask, other=0.0)
                        v += near * tap.to(tl.float32)
            of_dy += centre
            of_dp += v
            if STORE_DP:
                tl.store(dp + (unit * width + x) * channels + channel, v.to(dp.dtype.element_ty), mask=mask)
    if STORE_SUMS:
        tl.store(partial + block * channels + channel, of_dy, mask=mask)
        tl.store(partial + (tl.num_programs(0).to(tl.int64) + block) * channels + channel, of_dp, mask=mask)


@triton.jit
def _taps_kernel(
    dy, sums, p_bias, partial,  # sums as dy (batch, height * width, channels), partial (9, blocks, channels)
    units, units_per_block, height, width, channels, dy_batch, dy_token, dy_channel, p_bias_step, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tap of the filter: the sum over a block of units of dy times the p under the tap."""
    block = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    tap = tl.program_id(2).to(tl.int64)
    mask = channel < channels
    b = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        b = tl.load(p_bias + channel * p_bias_step, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    first = block * units_per_block
    for unit in range(first, tl.minimum(first + units_per_block, units)):
        y = unit % height + 1 - tap // 3  # of dy
        if (y >= 0) & (y < height):
            for x in range(tl.maximum(tap % 3 - 1, 0), tl.minimum(width + tap % 3 - 1, width)):  # of p
                p = tl.load(sums + (unit * width + x) * channels + channel, mask=mask, other=0.0) + b
                token = y * width + x + 1 - tap % 3
                total += p * tl.load(dy + unit // height * dy_batch + token * dy_token + channel * dy_channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + (tap * tl.num_programs(0).to(tl.int64) + block) * channels + channel, total, mask=mask)


@triton.jit
def _column_sums_kernel(partial, out, blocks, channels, out_step, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[i + channel * out_step] = the sum over the blocks of partial (i, blocks, channels); a program owns COLUMNS channels."""
    i = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.arange(0, BLOCKS).to(tl.int64)
    mask = (block[:, None] < blocks) & (channel[None, :] < channels)
    tile = tl.load(partial + (i * blocks + block[:, None]) * channels + channel[None, :], mask=mask, other=0.0)
    tl.store(out + i + channel * out_step, tl.sum(tile, 0).to(out.dtype.element_ty), mask=channel < channels)


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


# --- for backward.py: the library's products, the passes above ---------------------------------------------------------------

product_dtype, inputs, sums, times = products.product_dtype, products.inputs, products.sums, products.times


def gelu(sums: torch.Tensor, bias, dtype: torch.dtype, operand: torch.dtype) -> torch.Tensor:
    (rows, cols), h = sums.shape, sums.new_empty(sums.shape, dtype=dtype)
    if h.numel():
        bias_tensor, bias_step = _bias(bias, sums)
        block = min(1024, triton.next_power_of_2(cols))
        with on_device_of(sums):
            _parts_kernel[(rows, triton.cdiv(cols, block))](
                sums, bias_tensor, h, rows, cols, bias_step, SPLIT=1, HAS_BIAS=bias is not None, GELU=True, BLOCK=block, num_warps=4
            )
    return as_dtype(h, operand)


def gelu_pool(sums: torch.Tensor, bias, height, width, out_height, out_width, dtype: torch.dtype, operand: torch.dtype) -> torch.Tensor:
    hidden = gelu(sums.flatten(0, 1), bias, dtype, dtype).view(sums.shape)
    return as_dtype(pool(hidden, (height, width), (out_height, out_width)), operand)


def _sum_blocks(rows: int, rows_per_block: int) -> int:
    """As in csrc/projector/projector.h: a function of the problem."""
    return min(max(triton.cdiv(rows, rows_per_block), 1), 128)


def _column_sums(partial: torch.Tensor, out: torch.Tensor, step: int = 1) -> None:
    """out[i + channel * step] = the sum over the blocks of partial (sums, blocks, channels)."""
    count, blocks, channels = partial.shape
    _column_sums_kernel[(triton.cdiv(channels, SUM_COLUMNS), count)](
        partial, out, blocks, channels, step, BLOCKS=triton.next_power_of_2(blocks), COLUMNS=SUM_COLUMNS, num_warps=4
    )


def _result(like: torch.Tensor, dtype: torch.dtype | None, shape) -> torch.Tensor:
    return like.new_empty(0) if dtype is None else like.new_empty(shape, dtype=dtype)


def _gelu_bwd(d, d_strides, sums, bias, rows, grids, dz_dtype, dbias_dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cols, blocks = d.shape[-1], _sum_blocks(rows, 16)
    dz, dbias = _result(d, dz_dtype, (rows, cols)), _result(d, dbias_dtype, (cols,))
    if cols == 0:
        return dz, dbias
    partial = d.new_empty((1, blocks, cols) if dbias_dtype else 0, dtype=torch.float32)
    bias_tensor, bias_step = _bias(bias, d)
    wide = grids is not None and max(grids[0], grids[1]) * (max(grids) + 1) >= 2**31  # whether bins need 64 bits
    with on_device_of(d):
        _gelu_bwd_kernel[(blocks, triton.cdiv(cols, BLOCK_CHANNELS))](
            d, d if sums is None else sums, bias_tensor, dz, partial, rows, cols, triton.cdiv(rows, blocks), *d_strides, bias_step,
            *(grids or (1, 1, 1, 1)), HAS_SUMS=sums is not None, HAS_BIAS=bias is not None, STORE_DZ=dz_dtype is not None,
            STORE_SUM=dbias_dtype is not None, POOL=grids is not None, WIDE_GRID=wide, BLOCK=BLOCK_CHANNELS, num_warps=4,
        )  # fmt: skip
        if dbias_dtype:
            _column_sums(partial, dbias)
    return dz, dbias


def gelu_bwd(d, sums, bias, dz_dtype, dbias_dtype):
    rows = d.shape[:-1].numel()
    d = d.reshape(rows, d.shape[-1])  # a copy only where leading dims do not merge
    return _gelu_bwd(d, d.stride(), sums, bias, rows, None, dz_dtype, dbias_dtype)


def gelu_pool_bwd(dpooled, sums, bias, height, width, out_height, out_width, dz_dtype, dbias_dtype):
    rows, grids = dpooled.shape[0] * height * width, (height, width, out_height, out_width)
    return _gelu_bwd(dpooled, (0, 0), sums, bias, rows, grids, dz_dtype, dbias_dtype)


def peg_bwd(dy, sums, p_bias, weight, height, width, dp_dtype, dweight_dtype, dbias_dtype, dp_bias_dtype):
    batch, _, channels = dy.shape
    units = batch * height
    blocks = _sum_blocks(units, 1)
    dp, dweight = _result(dy, dp_dtype, dy.shape), _result(dy, dweight_dtype, weight.shape)
    dbias, dp_bias = _result(dy, dbias_dtype, (channels,)), _result(dy, dp_bias_dtype, (channels,))
    if channels == 0:
        return dp, dweight, dbias, dp_bias
    shape = (units, triton.cdiv(units, blocks), height, width, channels, *dy.stride())
    tiles, want_sums = triton.cdiv(channels, BLOCK_CHANNELS), dbias_dtype is not None or dp_bias_dtype is not None
    with on_device_of(dy):
        if want_sums or dp_dtype is not None:
            partial = dy.new_empty((2, blocks, channels) if want_sums else 0, dtype=torch.float32)
            strides = weight.stride()
            _peg_bwd_kernel[(blocks, tiles)](
                dy, weight, dp, partial, *shape, strides[0], strides[2], strides[3], STORE_DP=dp_dtype is not None, STORE_SUMS=want_sums,
                BLOCK=BLOCK_CHANNELS, num_warps=4,
            )  # fmt: skip
            for i, (out, dtype) in enumerate(((dbias, dbias_dtype), (dp_bias, dp_bias_dtype))):
                if dtype is not None:
                    _column_sums(partial[i : i + 1], out)
        if dweight_dtype is not None:
            partial = dy.new_empty((9, blocks, channels), dtype=torch.float32)
            bias_tensor, bias_step = _bias(p_bias, dy)
            _taps_kernel[(blocks, tiles, 9)](
                dy, sums, bias_tensor, partial, *shape, bias_step, HAS_BIAS=p_bias is not None, BLOCK=BLOCK_CHANNELS, num_warps=4
            )
            _column_sums(partial, dweight, 9)
    return dp, dweight, dbias, dp_bias
