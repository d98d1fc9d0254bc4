"""causal_conv1d: y_t = bias + sum_w weight[:, w] x_{t - width + 1 + w}, then SiLU if asked."""

from __future__ import annotations

import torch

from ...checks import check_cu_seqlens, check_first, check_floats, check_given, check_index, requires_grad, shape_error
from ...dispatch import Backend, count, cpu_reason, cuda_reason, reference_reason, select, triton_reason
from ...errors import ArgumentError, ShapeError
from ...library import OPS, define, differentiable, first_order_only, implement
from . import reference

OP = "causal_conv1d"


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution over time, with an optional SiLU.

    Args:
        x: (batch, dim, seqlen), fp32, bf16, fp16, or fp64 on `reference` and `cpu`; any strides. Channel-first (stride 1 along
            seqlen) and channel-last (stride 1 along dim) are both fast.
        weight: (dim, width), any width >= 1, any float dtype.
        bias: (dim,), any float dtype; 0 when absent.
        seq_idx: (batch, seqlen), int32 or int64: taps with another seq_idx than the step they serve count 0; a negative
            seq_idx is padding, output and gradient exactly 0. Not together with states or cu_seqlens.
        initial_states: (batch | num_seqs, dim, width - 1), the inputs before the first, oldest first, any float dtype; zeros
            when absent.
        return_final_states: also return the last width - 1 inputs of every sequence (before weight and activation).
        final_states_out: (batch | num_seqs, dim, width - 1), written with the final states and returned in their place.
        activation: None, "silu" or "swish" (the same).
        cu_seqlens: (num_seqs + 1,), int32 or int64: several sequences packed in one batch row; sequence i is positions
            cu_seqlens[i]:cu_seqlens[i + 1], what follows the last is padding (output 0). Needs batch 1.
        backend: "reference", "cpu", "triton", "cuda", or None for the default of x's device.

    Returns:
        y, shape, dtype and layout of x; or (y, final_states (batch | num_seqs, dim, width - 1) in x's dtype, contiguous).

    Only final_states_out is mutated. Gradients (first order): x, weight, bias, initial_states, also through final_states.
    Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable; nothing is written then.
    In torch: `F.conv1d(x, weight[:, None], bias, padding=width - 1, groups=dim)[..., :seqlen]`.
    Upstream: causal_conv1d `causal_conv1d_fn`.
    """
    name = _plan(
        x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, cu_seqlens, backend
    )  # fmt: skip
    silu = activation is not None
    if name == "reference":
        count(OP, name)
        y, final_states = reference.causal_conv1d(x, weight, bias, seq_idx, initial_states, silu, cu_seqlens)
    elif requires_grad(x, weight, bias, initial_states):
        y, final_states = OPS.causal_conv1d.default(
            x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens, name
        )  # fmt: skip
    else:
        y, final_states = _FORWARD[name](x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens)
    if not return_final_states:
        return y
    return y, (final_states if final_states_out is None else final_states_out.copy_(final_states))


def plan(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, activation=None,
    *, cu_seqlens=None, backend=None,
):  # fmt: skip
    """The backend that `causal_conv1d` of these arguments would run on; raises as it would. For supports()."""
    return _plan(
        x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, cu_seqlens, backend
    )  # fmt: skip


# --- checks ----------------------------------------------------------------------------------------------------------


def _plan(
    x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, cu_seqlens, backend
) -> str:  # fmt: skip
    check_first(OP, "x", x)
    check_given(OP, weight=weight)
    check_floats(OP, "x", x, weight=weight, bias=bias, initial_states=initial_states, final_states_out=final_states_out)
    check_activation(OP, activation)
    if x.dim() != 3:
        raise ShapeError(f"{OP}: x has shape {tuple(x.shape)}, expected (batch, dim, seqlen)")
    batch, dim, seqlen = x.shape
    width = check_weight(OP, weight, bias, dim)

    states = {"batch": batch}
    if cu_seqlens is not None:
        check_cu_seqlens(OP, cu_seqlens, "x", x)
        states = {"num_seqs": cu_seqlens.shape[0] - 1}
    if seq_idx is not None:
        check_index(OP, "seq_idx", seq_idx, "x", x)
        if seq_idx.shape != (batch, seqlen):
            raise shape_error(OP, "seq_idx", seq_idx, batch=batch, seqlen=seqlen, why="batch and seqlen come from x")
        excluded = {
            "initial_states": initial_states is not None,
            "return_final_states": return_final_states,
            "cu_seqlens": cu_seqlens is not None,
        }
        for name, given in excluded.items():
            if given:
                raise ShapeError(f"{OP}: seq_idx was given with {name}, expected one of the two; seq_idx has no states")
    for name, tensor in (("initial_states", initial_states), ("final_states_out", final_states_out)):
        if tensor is not None and tuple(tensor.shape) != (*states.values(), dim, width - 1):
            why = f"{next(iter(states))} comes from {'x' if cu_seqlens is None else 'cu_seqlens'}, dim from x, width from weight"
            raise shape_error(OP, name, tensor, **states, dim=dim, **{"width - 1": width - 1}, why=why)
    if final_states_out is not None:
        if not return_final_states:
            raise ArgumentError(f"{OP}: final_states_out was given with return_final_states=False, expected True")
        check_not_expanded(OP, "final_states_out", final_states_out)
    return select(OP, BACKENDS, backend, x)


def check_activation(op: str, activation) -> None:
    """None, "silu" or "swish"."""
    if activation not in (None, "silu", "swish"):
        raise ArgumentError(f"{op}: activation is {activation!r}, expected None, 'silu' or 'swish'")


def check_weight(op: str, weight: torch.Tensor, bias: torch.Tensor | None, dim: int) -> int:
    """The width of weight (dim, width); bias is (dim,)."""
    if weight.dim() != 2 or weight.shape[0] != dim:
        raise shape_error(op, "weight", weight, dim=dim, width="width", why="dim comes from x")
    if weight.shape[1] < 1:
        raise shape_error(op, "weight", weight, dim=dim, width="width >= 1")
    if bias is not None and bias.shape != (dim,):
        raise shape_error(op, "bias", bias, dim=dim, why="dim comes from x")
    return weight.shape[1]


def check_not_expanded(op: str, name: str, tensor: torch.Tensor) -> None:
    """A tensor that is written holds every element once."""
    for d in range(tensor.dim()):
        if tensor.stride(d) == 0 and tensor.shape[d] > 1:
            raise ArgumentError(f"{op}: {name} is expanded (stride 0 at dim {d}) but written in place; pass a copy of it")


BACKENDS = {
    "reference": Backend(reference_reason, gradients="autograd of the reference"),
    "cpu": Backend(cpu_reason, gradients="kernel"),
    "triton": Backend(triton_reason, gradients="kernel"),
    "cuda": Backend(cuda_reason, gradients="kernel"),
}


# --- torch ops -------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool return_final_states, bool silu, "
    "Tensor? cu_seqlens"
)
_GRADIENTS = (
    "Tensor dy, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, "
    "bool silu, Tensor? cu_seqlens"
)


def _fwd_fake(x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens, backend=None):
    if not return_final_states:
        return torch.empty_like(x), x.new_empty(0)
    states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), x.new_empty((states, x.shape[1], weight.shape[1] - 1))


def _bwd_fake(dy, dfinal_states, x, weight, bias, seq_idx, initial_states, silu, cu_seqlens):
    return (
        torch.empty_like(x),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
        x.new_empty(0) if initial_states is None else initial_states.new_empty(initial_states.shape),
    )


def _fwd_triton(*arguments):
    from . import triton_kernel

    count(OP, "triton")
    return triton_kernel.causal_conv1d_fwd(*arguments)


def _bwd_triton(*arguments):
    from . import triton_kernel

    count("causal_conv1d_bwd", "triton")
    return triton_kernel.causal_conv1d_bwd(*arguments)


for _suffix in ("", "_triton"):
    define(f"causal_conv1d_fwd{_suffix}({_ARGUMENTS}) -> (Tensor, Tensor)", _fwd_fake)
    define(f"causal_conv1d_bwd{_suffix}({_GRADIENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _bwd_fake)
    first_order_only(f"causal_conv1d_bwd{_suffix}")
implement("causal_conv1d_fwd_triton", _fwd_triton, "CompositeExplicitAutograd")
implement("causal_conv1d_bwd_triton", _bwd_triton, "CompositeExplicitAutograd")

_FORWARD = {name: OPS.causal_conv1d_fwd.default for name in ("cpu", "cuda")} | {"triton": OPS.causal_conv1d_fwd_triton.default}
_BACKWARD = {name: OPS.causal_conv1d_bwd.default for name in ("cpu", "cuda")} | {"triton": OPS.causal_conv1d_bwd_triton.default}


def _differentiable(x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens, backend):
    return _FORWARD[backend](x, weight, bias, seq_idx, initial_states, return_final_states, silu, cu_seqlens)


def _setup_context(ctx, inputs, output):
    x, weight, bias, seq_idx, initial_states, ctx.return_final_states, ctx.silu, cu_seqlens, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, seq_idx, initial_states, cu_seqlens)


def _backward(ctx, dy, dfinal_states):
    x, weight, bias, seq_idx, initial_states, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(()).expand(x.shape)
    if not ctx.return_final_states:
        dfinal_states = None
    dx, dweight, dbias, dinitial_states = _BACKWARD[ctx.backend](
        dy, dfinal_states, x, weight, bias, seq_idx, initial_states, ctx.silu, cu_seqlens
    )  # fmt: skip
    dbias = None if bias is None else dbias
    dinitial_states = None if initial_states is None else dinitial_states
    return dx, dweight, dbias, None, dinitial_states, None, None, None, None


define(f"causal_conv1d({_ARGUMENTS}, str backend) -> (Tensor, Tensor)", _fwd_fake)
differentiable(OP, _differentiable, setup_context=_setup_context, backward=_backward)
