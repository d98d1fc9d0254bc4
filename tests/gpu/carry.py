"""Runs the suite of tests/ops on the GPU backends: a pytest plugin that carries tensors there and back.

    COBRA_CARRY=cuda,triton python -m pytest -p tests.gpu.carry tests/ops

The tests of an op make CPU tensors and name a backend. Under this plugin `kernel_backends()` gives the backends of
COBRA_CARRY, and a call that names the one of its test has its tensors copied to the device (same strides, same offset: an
unaligned view stays unaligned), its results and the arguments it wrote copied back, and its gradients too. Tests without a
carried backend are left out. `COBRA_CARRY=rehearsal` does all of that on the CPU, with the cpu backend: the way to see that the
suite runs under the plugin where there is no GPU.
"""

from __future__ import annotations

import functools
import inspect
import os

import pytest
import torch

import cobra_kernels
from cobra_kernels.errors import BackendUnavailable
from cobra_kernels.selfcheck import map_tensors

REHEARSAL = "rehearsal"
WRITTEN = {"causal_conv1d": ("final_states_out",), "causal_conv1d_update": ("conv_state",), "selective_state_update": ("state",)}
# What no GPU backend serves by contract; a test of it is skipped by this reason.
BY_CONTRACT = ("float64 is served by reference", "complex A is served by reference")

_backend: str | None = None  # of the running test, if it is carried


def moved(t: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy on `device` that lies in its storage as t lies in its own: same strides, same offset, same bytes around it."""
    storage = t.untyped_storage()
    flat = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, (storage.nbytes() // t.element_size(),), (1,))
    return flat.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


class _Carry(torch.autograd.Function):
    """`moved`, with gradients carried the other way."""

    @staticmethod
    def forward(ctx, t, device):
        ctx.device = t.device
        return moved(t, device)

    @staticmethod
    def backward(ctx, grad):
        return moved(grad, ctx.device), None


def carried(op: str, function, device: str):
    """The public op, with calls that name the running test's backend carried to `device`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if _backend is None or kwargs.get("backend") != _backend:
            return function(*args, **kwargs)
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which says it in the op's own words
        there: dict[int, torch.Tensor] = {}  # the same tensor given twice stays one tensor

        def take(t):
            if id(t) not in there:
                there[id(t)] = _Carry.apply(t, device)
            return there[id(t)]

        tensors: list[torch.Tensor] = []
        map_tensors(list(arguments.values()), lambda t: tensors.append(t) or t)
        moved_arguments = {name: map_tensors(value, take) for name, value in arguments.items()}
        moved_arguments["backend"] = "cpu" if _backend == REHEARSAL else _backend
        try:
            result = function(**moved_arguments)
        except BackendUnavailable as error:
            if any(reason in str(error) for reason in BY_CONTRACT):
                pytest.skip(str(error))
            raise
        for name in WRITTEN.get(op, ()):
            if isinstance(arguments.get(name), torch.Tensor):
                with torch.no_grad():
                    arguments[name].copy_(moved_arguments[name])
        originals = {id(there[id(t)]): t for t in tensors}
        return map_tensors(result, lambda t: originals[id(t)] if id(t) in originals else _Carry.apply(t, "cpu"))

    return call


def pytest_configure(config):
    """Before any test module is imported: the public ops are replaced, and the backends that tests are parametrised with."""
    import tests.conftest

    names = os.environ.get("COBRA_CARRY", "").split(",")
    absent = {name: cobra_kernels.backends().get(name, "no such backend") for name in names if name != REHEARSAL}
    if not all(names) or any(absent.values()):
        raise pytest.UsageError(f"COBRA_CARRY={','.join(names)}: expected {REHEARSAL}, or GPU backends that are there: {absent}")
    device = "cpu" if names == [REHEARSAL] else "cuda"
    for op in cobra_kernels.ops.PLANS:
        setattr(cobra_kernels, op, carried(op, getattr(cobra_kernels, op), device))
    tests.conftest.kernel_backends = lambda device="cpu": names


def backend_of(item) -> str | None:
    """The carried backend of a test, or None."""
    callspec = getattr(item, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    return backend if backend in os.environ["COBRA_CARRY"].split(",") else None


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if backend_of(item)]
    config.hook.pytest_deselected(items=[item for item in items if not backend_of(item)])
    items[:] = kept


@pytest.fixture(autouse=True)
def _carried_backend(request):
    global _backend
    _backend = backend_of(request.node)
    yield
    _backend = None
