"""rms_norm: y = s * rsqrt(mean(s^2) + eps) * weight (+ bias), s = x + residual."""

from __future__ import annotations

import torch

from ...checks import check_first, check_floats, check_given, requires_grad, shape_error
from ...dispatch import Backend, count, cpu_reason, cuda_reason, reference_reason, select, triton_reason
from ...errors import ShapeError
from ...library import OPS, define, differentiable, first_order_only, implement
from . import reference

OP = "rms_norm"
MAX_DIMS = 7  # a kernel indexes up to 6 leading dims; more are flattened, in a copy if no view can do it


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
    *,
    is_rms_norm: bool = True,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm (or LayerNorm) of x + residual over the last dim.

    Args:
        x: (..., dim), fp32, bf16, fp16, or fp64 on `reference` and `cpu`; any strides.
        weight: (dim,), any float dtype.
        bias: (dim,), any float dtype; none is added when absent.
        residual: shape of x, any float dtype; nothing is added when absent.
        prenorm: also return the sum s, for the next residual connection.
        residual_in_fp32: without a residual, s is fp32 instead of x's dtype. fp64 stays fp64.
        eps: added to the mean square.
        is_rms_norm: False removes the mean first and divides by the biased standard deviation (LayerNorm).
        backend: "reference", "cpu", "triton", "cuda", or None for the default of x's device.

    Returns:
        y, shape, dtype and layout of x; or (y, s) if prenorm, s in residual's dtype, else fp32 if residual_in_fp32, else
        x's dtype. If nothing was added and the dtypes agree, s is x itself. The sum is not rounded before the statistics.
        Beyond 6 leading dims the kernels' y and s are contiguous.

    Nothing is mutated. Gradients (first order): x, weight, bias, residual, through y and s.
    Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable.
    In torch: `F.rms_norm(x + residual, (dim,), weight, eps)`. Upstream: mamba_ssm `rms_norm_fn`, `layer_norm_fn`.
    Source: Zhang and Sennrich, arXiv 1910.07467; Ba et al., arXiv 1607.06450.
    """
    name = _plan(x, weight, bias, residual, backend)
    if residual is not None:
        s_dtype = residual.dtype if prenorm else None
    else:
        s_dtype = torch.float32 if prenorm and residual_in_fp32 and x.dtype != torch.float64 else None
        if s_dtype == x.dtype:
            s_dtype = None

    if name != "reference" and x.dim() > MAX_DIMS:
        flat = None if residual is None else residual.flatten(0, -2)
        out = rms_norm(x.flatten(0, -2), weight, bias, flat, prenorm, residual_in_fp32, eps, is_rms_norm=is_rms_norm, backend=name)
        if not prenorm:
            return out.unflatten(0, x.shape[:-1])
        return out[0].unflatten(0, x.shape[:-1]), x if s_dtype is None else out[1].unflatten(0, x.shape[:-1])

    if name == "reference":
        count(OP, name)
        y, s = reference.rms_norm(x, weight, bias, residual, s_dtype, eps, is_rms_norm)
    elif requires_grad(x, weight, bias, residual):
        y, s = OPS.rms_norm.default(x, weight, bias, residual, s_dtype, eps, is_rms_norm, name)
    else:
        y, s = _FORWARD[name](x, weight, bias, residual, s_dtype, eps, is_rms_norm)
    if not prenorm:
        return y
    return y, (x if s_dtype is None else s)


def plan(x, weight, bias=None, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6, *, is_rms_norm=True, backend=None):
    """The backend that `rms_norm` of these arguments would run on; raises as it would. For supports()."""
    return _plan(x, weight, bias, residual, backend)


def _plan(x, weight, bias, residual, backend) -> str:
    check_first(OP, "x", x)
    check_given(OP, weight=weight)
    check_floats(OP, "x", x, weight=weight, bias=bias, residual=residual)
    if x.dim() == 0:
        raise ShapeError(f"{OP}: x has no dims, expected (..., dim)")
    dim = x.shape[-1]
    if weight.shape != (dim,):
        raise shape_error(OP, "weight", weight, dim=dim, why="dim comes from x")
    if bias is not None and bias.shape != (dim,):
        raise shape_error(OP, "bias", bias, dim=dim, why="dim comes from x")
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(f"{OP}: residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}, the shape of x")
    return select(OP, BACKENDS, backend, x)


BACKENDS = {
    "reference": Backend(reference_reason, gradients="autograd of the reference"),
    "cpu": Backend(cpu_reason, gradients="kernel"),
    "triton": Backend(triton_reason, gradients="kernel"),
    "cuda": Backend(cuda_reason, gradients="kernel"),
}


# --- torch ops -------------------------------------------------------------------------------------------------------

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, ScalarType? s_dtype, float eps, bool is_rms_norm"
_GRADIENTS = "Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool is_rms_norm"


def _fwd_fake(x, weight, bias, residual, s_dtype, eps, is_rms_norm, backend=None):
    return torch.empty_like(x), x.new_empty(0) if s_dtype is None else torch.empty_like(x, dtype=s_dtype)


def _bwd_fake(dy, ds, x, weight, bias, residual, eps, is_rms_norm):
    return (
        torch.empty_like(x),
        x.new_empty(0) if residual is None else torch.empty_like(residual),
        weight.new_empty(weight.shape),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


def _fwd_triton(x, weight, bias, residual, s_dtype, eps, is_rms_norm):
    from . import triton_kernel

    count(OP, "triton")
    return triton_kernel.rms_norm_fwd(x, weight, bias, residual, s_dtype, eps, is_rms_norm)


def _bwd_triton(dy, ds, x, weight, bias, residual, eps, is_rms_norm):
    from . import triton_kernel

    count("rms_norm_bwd", "triton")
    return triton_kernel.rms_norm_bwd(dy, ds, x, weight, bias, residual, eps, is_rms_norm)


for _suffix in ("", "_triton"):
    define(f"rms_norm_fwd{_suffix}({_ARGUMENTS}) -> (Tensor, Tensor)", _fwd_fake)
    define(f"rms_norm_bwd{_suffix}({_GRADIENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _bwd_fake)
    first_order_only(f"rms_norm_bwd{_suffix}")
implement("rms_norm_fwd_triton", _fwd_triton, "CompositeExplicitAutograd")
implement("rms_norm_bwd_triton", _bwd_triton, "CompositeExplicitAutograd")

_FORWARD = {name: OPS.rms_norm_fwd.default for name in ("cpu", "cuda")} | {"triton": OPS.rms_norm_fwd_triton.default}
_BACKWARD = {name: OPS.rms_norm_bwd.default for name in ("cpu", "cuda")} | {"triton": OPS.rms_norm_bwd_triton.default}


def _differentiable(x, weight, bias, residual, s_dtype, eps, is_rms_norm, backend):
    return _FORWARD[backend](x, weight, bias, residual, s_dtype, eps, is_rms_norm)


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, s_dtype, ctx.eps, ctx.is_rms_norm, ctx.backend = inputs
    ctx.s_stored = s_dtype is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, residual)


def _backward(ctx, dy, ds):
    x, weight, bias, residual = ctx.saved_tensors
    if dy is None:
        dy = x.new_zeros(()).expand(x.shape)
    grads = _BACKWARD[ctx.backend](dy, ds if ctx.s_stored else None, x, weight, bias, residual, ctx.eps, ctx.is_rms_norm)
    dx, dresidual, dweight, dbias = grads
    return dx, dweight, None if bias is None else dbias, None if residual is None else dresidual, None, None, None, None


define(f"rms_norm({_ARGUMENTS}, str backend) -> (Tensor, Tensor)", _fwd_fake)
differentiable("rms_norm", _differentiable, setup_context=_setup_context, backward=_backward)
