"""selective_state_update against a copy of the same number of bytes. `python -m benchmarks.ops.bench_selective_state_update --help`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import BATCHES, GPU_BATCHES, LM
from cobra_kernels import selective_state_update

SHAPES = {f"{model}-{batch}": (BATCHES[batch], LM[model].d_inner, LM[model].dstate) for model in ("130m", "cobra-3b") for batch in BATCHES}
GPU_SHAPES = {f"cobra-3b-{name}": (batch, LM["cobra-3b"].d_inner, LM["cobra-3b"].dstate) for name, batch in GPU_BATCHES.items()}
# Activations and state: the model's default keeps the state in fp32 whatever the activations are.
MIXES = {"fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32), "bf16-state": (torch.bfloat16, torch.bfloat16)}


def cost(batch: int, dim: int, dstate: int, dtype: torch.dtype, state_dtype: torch.dtype) -> Cost:
    """State read and written; x, dt, z read and out written; B, C per batch row; A, D, dt_bias once. Softplus and SiLU count as
    two exponentials each."""
    channels, states = batch * dim, batch * dim * dstate
    moved = 2 * states * state_dtype.itemsize + (4 * channels + 2 * batch * dstate) * dtype.itemsize + (dim * dstate + 2 * dim) * 4
    return Cost(bytes=moved, flops=6 * states, exps=states + 4 * channels)


def make_inputs(batch: int, dim: int, dstate: int, dtype: torch.dtype, state_dtype: torch.dtype, device: str, index: int) -> tuple:
    g = torch.Generator(device).manual_seed(index)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device)

    x, dt, z = (randn(batch, dim).to(dtype) for _ in range(3))
    B, C = (randn(batch, dstate).to(dtype) for _ in range(2))
    A = -torch.arange(1, dstate + 1, device=device, dtype=torch.float32).repeat(dim, 1)  # the model's initial A
    return randn(batch, dim, dstate).to(state_dtype), x, dt, A, B, C, randn(dim), z, randn(dim) - 4


def ours(*tensors, backend=None):
    return selective_state_update(*tensors, dt_softplus=True, backend=backend)


def torch_eager(state, x, dt, A, B, C, D, z, dt_bias):
    u, step = x.float(), F.softplus(dt.float() + dt_bias)
    h = torch.exp(step[..., None] * A) * state.float() + (step * u)[..., None] * B.float()[:, None]
    state.copy_(h)
    return ((h * C.float()[:, None]).sum(-1) + D * u).mul_(F.silu(z.float())).to(x.dtype)


def providers(device: str = "cpu") -> list[Provider]:
    return [
        *backend_providers("selective_state_update", ours, ("cpu", "reference"), device),
        *(peers.selective_state_update() if device != "cpu" else []),
        Provider("torch", torch_eager),
        Provider("torch.compile", torch.compile(torch_eager, dynamic=False), slow_start=True),
    ]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gpu = args.device != "cpu"
    for mix, (dtype, state_dtype) in MIXES.items():
        if gpu and mix != "bf16":  # bf16 activations, fp32 state: the model's default
            continue
        for shape, (batch, dim, dstate) in (GPU_SHAPES if gpu else SHAPES).items():

            def inputs(index: int, sizes=(batch, dim, dstate, dtype, state_dtype)) -> tuple:
                return make_inputs(*sizes, args.device, index)

            name = next(k for k, v in DTYPES.items() if v == dtype)
            yield Case(
                "bf16 state" if mix == "bf16-state" else "update", name, shape, {"batch": batch, "dim": dim, "dstate": dstate},
                cost(batch, dim, dstate, dtype, state_dtype), "copy", inputs,
                providers(args.device), quick=(gpu or mix == "fp32") and shape == "cobra-3b-decode-64",
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("selective_state_update", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
