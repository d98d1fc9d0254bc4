"""causal_conv1d: an independent loop, every backend against the fp64 reference, gradients, states, promises, errors, torch."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import cobra_kernels
from cobra_kernels import causal_conv1d
from cobra_kernels.errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError
from tests.conftest import kernel_backends
from tests.tolerances import GRADIENT, OUTPUT, assert_close

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
needs_kernels = pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 2
    dim: int = 24
    seqlen: int = 19
    width: int = 4
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # None: as x
    state_dtype: torch.dtype | None = None  # None: as x
    bias: bool = True
    activation: str | None = "silu"
    layout: str = "channel_first"  # of x: see laid_out
    states: str = "none"  # none | initial | packed | packed_initial | seq_idx
    bounds: tuple[int, ...] = (0, 5, 5, 7, 18)  # cu_seqlens: one empty, one shorter than the window, padding at the end

    @property
    def id(self) -> str:
        base = Case()
        changed = [f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in self._asdict().items() if v != getattr(base, k)]
        return "-".join(changed) or "base"


LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 18, 19, 20, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 1023, 1024, 1025, 2049)
DIMS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 65, 100, 192)
LAYOUTS = ("channel_first", "channel_last", "sliced_first", "sliced_last", "unaligned", "unaligned_last", "expanded", "strided")
STATES = ("none", "initial", "packed", "packed_initial", "seq_idx")

CASES = [
    *(Case(seqlen=n, layout=x, dim=5 if n > 300 else 24, states=s)
      for n in LENGTHS for x in ("channel_first", "channel_last") for s in ("none", "initial")),
    *(Case(dim=n, layout=x) for n in DIMS for x in ("channel_first", "channel_last")),
    *(Case(dim=8192 + 17, seqlen=3, batch=1, layout=x) for x in ("channel_first", "channel_last")),  # two channel blocks
    *(Case(width=w, layout=x, states=s) for w in (1, 2, 3, 5, 6, 7, 8, 9, 23) for x in ("channel_first", "channel_last") for s in STATES),
    *(Case(layout=x, states=s) for x in LAYOUTS for s in STATES),
    *(Case(batch=b, layout=x) for b in (0, 1, 3) for x in ("channel_first", "channel_last")),
    *(Case(bias=b, activation=a, layout=x) for b in (True, False) for a in (None, "swish") for x in ("channel_first", "channel_last")),
    *(Case(dtype=d, layout=x, states=s) for d in (BF16, F16, F64) for x in ("channel_first", "channel_last") for s in STATES),
    *(Case(dtype=d, weight_dtype=w, state_dtype=i, states="initial", layout=x)
      for d, w, i in ((F32, BF16, F16), (BF16, F32, F32), (F16, BF16, BF16)) for x in ("channel_first", "channel_last")),
    *(Case(states="packed", bounds=b, layout=x)
      for b in ((0,), (0, 0), (0, 19), (0, 1, 2, 3, 19), (0, 17, 19)) for x in ("channel_first", "channel_last")),
    *(Case(states="packed_initial", seqlen=2100, dim=3, bounds=(0, 1, 1023, 1025, 2050), layout=x) for x in ("channel_first", "channel_last")),
]  # fmt: skip
CASES = list(dict.fromkeys(CASES))


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (expanded: the first row's) of a (batch, dim, seqlen) tensor in another memory layout."""

    def channel_last(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def sliced(t):  # inner view of a larger NaN-filled buffer
        outer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
        return outer[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)

    def unaligned(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    if layout == "channel_last":
        return channel_last(t)
    if layout == "sliced_first":
        return sliced(t)
    if layout == "sliced_last":
        return sliced(t.transpose(1, 2)).transpose(1, 2)
    if layout == "unaligned":
        return unaligned(t)
    if layout == "unaligned_last":
        return unaligned(t.transpose(1, 2).contiguous()).transpose(1, 2)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "strided":  # stride 1 nowhere
        return torch.stack([t, t], -1)[..., 0]
    return t


def make_inputs(case: Case, seed: int = 0) -> dict:
    """Keyword arguments of causal_conv1d."""
    g = torch.Generator().manual_seed(seed)
    batch = 1 if case.states.startswith("packed") else case.batch

    def randn(*shape, dtype):
        return torch.randn(shape, generator=g, dtype=F64).to(dtype)

    weight_dtype = case.weight_dtype or case.dtype
    kwargs = {
        "x": laid_out(randn(batch, case.dim, case.seqlen, dtype=case.dtype), case.layout),
        "weight": randn(case.dim, case.width, dtype=weight_dtype) / case.width,
        "bias": randn(case.dim, dtype=weight_dtype) if case.bias else None,
        "activation": case.activation,
    }
    rows = batch
    if case.states.startswith("packed"):
        kwargs["cu_seqlens"] = torch.tensor(case.bounds, dtype=torch.int32)
        rows = len(case.bounds) - 1
    if case.states.endswith("initial"):
        kwargs["initial_states"] = randn(rows, case.dim, case.width - 1, dtype=case.state_dtype or case.dtype)
    if case.states == "seq_idx":  # rises, falls and repeats; some padding
        kwargs["seq_idx"] = torch.randint(-1, 3, (batch, case.seqlen), generator=g).repeat_interleave(2, 1)[:, : case.seqlen]
    else:
        kwargs["return_final_states"] = True
    return kwargs


def run(kwargs, backend):
    """(y,) or (y, final_states)."""
    out = causal_conv1d(**kwargs, backend=backend)
    return out if isinstance(out, tuple) else (out,)


def in_fp64(kwargs):
    return {k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def assert_outputs(got, want, dtype, what=""):
    """y within the table's limit, final states exactly: they are copies."""
    assert_close(got[0], want[0], OUTPUT[dtype], f"y {what}")
    if len(got) > 1:
        assert torch.equal(got[1], want[1].to(dtype)), f"final_states {what}"


# --- the reference against an independent loop -----------------------------------------------------------------------


def oracle(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None, cu_seqlens=None, return_final_states=False):
    """One scalar at a time, from the definition."""
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    bounds = [(b, 0, seqlen, b) for b in range(batch)]  # (row of x, begin, end, row of the states)
    if cu_seqlens is not None:
        bounds = [(0, int(cu_seqlens[i]), int(cu_seqlens[i + 1]), i) for i in range(len(cu_seqlens) - 1)]
    y = np.zeros((batch, dim, seqlen))
    final = np.zeros((len(bounds), dim, width - 1))

    def value(b, begin, state, d, t):
        if t >= begin:
            return x[b, d, t]
        return 0.0 if initial_states is None else initial_states[state, d, width - 1 + t - begin]

    for b, begin, end, state in bounds:
        for d in range(dim):
            for j in range(width - 1):
                t = end - (width - 1) + j
                if t >= begin - (width - 1):
                    final[state, d, j] = value(b, begin, state, d, t)
            for t in range(begin, end):
                total = 0.0 if bias is None else bias[d]
                for w in range(width):
                    s = t - width + 1 + w
                    if seq_idx is not None and (s < 0 or seq_idx[b, s] != seq_idx[b, t]):
                        continue
                    total += weight[d, w] * value(b, begin, state, d, s)
                y[b, d, t] = total / (1 + math.exp(-total)) if activation else total
                if seq_idx is not None and seq_idx[b, t] < 0:
                    y[b, d, t] = 0.0
    return (y, final) if return_final_states else (y,)


ORACLE_CASES = [
    *(Case(dim=3, seqlen=n, width=w, dtype=F64, states=s) for n in (0, 1, 2, 3, 9) for w in (1, 2, 4) for s in ("none", "initial", "seq_idx")),
    *(Case(dim=2, width=w, dtype=F64, states=s, activation=a)
      for w in (1, 3, 7) for s in ("packed", "packed_initial") for a in (None, "silu")),
]  # fmt: skip


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda c: c.id)
def test_reference_against_a_plain_loop(case):
    kwargs = make_inputs(case)
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    for got, want in zip(run(kwargs, "reference"), oracle(**arrays), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-13)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_values(case, backend):
    if backend == "reference" and case.layout != "channel_first":
        case = case._replace(layout="strided")  # torch reads any layout alike: one stands for all
    kwargs = make_inputs(case)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: an element never written shows
    try:
        outs = run(kwargs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert outs[0].dtype == case.dtype and outs[0].stride() == torch.empty_like(kwargs["x"]).stride()
    assert all(o.dtype == case.dtype and o.is_contiguous() for o in outs[1:])
    assert_outputs(outs, run(in_fp64(kwargs), "reference"), case.dtype, backend)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layout", ["channel_first", "channel_last", "strided"])
def test_every_level(cpu_level, dtype, layout):
    for states in STATES:
        for dim, seqlen, width in ((1, 70, 4), (37, 35, 2), (40, 3, 8), (16, 130, 11)):
            kwargs = make_inputs(Case(dim=dim, seqlen=seqlen, width=width, dtype=dtype, layout=layout, states=states, bounds=(0, 1, 3)), dim)
            assert_outputs(run(kwargs, "cpu"), run(in_fp64(kwargs), "reference"), dtype, f"{states} {dim} {seqlen} {width}")


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
def test_closed_forms(backend, layout):
    x = laid_out(torch.randn(2, 5, 30), layout)
    for w in range(4):  # one tap is a delay
        weight = torch.zeros(5, 4)
        weight[:, w] = 1
        delayed = torch.nn.functional.pad(x, (3 - w, 0))[..., :30]
        assert torch.equal(causal_conv1d(x, weight, backend=backend), delayed)
    running = causal_conv1d(x[..., :6], torch.ones(5, 6), backend=backend)  # ones sum everything so far
    assert_close(running, x[..., :6].cumsum(-1), 1e-6)
    expected = torch.nn.functional.conv1d(x, torch.ones(5, 1, 4), torch.arange(5.0), padding=3, groups=5)[..., :30]
    assert_close(causal_conv1d(x, torch.ones(5, 4), torch.arange(5.0), backend=backend), expected, 1e-6)
    extreme = causal_conv1d(torch.tensor([[[-1e4, -100.0, 0.0, 100.0, 1e4]]]), torch.ones(1, 1), None, activation="silu", backend=backend)
    assert torch.equal(extreme.flatten()[2:], torch.tensor([0.0, 100.0, 1e4])) and (extreme.flatten()[:2].abs() < 1e-30).all()


@needs_kernels
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_agree_bit_for_bit(states, dtype):
    """Outputs and the gradients that are not summed over positions."""
    kwargs = make_inputs(Case(states=states, dtype=dtype, dim=37, seqlen=150, bounds=(0, 2, 70, 140)))
    want, douts = run(kwargs, "cpu"), random_douts(kwargs)
    want_gradients = dict(zip(leaves_of(kwargs), gradients(kwargs, leaves_of(kwargs), "cpu", douts)))
    for layout in set(LAYOUTS) - {"expanded"}:
        other = {**kwargs, "x": laid_out(kwargs["x"], layout)}
        assert all(torch.equal(a, b) for a, b in zip(run(other, "cpu"), want)), layout
        got = dict(zip(leaves_of(other), gradients(other, leaves_of(other), "cpu", [laid_out(douts[0], layout), *douts[1:]])))
        assert all(torch.equal(got[k], want_gradients[k]) for k in {"x", "initial_states"} & set(got)), layout


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_split_at_every_point(backend, layout, width):
    kwargs = make_inputs(Case(width=width, layout=layout, seqlen=13, states="initial"))
    x = kwargs["x"]
    y, final = run(kwargs, backend)
    for t in range(14):
        first, middle = run({**kwargs, "x": x[..., :t]}, backend)
        second, last = run({**kwargs, "x": x[..., t:], "initial_states": middle}, backend)
        joined = torch.cat([first, second], -1)
        assert torch.equal(last, final)
        assert torch.equal(joined, y) if backend == "cpu" else torch.allclose(joined, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
@pytest.mark.parametrize("initial", [True, False])
def test_packed_equals_separate_bit_for_bit(backend, layout, initial):
    bounds = (0, 3, 3, 4, 40, 57)
    kwargs = make_inputs(Case(states="packed_initial" if initial else "packed", layout=layout, seqlen=60, bounds=bounds))
    y, final = run(kwargs, backend)
    one = {k: v for k, v in kwargs.items() if k != "cu_seqlens"}
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        part = {**one, "x": kwargs["x"][..., begin:end]}
        if initial:
            part["initial_states"] = kwargs["initial_states"][i : i + 1]
        alone, state = run(part, backend)
        assert torch.equal(y[..., begin:end], alone) and torch.equal(final[i : i + 1], state)
    assert (y[..., 57:] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_seq_idx_equals_cu_seqlens(backend):
    kwargs = make_inputs(Case(states="packed", seqlen=30, bounds=(0, 4, 17, 25), layout="channel_last"))
    y, _ = run(kwargs, backend)
    seq_idx = torch.tensor([[0] * 4 + [1] * 13 + [2] * 8 + [-1] * 5])
    got = causal_conv1d(kwargs["x"], kwargs["weight"], kwargs["bias"], seq_idx, activation="silu", backend=backend)
    assert torch.equal(got, y) if backend == "cpu" else torch.allclose(got, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_final_states_out(backend):
    kwargs = make_inputs(Case(states="initial"))
    y, final = run(kwargs, backend)
    out = laid_out(torch.full((2, 24, 3), float("nan")), "channel_last")
    again, returned = run({**kwargs, "final_states_out": out}, backend)
    assert returned is out and torch.equal(out, final) and torch.equal(again, y)
    half = torch.empty(2, 24, 3, dtype=BF16)
    assert run({**kwargs, "final_states_out": half}, backend)[1] is half and torch.equal(half, final.to(BF16))


# --- gradients -------------------------------------------------------------------------------------------------------

LEAVES = ("x", "weight", "bias", "initial_states")
PLAIN_AND_ROWS = ("channel_first", "channel_last")
ALL_LENGTHS = tuple(itertools.accumulate(range(11)))  # packed sequences of every length up to 10
GRADIENT_CASES = [
    *(Case(states=s, layout=x, activation=a, bias=b) for s in STATES for x in LAYOUTS for a, b in (("silu", True), ("silu", False), (None, True))),
    # Every length up to the width, for every width: a sequence shorter than its window.
    *(Case(seqlen=n, width=w, states=s, layout=x, dim=17)
      for w in range(1, 10) for n in range(w + 1) for s in ("none", "initial") for x in PLAIN_AND_ROWS),
    *(Case(seqlen=57, width=w, states=s, layout=x, bounds=ALL_LENGTHS)
      for w in (1, 2, 4, 8, 11) for s in ("packed", "packed_initial") for x in PLAIN_AND_ROWS),
    *(Case(states="packed_initial", bounds=b, layout=x) for b in ((0,), (0, 0), (0, 19), (0, 1, 2, 3, 19)) for x in PLAIN_AND_ROWS),
    *(Case(width=w, states="seq_idx", layout=x) for w in (1, 2, 3, 8, 9) for x in PLAIN_AND_ROWS),
    *(Case(dtype=d, weight_dtype=w, state_dtype=i, states=s, layout=x)
      for d, w, i in ((BF16, None, None), (BF16, F32, F32), (F16, BF16, F32), (F32, BF16, F16)) for s in STATES for x in PLAIN_AND_ROWS),
    # Around the chunks of time and the blocks of channels of a unit of work.
    *(Case(seqlen=n, dim=5, layout="channel_last", states=s, bounds=(0, 3, 125, 126, n))
      for n in (127, 128, 129, 131, 132, 257) for s in ("none", "packed_initial", "seq_idx")),
    *(Case(seqlen=n, dim=3, states=s, bounds=(0, 3, 1021, 1023, n - 1)) for n in (1024, 1025, 1027, 2049) for s in ("none", "packed_initial", "seq_idx")),
    *(Case(dim=d, seqlen=7, layout="channel_last", states=s) for d in (2047, 2048, 2049, 4099) for s in ("none", "initial")),
    *(Case(batch=b, dim=d, states=s) for b, d in ((0, 24), (2, 0), (3, 7)) for s in ("none", "initial")),
]  # fmt: skip
GRADIENT_CASES = list(dict.fromkeys(GRADIENT_CASES))


def leaves_of(kwargs, wide=False) -> dict[str, torch.Tensor]:
    """The differentiable arguments, their layout kept."""
    given = {k: kwargs[k].detach() for k in LEAVES if kwargs.get(k) is not None}
    return {k: (v.double() if wide else v.clone(memory_format=torch.preserve_format)).requires_grad_() for k, v in given.items()}


def gradients(kwargs, leaves, backend, douts):
    """Of sum(out * dout) with respect to the leaves, None of them left out; a `dout` of None gives its output none."""
    outs = run({**kwargs, **leaves}, backend)
    pairs = [(o, d) for o, d in zip(outs, douts) if d is not None and o.requires_grad]
    if not pairs:
        return [torch.zeros_like(v) for v in leaves.values()]
    return torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [d for _, d in pairs], allow_unused=True, materialize_grads=True)


def random_douts(kwargs):
    return [torch.randn(o.shape, dtype=F64).to(o.dtype) for o in run(kwargs, "reference")]


def assert_gradients(kwargs, backend, douts, what=""):
    leaves, wide = leaves_of(kwargs), leaves_of(kwargs, wide=True)
    got = gradients(kwargs, leaves, backend, douts)
    want = gradients(in_fp64(kwargs), wide, "reference", [None if d is None else d.double() for d in douts])
    for name, g, w in zip(leaves, got, want, strict=True):
        assert g.dtype == leaves[name].dtype and g.shape == leaves[name].shape
        assert_close(g, w, GRADIENT[g.dtype], f"d{name} {what}")


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", kernel_backends())
def test_gradients(case, backend):
    kwargs = make_inputs(case)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: an element never written shows
    try:
        incoming = {"like x": case.layout if case.layout != "expanded" else "channel_first"}
        if case.seqlen == Case().seqlen and case.width == Case().width:  # any other incoming gradient than one that is laid out as x
            incoming |= {name: name for name in ("channel_first", "channel_last", "expanded", "strided", "sliced_last", "unaligned")}
        for what, layout in incoming.items():
            douts = random_douts(kwargs)
            assert_gradients(kwargs, backend, [laid_out(d, layout) if d.numel() else d for d in douts], what)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernels
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("layout", PLAIN_AND_ROWS)
def test_gradients_of_a_sum(layout, states):
    """What `.sum()` sends back has stride 0 everywhere."""
    kwargs = make_inputs(Case(states=states, layout=layout))
    leaves, wide = leaves_of(kwargs), leaves_of(kwargs, wide=True)
    got = torch.autograd.grad(sum(o.sum() for o in run({**kwargs, **leaves}, "cpu")), list(leaves.values()))
    want = torch.autograd.grad(sum(o.sum() for o in run({**in_fp64(kwargs), **wide}, "reference")), list(wide.values()))
    for name, g, w in zip(leaves, got, want):
        assert_close(g, w, GRADIENT[F32], f"d{name}")


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layout", [*PLAIN_AND_ROWS, "strided"])
def test_gradients_at_every_level(cpu_level, dtype, layout):
    for states in STATES:
        for dim, seqlen, width in ((1, 70, 4), (37, 35, 2), (40, 3, 8), (16, 130, 11)):
            case = Case(dim=dim, seqlen=seqlen, width=width, dtype=dtype, layout=layout, states=states, bounds=(0, 1, 3), weight_dtype=F32)
            kwargs = make_inputs(case, dim)
            assert_gradients(kwargs, "cpu", [laid_out(d, layout) for d in random_douts(kwargs)], f"{states} {dim} {seqlen} {width}")


@needs_kernels
def test_the_backend_of_the_forward_runs_the_backward():
    cobra_kernels.reset_call_counts()
    kwargs = make_inputs(Case(states="initial"))
    gradients(kwargs, leaves_of(kwargs), "cpu", random_douts(kwargs))
    counts = cobra_kernels.call_counts()
    assert counts["causal_conv1d", "cpu"] == counts["causal_conv1d_bwd", "cpu"] == 1
    assert ("causal_conv1d_bwd", "triton") not in counts


@pytest.mark.parametrize("states", STATES)
def test_gradcheck_of_the_reference(states):
    gradcheck(Case(dim=2, seqlen=6, width=3, dtype=F64, states=states, bounds=(0, 1, 4, 5)), "reference")


@needs_kernels
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("layout", PLAIN_AND_ROWS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_gradcheck_in_fp64(states, layout, bias, activation, width):
    """Every combination of the optional arguments, on the cpu backend's own kernels."""
    gradcheck(Case(dim=2, seqlen=6, width=width, dtype=F64, states=states, layout=layout, bias=bias, activation=activation, bounds=(0, 1, 4, 5)), "cpu")


def gradcheck(case, backend):
    kwargs = make_inputs(case)
    leaves = leaves_of(kwargs)

    def f(*tensors):
        return run({**kwargs, **dict(zip(leaves, tensors))}, backend)

    # Fast mode projects the Jacobian on random vectors, so that the whole grid is affordable.
    assert torch.autograd.gradcheck(f, list(leaves.values()), fast_mode=backend != "reference")


@needs_kernels
@pytest.mark.parametrize("through", [0, 1])
@pytest.mark.parametrize("states", ["initial", "packed_initial"])
@pytest.mark.parametrize("layout", PLAIN_AND_ROWS)
def test_gradient_through_one_output_only(layout, states, through):
    kwargs = make_inputs(Case(states=states, layout=layout))
    assert_gradients(kwargs, "cpu", [d if i == through else None for i, d in enumerate(random_douts(kwargs))])


@needs_kernels
@pytest.mark.parametrize("layout", [*PLAIN_AND_ROWS, "strided"])
@pytest.mark.parametrize("states", ["seq_idx", "packed"])
def test_padding_gets_exactly_zero_gradient_and_its_nan_reaches_none(layout, states):
    kwargs = make_inputs(Case(states=states, layout=layout, batch=1))
    padding = kwargs["seq_idx"][0] < 0 if states == "seq_idx" else torch.arange(19) >= 18
    assert padding.any()
    douts = random_douts(kwargs)
    clean = gradients(kwargs, leaves_of(kwargs), "cpu", douts)
    kwargs["x"][..., padding] = float("nan")
    douts[0][..., padding] = float("nan")
    dx, *others = gradients(kwargs, leaves_of(kwargs), "cpu", douts)
    assert (dx[..., padding] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip((dx, *others), clean))


@needs_kernels
def test_double_backward_raises_by_name():
    x = torch.randn(1, 3, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(causal_conv1d(x, torch.ones(3, 4), activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d_bwd: double backward"):
        dx.sum().backward()


@needs_kernels
@pytest.mark.parametrize("layout", PLAIN_AND_ROWS)
@pytest.mark.parametrize("initial", [True, False])
def test_packed_gradients_equal_separate_ones(layout, initial):
    """Bit for bit where a sequence owns them; dweight and dbias, summed over all, to rounding."""
    bounds = (0, 3, 3, 4, 140, 157)
    kwargs = make_inputs(Case(states="packed_initial" if initial else "packed", layout=layout, seqlen=160, bounds=bounds))
    douts = random_douts(kwargs)
    packed = dict(zip(leaves_of(kwargs), gradients(kwargs, leaves_of(kwargs), "cpu", douts)))
    sums = {"weight": 0, "bias": 0}
    for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        one = {k: v for k, v in kwargs.items() if k != "cu_seqlens"} | {"x": kwargs["x"][..., begin:end]}
        if initial:
            one["initial_states"] = kwargs["initial_states"][i : i + 1]
        alone = dict(zip(leaves_of(one), gradients(one, leaves_of(one), "cpu", [douts[0][..., begin:end], douts[1][i : i + 1]])))
        assert torch.equal(packed["x"][..., begin:end], alone["x"])
        assert not initial or torch.equal(packed["initial_states"][i : i + 1], alone["initial_states"])
        sums = {k: v + alone[k].double() for k, v in sums.items()}
    for name, total in sums.items():
        assert_close(packed[name], total, GRADIENT[F32], name)


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
def test_causal_and_nothing_crosses_a_row(backend, layout):
    kwargs = make_inputs(Case(batch=3, dim=33, seqlen=40, layout=layout))
    y, _ = run(kwargs, backend)
    later = kwargs["x"].clone(memory_format=torch.preserve_format)
    later[..., 21:] += 1
    assert torch.equal(run({**kwargs, "x": later}, backend)[0][..., :21], y[..., :21])
    kwargs["x"][1, 17, 5] = float("nan")
    poisoned, _ = run(kwargs, backend)
    assert poisoned[1, 17, 5:9].isnan().all()
    poisoned[1, 17, 5:9] = y[1, 17, 5:9]
    assert torch.equal(poisoned, y)


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_nan_of_another_sequence_never_leaks(backend):
    for layout in ("channel_first", "channel_last"):
        x = laid_out(torch.randn(1, 20, 20), layout)
        x[..., 9] = float("nan")
        seq_idx = torch.tensor([[0] * 9 + [-1] + [1] * 10])
        y = causal_conv1d(x, torch.ones(20, 4), None, seq_idx, activation="silu", backend=backend)
        assert not y.isnan().any() and (y[..., 9] == 0).all()
        packed = causal_conv1d(x, torch.ones(20, 4), cu_seqlens=torch.tensor([0, 9]), backend=backend)
        assert (packed[..., 9:] == 0).all()


@needs_kernels
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
def test_batch_and_channels_are_independent_bit_for_bit(layout):
    kwargs = make_inputs(Case(batch=4, dim=50, seqlen=90, layout=layout, states="initial"))
    y, final = run(kwargs, "cpu")
    rows = torch.tensor([2, 0, 3, 1])
    y2, final2 = run({**kwargs, "x": kwargs["x"][rows], "initial_states": kwargs["initial_states"][rows]}, "cpu")
    assert torch.equal(y2, y[rows]) and torch.equal(final2, final[rows])
    douts = random_douts(kwargs)
    whole = dict(zip(LEAVES, gradients(kwargs, leaves_of(kwargs), "cpu", douts)))
    one = {**kwargs, "x": kwargs["x"][2:3], "initial_states": kwargs["initial_states"][2:3]}
    alone = dict(zip(LEAVES, gradients(one, leaves_of(one), "cpu", [d[2:3] for d in douts])))
    assert all(torch.equal(whole[k][2:3], alone[k]) for k in ("x", "initial_states"))
    channels = torch.randperm(50)
    picked = {k: kwargs[k][:, channels] for k in ("x", "initial_states")} | {k: kwargs[k][channels] for k in ("weight", "bias")}
    y3, final3 = run({**kwargs, **picked}, "cpu")
    assert torch.equal(y3, y[:, channels]) and torch.equal(final3, final[:, channels])


@needs_kernels
@pytest.mark.threads
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
@pytest.mark.parametrize("states", STATES)
def test_threads_change_no_bit(threads, layout, states):
    kwargs = make_inputs(Case(dim=130, seqlen=400, layout=layout, states=states, bounds=(0, 100, 101, 390)))
    douts = random_douts(kwargs)

    def once():
        return [*run(kwargs, "cpu"), *gradients(kwargs, leaves_of(kwargs), "cpu", douts)]

    one, two, again = threads(once, 1, 2, 2)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, again, strict=True))


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("states", STATES)
def test_inputs_are_not_written_and_outputs_are_new(backend, states):
    kwargs = make_inputs(Case(states=states, width=1))
    tensors = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    before = {k: v.clone() for k, v in tensors.items()}
    outs = run(kwargs, backend)
    assert all(torch.equal(tensors[k], v) for k, v in before.items())
    assert {o.data_ptr() for o in outs if o.numel()}.isdisjoint(v.data_ptr() for v in tensors.values())


@needs_kernels
@pytest.mark.parametrize("layout", ["batch", "dim", "seqlen"])
def test_stride_beyond_32_bits(tmp_path, layout):
    """Two slices 2^31 + 7 elements apart, on a sparse file: an int offset would read elsewhere."""
    stride = 2**31 + 7
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 4096, dtype=BF16)
    sizes, strides = {"batch": ((2, 9, 20), (stride, 20, 1)), "dim": ((1, 2, 40), (1, stride, 1)), "seqlen": ((1, 40, 2), (1, 1, stride))}[layout]
    x = storage.as_strided(sizes, strides)
    x.copy_(torch.randn(sizes))
    weight = torch.randn(sizes[1], 3)
    got = causal_conv1d(x, weight, return_final_states=True, backend="cpu")
    want = causal_conv1d(x.contiguous(), weight, return_final_states=True, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    backward = torch.ops.cobra_kernels.causal_conv1d_bwd
    (dx, dweight, *_), (want_dx, want_dweight, *_) = (backward(t, None, t, weight, None, None, None, True, None) for t in (x, x.contiguous()))
    assert torch.equal(dx, want_dx)
    assert_close(dweight, want_dweight, GRADIENT[F32])


# --- errors ----------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 8, 10), torch.ones(8, 4)
ROW, CU = torch.zeros(1, 8, 10), torch.tensor([0, 4, 10])
IDX = torch.zeros(2, 10, dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: causal_conv1d(X[0], W), ShapeError, ["causal_conv1d: x", "(8, 10)", "(batch, dim, seqlen)"]),
        (lambda: causal_conv1d(X, W[:7]), ShapeError, ["weight", "(7, 4)", "dim=8", "comes from x"]),
        (lambda: causal_conv1d(X, W[:, None]), ShapeError, ["weight", "(8, 1, 4)", "width"]),
        (lambda: causal_conv1d(X, W[:, :0]), ShapeError, ["weight", "(8, 0)", "width >= 1"]),
        (lambda: causal_conv1d(X, W, W[:7, 0]), ShapeError, ["bias", "(7,)", "dim=8"]),
        (lambda: causal_conv1d(X, W, seq_idx=IDX[:, :9]), ShapeError, ["seq_idx", "(2, 9)", "seqlen=10"]),
        (lambda: causal_conv1d(X, W, seq_idx=IDX.float()), DtypeError, ["seq_idx", "float32", "int32 or int64"]),
        (lambda: causal_conv1d(X, W, seq_idx=IDX, initial_states=X[..., :3]), ShapeError, ["seq_idx", "initial_states"]),
        (lambda: causal_conv1d(X, W, seq_idx=IDX, return_final_states=True), ShapeError, ["seq_idx", "return_final_states"]),
        (lambda: causal_conv1d(ROW, W, seq_idx=IDX[:1], cu_seqlens=CU), ShapeError, ["seq_idx", "cu_seqlens"]),
        (lambda: causal_conv1d(X, W, initial_states=X[..., :4]), ShapeError, ["initial_states", "(2, 8, 4)", "width - 1=3"]),
        (lambda: causal_conv1d(ROW, W, initial_states=X[:1, :, :3], cu_seqlens=CU), ShapeError, ["initial_states", "num_seqs=2", "cu_seqlens"]),
        (lambda: causal_conv1d(X, W, final_states_out=X[..., :3]), ArgumentError, ["final_states_out", "return_final_states"]),
        (lambda: causal_conv1d(X, W, None, None, None, True, X[:1, :, :3]), ShapeError, ["final_states_out", "(1, 8, 3)", "batch=2"]),
        (lambda: causal_conv1d(X, W, None, None, None, True, X[:1, :, :3].expand(2, 8, 3)), ArgumentError, ["final_states_out", "expanded"]),
        (lambda: causal_conv1d(X, W, cu_seqlens=CU), ShapeError, ["batch=2", "expected 1"]),
        (lambda: causal_conv1d(ROW, W, cu_seqlens=CU[None]), ShapeError, ["cu_seqlens", "(1, 3)", "num_seqs + 1"]),
        (lambda: causal_conv1d(ROW, W, cu_seqlens=CU.float()), DtypeError, ["cu_seqlens", "float32"]),
        (lambda: causal_conv1d(ROW, W, cu_seqlens=CU + 1), ArgumentError, ["cu_seqlens[0] is 1", "expected 0"]),
        (lambda: causal_conv1d(ROW, W, cu_seqlens=torch.tensor([0, 5, 4])), ArgumentError, ["cu_seqlens[2] is 4", "cu_seqlens[1]=5"]),
        (lambda: causal_conv1d(ROW, W, cu_seqlens=torch.tensor([0, 11])), ArgumentError, ["cu_seqlens[-1] is 11", "seqlen=10"]),
        (lambda: causal_conv1d(X, W, activation="gelu"), ArgumentError, ["activation", "'gelu'", "'silu' or 'swish'"]),
        (lambda: causal_conv1d(X.long(), W), DtypeError, ["x", "int64"]),
        (lambda: causal_conv1d(X, W.double()), DtypeError, ["weight", "float64", "does not mix"]),
        (lambda: causal_conv1d(X, W.to("meta")), DtypeError, ["weight", "meta", "cpu"]),
        (lambda: causal_conv1d(X, W, backend="triton"), BackendUnavailable, ["'triton'"]),
        (lambda: causal_conv1d(X, W, backend="cuda"), BackendUnavailable, ["'cuda'"]),
    ],
)
def test_errors_name_argument_got_and_expected(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@needs_kernels
def test_torch_op_called_directly_stays_inside_its_tensors():
    op = torch.ops.cobra_kernels.causal_conv1d_fwd
    with pytest.raises(RuntimeError, match="weight has size 7"):
        op(X, W[:7], None, None, None, False, False, None)
    with pytest.raises(RuntimeError, match="initial_states has size 2"):
        op(X, W, None, None, X[..., :2], False, False, None)
    with pytest.raises(RuntimeError, match="seq_idx is not int32 or int64"):
        op(X, W, None, torch.zeros(X.shape[0], X.shape[2]), None, False, False, None)
    # Bad boundaries reach the kernel only here: it clamps them, and every output is still written.
    for bounds in ([-5, 40], [3, 1, 99], [10, 0], [0, 4, 2, 10]):
        y, final = op(ROW + 1, W, None, None, None, True, False, torch.tensor(bounds))
        assert y.isfinite().all() and final.isfinite().all()
        initial = torch.ones(len(bounds) - 1, 8, 3)
        grads = torch.ops.cobra_kernels.causal_conv1d_bwd(ROW + 1, initial, ROW + 1, W, W[:, 0], None, initial, True, torch.tensor(bounds))
        assert all(g.isfinite().all() for g in grads)
    bwd = torch.ops.cobra_kernels.causal_conv1d_bwd
    with pytest.raises(RuntimeError, match="dy has size 9"):
        bwd(X[..., :9], None, X, W, None, None, None, False, None)
    with pytest.raises(RuntimeError, match="dy has another dtype"):
        bwd(X.bfloat16(), None, X, W, None, None, None, False, None)
    with pytest.raises(RuntimeError, match="dfinal_states has size 2"):
        bwd(X, X[..., :2], X, W, None, None, None, False, None)
    with pytest.raises(RuntimeError, match="seq_idx excludes states"):
        bwd(X, X[..., :3], X, W, None, IDX, None, False, None)


def test_supports_says_what_the_op_does():
    assert cobra_kernels.supports("causal_conv1d", X, W, backend="reference") == (True, "reference; gradients: autograd of the reference")
    if kernel_backends():
        assert cobra_kernels.supports("causal_conv1d", X, W, backend="cpu") == (True, "cpu; gradients: kernel")
    ok, reason = cobra_kernels.supports("causal_conv1d", X, W, activation="relu")
    assert not ok and "'relu'" in reason
    ok, reason = cobra_kernels.supports("causal_conv1d", X, W, backend="cuda")
    assert not ok and "CUDA tensors" in reason


# --- torch -----------------------------------------------------------------------------------------------------------

OPCHECK_CASES = [Case(), Case(states="initial"), Case(states="packed_initial"), Case(states="seq_idx"), Case(dtype=BF16, layout="channel_last"),
                 Case(batch=0), Case(width=1, bias=False), Case(layout="strided", activation=None)]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda c: c.id)
def test_opcheck(case):
    kwargs = make_inputs(case)
    arguments = [kwargs.get(k) for k in ("x", "weight", "bias", "seq_idx", "initial_states")]
    rest = (kwargs.get("return_final_states", False), case.activation is not None, kwargs.get("cu_seqlens"))
    torch.library.opcheck(torch.ops.cobra_kernels.causal_conv1d_fwd.default, (*arguments, *rest))
    outs = run(kwargs, "reference")
    dfinal = torch.randn_like(outs[1]) if len(outs) > 1 else None
    torch.library.opcheck(torch.ops.cobra_kernels.causal_conv1d_bwd.default, (torch.randn_like(outs[0]), dfinal, *arguments, *rest[1:]))
    grads = [a.requires_grad_() if a is not None and a.is_floating_point() else a for a in arguments]
    torch.library.opcheck(torch.ops.cobra_kernels.causal_conv1d.default, (*grads, *rest, "cpu"))


def test_compile_fullgraph():
    kwargs = make_inputs(Case(states="initial", layout="channel_last"))
    leaves = [kwargs[k].requires_grad_() for k in ("x", "weight", "bias", "initial_states")]

    def f(x, weight, bias, initial_states):
        y, final = causal_conv1d(x, weight, bias, None, initial_states, True, activation="silu")
        return y.sin().sum() + final.sum()

    cobra_kernels.reset_call_counts()
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    assert_close(out, f(*leaves), 1e-6)
    if kernel_backends():
        assert cobra_kernels.call_counts()["causal_conv1d", "cpu"] >= 1  # the compiled graph calls the kernel
    compiled = torch.autograd.grad(out, leaves)
    if kernel_backends():
        assert cobra_kernels.call_counts()["causal_conv1d_bwd", "cpu"] == 1
    for got, want in zip(compiled, torch.autograd.grad(f(*leaves), leaves)):
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_filters_of_any_layout(backend, width):
    """A transposed, an every-second and an expanded weight, a strided bias: read in place, the same bits."""
    x, bias = torch.randn(2, 7, 12), torch.randn(14)[::2]
    for weight in (torch.randn(width, 7).t(), torch.randn(14, 2 * width)[::2, ::2], torch.randn(1, width).expand(7, width)):
        plain = causal_conv1d(x, weight.contiguous(), bias.contiguous(), backend=backend)
        assert torch.equal(causal_conv1d(x, weight, bias, backend=backend), plain)
