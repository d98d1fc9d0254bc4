"""causal_conv1d_update against a copy of the same number of bytes. `python -m benchmarks.ops.bench_causal_conv1d_update --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import BATCHES, GPU_BATCHES, LM
from cobra_kernels import causal_conv1d_update

WIDTH = STATE_LEN = 4  # the model keeps as many columns as the window is wide
SHAPES = {f"{model}-{batch}": (BATCHES[batch], LM[model].d_inner) for model in ("130m", "cobra-3b") for batch in BATCHES}
GPU_SHAPES = {f"cobra-3b-{name}": (batch, LM["cobra-3b"].d_inner) for name, batch in GPU_BATCHES.items()}


def cost(batch: int, dim: int, dtype: torch.dtype) -> Cost:
    """State read and written, x read and out written; weight and bias once. SiLU counts as two exponentials."""
    channels = batch * dim
    moved = channels * (2 * STATE_LEN + 2) * dtype.itemsize + dim * (WIDTH + 1) * 4
    return Cost(bytes=moved, flops=2 * WIDTH * channels, exps=2 * channels)


def make_inputs(batch: int, dim: int, dtype: torch.dtype, device: str, index: int) -> tuple:
    g = torch.Generator(device).manual_seed(index)
    x = torch.randn(batch, dim, generator=g, device=device).to(dtype)
    state = torch.randn(batch, dim, STATE_LEN, generator=g, device=device).to(dtype)
    weight = torch.randn(dim, WIDTH, generator=g, device=device) / WIDTH
    return x, state, weight, torch.randn(dim, generator=g, device=device)


def ours(x, state, weight, bias, *, backend=None):
    return causal_conv1d_update(x, state, weight, bias, "silu", backend=backend)


def torch_eager(x, state, weight, bias):
    """The usual fallback: roll, write the last column, multiply and sum."""
    state.copy_(torch.roll(state, -1, -1))
    state[..., -1] = x
    return F.silu((state.float() * weight).sum(-1) + bias).to(x.dtype)


def providers(device: str = "cpu") -> list[Provider]:
    return [
        *backend_providers("causal_conv1d_update", ours, ("cpu", "triton", "cuda", "reference"), device),
        *(peers.causal_conv1d_update() if device != "cpu" else []),
        Provider("torch", torch_eager),
        Provider("torch.compile", torch.compile(torch_eager, dynamic=False), slow_start=True),
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gpu = args.device != "cpu"
    for name in ("bf16",) if gpu else ("fp32", "bf16"):
        for shape, (batch, dim) in (GPU_SHAPES if gpu else SHAPES).items():

            def inputs(index: int, sizes=(batch, dim, DTYPES[name])) -> tuple:
                return make_inputs(*sizes, args.device, index)

            yield Case(
                "update", name, shape, {"batch": batch, "dim": dim}, cost(batch, dim, DTYPES[name]), "copy", inputs,
                providers(args.device), quick=(gpu or name == "fp32") and shape == "cobra-3b-decode-64",
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("causal_conv1d_update", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
