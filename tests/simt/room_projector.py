"""The projector's passes on numpy arrays: cases, and one function that checks a case (see room_rms_norm.py)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

DEVICES = ("cpu",)


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 2
    grid: tuple[int, int] = (5, 7)
    out_grid: tuple[int, int] = (3, 4)
    channels: int = 40
    dtype: str = "fp32"
    round_dtype: str = ""  # empty: as dtype
    bias_dtype: str | None = ""  # None: no bias

    @property
    def id(self) -> str:
        base = Case()
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != getattr(base, k)).replace(" ", "") or "base"


CASES = [
    Case(),
    *(Case(channels=c) for c in (0, 1, 7, 15, 16, 17, 255, 256, 257, 513)),
    *(Case(grid=g, out_grid=o, channels=17) for g, o in (((1, 1), (1, 1)), ((1, 1), (3, 2)), ((2, 3), (5, 5)), ((1, 9), (1, 4)), ((5, 7), (5, 7)),
                                                         ((8, 8), (4, 4)), ((9, 9), (1, 1)), ((27, 27), (14, 14)))),
    *(Case(batch=b) for b in (0, 1)),
    *(Case(dtype=d) for d in ("bf16", "fp16", "fp64")),
    *(Case(round_dtype=r, bias_dtype=r) for r in ("bf16", "fp16")),
    Case(bias_dtype=None),
    Case(dtype="bf16", bias_dtype=None),
]  # fmt: skip
SANITIZED = CASES


def gelu(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.ravel()]).reshape(x.shape)


def pool(x: np.ndarray, grid: tuple[int, int], out_grid: tuple[int, int]) -> np.ndarray:
    """(batch, H*W, channels) -> (batch, h*w, channels)."""
    x = x.reshape(x.shape[0], *grid, x.shape[2])
    for axis, (n, m) in enumerate(zip(grid, out_grid), 1):
        bins = [np.take(x, range(i * n // m, -(-(i + 1) * n // m)), axis).mean(axis) for i in range(m)]
        x = np.stack(bins, axis)
    return x.reshape(x.shape[0], out_grid[0] * out_grid[1], x.shape[3])


def peg(p: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, grid: tuple[int, int]) -> np.ndarray:
    image = np.pad(p.reshape(p.shape[0], *grid, p.shape[2]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [weight[:, 0, i, j] * image[:, i : i + grid[0], j : j + grid[1]] for i in range(3) for j in range(3)]
    return p + (sum(taps) + bias).reshape(p.shape)


def check(host, case: Case, device: str) -> None:
    """The three passes of one case against fp64, inputs unchanged, guards whole, outputs written."""
    rng = np.random.default_rng(0)
    tokens, round_dtype = case.grid[0] * case.grid[1], case.round_dtype or case.dtype
    limit = harness.OUTPUT[round_dtype]
    like = np.empty(0, harness.DTYPES[round_dtype])

    def make(shape, dtype):
        return Tensor(shape, dtype, "contiguous", rng.standard_normal(shape))

    bias = None if case.bias_dtype is None else make((case.channels,), case.bias_dtype or case.dtype)
    bias_array, bias_values = (None, 0.0) if bias is None else (bias.array, bias.values())
    hidden = make((case.batch, tokens, case.channels), case.dtype)
    expected = gelu(hidden.values() + bias_values)

    h = Tensor((case.batch * tokens, case.channels), case.dtype, "contiguous", hidden.values().reshape(case.batch * tokens, case.channels))
    host.projector_bias_gelu(h.array, bias_array, like)
    check_close(h, expected.reshape(h.array.shape), limit, "bias_gelu")

    pooled = Tensor((case.batch, case.out_grid[0] * case.out_grid[1], case.channels), case.dtype)
    host.projector_gelu_pool(hidden.array, bias_array, *case.grid, *case.out_grid, pooled.array, like)
    check_close(pooled, pool(expected, case.grid, case.out_grid), limit, "gelu_pool")
    hidden.check_unchanged("hidden")

    weight = make((case.channels, 1, 3, 3), round_dtype)
    y, before = Tensor(pooled.array.shape, round_dtype), pooled.array.copy()
    host.projector_peg(pooled.array, weight.array, bias_array, *case.out_grid, y.array)
    check_close(y, peg(pooled.values(), weight.values(), bias_values, case.out_grid), limit, "peg")
    assert np.array_equal(pooled.array.view("u1"), before.view("u1"))
    weight.check_unchanged("weight")
    if bias:
        bias.check_unchanged("bias")


def check_large_strides(host, device: str) -> None:
    """Only weights and biases have strides of their own; theirs count elements in 64 bits."""
    rng = np.random.default_rng(0)
    channels, step = 3, 2**31 + 64
    far = harness.sparse_rows(channels, 9, step)
    far[...] = rng.standard_normal((channels, 9))
    weight = np.lib.stride_tricks.as_strided(far, (channels, 1, 3, 3), (far.strides[0], 18, 6, 2))
    p, y = rng.standard_normal((1, 4, channels)).astype(np.float32), np.full((1, 4, channels), np.nan, np.float32)
    host.projector_peg(p, weight, far[:, 0], 2, 2, y)
    expected = peg(p.astype(np.float64), weight.astype(np.float64), far[:, 0].astype(np.float64), (2, 2))
    assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)
