"""Which backend serves a call, in one function and one order:

argument `backend=` -> use_backend() -> COBRA_KERNELS_BACKEND -> the default of the tensor's device.

A backend asked for by name that cannot serve is an error with the reason. Only the default may step down to the next one;
it says so once per op, and COBRA_KERNELS_STRICT=1 makes it an error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import extension
from .errors import ArgumentError, BackendUnavailable, CobraKernelsError

NAMES = ("reference", "cpu", "triton", "cuda")
TRANSFORMED = "torch.func transforms and forward-mode differentiation are served by reference only"
DEFAULTS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class Backend(NamedTuple):
    """One row of an op's BACKENDS table."""

    reason: Callable[..., str | None]  # why it cannot serve these tensors, or None; called with what the op passes to select()
    gradients: str  # where its gradients come from, for supports()


def _environment_backend() -> str | None:
    name = os.environ.get("COBRA_KERNELS_BACKEND") or None
    if name is not None and name not in NAMES:
        raise ArgumentError(f"COBRA_KERNELS_BACKEND: got {name!r}, expected one of {', '.join(NAMES)}")
    return name


class _Forced(threading.local):
    name: str | None = None


ENVIRONMENT_BACKEND = _environment_backend()
STRICT = os.environ.get("COBRA_KERNELS_STRICT") == "1"
_forced = _Forced()
_last_forced: str | None = None  # by any thread: compiled code guards on a global, on a thread's own value it cannot
_warned: set[tuple[str, str]] = set()
_python_counts: dict[tuple[str, str], int] = {}


# --- reasons shared by the rows --------------------------------------------------------------------------------------


def reference_reason(first: torch.Tensor, *_) -> str | None:
    """The reference runs on every device and dtype."""
    return None


def cpu_reason(first: torch.Tensor, *_) -> str | None:
    """Compiled CPU kernels: CPU tensors, extension present."""
    if not first.is_cpu:
        return f"it runs on CPU tensors, got a tensor on {first.device}"
    return extension.absence()


def triton_reason(first: torch.Tensor, *_) -> str | None:
    """Triton kernels: CUDA tensors (or the interpreter), triton installed, no fp64."""
    absent = triton_absence()
    if absent is not None:
        return absent
    if not first.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on CUDA tensors, got a tensor on {first.device}"
    if first.dtype == torch.float64:
        return "float64 is served by reference and cpu only"
    return None


def cuda_reason(first: torch.Tensor, *_) -> str | None:
    """Compiled CUDA kernels: CUDA tensors, extension built with nvcc for this GPU, no fp64."""
    if not first.is_cuda:
        return f"it runs on CUDA tensors, got a tensor on {first.device}"
    absent = cuda_absence()
    if absent is not None:
        return absent
    if first.dtype == torch.float64:
        return "float64 is served by reference and cpu only"
    return None


def no_kernel(first: torch.Tensor, *_) -> str | None:
    """A row whose kernel does not exist."""
    return "this op has no kernel for it"


@functools.cache
def triton_absence() -> str | None:
    """Why Triton cannot be used here, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def cuda_absence() -> str | None:
    """Why the CUDA kernels cannot be used here, or None."""
    if extension.absence() is not None:
        return extension.absence()
    images = extension.cuda_images()
    if not images:
        return "the extension was built without CUDA (nvcc not found or COBRA_KERNELS_BUILD_CUDA=0)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    served = {f"sm_{major}{minor}", f"sm_{major}{minor}a"} & set(images)
    if not served and (major, minor) < (8, 0):
        return f"the GPU is sm_{major}{minor}; images start at sm_80"
    return None


# --- selection -------------------------------------------------------------------------------------------------------


def select(op: str, table: dict[str, Backend], backend: str | None, first: torch.Tensor, *rest) -> str:
    """The backend that serves this call. `first` decides the device; all tensors given are passed to the rows' reasons."""
    name = backend
    if name is None and (_last_forced is not None or _forced.name is not None):
        name = _forced.name
    if name is None:
        name = ENVIRONMENT_BACKEND
    # torch.func and forward-mode differentiation see through plain torch only; a kernel would drop a tangent in silence.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if name is not None:
        if name not in NAMES:
            raise ArgumentError(f"{op}: backend is {name!r}, expected one of {', '.join(NAMES)} or None")
        reason = TRANSFORMED if transformed and name != "reference" else table[name].reason(first, *rest)
        if reason is not None:
            raise BackendUnavailable(f"{op}: backend {name!r} cannot serve: {reason}")
        return name
    reasons = []
    for name in DEFAULTS.get(first.device.type, ("reference",)):
        reason = TRANSFORMED if transformed and name != "reference" else table[name].reason(first, *rest)
        if reason is None:
            if reasons:
                _step_down(op, name, reasons)
            return name
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable(f"{op}: no backend can serve: {'; '.join(reasons)}")


def _step_down(op: str, name: str, reasons: list[str]) -> None:
    text = f"{op} runs on {name!r}, not on the default backend ({'; '.join(reasons)})"
    if STRICT:
        raise BackendUnavailable(f"{text}; COBRA_KERNELS_STRICT=1 forbids that")
    if (op, name) not in _warned:
        _warned.add((op, name))
        warnings.warn(f"cobra_kernels: {text}. Said once per op.", RuntimeWarning, stacklevel=4)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Every op called inside, on this thread, runs on `name` (None: the default again)."""
    if name is not None and name not in NAMES:
        raise ArgumentError(f"use_backend: got {name!r}, expected one of {', '.join(NAMES)} or None")
    global _last_forced
    previous, _forced.name = _forced.name, name
    last, _last_forced = _last_forced, name
    try:
        yield
    finally:
        _forced.name, _last_forced = previous, last


# --- what users ask --------------------------------------------------------------------------------------------------


def backends() -> dict[str, str | None]:
    """Every backend with the reason why it cannot be used on this machine, or None when it can."""
    triton = triton_absence()
    if triton is None and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        triton = "torch sees no CUDA device"
    return {"reference": None, "cpu": extension.absence(), "triton": triton, "cuda": cuda_absence()}


def supports(op: str, *args, **kwargs) -> tuple[bool, str]:
    """Whether `op` (its name) would serve these arguments, and by what or why not. The op raises exactly when it is False.

    >>> supports("rms_norm", x, weight, backend="cuda")
    (False, "rms_norm: backend 'cuda' cannot serve: it runs on CUDA tensors, got a tensor on cpu")
    """
    from . import ops

    if op not in ops.PLANS:
        raise ArgumentError(f"supports: no op {op!r}, expected one of {', '.join(sorted(ops.PLANS))}")
    plan, table = ops.PLANS[op]
    try:
        name = plan(*args, **kwargs)
    except (CobraKernelsError, TypeError) as error:
        return False, str(error)
    return True, f"{name}; gradients: {table[name].gradients}"


def count(op: str, backend: str) -> None:
    """Counts a call of a Python implementation; does nothing while a compiler traces."""
    if not torch.compiler.is_compiling():
        _python_counts[op, backend] = _python_counts.get((op, backend), 0) + 1


def call_counts() -> dict[tuple[str, str], int]:
    """(op, backend) -> calls since the start or the last reset: the proof of who ran."""
    counts = {**extension.call_counts()}
    for key, value in _python_counts.items():
        counts[key] = counts.get(key, 0) + value
    return {key: value for key, value in counts.items() if value}


def reset_call_counts() -> None:
    """Sets every counter to 0."""
    extension.reset_call_counts()
    _python_counts.clear()
