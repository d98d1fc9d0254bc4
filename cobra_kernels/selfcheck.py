"""`cobra_kernels.selftest()`: every op on the user's own device against the reference in fp64, in under a minute.

The input makers here are also what the test suite samples from: realistic inputs (step sizes log-uniform over 1e-4..16, decays
from full forget to near-perfect memory), not Gaussians that look nothing like a trained model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import ops
from .dispatch import use_backend
from .errors import ArgumentError, CobraKernelsError

# L2-relative error against fp64: fp32 accumulation; one rounding of the output in 16 bits.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2.9e-3, torch.float16: 3.7e-4}
GRADIENT_LIMITS = {**LIMITS, torch.float32: 1e-5}
GEMM_LIMIT = 1e-5  # fp32, ops that contain a library GEMM
GEMM_OPS = {"mlp_projector": 2, "ldp_projector": 2, "mamba_inner": 3}  # and by how much the roundings between them add up in 16 bits


class Case(NamedTuple):
    """One call: op name, keyword arguments, the names of arguments that the op writes, and whether gradients are wanted too."""

    op: str
    kwargs: dict[str, object]
    in_place: tuple[str, ...] = ()
    gradients: bool = False


# --- input makers: fp64 values rounded to the dtype, on the CPU ------------------------------------------------------


def _randn(g: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)


def step_sizes(g: torch.Generator, *shape: int) -> torch.Tensor:
    """dt, log-uniform over 1e-4..16, fp64."""
    low, high = torch.tensor([1e-4, 16.0], dtype=torch.float64).log()
    return (low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)).exp()


def before_softplus(dt: torch.Tensor) -> torch.Tensor:
    """The raw delta whose softplus is dt."""
    return torch.where(dt > 20, dt, dt + torch.log(-torch.expm1(-dt)))


def rms_norm_inputs(g, rows=5, dim=129, dtype=torch.float32, bias=True, residual=True) -> dict:
    """x, weight, bias, residual of rms_norm."""
    return {
        "x": _randn(g, rows, dim, dtype=dtype) + 0.5,
        "weight": _randn(g, dim),
        "bias": _randn(g, dim) if bias else None,
        "residual": _randn(g, rows, dim) if residual else None,
    }


def causal_conv1d_inputs(g, batch=2, dim=33, seqlen=65, width=4, dtype=torch.float32, bias=True, initial=False) -> dict:
    """x, weight, bias, initial_states of causal_conv1d."""
    return {
        "x": _randn(g, batch, dim, seqlen, dtype=dtype),
        "weight": _randn(g, dim, width),
        "bias": _randn(g, dim) if bias else None,
        "initial_states": _randn(g, batch, dim, width - 1, dtype=dtype) if initial else None,
    }


def causal_conv1d_update_inputs(g, batch=3, dim=33, width=4, state_len=4, steps=None, dtype=torch.float32, bias=True) -> dict:
    """x, conv_state, weight, bias of causal_conv1d_update; steps=None gives x without a step dim."""
    return {
        "x": _randn(g, *((batch, dim) if steps is None else (batch, dim, steps)), dtype=dtype),
        "conv_state": _randn(g, batch, dim, state_len, dtype=dtype),
        "weight": _randn(g, dim, width),
        "bias": _randn(g, dim) if bias else None,
    }


def selective_scan_inputs(
    g, batch=2, dim=24, seqlen=65, dstate=16, groups=1, dtype=torch.float32, z=True, D=True, softplus=True, initial=False, channel_last=False
) -> dict:
    """Every tensor of selective_scan with variable B and C, (batch, groups, dstate, seqlen)."""
    dt = step_sizes(g, batch, dim, seqlen)
    delta_bias = _randn(g, dim, scale=0.1)
    delta = (before_softplus(dt) if softplus else dt) - delta_bias.double()[:, None]
    wide = {
        "u": _randn(g, batch, dim, seqlen, dtype=dtype),
        "delta": delta.to(dtype),
        "z": _randn(g, batch, dim, seqlen, dtype=dtype) if z else None,
    }
    if channel_last:  # the same values, channels innermost
        wide = {k: t if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in wide.items()}
    return {
        **wide,
        "A": -(torch.rand(dim, dstate, generator=g, dtype=torch.float64) * 1.5 + 0.05).float(),
        "B": _randn(g, batch, groups, dstate, seqlen, dtype=dtype),
        "C": _randn(g, batch, groups, dstate, seqlen, dtype=dtype),
        "D": _randn(g, dim) if D else None,
        "delta_bias": delta_bias,
        "delta_softplus": softplus,
        "initial_state": _randn(g, batch, dim, dstate) if initial else None,
    }


def selective_state_update_inputs(g, batch=3, dim=24, dstate=16, dtype=torch.float32, state_dtype=torch.float32, z=True, D=True) -> dict:
    """Every tensor of selective_state_update, Mamba-1 form."""
    dt_bias = _randn(g, dim, scale=0.1)
    return {
        "state": _randn(g, batch, dim, dstate, dtype=state_dtype),
        "x": _randn(g, batch, dim, dtype=dtype),
        "dt": (before_softplus(step_sizes(g, batch, dim)) - dt_bias.double()).to(dtype),
        "A": -(torch.rand(dim, dstate, generator=g, dtype=torch.float64) * 1.5 + 0.05).float(),
        "B": _randn(g, batch, dstate, dtype=dtype),
        "C": _randn(g, batch, dstate, dtype=dtype),
        "D": _randn(g, dim) if D else None,
        "z": _randn(g, batch, dim, dtype=dtype) if z else None,
        "dt_bias": dt_bias,
        "dt_softplus": True,
    }


def mlp_projector_inputs(g, tokens=(2, 9), features=(24, 40), layers=(64, 32, 32), dtype=torch.float32, bias=True) -> dict:
    """features, weights and biases of mlp_projector."""
    sizes = (sum(features), *layers)
    return {
        "features": tuple(_randn(g, *tokens, v, dtype=dtype) for v in features),
        "weights": tuple(_randn(g, o, i, scale=i**-0.5).to(dtype) for i, o in zip(sizes, sizes[1:])),
        "biases": tuple(_randn(g, o, dtype=dtype) for o in layers) if bias else None,
    }


def ldp_projector_inputs(g, batch=2, grid=(9, 9), out_grid=(5, 5), features=(24, 40), layers=(64, 32), dtype=torch.float32) -> dict:
    """Every tensor of ldp_projector."""
    inputs = mlp_projector_inputs(g, (batch, grid[0] * grid[1]), features, layers, dtype)
    out = layers[-1]
    return {
        **inputs,
        "peg_weight": _randn(g, out, 1, 3, 3, scale=0.3).to(dtype),
        "peg_bias": _randn(g, out, dtype=dtype),
        "grid": grid,
        "out_grid": out_grid,
    }


def mamba_inner_inputs(g, batch=2, dim=48, seqlen=65, dstate=16, dt_rank=3, d_model=24, width=4, dtype=torch.float32, initial=False, norms=False) -> dict:
    """Every tensor of mamba_inner with B and C from x_proj; the step sizes are those of a trained block (1e-3 .. 1 and wider)."""
    low, high = torch.tensor([1e-3, 1.0], dtype=torch.float64).log()
    dt = (low + (high - low) * torch.rand(dim, generator=g, dtype=torch.float64)).exp()
    return {
        "xz": _randn(g, batch, seqlen, 2 * dim, dtype=dtype).transpose(1, 2),
        "conv1d_weight": _randn(g, dim, 1, width, scale=width**-0.5),
        "conv1d_bias": _randn(g, dim, scale=0.3),
        "x_proj_weight": _randn(g, dt_rank + 2 * dstate, dim, scale=2 * dim**-0.5).to(dtype),
        "delta_proj_weight": _randn(g, dim, dt_rank, scale=dt_rank**-0.5).to(dtype),
        "out_proj_weight": _randn(g, d_model, dim, scale=dim**-0.5).to(dtype),
        "out_proj_bias": _randn(g, d_model).to(dtype),
        "A": -(torch.rand(dim, dstate, generator=g, dtype=torch.float64) * 1.5 + 0.05).float(),
        "D": _randn(g, dim),
        "delta_bias": before_softplus(dt).float(),
        "b_rms_weight": _randn(g, dstate) if norms else None,
        "c_rms_weight": _randn(g, dstate) if norms else None,
        "dt_rms_weight": _randn(g, dim) if norms else None,
        "initial_conv_state": _randn(g, batch, dim, width - 1, dtype=dtype) if initial else None,
        "initial_ssm_state": _randn(g, batch, dim, dstate) if initial else None,
    }


# --- running a case --------------------------------------------------------------------------------------------------


def map_tensors(value, f: Callable[[torch.Tensor], torch.Tensor]):
    """f applied to every tensor of an argument: a tensor, a tuple of tensors, or anything else."""
    if isinstance(value, torch.Tensor):
        return f(value)
    return tuple(map_tensors(v, f) for v in value) if isinstance(value, (tuple, list)) else value


def in_fp64(t: torch.Tensor) -> torch.Tensor:
    """A copy in fp64 on the CPU; integer tensors keep their dtype."""
    return t.detach().cpu().to(torch.complex128 if t.is_complex() else torch.float64, copy=True) if t.is_floating_point() or t.is_complex() else t.cpu()


def run(case: Case, backend: str | None) -> list[torch.Tensor]:
    """Outputs of the call, then the arguments it wrote, then, if wanted, the gradient of each float argument.

    The case itself is not changed: written arguments are copied.
    """
    import cobra_kernels

    leaves: list[torch.Tensor] = []

    def leaf(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().requires_grad_())
        return leaves[-1]

    kwargs = {k: v.clone() if k in case.in_place else map_tensors(v, leaf) if case.gradients else v for k, v in case.kwargs.items()}
    out = getattr(cobra_kernels, case.op)(**kwargs, backend=backend)
    outputs = [*(out if isinstance(out, tuple) else (out,)), *(kwargs[k] for k in case.in_place)]
    if not case.gradients:
        return outputs
    roots = [t for t in outputs if t.requires_grad]  # not a state that depends on nothing
    gradients = torch.autograd.grad(roots, leaves, [incoming_gradient(t) for t in roots], allow_unused=True) if roots else [None] * len(leaves)
    return [t.detach() for t in outputs] + [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients)]


def incoming_gradient(output: torch.Tensor) -> torch.Tensor:
    """What arrives at an output: values between -1 and 1 that every dtype holds exactly, made on the output's device."""
    values = (torch.arange(output.numel(), device=output.device) * 37 % 101 - 50) / 64
    return values.to(output.dtype).view(output.shape)


def expected(case: Case) -> list[torch.Tensor]:
    """The same call on the reference in fp64."""
    return run(case._replace(kwargs={k: map_tensors(v, in_fp64) for k, v in case.kwargs.items()}), "reference")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """L2-relative error; inf for a NaN that is not expected."""
    difference = (got.cpu().double() - want).norm().item()
    norm = want.norm().item()
    relative = difference / norm if norm > 0 else difference
    return relative if relative == relative else float("inf")


def cases(seed: int = 0) -> Iterator[Case]:
    """The selftest's cases: every op and dtype, sizes around vector and block boundaries, both layouts, both kinds of state; gradients."""
    g = torch.Generator().manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (1, 63, 64, 100, 2560):
            for is_rms_norm in (True, False):
                yield Case("rms_norm", {**rms_norm_inputs(g, 17, dim, dtype), "prenorm": True, "is_rms_norm": is_rms_norm})
        for seqlen, width, initial in ((1, 4, True), (3, 4, False), (65, 4, True), (129, 2, False), (800, 4, False)):
            inputs = causal_conv1d_inputs(g, 2, 65, seqlen, width, dtype, initial=initial)
            yield Case("causal_conv1d", {**inputs, "activation": "silu", "return_final_states": True})
        for steps, state_len in ((None, 3), (None, 4), (2, 5)):
            yield Case("causal_conv1d_update", {**causal_conv1d_update_inputs(g, 5, 65, 4, state_len, steps, dtype), "activation": "silu"}, ("conv_state",))
        for seqlen in (1, 31, 64, 129, 800):
            for channel_last in (False, True):
                inputs = selective_scan_inputs(g, 2, 72, seqlen, dtype=dtype, initial=seqlen != 64, channel_last=channel_last)
                yield Case("selective_scan", {**inputs, "return_last_state": True})
        yield Case("selective_scan", {**selective_scan_inputs(g, 1, 6, 40, 7, 3, dtype, z=False, D=False, softplus=False), "return_last_state": True})
        for dim, dstate in ((1, 1), (65, 16), (130, 33)):
            yield Case("selective_state_update", selective_state_update_inputs(g, 5, dim, dstate, dtype), ("state",))
        for seqlen in (1, 65, 130):
            inputs = mamba_inner_inputs(g, seqlen=seqlen, dtype=dtype, initial=seqlen != 65, norms=seqlen == 65)
            yield Case("mamba_inner", {**inputs, "return_states": dtype == torch.float32})  # 16 bits: its states carry roundings, in fp32
        yield Case("mlp_projector", mlp_projector_inputs(g, dtype=dtype))
        yield Case("ldp_projector", ldp_projector_inputs(g, dtype=dtype))
        yield Case("rms_norm", {**rms_norm_inputs(g, 17, 100, dtype), "prenorm": True}, gradients=True)
        for seqlen, layout in ((3, False), (65, True)):
            inputs = causal_conv1d_inputs(g, 2, 65, seqlen, 4, dtype, initial=True)
            yield Case("causal_conv1d", {**inputs, "activation": "silu", "return_final_states": True}, gradients=True)
            inputs = selective_scan_inputs(g, 2, 40, seqlen, dtype=dtype, initial=True, channel_last=layout)
            yield Case("selective_scan", {**inputs, "return_last_state": True}, gradients=True)
        if dtype == torch.float32:  # in 16 bits the layers between are rounded, and a gradient's error has no limit of its own
            yield Case("mlp_projector", mlp_projector_inputs(g, dtype=dtype), gradients=True)
            yield Case("ldp_projector", ldp_projector_inputs(g, dtype=dtype), gradients=True)


def selftest(device: str | torch.device = "cpu", *, backend: str | None = None, verbose: bool = True) -> dict[str, float]:
    """Compares every op and its gradients with the reference in fp64 on `device`, printing one line per op.

    Returns {op: worst share of its error limit}; every value is at most 1. Raises CobraKernelsError naming the first call that
    is wrong, ArgumentError for an unknown backend, BackendUnavailable if a backend asked for by name cannot serve.
    """
    if backend is not None and backend not in ("reference", "cpu", "triton", "cuda"):
        raise ArgumentError(f"selftest: backend is {backend!r}, expected reference, cpu, triton, cuda or None")
    worst: dict[str, float] = {}
    counts: dict[str, int] = {}
    start = time.monotonic()
    for case in cases():
        moved = case._replace(kwargs={k: map_tensors(v, lambda t: t.to(device)) for k, v in case.kwargs.items()})
        with use_backend(backend):
            outputs = run(moved, None)
        for index, (got, want) in enumerate(zip(outputs, expected(case), strict=True)):
            limit = (GRADIENT_LIMITS if case.gradients else LIMITS)[got.dtype]
            if case.op in GEMM_OPS:
                limit = max(limit, GEMM_LIMIT)
                limit *= GEMM_OPS[case.op] if got.dtype != torch.float32 else 1  # every product's output is rounded, not only the last
            share = error(got, want) / limit
            if share > 1:
                shapes = {k: tuple(v.shape) for k, v in case.kwargs.items() if isinstance(v, torch.Tensor)}
                what = "output or gradient" if case.gradients else "output"
                raise CobraKernelsError(
                    f"selftest: {case.op} on {device} is wrong: {what} {index} ({got.dtype}) has L2-relative error {share * limit:.2e}, "
                    f"limit {limit:.1e}; arguments {shapes}. Please report this with the output of python -m cobra_kernels.doctor"
                )
            worst[case.op] = max(worst.get(case.op, 0.0), share)
        counts[case.op] = counts.get(case.op, 0) + 1
    if verbose:
        for op, share in worst.items():
            print(f"{op:24} {counts[op]:3} calls  worst error {share:4.0%} of the limit")
        print(f"all right on {device}, {len(ops.PLANS)} ops, {time.monotonic() - start:.1f} s")
    return worst
