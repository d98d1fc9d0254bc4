"""causal_conv1d against a copy of the same number of bytes. `python -m benchmarks.ops.bench_causal_conv1d --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import GPU_LENGTHS, LENGTHS, LM
from cobra_kernels import causal_conv1d

WIDTH = 4
SHAPES = {
    "130m-image": (1, LM["130m"].d_inner, LENGTHS["image"]),
    "cobra-3b-image": (1, LM["cobra-3b"].d_inner, LENGTHS["image"]),
    "cobra-3b-2k": (1, LM["cobra-3b"].d_inner, LENGTHS["2k"]),
    "130m-batch-8": (8, LM["130m"].d_inner, LENGTHS["image"]),
}

GPU_SHAPES = {f"cobra-3b-{name}": (1, LM["cobra-3b"].d_inner, GPU_LENGTHS[name]) for name in ("image", "odd", "8k")}


def cost(batch: int, dim: int, seqlen: int, dtype: torch.dtype) -> Cost:
    """x read and y written once, weight and bias once, final states written. SiLU counts as two exponentials."""
    elements = batch * dim * seqlen
    moved = 2 * elements * dtype.itemsize + dim * (WIDTH + 1) * 4 + batch * dim * (WIDTH - 1) * dtype.itemsize
    return Cost(bytes=moved, flops=2 * WIDTH * elements, exps=2 * elements)


def make_inputs(batch: int, dim: int, seqlen: int, dtype: torch.dtype, layout: str, device: str, index: int) -> tuple:
    g = torch.Generator(device).manual_seed(index)
    x = torch.randn(batch, dim, seqlen, generator=g, device=device).to(dtype)
    if layout == "last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = torch.randn(dim, WIDTH, generator=g, device=device) / WIDTH
    return x, weight, torch.randn(dim, generator=g, device=device)


def ours(x, weight, bias, *, backend=None):
    return causal_conv1d(x, weight, bias, return_final_states=True, activation="silu", backend=backend)


def torch_conv(x, weight, bias):
    """The usual fallback: a padded depthwise convolution in x's dtype."""
    y = F.silu(F.conv1d(x, weight[:, None].to(x.dtype), bias.to(x.dtype), padding=WIDTH - 1, groups=x.shape[1])[..., : x.shape[2]])
    return y, x[..., -(WIDTH - 1) :].clone()


def shift_and_add(x, weight, bias):
    padded = F.pad(x, (WIDTH - 1, 0)).float()
    y = bias[:, None] + sum(weight[:, w, None] * padded[..., w : w + x.shape[2]] for w in range(WIDTH))
    return F.silu(y).to(x.dtype), x[..., -(WIDTH - 1) :].clone()


def providers(device: str = "cpu", compiled: bool = True) -> list[Provider]:
    return [
        *backend_providers("causal_conv1d", ours, ("cpu", "triton", "cuda", "reference"), device),
        *(peers.causal_conv1d(WIDTH) if device != "cpu" else []),
        Provider("torch conv1d", torch_conv),
        *([Provider("torch.compile", torch.compile(shift_and_add, dynamic=False), slow_start=True)] if compiled else []),
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for layout in ("first", "last"):
        for shape, (batch, dim, seqlen) in (SHAPES if args.device == "cpu" else GPU_SHAPES).items():
            for name in ("fp32", "bf16") if args.device == "cpu" else ("bf16",):

                def inputs(index: int, sizes=(batch, dim, seqlen, DTYPES[name], layout)) -> tuple:
                    return make_inputs(*sizes, args.device, index)

                yield Case(
                    f"channel-{layout}", name, shape, {"batch": batch, "dim": dim, "seqlen": seqlen},
                    cost(batch, dim, seqlen, DTYPES[name]), "copy", inputs,
                    providers(args.device, args.device == "cpu" or shape == "cobra-3b-image"), quick=(name == "fp32" or args.device != "cpu") and shape == "cobra-3b-image",
                )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("causal_conv1d", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
