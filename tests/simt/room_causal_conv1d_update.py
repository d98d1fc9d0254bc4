"""causal_conv1d_update on numpy arrays: cases, and one function that checks a case (see room_rms_norm.py)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

DEVICES = ("cuda", "cpu")


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 3
    dim: int = 35
    steps: int | None = None  # None: x is (batch, dim)
    width: int = 4
    state_len: int = 3
    dtype: str = "fp32"
    state_dtype: str = ""  # empty: as x
    weight_dtype: str = ""
    bias: bool = True
    silu: bool = True
    layout: str = "contiguous"
    y_layout: str = ""  # empty: as x
    weight_layout: str = ""
    state_layout: str = "contiguous"
    circular: str | None = None  # dtype of cache_seqlens
    indices: str | None = None
    any_bits: bool = False  # x and the state hold any bits, signalling NaNs too; the new state is compared bit for bit
    max_grid_x: int = 0  # 0: as the GPU

    @property
    def id(self) -> str:
        base = Case()
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != getattr(base, k)) or "base"


PlainFilter = partial(Case, weight_layout="contiguous")  # what the kernel for a decode step wants
CASES = [
    Case(),
    # A state of 2, 3 or 4 columns has code of its own, in blocks of 1024 channels.
    *(Case(dim=dim, state_len=n) for dim in (0, 1, 15, 16, 17, 64, 65, 1023, 1024, 1025) for n in (3, 5)),
    *(Case(width=w, state_len=n, dtype=d, state_dtype=s)
      for w, n in ((1, 0), (1, 2), (2, 1), (2, 2), (3, 2), (3, 3), (4, 4), (5, 4), (5, 5), (6, 7), (7, 6), (8, 8), (9, 8), (18, 20))
      for d, s in (("fp32", ""), ("bf16", "fp32"), ("fp16", ""))),
    *(Case(steps=steps, state_len=n, circular=c) for steps in (0, 1, 2, 3, 4, 5) for n in (3, 5) for c in (None, "i4") if not c or steps <= n),
    *(Case(steps=7, state_len=n) for n in (3, 5, 7, 8)),
    *(Case(width=1, state_len=0, steps=s, circular=c) for s, c in ((0, "i4"), (3, None))),
    Case(steps=2, state_len=5, circular="i8", indices="i8", dtype="bf16"),
    *(Case(indices=i, state_len=n) for i in ("i4", "i8") for n in (3, 5)),
    Case(batch=0),
    Case(batch=0, indices="i4"),
    Case(bias=False, silu=False),
    *(Case(dtype=d, state_dtype=s, weight_dtype=w, state_len=n)
      for d in ("fp32", "bf16", "fp16") for s in ("fp32", "bf16", "fp16") for w in ("", "fp32") for n in (3, 6)),
    *(Case(dtype="fp64", state_len=n, steps=s) for n in (3, 5) for s in (None, 2)),
    *(Case(layout=x, state_layout=y, dtype=d, steps=s)
      for x in harness.LAYOUTS[1:] for y in ("contiguous", x) if y != "expanded" for d in ("fp32", "bf16") for s in (None, 2)),
    *(Case(state_layout=x, state_len=n) for x in harness.LAYOUTS[1:-1] for n in (3, 5)),
    *(Case(circular="i4", state_len=5, steps=2, layout=x, state_layout=x) for x in harness.LAYOUTS[1:-1]),
    # CUDA, a decode step: several blocks of packs, batch rows around those of a thread, padding, what keeps a state out of packs.
    *(PlainFilter(batch=b, dim=d, state_len=n, dtype=t) for b, d in ((1, 40), (2, 2056), (9, 8)) for n in (3, 4) for t in ("fp32", "bf16", "fp16")),
    *(PlainFilter(batch=7, dim=40, state_len=n, indices=i, dtype=t) for n in (3, 4) for i, t in (("i4", "bf16"), ("i8", "fp32"))),
    *(PlainFilter(dim=40, state_len=n, dtype="bf16", weight_dtype="fp32", bias=n == 3, silu=n == 3, steps=1) for n in (3, 4)),
    *(PlainFilter(dim=d, state_len=n, dtype="bf16", batch=b) for b, d in ((1, 9), (1, 15), (5, 6), (3, 12), (2, 34)) for n in (3, 4)),
    *(PlainFilter(dim=40, state_len=4, layout=x, state_layout=y, dtype="bf16")
      for x, y in (("padded", "contiguous"), ("unaligned", "contiguous"), ("contiguous", "unaligned"), ("sliced", "contiguous"),
                   ("contiguous", "sliced"), ("transposed", "transposed"), ("contiguous", "transposed"), ("strided", "contiguous"),
                   ("contiguous", "padded"), ("contiguous", "columns"))),
    *(PlainFilter(dim=40, state_len=4, layout=x, y_layout=y, dtype="bf16") for x, y in (("strided", "contiguous"), ("contiguous", "strided"))),
    *(PlainFilter(dim=40, state_len=4, circular="i4", steps=s) for s in (None, 1)),
    *(PlainFilter(dim=40, state_len=4, dtype=t, state_dtype=s) for t, s in (("bf16", "fp32"), ("fp16", "bf16"), ("fp32", "bf16"))),
    *(PlainFilter(dim=40, state_len=n, dtype=t, any_bits=True, steps=s, indices=i)
      for n in (3, 4, 6) for t in ("fp32", "bf16", "fp16") for s, i in ((None, None), (2, None), (None, "i4"))),
    *(PlainFilter(batch=9, dim=d, state_len=n, indices="i4", max_grid_x=1) for d in (40, 300) for n in (4, 5)),
]  # fmt: skip
SANITIZED = [case for i, case in enumerate(CASES) if case.batch * case.dim <= 400 or i % 5 == 0]


def expected_update(x, state, weight, bias, silu, seen, rows):
    """(y, new state) in fp64; x is (batch, dim, steps), seen is None or steps seen per batch row."""
    y, state = np.zeros_like(x), state.copy()
    steps, length, past = x.shape[2], state.shape[2], weight.shape[1] - 1
    for b, row in enumerate(rows):
        if row < 0:
            continue
        if seen is None:
            history = np.concatenate([state[row], x[b]], axis=1)
            state[row], before = history[:, steps:], history[:, length - past : length]
        else:
            before = state[row][:, [(int(seen[b]) - past + j) % length for j in range(past)]]
            for s in range(steps):
                state[row][:, (int(seen[b]) + s) % length] = x[b][:, s]
        window = np.concatenate([before, x[b]], axis=1)
        total = sum(weight[:, w, None] * window[:, w : w + steps] for w in range(past + 1)) + bias[:, None]
        y[b] = total / (1 + np.exp(-total)) if silu else total
    return y, state


def check(host, case: Case, device: str) -> None:
    """One update against fp64, inputs unchanged, guards whole, y written, padding and kept columns left alone."""
    if device == "cuda" and "fp64" in (case.dtype, case.state_dtype):
        return  # served by cpu and reference only
    rng = np.random.default_rng(0)
    pool = case.batch if case.indices is None else case.batch + 2
    shape = (case.batch, case.dim) if case.steps is None else (case.batch, case.dim, case.steps)

    def make(shape, dtype=case.dtype, layout=case.layout):
        return Tensor(shape, dtype or case.dtype, layout, rng.standard_normal(shape))

    if case.state_layout == "columns":  # as in other states, channels are state_len apart; columns are far apart
        state = Tensor((pool, case.state_len, case.dim, case.state_len), case.state_dtype or case.dtype)
        state.array = state.array[..., 0].transpose(0, 2, 1)
        state.array[...] = harness.rounded(rng.standard_normal(state.array.shape), state.dtype)
        state.before = state.buffer.copy()
    else:
        state = make((pool, case.dim, case.state_len), case.state_dtype, case.state_layout)
    inputs = {"x": make(shape), "weight": make((case.dim, case.width), case.weight_dtype, case.weight_layout or case.layout)}
    inputs["bias"] = make((case.dim,), case.weight_dtype) if case.bias else None
    y = Tensor(shape, case.dtype, case.y_layout or ("contiguous" if case.layout == "expanded" else case.layout))
    # Any number of steps may have been seen; a count below 0 wraps too.
    seen = np.array([7, -1, 2**31 - 1], case.circular)[: case.batch] if case.circular else None
    rows = np.arange(case.batch)
    if case.indices:
        rows = rng.permutation(pool - 1)[: case.batch].astype(case.indices)
        rows[1:2] = -1
        rows[-1:] = pool + 5  # clamped: wrong numbers in the last row of the pool, no access outside it

    if case.any_bits:
        for tensor in (state, inputs["x"]):
            bits = tensor.array.view(harness.BITS[tensor.array.itemsize])
            bits[...] = rng.integers(0, 2 ** (8 * bits.itemsize), bits.shape, np.uint64)
        bits, new = state.array.view(harness.BITS[state.array.itemsize]), inputs["x"].array.view(harness.BITS[inputs["x"].array.itemsize])
        expected_bits = bits.copy()
        for b, row in enumerate(np.minimum(rows, pool - 1)):
            if row >= 0:
                expected_bits[row] = np.concatenate([bits[row], new[b].reshape(case.dim, -1)], axis=1)[:, -case.state_len :]
        host.causal_conv1d_update(device, inputs["x"].array, state.array, inputs["weight"].array, None, case.silu, None,
                                  rows if case.indices else None, y.array)  # fmt: skip
        assert np.array_equal(bits, expected_bits), f"conv_state: {(bits != expected_bits).sum()} of {bits.size} elements changed their bits"
        state.check_guards("conv_state")
        return

    wide = {name: None if t is None else t.values() for name, t in inputs.items()}
    wide["x"] = wide["x"].reshape(case.batch, case.dim, 1 if case.steps is None else case.steps)
    wide["bias"] = np.zeros(case.dim) if wide["bias"] is None else wide["bias"]
    expected_y, expected_state = expected_update(wide["x"], state.values(), wide["weight"], wide["bias"], case.silu, seen, np.minimum(rows, pool - 1))
    host.causal_conv1d_update(device, inputs["x"].array, state.array, inputs["weight"].array, inputs["bias"].array if case.bias else None, case.silu,
                              seen, rows if case.indices else None, y.array)  # fmt: skip
    check_close(y, expected_y.reshape(shape), harness.OUTPUT[case.dtype], "y")
    exact = state.dtype == case.dtype
    check_close(state, expected_state, 0.0 if exact else harness.OUTPUT[state.dtype], "conv_state")
    for name, tensor in inputs.items():
        if tensor:
            tensor.check_unchanged(name)


def check_large_strides(host, device: str) -> None:
    """Batch rows, then channels, of x, y and the state further apart than 32 bits count elements; then columns."""
    n, step = 6, 2**31 + 64
    rng = np.random.default_rng(0)
    x, y, state = (harness.sparse_rows(2, n, step) for _ in range(3))
    views = {"batch rows": lambda t: t[:, None], "channels": lambda t: t[None], "steps and columns": lambda t: t.T[None]}
    for what, view in views.items():
        x[...], state[...] = (rng.standard_normal((2, n)) for _ in range(2))
        y[...] = np.nan
        at, pool = view(x), view(state)
        weight = rng.standard_normal((at.shape[1], 3)).astype(np.float32)
        bias = np.zeros(at.shape[1])
        expected_y, expected_state = expected_update(
            at.astype(np.float64), pool.astype(np.float64), weight, bias, True, None, range(at.shape[0])
        )
        host.causal_conv1d_update(device, at, pool, weight, None, True, None, None, view(y))
        error = np.linalg.norm(view(y) - expected_y) / np.linalg.norm(expected_y)
        assert error <= harness.OUTPUT["fp16"] * 1.5, f"y: relative error {error:.2e} with {what} 2^31 + 64 elements apart"
        assert np.array_equal(pool, expected_state), f"conv_state: wrong with {what} 2^31 + 64 elements apart"
    # A decode step on packs.
    x, y, state = (harness.sparse_rows(2, n, step) for n in (8, 8, 32))
    pool = np.lib.stride_tricks.as_strided(state, (2, 8, 4), (2 * step, 8, 2))
    x[...], pool[...] = rng.standard_normal(x.shape), rng.standard_normal(pool.shape)
    weight = rng.standard_normal((8, 4)).astype(np.float32)
    wide = x.astype(np.float64)[..., None], pool.astype(np.float64)
    expected_y, expected_state = expected_update(*wide, weight, np.zeros(8), True, None, range(2))
    host.causal_conv1d_update(device, x, pool, weight, None, True, None, None, y)
    error = np.linalg.norm(y - expected_y[..., 0]) / np.linalg.norm(expected_y)
    assert error <= harness.OUTPUT["fp16"] * 1.5, f"y: relative error {error:.2e} in a decode step with rows 2^31 + 64 elements apart"
    assert np.array_equal(pool, expected_state), "conv_state: wrong in a decode step with rows 2^31 + 64 elements apart"
