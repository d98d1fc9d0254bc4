"""selective_scan against the exponential floor. `python -m benchmarks.ops.bench_selective_scan --help`.

The yardstick is exponentials, not bytes: a step of a channel takes dstate decays, and softplus (an exponential and a
logarithm) and SiLU three more. The backward takes the decays again, and four (softplus, its slope, the gate's).
Everything a Mamba block uses is on: D, z, delta_bias, softplus."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness.bench import DTYPES, Case, Cost, backend_providers, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import GPU_LENGTHS, LENGTHS, LM
from cobra_kernels import selective_scan

SHAPES = {
    "130m-train": (2, LM["130m"].d_inner, 512, LM["130m"].dstate),
    "130m-image": (1, LM["130m"].d_inner, LENGTHS["image"], LM["130m"].dstate),
    "cobra-3b-image": (1, LM["cobra-3b"].d_inner, LENGTHS["image"], LM["cobra-3b"].dstate),
    "cobra-3b-2k": (1, LM["cobra-3b"].d_inner, LENGTHS["2k"], LM["cobra-3b"].dstate),
}
GPU_SHAPES = {f"cobra-3b-{name}": (1, LM["cobra-3b"].d_inner, GPU_LENGTHS[name], LM["cobra-3b"].dstate) for name in ("image", "2k", "32k")}
GPU_SHAPES["cobra-3b-2k-batch-8"] = (8, *GPU_SHAPES["cobra-3b-2k"][1:])
LAYOUTS = ("channel-last", "channel-first")
COMPILED_STEPS = 8  # of one call of torch.compile's function: it unrolls them, and takes minutes for hundreds


def cost(batch: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype, mode: str = "fwd") -> Cost:
    steps = batch * dim * seqlen
    size = 4 * steps + 2 * batch * dstate * seqlen  # u, delta, z, out; B, C
    states = (dim * dstate + 2 * dim + batch * dim * dstate) * 4  # A; D, delta_bias; last_state
    forward = Cost(bytes=size * dtype.itemsize + states, flops=steps * (6 * dstate + 8), exps=steps * (dstate + 3))
    if mode == "fwd":
        return forward
    size = 7 * steps + 4 * batch * dstate * seqlen  # u, delta, z, dout, du, ddelta, dz; B, C, dB, dC
    saved = 2 * steps // 64 * dstate * 4  # states, written and read
    return Cost(
        bytes=forward.bytes + size * dtype.itemsize + 2 * states + saved,
        flops=forward.flops + steps * (22 * dstate + 30),
        exps=forward.exps + steps * (dstate + 4),
    )


def make_inputs(batch: int, dim: int, seqlen: int, dstate: int, dtype: torch.dtype, layout: str, device: str, index: int, train: bool = False) -> tuple:
    g = torch.Generator(device).manual_seed(index)

    def sequence(n: int, last: bool) -> torch.Tensor:  # (batch, n, seqlen)
        shape = (batch, seqlen, n) if last else (batch, n, seqlen)
        t = torch.randn(shape, generator=g, device=device).to(dtype)
        return t.transpose(1, 2) if last else t

    u, delta, z = (sequence(dim, layout == "channel-last") for _ in range(3))
    B, C = (sequence(dstate, True) for _ in range(2))  # token-major, as x_proj leaves them
    A = -torch.arange(1, dstate + 1, device=device).float().repeat(dim, 1) * (0.5 + torch.rand(dim, 1, generator=g, device=device))
    D, delta_bias = torch.ones(dim, device=device), torch.rand(dim, generator=g, device=device) - 4.0
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return (*(t.requires_grad_() for t in inputs), sequence(dim, layout == "channel-last")) if train else inputs


def ours(u, delta, A, B, C, D, z, delta_bias, *, backend=None):
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, True, True, backend=backend)


def trained(forward):
    """Forward, and the gradients of all inputs through out."""

    def call(*tensors, **kwargs):
        *inputs, dout = tensors
        return torch.autograd.grad(forward(*inputs, **kwargs)[0], inputs, dout)

    return call


def _discretised(u, delta, A, B, delta_bias):
    dt = F.softplus(delta.float() + delta_bias[:, None])  # (batch, dim, seqlen)
    decay = torch.exp(A[None, :, None, :] * dt[..., None])  # (batch, dim, seqlen, dstate), materialised
    return decay, dt[..., None] * B.float().transpose(1, 2)[:, None] * u.float()[..., None]


def materialised_loop(u, delta, A, B, C, D, z, delta_bias):
    """What transformers does without kernels: (batch, dim, seqlen, dstate) tensors and a Python loop over time."""
    decay, inputs = _discretised(u, delta, A, B, delta_bias)
    state, ys = torch.zeros_like(decay[:, :, 0]), []
    columns = C.float().transpose(1, 2)  # (batch, seqlen, dstate)
    for t in range(u.shape[-1]):
        state = decay[:, :, t] * state + inputs[:, :, t]
        ys.append(torch.matmul(state, columns[:, t, :, None])[..., 0])
    y = torch.stack(ys, -1) + u.float() * D[:, None]
    return (y * F.silu(z.float())).to(u.dtype), state


def mambapy_scan(u, delta, A, B, C, D, z, delta_bias):
    """The parallel scan of mambapy, which transformers can use instead of its loop."""
    from mambapy.pscan import pscan

    decay, inputs = _discretised(u, delta, A, B, delta_bias)
    states = pscan(decay.transpose(1, 2).contiguous(), inputs.transpose(1, 2).contiguous())  # (batch, seqlen, dim, dstate)
    y = (states @ C.float().transpose(1, 2)[..., None])[..., 0].transpose(1, 2) + u.float() * D[:, None]
    return (y * F.silu(z.float())).to(u.dtype), states[:, -1]


def steps(state, dt, dtu, A, B, C):
    """Some steps in a row, (steps, batch, ...) each; returns the state after them and their outputs. Nothing larger than a state is made."""
    ys = []
    for t in range(dt.shape[0]):
        state = torch.exp(dt[t, ..., None] * A) * state + dtu[t, ..., None] * B[t, :, None]
        ys.append((state * C[t, :, None]).sum(-1))
    return state, torch.stack(ys)


def by_steps(function, chunk: int | None = None):
    """A scan that calls `function` for `chunk` steps at a time (default: for all of them)."""

    def call(u, delta, A, B, C, D, z, delta_bias):
        x, dt = u.float(), F.softplus(delta.float() + delta_bias[:, None])
        parts = [m.movedim(-1, 0).contiguous().split(chunk or u.shape[-1]) for m in (dt, dt * x, B.float(), C.float())]
        state, ys = torch.zeros(*u.shape[:2], A.shape[1], device=u.device), []
        for part in zip(*parts):
            state, y = function(state, *part[:2], A, *part[2:])
            ys.append(y)
        y = torch.cat(ys).movedim(0, -1) + x * D[:, None]
        return (y * F.silu(z.float())).to(u.dtype), state

    return call


def cpu_peers(shape: str, train: bool) -> list[Provider]:
    """They take seconds a call: gradients at one shape, plain torch at another."""
    if train and shape != "130m-train":
        return []
    found = [Provider("materialised loop (transformers)", materialised_loop)]
    if importlib.util.find_spec("mambapy"):
        found.append(Provider("mambapy", mambapy_scan))
    if not train and shape == "130m-image":
        found += [
            *backend_providers("selective_scan", ours, ("reference",)),
            Provider("torch", by_steps(steps)),
            Provider("torch.compile", by_steps(torch.compile(steps, dynamic=False), COMPILED_STEPS), slow_start=True),
        ]
    return found


def cases(args: argparse.Namespace) -> Iterator[Case]:
    gpu = args.device != "cpu"
    for mode in ("fwd", "fwd+bwd"):
        for shape, (batch, dim, seqlen, dstate) in (GPU_SHAPES if gpu else SHAPES).items():
            for layout in LAYOUTS:
                for name in ("bf16",) if gpu else ("fp32", "bf16"):
                    dtype, train = DTYPES[name], mode != "fwd"

                    def inputs(index: int, dims=(batch, dim, seqlen, dstate), dtype=dtype, layout=layout, train=train) -> tuple:
                        return make_inputs(*dims, dtype, layout, args.device, index, train)

                    compared = layout == LAYOUTS[0] and name == "fp32"
                    providers = backend_providers("selective_scan", trained(ours) if train else ours, ("cpu", "triton", "cuda"), args.device)
                    others = cpu_peers(shape, train) if compared and not gpu else peers.selective_scan(inputs) if gpu and not train else []
                    if train:
                        others = [Provider(other.name, trained(other.call)) for other in others]
                    smallest = "130m-train" if train else "130m-image"
                    yield Case(
                        f"{mode} {layout}", name, shape, {"batch": batch, "dim": dim, "seqlen": seqlen, "dstate": dstate},
                        cost(batch, dim, seqlen, dstate, dtype, mode), "exp", inputs, [*providers, *others],
                        quick=gpu and shape == "cobra-3b-image" or shape == smallest and compared or shape == "cobra-3b-image" and not compared and not train,
                    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("selective_scan", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
