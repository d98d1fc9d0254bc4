"""What autograd's users do with any differentiable op: torch.func, checkpoints, autocast, hooks, a second derivative. One call per op."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cobra_kernels
from cobra_kernels import selfcheck
from tests.gpu.cases import GEMM_OPS, TRAINED, make
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
every_op = pytest.mark.parametrize("op", [name.split("-")[0] for name in TRAINED])


def call_of(op, wide=False, backend="cpu"):
    """(f, tensors): the op as a function of its float tensors that returns one number, fp32 or fp64."""
    case = make(op, 2, large=False)
    tensors: list[torch.Tensor] = []

    def keep(t):
        if t.is_floating_point():
            tensors.append(t.to(torch.float64 if wide else torch.float32))
        return t

    for value in case.kwargs.values():
        selfcheck.map_tensors(value, keep)

    def f(*given):
        rest = iter(given)
        kwargs = {k: selfcheck.map_tensors(v, lambda t: next(rest) if t.is_floating_point() else t) for k, v in case.kwargs.items()}
        out = getattr(cobra_kernels, op)(**kwargs, backend=backend)
        outputs = out if isinstance(out, tuple) else (out,)
        return sum((t * selfcheck.incoming_gradient(t)).sum() for t in outputs)

    return f, tensors


def gradients(f, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(f(*leaves), leaves)


@every_op
def test_the_backward_is_our_kernel(op):
    f, tensors = call_of(op)
    cobra_kernels.reset_call_counts()
    gradients(f, tensors)
    counts = cobra_kernels.call_counts()
    assert {backend for _, backend in counts} == {"cpu"}, counts
    assert any(name.endswith("_bwd") for name, _ in counts), counts


@every_op
def test_func_grad(op):
    """Served by the reference; a compiled backend asked for by name says so."""
    f, tensors = call_of(op)
    every = tuple(range(len(tensors)))
    with pytest.raises(cobra_kernels.errors.BackendUnavailable, match=f"{op}.*torch.func"):
        torch.func.grad(f, argnums=every)(*tensors)
    by_default, _ = call_of(op, backend=None)
    for index, (g, w) in enumerate(zip(torch.func.grad(by_default, argnums=every)(*tensors), gradients(f, tensors), strict=True)):
        assert_close(g, w, 1e-5, f"gradient {index}")


@every_op
def test_activation_checkpoints_change_no_bit(op):
    f, tensors = call_of(op)
    leaves = [t.detach().requires_grad_() for t in tensors]
    got = torch.autograd.grad(checkpoint(f, *leaves, use_reentrant=False), leaves)
    for index, (g, w) in enumerate(zip(got, gradients(f, tensors), strict=True)):
        assert torch.equal(g, w), f"gradient {index}"


@every_op
def test_a_second_derivative_is_refused_by_name(op):
    f, tensors = call_of(op)
    leaves = [t.detach().requires_grad_() for t in tensors]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"cobra_kernels.*{op}.*double backward is not supported"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@every_op
def test_only_some_inputs_want_gradients(op):
    """Every input alone: the gradient is the one it has among all."""
    f, tensors = call_of(op)
    for index, want in enumerate(gradients(f, tensors)):
        given = [t.detach().requires_grad_(i == index) for i, t in enumerate(tensors)]
        (got,) = torch.autograd.grad(f(*given), [given[index]])
        if op in GEMM_OPS:
            assert_close(got, want, 1e-6, f"gradient {index}")
        else:
            assert torch.equal(got, want), f"gradient {index}"


@every_op
def test_autocast_trains(op):
    """bf16 autocast around a call of fp32 tensors: outputs are finite, gradients fp32 and near the plain ones."""
    f, tensors = call_of(op)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = f(*leaves)
    for index, (g, w) in enumerate(zip(torch.autograd.grad(total, leaves), gradients(f, tensors), strict=True)):
        assert g.dtype == torch.float32, f"gradient {index} is {g.dtype}"
        assert_close(g, w, 3e-2 if op in GEMM_OPS else 1e-6, f"gradient {index}")


@every_op
def test_a_backward_inside_autocast_is_the_same(op):
    """Where a training loop calls backward() does not matter: what autocast casts, it has cast in the forward."""
    f, tensors = call_of(op)
    leaves = [t.detach().requires_grad_() for t in tensors]
    total = f(*leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(total, leaves)
        trained = torch.autograd.grad(f(*leaves), leaves)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in trained)
    for index, (g, w) in enumerate(zip(got, gradients(f, tensors), strict=True)):
        assert torch.equal(g, w), f"gradient {index}"


@every_op
def test_directional_derivative(op):
    """fp64: the change of the output along one random direction is the gradient's product with it."""
    f, tensors = call_of(op, wide=True)
    g = torch.Generator().manual_seed(3)
    direction = [torch.randn(t.shape, generator=g, dtype=torch.float64) * (1e-2 if t.numel() else 1) for t in tensors]
    step = 1e-5
    change = (f(*(t + step * d for t, d in zip(tensors, direction))) - f(*(t - step * d for t, d in zip(tensors, direction)))) / (2 * step)
    product = sum((grad * d).sum() for grad, d in zip(gradients(f, tensors), direction))
    assert abs(change - product) <= 1e-6 * max(1.0, abs(product)), f"finite difference {change:.12g}, gradient {product:.12g}"
