"""mamba_inner: a Mamba block between its first product and its output, in one op that keeps next to nothing for its backward.

    x, z = xz;  u = silu(conv1d(x));  dt, B, C = u W_x;  delta = dt W_dt
    out = (selective_scan(u, delta, A, B, C, D) silu(z)) W_out
"""

from __future__ import annotations

import torch

from ...checks import autocast_dtype, check_cu_seqlens, check_first, check_floats, check_given, name_of, requires_grad, shape_error
from ...dispatch import Backend, count, cpu_reason, cuda_reason, reference_reason, select, triton_reason
from ...errors import ArgumentError, DtypeError, ShapeError
from ...library import OPS, define, differentiable, first_order_only, implement
from . import fused, reference
from .arguments import DIFFERENTIABLE, Arguments

OP = "mamba_inner"


def mamba_inner(
    xz: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    x_proj_weight: torch.Tensor,
    delta_proj_weight: torch.Tensor,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor | None = None,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    B_proj_bias: torch.Tensor | None = None,
    C_proj_bias: torch.Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: torch.Tensor | None = None,
    c_rms_weight: torch.Tensor | None = None,
    dt_rms_weight: torch.Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
    *,
    initial_conv_state: torch.Tensor | None = None,
    initial_ssm_state: torch.Tensor | None = None,
    return_states: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inside of a Mamba block, for training: convolution, SiLU, the two small products, scan, gate and output product.

    Args:
        xz: (batch, 2 * dim, seqlen), x first, then the gate z; fp32, bf16, fp16, or fp64 on `reference` and `cpu`. Channel-last
            (stride(dim) == 1) is read in place, any other layout through one copy.
        conv1d_weight: (dim, 1, width), any float dtype, as all below. conv1d_bias: (dim,); 0 when absent.
        x_proj_weight: (dt_rank [+ dstate] [+ dstate], dim): rows of dt, B, C; those of B and of C absent when it is given.
        delta_proj_weight: (dim, dt_rank).
        out_proj_weight: (d_model, dim). out_proj_bias: (d_model,); 0 when absent.
        A: (dim, dstate); complex on `reference` only, x_proj_weight then has 2 * dstate rows (re, im) for each of B and C.
        B, C: as selective_scan's; made from x_proj_weight when absent.
        D: (dim,), the skip; none when absent. delta_bias: (dim,); 0 when absent.
        B_proj_bias, C_proj_bias: (dstate,), added to what x_proj_weight made.
        delta_softplus: dt = softplus(delta + bias).
        checkpoint_lvl: 1 keeps xz and x_proj's output, and makes the rest again in the backward; 0 keeps that too. Same bits.
        b_rms_weight, c_rms_weight: (dstate,), an RMS norm of B and C; dt_rms_weight: (dim,), of delta. b_c_dt_rms_eps: of all three.
        initial_conv_state: (batch | num_seqs, dim, width - 1), the inputs before the first; initial_ssm_state (batch | num_seqs, dim,
            dstate); zeros when absent.
        return_states: also return both states after the last step.
        cu_seqlens: (num_seqs + 1,) int32 or int64, batch 1: sequences packed end to end; positions after the last are padding, output 0.
        backend: "reference", "cpu", "triton", "cuda", or None for the default of xz's device.

    Returns:
        out (batch, seqlen, d_model), dtype of xz; or (out, conv_state like initial_conv_state in xz's dtype, ssm_state like
        initial_ssm_state in fp32, fp64 for fp64).

    Operands of a product meet in the wider of their dtypes; what it returns, and what every stage hands on, is rounded to xz's. Under
    autocast they are cast to its dtype as nn.Linear would, and out has it; convolution, A, D, delta_bias and the scan keep theirs.
    Nothing is mutated. Gradients (first order): every float tensor, through out and both states. Upstream drops the norms' weights.
    Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable.
    In torch: causal_conv1d, F.linear, F.linear, selective_scan, F.linear. Upstream: mamba_ssm `mamba_inner_fn`.
    """
    gemm_dtype = autocast_dtype(xz)
    a = Arguments(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias,
        B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight, initial_conv_state, initial_ssm_state, cu_seqlens,
        delta_softplus, b_c_dt_rms_eps, return_states, checkpoint_lvl, gemm_dtype, backend,
    )  # fmt: skip
    name = _plan(a)
    if name == "reference":
        count(OP, name)
        out, conv_state, ssm_state = reference.mamba_inner(a)
    else:
        kept = checkpoint_lvl if requires_grad(*a[: len(DIFFERENTIABLE)]) else 1  # without a backward there is nothing to keep
        out, conv_state, ssm_state, *_ = OPS.mamba_inner.default(*a._replace(backend=name, checkpoint_lvl=kept))
    return (out, conv_state, ssm_state) if return_states else out


def plan(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None, D=None,
    delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None, b_c_dt_rms_eps=1e-6, *, initial_conv_state=None, initial_ssm_state=None, return_states=False, cu_seqlens=None,
    backend=None,
):  # fmt: skip
    """The backend that `mamba_inner` of these arguments would run on; raises as it would. For supports()."""
    return _plan(Arguments(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, delta_bias,
        B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight, dt_rms_weight, initial_conv_state, initial_ssm_state, cu_seqlens,
        delta_softplus, b_c_dt_rms_eps, return_states, checkpoint_lvl, None, backend,
    ))  # fmt: skip


# --- checks ----------------------------------------------------------------------------------------------------------


def _plan(a: Arguments) -> str:
    check_first(OP, "xz", a.xz)
    check_given(OP, **{name: getattr(a, name) for name in _REQUIRED})
    is_complex = isinstance(a.A, torch.Tensor) and a.A.is_complex()
    tensors = {name: getattr(a, name) for name in DIFFERENTIABLE[1:]}
    if is_complex:
        expected = torch.complex128 if a.xz.dtype == torch.float64 else torch.complex64
        for name in ("A", "B", "C", "initial_ssm_state"):
            tensor = tensors[name]
            if isinstance(tensor, torch.Tensor) and (name not in ("B", "C") or tensor.dim() == 2):  # variable B, C: real, interleaved
                if tensor.dtype != expected:
                    why = f"A is complex and xz {name_of(a.xz.dtype)}"
                    raise DtypeError(f"{OP}: {name} has dtype {name_of(tensor.dtype)}, expected {name_of(expected)}; {why}")
                del tensors[name]
    check_floats(OP, "xz", a.xz, **tensors)
    if a.checkpoint_lvl not in (0, 1):
        raise ArgumentError(f"{OP}: checkpoint_lvl is {a.checkpoint_lvl!r}, expected 0 or 1")
    _check_shapes(a, 2 if is_complex else 1)
    _check_states(a)
    return select(OP, BACKENDS, a.backend, a.xz, a.A)


def _check_shapes(a, parts: int) -> None:
    if a.xz.dim() != 3 or a.xz.shape[1] % 2:
        raise ShapeError(f"{OP}: xz has shape {tuple(a.xz.shape)}, expected (batch, 2 * dim, seqlen)")
    batch, dim, seqlen = a.xz.shape[0], a.xz.shape[1] // 2, a.xz.shape[2]
    weight = a.conv1d_weight
    if weight.dim() != 3 or tuple(weight.shape[:2]) != (dim, 1) or weight.shape[2] < 1:
        raise shape_error(OP, "conv1d_weight", weight, dim=dim, one="1", width="width >= 1", why="dim is half of xz's")
    if a.A.dim() != 2 or a.A.shape[0] != dim or a.A.shape[1] < 1:
        raise shape_error(OP, "A", a.A, dim=dim, dstate="dstate >= 1", why="dim is half of xz's")
    if a.delta_proj_weight.dim() != 2 or a.delta_proj_weight.shape[0] != dim:
        raise shape_error(OP, "delta_proj_weight", a.delta_proj_weight, dim=dim, dt_rank="dt_rank", why="dim is half of xz's")
    rank, dstate = a.delta_proj_weight.shape[1], a.A.shape[1]
    made = [name for name in ("B", "C") if getattr(a, name) is None]
    rows = rank + len(made) * dstate * parts
    if tuple(a.x_proj_weight.shape) != (rows, dim):
        letters = "".join(f" + {'2 * ' * (parts == 2)}dstate for {name}" for name in made)
        why = f"dt_rank={rank} comes from delta_proj_weight, dstate={dstate} from A, dim is half of xz's"
        raise shape_error(OP, "x_proj_weight", a.x_proj_weight, **{f"dt_rank{letters}": rows}, dim=dim, why=why)
    if a.out_proj_weight.dim() != 2 or a.out_proj_weight.shape[1] != dim:
        raise shape_error(OP, "out_proj_weight", a.out_proj_weight, d_model="d_model", dim=dim, why="dim is half of xz's")
    d_model = a.out_proj_weight.shape[0]
    if a.out_proj_bias is not None and a.out_proj_bias.shape != (d_model,):
        raise shape_error(OP, "out_proj_bias", a.out_proj_bias, d_model=d_model, why="d_model comes from out_proj_weight")
    for name in ("conv1d_bias", "D", "delta_bias", "dt_rms_weight"):
        tensor = getattr(a, name)
        if tensor is not None and tensor.shape != (dim,):
            raise shape_error(OP, name, tensor, dim=dim, why="dim is half of xz's")
    for name in ("B", "C"):
        _check_projection(a, name, batch, dim, dstate, seqlen, parts)


def _check_projection(a, name: str, batch: int, dim: int, dstate: int, seqlen: int, parts: int) -> None:
    """B or C, its bias and its norm."""
    given, bias, weight = getattr(a, name), getattr(a, f"{name}_proj_bias"), getattr(a, f"{name.lower()}_rms_weight")
    if bias is not None:
        if given is not None:
            raise ArgumentError(f"{OP}: {name}_proj_bias was given with {name}, expected one of the two; it belongs to x_proj_weight")
        if bias.shape != (dstate * parts,):
            raise shape_error(OP, f"{name}_proj_bias", bias, dstate=dstate * parts, why="dstate comes from A")
    if weight is not None:
        if parts == 2:
            raise ArgumentError(f"{OP}: {name.lower()}_rms_weight was given with complex A, expected None")
        if weight.shape != (dstate,):
            raise shape_error(OP, f"{name.lower()}_rms_weight", weight, dstate=dstate, why="dstate comes from A")
    if given is None:
        return
    shape, length = tuple(given.shape), seqlen * parts
    groups = shape[1] if len(shape) == 4 else 1
    if shape == (dim, dstate) or (len(shape) in (3, 4) and (shape[0], *shape[-2:]) == (batch, dstate, length)):
        if groups < 1 or dim % groups:
            raise ShapeError(f"{OP}: {name} has {groups} groups, expected a divisor of dim={dim}; dim is half of xz's")
        if weight is not None and (len(shape) == 2 or groups > 1):
            raise ArgumentError(f"{OP}: {name.lower()}_rms_weight was given with {name} of shape {shape}, expected one group that varies")
        return
    forms = f"({dim}, {dstate}), ({batch}, {dstate}, {length}) or ({batch}, groups, {dstate}, {length})"
    raise ShapeError(f"{OP}: {name} has shape {shape}, expected {forms}; batch and seqlen come from xz, dstate from A")


def _check_states(a) -> None:
    rows, letter, source = a.xz.shape[0], "batch", "xz"
    if a.cu_seqlens is not None:
        check_cu_seqlens(OP, a.cu_seqlens, "xz", a.xz)
        rows, letter, source = a.cu_seqlens.shape[0] - 1, "num_seqs", "cu_seqlens"
    (dim, dstate), width = a.A.shape, a.conv1d_weight.shape[2]
    for name, last in (("initial_conv_state", {"width - 1": width - 1}), ("initial_ssm_state", {"dstate": dstate})):
        tensor = getattr(a, name)
        if tensor is not None and tuple(tensor.shape) != (rows, dim, *last.values()):
            raise shape_error(OP, name, tensor, **{letter: rows}, dim=dim, **last, why=f"{letter} comes from {source}")


def _real(reason):
    """`reason` of kernels that read real A only."""
    return lambda xz, A: "complex A is served by reference only" if A.is_complex() else reason(xz)


_GRADIENTS = "one backward of the kernels' own and the library's products"
BACKENDS = {
    "reference": Backend(reference_reason, gradients="autograd of the reference"),
    "cpu": Backend(_real(cpu_reason), gradients=_GRADIENTS),
    "triton": Backend(_real(triton_reason), gradients=_GRADIENTS),
    "cuda": Backend(_real(cuda_reason), gradients=_GRADIENTS),
}


# --- torch ops -------------------------------------------------------------------------------------------------------

_REQUIRED = ("xz", "conv1d_weight", "x_proj_weight", "delta_proj_weight", "out_proj_weight", "A")
_ARGUMENTS = (
    ", ".join(f"Tensor{'' if name in _REQUIRED else '?'} {name}" for name in (*DIFFERENTIABLE, "cu_seqlens"))
    + ", bool delta_softplus, float eps, bool return_states, int checkpoint_lvl, ScalarType? gemm_dtype, str backend"
)
_SAVED = ", ".join(f"Tensor {name}" for name in ("x_dbl", "u", "delta_kept", "y", "states"))


def _fwd(*arguments):
    a = Arguments(*arguments)
    count(OP, a.backend)
    return fused.forward(a)


def _fwd_fake(*arguments):
    return fused.forward(Arguments(*arguments))  # of ops that have fakes themselves: the same shapes and strides


def _bwd_fake(dout, dconv_state, dssm_state, *arguments):
    *arguments, x_dbl, u, delta, y, states, wanted = arguments
    a = Arguments(*arguments)
    grads = fused.backward(
        dout, dconv_state, dssm_state, a, fused.Saved(x_dbl, u, delta, y, states), dict(zip(DIFFERENTIABLE, wanted))
    )  # fmt: skip
    present = [want and getattr(a, name) is not None for name, want in zip(DIFFERENTIABLE, wanted)]
    return [grads[name] if has else a.xz.new_empty(0) for name, has in zip(DIFFERENTIABLE, present)]


def _bwd(*arguments):
    count("mamba_inner_bwd", arguments[3 + len(Arguments._fields) - 1])
    return _bwd_fake(*arguments)


define(
    f"mamba_inner_bwd(Tensor? dout, Tensor? dconv_state, Tensor? dssm_state, {_ARGUMENTS}, {_SAVED}, bool[] wanted) -> Tensor[]", _bwd_fake
)
first_order_only("mamba_inner_bwd")
implement("mamba_inner_bwd", _bwd, "CompositeExplicitAutograd")


def _setup_context(ctx, inputs, output):
    a = Arguments(*inputs)
    _, _, _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.options = a[len(DIFFERENTIABLE) + 1 :]
    ctx.wanted = [t is not None and t.requires_grad for t in a[: len(DIFFERENTIABLE)]]
    ctx.save_for_backward(*a[: len(DIFFERENTIABLE) + 1], *saved)


def _backward(ctx, dout, dconv_state, dssm_state, *_):
    tensors = ctx.saved_tensors
    tensors, saved = tensors[: len(DIFFERENTIABLE) + 1], tensors[len(DIFFERENTIABLE) + 1 :]
    dconv_state = dconv_state if ctx.options[2] else None
    grads = OPS.mamba_inner_bwd.default(dout, dconv_state, dssm_state, *tensors, *ctx.options, *saved, ctx.wanted)
    return *(grad if want else None for grad, want in zip(grads, ctx.wanted)), *(None for _ in range(7))


define(f"mamba_inner({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _fwd_fake)
differentiable(OP, _fwd, setup_context=_setup_context, backward=_backward)
