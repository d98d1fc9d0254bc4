"""selective_scan on numpy arrays: cases, and one function that checks a case (see room_rms_norm.py)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

# (multiprocessors, workers on the line). With many multiprocessors four lanes share a channel, with few each has its own lane.
SCHEDULES = ((132, 0), (0, 0), (132, 3), (132, 8))
BOTH = ("contiguous", "transposed")  # time, or channels, side by side in memory


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 2
    dim: int = 36
    seqlen: int = 37
    dstate: int = 16
    B: int | str = "3d"  # "constant", "3d", or a number of groups
    C: int | str = "3d"
    dtype: str = "fp32"
    weight_dtype: str = ""  # empty: fp32, or fp64 next to it
    other_dtype: str = ""  # of delta and C; empty: dtype
    state_dtype: str = ""
    options: bool = True  # D, z, delta_bias, softplus
    layout: str = "contiguous"
    projected_layout: str = ""  # of B and C; empty: as layout
    initial: bool = False
    packed: tuple[int, ...] | None = None  # cu_seqlens; batch is 1
    index: str = "i4"
    forget: bool = False  # some A are -inf: those states are their last step's alone
    max_grid_x: int = 0  # 0: as the GPU

    @property
    def id(self) -> str:
        base = Case()
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != getattr(base, k)).replace(" ", "") or "base"


EMPTY_AND_SHORT = (0, 0, 1, 3, 3, 6, 23, 60, 60, 66)
CASES = [
    *(Case(dim=dim, seqlen=19, dstate=5, layout=x) for dim in (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33) for x in BOTH),
    *(Case(batch=1, dim=dim, seqlen=17, dstate=2, layout=x) for dim in (255, 256, 257) for x in BOTH),
    Case(batch=9, dim=530, seqlen=3, dstate=3, layout="transposed"),  # blocks of 256 channels, and what is left
    *(Case(seqlen=n, layout=x, initial=True) for n in (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65) for x in BOTH),
    *(Case(dstate=n, layout=x, initial=True) for n in (1, 2, 3, 4, 7, 8, 9, 15, 17, 32, 33) for x in BOTH),
    *(Case(B=b, C=c, dstate=n, layout=x)
      for b, c in (("constant", "3d"), ("3d", "constant"), ("constant", "constant"), (1, 1), (4, 4), (2, 3), (36, 1), ("constant", 6))
      for n in (5, 16) for x in BOTH),
    *(Case(dtype=d, weight_dtype=w, state_dtype=s, layout=x, initial=True)
      for d, w, s in (("bf16", "", ""), ("fp16", "", ""), ("bf16", "bf16", "bf16"), ("fp64", "", "")) for x in BOTH),
    *(Case(dtype=d, seqlen=n, layout=x) for d, n in (("bf16", 25), ("fp16", 39), ("bf16", 49), ("fp16", 64)) for x in ("contiguous", "unaligned")),
    *(Case(dtype=d, other_dtype=o, layout=x) for d, o in (("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"), ("bf16", "fp16")) for x in BOTH),
    *(Case(dtype=d, layout=x, initial=True) for d in ("fp32", "bf16") for x in harness.LAYOUTS[1:]),
    *(Case(layout=x, projected_layout=y, dtype=d, dim=n, seqlen=n) for x, y in (BOTH, BOTH[::-1]) for d in ("fp32", "bf16") for n in (37, 40)),
    *(Case(batch=1, seqlen=70, packed=EMPTY_AND_SHORT, index=n, layout=x, initial=i, dtype=d)
      for n, d in (("i4", "fp32"), ("i8", "bf16")) for x in (*BOTH, "strided") for i in (False, True)),
    *(Case(batch=1, seqlen=9, packed=p, layout=x, initial=True) for p in ((0,), (0, 9), (0, 0, 0)) for x in BOTH),
    *(Case(batch=b, dim=dim, seqlen=20, max_grid_x=2) for b, dim in ((3, 530), (17, 8))),  # warps take a second turn
    Case(batch=0, initial=True),
    *(Case(options=False, layout=x) for x in BOTH),
    *(Case(dstate=n, forget=True) for n in (16, 20)),
    # What the tensor-core kernel serves; test_selective_scan_mma.py has the rest.
    *(Case(dim=dim, seqlen=n, dtype="bf16", layout="transposed", initial=True) for dim, n in ((8, 1), (40, 70), (32, 33))),
    Case(batch=1, dim=40, seqlen=70, dtype="bf16", layout="transposed", packed=EMPTY_AND_SHORT, options=False),
]  # fmt: skip
SANITIZED = CASES


def expected_scan(u, delta, A, B, C, D, h):
    """(y before the gate, last state) of one sequence in fp64: u, delta (dim, seqlen), B, C (dim, dstate, seqlen), h (dim, dstate)."""
    y = np.zeros_like(u)
    for t in range(u.shape[1]):
        h = np.exp(delta[:, t, None] * A) * h + (delta[:, t] * u[:, t])[:, None] * B[..., t]
        y[:, t] = (C[..., t] * h).sum(-1)
    return y if D is None else y + D[:, None] * u, h


def per_channel(values, shape):
    """B or C of any form as (batch, dim, dstate, seqlen)."""
    if values.ndim == 2:
        values = values[None, :, :, None]
    elif values.ndim == 3:
        values = values[:, None]
    else:
        values = np.repeat(values, shape[1] // values.shape[1], axis=1)
    return np.broadcast_to(values, shape)


def check(host, case: Case, device: str) -> None:
    """One scan against fp64, inputs unchanged, guards whole, outputs written."""
    if device == "cuda" and case.dtype == "fp64":
        return  # served by cpu only
    rng = np.random.default_rng(0)
    shape, compute = (case.batch, case.dim, case.seqlen), "fp64" if case.dtype == "fp64" else "fp32"
    weight_dtype, projected_layout = case.weight_dtype or compute, case.projected_layout or case.layout
    states = (case.batch if case.packed is None else len(case.packed) - 1, case.dim, case.dstate)

    def make(shape, dtype=case.dtype, layout=case.layout, scale=1.0, offset=0.0):
        return Tensor(shape, dtype, layout, rng.standard_normal(shape) * scale + offset)

    def project(form, dtype):
        if form == "constant":
            return make((case.dim, case.dstate), weight_dtype, projected_layout)
        return make((case.batch, *(() if form == "3d" else (form,)), case.dstate, case.seqlen), dtype, projected_layout)

    other = case.other_dtype or case.dtype
    inputs = {"u": make(shape), "delta": make(shape, other, scale=0.5, offset=0.0 if case.options else 1.0)}
    inputs |= {"A": make((case.dim, case.dstate), weight_dtype, scale=0.2, offset=-1.0), "B": project(case.B, case.dtype), "C": project(case.C, other)}
    if case.forget:
        inputs["A"].array[::3, ::2] = -np.inf
        inputs["A"].before = inputs["A"].buffer.copy()
    inputs["D"] = make((case.dim,), weight_dtype) if case.options else None
    inputs["z"] = make(shape) if case.options else None
    inputs["delta_bias"] = make((case.dim,), weight_dtype) if case.options else None
    initial = make(states, case.state_dtype or compute) if case.initial else None
    out = Tensor(shape, case.dtype, "contiguous" if case.layout == "expanded" else case.layout)
    last = Tensor(states, compute)
    cu_seqlens = None if case.packed is None else np.array(case.packed, case.index)

    runs = []
    for multiprocessors, workers in SCHEDULES if device == "cuda" else ((0, 0),):
        line = np.zeros(host.selective_scan_line_words(workers), np.uint32)
        out.buffer[:], last.buffer[:] = out.before, last.before
        host.selective_scan(device, *(None if t is None else t.array for t in inputs.values()), case.options, initial.array if initial else None,
                            cu_seqlens, out.array, last.array, multiprocessors, workers, line)  # fmt: skip
        runs.append((out.buffer.tobytes(), last.buffer.tobytes()))
        assert runs[0] == runs[-1], f"other bits with {multiprocessors} multiprocessors and {workers} workers on the line"
        assert not line.any(), f"{workers} workers left their workspace {line.nonzero()[0].tolist()} not zero"

    wide = {name: None if t is None else t.values() for name, t in inputs.items()}
    delta = np.logaddexp(0, wide["delta"] + wide["delta_bias"][:, None]) if case.options else wide["delta"]
    B, C = (per_channel(wide[name], (case.batch, case.dim, case.dstate, case.seqlen)) for name in "BC")
    h = initial.values() if initial else np.zeros(states)
    expected, expected_last = np.zeros(shape), np.zeros(states)
    bounds = case.packed or (0, case.seqlen)
    pieces = [(b, b, *bounds) for b in range(case.batch)] if case.packed is None else [(0, i, *bounds[i : i + 2]) for i in range(len(bounds) - 1)]
    for b, state, begin, end in pieces:
        at = np.s_[..., begin:end]
        expected[b][at], expected_last[state] = expected_scan(wide["u"][b][at], delta[b][at], wide["A"], B[b][at], C[b][at], wide["D"], h[state])
    if case.options:
        expected *= wide["z"] / (1 + np.exp(-wide["z"]))
    check_close(out, expected, harness.OUTPUT[case.dtype], "out")
    check_close(last, expected_last, harness.OUTPUT[compute], "last_state")
    for name, tensor in (inputs | {"initial_state": initial}).items():
        if tensor:
            tensor.check_unchanged(name)


def check_large_strides(host, device: str) -> None:
    """Batch rows, channels, then time steps of u, delta, z and out further apart than 32 bits count elements; of B, C batch rows."""
    n, step, dstate = 40, 2**31 + 64, 2
    rng = np.random.default_rng(0)
    u, out, projected = harness.sparse_rows(2, n, step), harness.sparse_rows(2, n, step), harness.sparse_rows(2, dstate * n, step)
    u[...], projected[...] = rng.standard_normal(u.shape), rng.standard_normal(projected.shape)
    far = np.lib.stride_tricks.as_strided(projected, (2, dstate, n), (projected.strides[0], 2 * n, 2))
    views = {"batch rows": lambda t: t[:, None], "channels": lambda t: t[None], "time steps": lambda t: t.T[None]}
    for what, view in views.items():
        x = view(u)
        batch, dim, seqlen = x.shape
        A, last = -rng.random((dim, dstate)).astype(np.float32), np.empty((batch, dim, dstate), np.float32)
        B = far[:batch, :, :seqlen]
        out[...] = np.nan
        host.selective_scan(device, x, x, A, B, B, None, x, None, True, None, None, view(out), last, 132, 0, None)
        wide = x.astype(np.float64)
        step_sizes, wide_B = np.logaddexp(0, wide), per_channel(B.astype(np.float64), (batch, dim, dstate, seqlen))
        expected = np.stack([expected_scan(wide[b], step_sizes[b], A, wide_B[b], wide_B[b], None, np.zeros((dim, dstate)))[0] for b in range(batch)])
        expected *= wide / (1 + np.exp(-wide))
        error = np.linalg.norm(view(out) - expected) / np.linalg.norm(expected)
        assert error <= harness.OUTPUT["fp16"] * 1.5, f"relative error {error:.2e} with {what} 2^31 + 64 elements apart"
