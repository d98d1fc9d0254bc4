"""selective_scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t, out_t = y_t silu(z_t)."""

from __future__ import annotations

import torch

from ...checks import check_cu_seqlens, check_first, check_floats, name_of, requires_grad, shape_error
from ...dispatch import Backend, count, cpu_reason, cuda_reason, reference_reason, select, triton_reason
from ...errors import DtypeError, ShapeError
from ...library import OPS, define, differentiable, first_order_only, implement
from . import reference

OP = "selective_scan"


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The selective state space recurrence of Mamba-1 over a sequence.

    Args:
        u: (batch, dim, seqlen), fp32, bf16, fp16, or fp64 on `reference` and `cpu`; any strides. channel_first
            (stride(seqlen) == 1) and channel_last (stride(dim) == 1) are the fast layouts.
        delta: shape of u, any float dtype: the step size before bias and softplus.
        A: (dim, dstate), any float dtype; or complex (complex64, complex128 with fp64 u), on `reference` only.
        B, C: each (batch, dstate, seqlen), (batch, groups, dstate, seqlen) or constant (dim, dstate), any float dtype; channel d
            reads group d // (dim // groups). With complex A: constant ones complex, variable ones (.., 2 * seqlen), (re, im) interleaved.
        D: (dim,), the skip; none when absent.
        z: shape of u, the gate; none when absent.
        delta_bias: (dim,), added to delta; 0 when absent.
        delta_softplus: dt = log1p(exp(delta + bias)), the identity above 20, instead of delta + bias.
        return_last_state: also return the state after the last step.
        initial_state: (batch | num_seqs, dim, dstate), any float dtype (A's dtype when complex): the state before the first step; 0 when absent.
        cu_seqlens: (num_seqs + 1,) int32 or int64, batch 1: sequence i is positions cu_seqlens[i]:cu_seqlens[i+1]; each has
            its own state, nothing crosses a boundary, positions after the last one are padding with output 0.
        backend: "reference", "cpu", "triton", "cuda", or None for the default of u's device.

    Returns:
        out, shape, dtype and layout of u; or (out, last_state), last_state (batch | num_seqs, dim, dstate) contiguous in
        the compute dtype: fp32, fp64 for fp64 u, A's dtype when complex.

    Nothing is mutated. Gradients (first order): u, delta, A, B, C, D, z, delta_bias, initial_state, through out and last_state.
    Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable.
    In torch, for one step: `h = exp(dt[..., None] * A) * h + (dt * u)[..., None] * B[:, None]; y = (h * C[:, None]).sum(-1)`.
    Upstream: mamba_ssm `selective_scan_fn`. Source: Gu and Dao, arXiv 2312.00752.
    """
    name = _plan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, backend)
    if name == "reference":
        count(OP, name)
        out, last_state = reference.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    elif requires_grad(u, delta, A, B, C, D, z, delta_bias, initial_state):
        out, last_state, _ = OPS.selective_scan.default(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, name)
    else:
        out, last_state = _FORWARD[name](u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    return (out, last_state) if return_last_state else out


def plan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, *, initial_state=None,
    cu_seqlens=None, backend=None,
):  # fmt: skip
    """The backend that `selective_scan` of these arguments would run on; raises as it would. For supports()."""
    return _plan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, backend)


# --- checks ----------------------------------------------------------------------------------------------------------


def _plan(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, backend) -> str:
    check_first(OP, "u", u)
    if isinstance(A, torch.Tensor) and A.is_complex():
        check_floats(OP, "u", u, delta=delta, D=D, z=z, delta_bias=delta_bias)
        _check_complex(u, A, B, C, initial_state)
    else:
        check_floats(OP, "u", u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state)
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    rows, letter = u.shape[0], "batch"
    if cu_seqlens is not None:
        check_cu_seqlens(OP, cu_seqlens, "u", u)
        rows, letter = cu_seqlens.shape[0] - 1, "num_seqs"
    if initial_state is not None and initial_state.shape != (rows, *A.shape):
        why = f"{letter} comes from {'u' if letter == 'batch' else 'cu_seqlens'}, dim and dstate from A"
        raise shape_error(OP, "initial_state", initial_state, **{letter: rows}, dim=A.shape[0], dstate=A.shape[1], why=why)
    return select(OP, BACKENDS, backend, u, A)


def _check_complex(u, A, B, C, initial_state) -> None:
    expected = torch.complex128 if u.dtype == torch.float64 else torch.complex64
    for name, tensor in (("A", A), ("B", B), ("C", C), ("initial_state", initial_state)):
        if name == "initial_state" and tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise DtypeError(f"{OP}: {name} is {type(tensor).__name__}, expected a torch.Tensor")
        if name in ("B", "C") and tensor.dim() != 2:  # variable: real, interleaved
            check_floats(OP, "u", u, **{name: tensor})
        elif tensor.dtype != expected:
            raise DtypeError(f"{OP}: {name} has dtype {name_of(tensor.dtype)}, expected {name_of(expected)}; A is complex and u {name_of(u.dtype)}")
        elif tensor.device != u.device:
            raise DtypeError(f"{OP}: {name} is on {tensor.device}, expected {u.device}; the device comes from u")


def _check_shapes(u, delta, A, B, C, D, z, delta_bias) -> None:
    for name, tensor in (("delta", delta), ("A", A), ("B", B), ("C", C)):
        if tensor is None:
            raise DtypeError(f"{OP}: {name} is None, expected a torch.Tensor")
    if u.dim() != 3:
        raise ShapeError(f"{OP}: u has shape {tuple(u.shape)}, expected (batch, dim, seqlen)")
    batch, dim, seqlen = u.shape
    if delta.shape != u.shape:
        raise shape_error(OP, "delta", delta, batch=batch, dim=dim, seqlen=seqlen, why="the shape of u")
    if z is not None and z.shape != u.shape:
        raise shape_error(OP, "z", z, batch=batch, dim=dim, seqlen=seqlen, why="the shape of u")
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] < 1:
        raise shape_error(OP, "A", A, dim=dim, dstate="dstate >= 1", why="dim comes from u")
    dstate = A.shape[1]
    for name, tensor in (("B", B), ("C", C)):
        _check_projection(name, tensor, batch, dim, dstate, seqlen, A.is_complex())
    for name, tensor in (("D", D), ("delta_bias", delta_bias)):
        if tensor is not None and tensor.shape != (dim,):
            raise shape_error(OP, name, tensor, dim=dim, why="dim comes from u")


def _check_projection(name, tensor, batch, dim, dstate, seqlen, is_complex) -> None:
    if tensor.dim() == 2:
        if tensor.shape != (dim, dstate):
            raise shape_error(OP, name, tensor, dim=dim, dstate=dstate, why="constant over time: dim from u, dstate from A")
        return
    steps = {"2*seqlen": 2 * seqlen} if is_complex else {"seqlen": seqlen}
    (length,) = steps.values()
    if tensor.dim() == 3 and tensor.shape == (batch, dstate, length):
        return
    if tensor.dim() == 4 and (tensor.shape[0], *tensor.shape[2:]) == (batch, dstate, length):
        if tensor.shape[1] < 1 or dim % tensor.shape[1]:
            raise ShapeError(f"{OP}: {name} has {tensor.shape[1]} groups, expected a divisor of dim={dim}; dim comes from u")
        return
    groups = {"groups": "groups"} if tensor.dim() == 4 else {}
    raise shape_error(OP, name, tensor, batch=batch, **groups, dstate=dstate, **steps, why="batch and seqlen come from u, dstate from A")


def _real(reason):
    """`reason` of a kernel that reads real A only."""
    return lambda u, A: "complex A is served by reference only" if A.is_complex() else reason(u)


BACKENDS = {
    "reference": Backend(reference_reason, gradients="autograd of the reference"),
    "cpu": Backend(_real(cpu_reason), gradients="kernel"),
    "triton": Backend(_real(triton_reason), gradients="kernel"),
    "cuda": Backend(_real(cuda_reason), gradients="kernel"),
}


# --- torch ops -------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)
_GRADIENTS = ", ".join(["Tensor"] * 9)
STATE_CHUNK = 64  # steps between two saved states: kStateChunk of selective_scan.h


def _fwd_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens):
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(u), u.new_empty((rows, u.shape[1], A.shape[1]), dtype=_compute_dtype(u))


def _fwd_states_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, backend=None):
    out, last_state = _fwd_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)
    shape = (u.shape[0], state_slots(u, cu_seqlens), A.shape[1], u.shape[1])
    return out, last_state, u.new_empty(shape, dtype=_compute_dtype(u))


def _bwd_fake(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, states):
    return tuple(u.new_empty(0) if t is None else torch.empty_like(t) for t in (u, delta, A, B, C, D, z, delta_bias, initial_state))


def _compute_dtype(u):
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def state_slots(u, cu_seqlens) -> int:
    """Saved states of one batch row. Packed: the first of sequence i is slot cu_seqlens[i] // STATE_CHUNK + i."""
    seqlen = u.shape[2]
    return (seqlen + STATE_CHUNK - 1) // STATE_CHUNK if cu_seqlens is None else seqlen // STATE_CHUNK + cu_seqlens.shape[0] - 1


def _fwd_triton(*arguments):
    from . import triton_kernel

    count(OP, "triton")
    return triton_kernel.selective_scan_fwd(*arguments)


def _fwd_states_triton(*arguments):
    from . import triton_kernel

    count(OP, "triton")
    return triton_kernel.selective_scan_fwd(*arguments, state_slots=state_slots(arguments[0], arguments[-1]))


def _bwd_triton(*arguments):
    from . import triton_kernel

    count("selective_scan_bwd", "triton")
    return triton_kernel.selective_scan_bwd(*arguments)


# fwd_states also returns what the backward starts from: (batch, slots, dstate, dim) in the compute dtype, the state before every
# STATE_CHUNK-th step of each sequence.
for _suffix in ("", "_triton"):
    define(f"selective_scan_fwd{_suffix}({_ARGUMENTS}) -> (Tensor, Tensor)", _fwd_fake)
    define(f"selective_scan_fwd_states{_suffix}({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _fwd_states_fake)
    define(f"selective_scan_bwd{_suffix}(Tensor? dout, Tensor? dlast_state, {_ARGUMENTS}, Tensor states) -> ({_GRADIENTS})", _bwd_fake)
    first_order_only(f"selective_scan_bwd{_suffix}")

implement("selective_scan_fwd_triton", _fwd_triton, "CompositeExplicitAutograd")
implement("selective_scan_fwd_states_triton", _fwd_states_triton, "CompositeExplicitAutograd")
implement("selective_scan_bwd_triton", _bwd_triton, "CompositeExplicitAutograd")


def _table(op: str) -> dict:
    compiled, triton = getattr(OPS, op).default, getattr(OPS, f"{op}_triton").default
    return {"cpu": compiled, "cuda": compiled, "triton": triton}


_FORWARD, _FORWARD_STATES, _BACKWARD = (_table(f"selective_scan_{name}") for name in ("fwd", "fwd_states", "bwd"))


def _differentiable(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, backend):
    return _FORWARD_STATES[backend](u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, initial_state, cu_seqlens, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, output[2])


def _backward(ctx, dout, dlast_state, _):
    *tensors, initial_state, cu_seqlens, states = ctx.saved_tensors
    grads = _BACKWARD[ctx.backend](dout, dlast_state, *tensors, ctx.delta_softplus, initial_state, cu_seqlens, states)
    present = [None if t is None else g for t, g in zip((*tensors, initial_state), grads)]
    return *present[:8], None, present[8], None, None


define(f"selective_scan({_ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor)", _fwd_states_fake)
differentiable("selective_scan", _differentiable, setup_context=_setup_context, backward=_backward)
