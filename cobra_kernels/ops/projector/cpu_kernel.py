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


def _nothing(*arguments) -> None:
    return None


def _pool_fake(hidden, bias, height, width, out_height, out_width, round_dtype):
    return hidden.new_empty((hidden.shape[0], out_height * out_width, hidden.shape[2]))


def _peg_fake(pooled, weight, bias, height, width, out_dtype):
    return torch.empty_like(pooled, dtype=out_dtype)


define("projector_bias_gelu_(Tensor(a!) h, Tensor? bias, ScalarType round_dtype) -> ()", _nothing)
define(
    "projector_gelu_pool(Tensor hidden, Tensor? bias, SymInt height, SymInt width, SymInt out_height, SymInt out_width, "
    "ScalarType round_dtype) -> Tensor",
    _pool_fake,
)
define("projector_peg(Tensor pooled, Tensor weight, Tensor? bias, SymInt height, SymInt width, ScalarType out_dtype) -> Tensor", _peg_fake)


@functools.cache
def _has_bf16_products() -> bool:
    """Whether the library multiplies bf16 matrices with instructions made for it."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(features, weights, biases) -> torch.dtype:
    all_bf16 = all(t is None or t.dtype == torch.bfloat16 for t in (*features, *weights, *biases))
    return torch.bfloat16 if all_bf16 and _has_bf16_products() else _compute_dtype(features[0].dtype)


def _as(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)  # to() alone costs a microsecond


def _rows(features, dtype: torch.dtype) -> torch.Tensor:
    """(rows, in_0). One copy of the features, a hundredth of the first product's time, which one long product repays twice."""
    x = features[0] if len(features) == 1 else torch.cat(features, -1)
    return _as(x.reshape(x.shape[:-1].numel(), x.shape[-1]), dtype)


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x, weight, bias=None, gelu: bool = False):
    """x @ weight^T (+ bias, then GELU, before the one rounding to x's dtype). Straight to oneDNN where it can: F.linear in fp32
    goes to MKL, which uses AVX2 at most on processors of other makers and takes twice the time where there is AVX-512."""
    weight, bias = _as(weight, x.dtype), _as(bias, x.dtype)
    if x.dtype == torch.float64 or x.numel() * weight.shape[0] < MIN_PRODUCTS or not _has_onednn():
        h = F.linear(x, weight, bias)
        return F.gelu(h) if gelu else h
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, activation, [], algorithm)


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


# --- gradients: the forward again, then the same products transposed, all in the compute dtype -------------------------


def _wanted(gradients: dict, tensors, wanted) -> list[torch.Tensor]:
    """gradients[i]() for each wanted tensor, in its dtype and shape."""
    return [gradients[i]().to(t.dtype).reshape(t.shape).contiguous() for i, t in enumerate(tensors) if wanted[i]]


def _feature_gradients(g, weight, features) -> dict:
    """{k: gradient of features[k]}: a copy of its columns of g @ weight, which is computed once and only if asked for."""
    product = functools.cache(lambda: torch.mm(g, weight))
    gradients, column = {}, 0
    for k, feature in enumerate(features):
        gradients[k] = functools.partial(lambda at, width: product()[:, at : at + width].clone(), column, feature.shape[-1])
        column += feature.shape[-1]
    return gradients


@torch.no_grad()
def mlp_projector_bwd(dy, features, weights, biases, wanted):
    dtype, compute, n = features[0].dtype, _compute_dtype(features[0].dtype), len(weights)
    w, b = [_as(t, compute) for t in weights], [_as(t, compute) for t in biases]
    inputs, sums = [_rows(features, compute)], []  # of every layer: what it reads; its output before the GELU
    for i in range(n - 1):
        sums.append(F.linear(inputs[i], w[i], b[i]))
        inputs.append(F.gelu(sums[i]).to(dtype).to(compute))

    g = dy.reshape(-1, w[-1].shape[0]).to(compute)
    gradients, at_weights = {}, len(features)
    for i in reversed(range(n)):
        gradients[at_weights + i] = functools.partial(lambda g, x: torch.mm(g.t(), x), g, inputs[i])
        gradients[at_weights + n + i] = functools.partial(torch.sum, g, 0)
        if i > 0:
            g = torch.ops.aten.gelu_backward(torch.mm(g, w[i]), sums[i - 1])
    gradients |= _feature_gradients(g, w[0], features)
    return _wanted(gradients, [*features, *weights, *biases], wanted)


@torch.no_grad()
def ldp_projector_bwd(dy, features, weights, biases, peg_weight, peg_bias, grid, out_grid, wanted):
    dtype, compute, batch = features[0].dtype, _compute_dtype(features[0].dtype), features[0].shape[0]
    (w1, w2), (b1, b2) = ([_as(t, compute) for t in pair] for pair in (weights, biases))
    out = w2.shape[0]

    def as_grid(t, size):  # (batch, tokens, c) or (rows, c) -> (batch, c, height, width)
        return t.reshape(batch, size[0] * size[1], t.shape[-1]).transpose(1, 2).reshape(batch, t.shape[-1], *size)

    def as_rows(t):  # back to (rows, c)
        return t.flatten(2).transpose(1, 2).reshape(-1, t.shape[1])

    x = _rows(features, compute)
    s = F.linear(x, w1, b1)
    active = as_grid(F.gelu(s), grid)
    pooled = as_rows(F.adaptive_avg_pool2d(active, out_grid)).to(dtype).to(compute)
    p = as_grid(F.linear(pooled, w2, b2), out_grid)

    dy = as_grid(dy.to(compute), out_grid)
    one, zero = [1, 1], [0, 0]
    dp, dpeg_weight, dpeg_bias = torch.ops.aten.convolution_backward(
        dy, p, _as(peg_weight, compute), [out], one, one, one, False, zero, out, [True, True, True]
    )
    dp = as_rows(dp + dy)
    dactive = torch.ops.aten._adaptive_avg_pool2d_backward(as_grid(torch.mm(dp, w2), out_grid), active)
    g = torch.ops.aten.gelu_backward(as_rows(dactive), s)

    k = len(features)
    gradients = _feature_gradients(g, w1, features)
    gradients[k], gradients[k + 1] = lambda: torch.mm(g.t(), x), lambda: torch.mm(dp.t(), pooled)
    gradients[k + 2], gradients[k + 3] = lambda: g.sum(0), lambda: dp.sum(0)
    gradients[k + 4], gradients[k + 5] = lambda: dpeg_weight, lambda: dpeg_bias
    return _wanted(gradients, [*features, *weights, *biases, peg_weight, peg_bias], wanted)
