"""mlp_projector: Linear, GELU, Linear, ... over K feature tensors read as one. ldp_projector: two layers, an adaptive average
pool of the token grid and a depthwise 3x3 with residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from ...checks import autocast_dtype, check_first, check_float, check_floats, name_of, requires_grad, shape_error, without_autocast
from ...dispatch import Backend, count, cpu_reason, cuda_reason, reference_reason, select, triton_reason
from ...errors import ArgumentError, DtypeError, ShapeError
from ...library import OPS, define, differentiable, first_order_only, implement
from . import backward, cpu_kernel, cuda_kernel, reference

MLP, LDP = "mlp_projector", "ldp_projector"


def mlp_projector(
    features: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Multi-layer perceptron from vision features to the language model's width.

    Args:
        features: (..., v), or K tensors (..., v_k) with equal leading dims and dtype, read as if concatenated on the last dim;
            fp32, bf16, fp16, or fp64 on `reference` and `cpu`; any strides.
        weights: n >= 1 matrices (out_i, in_i) as nn.Linear holds them; in_0 = sum of v_k, in_i = out_(i-1).
        biases: n vectors (out_i,), each may be None; or None.
        backend: "reference", "cpu", "triton", "cuda", or None for the default of the features' device.

    Returns:
        (..., out_n), dtype of the features, contiguous. Exact (erf) GELU between layers, none after the last: n = 1 is Cobra's
        `linear`, 2 `gelu-mlp`, 3 `fused-gelu-mlp`. Sums are fp32; what a layer hands to the next is rounded to the features' dtype.

    Nothing is mutated. Gradients (first order): every feature, weight and bias. Under autocast every operand is cast to the
    autocast dtype first, as nn.Linear would.
    Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable.
    In torch: `nn.Sequential(nn.Linear(..), nn.GELU(), nn.Linear(..), ...)(torch.cat(features, -1))`.
    Upstream: Cobra `LinearProjector`, `MLPProjector`, `FusedMLPProjector`.
    """
    features, weights, biases, name = _plan_mlp(features, weights, biases, backend)
    dtype = autocast_dtype(features[0])
    if dtype is not None:
        features, weights, biases = (_cast(tensors, dtype) for tensors in (features, weights, biases))
        with torch.autocast(features[0].device.type, enabled=False):
            return mlp_projector(features, weights, biases, backend=name)
    if name == "reference":
        count(MLP, name)
        return reference.mlp_projector(features, weights, biases)
    if requires_grad(*features, *weights, *biases):
        return _recorded(MLP, features, weights, biases, (), (), name)
    return _FORWARD[MLP][name](features, weights, *_present(biases))


def ldp_projector(
    features: torch.Tensor | Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None,
    peg_weight: torch.Tensor,
    peg_bias: torch.Tensor | None,
    *,
    grid: tuple[int, int] | None = None,
    out_grid: tuple[int, int] = (14, 14),
    backend: str | None = None,
) -> torch.Tensor:
    """Downsampling projector: Linear, GELU, Linear, adaptive average pool of the token grid, depthwise 3x3 plus residual.

    Args:
        features: (batch, H*W, v), tokens row-major, or K tensors (batch, H*W, v_k) as for mlp_projector.
        weights: two matrices (hidden, v), (out, hidden).
        biases: two vectors, each may be None; or None.
        peg_weight: (out, 1, 3, 3), positional encoding generator: one 3x3 filter per channel, zero padding 1.
        peg_bias: (out,) or None.
        grid: (H, W); the square root of the token count when absent.
        out_grid: (h, w). Bin i of an axis covers floor(i H/h) .. ceil((i+1) H/h): bins overlap when h does not divide H.
        backend: as for mlp_projector.

    Returns:
        (batch, h*w, out), dtype of the features, contiguous. `reference` pools after the second layer, as upstream; kernels pool
        before it, which is the same up to rounding (the layer is affine and a bin's weights sum to 1) and costs less.

    Nothing is mutated. Gradients (first order): every feature, weight and bias, peg_weight and peg_bias. Autocast as for
    mlp_projector. Raises ShapeError, DtypeError, ArgumentError, BackendUnavailable.
    In torch: `p = F.adaptive_avg_pool2d(mlp(features) as (batch, out, H, W), out_grid)`,
    `p + F.conv2d(p, peg_weight, peg_bias, padding=1, groups=out)`. Upstream: Cobra `FusedLDPProjector`.
    Source: Chu et al., MobileVLM V2, arXiv 2402.03766; Chu et al., arXiv 2102.10882 (positional encoding generator).
    """
    features, weights, biases, grid, out_grid, name = _plan_ldp(features, weights, biases, peg_weight, peg_bias, grid, out_grid, backend)
    dtype = autocast_dtype(features[0])
    if dtype is not None:
        features, weights, biases, (peg_weight, peg_bias) = (
            _cast(tensors, dtype) for tensors in (features, weights, biases, (peg_weight, peg_bias))
        )
        with torch.autocast(features[0].device.type, enabled=False):
            return ldp_projector(
                features, weights, biases, peg_weight, peg_bias, grid=grid, out_grid=out_grid, backend=name
            )  # fmt: skip
    if name == "reference":
        count(LDP, name)
        return reference.ldp_projector(features, weights, biases, peg_weight, peg_bias, grid, out_grid)
    if requires_grad(*features, *weights, *biases, peg_weight, peg_bias):
        return _recorded(LDP, features, weights, biases, (peg_weight, peg_bias), (grid, out_grid), name)
    return _FORWARD[LDP][name](features, weights, *_present(biases), peg_weight, peg_bias, grid, out_grid)


def plan_mlp(features, weights, biases, *, backend=None):
    """The backend that `mlp_projector` of these arguments would run on; raises as it would. For supports()."""
    return _plan_mlp(features, weights, biases, backend)[-1]


def plan_ldp(features, weights, biases, peg_weight, peg_bias, *, grid=None, out_grid=(14, 14), backend=None):
    """The backend that `ldp_projector` of these arguments would run on; raises as it would. For supports()."""
    return _plan_ldp(features, weights, biases, peg_weight, peg_bias, grid, out_grid, backend)[-1]


# --- checks ----------------------------------------------------------------------------------------------------------


def _listed(op: str, argument: str, tensors, entries: str) -> list:
    if isinstance(tensors, torch.Tensor) or not isinstance(tensors, Iterable):
        got = type(tensors).__name__
        raise ArgumentError(f"{op}: {argument} is a {got}, expected {'a tensor or ' if argument == 'features' else ''}a sequence of {entries}")
    return list(tensors)


def _check_layers(op, features, weights, biases) -> tuple[list, list, list]:
    """Everything as lists, after checking types, dtypes and the chain of shapes."""
    features = [features] if isinstance(features, torch.Tensor) else _listed(op, "features", features, "tensors")
    if not features:
        raise ArgumentError(f"{op}: features is empty, expected a tensor or a sequence of tensors")
    first = features[0]
    check_first(op, "features[0]", first)
    weights = _listed(op, "weights", weights, "matrices (out, in), one per layer")
    if not weights:
        raise ArgumentError(f"{op}: weights is empty, expected one matrix (out, in) per layer")
    biases = [None] * len(weights) if biases is None else _listed(op, "biases", biases, "vectors or None, one per layer; or None")
    if len(biases) != len(weights):
        raise ArgumentError(f"{op}: biases has {len(biases)} entries, expected {len(weights)}, one per weight, or None")
    for argument, tensors in (("features", features), ("weights", weights), ("biases", biases)):
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                check_float(op, "features[0]", first, f"{argument}[{i}]", tensor)
            elif argument != "biases":
                raise DtypeError(f"{op}: {argument}[{i}] is NoneType, expected a torch.Tensor")

    lead, width, source = first.shape, 0, "the last dims of features, summed"
    if not lead:
        raise ShapeError(f"{op}: features[0] has no dims, expected (..., v)")
    for k, feature in enumerate(features):
        shape = feature.shape
        if feature is not first:
            if feature.dtype != first.dtype:
                raise DtypeError(f"{op}: features[{k}] has dtype {name_of(feature.dtype)}, features[0] has {name_of(first.dtype)}")
            if shape[:-1] != lead[:-1] or len(shape) != len(lead):
                raise ShapeError(
                    f"{op}: features[{k}] has shape {tuple(shape)}, expected {tuple(lead[:-1])} before its last dim; "
                    f"the leading dims come from features[0]"
                )
        width += shape[-1]
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        shape = weight.shape
        if len(shape) != 2 or shape[1] != width:
            raise shape_error(op, f"weights[{i}]", weight, **{f"out_{i}": f"out_{i}", f"in_{i}": width}, why=f"in_{i} is {source}")
        width, source = shape[0], f"out_{i} of weights[{i}]"
        if bias is not None and bias.shape != (width,):
            raise shape_error(op, f"biases[{i}]", bias, **{f"out_{i}": width}, why=f"out_{i} comes from weights[{i}]")
    return features, weights, biases


def _plan_mlp(features, weights, biases, backend) -> tuple[list, list, list, str]:
    features, weights, biases = _check_layers(MLP, features, weights, biases)
    return features, weights, biases, select(MLP, BACKENDS, backend, features[0])


def _check_grid(name, grid) -> tuple[int, int]:
    sizes = tuple(grid) if isinstance(grid, Sequence) else (grid,)
    if len(sizes) != 2 or not all(isinstance(size, (int, torch.SymInt)) and size >= 1 for size in sizes):
        raise ArgumentError(f"{LDP}: {name} is {grid!r}, expected two integers >= 1 (rows, columns)")
    return sizes


def _plan_ldp(features, weights, biases, peg_weight, peg_bias, grid, out_grid, backend) -> tuple:
    features, weights, biases = _check_layers(LDP, features, weights, biases)
    first = features[0]
    if len(weights) != 2:
        raise ArgumentError(f"{LDP}: weights has {len(weights)} entries, expected 2: (hidden, v), (out, hidden)")
    if first.dim() != 3:
        raise ShapeError(f"{LDP}: features[0] has shape {tuple(first.shape)}, expected (batch, H*W, v)")
    if not isinstance(peg_weight, torch.Tensor):
        raise DtypeError(f"{LDP}: peg_weight is {type(peg_weight).__name__}, expected a torch.Tensor")
    check_floats(LDP, "features[0]", first, peg_weight=peg_weight, peg_bias=peg_bias)
    out, tokens = weights[1].shape[0], first.shape[1]
    if peg_weight.shape != (out, 1, 3, 3):
        raise shape_error(LDP, "peg_weight", peg_weight, out=out, one="1", rows="3", columns="3", why="out comes from weights[1]")
    if peg_bias is not None and peg_bias.shape != (out,):
        raise shape_error(LDP, "peg_bias", peg_bias, out=out, why="out comes from weights[1]")
    out_grid = _check_grid("out_grid", out_grid)
    if grid is None:
        side = math.isqrt(tokens)
        if side * side != tokens or side == 0:
            raise ShapeError(f"{LDP}: features[0] has {tokens} tokens, which is not a square >= 1; pass grid=(H, W)")
        grid = (side, side)
    grid = _check_grid("grid", grid)
    if grid[0] * grid[1] != tokens:
        raise ShapeError(f"{LDP}: features[0] has {tokens} tokens, expected H*W={grid[0] * grid[1]}; H and W come from grid={grid}")
    return features, weights, biases, grid, out_grid, select(LDP, BACKENDS, backend, first)


def _cast(tensors, dtype: torch.dtype) -> list:
    return [None if t is None else t.to(dtype) for t in tensors]


BACKENDS = {
    "reference": Backend(reference_reason, gradients="autograd of the reference"),
    "cpu": Backend(cpu_reason, gradients="C++ kernels (GELU, pool, encoding, sums over rows) and the library's matrix products"),
    "triton": Backend(triton_reason, gradients="Triton kernels (GELU, pool, encoding, sums over rows) and the library's matrix products"),
    "cuda": Backend(cuda_reason, gradients="CUDA kernels (GELU, pool, encoding, sums over rows) and the library's matrix products"),
}


# --- torch ops -------------------------------------------------------------------------------------------------------

# Autograd takes lists of tensors, not of optional ones: `biases` holds those present, `biased` says which layers have one.
_LAYERS = "Tensor[] features, Tensor[] weights, Tensor[] biases, bool[] biased"
_PEG = "Tensor peg_weight, Tensor? peg_bias, SymInt[2] grid, SymInt[2] out_grid"


def _present(biases) -> tuple[list, list]:
    return [b for b in biases if b is not None], [b is not None for b in biases]


def _mlp_fake(features, weights, biases, biased, backend=None):
    return features[0].new_empty((*features[0].shape[:-1], weights[-1].shape[0]))


def _ldp_fake(features, weights, biases, biased, peg_weight, peg_bias, grid, out_grid, backend=None):
    return features[0].new_empty((features[0].shape[0], out_grid[0] * out_grid[1], weights[-1].shape[0]))


def _mlp_bwd_fake(dy, features, weights, biases, biased, wanted):
    return [t.new_empty(t.shape) for t, want in zip([*features, *weights, *biases], wanted) if want]


def _ldp_bwd_fake(dy, features, weights, biases, biased, peg_weight, peg_bias, grid, out_grid, wanted):
    return [t.new_empty(t.shape) for t, want in zip([*features, *weights, *biases, peg_weight, peg_bias], wanted) if want]


def _full(present, biased, absent=None) -> list:
    """One entry per layer again."""
    present = iter(present)
    return [next(present) if has else absent for has in biased]


def _wanted_by_layer(wanted, features, weights, biases, biased) -> tuple[list, list, list, list]:
    """Of the features, the weights, the biases (one per layer again), and the two of the encoding."""
    features, weights, biases, peg = _grouped((len(features), len(weights), len(biases)), list(wanted))
    return features, weights, _full(biases, biased, False), peg


def _kernels_of(backend: str):
    """The module of a backend's kernels; Triton is imported when it is first used."""
    if backend == "triton":
        from . import triton_kernel

        return triton_kernel
    return cpu_kernel if backend == "cpu" else cuda_kernel


def _implementations(backend: str) -> dict[str, Callable]:
    """The four ops on one backend."""

    def refuse_double(op, first):
        if backend != "cpu" and first.dtype == torch.float64:
            raise DtypeError(f"{op}: features[0] is float64, which the {backend} kernels do not serve")

    def mlp_fwd(features, weights, biases, biased):
        refuse_double(f"{MLP}_fwd", features[0])
        count(MLP, backend)
        return _kernels_of(backend).mlp_projector_fwd(features, weights, _full(biases, biased))

    def ldp_fwd(features, weights, biases, biased, peg_weight, peg_bias, grid, out_grid):
        refuse_double(f"{LDP}_fwd", features[0])
        count(LDP, backend)
        return _kernels_of(backend).ldp_projector_fwd(features, weights, _full(biases, biased), peg_weight, peg_bias, grid, out_grid)

    def mlp_bwd(dy, features, weights, biases, biased, wanted):
        refuse_double(f"{MLP}_bwd", features[0])
        count(f"{MLP}_bwd", backend)
        wants = _wanted_by_layer(wanted, features, weights, biases, biased)
        with without_autocast(dy.device):  # backward() may be called inside it
            gradients = backward.mlp_projector_bwd(_kernels_of(backend), dy, features, weights, _full(biases, biased), *wants[:3])
        return [t for t in gradients if t is not None]

    def ldp_bwd(dy, features, weights, biases, biased, peg_weight, peg_bias, grid, out_grid, wanted):
        refuse_double(f"{LDP}_bwd", features[0])
        count(f"{LDP}_bwd", backend)
        wants = _wanted_by_layer(wanted, features, weights, biases, biased)
        with without_autocast(dy.device):
            gradients = backward.ldp_projector_bwd(
                _kernels_of(backend), dy, features, weights, _full(biases, biased), peg_weight, peg_bias, grid, out_grid, *wants
            )
        return [t for t in gradients if t is not None]

    return {f"{MLP}_fwd": mlp_fwd, f"{MLP}_bwd": mlp_bwd, f"{LDP}_fwd": ldp_fwd, f"{LDP}_bwd": ldp_bwd}


for _suffix in ("", "_triton"):
    define(f"{MLP}_fwd{_suffix}({_LAYERS}) -> Tensor", _mlp_fake)
    define(f"{LDP}_fwd{_suffix}({_LAYERS}, {_PEG}) -> Tensor", _ldp_fake)
    # The gradients of the tensors that `wanted` marks, in the order of the arguments.
    define(f"{MLP}_bwd{_suffix}(Tensor dy, {_LAYERS}, bool[] wanted) -> Tensor[]", _mlp_bwd_fake)
    define(f"{LDP}_bwd{_suffix}(Tensor dy, {_LAYERS}, {_PEG}, bool[] wanted) -> Tensor[]", _ldp_bwd_fake)
    first_order_only(f"{MLP}_bwd{_suffix}")
    first_order_only(f"{LDP}_bwd{_suffix}")
for _backend, _suffix, _key in (("cpu", "", "CPU"), ("cuda", "", "CUDA"), ("triton", "_triton", "CompositeExplicitAutograd")):
    for _name, _function in _implementations(_backend).items():
        implement(f"{_name}{_suffix}", _function, _key)

_FORWARD = {
    MLP: {"cpu": OPS.mlp_projector_fwd.default, "cuda": OPS.mlp_projector_fwd.default, "triton": OPS.mlp_projector_fwd_triton.default},
    LDP: {"cpu": OPS.ldp_projector_fwd.default, "cuda": OPS.ldp_projector_fwd.default, "triton": OPS.ldp_projector_fwd_triton.default},
}
_BACKWARD = {
    MLP: {"cpu": OPS.mlp_projector_bwd.default, "cuda": OPS.mlp_projector_bwd.default, "triton": OPS.mlp_projector_bwd_triton.default},
    LDP: {"cpu": OPS.ldp_projector_bwd.default, "cuda": OPS.ldp_projector_bwd.default, "triton": OPS.ldp_projector_bwd_triton.default},
}


def _mlp_differentiable(features, weights, biases, biased, backend):
    return _FORWARD[MLP][backend](features, weights, biases, biased)


def _ldp_differentiable(features, weights, biases, biased, peg_weight, peg_bias, grid, out_grid, backend):
    return _FORWARD[LDP][backend](features, weights, biases, biased, peg_weight, peg_bias, grid, out_grid)


def _save(ctx, op, backend, biased, features, weights, biases, peg, grids) -> None:
    tensors = [*features, *weights, *biases, *peg]
    ctx.op, ctx.backend, ctx.biased, ctx.grids = op, backend, biased, grids
    ctx.counts = (len(features), len(weights), len(biases))
    ctx.wanted = [t is not None and t.requires_grad for t in tensors]
    ctx.save_for_backward(*tensors)


def _grouped(counts, tensors) -> tuple[list, list, list, list]:
    """Features, weights, biases, and the two of the encoding."""
    k, n, b = counts
    return tensors[:k], tensors[k : k + n], tensors[k + n : k + n + b], tensors[k + n + b :]


def _gradients(ctx, dy) -> list:
    """One per saved tensor: the gradient of the wanted, None elsewhere."""
    features, weights, biases, peg = _grouped(ctx.counts, list(ctx.saved_tensors))
    backward = _BACKWARD[ctx.op][ctx.backend]
    gradients = iter(backward(dy, features, weights, biases, ctx.biased, *peg, *ctx.grids, ctx.wanted))
    return [next(gradients) if want else None for want in ctx.wanted]


def _mlp_setup_context(ctx, inputs, output):
    features, weights, biases, biased, backend = inputs
    _save(ctx, MLP, backend, biased, features, weights, biases, (), ())


def _mlp_backward(ctx, dy):
    dfeatures, dweights, dbiases, _ = _grouped(ctx.counts, _gradients(ctx, dy))
    return dfeatures, dweights, dbiases, None, None


def _ldp_setup_context(ctx, inputs, output):
    features, weights, biases, biased, peg_weight, peg_bias, grid, out_grid, backend = inputs
    _save(ctx, LDP, backend, biased, features, weights, biases, (peg_weight, peg_bias), (grid, out_grid))


def _ldp_backward(ctx, dy):
    dfeatures, dweights, dbiases, dpeg = _grouped(ctx.counts, _gradients(ctx, dy))
    return dfeatures, dweights, dbiases, None, *dpeg, None, None, None


define(f"mlp_projector({_LAYERS}, str backend) -> Tensor", _mlp_fake)
differentiable(MLP, _mlp_differentiable, setup_context=_mlp_setup_context, backward=_mlp_backward)
define(f"ldp_projector({_LAYERS}, {_PEG}, str backend) -> Tensor", _ldp_fake)
differentiable(LDP, _ldp_differentiable, setup_context=_ldp_setup_context, backward=_ldp_backward)


class _Recorded(torch.autograd.Function):
    """The differentiable ops for eager calls, on tensors one by one: lists through the library's autograd cost 65 us a call."""

    @staticmethod
    def forward(op, backend, counts, biased, grids, *tensors):
        features, weights, biases, peg = _grouped(counts, tensors)
        return _FORWARD[op][backend](features, weights, biases, biased, *peg, *grids)

    @staticmethod
    def setup_context(ctx, inputs, output):
        op, backend, counts, biased, grids, *tensors = inputs
        features, weights, biases, peg = _grouped(counts, tensors)
        _save(ctx, op, backend, biased, features, weights, biases, peg, grids)

    @staticmethod
    def backward(ctx, dy):
        return None, None, None, None, None, *_gradients(ctx, dy)


def _recorded(op, features, weights, biases, peg, grids, backend):
    present, biased = _present(biases)
    if torch.compiler.is_compiling():
        return getattr(OPS, op).default(features, weights, present, biased, *peg, *grids, backend)
    counts = (len(features), len(weights), len(present))
    return _Recorded.apply(op, backend, counts, biased, grids, *features, *weights, *present, *peg)
