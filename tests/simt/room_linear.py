"""few_rows_linear on numpy arrays: as room_rms_norm.py. A CPU kernel alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

DEVICES = ("cpu",)


class Case(NamedTuple):
    rows: int = 1
    inner: int = 70
    out: int = 9
    dtype: str = "fp32"
    weight_dtype: str = ""  # empty: as x
    bias_dtype: str | None = ""  # None: no bias
    layout: str = "contiguous"  # of x; the weight's rows lie apart where it is not contiguous

    @property
    def id(self) -> str:
        base = Case()
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != getattr(base, k)) or "base"


CASES = [
    *(Case(rows=r, inner=k, dtype=d) for r in (1, 2, 3, 4, 5, 8, 11) for k, d in ((70, "fp32"), (64, "bf16"))),
    *(Case(inner=k, dtype=d) for k in (1, 7, 8, 31, 32, 33, 63, 64, 65, 257) for d in ("fp32", "bf16", "fp16")),
    *(Case(out=n, rows=3) for n in (0, 1, 2, 130)),
    Case(rows=0),
    Case(inner=0, rows=2),
    *(Case(rows=5, dtype=d, weight_dtype=w, bias_dtype=b) for d, w, b in (("fp32", "bf16", "fp16"), ("bf16", "fp32", ""), ("fp16", "bf16", None))),
    *(Case(rows=3, layout=x, dtype=d) for x in harness.LAYOUTS[1:] for d in ("fp32", "bf16")),
]  # fmt: skip
SANITIZED = CASES


def check(host, case: Case, device: str) -> None:
    """One product against fp64, inputs unchanged, guards whole, outputs written; a row alone gives the same bits."""
    rng = np.random.default_rng(0)
    x = Tensor((case.rows, case.inner), case.dtype, case.layout, rng.standard_normal((case.rows, case.inner)))
    apart = {"contiguous": "contiguous", "unaligned": "unaligned"}.get(case.layout, "padded")
    weight = Tensor((case.out, case.inner), case.weight_dtype or case.dtype, apart, rng.standard_normal((case.out, case.inner)))
    bias = None
    if case.bias_dtype is not None:
        spread = "contiguous" if case.layout == "contiguous" else "strided"
        bias = Tensor((case.out,), case.bias_dtype or case.dtype, spread, rng.standard_normal(case.out))
    y = Tensor((case.rows, case.out), case.dtype)
    host.few_rows_linear(x.array, weight.array, bias and bias.array, y.array)
    expected = x.values() @ weight.values().T + (bias.values() if bias else 0)
    check_close(y, expected, harness.OUTPUT[case.dtype], "y")
    for name, tensor in {"x": x, "weight": weight, "bias": bias}.items():
        if tensor is not None:
            tensor.check_unchanged(name)
    for row in range(case.rows):
        alone = np.empty((1, case.out), y.array.dtype)
        host.few_rows_linear(x.array[row : row + 1], weight.array, bias and bias.array, alone)
        assert np.array_equal(alone[0], y.array[row]), f"row {row}: its bits depend on the other rows"


def check_large_strides(host, device: str) -> None:
    """Rows of x and of the weight further apart than 32 bits count elements."""
    rng, step = np.random.default_rng(0), 2**31 + 64
    x, weight = (harness.sparse_rows(2, 40, step) for _ in range(2))
    x[...], weight[...] = rng.standard_normal((2, 2, 40))
    y = np.empty((2, 2), np.float16)
    host.few_rows_linear(x, weight, None, y)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.linalg.norm(y - expected) <= harness.OUTPUT["fp16"] * np.linalg.norm(expected)
