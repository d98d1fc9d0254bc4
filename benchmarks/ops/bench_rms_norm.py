"""rms_norm against a copy of the same number of bytes. `python -m benchmarks.ops.bench_rms_norm --help`.

The pattern of every bench_<op>.py: cost(shape) · input maker · providers · cases · main."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import LENGTHS, LM
from cobra_kernels import rms_norm

EPS = 1e-5
SHAPES = {
    "130m-image": (LENGTHS["image"], LM["130m"].d_model),
    "cobra-3b-image": (LENGTHS["image"], LM["cobra-3b"].d_model),
    "cobra-3b-2k": (LENGTHS["2k"], LM["cobra-3b"].d_model),
    "cobra-3b-decode-64": (64, LM["cobra-3b"].d_model),
}

GPU_SHAPES = {name: shape for name, shape in SHAPES.items() if name.startswith("cobra-3b")}


def cost(rows: int, dim: int, dtype: torch.dtype, mode: str) -> Cost:
    """Bytes read and written once. The block's own use: x in T, residual read and its sum written in fp32, y in T."""
    x, r, elements = dtype.itemsize, 4, rows * dim
    forward = elements * (x + r + r + x) + dim * x  # x, residual, sum, y; weight
    if mode == "fwd":
        return Cost(bytes=forward, flops=5 * elements)
    backward = elements * (x + r + r + x + r) + 2 * dim * x  # dy, dsum, sum, dx, dresidual; weight, dweight
    return Cost(bytes=forward + backward, flops=16 * elements)


def make_inputs(rows: int, dim: int, dtype: torch.dtype, device: str, requires_grad: bool, index: int) -> tuple:
    generator = torch.Generator(device).manual_seed(index)
    x = torch.randn(rows, dim, generator=generator, device=device).to(dtype)
    residual = torch.randn(rows, dim, generator=generator, device=device)
    weight = torch.rand(dim, generator=generator, device=device).add_(0.5).to(dtype)
    inputs = [t.requires_grad_(requires_grad) for t in (x, weight, residual)]
    if requires_grad:  # incoming gradients of y and of the sum
        dy, ds = torch.randn(2, rows, dim, generator=generator, device=device)
        inputs += [dy.to(dtype), ds]
    return tuple(inputs)


def ours(x, weight, residual, dy=None, ds=None, *, backend=None):
    y, s = rms_norm(x, weight, residual=residual, prenorm=True, residual_in_fp32=True, eps=EPS, backend=backend)
    return (y, s) if dy is None else torch.autograd.grad((y, s), (x, weight, residual), (dy, ds))


def torch_eager(x, weight, residual, dy=None, ds=None):
    s = x + residual
    y = F.rms_norm(s, (s.shape[-1],), weight.float(), EPS).to(x.dtype)
    return (y, s) if dy is None else torch.autograd.grad((y, s), (x, weight, residual), (dy, ds))


def _compiled_forward(x, weight, residual):
    s = x + residual
    return (s * torch.rsqrt(s.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype), s


def torch_compiled():
    """The composed formula through inductor, its own dynamo cache per provider; the backward is compiled with it."""
    forward = torch.compile(_compiled_forward, dynamic=False)

    def call(x, weight, residual, dy=None, ds=None):
        y, s = forward(x, weight, residual)
        return (y, s) if dy is None else torch.autograd.grad((y, s), (x, weight, residual), (dy, ds))

    return call


def transformers_norm(x, weight, residual, dy=None, ds=None):
    """The add and the module of transformers' Mamba block; its sum is rounded to the weight's dtype before the norm."""
    from transformers.models.mamba.modeling_mamba import MambaRMSNorm

    s = x + residual
    norm = MambaRMSNorm(1, eps=EPS)
    y = torch.func.functional_call(norm, {"weight": weight}, (s.to(weight.dtype),))
    return (y, s) if dy is None else torch.autograd.grad((y, s), (x, weight, residual), (dy, ds))


def mambapy_norm(x, weight, residual, dy=None, ds=None):
    from mambapy.mamba import RMSNorm

    s = x + residual
    y = torch.func.functional_call(RMSNorm(1, EPS), {"weight": weight}, (s,)).to(x.dtype)
    return (y, s) if dy is None else torch.autograd.grad((y, s), (x, weight, residual), (dy, ds))


def libraries() -> list[Provider]:
    """Other people's norms that are installed. Importing transformers takes seconds."""
    found = [("transformers", transformers_norm), ("mambapy", mambapy_norm)]
    return [Provider(package, call, slow_start=True) for package, call in found if importlib.util.find_spec(package)]


def providers(device: str = "cpu", whole: bool = True) -> list[Provider]:
    """`whole`: other libraries' norms too. They are a few torch calls like the eager one, so one shape shows what they cost."""
    return [
        *backend_providers("rms_norm", ours, device=device),
        *(peers.rms_norm(EPS) if device != "cpu" else []),
        Provider("torch", torch_eager),
        Provider("torch.compile", torch_compiled(), slow_start=True),
        *(libraries() if device == "cpu" and whole else []),
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gpu = args.device != "cpu"
    for mode in ("fwd", "fwd+bwd"):
        for shape, (rows, dim) in (GPU_SHAPES if gpu else SHAPES).items():
            for name in ("bf16",) if gpu else ("fp32", "bf16"):
                dtype = DTYPES[name]

                def inputs(index: int, rows=rows, dim=dim, dtype=dtype, grad=mode != "fwd") -> tuple:
                    return make_inputs(rows, dim, dtype, args.device, grad, index)

                yield Case(
                    mode, name, shape, {"rows": rows, "dim": dim}, cost(rows, dim, dtype, mode), "copy", inputs,
                    providers(args.device, shape == "cobra-3b-image"),
                    quick=shape == "cobra-3b-image",
                )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("rms_norm", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
