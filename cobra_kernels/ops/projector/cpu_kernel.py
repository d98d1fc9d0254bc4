"""The projectors on a CPU: the library's matrix products, and between them one C++ pass each (csrc/projector/).

Products run in fp32 (fp64 for fp64): without bf16 dot-product instructions the library's 16-bit products are 8 to 400 times
slower. Where the processor has them and every operand is bf16, bf16 products are used.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ...library import OPS, define
from ...linear import MIN_PRODUCTS
from .backward import compute_dtype


def _nothing(*arguments) -> None:
    return None


def _pool_fake(hidden, bias, height, width, out_height, out_width, round_dtype):
    return hidden.new_empty((hidden.shape[0], out_height * out_width, hidden.shape[2]))


def _peg_fake(pooled, weight, bias, height, width, out_dtype):
    return torch.empty_like(pooled, dtype=out_dtype)


def _result(like: torch.Tensor, dtype: torch.dtype | None, shape) -> torch.Tensor:
    return like.new_empty(0) if dtype is None else like.new_empty(shape, dtype=dtype)


def _bias_gelu_fake(h, bias, round_dtype, dtype):
    return torch.empty_like(h, dtype=dtype)


def _gelu_bwd_fake(d, sums, bias, dz_dtype, dbias_dtype):
    rows, cols = d.shape[:-1].numel(), d.shape[-1]
    return _result(d, dz_dtype, (rows, cols)), _result(d, dbias_dtype, (cols,))


def _gelu_pool_bwd_fake(dpooled, sums, bias, height, width, out_height, out_width, dz_dtype, dbias_dtype):
    batch, _, cols = dpooled.shape
    return _result(dpooled, dz_dtype, (batch * height * width, cols)), _result(dpooled, dbias_dtype, (cols,))


def _peg_bwd_fake(dy, sums, p_bias, weight, height, width, dp_dtype, dweight_dtype, dbias_dtype, dp_bias_dtype):
    channels = dy.shape[2]
    return (
        _result(dy, dp_dtype, dy.shape), _result(dy, dweight_dtype, weight.shape), _result(dy, dbias_dtype, (channels,)),
        _result(dy, dp_bias_dtype, (channels,)),
    )  # fmt: skip


# Those without a GPU's implementation are the CPU's own: "projector_bias_gelu_" and "projector_gelu_pool".
define("projector_bias_gelu_(Tensor(a!) h, Tensor? bias, ScalarType round_dtype) -> ()", _nothing)
define(
    "projector_gelu_pool(Tensor hidden, Tensor? bias, SymInt height, SymInt width, SymInt out_height, SymInt out_width, "
    "ScalarType round_dtype) -> Tensor",
    _pool_fake,
)
define("projector_peg(Tensor pooled, Tensor weight, Tensor? bias, SymInt height, SymInt width, ScalarType out_dtype) -> Tensor", _peg_fake)
define("projector_bias_gelu(Tensor h, Tensor? bias, ScalarType round_dtype, ScalarType dtype) -> Tensor", _bias_gelu_fake)
# A dtype that is None: the result is not wanted, and empty.
define(
    "projector_gelu_bwd(Tensor d, Tensor? sums, Tensor? bias, ScalarType? dz_dtype, ScalarType? dbias_dtype) -> (Tensor, Tensor)",
    _gelu_bwd_fake,
)
define(
    "projector_gelu_pool_bwd(Tensor dpooled, Tensor sums, Tensor? bias, SymInt height, SymInt width, SymInt out_height, SymInt out_width, "
    "ScalarType? dz_dtype, ScalarType? dbias_dtype) -> (Tensor, Tensor)",
    _gelu_pool_bwd_fake,
)
define(
    "projector_peg_bwd(Tensor dy, Tensor? sums, Tensor? p_bias, Tensor weight, SymInt height, SymInt width, ScalarType? dp_dtype, "
    "ScalarType? dweight_dtype, ScalarType? dbias_dtype, ScalarType? dp_bias_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _peg_bwd_fake,
)


@functools.cache
def _has_bf16_products() -> bool:
    """Whether the library multiplies bf16 matrices with instructions made for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def _product_dtype(features, weights, biases) -> torch.dtype:
    all_bf16 = all(t is None or t.dtype == torch.bfloat16 for t in (*features, *weights, *biases))
    return torch.bfloat16 if all_bf16 and _has_bf16_products() else compute_dtype(features[0].dtype)


def _as(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)  # to() alone costs a microsecond


def _rows(features, dtype: torch.dtype) -> torch.Tensor:
    """(rows, in_0). One copy of the features, a hundredth of the first product's time, which one long product repays twice."""
    x = features[0] if len(features) == 1 else torch.cat(features, -1)
    return _as(x.reshape(x.shape[:-1].numel(), x.shape[-1]), dtype)


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _dense(t: torch.Tensor) -> torch.Tensor:
    """A matrix or its transpose without gaps. oneDNN's code for others, such as a slice of columns, took a thousand times longer."""
    return t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous()


def _product(x, weight, bias=None, gelu: bool = False):
    """x @ weight^T (+ bias, then GELU, before the one rounding to x's dtype). Straight to oneDNN where it can: F.linear in fp32
    goes to MKL, which uses AVX2 at most on processors of other makers and takes twice the time where there is AVX-512."""
    weight, bias = _as(weight, x.dtype), _as(bias, x.dtype)
    if x.dtype == torch.float64 or x.numel() * weight.shape[0] < MIN_PRODUCTS or not _has_onednn():
        h = F.linear(x, weight, bias)
        return F.gelu(h) if gelu else h
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, activation, [], algorithm)


@torch.no_grad()
def mlp_projector_fwd(features, weights, biases):
    dtype = features[0].dtype
    h = _rows(features, _product_dtype(features, weights, biases))
    for weight, bias in zip(weights[:-1], biases[:-1]):
        if h.dtype == torch.bfloat16:
            h = _product(h, weight, bias, gelu=True)
        else:  # oneDNN's erf costs a sixth of the product without AVX-512; one pass of ours does bias, GELU and rounding
            h = _product(h, weight)
            OPS.projector_bias_gelu_.default(h, bias, dtype)
    h = _product(h, weights[-1], biases[-1])
    return h.to(dtype).reshape(*features[0].shape[:-1], weights[-1].shape[0])


@torch.no_grad()
def ldp_projector_fwd(features, weights, biases, peg_weight, peg_bias, grid, out_grid):
    dtype, batch = features[0].dtype, features[0].shape[0]
    (w1, w2), (b1, b2) = weights, biases
    h = _product(_rows(features, _product_dtype(features, weights, biases)), w1)
    h = h.view(batch, grid[0] * grid[1], w1.shape[0])
    pooled = OPS.projector_gelu_pool.default(h, b1, *grid, *out_grid, dtype)  # (batch, h*w, hidden)
    p = _product(pooled.flatten(0, 1), w2, b2)
    return OPS.projector_peg.default(p.view(batch, pooled.shape[1], w2.shape[0]), peg_weight, peg_bias, *out_grid, dtype)


# --- for backward.py: all products in the compute dtype ------------------------------------------------------------------

gelu_bwd, gelu_pool_bwd, peg_bwd = (OPS.projector_gelu_bwd.default, OPS.projector_gelu_pool_bwd.default, OPS.projector_peg_bwd.default)


def product_dtype(features, weights) -> torch.dtype:
    """Not bf16, even where the processor multiplies it: gradients would be rounded once more in every layer."""
    return compute_dtype(features[0].dtype)


def inputs(features, dtype: torch.dtype) -> list[torch.Tensor]:
    return [_rows(features, dtype)]


def sums(x: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    return _product(x[0], weight)


def times(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _as(_product(a, b.t()), dtype)


def gelu(sums: torch.Tensor, bias, dtype: torch.dtype, operand: torch.dtype) -> torch.Tensor:
    return OPS.projector_bias_gelu.default(sums, bias, dtype, operand)


def gelu_pool(sums: torch.Tensor, bias, height, width, out_height, out_width, dtype: torch.dtype, operand: torch.dtype) -> torch.Tensor:
    return OPS.projector_gelu_pool.default(sums, bias, height, width, out_height, out_width, dtype)  # in the dtype of sums: `operand`
