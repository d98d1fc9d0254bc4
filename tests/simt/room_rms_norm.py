"""rms_norm on numpy arrays: cases, and one function that checks a case on a device of cobra_kernels_host.

Every room_<op>.py of this folder has CASES (with `id`), `check(host, case, device)`, SANITIZED (what sanitizers run), RACES if
ThreadSanitizer runs fewer of the CUDA source, and DEVICES if its kernels do not exist on both "cuda" and "cpu".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

EPS = 1e-6


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    shape: tuple[int, ...] = (3, 136)
    dtype: str = "fp32"
    weight_dtype: str = ""  # empty: as x
    residual_dtype: str | None = "fp32"  # None: no residual
    s_dtype: str | None = "fp32"  # None: the sum is not stored, and no gradient comes through it
    bias: bool = True
    is_rms_norm: bool = True
    layout: str = "contiguous"
    max_grid_x: int = 0  # 0: as the GPU

    @property
    def id(self) -> str:
        base = Case()
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != getattr(base, k)).replace(" ", "") or "base"


# On both sides of every change of kernel: 256, 512, 1024, 6144, 16384 channels forward (fp32: 256, 8192), 256, 512 and 8192 (fp32: 5120)
# backward; odd sizes and layouts run the strided kernels.
VECTOR_DIMS = (4, 8, 128, 248, 256, 264, 512, 520, 1024, 1032, 5120, 5128, 6144, 6152, 8192, 8200)
STRIDED_DIMS = (1, 2, 3, 7, 31, 33, 127, 129, 255, 257, 1023, 1025)
CASES = [
    Case(),
    *(Case(shape=(2, dim), dtype=d) for dim in VECTOR_DIMS for d in ("fp32", "bf16")),
    *(Case(shape=(2, dim)) for dim in STRIDED_DIMS),
    *(Case(shape=(1, dim), dtype="bf16", bias=False) for dim in (16384, 16392)),
    *(Case(shape=(rows, dim)) for rows in (0, 1, 15, 16, 17, 33) for dim in (40, 41)),
    *(Case(shape=(rows, 8), dtype="fp16") for rows in (127, 4100)),  # of the backward's row blocks, some are empty
    *(Case(shape=(2, dim), dtype="fp16") for dim in (512, 1024, 1032)),
    Case(shape=(2, 2560)),
    Case(shape=(5, 2560), dtype="bf16"),  # several rows, one after the other, in a block
    Case(shape=(5, 0)),
    *(Case(shape=shape) for shape in ((64,), (2, 3, 4, 64), (2, 3, 4, 65), (1, 2, 1, 3, 2, 1, 8), (4, 0, 8))),
    *(Case(dtype=d, is_rms_norm=n) for d in ("bf16", "fp16") for n in (True, False)),
    *(Case(shape=(3, dim), is_rms_norm=False, bias=b) for dim in (129, 256, 2560) for b in (True, False)),
    *(Case(dtype=d, weight_dtype=w, residual_dtype=r, s_dtype=s)
      for d, w, r, s in (("bf16", "fp32", "fp32", "fp32"), ("bf16", "fp16", "bf16", "bf16"), ("fp16", "bf16", "fp16", None),
                         ("fp32", "bf16", "fp16", "bf16"), ("fp32", "fp16", None, None))),
    *(Case(residual_dtype=None, s_dtype=s, dtype="bf16") for s in (None, "fp32")),
    *(Case(shape=(3, 129), residual_dtype=None, s_dtype=s) for s in (None, "fp32")),
    # fp64: a group a warp and a block, one row and several, the strided kernel; the layouts.
    *(Case(shape=(rows, dim), dtype="fp64", residual_dtype=r, s_dtype=r, is_rms_norm=n, bias=r is not None)
      for rows, dim in ((3, 129), (5, 136), (150, 8), (5, 2560), (2, 5128)) for r in ("fp64", None) for n in (True, False)),
    *(Case(shape=(3, 5, 34), layout=x, dtype="fp64", residual_dtype="fp64", s_dtype="fp64") for x in harness.LAYOUTS[1:]),
    *(Case(shape=(3, 5, dim), layout=x, dtype=d) for x in harness.LAYOUTS[1:] for dim, d in ((33, "fp32"), (64, "bf16"))),
    *(Case(shape=(23, dim), max_grid_x=most) for dim, most in ((40, 3), (41, 3), (2048, 12))),
]  # fmt: skip

# A third of the small ones, every layout, and whatever it takes to run each kernel: (2, 1032) and (2, 512) are rows of several warps and of
# one in every dtype, (5, 2560) keeps its weights in shared memory over several rows.
KERNELS = ((2, 512), (2, 1032), (5, 2560))
SANITIZED = [case for i, case in enumerate(CASES)
             if np.prod(case.shape) <= 5000 and (i % 3 == 0 or case.layout != "contiguous") or case.shape in KERNELS]  # fmt: skip
# ThreadSanitizer sees who touches what and not which values: of each kernel one dtype, of the rest every other one.
RACES = [case for i, case in enumerate(SANITIZED)
         if (case.dtype == "bf16" if case.shape in KERNELS else i % 2 or case.layout != "contiguous")]  # fmt: skip


def mean(a: np.ndarray) -> np.ndarray:
    """Mean over the last dim, kept; 0 of nothing."""
    return a.sum(-1, keepdims=True) / max(a.shape[-1], 1)


def normal(x: np.ndarray, residual: np.ndarray | None, is_rms_norm: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(s, n, rstd) in fp64: the sum, its normal form, one over its spread."""
    s = x if residual is None else x + residual
    centred = s if is_rms_norm else s - mean(s)
    rstd = 1 / np.sqrt(mean(centred**2) + EPS)
    return s, centred * rstd, rstd


def gradients(dy, ds, x, weight, residual, is_rms_norm):
    """(d(x + residual), dweight, dbias) in fp64."""
    _, n, rstd = normal(x, residual, is_rms_norm)
    g, leading = dy * weight, tuple(range(dy.ndim - 1))
    d_sum = rstd * (g - n * mean(g * n) - (0 if is_rms_norm else mean(g)))
    return d_sum if ds is None else d_sum + ds, (dy * n).sum(leading), dy.sum(leading)


def check(host, case: Case, device: str) -> None:
    """Forward and backward of one case against fp64, inputs unchanged, guards whole, outputs written.

    CUDA in fp64: the backward alone, whose source the emulator also runs in double.
    """
    rng = np.random.default_rng(0)
    shape, dim, weight_dtype = case.shape, case.shape[-1], case.weight_dtype or case.dtype
    output_layout = "contiguous" if case.layout == "expanded" else case.layout

    def random(shape, dtype, offset=0.0):
        return Tensor(shape, dtype, case.layout, rng.standard_normal(shape) + offset)

    x, weight = random(shape, case.dtype, 0.5), random((dim,), weight_dtype)
    bias = random((dim,), weight_dtype) if case.bias else None
    residual = random(shape, case.residual_dtype) if case.residual_dtype else None
    y, s = Tensor(shape, case.dtype, output_layout), Tensor(shape, case.s_dtype, output_layout) if case.s_dtype else None

    def array(tensor):
        return None if tensor is None else tensor.array

    def values(tensor):
        return None if tensor is None else tensor.values()

    if device == "cpu" or case.dtype != "fp64":
        host.rms_norm_fwd(device, x.array, weight.array, array(bias), array(residual), y.array, array(s), EPS, case.is_rms_norm)
        expected_s, n, _ = normal(x.values(), values(residual), case.is_rms_norm)
        expected_y = n * weight.values() + (bias.values() if bias else 0)
        check_close(y, expected_y, harness.OUTPUT[case.dtype], "y")
        if s:
            check_close(s, expected_s, harness.OUTPUT[case.s_dtype], "s")

    dy = random(shape, case.dtype)
    ds = random(shape, case.s_dtype) if s else None
    dx = Tensor(shape, case.dtype, output_layout)
    dresidual = Tensor(shape, case.residual_dtype, output_layout) if residual else None
    dweight, dbias = Tensor((dim,), weight_dtype), Tensor((dim,), weight_dtype) if bias else None
    row_blocks = host.rms_norm_bwd_row_blocks(device, int(np.prod(shape[:-1])), dim)
    partial = Tensor((2 if bias else 1, row_blocks, dim), "fp64" if case.dtype == "fp64" else "fp32")
    host.rms_norm_bwd(device, dy.array, array(ds), x.array, array(residual), weight.array, dx.array, array(dresidual), dweight.array,
                      array(dbias), partial.array, EPS, case.is_rms_norm)  # fmt: skip
    d_sum, expected_dweight, expected_dbias = gradients(
        dy.values(), values(ds), x.values(), weight.values(), values(residual), case.is_rms_norm)  # fmt: skip
    check_close(dx, d_sum, harness.GRADIENT[case.dtype], "dx")
    if dresidual:
        check_close(dresidual, d_sum, harness.GRADIENT[case.residual_dtype], "dresidual")
    check_close(dweight, expected_dweight, harness.GRADIENT[weight_dtype], "dweight")
    if dbias:
        check_close(dbias, expected_dbias, harness.GRADIENT[weight_dtype], "dbias")
    partial.check_guards("partial")
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "residual": residual, "dy": dy, "ds": ds}.items():
        if tensor:
            tensor.check_unchanged(name)


def check_large_strides(host, device: str) -> None:
    """Rows further apart than 32 bits count elements, forward and backward. 13 GB of address space, a few pages of memory."""
    dim, step = 40, 2**31 + 64
    rng = np.random.default_rng(0)
    tensors = [harness.sparse_rows(3, dim, step) for _ in range(4)]
    x, dy, y, dx = tensors
    x[...], dy[...] = (rng.standard_normal((3, dim)).astype(np.float16) for _ in range(2))
    weight = np.ones(dim, np.float32)
    dweight, partial = np.full(dim, np.nan, np.float32), np.empty((1, 1, dim), np.float32)
    host.rms_norm_fwd(device, x, weight, None, None, y, None, EPS, True)
    host.rms_norm_bwd(device, dy, None, x, None, weight, dx, None, dweight, None, partial, EPS, True)
    _, n, _ = normal(x.astype(np.float64), None, True)
    d_sum, expected_dweight, _ = gradients(dy.astype(np.float64), None, x.astype(np.float64), weight, None, True)
    for name, got, expected in (("y", y, n), ("dx", dx, d_sum), ("dweight", dweight, expected_dweight)):
        error = np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)
        assert error <= harness.OUTPUT["fp16"], f"{name}: relative error {error:.2e} with rows 2^31 + 64 elements apart"
