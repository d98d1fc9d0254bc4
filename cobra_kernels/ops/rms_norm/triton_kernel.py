"""rms_norm in Triton.

Forward: a program owns a row. Backward: a program owns a block of rows and adds their weight gradients in order; a second
kernel, whose programs own columns, adds the blocks in a fixed tree. A row of up to MAX_BLOCK_FWD or MAX_BLOCK_BWD channels
stays in registers; a longer one is read once per pass, that many channels at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...triton_utils import merge_rows, on_device_of

MAX_BLOCK_FWD, MAX_BLOCK_BWD = 8192, 4096  # 32 and 16 channels per thread: the most that no GPU spills
REDUCE_COLUMNS = 64


@triton.jit
def _row_offset(row, sizes, strides, NDIM: tl.constexpr):
    """Offset of a row's first channel, row-major over NDIM leading dims; int64, as `row` is."""
    offset = row * 0
    for i in tl.static_range(NDIM - 1, 0, -1):
        offset += (row % sizes[i]) * strides[i]
        row = row // sizes[i]
    return offset + row * strides[0]


@triton.jit
def _load_sum(x, x_stride, residual, residual_stride, cols, mask, HAS_RESIDUAL: tl.constexpr):
    """x + residual of some channels of a row in fp32, 0 outside the mask; the pointers are at channel 0."""
    s = tl.load(x + cols * x_stride, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        s += tl.load(residual + cols * residual_stride, mask=mask, other=0.0).to(tl.float32)
    return s


@triton.jit
def _statistics(x, x_stride, residual, residual_stride, dim, eps, HAS_RESIDUAL: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, 1 / deviation) of a row that does not fit one block; mean 0 for RMSNorm. Two passes, for precision."""
    columns = tl.arange(0, BLOCK).to(tl.int64)
    mean = 0.0
    if not RMS:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + columns
            total += _load_sum(x, x_stride, residual, residual_stride, cols, cols < dim, HAS_RESIDUAL)
        mean = tl.sum(total, 0) / dim
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        cols = start + columns
        s = _load_sum(x, x_stride, residual, residual_stride, cols, cols < dim, HAS_RESIDUAL)
        centred = tl.where(cols < dim, s - mean, 0.0)
        square += centred * centred
    return mean, tl.rsqrt(tl.sum(square, 0) / dim + eps)


@triton.jit
def _statistics_in_registers(s, mask, dim, eps, RMS: tl.constexpr):
    """The same for a row held whole in `s`."""
    mean = 0.0
    if not RMS:
        mean = tl.sum(s, 0) / dim
    centred = tl.where(mask, s - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)


@triton.jit
def _fwd_kernel(
    x, residual, weight, bias, y, s_out,  # (rows, dim) or (dim,)
    rows, dim, eps, weight_stride, bias_stride, sizes,
    x_rows, x_stride, residual_rows, residual_stride, y_rows, y_stride, s_rows, s_stride,
    NDIM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, STORE_S: tl.constexpr, RMS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: s = x + residual, y = normalised s * weight + bias."""
    row = tl.program_id(0).to(tl.int64)
    x += _row_offset(row, sizes, x_rows, NDIM)
    y += _row_offset(row, sizes, y_rows, NDIM)
    if HAS_RESIDUAL:
        residual += _row_offset(row, sizes, residual_rows, NDIM)
    if STORE_S:
        s_out += _row_offset(row, sizes, s_rows, NDIM)

    columns = tl.arange(0, BLOCK).to(tl.int64)
    if ONE_BLOCK:
        held = _load_sum(x, x_stride, residual, residual_stride, columns, columns < dim, HAS_RESIDUAL)
        mean, rstd = _statistics_in_registers(held, columns < dim, dim, eps, RMS)
    else:
        mean, rstd = _statistics(x, x_stride, residual, residual_stride, dim, eps, HAS_RESIDUAL, RMS, BLOCK)
    for start in range(0, dim, BLOCK):
        cols = start + columns
        mask = cols < dim
        if ONE_BLOCK:
            s = held
        else:
            s = _load_sum(x, x_stride, residual, residual_stride, cols, mask, HAS_RESIDUAL)
        if STORE_S:
            tl.store(s_out + cols * s_stride, s.to(s_out.dtype.element_ty), mask=mask)
        out = (s - mean) * rstd * tl.load(weight + cols * weight_stride, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            out += tl.load(bias + cols * bias_stride, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + cols * y_stride, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_kernel(
    x, residual, weight, dy, ds, dx, dresidual, partial,  # partial (2 | 1, row_blocks, dim) fp32
    rows, dim, eps, rows_per_block, weight_stride, sizes,
    x_rows, x_stride, residual_rows, residual_stride, dy_rows, dy_stride, ds_rows, ds_stride, dx_rows, dx_stride,
    dresidual_rows, dresidual_stride,
    NDIM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DS: tl.constexpr, RMS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows: dx, dresidual, and this block's share of dweight and dbias. The formula is in the room's README."""
    block = tl.program_id(0).to(tl.int64)
    dweight = partial + block * dim
    dbias = dweight + tl.num_programs(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK).to(tl.int64)
    dweight_sum = tl.zeros([BLOCK], tl.float32)
    dbias_sum = tl.zeros([BLOCK], tl.float32)
    if not ONE_BLOCK:
        for start in range(0, dim, BLOCK):
            cols = start + columns
            tl.store(dweight + cols, dweight_sum, mask=cols < dim)
            if HAS_BIAS:
                tl.store(dbias + cols, dbias_sum, mask=cols < dim)

    first = block * rows_per_block
    for i in range(0, tl.minimum(rows - first, rows_per_block)):
        row = first + i
        x_row = x + _row_offset(row, sizes, x_rows, NDIM)
        dy_row = dy + _row_offset(row, sizes, dy_rows, NDIM)
        dx_row = dx + _row_offset(row, sizes, dx_rows, NDIM)
        residual_row = residual
        if HAS_RESIDUAL:
            residual_row += _row_offset(row, sizes, residual_rows, NDIM)
            dresidual_row = dresidual + _row_offset(row, sizes, dresidual_rows, NDIM)
        if HAS_DS:
            ds_row = ds + _row_offset(row, sizes, ds_rows, NDIM)

        if ONE_BLOCK:
            held = _load_sum(x_row, x_stride, residual_row, residual_stride, columns, columns < dim, HAS_RESIDUAL)
            mean, rstd = _statistics_in_registers(held, columns < dim, dim, eps, RMS)
        else:
            mean, rstd = _statistics(x_row, x_stride, residual_row, residual_stride, dim, eps, HAS_RESIDUAL, RMS, BLOCK)

        gn_sum = tl.zeros([BLOCK], tl.float32)
        g_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, dim, BLOCK):
            cols = start + columns
            mask = cols < dim
            if ONE_BLOCK:
                s = held
            else:
                s = _load_sum(x_row, x_stride, residual_row, residual_stride, cols, mask, HAS_RESIDUAL)
            n = (s - mean) * rstd
            d = tl.load(dy_row + cols * dy_stride, mask=mask, other=0.0).to(tl.float32)
            g = d * tl.load(weight + cols * weight_stride, mask=mask, other=0.0).to(tl.float32)
            gn_sum += g * n
            g_sum += g
            if ONE_BLOCK:
                dweight_sum += d * n
                dbias_sum += d
            else:  # each thread adds to channels of its own
                tl.store(dweight + cols, tl.load(dweight + cols, mask=mask, other=0.0) + d * n, mask=mask)
                if HAS_BIAS:
                    tl.store(dbias + cols, tl.load(dbias + cols, mask=mask, other=0.0) + d, mask=mask)
        mean_gn = tl.sum(gn_sum, 0) / dim
        mean_g = 0.0
        if not RMS:
            mean_g = tl.sum(g_sum, 0) / dim

        for start in range(0, dim, BLOCK):
            cols = start + columns
            mask = cols < dim
            if ONE_BLOCK:
                s = held
            else:
                s = _load_sum(x_row, x_stride, residual_row, residual_stride, cols, mask, HAS_RESIDUAL)
            n = (s - mean) * rstd
            d = tl.load(dy_row + cols * dy_stride, mask=mask, other=0.0).to(tl.float32)
            g = d * tl.load(weight + cols * weight_stride, mask=mask, other=0.0).to(tl.float32)
            d_sum = rstd * (g - mean_g - n * mean_gn)
            if HAS_DS:
                d_sum += tl.load(ds_row + cols * ds_stride, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_row + cols * dx_stride, d_sum.to(dx.dtype.element_ty), mask=mask)
            if HAS_RESIDUAL:
                tl.store(dresidual_row + cols * dresidual_stride, d_sum.to(dresidual.dtype.element_ty), mask=mask)

    if ONE_BLOCK:
        tl.store(dweight + columns, dweight_sum, mask=columns < dim)
        if HAS_BIAS:
            tl.store(dbias + columns, dbias_sum, mask=columns < dim)


@triton.jit
def _reduce_kernel(partial, out, row_blocks, dim, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr):
    """out (dim,) = sum of partial (row_blocks, dim) over its rows, COLUMNS channels per program."""
    cols = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    blocks = tl.arange(0, BLOCKS).to(tl.int64)
    mask = (blocks[:, None] < row_blocks) & (cols[None, :] < dim)
    tile = tl.load(partial + blocks[:, None] * dim + cols[None, :], mask=mask, other=0.0)
    tl.store(out + cols, tl.sum(tile, 0).to(out.dtype.element_ty), mask=cols < dim)


def _block(dim: int, most: int) -> dict[str, int | bool]:
    """Block size and warps by width: 16 channels per thread until there are 8 warps."""
    block = min(triton.next_power_of_2(max(dim, 16)), most)
    return {"ONE_BLOCK": dim <= block, "BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


def rms_norm_fwd(x, weight, bias, residual, s_dtype, eps, is_rms_norm):
    """Returns y (..., dim) like x and s = x + residual (..., dim) in s_dtype, or an empty tensor when that is None."""
    y = torch.empty_like(x)
    s = torch.empty_like(x, dtype=s_dtype) if s_dtype is not None else x.new_empty(0)
    if x.numel() == 0:
        return y, s
    store_s, dim = s_dtype is not None, x.shape[-1]
    sizes, (x_rows, residual_rows, y_rows, s_rows) = merge_rows(x, residual, y, s if store_s else None)
    with on_device_of(x):
        _fwd_kernel[(x.numel() // dim,)](
            x, x if residual is None else residual, weight, weight if bias is None else bias, y, s if store_s else y,
            x.numel() // dim, dim, eps, weight.stride(0), 0 if bias is None else bias.stride(0), sizes,
            x_rows, x.stride(-1), residual_rows, 0 if residual is None else residual.stride(-1),
            y_rows, y.stride(-1), s_rows, s.stride(-1) if store_s else 0,
            NDIM=len(sizes), HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, STORE_S=store_s, RMS=is_rms_norm,
            **_block(dim, MAX_BLOCK_FWD),
        )  # fmt: skip
    return y, s


def rms_norm_bwd(dy, ds, x, weight, bias, residual, eps, is_rms_norm):
    """Returns dx, dresidual, dweight, dbias, each in its input's dtype; empty tensors for what was not there."""
    dx = torch.empty_like(x)
    dresidual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    dweight = weight.new_empty(weight.shape)
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dim = x.shape[-1]
    if dim == 0:
        return dx, dresidual, dweight, dbias
    rows = x.numel() // dim
    row_blocks = min(max((rows + 15) // 16, 1), 128)  # as in csrc/rms_norm/rms_norm.h: a function of the problem
    partial = x.new_empty((1 if bias is None else 2, row_blocks, dim), dtype=torch.float32)
    sizes, (x_rows, residual_rows, dy_rows, ds_rows, dx_rows, dresidual_rows) = merge_rows(
        x, residual, dy, ds, dx, None if residual is None else dresidual)  # fmt: skip
    with on_device_of(x):
        _bwd_kernel[(row_blocks,)](
            x, x if residual is None else residual, weight, dy, dy if ds is None else ds, dx, dx if residual is None else dresidual, partial,
            rows, dim, eps, (rows + row_blocks - 1) // row_blocks, weight.stride(0), sizes,
            x_rows, x.stride(-1), residual_rows, 0 if residual is None else residual.stride(-1), dy_rows, dy.stride(-1),
            ds_rows, 0 if ds is None else ds.stride(-1), dx_rows, dx.stride(-1),
            dresidual_rows, 0 if residual is None else dresidual.stride(-1),
            NDIM=len(sizes), HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, HAS_DS=ds is not None, RMS=is_rms_norm,
            **_block(dim, MAX_BLOCK_BWD),
        )  # fmt: skip
        for part, out in ((partial[0], dweight), (partial[-1], dbias)):
            if out.numel():
                _reduce_kernel[(triton.cdiv(dim, REDUCE_COLUMNS),)](
                    part, out, row_blocks, dim, BLOCKS=triton.next_power_of_2(row_blocks), COLUMNS=REDUCE_COLUMNS, num_warps=4
                )
    return dx, dresidual, dweight, dbias
