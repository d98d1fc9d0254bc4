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


def cost(batch: int, dim: int, seqlen: int, dtype: torch.dtype, backward: bool) -> Cost:
    """x read and y written once, weight and bias once, final states written. SiLU counts as two exponentials.

    With the backward: x and dy read and dx written once more, weight and bias read, their gradients written; SiLU once more. The
    training step asks for no final states.
    """
    elements, parameters = batch * dim * seqlen, dim * (WIDTH + 1) * 4
    if backward:
        return Cost(bytes=5 * elements * dtype.itemsize + 3 * parameters, flops=8 * WIDTH * elements, exps=4 * elements)
    moved = 2 * elements * dtype.itemsize + parameters + batch * dim * (WIDTH - 1) * dtype.itemsize
    return Cost(bytes=moved, flops=2 * WIDTH * elements, exps=2 * elements)


def make_inputs(batch: int, dim: int, seqlen: int, dtype: torch.dtype, layout: str, device: str, backward: bool, index: int) -> tuple:
    g = torch.Generator(device).manual_seed(index)

    def randn():
        t = torch.randn(batch, dim, seqlen, generator=g, device=device).to(dtype)
        return t.transpose(1, 2).contiguous().transpose(1, 2) if layout == "last" else t

    weight = torch.randn(dim, WIDTH, generator=g, device=device) / WIDTH
    inputs = randn(), weight, torch.randn(dim, generator=g, device=device)
    return (*(t.requires_grad_() for t in inputs), randn()) if backward else inputs


def trained(forward):
    """(x, weight, bias[, dy]) -> the outputs, or the gradients of the inputs where dy is given."""

    def call(x, weight, bias, dy=None):
        if dy is None:
            return forward(x, weight, bias), x[..., -(WIDTH - 1) :].clone()
        return torch.autograd.grad(forward(x, weight, bias), (x, weight, bias), dy)

    return call


def ours(x, weight, bias, dy=None, *, backend=None):
    if dy is None:
        return causal_conv1d(x, weight, bias, return_final_states=True, activation="silu", backend=backend)
    return torch.autograd.grad(causal_conv1d(x, weight, bias, activation="silu", backend=backend), (x, weight, bias), dy)


def torch_conv(x, weight, bias):
    """The usual fallback: a padded depthwise convolution in x's dtype."""
    return F.silu(F.conv1d(x, weight[:, None].to(x.dtype), bias.to(x.dtype), padding=WIDTH - 1, groups=x.shape[1])[..., : x.shape[2]])


def shift_and_add(x, weight, bias):
    padded = F.pad(x, (WIDTH - 1, 0)).float()
    y = bias[:, None] + sum(weight[:, w, None] * padded[..., w : w + x.shape[2]] for w in range(WIDTH))
    return F.silu(y).to(x.dtype)


def providers(device: str = "cpu", compiled: bool = True, backward: bool = False) -> list[Provider]:
    """The peer package is built without its backward (benchmarks/peers.py): it runs forward only."""
    return [
        *backend_providers("causal_conv1d", ours, ("cpu", "triton", "cuda", "reference"), device),
        *(peers.causal_conv1d(WIDTH) if device != "cpu" and not backward else []),
        Provider("torch conv1d", trained(torch_conv)),
        *([Provider("torch.compile", trained(torch.compile(shift_and_add, dynamic=False)), slow_start=True)] if compiled else []),
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gpu = args.device != "cpu"
    for backward in (False, True):
        for layout in ("first", "last"):
            for shape, (batch, dim, seqlen) in (GPU_SHAPES if gpu else SHAPES).items():
                for name in ("bf16",) if gpu else ("fp32", "bf16"):

                    def inputs(index: int, sizes=(batch, dim, seqlen, DTYPES[name], layout), backward=backward) -> tuple:
                        return make_inputs(*sizes, args.device, backward, index)

                    yield Case(
                        f"channel-{layout}{' fwd+bwd' if backward else ''}", name, shape, {"batch": batch, "dim": dim, "seqlen": seqlen},
                        cost(batch, dim, seqlen, DTYPES[name], backward), "copy", inputs,
                        providers(args.device, not gpu or shape == "cobra-3b-image", backward),
                        quick=(gpu or name == "fp32") and shape == "cobra-3b-image",
                    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("causal_conv1d", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
