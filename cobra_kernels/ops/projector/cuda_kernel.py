"""The projectors on a GPU: every layer is one call of our kernel (csrc/projector/), or the library's product and one pass of ours.

Our kernel serves bf16 and fp16 whose rows are whole 16-byte pieces; it reads the features where they lie, side by side. The rest
(fp32, mixed dtypes, odd sizes) is the library's: its products serve every layout, and there is no better one for them to miss.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ...library import OPS, define
from . import products
from .products import as_dtype

MAX_SEGMENTS, MAX_DIMS = 4, 7  # of csrc/projector/projector.h and csrc/common/rows.h

# From how many rows on the library's product is the faster one, by compute capability; our kernel below that, and everywhere
# else. Data-centre Blackwell has matrix instructions that only the library uses; on Hopper the kernel has them too, and what it
# saves besides (GELU, bias, the features' copy, half-filled rounds of tiles) is most at few rows. An estimate until a record decides.
LIBRARY_ROWS = {(10, 0): 1, (10, 3): 1}

# Forces one, where it can serve: "kernel", "warps" (our kernel without the warpgroups' instructions) or "library". For bench and tests.
PRODUCT: str | None = None


def _linear_fake(x, weight, bias, gelu, warps, dtype=None):
    return weight.new_empty((*x[0].shape[:-1], weight.shape[0]), dtype=dtype or weight.dtype)


def _pool_fake(hidden, bias, height, width, out_height, out_width, gelu, dtype):
    return hidden.new_empty((hidden.shape[0], out_height * out_width, hidden.shape[2]), dtype=dtype)


define(
    "projector_linear(Tensor[] x, Tensor weight, Tensor? bias, bool gelu, bool warps, ScalarType? dtype=None) -> Tensor", _linear_fake
)
define(
    "projector_pool(Tensor hidden, Tensor? bias, SymInt height, SymInt width, SymInt out_height, SymInt out_width, bool gelu, "
    "ScalarType dtype) -> Tensor",
    _pool_fake,
)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _in_pieces(t: torch.Tensor) -> bool:
    """Whether the rows of t are whole, aligned 16-byte pieces of 16-bit elements."""
    *sizes, width = t.shape
    *strides, step = t.stride()
    return (
        width % 8 == 0
        and step == 1
        and t.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for size, stride in zip(sizes, strides) if size > 1)
    )


def kernel_serves(x: list[torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether our kernel multiplies these: x as if concatenated on the last dim, one dtype of 16 bits, rows of whole pieces."""
    dtype = weight.dtype
    return (
        dtype in (torch.bfloat16, torch.float16)
        and len(x) <= MAX_SEGMENTS
        and x[0].dim() <= MAX_DIMS
        and all(t.dtype == dtype and _in_pieces(t) for t in (*x, weight))
    )


def _by_kernel(x: list[torch.Tensor], weight: torch.Tensor) -> bool:
    if PRODUCT == "library" or not kernel_serves(x, weight):
        return False
    return PRODUCT in ("kernel", "warps") or x[0].shape[:-1].numel() < LIBRARY_ROWS.get(_capability(weight.device), 1 << 62)


def _whole(x: list[torch.Tensor]) -> torch.Tensor:
    """(rows, in)."""
    whole = x[0] if len(x) == 1 else torch.cat(x, -1)
    return whole.reshape(whole.shape[:-1].numel(), whole.shape[-1])


def _sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in fp32, (rows, out): not rounded before bias and GELU."""
    if x.dtype != torch.float32 and x.dtype == weight.dtype and x.numel() and weight.numel():
        return torch.ops.aten.mm.dtype(x, weight.t(), torch.float32)
    return F.linear(as_dtype(x, torch.float32), as_dtype(weight, torch.float32))


def _linear(x: list[torch.Tensor], weight, bias, gelu: bool) -> torch.Tensor:
    """act([x_1, .., x_K] @ weight.T + bias), (..., out), rounded once to the dtype of x."""
    if _by_kernel(x, weight):
        return OPS.projector_linear.default(x, weight, bias, gelu, PRODUCT == "warps")
    dtype, lead, x = x[0].dtype, x[0].shape[:-1], _whole(x)
    if gelu:
        y = OPS.projector_bias_gelu.default(_sums(x, weight), bias, dtype, dtype)
    else:
        compute = dtype if weight.dtype == dtype and (bias is None or bias.dtype == dtype) else torch.float32
        y = as_dtype(F.linear(as_dtype(x, compute), as_dtype(weight, compute), as_dtype(bias, compute)), dtype)
    return y.view(*lead, weight.shape[0])


@torch.no_grad()
def mlp_projector_fwd(features, weights, biases):
    h = list(features)
    for i, (weight, bias) in enumerate(zip(weights, biases), 1):
        h = [_linear(h, weight, bias, gelu=i < len(weights))]
    return h[0]


@torch.no_grad()
def ldp_projector_fwd(features, weights, biases, peg_weight, peg_bias, grid, out_grid):
    features, dtype, batch = list(features), features[0].dtype, features[0].shape[0]
    (w1, w2), (b1, b2) = weights, biases
    if _by_kernel(features, w1):
        h = OPS.projector_linear.default(features, w1, b1, True, PRODUCT == "warps")
        pooled = OPS.projector_pool.default(h, None, *grid, *out_grid, False, dtype)
    else:
        h = _sums(_whole(features), w1).view(batch, grid[0] * grid[1], w1.shape[0])
        pooled = OPS.projector_pool.default(h, b1, *grid, *out_grid, True, dtype)
    p = _linear([pooled], w2, b2, gelu=False)  # (batch, h*w, out)
    return OPS.projector_peg.default(p, peg_weight, peg_bias, *out_grid, dtype)


# --- for backward.py ---------------------------------------------------------------------------------------------------

gelu_bwd, gelu_pool_bwd, peg_bwd = (OPS.projector_gelu_bwd.default, OPS.projector_gelu_pool_bwd.default, OPS.projector_peg_bwd.default)
product_dtype, inputs, times = products.product_dtype, products.inputs, products.times


def sums(x: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """By our kernel where it serves: it reads the features side by side, and hands over fp32."""
    weight = as_dtype(weight, x[0].dtype)
    if _by_kernel(x, weight):
        return OPS.projector_linear.default(x, weight, None, False, PRODUCT == "warps", torch.float32).flatten(0, -2)
    return products.sums(x, weight)


def gelu(sums: torch.Tensor, bias, dtype: torch.dtype, operand: torch.dtype) -> torch.Tensor:
    return OPS.projector_bias_gelu.default(sums, bias, dtype, operand)


def gelu_pool(sums: torch.Tensor, bias, height, width, out_height, out_width, dtype: torch.dtype, operand: torch.dtype) -> torch.Tensor:
    return as_dtype(OPS.projector_pool.default(sums, bias, height, width, out_height, out_width, True, dtype), operand)
