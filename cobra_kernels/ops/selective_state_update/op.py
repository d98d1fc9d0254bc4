"""selective_state_update, one step in place: h = exp(dt A) h + dt B x; out = (sum_n C h + D x) * silu(z)."""

from __future__ import annotations

import torch

from ...checks import check_first, check_floats, check_given, check_index, name_of, reads_values, requires_grad, shape_error
from ...dispatch import Backend, count, cpu_reason, cuda_reason, reference_reason, select, triton_reason
from ...errors import ArgumentError, DtypeError, ShapeError
from ...library import OPS, define, implement
from . import reference

OP = "selective_state_update"


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """One decode step of the selective scan; `state` is updated in place.

    Mamba-1 form, and in brackets the multi-head form that a 4-dim state selects. Float arguments are read in their own dtype,
    any mix of fp32, bf16 and fp16, or all fp64 on `reference` and `cpu`; any strides, expanded (stride 0) ones included.

    Args:
        state: (batch, dim, dstate) [(batch, heads, dim, dstate)], **written in place**: computed in fp32, stored with
            round-to-nearest in its own dtype. With state_batch_indices: (pool, ...).
        x, dt: (batch, dim) [(batch, heads, dim)].
        A: (dim, dstate) [(heads, dim, dstate)]; on a CPU, where its stride along dstate is 0, one exponential serves a channel.
        B, C: (batch, dstate) or (batch, groups, dstate) [the latter only]. Channel d reads group d // (dim // groups)
            [head h reads group h // (heads // groups)].
        D: (dim,) [(heads, dim)]; no skip connection when absent.
        z: like x; out is multiplied by silu(z); no gate when absent.
        dt_bias: (dim,) [(heads, dim)], added to dt; none when absent.
        dt_softplus: dt = softplus(dt + dt_bias), the identity above 20.
        state_batch_indices: (batch,), int32 or int64: row of the pool that batch row i reads and writes; without it, row i.
            Negative: padding, out is 0 and the state untouched. A row named twice, or beyond the pool, is an error on CPU
            (on CUDA: undefined, but never an access outside the pool; COBRA_KERNELS_CHECK=1 checks there too).
        backend: "reference", "cpu", "triton", "cuda", or None for the default of x's device.

    Returns:
        out, shape, dtype and layout of x. It never requires grad: this op is forward only and runs as under no_grad.

    Complex A (complex64; complex128 with fp64) takes complex state, B and C and gives 2 Re(sum_n C h): `reference` only.
    Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable; nothing is written then.
    In torch: `state.mul_(exp(dt[..., None] * A)).add_((dt * x)[..., None] * B[:, None]); out = (state * C[:, None]).sum(-1)`.
    Upstream: mamba_ssm `selective_state_update`.
    """
    name = _plan(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, backend)
    if requires_grad(state, x, dt, A, B, C, D, z, dt_bias):
        with torch.no_grad():
            return _run(name, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    return _run(name, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def plan(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None, *, backend=None
):  # fmt: skip
    """The backend that `selective_state_update` of these arguments would run on; raises as it would. For supports()."""
    return _plan(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, backend)


def _run(name, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    if name == "reference":
        count(OP, name)
        run = reference.selective_state_update
    else:
        run = _FORWARD[name]
    return run(state.detach(), x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


# --- checks ----------------------------------------------------------------------------------------------------------


def _plan(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, backend) -> str:
    check_first(OP, "x", x)
    check_given(OP, state=state, dt=dt, A=A, B=B, C=C)
    if isinstance(A, torch.Tensor) and A.is_complex():
        _check_complex(x, state=state, A=A, B=B, C=C)
        check_floats(OP, "x", x, dt=dt, D=D, z=z, dt_bias=dt_bias)
    else:
        check_floats(OP, "x", x, state=state, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    pooled = state_batch_indices is not None
    if not _shapes_agree(state, x, dt, A, B, C, D, z, dt_bias, pooled):
        _check_shapes(state, x, dt, A, B, C, D, z, dt_bias, pooled)
    if state_batch_indices is not None:
        check_index(OP, "state_batch_indices", state_batch_indices, "x", x)
        if state_batch_indices.shape != (x.shape[0],):
            raise shape_error(OP, "state_batch_indices", state_batch_indices, batch=x.shape[0], why="batch comes from x")
        if reads_values(state_batch_indices):
            _check_rows(state_batch_indices.tolist(), state.shape[0])
    return select(OP, BACKENDS, backend, x, A)


def _check_complex(x, **tensors) -> None:
    expected = torch.complex128 if x.dtype == torch.float64 else torch.complex64
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != expected:
            got = name_of(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise DtypeError(f"{OP}: {name} has dtype {got}, expected {name_of(expected)}; A is complex and x {name_of(x.dtype)}")
        if tensor.device != x.device:
            raise DtypeError(f"{OP}: {name} is on {tensor.device}, expected {x.device}; the device comes from x")


def _shapes_agree(state, x, dt, A, B, C, D, z, dt_bias, pooled: bool) -> bool:
    """Whether all is plainly well. If not, `_check_shapes` finds out what is wrong, if anything: this runs once per token and
    layer, the messages do not."""
    states, rows, projected = state.shape, x.shape, B.shape
    channels, dims = rows[1:], len(states)
    return (
        (dims == 3 and len(projected) in (2, 3) or dims == 4 and len(projected) == 3)
        and states[1:-1] == channels
        and states[-1] >= 1
        and (pooled or states[0] == rows[0])
        and 0 not in state.stride()
        and dt.shape == rows
        and (z is None or z.shape == rows)
        and A.shape == states[1:]
        and (D is None or D.shape == channels)
        and (dt_bias is None or dt_bias.shape == channels)
        and C.shape == projected
        and projected[0] == rows[0]
        and projected[-1] == states[-1]
        and (len(projected) == 2 or projected[1] >= 1 and channels[0] % projected[1] == 0)
    )


def _check_shapes(state, x, dt, A, B, C, D, z, dt_bias, pooled: bool) -> None:
    if state.dim() not in (3, 4):
        raise ShapeError(f"{OP}: state has shape {tuple(state.shape)}, expected (batch, dim, dstate) or (batch, heads, dim, dstate)")
    heads = state.dim() == 4
    if x.dim() != state.dim() - 1:
        letters = "(batch, heads, dim)" if heads else "(batch, dim)"
        raise ShapeError(f"{OP}: x has shape {tuple(x.shape)}, expected {letters}; state has {state.dim()} dims")
    batch, dstate = x.shape[0], state.shape[-1]
    channels = {"heads": x.shape[1], "dim": x.shape[2]} if heads else {"dim": x.shape[1]}
    inner = tuple(channels.values())
    rows = {"pool": state.shape[0]} if pooled else {"batch": batch}
    if tuple(state.shape) != (*rows.values(), *inner, dstate):
        raise shape_error(OP, "state", state, **rows, **channels, dstate="dstate", why=f"{', '.join([*rows, *channels])} come from x")
    if dstate < 1:
        raise shape_error(OP, "state", state, **rows, **channels, dstate="dstate >= 1")
    for dim in range(state.dim()):
        if state.stride(dim) == 0 and state.shape[dim] > 1:
            raise ArgumentError(f"{OP}: state is expanded (stride 0 at dim {dim}) but written in place; pass a copy of it")
    for name, tensor in (("dt", dt), ("z", z)):
        if tensor is not None and tensor.shape != x.shape:
            raise shape_error(OP, name, tensor, batch=batch, **channels, why="the shape of x")
    if tuple(A.shape) != (*inner, dstate):
        raise shape_error(OP, "A", A, **channels, dstate=dstate, why=f"{', '.join(channels)} from x, dstate from state")
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        if tensor is not None and tuple(tensor.shape) != inner:
            raise shape_error(OP, name, tensor, **channels, why=f"{', '.join(channels)} from x")
    if B.dim() != 3 and (heads or B.dim() != 2) or B.shape[0] != batch or B.shape[-1] != dstate:
        raise shape_error(OP, "B", B, batch=batch, groups="groups", dstate=dstate, why="batch from x, dstate from state")
    if B.dim() == 3 and (B.shape[1] < 1 or inner[0] % B.shape[1]):
        letter = "heads" if heads else "dim"
        raise ShapeError(f"{OP}: B has {B.shape[1]} groups, expected a divisor of {letter}={inner[0]}; {letter} comes from x")
    if C.shape != B.shape:
        raise ShapeError(f"{OP}: C has shape {tuple(C.shape)}, expected {tuple(B.shape)}, the shape of B")


def _check_rows(rows: list[int], pool: int) -> None:
    seen = set()
    for i, row in enumerate(rows):
        if row >= pool:
            raise ArgumentError(f"{OP}: state_batch_indices[{i}] is {row}, expected less than pool={pool}; pool comes from state")
        if row >= 0 and row in seen:
            raise ArgumentError(f"{OP}: state_batch_indices[{i}] is {row}, which an earlier batch row already writes")
        seen.add(row)


def _real(reason):
    """`reason` of a kernel that reads real A only."""
    return lambda x, A: "complex A is served by reference only" if A.is_complex() else reason(x)


BACKENDS = {
    "reference": Backend(reference_reason, gradients="none (forward only)"),
    "cpu": Backend(_real(cpu_reason), gradients="none (forward only)"),
    "triton": Backend(_real(triton_reason), gradients="none (forward only)"),
    "cuda": Backend(_real(cuda_reason), gradients="none (forward only)"),
}


# --- torch op --------------------------------------------------------------------------------------------------------


def _fwd_fake(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    return torch.empty_like(x)


def _fwd_triton(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    from . import triton_kernel

    count(OP, "triton")
    return triton_kernel.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


for _suffix in ("", "_triton"):
    define(
        f"selective_state_update_fwd{_suffix}(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices) -> Tensor",
        _fwd_fake,
    )
implement("selective_state_update_fwd_triton", _fwd_triton, "CompositeExplicitAutograd")

_FORWARD = {name: OPS.selective_state_update_fwd.default for name in ("cpu", "cuda")} | {
    "triton": OPS.selective_state_update_fwd_triton.default
}
