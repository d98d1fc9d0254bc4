"""What one eager call of a public op costs before any work: tiny tensors, warm. `python -m benchmarks.ops.bench_overhead`.

Goal: at most 15 us when nothing requires grad, 60 us when something does (the forward call alone, graph included). The
torch rows are what a call of the nearest plain torch function costs in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

import cobra_kernels as ck
from benchmarks.harness.bench import Case, Cost, run_bench
from benchmarks.harness.timing import Provider

BATCH, DIM, SEQLEN, DSTATE, WIDTH = 1, 16, 4, 4, 4
GOAL, GOAL_GRAD = 15e-6, 60e-6


def _rms_norm() -> tuple[Callable, tuple, Callable | None]:
    x, weight = torch.randn(SEQLEN, DIM), torch.ones(DIM)
    return ck.rms_norm, (x, weight), lambda x, weight: F.rms_norm(x, (DIM,), weight, 1e-6)


def _causal_conv1d() -> tuple[Callable, tuple, Callable | None]:
    x, weight, bias = torch.randn(BATCH, DIM, SEQLEN), torch.randn(DIM, WIDTH), torch.randn(DIM)

    def torch_conv(x, weight, bias):
        return F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=DIM)[..., :SEQLEN]

    return ck.causal_conv1d, (x, weight, bias), torch_conv


def _causal_conv1d_update() -> tuple[Callable, tuple, Callable | None]:
    return ck.causal_conv1d_update, (torch.randn(BATCH, DIM), torch.zeros(BATCH, DIM, WIDTH), torch.randn(DIM, WIDTH)), None


def _selective_scan() -> tuple[Callable, tuple, Callable | None]:
    u, delta = torch.randn(BATCH, DIM, SEQLEN), torch.rand(BATCH, DIM, SEQLEN)
    B, C = torch.randn(2, BATCH, DSTATE, SEQLEN)
    return ck.selective_scan, (u, delta, -torch.rand(DIM, DSTATE), B, C), None


def _selective_state_update() -> tuple[Callable, tuple, Callable | None]:
    state, (B, C) = torch.zeros(BATCH, DIM, DSTATE), torch.randn(2, BATCH, DSTATE)
    arguments = (state, torch.randn(BATCH, DIM), torch.rand(BATCH, DIM), -torch.rand(DIM, DSTATE), B, C)
    return ck.selective_state_update, arguments, None


def _mlp_projector() -> tuple[Callable, tuple, Callable | None]:
    x, w0, w1, b0, b1 = torch.randn(SEQLEN, DIM), torch.randn(DIM, DIM), torch.randn(DIM, DIM), torch.randn(DIM), torch.randn(DIM)

    def call(x, w0, w1, b0, b1, **backend):
        return ck.mlp_projector(x, [w0, w1], [b0, b1], **backend)

    return call, (x, w0, w1, b0, b1), lambda x, w0, w1, b0, b1: F.linear(F.gelu(F.linear(x, w0, b0)), w1, b1)


def _ldp_projector() -> tuple[Callable, tuple, Callable | None]:
    x, w0, w1, b0, b1 = torch.randn(1, 16, DIM), torch.randn(DIM, DIM), torch.randn(DIM, DIM), torch.randn(DIM), torch.randn(DIM)

    def call(x, w0, w1, b0, b1, peg_weight, peg_bias, **backend):
        return ck.ldp_projector(x, [w0, w1], [b0, b1], peg_weight, peg_bias, out_grid=(2, 2), **backend)

    return call, (x, w0, w1, b0, b1, torch.randn(DIM, 1, 3, 3), torch.randn(DIM)), None


OPS: dict[str, tuple[Callable, bool]] = {  # maker, differentiable
    "rms_norm": (_rms_norm, True),
    "causal_conv1d": (_causal_conv1d, True),
    "causal_conv1d_update": (_causal_conv1d_update, False),
    "selective_scan": (_selective_scan, True),
    "selective_state_update": (_selective_state_update, False),
    "mlp_projector": (_mlp_projector, True),
    "ldp_projector": (_ldp_projector, True),
}


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for op, (make, differentiable) in OPS.items():
        for mode in ("call", "call, grad") if differentiable else ("call",):

            def inputs(index: int, make=make, grad=mode != "call") -> tuple:
                torch.manual_seed(index)
                tensors = make()[1]
                return tuple(t.requires_grad_(grad) for t in tensors)

            function, _, peer = make()
            providers = [Provider(op, function)]
            if peer is not None:
                providers.append(Provider("torch", peer))
            yield Case(
                mode, "fp32", op, {}, Cost(0), "", inputs, providers, cache="warm",
                goal=GOAL if mode == "call" else GOAL_GRAD, quick=True,
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("overhead", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
