"""Arrays with guard bands for kernels that take raw pointers. numpy only: sanitized processes import this without torch.

bf16 is carried as uint16, as in cobra_kernels_host. Every array starts filled with one odd NaN; what a kernel reads beyond
a tensor poisons its result, what it writes beyond one is found by `Tensor.check_guards`, what it forgets to write stays NaN.
"""

from __future__ import annotations

import importlib.util
import mmap
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

DTYPES = {"fp32": np.dtype("f4"), "bf16": np.dtype("u2"), "fp16": np.dtype("f2"), "fp64": np.dtype("f8")}
NAN_BITS = {"fp32": 0x7FC0DEAD, "bf16": 0x7FAD, "fp16": 0x7EAD, "fp64": 0x7FF8DEADDEADDEAD}
BITS = {2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}

# tests/tolerances.py for a process without torch; test_simt.py holds the two equal.
OUTPUT = {"fp32": 1e-6, "bf16": 2.9e-3, "fp16": 3.7e-4, "fp64": 1e-13}
GRADIENT = {"fp32": 1e-5, "bf16": 2.9e-3, "fp16": 3.7e-4, "fp64": 1e-12}

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 has it; Linux has one value

LAYOUTS = ("contiguous", "padded", "transposed", "sliced", "unaligned", "strided", "expanded")

# Elements before and after every tensor. Under AddressSanitizer 0: its own red zone then begins where the tensor ends.
guard = 64


def devices(room: ModuleType) -> tuple[str, ...]:
    """Where a room's kernels exist: its DEVICES, else both."""
    return getattr(room, "DEVICES", ("cuda", "cpu"))


def load_module(path: Path) -> ModuleType:
    """Imports cobra_kernels_host from a file, whatever other build of it is loaded."""
    spec = importlib.util.spec_from_file_location("cobra_kernels_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_module(target: str) -> Path:
    """Builds cobra_kernels_host ("host", "asan", "tsan") and returns its file."""
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import build
    finally:
        sys.path.pop(0)
    build.build_host(target)
    return build.host_module(target)


def to_fp64(array: np.ndarray) -> np.ndarray:
    """The values of an array, bf16 included."""
    if array.dtype == DTYPES["bf16"]:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp64 values rounded to nearest even in `dtype`."""
    if dtype != "bf16":
        return values.astype(DTYPES[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Tensor:
    """A numpy view `array` of a given layout inside a larger buffer of NaN."""

    def __init__(self, shape: tuple[int, ...], dtype: str, layout: str = "contiguous", values: np.ndarray | None = None) -> None:
        self.dtype = dtype
        item = DTYPES[dtype].itemsize
        inner = list(shape)
        offset, order = 0, list(range(len(shape)))
        if layout == "padded":  # rows stay 16-byte aligned, with a gap
            inner[-1] = (inner[-1] + 15) // 8 * 8
        elif layout == "sliced":
            inner = [n + 3 for n in shape]
        elif layout == "transposed":
            order = order[-1:] + order[:-1]
        elif layout == "unaligned":
            offset = 1
        elif layout == "expanded" and len(shape) > 1:
            inner[0] = 1
        strides, step = [0] * len(shape), 2 if layout == "strided" else 1
        for axis in reversed(order):
            strides[axis] = step * item
            step *= inner[axis]
        if layout == "expanded" and len(shape) > 1:
            strides[0] = 0
        count = guard + offset + max(step, 1) + guard
        raw = np.empty(count * item + (64 if guard else 0), np.uint8)
        start = -raw.ctypes.data % 64 if guard else 0
        self.buffer = raw[start : start + count * item].view(BITS[item])
        self.buffer[:] = NAN_BITS[dtype]
        base = guard + offset + (step // max(inner[0], 1) if layout == "sliced" and len(shape) > 1 else 0)
        flat = self.buffer.view(DTYPES[dtype])
        self.array = np.lib.stride_tricks.as_strided(flat[base:], shape, strides)
        if values is not None:
            self.array[...] = rounded(values, dtype)
        self.before = self.buffer.copy()

    def values(self) -> np.ndarray:
        """The contents in fp64."""
        return to_fp64(self.array)

    def check_unchanged(self, what: str) -> None:
        """An input, guards included, is as it was."""
        assert np.array_equal(self.buffer, self.before), f"{what}: the kernel wrote to an input"

    def check_guards(self, what: str) -> None:
        """Nothing but the tensor itself was written."""
        inside = np.zeros(self.buffer.shape, bool)
        if self.array.size:
            start = (self.array.ctypes.data - self.buffer.ctypes.data) // self.buffer.itemsize
            item = self.buffer.itemsize
            np.lib.stride_tricks.as_strided(inside[start:], self.array.shape, [s // item for s in self.array.strides])[...] = True
        touched = np.flatnonzero((self.buffer != self.before) & ~inside)
        assert touched.size == 0, f"{what}: the kernel wrote outside the tensor, at buffer elements {touched[:5].tolist()} of {len(inside)}"


class AddressSpaceRefused(RuntimeError):
    """The operating system was told never to promise more memory than it has."""


def sparse_rows(rows: int, dim: int, step: int) -> np.ndarray:
    """fp16 (rows, dim), rows `step` elements apart in reserved address space; only the pages touched take memory.

    2^31 elements lie before row 0, so an offset cut to 32 bits stays inside, reads zeros and gives a wrong result.
    """
    before = 2**31
    size = 2 * (before + (rows - 1) * step + dim)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        raise AddressSpaceRefused(f"this machine reserves no {size >> 30} GB of address space: {error}") from error
    flat = np.frombuffer(memory, np.float16)
    return np.lib.stride_tricks.as_strided(flat[before:], (rows, dim), (2 * step, 2))


def check_close(got: Tensor, expected: np.ndarray, limit: float, what: str) -> None:
    """L2-relative error within the limit, nothing left unwritten, nothing written outside."""
    got.check_guards(what)
    values = got.values()
    missing = np.isnan(values) & ~np.isnan(expected)
    assert not missing.any(), f"{what}: {missing.sum()} of {values.size} elements are NaN, first at {tuple(int(i[0]) for i in np.nonzero(missing))}"
    norm = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(values - expected)) / (norm or 1.0)
    assert error <= limit, f"{what}: relative error {error:.2e}, limit {limit:.1e} ({got.dtype})"
