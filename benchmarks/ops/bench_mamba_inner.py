"""mamba_inner, a Mamba block after its first product, against a large matrix product. `python -m benchmarks.ops.bench_mamba_inner --help`.

The peers: plain torch, whose scan is a loop, and whole blocks of other libraries with our tensors in the place of their weights and nothing in
the place of their first product."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.ops.bench_selective_scan import COMPILED_STEPS, by_steps, steps
from benchmarks.shapes import LENGTHS, LM, LMShape
from cobra_kernels import mamba_inner


@dataclass(frozen=True)
class Shape:
    batch: int
    seqlen: int
    lm: LMShape


SHAPES = {
    "130m-train": Shape(2, 512, LM["130m"]),
    "130m-image": Shape(1, LENGTHS["image"], LM["130m"]),
    "cobra-3b-image": Shape(1, LENGTHS["image"], LM["cobra-3b"]),
}
GPU_SHAPES = {name: shape for name, shape in SHAPES.items() if name.startswith("cobra-3b")}


def cost(shape: Shape, dtype: torch.dtype, mode: str) -> Cost:
    """FLOPs of the three products, forward and, with gradients, for inputs and weights; nothing recomputed. Bytes of xz, out and the weights.
    Exponentials of the scan, softplus and both SiLUs, again in the backward."""
    lm, tokens = shape.lm, shape.batch * shape.seqlen
    weights = lm.d_inner * (2 * lm.dt_rank + 2 * lm.dstate + lm.d_model)
    size, exps = tokens * (2 * lm.d_inner + lm.d_model) + weights, tokens * lm.d_inner * (lm.dstate + 5)
    times = 1 if mode == "fwd" else 3
    return Cost(bytes=times * size * dtype.itemsize, flops=times * 2 * tokens * weights, exps=exps if mode == "fwd" else 2 * exps)


def make_inputs(shape: Shape, dtype: torch.dtype, device: str, train: bool, index: int) -> tuple:
    """xz as the first product leaves it, the block's weights, and with gradients what arrives, last. A stays fp32."""
    g, lm = torch.Generator(device).manual_seed(index), shape.lm

    def randn(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(size, generator=g, device=device).mul_(scale).to(dtype)

    xz = randn(shape.batch, shape.seqlen, 2 * lm.d_inner).transpose(1, 2)
    A = -torch.arange(1, lm.dstate + 1, device=device).float().repeat(lm.d_inner, 1)
    weights = (
        randn(lm.d_inner, 1, lm.width, scale=0.3), randn(lm.d_inner),
        randn(lm.dt_rank + 2 * lm.dstate, lm.d_inner, scale=lm.d_inner**-0.5), randn(lm.d_inner, lm.dt_rank, scale=lm.dt_rank**-0.5),
        randn(lm.d_model, lm.d_inner, scale=lm.d_inner**-0.5),
        A, torch.ones(lm.d_inner, device=device), torch.rand(lm.d_inner, generator=g, device=device) - 4.0,
    )  # fmt: skip
    inputs = (xz, *weights)
    return (*(t.requires_grad_() for t in inputs), randn(shape.batch, shape.seqlen, lm.d_model)) if train else inputs


def ours(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, A, D, delta_bias, *, backend=None):
    return mamba_inner(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, None, A, D=D, delta_bias=delta_bias, backend=backend)


def trained(forward: Callable) -> Callable:
    """Forward, and the gradients of xz and of every weight."""

    def call(*tensors, **options):
        *inputs, dy = tensors
        return torch.autograd.grad(forward(*inputs, **options), inputs, dy)

    return call


def in_torch(scan: Callable) -> Callable:
    """The block as one would write it, over a scan with its inputs in our order."""

    def call(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, A, D, delta_bias):
        x, z = xz.chunk(2, dim=1)
        x = F.silu(F.conv1d(x, conv_weight, conv_bias, padding=conv_weight.shape[-1] - 1, groups=x.shape[1])[..., : x.shape[-1]])
        dt, B, C = F.linear(x.transpose(1, 2), x_proj).split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)
        y, _ = scan(x, F.linear(dt, dt_proj).transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D, z, delta_bias)
        return F.linear(y.transpose(1, 2), out_proj)

    return call


def block(make: Callable[[], nn.Module]) -> Callable:
    """A foreign block as a function of our inputs; it is made by the first call."""
    made = functools.cache(make)

    def call(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, A, D, delta_bias):
        weights = {
            "conv1d.weight": conv_weight, "conv1d.bias": conv_bias, "x_proj.weight": x_proj, "dt_proj.weight": dt_proj,
            "dt_proj.bias": delta_bias, "A_log": torch.log(-A), "D": D, "out_proj.weight": out_proj,
        }  # fmt: skip
        return functional_call(made(), weights, (xz.transpose(1, 2),))

    return call


def transformers_block(lm: LMShape) -> nn.Module:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=lm.d_model, state_size=lm.dstate, num_hidden_layers=1, conv_kernel=lm.width, use_bias=False)
    mixer = MambaMixer(config, layer_idx=0)
    mixer.in_proj = nn.Identity()
    return mixer.eval()


def mambapy_block(lm: LMShape) -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    made = MambaBlock(MambaConfig(d_model=lm.d_model, n_layers=1, d_state=lm.dstate, d_conv=lm.width))
    made.in_proj = nn.Identity()
    return made


def peers(lm: LMShape, train: bool) -> list[Provider]:
    """On a CPU. transformers takes ten seconds for the gradients, and so would torch: forward only. Compiled is the loop over time alone."""
    found = []
    for package, make in (("transformers", transformers_block), ("mambapy", mambapy_block)):
        if importlib.util.find_spec(package) is None:
            print(f"left out: {package} is not installed")
        elif not (train and package == "transformers"):
            call = block(functools.partial(make, lm))
            found.append(Provider(package, trained(call) if train else call, slow_start=True))
    if not train:
        compiled = by_steps(torch.compile(steps, dynamic=False), COMPILED_STEPS)
        found += [Provider("torch", in_torch(by_steps(steps)), slow_start=True), Provider("torch.compile", in_torch(compiled), slow_start=True)]
    return found


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gpu = args.device != "cpu"
    name = "bf16" if gpu else "fp32"
    for mode in ("fwd", "fwd+bwd"):
        for title, shape in (GPU_SHAPES if gpu else SHAPES).items():
            dtype, train, lm = DTYPES[name], mode != "fwd", shape.lm

            def inputs(index: int, shape=shape, dtype=dtype, train=train) -> tuple:
                return make_inputs(shape, dtype, args.device, train, index)

            providers = backend_providers("mamba_inner", trained(ours) if train else ours, ("cpu", "triton", "cuda"), args.device)
            dims = {"batch": shape.batch, "dim": lm.d_inner, "seqlen": shape.seqlen, "dstate": lm.dstate, "rank": lm.dt_rank, "d_model": lm.d_model}
            yield Case(
                mode, name, title, dims, cost(shape, dtype, mode), "matmul", inputs,
                [*providers, *(peers(lm, train) if not gpu and title != "cobra-3b-image" else [])],
                quick=gpu or title == ("130m-train" if train else "130m-image"),
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("mamba_inner", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
