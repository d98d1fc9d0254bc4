"""Loads the compiled extension once and remembers why it could not be loaded."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from .errors import ArgumentError, BackendUnavailable

PATH = Path(__file__).with_name("_C.abi3.so")
MINIMUM_TORCH = (2, 11)
CPU_LEVELS = ("scalar", "avx2", "avx512")

_library: ctypes.CDLL | None = None
_reason: str | None = None  # why the extension is absent


def _load() -> None:
    global _library, _reason
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        _reason = f"torch {torch.__version__} found, 2.11 or later is needed"
        return
    if not PATH.exists():
        _reason = "the compiled extension is not installed (no C++ compiler at build time?); reinstall with g++ present"
        return
    try:
        torch.ops.load_library(str(PATH))
        _library = ctypes.CDLL(str(PATH))
    except OSError as error:
        _reason = f"the compiled extension does not load: {error}"
        return
    _library.cobra_call_count.restype = ctypes.c_int64
    _library.cobra_call_count.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.POINTER(ctypes.c_char_p)]
    _library.cobra_cuda_images.restype = ctypes.c_char_p
    level = os.environ.get("COBRA_KERNELS_CPU_LEVEL")
    if level:
        set_cpu_level(level)


def absence() -> str | None:
    """Why the compiled kernels are not there, or None when they are."""
    return _reason


def cpu_level() -> str | None:
    """Instruction-set level of the CPU kernels in use: scalar, avx2 or avx512; None without the extension."""
    return CPU_LEVELS[_library.cobra_cpu_level()] if _library else None


def best_cpu_level() -> str | None:
    """The best level this processor can run."""
    return CPU_LEVELS[_library.cobra_best_cpu_level()] if _library else None


def set_cpu_level(level: str) -> None:
    """Forces a level (also COBRA_KERNELS_CPU_LEVEL). Raises ArgumentError for an unknown one, BackendUnavailable for one
    that this processor lacks."""
    if level not in CPU_LEVELS:
        raise ArgumentError(f"COBRA_KERNELS_CPU_LEVEL: got {level!r}, expected one of {', '.join(CPU_LEVELS)}")
    if _library is None:
        raise BackendUnavailable(f"cpu level {level}: {_reason}")
    if not _library.cobra_set_cpu_level(CPU_LEVELS.index(level)):
        raise BackendUnavailable(f"cpu level {level}: this processor only reaches {best_cpu_level()}")


def cuda_images() -> list[str]:
    """GPU images in the extension, such as ['sm_80', 'sm_90a', 'compute_80']; empty for a CPU-only build."""
    return _library.cobra_cuda_images().decode().split() if _library else []


def call_counts() -> dict[tuple[str, str], int]:
    """(op, backend) -> calls of the compiled implementations."""
    counts: dict[tuple[str, str], int] = {}
    op, backend = ctypes.c_char_p(), ctypes.c_char_p()
    index = 0
    while _library is not None:
        count = _library.cobra_call_count(index, ctypes.byref(op), ctypes.byref(backend))
        if count < 0:
            break
        counts[op.value.decode(), backend.value.decode()] = count
        index += 1
    return counts


def reset_call_counts() -> None:
    """Sets the counters of the compiled implementations to 0."""
    if _library is not None:
        _library.cobra_reset_call_counts()


_load()
