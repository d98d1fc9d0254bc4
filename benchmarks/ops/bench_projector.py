"""The projectors against a large matrix product. `python -m benchmarks.ops.bench_projector --help`.

The roof is torch.mm in fp32, as everywhere; where torch.mm is not the fastest product of the machine (see the room's README)
the fraction exceeds 1."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

import cobra_kernels
from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import PROJECTOR, ProjectorShape
from cobra_kernels import ldp_projector, mlp_projector
from cobra_kernels.ops.projector import cuda_kernel

GRID, OUT_GRID = (27, 27), (14, 14)
OUT_TOKENS = OUT_GRID[0] * OUT_GRID[1]
GRID_TOKENS = GRID[0] * GRID[1]
# On a GPU: one image, and the batch that fills it.
GPU_SHAPES = {f"cobra-3b-{images}": replace(PROJECTOR["cobra-3b"], tokens=images * GRID_TOKENS) for images in (1, 8)}


def layers_cost(layers: Sequence[tuple[int, int]], values: int, dtype: torch.dtype, grad: bool) -> Cost:
    """(rows, size of the weight) of each layer, features and results. With gradients, the least: those of the weights, and of every
    layer's input but the features'; each weight read twice and its gradient written, nothing recomputed."""
    weights, products = sum(w for _, w in layers), sum(rows * w for rows, w in layers)
    rows, first = layers[0]
    if grad:
        weights, products, values = 3 * weights, 3 * products - rows * first, 2 * values
    return Cost(bytes=(weights + values) * dtype.itemsize, flops=2 * products)


def mlp_cost(shape: ProjectorShape, dtype: torch.dtype, grad: bool = False) -> Cost:
    v, m = sum(shape.vision_dims), shape.tokens
    sizes = (v * shape.hidden, shape.hidden * shape.d_model, shape.d_model**2)
    return layers_cost([(m, size) for size in sizes], m * (v + shape.d_model), dtype, grad)


def ldp_cost(shape: ProjectorShape, dtype: torch.dtype, grad: bool = False) -> Cost:
    """The least: the second product after the pool."""
    v, m = sum(shape.vision_dims), shape.tokens
    pooled = m // GRID_TOKENS * OUT_TOKENS
    return layers_cost([(m, v * shape.hidden), (pooled, shape.hidden * shape.d_model)], m * v + pooled * shape.d_model, dtype, grad)


def make_inputs(shape: ProjectorShape, layers: int, peg: bool, dtype: torch.dtype, device: str, grad: bool, index: int) -> tuple:
    """With gradients: of every parameter, not of the features, whose towers are frozen in Cobra's training; and what arrives, last."""
    g = torch.Generator(device).manual_seed(index)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device).mul_(scale).to(dtype)

    widths = [sum(shape.vision_dims), shape.hidden, shape.d_model, shape.d_model][: layers + 1]
    images = shape.tokens // GRID_TOKENS
    features = [randn(images, GRID_TOKENS, v) for v in shape.vision_dims]
    weights = [randn(out, into, scale=into**-0.5) for into, out in zip(widths, widths[1:])]
    biases = [randn(out) for out in widths[1:]]
    encoding = (randn(shape.d_model, 1, 3, 3, scale=0.3), randn(shape.d_model)) if peg else ()
    if not grad:
        return features, weights, biases, *encoding
    for t in (*weights, *biases, *encoding):
        t.requires_grad_()
    return features, weights, biases, *encoding, randn(images, OUT_TOKENS if peg else GRID_TOKENS, shape.d_model)


def training(call: Callable) -> Callable:
    """call(*inputs) and the gradients of its parameters, in one list; the last input is the gradient that arrives."""

    def run(features, weights, biases, *rest, **options):
        *encoding, dy = rest
        out = call(features, weights, biases, *encoding, **options)
        return [out, *torch.autograd.grad(out, [*weights, *biases, *encoding], dy)]

    return run


def mlp(features, weights, biases, backend=None):
    return mlp_projector(features, weights, biases, backend=backend)


def ldp(features, weights, biases, peg_weight, peg_bias, backend=None):
    return ldp_projector(features, weights, biases, peg_weight, peg_bias, grid=GRID, out_grid=OUT_GRID, backend=backend)


def torch_mlp(features, weights, biases):
    h = torch.cat(features, -1)
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        h = F.linear(F.gelu(h) if i else h, weight, bias)
    return h


def torch_ldp(features, weights, biases, peg_weight, peg_bias):
    h = torch_mlp(features, weights, biases).transpose(1, 2).unflatten(2, GRID)
    p = F.adaptive_avg_pool2d(h, OUT_GRID)
    return (p + F.conv2d(p, peg_weight, peg_bias, padding=1, groups=p.shape[1])).flatten(2).transpose(1, 2).contiguous()


def cublaslt_mlp(features, weights, biases):
    """Bias and GELU in the product's epilogue, the towers concatenated first. Its GELU is the tanh form, no library has erf."""
    h = torch.cat(features, -1).flatten(0, -2)
    for weight, bias in zip(weights[:-1], biases[:-1]):
        h = torch._addmm_activation(bias, h, weight.t(), use_gelu=True)
    return torch.addmm(biases[-1], h, weights[-1].t()).unflatten(0, features[0].shape[:-1])


def by_product(call: Callable, product: str) -> Callable:
    """The cuda backend with its products by one of its ways, where that one serves."""

    def run(*inputs):
        cuda_kernel.PRODUCT = product
        try:
            return call(*inputs, backend="cuda")
        finally:
            cuda_kernel.PRODUCT = None

    return run


def providers(op: str, call: Callable, peer: Callable, device: str, grad: bool, reference: bool) -> list[Provider]:
    """`reference`: our own definition too, the same calls of torch as `peer`."""
    compiled = torch.compile(peer, dynamic=False)
    if grad:
        call, peer, compiled = training(call), training(peer), training(compiled)
    products = ("warps", "kernel", "library") if device != "cpu" and cobra_kernels.backends()["cuda"] is None else ()
    return [
        *backend_providers(op, call, ("cpu", "reference") if reference else ("cpu",), device),
        *(Provider(f"cuda, {product}", by_product(call, product)) for product in products),
        Provider("torch", peer),
        *([Provider("cublasLt epilogues", cublaslt_mlp)] if device != "cpu" and op == "mlp_projector" and not grad else []),
        Provider("torch.compile", compiled, slow_start=True),
    ]


def cases_of(op: str, layers: int, cost: Callable, call: Callable, peer: Callable) -> Callable[[argparse.Namespace], Iterator[Case]]:
    def cases(args: argparse.Namespace) -> Iterator[Case]:
        gpu = args.device != "cpu"
        for mode in ("fwd", "fwd+bwd"):
            for name, shape in (GPU_SHAPES if gpu else PROJECTOR).items():
                for dtype_name in ("bf16",) if gpu else ("fp32", "bf16"):
                    dtype, grad = DTYPES[dtype_name], mode != "fwd"

                    def inputs(index: int, shape=shape, dtype=dtype, grad=grad) -> tuple:
                        return make_inputs(shape, layers, op == "ldp_projector", dtype, args.device, grad, index)

                    dims = {"tokens": shape.tokens, "v": sum(shape.vision_dims), "hidden": shape.hidden, "out": shape.d_model}
                    yield Case(
                        mode, dtype_name, name, dims, cost(shape, dtype, grad), "matmul", inputs,
                        providers(op, call, peer, args.device, grad, name == "laptop"), quick=name == "cobra-3b-1" or name == "laptop" and dtype_name == "fp32",
                    )  # fmt: skip

    return cases


CASES = {
    "mlp_projector": cases_of("mlp_projector", 3, mlp_cost, mlp, torch_mlp),
    "ldp_projector": cases_of("ldp_projector", 2, ldp_cost, ldp, torch_ldp),
}


def main(argv: Sequence[str] | None = None) -> int:
    return max(run_bench(op, cases, argv) for op, cases in CASES.items())


if __name__ == "__main__":
    raise SystemExit(main())
