"""selective_state_update on numpy arrays: cases, and one function that checks a case (see room_rms_norm.py)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 3
    heads: int | None = None
    dim: int = 70
    dstate: int = 16
    groups: int = 1
    dtype: str = "fp32"
    state_dtype: str = ""  # empty: as x
    weight_dtype: str = ""
    options: bool = True  # D, z, dt_bias, softplus
    indices: str | None = None
    layout: str = "contiguous"
    tied: bool = False  # A expanded along dstate
    other: tuple[str, str] = ("", "")  # one tensor of another dtype, or in another layout
    gap: str = ""  # "batch", "head" or "dim": that stride of the state is odd, the others are not
    infinite: bool = False  # every third rate of decay; 0 times it is NaN, and no step of padding is taken
    max_grid_x: int = 0  # 0: as the GPU; here it limits y and z too

    @property
    def id(self) -> str:
        base = Case()
        changed = ((k, "/".join(v) if k == "other" else v) for k, v in self._asdict().items() if v != getattr(base, k))
        return "-".join(f"{k}={v}" for k, v in changed) or "base"


# On both sides of the CUDA kernel's 4 batch rows, 32 or 64 channels and 16 states of a block, and of the 128 states in shared memory.
CASES = [
    Case(),
    *(Case(dim=dim) for dim in (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129)),
    *(Case(dim=dim, dtype="bf16") for dim in (63, 64, 65)),
    *(Case(dstate=dstate) for dstate in (1, 2, 3, 4, 7, 8, 12, 15, 17, 20, 32, 48, 64, 128, 132, 255, 256, 257)),
    *(Case(dstate=dstate, dim=20, dtype="bf16") for dstate in (4, 8, 12, 24, 136)),
    *(Case(batch=batch, dim=33) for batch in (0, 1, 2, 4, 5, 8, 9)),
    *(Case(dtype=d) for d in ("bf16", "fp16", "fp64")),
    *(Case(dtype=d, state_dtype="fp32") for d in ("bf16", "fp16")),
    *(Case(state_dtype=s, weight_dtype=w) for s in ("bf16", "fp16") for w in ("fp32", "bf16")),
    *(Case(other=(name, "bf16"), dim=33) for name in ("dt", "A", "B", "C", "z")),
    *(Case(other=("A", x), dim=33) for x in ("unaligned", "strided")),
    Case(options=False),
    Case(options=False, dtype="bf16", state_dtype="fp32"),
    *(Case(heads=4, dim=9, groups=g, tied=t) for g in (1, 2, 4) for t in (False, True)),
    Case(tied=True, dstate=257),
    *(Case(indices=i) for i in ("i4", "i8")),
    *(Case(indices="i4", batch=n, dim=33, dtype=d, state_dtype="fp32") for n, d in ((9, "bf16"), (4, "fp32"))),
    *(Case(indices="i4", infinite=True, options=o, dim=33, dtype=d) for o in (True, False) for d in ("fp32", "bf16")),
    *(Case(layout=x, dtype=d) for x in harness.LAYOUTS[1:5] for d in ("fp32", "bf16")),
    *(Case(layout="padded", dstate=n, dim=9, dtype=d) for n, d in ((7, "fp32"), (12, "bf16"))),
    *(Case(heads=4, dim=4, dstate=n, gap=x) for x in ("batch", "head", "dim") for n in (16, 20)),
    *(Case(batch=18, heads=3, dim=70, groups=3, dstate=n, max_grid_x=2) for n in (4, 5)),
]
SANITIZED = CASES


def expected_update(state, x, dt, A, B, C, D, z, dt_bias, rows):
    """(out, new state) in fp64; every tensor has a heads axis."""
    out, state = np.zeros_like(x), state.copy()
    group = np.arange(x.shape[1]) // (x.shape[1] // B.shape[1])
    for b, row in enumerate(rows):
        if row < 0:
            continue
        step = dt[b] if dt_bias is None else np.logaddexp(0, dt[b] + dt_bias)
        state[row] = np.exp(step[..., None] * A) * state[row] + (step * x[b])[..., None] * B[b][group][:, None]
        y = (state[row] * C[b][group][:, None]).sum(-1)
        out[b] = y if D is None else (y + D * x[b]) * z[b] / (1 + np.exp(-z[b]))
    return out, state


def check(host, case: Case, device: str) -> None:
    """One update against fp64, inputs unchanged, guards whole, out written, padding left alone."""
    if device == "cuda" and case.dtype == "fp64":
        return  # reference and cpu only
    rng = np.random.default_rng(0)
    channels = (case.dim,) if case.heads is None else (case.heads, case.dim)
    weight_dtype = case.weight_dtype or ("fp64" if case.dtype == "fp64" else "fp32")
    pool = case.batch if case.indices is None else case.batch + 2
    projected = (case.batch, case.dstate) if case.heads is None else (case.batch, case.groups, case.dstate)

    def make(name, shape, dtype=case.dtype, scale=1.0, offset=0.0):
        layout, other = case.layout, case.other[1] if case.other[0] == name else ""
        dtype, layout = (other, layout) if other in harness.DTYPES else (dtype, other or layout)
        return Tensor(shape, dtype, layout, rng.standard_normal(shape) * scale + offset)

    shape = (pool, *channels, case.dstate)
    state = make("state", shape, case.state_dtype or case.dtype)
    if case.gap:
        axis = ("batch", "head", "dim").index(case.gap) + 1
        wide = Tensor((*shape[:axis], int(np.prod(shape[axis:])) + 1), state.dtype)
        inner = np.cumprod((1, *shape[:axis:-1]))[::-1] * wide.array.itemsize
        wide.array = np.lib.stride_tricks.as_strided(wide.array, shape, (*wide.array.strides[:axis], *inner))
        wide.array[...] = state.array
        wide.before, state = wide.buffer.copy(), wide
    inputs = {name: make(name, (case.batch, *channels), offset=6.0 if name == "dt" and case.infinite else 0.0) for name in ("x", "dt")}
    inputs["A"] = make("A", (*channels, case.dstate), weight_dtype, 0.2, -1.0)
    inputs |= {name: make(name, projected) for name in ("B", "C")}
    for name in ("D", "z", "dt_bias"):
        shape, dtype = ((case.batch, *channels), case.dtype) if name == "z" else (channels, weight_dtype)
        inputs[name] = make(name, shape, dtype) if case.options else None
    out = Tensor((case.batch, *channels), case.dtype, case.layout)
    rows, indices = np.arange(case.batch), None
    if case.indices:  # a strided view; a row beyond the pool is clamped to its last one
        rows = rng.permutation(pool - 1)[: case.batch]
        rows[0], rows[-1] = pool - 1, -1
        indices = np.full(2 * case.batch, -9, case.indices)[::2]
        indices[:] = rows
        indices[0] = 10**6

    if case.infinite:
        inputs["A"].array[..., ::3] = harness.rounded(np.array(-np.inf), weight_dtype)
        inputs["A"].before = inputs["A"].buffer.copy()
    arrays = {name: None if t is None else t.array for name, t in inputs.items()}
    values = {name: None if t is None else t.values() for name, t in inputs.items()}
    if case.tied:
        arrays["A"] = np.broadcast_to(arrays["A"][..., :1], arrays["A"].shape)
        values["A"] = np.broadcast_to(values["A"][..., :1], values["A"].shape)
    if case.heads is None:  # one head for the oracle
        values = {n: v if v is None else v[None] if n in ("A", "D", "dt_bias") else v[:, None] for n, v in values.items()}
    wide = state.values() if case.heads else state.values()[:, None]
    expected_out, expected_state = expected_update(wide, **values, rows=rows)
    alone = [
        state.array[rows[:1]].copy(),
        *(t if t is None else np.ascontiguousarray(t if n in ("A", "D", "dt_bias") else t[:1]) for n, t in arrays.items()),
    ]
    host.selective_state_update(device, state.array, *arrays.values(), case.options, indices, out.array)
    check_close(out, expected_out.reshape(out.array.shape), harness.OUTPUT[out.dtype], "out")
    check_close(state, expected_state.reshape(state.array.shape), harness.OUTPUT[state.dtype], "state")
    for name, tensor in inputs.items():
        if tensor:
            tensor.check_unchanged(name)
    if device == "cuda" and case.batch:  # the first row alone, contiguous, perhaps by another of the three kernels: the same bits
        out_alone = np.empty_like(out.array[:1], order="C")
        host.selective_state_update(device, *alone, case.options, None, out_alone)
        assert np.array_equal(out_alone, out.array[:1]) and np.array_equal(alone[0], state.array[rows[:1]]), (
            "bits depend on batch or layout"
        )


def check_large_strides(host, device: str) -> None:
    """Rows of the pool, of x and of out further apart than 32 bits count elements: all of them, then x and out alone."""
    dim, dstate, step = 3, 16, 2**31 + 64
    rng = np.random.default_rng(0)
    pool = harness.sparse_rows(2, dim * dstate, step)
    x, out = (harness.sparse_rows(2, dim, step) for _ in range(2))
    far = np.lib.stride_tricks.as_strided(pool, (2, dim, dstate), (pool.strides[0], 2 * dstate, 2))
    x[...] = rng.standard_normal(x.shape)
    near_x = np.ascontiguousarray(x)
    A = -rng.random((dim, dstate)).astype(np.float32)
    for what, state, rows, result in (
        ("all", far, x, out),
        ("x and out", np.empty(far.shape, np.float16), x, out),
        ("state", far, near_x, np.empty_like(near_x)),
    ):
        state[...] = rng.standard_normal(state.shape)
        B = rng.standard_normal((2, dstate)).astype(np.float16)
        wide = [t.astype(np.float64) for t in (state, x, A, B)]
        expected_out, expected_state = expected_update(
            wide[0][:, None], wide[1][:, None], wide[1][:, None], wide[2][None], wide[3][:, None], wide[3][:, None], None, None, None, range(2)
        )  # fmt: skip
        host.selective_state_update(device, state, rows, rows, A, B, B, None, None, None, False, None, result)
        for name, got, expected in (("out", result, expected_out[:, 0]), ("state", state, expected_state[:, 0])):
            error = np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)
            assert error <= harness.OUTPUT["fp16"] * 1.5, f"{name}: relative error {error:.2e} with rows of {what} 2^31 + 64 elements apart"
