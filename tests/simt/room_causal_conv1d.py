"""causal_conv1d on numpy arrays: cases, and one function that checks a case (see room_rms_norm.py)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from tests.simt import harness
from tests.simt.harness import Tensor, check_close

DEVICES = ("cuda", "cpu")
BOTH = ("contiguous", "transposed")  # time, or channels, side by side in memory


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 2
    dim: int = 35
    seqlen: int = 37
    width: int = 4
    dtype: str = "fp32"
    weight_dtype: str = ""  # empty: as x
    state_dtype: str = ""
    bias: bool = True
    silu: bool = True
    layout: str = "contiguous"  # of harness.LAYOUTS, or "tokens+n": channel-last, rows n channels apart
    initial: bool = False
    final: bool = False
    packed: tuple[int, ...] | None = None  # cu_seqlens; batch is 1
    seq_idx: bool = False
    index: str = "i4"
    y_layout: str = ""  # of y, dy and dx; empty: as x
    weight_layout: str = ""
    one_weight: bool = False  # a channel's taps are one element, its stride along width is 0
    max_grid_x: int = 0  # 0: as the GPU

    @property
    def id(self) -> str:
        base = Case()
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != getattr(base, k)).replace(" ", "") or "base"


PlainFilter = partial(Case, weight_layout="contiguous")  # what kernels for 4 taps want
EMPTY_AND_SHORT = (0, 0, 1, 3, 3, 6, 23, 37, 37, 66)
CASES = [
    *(Case(dim=dim, layout=x) for dim in (0, 1, 15, 16, 17, 64, 65) for x in BOTH),
    # Past a tile of sums, past a channel block; past the 16 and the 1024 time steps of a unit of work.
    *(Case(dim=dim, seqlen=6, layout="transposed", dtype=d) for dim in (511, 512, 513, 529) for d in ("fp32", "bf16")),
    Case(batch=1, dim=8193, seqlen=5, layout="transposed", final=True),
    *(Case(seqlen=n, layout=x, initial=i, final=True) for n in (0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 33) for x in BOTH for i in (False, True)),
    *(Case(dim=2, seqlen=n, dtype=d, weight_dtype="fp32") for n in (511, 512, 513, 529, 1023, 1024, 1025, 1041) for d in ("fp32", "bf16")),
    *(Case(width=w, layout=x, initial=i, final=True) for w in (1, 2, 3, 5, 6, 7, 8, 9, 18) for x in BOTH for i in (False, True)),
    *(Case(dtype=d, weight_dtype=w, state_dtype="fp32", layout=x, initial=True, final=True)
      for d in ("bf16", "fp16") for w in ("", "fp32") for x in BOTH),
    *(Case(dtype=d, layout=x) for d in ("fp32", "bf16", "fp64") for x in harness.LAYOUTS),
    *(Case(dtype=d, layout=x, initial=True, final=True) for d in ("fp32", "fp16") for x in harness.LAYOUTS[1:]),
    Case(batch=0, final=True),
    Case(bias=False, silu=False),
    Case(bias=False, silu=False, layout="transposed", dtype="bf16"),
    *(Case(batch=1, seqlen=70, packed=EMPTY_AND_SHORT, index=n, layout=x, initial=i, final=True, dtype=d)
      for n, d in (("i4", "fp32"), ("i8", "bf16")) for x in (*BOTH, "strided") for i in (False, True)),
    *(Case(batch=1, seqlen=9, packed=p, layout=x, initial=True, final=True) for p in ((0,), (0, 9), (0, 0, 0)) for x in BOTH),
    Case(batch=1, seqlen=70, packed=EMPTY_AND_SHORT, width=9, initial=True, final=True),
    *(Case(seq_idx=True, index=n, layout=x, dtype=d, width=w)
      for n, d, w in (("i4", "fp32", 4), ("i8", "fp16", 4), ("i4", "fp64", 1), ("i4", "fp32", 9)) for x in (*BOTH, "strided")),
    *(Case(seq_idx=True, dim=2, seqlen=1025, layout=x) for x in BOTH),
    # CUDA, channels in whole packs: one to two blocks of them, around the 9 steps of a thread, everything that changes a window.
    *(PlainFilter(dim=dim, seqlen=n, layout="transposed", dtype=d) for dim in (8, 40, 264) for n in (1, 3, 9, 10, 34) for d in ("fp32", "bf16")),
    PlainFilter(dim=256, seqlen=300, layout="transposed", dtype="bf16", final=True),
    *(PlainFilter(dim=40, layout="transposed", width=w, dtype=d, initial=i, final=True, silu=w != 4)
      for w in (1, 2, 4, 5, 8) for d in ("fp32", "fp16") for i in (False, True)),
    *(PlainFilter(dim=40, layout="transposed", dtype=d, weight_dtype=w) for d in ("fp32", "bf16") for w in ("fp32", "bf16", "fp16")),
    *(PlainFilter(batch=1, dim=40, seqlen=70, packed=EMPTY_AND_SHORT, layout="transposed", dtype=d, initial=i, width=w, index=n)
      for d, w, n in (("fp32", 4, "i4"), ("bf16", 4, "i8"), ("fp32", 7, "i4")) for i in (False, True)),
    *(PlainFilter(dim=40, seq_idx=True, layout="transposed", dtype=d, width=w, index=n)
      for d, w, n in (("fp32", 4, "i8"), ("bf16", 4, "i4"), ("fp16", 6, "i4"))),
    *(PlainFilter(dim=40, layout=x, dtype=d) for x in ("padded", "sliced", "unaligned") for d in ("fp32", "bf16")),
    # CUDA, time in granules of 8: rows at every alignment, several rounds and chunks of a row, y aligned as x and not.
    *(PlainFilter(dim=9, seqlen=n, dtype=d, layout=x, y_layout=y)
      for n in (5, 8, 31, 65, 263, 301) for d in ("fp32", "bf16") for x, y in (("contiguous", ""), ("unaligned", "contiguous"), ("contiguous", "sliced"))),
    *(PlainFilter(batch=1, dim=3, seqlen=4211, dtype=d, layout=x, y_layout="contiguous", initial=True, final=True, width=w)
      for d, x, w in (("bf16", "contiguous", 4), ("fp16", "unaligned", 4), ("fp32", "unaligned", 6))),
    *(PlainFilter(dim=11, seqlen=n, dtype=d, initial=True, final=True, layout=x)
      for n in (2, 9, 40) for d, x in (("bf16", "contiguous"), ("fp32", "unaligned"))),
    *(PlainFilter(batch=1, dim=3, seqlen=2100, packed=(0, 3, 700, 700, 1999, 2001), dtype=d, layout=x, y_layout="contiguous", initial=i)
      for d, x, i in (("bf16", "contiguous", True), ("fp16", "unaligned", False))),
    PlainFilter(batch=1, dim=3, seqlen=300, packed=(0, 3, 140, 141, 299), layout="unaligned", y_layout="contiguous", dtype="bf16"),
    PlainFilter(dim=3, seqlen=600, seq_idx=True, dtype="bf16", layout="unaligned", y_layout="contiguous"),
    *(PlainFilter(layout=x, y_layout=y, dtype="bf16", dim=16) for x in BOTH for y in ("contiguous", "transposed", "strided")),
    *(PlainFilter(dim=40, layout=f"tokens+{x}", y_layout=f"tokens+{y}", dtype=d, initial=i, final=True)
      for x, y in ((0, 0), (40, 0), (0, 8), (3, 0), (0, 3), (4, 0)) for d in ("fp32", "bf16") for i in (False, True)),
    PlainFilter(batch=1, dim=35, seqlen=1, layout="transposed"),  # packs would stick out of a single row
    *(PlainFilter(dim=40, layout=x, one_weight=True) for x in BOTH),
    *(PlainFilter(batch=1, dim=40, seqlen=12, packed=p, layout=x, initial=True, final=True)
      for p in ((-5, 40), (3, 1, 99), (10, 0), (0, 4, 2, 10)) for x in (*BOTH, "strided")),
    # fp64: every kernel of the backward, with everything that changes a window.
    *(PlainFilter(dtype="fp64", dim=dim, width=w, seqlen=n, layout=x, initial=i, final=i, silu=i or w != 4)
      for dim, w, n in ((40, 4, 37), (40, 6, 21), (9, 4, 37), (9, 8, 21), (9, 9, 21)) for x in BOTH for i in (True, False)),
    *(PlainFilter(dtype="fp64", batch=1, dim=40, seqlen=70, packed=EMPTY_AND_SHORT, layout=x, initial=True, final=True, width=w)
      for x in (*BOTH, "strided") for w in (4, 7)),
    *(PlainFilter(dtype="fp64", dim=40, seq_idx=True, layout=x) for x in BOTH),
    PlainFilter(dtype="fp64", dim=3, seqlen=600, layout="unaligned", y_layout="contiguous", initial=True, final=True),
    # CUDA: more work than blocks.
    *(PlainFilter(dim=dim, seqlen=100, layout=x, final=True, initial=True, max_grid_x=2) for dim in (35, 40) for x in BOTH),
    PlainFilter(batch=1, dim=40, seqlen=70, packed=EMPTY_AND_SHORT, layout="transposed", initial=True, final=True, max_grid_x=2),
    PlainFilter(batch=6, dim=40, seqlen=100, layout="transposed", max_grid_x=2),  # backward too: three units a block
]  # fmt: skip
SANITIZED = [case for i, case in enumerate(CASES) if case.dim * case.seqlen <= 3000 or i % 5 == 0]


def laid_out(shape, dtype, layout, values=None) -> Tensor:
    """A tensor of one of the harness's layouts or of "tokens+n"; what is not (batch, dim, seqlen) is contiguous then."""
    if not layout.startswith("tokens+"):
        return Tensor(shape, dtype, layout, values)
    if len(shape) != 3:
        return Tensor(shape, dtype, values=values)
    batch, dim, seqlen = shape
    tensor = Tensor((batch, seqlen, dim + int(layout.removeprefix("tokens+"))), dtype)
    tensor.array = tensor.array[..., :dim].transpose(0, 2, 1)
    if values is not None:
        tensor.array[...] = harness.rounded(values, dtype)
        tensor.before = tensor.buffer.copy()
    return tensor


def expected_conv(x, weight, bias, silu, initial):
    """(y, final state) of one sequence (dim, seqlen) in fp64, after the inputs `initial` (dim, width - 1)."""
    whole = np.concatenate([initial, x], axis=1)
    y = sum(weight[:, w, None] * whole[:, w : w + x.shape[1]] for w in range(weight.shape[1])) + bias[:, None]
    return y / (1 + np.exp(-y)) if silu else y, whole[:, x.shape[1] :]


def expected_gradients(dy, dfinal, x, weight, bias, silu, initial):
    """(dx, dweight, dbias, dinitial) of one sequence in fp64; dfinal reaches the last width - 1 inputs, `initial` included."""
    width, seqlen = weight.shape[1], x.shape[1]
    whole = np.concatenate([initial, x], axis=1)
    taps = [whole[:, w : w + seqlen] for w in range(width)]
    g = dy
    if silu:
        p = sum(weight[:, w, None] * taps[w] for w in range(width)) + bias[:, None]
        s = 1 / (1 + np.exp(-p))
        g = dy * s * (1 + p * (1 - s))
    dwhole = np.zeros_like(whole)
    for w in range(width):
        dwhole[:, w : w + seqlen] += weight[:, w, None] * g
    dwhole[:, seqlen:] += dfinal
    dweight = np.stack([(g * tap).sum(1) for tap in taps], axis=1)
    return dwhole[:, width - 1 :], dweight, g.sum(1), dwhole[:, : width - 1]


def check(host, case: Case, device: str) -> None:
    """One convolution and its gradients against fp64, inputs unchanged, guards whole, outputs written.

    CUDA in fp64: the gradients alone, whose source the emulator also runs in double.
    """
    forward = not (device == "cuda" and case.dtype == "fp64")
    rng = np.random.default_rng(0)
    shape, past = (case.batch, case.dim, case.seqlen), case.width - 1
    states = (case.batch if case.packed is None else len(case.packed) - 1, case.dim, past)

    def make(shape, dtype):
        layout = case.weight_layout if shape == (case.dim, case.width) else ""
        return laid_out(shape, dtype or case.dtype, layout or case.layout, rng.standard_normal(shape))

    inputs = {"x": make(shape, ""), "weight": make((case.dim, case.width), case.weight_dtype)}
    if case.one_weight:
        inputs["weight"].array = np.broadcast_to(inputs["weight"].array[:, :1], (case.dim, case.width))
    inputs["bias"] = make((case.dim,), case.weight_dtype) if case.bias else None
    inputs["initial"] = make(states, case.state_dtype) if case.initial else None
    y = laid_out(shape, case.dtype, case.y_layout or ("contiguous" if case.layout == "expanded" else case.layout))
    final = Tensor(states, case.dtype) if case.final else None
    cu_seqlens = None if case.packed is None else np.array(case.packed, case.index)
    seq_idx = np.repeat(rng.integers(-1, 3, (case.batch, case.seqlen)), 5, axis=1)[:, : case.seqlen] if case.seq_idx else None
    seq_idx = None if seq_idx is None else seq_idx.astype(case.index)

    array = {name: None if t is None else t.array for name, t in inputs.items()}
    if forward:
        host.causal_conv1d(device, array["x"], array["weight"], array["bias"], seq_idx, array["initial"], case.silu, cu_seqlens, y.array,
                           None if final is None else final.array)  # fmt: skip

    # The gradients: with a gradient through the final states wherever there are some.
    grads = {"dy": laid_out(shape, case.dtype, case.y_layout or case.layout, rng.standard_normal(shape)),
             "dfinal": make(states, "") if case.final else None}  # fmt: skip
    dx = laid_out(shape, case.dtype, "contiguous" if case.layout == "expanded" else case.layout)
    dweight = Tensor((case.dim, case.width), case.weight_dtype or case.dtype)
    dbias = Tensor((case.dim,), case.weight_dtype or case.dtype) if case.bias else None
    dinitial = Tensor(states, case.state_dtype or case.dtype) if case.initial else None
    partial: list[Tensor] = []

    def make_partial(rows):
        partial.append(Tensor((rows, case.width + 1, case.dim), "fp64" if case.dtype == "fp64" else "fp32"))
        return partial[0].array

    host.causal_conv1d_bwd(
        device, grads["dy"].array, grads["dfinal"] and grads["dfinal"].array, array["x"], array["weight"], array["bias"], seq_idx, array["initial"],
        case.silu, cu_seqlens, dx.array, dweight.array, dbias and dbias.array, dinitial and dinitial.array, make_partial)  # fmt: skip
    partial[0].check_guards("partial")
    for name, tensor in (inputs | grads).items():
        if tensor:
            tensor.check_unchanged(name)

    if case.packed and (list(case.packed) != sorted(case.packed) or not 0 <= case.packed[0] <= case.packed[-1] <= case.seqlen):
        # Bad boundaries are clamped: wrong numbers, every one of them written, no access outside a tensor.
        for name, tensor in {"y": y, "final_states": final, "dx": dx, "dweight": dweight, "dbias": dbias, "dinitial": dinitial}.items():
            tensor.check_guards(name)
            assert np.isfinite(tensor.values()).all(), name
        return
    x, weight = inputs["x"].values(), inputs["weight"].values()
    bias = inputs["bias"].values() if case.bias else np.zeros(case.dim)
    initial = inputs["initial"].values() if case.initial else np.zeros(states)
    dy, dfinal = grads["dy"].values(), grads["dfinal"].values() if case.final else np.zeros(states)
    expected, expected_final = np.zeros(shape), np.zeros(states)
    expected_dx, expected_dweight, expected_dbias, expected_dinitial = np.zeros(shape), np.zeros_like(weight), np.zeros(case.dim), np.zeros(states)
    if seq_idx is not None:
        for b in range(case.batch):
            for s in range(3):
                same = seq_idx[b] == s
                expected[b][:, same] = expected_conv(x[b] * same, weight, bias, case.silu, initial[b])[0][:, same]
                part = expected_gradients(dy[b] * same, dfinal[b], x[b] * same, weight, bias, case.silu, initial[b])
                expected_dx[b][:, same] = part[0][:, same]
                expected_dweight += part[1]
                expected_dbias += part[2]
    else:
        bounds = [0, case.seqlen] if case.packed is None else case.packed
        pieces = [(b, b, *bounds) for b in range(case.batch)] if case.packed is None else [(0, i, *bounds[i : i + 2]) for i in range(len(bounds) - 1)]
        for b, state, begin, end in pieces:
            expected[b, :, begin:end], expected_final[state] = expected_conv(x[b, :, begin:end], weight, bias, case.silu, initial[state])
            part = expected_gradients(dy[b, :, begin:end], dfinal[state], x[b, :, begin:end], weight, bias, case.silu, initial[state])
            expected_dx[b, :, begin:end], expected_dinitial[state] = part[0], part[3]
            expected_dweight += part[1]
            expected_dbias += part[2]
    if forward:
        check_close(y, expected, harness.OUTPUT[case.dtype], "y")
    if forward and final:
        check_close(final, expected_final, harness.OUTPUT[case.dtype], "final_states")
    check_close(dx, expected_dx, harness.GRADIENT[case.dtype], "dx")
    check_close(dweight, expected_dweight, harness.GRADIENT[case.weight_dtype or case.dtype], "dweight")
    if dbias:
        check_close(dbias, expected_dbias, harness.GRADIENT[case.weight_dtype or case.dtype], "dbias")
    if dinitial:
        check_close(dinitial, expected_dinitial, harness.GRADIENT[case.state_dtype or case.dtype], "dinitial_states")


def check_large_strides(host, device: str) -> None:
    """Batch rows, channels, then time steps further apart than 32 bits count elements."""
    n, step = 40, 2**31 + 64
    rng = np.random.default_rng(0)
    x, y, dy, dx = (harness.sparse_rows(2, n, step) for _ in range(4))
    x[...], dy[...] = rng.standard_normal(x.shape), rng.standard_normal(x.shape)
    views = {"batch rows": lambda t: t[:, None], "channels": lambda t: t[None], "time steps": lambda t: t.T[None]}
    for what, view in views.items():
        at, at_dy = view(x), view(dy)
        weight, initial = rng.standard_normal((at.shape[1], 3)).astype(np.float32), np.zeros((at.shape[1], 2))
        dweight = np.empty_like(weight)
        y[...], dx[...] = np.nan, np.nan
        host.causal_conv1d(device, at, weight, None, None, None, True, None, view(y), None)
        host.causal_conv1d_bwd(device, at_dy, None, at, weight, None, None, None, True, None, view(dx), dweight, None, None,
                               lambda rows, dim=at.shape[1]: np.empty((rows, 4, dim), np.float32))  # fmt: skip
        zeros = np.zeros(at.shape[1])
        expected = np.stack([expected_conv(row, weight, zeros, True, initial)[0] for row in at.astype(np.float64)])
        parts = [expected_gradients(g, 0, row, weight, zeros, True, initial) for g, row in zip(at_dy.astype(np.float64), at.astype(np.float64))]
        for name, got, want in (("y", view(y), expected), ("dx", view(dx), np.stack([part[0] for part in parts])),
                                ("dweight", dweight, sum(part[1] for part in parts))):  # fmt: skip
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            assert error <= harness.OUTPUT["fp16"] * 1.5, f"{name}: relative error {error:.2e} with {what} 2^31 + 64 elements apart"
