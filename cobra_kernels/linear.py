"""x @ weight.T + bias, by the fastest there is: our kernel for a few rows, else the faster of the two libraries that torch carries.

torch sends fp32 products on a CPU to MKL, which keeps its AVX-512 code for processors of its own maker. oneDNN, in the same
binary, does not: one core of a Zen 5 gave 95 GFLOP/s there and 220 here, with AVX2 alone 100 and 115, for 512 x 768 x 3072 with the
weight as it lies. The gradients' products, whose operands are transposed views, gain as much.

A step of decoding multiplies a row or a few: its time is that of reading the weight, and both libraries take about twice as long as
that. csrc/linear/ reads it as one stream per core, also in bf16 and fp16, with fp32 sums whose bits do not depend on the other rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import extension
from .library import OPS, define

# Below this many multiplications the call itself is what costs, and MKL's is the shorter one.
MIN_PRODUCTS = 1 << 19
# Rows of x up to which reading the weight is what counts; at 8 a library is as fast (benchmarks/ops/bench_linear.py).
MOST_ROWS = 4
# Elements of a weight below which torch's own call is as short.
MIN_WEIGHT = 1 << 15

_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

define(
    "few_rows_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
)
_few_rows_linear = OPS.few_rows_linear.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out): `F.linear` in every respect but the order of its sums."""
    if not _is_plain_call(x, weight, bias):
        return F.linear(x, weight, bias)
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
    if not recorded and _has_few_rows(x, weight, bias):
        return _few_rows_linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    if not _onednn_serves(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if recorded else _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A weight with gaps between its rows (columns of a wider matrix) would fall to oneDNN's plain loops, hundreds of times slower.
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return _onednn(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The product with gradients: two more products, each by its own choice of library. They can be differentiated again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        with torch.autocast("cpu", enabled=False):  # it was off when the product was made
            rows = dy.reshape(-1, dy.shape[-1])
            if ctx.needs_input_grad[0]:
                dx = linear(dy, weight.t())
            if ctx.needs_input_grad[1]:
                dweight = linear(rows.t(), x.reshape(-1, x.shape[-1]).t())
            if ctx.needs_input_grad[2]:
                dbias = rows.sum(0)
        return dx, dweight, dbias


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the layer is no more than `kind`'s arithmetic on its weight and bias, so that they may be used without it.

    Not a subclass, an adapter's wrapper or a parametrized layer (which is a subclass); no hooks, its own or of all modules; no
    forward of its own; parameters that are plain tensors.
    """
    return (
        type(layer) is kind
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and "forward" not in layer.__dict__
        and type(layer.weight) in (Tensor, nn.Parameter)
    )


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), through `linear` when the layer is a plain nn.Linear."""
    if is_plain(layer, nn.Linear):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


class RoutedLinear(nn.Linear):
    """nn.Linear whose product goes through `linear`. The parameters and their names are the same."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def route_linears(module: nn.Module) -> nn.Module:
    """Turns every plain nn.Linear inside into a RoutedLinear, in place: for modules that other libraries wrote."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = RoutedLinear
    return module


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _is_plain_call(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Plain tensors of one dtype on a CPU, and nothing that looks into the call: no compiler, transform, dual number, autocast or dispatch
    mode such as torch's FLOP counter."""
    if torch.compiler.is_compiling():
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    dtype = x.dtype
    if dtype not in _FLOATS or any(t.dtype != dtype or t.device.type != "cpu" or type(t) not in (Tensor, nn.Parameter) for t in operands):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False  # they see through torch's own product only
    return not torch.is_autocast_enabled("cpu")


def _has_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or weight.numel() < MIN_WEIGHT or extension.absence() is not None:
        return False  # or shapes that F.linear refuses in its own words
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return 0 < x.numel() <= MOST_ROWS * weight.shape[1] and weight.stride(1) == 1


def _onednn_serves(x: Tensor, weight: Tensor) -> bool:
    big = x.dtype == torch.float32 and x.numel() * weight.shape[0] >= MIN_PRODUCTS
    return big and _onednn is not None and torch.backends.mkldnn.enabled
