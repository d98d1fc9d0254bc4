"""causal_conv1d_update, a few new steps of causal_conv1d: earlier inputs come from conv_state, which is written in place."""

from __future__ import annotations

import torch

from ...checks import check_first, check_floats, check_given, check_index, reads_values, requires_grad, shape_error
from ...dispatch import Backend, count, cpu_reason, cuda_reason, reference_reason, select, triton_reason
from ...errors import ArgumentError, ShapeError
from ...library import OPS, define, implement
from ..causal_conv1d.op import check_activation, check_not_expanded, check_weight
from . import reference

OP = "causal_conv1d_update"


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """causal_conv1d of one or a few new steps; `conv_state` is updated in place.

    Args:
        x: (batch, dim) or (batch, dim, steps), fp32, bf16, fp16, or fp64 on `reference` and `cpu`; any strides.
        conv_state: (batch, dim, state_len), state_len >= width - 1, any float dtype and strides, **written in place**: the
            earlier inputs, newest last; kept values and, when the dtypes agree, new ones are copied bit for bit. With
            conv_state_indices: (pool, dim, state_len).
        weight: (dim, width), any width >= 1, any float dtype.
        bias: (dim,), any float dtype; 0 when absent.
        activation: None, "silu" or "swish" (the same); True and False as upstream.
        cache_seqlens: (batch,), int32 or int64: steps seen so far. conv_state is then circular: the window ends at column
            cache_seqlens - 1, step s is written at cache_seqlens + s, both modulo state_len; steps <= state_len. Without it
            conv_state becomes the last state_len columns of cat(conv_state, x).
        conv_state_indices: (batch,), int32 or int64: row of the pool that batch row i reads and writes; without it, row i.
            Negative: padding, out is 0 and the state untouched. A row named twice, or beyond the pool, is an error on CPU (on
            CUDA: undefined, but never an access outside the pool; COBRA_KERNELS_CHECK=1 checks there too).
        backend: "reference", "cpu", "triton", "cuda", or None for the default of x's device.

    Returns:
        out, shape, dtype and layout of x. It never requires grad: this op is forward only and runs as under no_grad.

    Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable; nothing is written then.
    In torch: `full = cat([conv_state, x], -1); out = F.conv1d(full, weight[:, None], bias, groups=dim)[..., -steps:]`, then
    `conv_state.copy_(full[..., -state_len:])`. Upstream: causal_conv1d `causal_conv1d_update`.
    """
    activation = {True: "silu", False: None}[activation] if isinstance(activation, bool) else activation
    name = _plan(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend)
    if requires_grad(x, conv_state, weight, bias):
        with torch.no_grad():
            return _run(name, x, conv_state, weight, bias, activation is not None, cache_seqlens, conv_state_indices)
    return _run(name, x, conv_state, weight, bias, activation is not None, cache_seqlens, conv_state_indices)


def plan(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None, *, backend=None
):  # fmt: skip
    """The backend that `causal_conv1d_update` of these arguments would run on; raises as it would. For supports()."""
    activation = {True: "silu", False: None}[activation] if isinstance(activation, bool) else activation
    return _plan(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend)


def _run(name, x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    if name == "reference":
        count(OP, name)
        run = reference.causal_conv1d_update
    else:
        run = _FORWARD[name]
    return run(x, conv_state.detach(), weight, bias, silu, cache_seqlens, conv_state_indices)


# --- checks ----------------------------------------------------------------------------------------------------------


def _plan(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, backend) -> str:
    check_first(OP, "x", x)
    check_given(OP, conv_state=conv_state, weight=weight)
    check_floats(OP, "x", x, conv_state=conv_state, weight=weight, bias=bias)
    check_activation(OP, activation)
    if x.dim() not in (2, 3):
        raise ShapeError(f"{OP}: x has shape {tuple(x.shape)}, expected (batch, dim) or (batch, dim, steps)")
    batch, dim = x.shape[:2]
    width = check_weight(OP, weight, bias, dim)
    pooled = conv_state_indices is not None
    if conv_state.dim() != 3 or conv_state.shape[1] != dim or not pooled and conv_state.shape[0] != batch:
        rows = {"pool": "pool"} if pooled else {"batch": batch}
        raise shape_error(OP, "conv_state", conv_state, **rows, dim=dim, state_len="state_len", why="batch and dim come from x")
    state_len = conv_state.shape[2]
    if state_len < width - 1:
        raise ShapeError(f"{OP}: conv_state has state_len={state_len}, expected at least width - 1 = {width - 1}; width comes from weight")
    check_not_expanded(OP, "conv_state", conv_state)
    for name, tensor in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if tensor is not None:
            check_index(OP, name, tensor, "x", x)
            if tensor.shape != (batch,):
                raise shape_error(OP, name, tensor, batch=batch, why="batch comes from x")
    if cache_seqlens is not None:
        steps = x.shape[2] if x.dim() == 3 else 1
        if steps > state_len:
            raise ShapeError(f"{OP}: x has steps={steps}, expected at most state_len={state_len} with cache_seqlens; it comes from conv_state")
    if pooled and reads_values(conv_state_indices):
        _check_rows(conv_state_indices.tolist(), conv_state.shape[0])
    return select(OP, BACKENDS, backend, x)


def _check_rows(rows: list[int], pool: int) -> None:
    seen = set()
    for i, row in enumerate(rows):
        if row >= pool:
            raise ArgumentError(f"{OP}: conv_state_indices[{i}] is {row}, expected less than pool={pool}; pool comes from conv_state")
        if row >= 0 and row in seen:
            raise ArgumentError(f"{OP}: conv_state_indices[{i}] is {row}, which an earlier batch row already writes")
        seen.add(row)


BACKENDS = {
    "reference": Backend(reference_reason, gradients="none (forward only)"),
    "cpu": Backend(cpu_reason, gradients="none (forward only)"),
    "triton": Backend(triton_reason, gradients="none (forward only)"),
    "cuda": Backend(cuda_reason, gradients="none (forward only)"),
}


# --- torch op --------------------------------------------------------------------------------------------------------


def _fwd_fake(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices):
    return torch.empty_like(x)


def _fwd_triton(*arguments):
    from . import triton_kernel

    count(OP, "triton")
    return triton_kernel.causal_conv1d_update(*arguments)


for _suffix in ("", "_triton"):
    define(
        f"causal_conv1d_update_fwd{_suffix}(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
        "Tensor? cache_seqlens, Tensor? conv_state_indices) -> Tensor",
        _fwd_fake,
    )
implement("causal_conv1d_update_fwd_triton", _fwd_triton, "CompositeExplicitAutograd")

_FORWARD = {name: OPS.causal_conv1d_update_fwd.default for name in ("cpu", "cuda")} | {
    "triton": OPS.causal_conv1d_update_fwd_triton.default
}
