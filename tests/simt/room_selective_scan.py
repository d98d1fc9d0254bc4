"""selective_scan on numpy arrays: cases, and one function that checks a case (see room_rms_norm.py)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

# (multiprocessors, workers on the line). With many multiprocessors four lanes share a channel, with few each has its own lane.
SCHEDULES = ((132, 0), (0, 0), (132, 3), (132, 8))
BOTH = ("contiguous", "transposed")  # time, or channels, side by side in memory
CHUNK = 64  # kStateChunk: steps between two saved states


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
    projected_layout: str = ""  # of B and C; empty: as layout; "columns": of a matrix (tokens, 3 + dstate), as of x_proj's output
    initial: bool = False
    packed: tuple[int, ...] | None = None  # cu_seqlens; batch is 1
    index: str = "i4"
    incoming: str = "both"  # gradients that arrive: "both", "out", "state" or "none"
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
    *(Case(layout="transposed", projected_layout="columns", dtype=d, dim=40) for d in ("fp32", "bf16")),  # rows of 19: an odd stride
    *(Case(batch=1, seqlen=70, packed=EMPTY_AND_SHORT, index=n, layout=x, initial=i, dtype=d)
      for n, d in (("i4", "fp32"), ("i8", "bf16")) for x in (*BOTH, "strided") for i in (False, True)),
    *(Case(batch=1, seqlen=9, packed=p, layout=x, initial=True) for p in ((0,), (0, 9), (0, 0, 0)) for x in BOTH),
    *(Case(batch=b, dim=dim, seqlen=20, max_grid_x=2) for b, dim in ((3, 530), (17, 8))),  # warps take a second turn
    Case(batch=0, initial=True),
    *(Case(options=False, layout=x) for x in BOTH),
    *(Case(dstate=n, forget=True) for n in (16, 20)),
    *(Case(seqlen=n, layout=x, initial=True) for n in (127, 128, 130) for x in BOTH),  # chunks of the backward
    *(Case(batch=1, seqlen=200, packed=(0, 64, 64, 129, 194), layout=x, initial=True) for x in BOTH),
    *(Case(incoming=i, options=o, initial=True) for i in ("out", "state", "none") for o in (True, False)),
    Case(batch=21, dim=9, seqlen=5, initial=True),  # more rows than sums over rows have parts
    # What the tensor-core kernel serves; test_selective_scan_mma.py has the rest.
    *(Case(dim=dim, seqlen=n, dtype="bf16", layout="transposed", initial=True) for dim, n in ((8, 1), (40, 70), (32, 33))),
    Case(batch=1, dim=40, seqlen=70, dtype="bf16", layout="transposed", packed=EMPTY_AND_SHORT, options=False),
]  # fmt: skip
SANITIZED = CASES
# ThreadSanitizer, 100 times slower than the plain run, sees who touches what and not which values: a third of the cases that differ in
# dims, dtypes and strides alone, in either layout, and no grids of hundreds of small blocks.
RACES = [case for i, case in enumerate(CASES)
         if 36 not in (case.B, case.C) and case.batch * case.dim < 2000
         and (i % 3 == 0 or case.layout not in BOTH or case.packed or case.max_grid_x or case.seqlen > 64 or (case.B, case.C) != ("3d", "3d"))]  # fmt: skip


def expected_scan(u, delta, A, B, C, D, h):
    """(y before the gate, last state) of one sequence in fp64: u, delta (dim, seqlen), B, C (dim, dstate, seqlen), h (dim, dstate)."""
    y = np.zeros_like(u)
    for t in range(u.shape[1]):
        h = np.exp(delta[:, t, None] * A) * h + (delta[:, t] * u[:, t])[:, None] * B[..., t]
        y[:, t] = (C[..., t] * h).sum(-1)
    return y if D is None else y + D[:, None] * u, h


def expected_gradients(u, delta, A, B, C, D, h, dy, g):
    """Gradients of expected_scan's arguments and the state before each step: dy is the gradient of y, g of the last state."""
    before = []
    for t in range(u.shape[1]):
        before.append(h)
        h = np.exp(delta[:, t, None] * A) * h + (delta[:, t] * u[:, t])[:, None] * B[..., t]
    du, ddelta, dA, dB, dC = np.zeros_like(u), np.zeros_like(u), np.zeros_like(A), np.zeros(B.shape), np.zeros(C.shape)
    for t in reversed(range(u.shape[1])):
        g = g + dy[:, t, None] * C[..., t]
        dC[..., t], dB[..., t] = dy[:, t, None] * h, g * (delta[:, t] * u[:, t])[:, None]
        h, into = before[t], (g * B[..., t]).sum(-1)
        g = g * np.exp(delta[:, t, None] * A)
        dA += g * h * delta[:, t, None]
        du[:, t], ddelta[:, t] = into * delta[:, t], (g * h * A).sum(-1) + into * u[:, t]
    if D is not None:
        du += D[:, None] * dy
    return {"du": du, "ddelta": ddelta, "dA": dA, "dB": dB, "dC": dC, "dinitial_state": g}, before


def per_channel(values, shape):
    """B or C of any form as (batch, dim, dstate, seqlen)."""
    if values.ndim == 2:
        values = values[None, :, :, None]
    elif values.ndim == 3:
        values = values[:, None]
    else:
        values = np.repeat(values, shape[1] // values.shape[1], axis=1)
    return np.broadcast_to(values, shape)


class Problem(NamedTuple):
    """The arguments of a case, and what is expected in fp64."""

    inputs: dict[str, Tensor | None]
    cu_seqlens: np.ndarray | None
    end: int  # of the last sequence; what follows is padding
    out: np.ndarray
    last_state: np.ndarray
    dout: Tensor | None
    dlast_state: Tensor | None
    states: np.ndarray  # before every CHUNK-th step of each sequence, NaN in slots that are not used
    gradients: dict[str, np.ndarray]

    def arguments(self, case: Case) -> list:
        arrays = {name: None if t is None else t.array for name, t in self.inputs.items()}
        initial = arrays.pop("initial_state")
        return [*arrays.values(), case.options, initial, self.cu_seqlens]


@functools.lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    """Shared by the orders, levels and threads that a case runs in."""
    rng = np.random.default_rng(0)
    shape, compute = (case.batch, case.dim, case.seqlen), "fp64" if case.dtype == "fp64" else "fp32"
    weight_dtype, projected_layout = case.weight_dtype or compute, case.projected_layout or case.layout
    rows = (case.batch if case.packed is None else len(case.packed) - 1, case.dim, case.dstate)

    def make(shape, dtype=case.dtype, layout=case.layout, scale=1.0, offset=0.0):
        return Tensor(shape, dtype, layout, rng.standard_normal(shape) * scale + offset)

    def project(form, dtype):
        if form == "constant":
            return make((case.dim, case.dstate), weight_dtype, projected_layout)
        if projected_layout == "columns":
            tensor = make((case.batch, case.seqlen, 3 + case.dstate), dtype, "contiguous")
            tensor.array = tensor.array[..., 3:].swapaxes(1, 2)
            return tensor
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
    inputs["initial_state"] = make(rows, case.state_dtype or compute) if case.initial else None
    dout = make(shape) if case.incoming in ("both", "out") else None
    dlast = make(rows, case.state_dtype or compute) if case.incoming in ("both", "state") else None

    wide = {name: None if t is None else t.values() for name, t in inputs.items()}
    raw = wide["delta"] + wide["delta_bias"][:, None] if case.options else wide["delta"]
    step_sizes = np.logaddexp(0, raw) if case.options else raw
    B, C = (per_channel(wide[name], (case.batch, case.dim, case.dstate, case.seqlen)) for name in "BC")
    h0 = wide["initial_state"] if case.initial else np.zeros(rows)
    bounds = case.packed or (0, case.seqlen)
    pieces = [(b, b, *bounds) for b in range(case.batch)] if case.packed is None else [(0, i, *bounds[i : i + 2]) for i in range(len(bounds) - 1)]
    gate = 1 / (1 + np.exp(-wide["z"])) if case.options else None  # sigmoid(z)
    dgated = dout.values() if dout else np.zeros(shape)
    dgated[..., bounds[-1] :] = 0
    dy = dgated * wide["z"] * gate if case.options else dgated

    y, last = np.zeros(shape), np.zeros(rows)
    slots = -(-case.seqlen // CHUNK) if case.packed is None else case.seqlen // CHUNK + len(case.packed) - 1
    states = np.full((case.batch, slots, case.dstate, case.dim), np.nan)
    grads = {"du": np.zeros(shape), "ddelta": np.zeros(shape), "dA": np.zeros(wide["A"].shape), "dB": np.zeros(B.shape), "dC": np.zeros(B.shape)}
    dh = dlast.values() if dlast else np.zeros(rows)
    A = np.maximum(wide["A"], -1e300)  # what went before A = -inf has no gradient
    for b, row, begin, end in pieces:
        at = np.s_[..., begin:end]
        args = (wide["u"][b][at], step_sizes[b][at], A, B[b][at], C[b][at], wide["D"], h0[row])
        y[b][at], last[row] = expected_scan(*args)
        piece, before = expected_gradients(*args, dy[b][at], dh[row])
        for name in ("du", "ddelta", "dB", "dC"):
            grads[name][b][at] = piece[name]
        grads["dA"] += piece["dA"]
        dh[row] = piece["dinitial_state"]
        first = 0 if case.packed is None else begin // CHUNK + row
        for i, state in enumerate(before[::CHUNK]):
            states[b, first + i] = state.T
    for name in ("B", "C"):
        form, full = wide[name].shape, grads[f"d{name}"]
        groups = form[1] if len(form) == 4 else 1
        grads[f"d{name}"] = full.sum((0, 3)) if len(form) == 2 else full.reshape(case.batch, groups, case.dim // groups, *form[-2:]).sum(2).reshape(form)
    if case.initial:
        grads["dinitial_state"] = dh
    out = y
    if case.options:
        out = y * wide["z"] * gate
        grads["ddelta"] = grads["ddelta"] / (1 + np.exp(-raw))
        grads["dz"] = dgated * y * gate * (1 + wide["z"] * (1 - gate))
        grads |= {"dD": (dy * wide["u"]).sum((0, 2)), "ddelta_bias": grads["ddelta"].sum((0, 2))}
    cu_seqlens = None if case.packed is None else np.array(case.packed, case.index)
    return Problem(inputs, cu_seqlens, bounds[-1], out, last, dout, dlast, states, grads)


def check(host, case: Case, device: str) -> None:
    """Forward and backward of one case against fp64, inputs unchanged, guards whole, outputs written."""
    if device == "cuda" and case.dtype == "fp64":
        return  # served by cpu only
    want, compute = problem(case), "fp64" if case.dtype == "fp64" else "fp32"
    layout = "contiguous" if case.layout == "expanded" else case.layout
    out, last = Tensor(want.out.shape, case.dtype, layout), Tensor(want.last_state.shape, compute)

    def forward(multiprocessors, workers, states=None):
        line = np.zeros(host.selective_scan_line_words(workers), np.uint32)
        out.buffer[:], last.buffer[:] = out.before, last.before
        host.selective_scan(device, *want.arguments(case), out.array, last.array, multiprocessors, workers, line, states)
        assert not line.any(), f"{workers} workers left their workspace {line.nonzero()[0].tolist()} not zero"
        return out.buffer.tobytes(), last.buffer.tobytes()

    runs = []
    for multiprocessors, workers in SCHEDULES if device == "cuda" else ((0, 0),):
        runs.append(forward(multiprocessors, workers))
        assert runs[0] == runs[-1], f"other bits with {multiprocessors} multiprocessors and {workers} workers on the line"
    states = Tensor(want.states.shape, compute)
    assert forward(*SCHEDULES[0], states.array) == runs[0], "other bits when states are saved"
    states.array[np.isnan(want.states)] = 0
    check_close(states, np.nan_to_num(want.states), harness.OUTPUT[compute], "states")
    check_close(out, want.out, harness.OUTPUT[case.dtype], "out")
    check_close(last, want.last_state, harness.OUTPUT[compute], "last_state")
    check_backward(host, case, device, want, Tensor(want.states.shape, compute, values=want.states))
    for name, tensor in want.inputs.items():
        if tensor:
            tensor.check_unchanged(name)


def check_backward(host, case: Case, device: str, want: Problem, states: Tensor) -> None:
    grads = {}
    for name, tensor in want.inputs.items():
        layout = "contiguous" if name in ("D", "delta_bias") or case.layout == "expanded" else case.layout
        grads[f"d{name}"] = None if tensor is None else Tensor(tensor.array.shape, tensor.dtype, layout)
    incoming = {"dout": want.dout, "dlast_state": want.dlast_state}
    runs = []
    for multiprocessors in (132, 0) if device == "cuda" and case.seqlen > 256 else (0,):  # shorter sequences have one span
        for tensor in grads.values():
            if tensor:
                tensor.buffer[:] = tensor.before
        host.selective_scan_bwd(device, *(None if t is None else t.array for t in incoming.values()), *want.arguments(case), states.array,
                                *(None if t is None else t.array for t in grads.values()), multiprocessors)  # fmt: skip
        runs.append([t.buffer.tobytes() for t in grads.values() if t])
        assert runs[0] == runs[-1], f"other bits with {multiprocessors} multiprocessors"
    for name, tensor in grads.items():
        if tensor:
            check_close(tensor, want.gradients[name], harness.GRADIENT[tensor.dtype], name)
            padded = name in ("du", "ddelta", "dz") or name in ("dB", "dC") and tensor.array.ndim > 2
            assert not padded or not tensor.values()[..., want.end :].any(), f"{name} is not 0 in the padding"
    for name, tensor in (incoming | {"states": states}).items():
        if tensor:
            tensor.check_unchanged(name)


def check_large_strides(host, device: str) -> None:
    """Batch rows, channels, then time steps of u, delta, z, out, dout and their gradients further apart than 32 bits count elements;
    of B, C, dB and dC batch rows."""
    n, step, dstate = 40, 2**31 + 64, 2
    rng = np.random.default_rng(0)
    u, out, du, ddelta, dz = (harness.sparse_rows(2, n, step) for _ in range(5))
    u[...] = rng.standard_normal(u.shape)
    projected, dB, dC = (harness.sparse_rows(2, dstate * n, step) for _ in range(3))
    projected[...] = rng.standard_normal(projected.shape)
    views = {"batch rows": lambda t: t[:, None], "channels": lambda t: t[None], "time steps": lambda t: t.T[None]}
    for what, view in views.items():
        x = view(u)
        batch, dim, seqlen = x.shape

        def project(t, batch=batch, seqlen=seqlen):
            return np.lib.stride_tricks.as_strided(t, (batch, dstate, seqlen), (t.strides[0], 2 * n, 2))

        A, last = -rng.random((dim, dstate)).astype(np.float32), np.empty((batch, dim, dstate), np.float32)
        arguments = (x, x, A, project(projected), project(projected), None, x, None, True, None, None)
        out[...] = np.nan
        host.selective_scan(device, *arguments, view(out), last, 132, 0, None)
        wide, zeros = x.astype(np.float64), np.zeros((dim, dstate))
        step_sizes, B = np.logaddexp(0, wide), per_channel(project(projected).astype(np.float64), (batch, dim, dstate, seqlen))
        gate = 1 / (1 + np.exp(-wide))
        y = np.stack([expected_scan(wide[b], step_sizes[b], A, B[b], B[b], None, zeros)[0] for b in range(batch)])
        wanted = [("out", view(out), y * wide * gate)]

        for gradient in (du, ddelta, dz, dB, dC):
            gradient[...] = np.nan
        rows = [expected_gradients(wide[b], step_sizes[b], A, B[b], B[b], None, zeros, (wide * wide * gate)[b], zeros) for b in range(batch)]
        states = np.stack([np.stack([before[i].T for i in range(0, seqlen, CHUNK)]) for _, before in rows]).astype(np.float32)
        host.selective_scan_bwd(device, x, None, *arguments, states, view(du), view(ddelta), np.empty_like(A), project(dB), project(dC), None, view(dz), None, None, 132)
        expected = {name: np.stack([row[name] for row, _ in rows]) for name in ("du", "ddelta", "dB", "dC")}
        wanted += [("du", view(du), expected["du"]), ("ddelta", view(ddelta), expected["ddelta"] * gate)]
        wanted += [("dB", project(dB), expected["dB"].sum(1)), ("dC", project(dC), expected["dC"].sum(1))]
        wanted += [("dz", view(dz), wide * y * gate * (1 + wide * (1 - gate)))]
        for name, got, want in wanted:
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            assert error <= harness.OUTPUT["fp16"] * 1.5, f"{name}: relative error {error:.2e} with {what} 2^31 + 64 elements apart"
