"""The projectors against a large matrix product. `python -m benchmarks.ops.bench_projector --help`.

The roof is torch.mm in fp32, as everywhere; where torch.mm is not the fastest product of the machine (see the room's README)
the fraction exceeds 1."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import PROJECTOR, ProjectorShape
from cobra_kernels import ldp_projector, mlp_projector

GRID, OUT_GRID = (27, 27), (14, 14)
OUT_TOKENS = OUT_GRID[0] * OUT_GRID[1]


def mlp_cost(shape: ProjectorShape, dtype: torch.dtype) -> Cost:
    v = sum(shape.vision_dims)
    weights = v * shape.hidden + shape.hidden * shape.d_model + shape.d_model**2
    return Cost(bytes=(weights + shape.tokens * (v + shape.d_model)) * dtype.itemsize, flops=2 * shape.tokens * weights)


def ldp_cost(shape: ProjectorShape, dtype: torch.dtype) -> Cost:
    """The least: the second product after the pool."""
    v = sum(shape.vision_dims)
    first, second = v * shape.hidden, shape.hidden * shape.d_model
    moved = first + second + shape.tokens * v + OUT_TOKENS * shape.d_model
    return Cost(bytes=moved * dtype.itemsize, flops=2 * (shape.tokens * first + OUT_TOKENS * second))


def make_inputs(shape: ProjectorShape, layers: int, peg: bool, dtype: torch.dtype, device: str, index: int) -> tuple:
    g = torch.Generator(device).manual_seed(index)

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device).mul_(scale).to(dtype)

    widths = [sum(shape.vision_dims), shape.hidden, shape.d_model, shape.d_model][: layers + 1]
    features = [randn(1, shape.tokens, v) for v in shape.vision_dims]
    weights = [randn(out, into, scale=into**-0.5) for into, out in zip(widths, widths[1:])]
    biases = [randn(out) for out in widths[1:]]
    encoding = (randn(shape.d_model, 1, 3, 3, scale=0.3), randn(shape.d_model)) if peg else ()
    return features, weights, biases, *encoding


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


def providers(op: str, call: Callable, peer: Callable) -> list[Provider]:
    return [
        *backend_providers(op, call, ("cpu", "reference")),
        Provider("torch", peer),
        Provider("torch.compile", torch.compile(peer, dynamic=False), slow_start=True),
    ]


def cases_of(op: str, layers: int, cost: Callable, call: Callable, peer: Callable) -> Callable[[argparse.Namespace], Iterator[Case]]:
    def cases(args: argparse.Namespace) -> Iterator[Case]:
        for name, shape in PROJECTOR.items():
            for dtype_name in ("fp32", "bf16"):
                dtype = DTYPES[dtype_name]

                def inputs(index: int, shape=shape, dtype=dtype) -> tuple:
                    return make_inputs(shape, layers, op == "ldp_projector", dtype, args.device, index)

                dims = {"tokens": shape.tokens, "v": sum(shape.vision_dims), "hidden": shape.hidden, "out": shape.d_model}
                yield Case(
                    "fwd", dtype_name, name, dims, cost(shape, dtype), "matmul", inputs, providers(op, call, peer),
                    quick=name == "laptop" and dtype_name == "fp32",
                )  # fmt: skip

    return cases


def main(argv: Sequence[str] | None = None) -> int:
    status = run_bench("mlp_projector", cases_of("mlp_projector", 3, mlp_cost, mlp, torch_mlp), argv)
    return run_bench("ldp_projector", cases_of("ldp_projector", 2, ldp_cost, ldp, torch_ldp), argv) or status


if __name__ == "__main__":
    raise SystemExit(main())
