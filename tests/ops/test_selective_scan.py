"""selective_scan: reference against a closed sum, kernels against the fp64 reference, gradients, promises, edges, errors."""

from __future__ import annotations

import functools
import itertools
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

import cobra_kernels
from cobra_kernels import selective_scan
from cobra_kernels.errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError
from tests.conftest import kernel_backends
from tests.tolerances import GRADIENT, OUTPUT, assert_close, relative_error

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
C64, C128 = torch.complex64, torch.complex128
TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing. B and C: "3d", "constant", or a number of groups."""

    batch: int = 2
    dim: int = 19
    seqlen: int = 37
    dstate: int = 16
    dtype: torch.dtype = F32  # of u
    mixed: tuple[torch.dtype, ...] = ()  # dtypes of the other tensors, cycled; (): delta, z, B, C as u, the rest fp32
    B: str | int = "3d"
    C: str | int = "3d"
    D: bool = True
    z: bool = True
    bias: bool = True
    softplus: bool = True
    initial: bool = True
    layout: str = "channel_first"  # channel_last | mixed | strided | sliced | expanded | token_major (B and C)
    steps: str = "realistic"  # dt: log-uniform 1e-4..16 | "tiny": 1e-3 throughout | "raw": any sign, small
    cu_seqlens: tuple[int, ...] | None = None

    @property
    def id(self) -> str:
        base = Case()
        changed = [f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in self._asdict().items() if v != getattr(base, k)]
        return "-".join(changed) or "base"


CASES = [
    Case(),
    *(Case(seqlen=n) for n in (0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 257)),  # a tile is 32 steps
    *(Case(dim=n, seqlen=33) for n in (1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 192, 257, 600)),  # a block is 256 channels
    *(Case(dstate=n, dim=9, seqlen=17) for n in (1, 2, 3, 7, 8, 9, 15, 17, 32, 64, 257)),
    *(Case(batch=n) for n in (0, 1, 3, 5)),
    Case(dim=0),
    *(Case(B=b, C=c, dim=12) for b, c in ((1, 1), (2, 2), (3, 4), (12, 1), ("3d", 6))),
    *(Case(B=b, C=c, dim=20) for b, c in (("constant", "constant"), ("constant", "3d"), (2, "constant"))),
    *(Case(**{name: False}) for name in ("D", "z", "bias", "softplus", "initial")),
    Case(D=False, z=False, bias=False, softplus=False, initial=False, steps="raw"),
    *(Case(layout=x, dim=40) for x in ("channel_last", "mixed", "strided", "sliced", "expanded", "token_major")),
    *(Case(layout=x, dim=300, batch=1, seqlen=70, dtype=d) for x in ("channel_first", "channel_last") for d in (BF16, F16)),
    *(Case(dtype=d) for d in (BF16, F16, F64)),
    *(Case(dtype=F64, layout=x, dim=9, B=3, C="constant") for x in ("channel_last", "sliced")),
    Case(dtype=BF16, mixed=(F32, F16, BF16)),
    Case(dtype=F32, mixed=(BF16, F16)),
    Case(dtype=F16, mixed=(F32,), layout="channel_last"),
    Case(steps="tiny", seqlen=300),
    *(Case(batch=1, seqlen=70, cu_seqlens=c) for c in ((0,), (0, 0, 70), (0, 1, 33, 33, 34, 66), (0, 64, 64, 70))),
    Case(batch=1, seqlen=70, cu_seqlens=(0, 3, 40), layout="channel_last", dtype=BF16, initial=False),
    Case(batch=1, dim=4, seqlen=2049, dstate=2),
]


@functools.cache
def sampled_cases(count: int = 60, seed: int = 1) -> list[Case]:
    """Shapes of the boundary lists crossed at random: a full product would take hours. One seed replays them all."""
    rng, cases = random.Random(seed), []
    while len(cases) < count:
        packed = rng.random() < 0.2
        case = Case(
            batch=1 if packed else rng.choice((1, 2, 3, 5)),
            dim=rng.choice((1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 192)) * 2,
            seqlen=rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257)),
            dstate=rng.choice((1, 2, 3, 7, 8, 15, 16, 16, 16, 17, 32, 64)),
            dtype=rng.choice((F32, F32, BF16, F16)),
            mixed=rng.choice(((), (), (F32, BF16), (F16, F32, BF16))),
            B=rng.choice(("3d", 1, 2, "constant")),
            C=rng.choice(("3d", 1, 2, "constant")),
            **{name: rng.random() < 0.7 for name in ("D", "z", "bias", "softplus", "initial")},
            layout=rng.choice(("channel_first", "channel_last", "mixed", "strided", "sliced", "expanded", "token_major")),
        )
        if packed:
            inner = sorted(rng.randint(0, case.seqlen) for _ in range(rng.randint(1, 5)))
            case = case._replace(cu_seqlens=(0, *inner))
        if case.batch * case.dim * case.seqlen * case.dstate < 400_000:
            cases.append(case)
    return cases


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values of a (batch, dim, seqlen) or (.., dstate, seqlen) tensor in another memory layout."""
    if layout == "channel_last":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":  # neither layout: every second element
        return t.repeat_interleave(2, -1)[..., ::2]
    if layout == "sliced":  # unaligned inner view of a NaN-filled buffer
        outer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
        return outer[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    return t


def step_sizes(case: Case, g: torch.Generator) -> torch.Tensor:
    """delta (before bias and softplus) such that dt has the range of trained models."""
    shape = (case.batch, case.dim, case.seqlen)
    if case.steps == "raw":
        return torch.randn(shape, generator=g, dtype=F64) * 0.1
    if case.steps == "tiny":
        dt = torch.full(shape, 1e-3, dtype=F64)
    else:
        dt = torch.exp(torch.empty(shape, dtype=F64).uniform_(np.log(1e-4), np.log(16.0), generator=g))
    return dt + torch.log(-torch.expm1(-dt)) if case.softplus else dt  # the inverse of softplus


def make_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Every tensor argument of selective_scan, in the dtypes and layout of the case."""
    g = torch.Generator().manual_seed(seed)
    rows = case.batch if case.cu_seqlens is None else len(case.cu_seqlens) - 1

    def randn(*shape):
        return torch.randn(shape, generator=g, dtype=F64)

    def projection(form):
        if form == "constant":
            return randn(case.dim, case.dstate)
        groups = () if form == "3d" else (form,)
        return randn(case.batch, *groups, case.dstate, case.seqlen)

    delta_bias = randn(case.dim) * 0.1
    wide = {
        "u": randn(case.batch, case.dim, case.seqlen),
        "delta": step_sizes(case, g) - (delta_bias[:, None] if case.bias else 0.0),
        "A": -torch.rand(case.dim, case.dstate, generator=g, dtype=F64) * 1.2 - 0.05,
        "B": projection(case.B),
        "C": projection(case.C),
        "D": randn(case.dim) if case.D else None,
        "z": randn(case.batch, case.dim, case.seqlen) if case.z else None,
        "delta_bias": delta_bias if case.bias else None,
        "initial_state": randn(rows, case.dim, case.dstate) if case.initial else None,
    }
    tensors = {}
    for i, (name, t) in enumerate(wide.items()):
        dtype = case.dtype if name in ("u", "delta", "z", "B", "C") or case.dtype == F64 else F32
        if case.mixed and name != "u" and case.dtype != F64:
            dtype = case.mixed[i % len(case.mixed)]
        t = None if t is None else t.to(dtype)
        if t is not None and case.layout in ("sliced", "strided", "expanded"):
            t = laid_out(t, case.layout)
        elif t is not None and case.layout == "token_major" and name in ("B", "C") or case.layout == "channel_last" and name in ("u", "delta", "z", "B", "C"):
            t = t if t is None else laid_out(t, "channel_last")
        elif case.layout == "mixed" and name in ("delta", "C"):
            t = laid_out(t, "channel_last")
        tensors[name] = t
    return tensors


def run(case: Case, tensors: dict, backend: str | None = None, **kwargs):
    """(out, last_state)."""
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens, dtype=torch.int32)
    kwargs = {"return_last_state": True, "cu_seqlens": cu_seqlens, "backend": backend, **kwargs}
    return selective_scan(**tensors, delta_softplus=case.softplus, **kwargs)


def in_fp64(tensors):
    return {k: None if t is None else t.detach().double() for k, t in tensors.items()}


@functools.cache
def cached(case: Case, seed: int = 0):
    """Inputs and their fp64 reference result, shared by the tests that judge against it."""
    tensors = make_inputs(case, seed)
    return tensors, run(case, in_fp64(tensors), "reference")


# --- the reference, against the closed sum ---------------------------------------------------------------------------


def closed_sum(case: Case, tensors: dict) -> tuple[np.ndarray, np.ndarray]:
    """out and last_state without a recurrence: h_t = sum_s exp(A (S_t - S_s)) dt_s B_s u_s + exp(A S_t) h_0, S the running sum of dt.

    Channel by channel, numpy, extended precision where the platform has it.
    """
    real = np.clongdouble if torch.is_complex(tensors["A"]) else np.longdouble
    a = {k: None if t is None else t.numpy().astype(np.clongdouble if np.iscomplexobj(t.numpy()) else np.longdouble) for k, t in tensors.items()}
    batch, dim, seqlen = a["u"].shape
    bounds = case.cu_seqlens or (0, seqlen)
    rows = batch if case.cu_seqlens is None else len(bounds) - 1
    out = np.zeros((batch, dim, seqlen), np.longdouble)
    last = np.zeros((rows, dim, a["A"].shape[1]), real)

    def of_channel(m, b, d):  # (dstate, seqlen)
        if m.ndim == 2:
            return np.repeat(m[d][:, None], seqlen, 1)
        m = m[b] if m.ndim == 3 else m[b, d // (dim // m.shape[1])]
        return m[:, ::2] + 1j * m[:, 1::2] if real is np.clongdouble else m

    for b in range(batch):
        for d in range(dim):
            dt = a["delta"][b, d] + (0 if a["delta_bias"] is None else a["delta_bias"][d])
            if case.softplus:
                dt = np.where(dt > 20, dt, np.log1p(np.exp(np.minimum(dt, 20))))
            B, C, u = of_channel(a["B"], b, d), of_channel(a["C"], b, d), a["u"][b, d]
            for i, (begin, end) in enumerate(zip(bounds, bounds[1:])):
                row = b if case.cu_seqlens is None else i
                span = slice(begin, end)
                h0 = np.zeros(a["A"].shape[1]) if a["initial_state"] is None else a["initial_state"][row, d]
                S = np.cumsum(dt[span])
                lower = np.tril(np.ones((end - begin, end - begin)))
                for n, rate in enumerate(a["A"][d]):
                    kernel = np.where(lower > 0, np.exp(rate * np.where(lower > 0, S[:, None] - S[None], 0)), 0)
                    h = kernel @ (dt[span] * B[n, span] * u[span]) + np.exp(rate * S) * h0[n]
                    y = C[n, span] * h
                    out[b, d, span] += 2 * y.real if real is np.clongdouble else y
                    last[row, d, n] = h[-1] if end > begin else h0[n]
                if a["D"] is not None:
                    out[b, d, span] += a["D"][d] * u[span]
                if a["z"] is not None:
                    out[b, d, span] *= a["z"][b, d, span] / (1 + np.exp(-a["z"][b, d, span]))
    return out, last


ORACLE_CASES = [c._replace(dim=min(c.dim, 12), dstate=min(c.dstate, 16)) for c in CASES if c.dtype == F32 and c.seqlen <= 129]


@pytest.mark.parametrize("case", list(dict.fromkeys(ORACLE_CASES)), ids=lambda c: c.id)
def test_reference_against_a_closed_sum(case):
    tensors = in_fp64(make_inputs(case))
    out, last = run(case, tensors, "reference")
    want_out, want_last = closed_sum(case, tensors)
    assert_close(out, torch.from_numpy(want_out.astype(np.float64)), 1e-12)
    assert_close(last, torch.from_numpy(want_last.astype(np.float64)), 1e-12)


@pytest.mark.filterwarnings("ignore:.*complex A is served by reference only")
@pytest.mark.parametrize("B", ["3d", 2, "constant"])
@pytest.mark.parametrize("C", ["3d", "constant"])
def test_complex_A(B, C):
    case = Case(dim=6, dstate=3, seqlen=21, B=B, C=C)
    t = in_fp64(make_inputs(case))
    g = torch.Generator().manual_seed(1)
    t["A"] = torch.complex(t["A"], torch.randn(6, 3, generator=g, dtype=F64))
    for name in ("B", "C"):
        imaginary = torch.randn(t[name].shape, generator=g, dtype=F64)
        pair = torch.stack((t[name], imaginary), -1)
        t[name] = torch.view_as_complex(pair) if t[name].dim() == 2 else pair.flatten(-2)
    t["initial_state"] = torch.complex(t["initial_state"], torch.randn(2, 6, 3, generator=g, dtype=F64))
    out, last = run(case, t)  # the default backend steps down to the reference
    want_out, want_last = closed_sum(case, t)
    assert last.dtype == C128
    assert_close(out, torch.from_numpy(want_out.astype(np.float64)), 1e-12)
    assert_close(torch.view_as_real(last), torch.view_as_real(torch.from_numpy(want_last.astype(np.complex128))), 1e-12)
    assert cobra_kernels.supports("selective_scan", **t, delta_softplus=True, backend="cpu")[0] is False
    leaves = [t[k].requires_grad_() for k in TENSORS]
    grads = torch.autograd.grad(out := run(case, t, "reference")[0].sum(), leaves)
    assert out.isfinite() and all(g.shape == leaf.shape and g.dtype == leaf.dtype for g, leaf in zip(grads, leaves))
    with pytest.raises(DtypeError, match="complex64"):
        run(case, {**t, "u": t["u"].float(), "delta": t["delta"].float(), "z": None, "D": None, "delta_bias": None})


# --- values ----------------------------------------------------------------------------------------------------------


def check_values(case: Case, backend: str, seed: int = 0):
    tensors, (want, want_last) = cached(case, seed)
    out, last = run(case, tensors, backend)
    assert out.dtype == case.dtype and out.stride() == torch.empty_like(tensors["u"]).stride()
    assert last.dtype == (F64 if case.dtype == F64 else F32) and last.is_contiguous()
    # Steps of one size add the rounding of one decay coherently: judged against what fp32 itself loses (test_rows).
    if case.steps != "tiny":
        assert_close(out, want, OUTPUT[case.dtype], f"out[{backend}]")
        assert_close(last, want_last, OUTPUT[last.dtype], f"last_state[{backend}]")
    if case.cu_seqlens is not None:
        assert (out[..., case.cu_seqlens[-1] :] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_values(case, backend):
    check_values(case, backend)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("index", range(len(sampled_cases())))
def test_sampled_values(index, backend):
    check_values(sampled_cases()[index], backend, seed=index)


LEVEL_CASES = [
    Case(dim=dim, seqlen=seqlen, dtype=dtype, layout=layout, dstate=dstate, B=B, C=C)
    for dtype in (F32, BF16, F16)
    for dim, seqlen, layout, dstate, B, C in (
        (40, 70, "channel_first", 16, "3d", "3d"),
        (40, 70, "channel_last", 16, "3d", 4),
        (37, 33, "mixed", 9, "3d", "constant"),
        (33, 65, "strided", 3, "constant", "3d"),
        (3, 40, "sliced", 17, "constant", "constant"),
    )
]


def test_infinite_decay_rates_forget_everything(cpu_level):
    """A_log above 88 makes A = -exp(A_log) = -inf in fp32: the state is the last input alone."""
    u, delta, B = torch.randn(1, 20, 7), torch.rand(1, 20, 7) + 0.1, torch.randn(1, 3, 7)
    A = torch.full((20, 3), -float("inf"))
    out, last = selective_scan(u, delta, A, B, torch.ones(1, 3, 7), return_last_state=True, backend="cpu")
    expected = delta * u * B.sum(1, keepdim=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, (delta * u)[..., -1:] * B[..., -1][:, None])


@pytest.mark.parametrize("case", LEVEL_CASES, ids=lambda c: c.id)
def test_every_level(cpu_level, case):
    check_values(case, "cpu")


@pytest.mark.parametrize("steps", ["realistic", "tiny"])
def test_rows_lose_no_more_than_fp32_must(cpu_level, steps):
    """Per (batch, channel) row: at most 1e-6, or twice the error of a plain fp32 loop on that row."""
    case = Case(dim=40, seqlen=400, steps=steps, z=False)
    tensors, (want, _) = cached(case)
    got, plain = (run(case, tensors, backend)[0].double() for backend in ("cpu", "reference"))
    norm = want.norm(dim=-1)
    error, fair = ((x - want).norm(dim=-1) / norm for x in (got, plain))
    excess = error / (2 * fair).clamp_min(1e-6)
    assert excess.max() <= 1, f"row error {error.flatten()[excess.argmax()]:.2e}, plain fp32 {fair.flatten()[excess.argmax()]:.2e}"


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_low_precision_error_is_that_of_one_rounding(dtype):
    case = Case(dim=64, seqlen=129, dtype=dtype)
    tensors, (want, _) = cached(case)
    rounding = relative_error(want.to(dtype), want)
    assert relative_error(run(case, tensors, "cpu")[0], want) <= 1.01 * rounding


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
class TestClosedForms:
    """Inputs for which the answer is known without a scan."""

    u = torch.randn(2, 20, 90, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2, 1, 90)

    def test_no_decay_is_a_running_sum(self, backend):
        out = selective_scan(self.u, torch.ones_like(self.u), torch.zeros(20, 1), self.ones, self.ones, backend=backend)
        assert_close(out, self.u.double().cumsum(-1), 1e-6)

    def test_constant_decay_is_a_geometric_sum(self, backend):
        A = torch.full((20, 1), float(np.log(0.5)))
        out = selective_scan(torch.ones_like(self.u), torch.ones_like(self.u), A, self.ones, self.ones, backend=backend)
        assert_close(out, (2 * (1 - 0.5 ** torch.arange(1, 91, dtype=F64))).expand(2, 20, 90), 1e-6)

    def test_huge_steps_forget(self, backend):
        B, C = torch.randn(2, 5, 90), torch.randn(2, 5, 90)
        h0 = torch.full((2, 20, 5), 1e30)
        out = selective_scan(self.u, torch.full_like(self.u, 1e4), -torch.rand(20, 5) - 0.5, B, C, initial_state=h0, backend=backend)
        assert_close(out, 1e4 * self.u.double() * (B.double() * C.double()).sum(1)[:, None], 1e-6)

    def test_steps_that_underflow_keep_the_state(self, backend):
        h0, C, D = torch.randn(2, 20, 5), torch.randn(2, 5, 90), torch.randn(20)
        delta = torch.full_like(self.u, -200.0)
        out, last = selective_scan(
            self.u, delta, -torch.rand(20, 5), torch.randn(2, 5, 90), C, D, None, None, True, True, initial_state=h0, backend=backend
        )
        assert torch.equal(last, h0)
        assert_close(out, torch.einsum("bdn,bnl->bdl", h0.double(), C.double()) + D.double()[:, None] * self.u.double(), 1e-6)

    def test_softplus_rule(self, backend):
        """With A = 0, B = C = u = 1 and one step the output is dt itself."""
        delta = torch.tensor([-300.0, -100.0, -20.0, -1.0, 0.0, 1.0, 19.9, 20.0, 20.1, 30.0, 100.0, 300.0]).view(-1, 1, 1)
        one = torch.ones_like(delta)
        dt = selective_scan(one, delta, torch.zeros(1, 1), one, one, None, None, None, True, backend=backend)
        assert torch.equal(dt[delta > 20], delta[delta > 20])
        assert ((dt.double() / torch.nn.functional.softplus(delta.double())) - 1)[2:].abs().max() < 2e-7
        assert dt[0] == 0 and 0 <= dt[1] < 1e-38

    def test_growing_states_reach_infinity_not_nan(self, backend):
        one = torch.ones(1, 1, 8)
        out = selective_scan(one, 100 * one, torch.ones(1, 1), one, one, initial_state=torch.ones(1, 1, 1), backend=backend)
        assert (out == float("inf")).all()


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
def test_packed_equals_separate_bit_for_bit(backend, layout):
    case = Case(batch=1, dim=40, seqlen=100, layout=layout, B=2, cu_seqlens=(0, 1, 1, 33, 65, 97))
    t = make_inputs(case)
    out, last = run(case, t, backend)
    for i, (begin, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        part = {k: v[..., begin:end] if k in ("u", "delta", "z", "B", "C") else v for k, v in t.items()}
        part["initial_state"] = t["initial_state"][i : i + 1]
        alone, state = run(case._replace(cu_seqlens=None), part, backend)
        assert torch.equal(alone, out[..., begin:end]) and torch.equal(state[0], last[i])


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_every_split_of_a_prefill_is_exact(backend):
    case = Case(dim=20, seqlen=35)
    t = make_inputs(case)
    out, last = run(case, t, backend)
    for split in range(36) if backend == "cpu" else (1, 17):
        halves = []
        state = t["initial_state"]
        for span in (slice(0, split), slice(split, 35)):
            part = {k: v[..., span] if k in ("u", "delta", "z", "B", "C") else v for k, v in t.items()}
            piece, state = run(case, {**part, "initial_state": state}, backend)
            halves.append(piece)
        assert torch.equal(torch.cat(halves, -1), out) and torch.equal(state, last)


@pytest.mark.parametrize("backend", kernel_backends())
def test_rows_channels_and_time_are_independent_bit_for_bit(backend):
    case = Case(batch=3, dim=300, seqlen=50)
    t = make_inputs(case)
    out, last = run(case, t, backend)
    assert all(torch.equal(a, b) for a, b in zip(run(case, t, backend), (out, last)))

    def rows(index):
        return {k: v[index] if k in ("u", "delta", "z", "B", "C", "initial_state") else v for k, v in t.items()}

    one = run(case, rows(slice(1, 2)), backend)
    assert torch.equal(one[0], out[1:2]) and torch.equal(one[1], last[1:2])

    order = torch.randperm(300)
    permuted = {k: v[:, order] if k in ("u", "delta", "z", "initial_state") else v[order] if k in ("A", "D", "delta_bias") else v for k, v in t.items()}
    assert torch.equal(run(case, permuted, backend)[0], out[:, order])

    late = {k: v.clone() for k, v in t.items()}
    for name in ("u", "delta", "z", "B", "C"):
        late[name][..., 41:] = 7.0
    assert torch.equal(run(case, late, backend)[0][..., :41], out[..., :41])

    keep = torch.ones(3, 300, dtype=torch.bool)
    keep[1, 7] = False
    for name in ("u", "delta", "z"):
        sick = {**t, name: t[name].clone()}
        sick[name][1, 7, 20] = float("nan")
        poisoned, state = run(case, sick, backend)
        assert torch.equal(poisoned[keep], out[keep]) and torch.equal(poisoned[1, 7, :20], out[1, 7, :20]) and poisoned[1, 7, 20].isnan()
        assert torch.equal(state[keep], last[keep])
        assert name == "z" or (poisoned[1, 7, 20:].isnan().all() and state[1, 7].isnan().all())
    sick = {**t, "A": t["A"].clone()}
    sick["A"][7, 3] = float("nan")
    assert run(case, sick, backend)[0][:, 7].isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_agree_bit_for_bit(cpu_level, dtype):
    case = Case(dim=290, seqlen=67, dtype=dtype, dstate=5)
    t = make_inputs(case)
    out, last = run(case, t, "cpu")
    for layout in ("channel_last", "strided", "sliced"):
        moved = {k: laid_out(v, layout) if v.dim() > 2 else v for k, v in t.items()}
        again = run(case, moved, "cpu")
        assert torch.equal(again[0], out) and torch.equal(again[1], last)


@pytest.mark.threads
@pytest.mark.parametrize("case", [Case(dim=600, seqlen=300), Case(dim=20, batch=7, seqlen=900), Case(batch=1, dim=700, seqlen=200, cu_seqlens=(0, 3, 150))], ids=lambda c: c.id)
def test_threads_change_no_bit(threads, case):
    t = make_inputs(case)
    one, two = threads(lambda: run(case, t, "cpu"), 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_inputs_are_not_written_and_outputs_are_new(backend):
    for case in (Case(), Case(seqlen=0)):
        t = make_inputs(case)
        before = {k: v.clone() for k, v in t.items()}
        outputs = run(case, t, backend)
        assert all(torch.equal(t[k], v) for k, v in before.items())
        assert {o.data_ptr() for o in outputs if o.numel()}.isdisjoint(v.data_ptr() for v in t.values())
    assert torch.equal(outputs[1], t["initial_state"])


def test_stride_beyond_32_bits(tmp_path):
    """Two channels 2^31 + 7 elements apart, on a sparse file: an int offset would read elsewhere."""
    stride, seqlen = 2**31 + 7, 40
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + seqlen, dtype=BF16)
    u = storage.as_strided((1, 2, seqlen), (0, stride, 1))
    u.copy_(torch.randn(1, 2, seqlen))
    t = make_inputs(Case(batch=1, dim=2, seqlen=seqlen))
    del t["u"]
    far, near = (selective_scan(x, **t, delta_softplus=True, backend="cpu") for x in (u, u.clone()))
    assert torch.equal(far, near)


# --- gradients -------------------------------------------------------------------------------------------------------

# Autograd of the fp64 reference is the judge and takes a second per hundred steps of a wide case: long and wide ones once each.
GRADIENT_CASES = [c for c in CASES if c.seqlen <= 129 and c.dim * c.dstate <= 2400 and c.steps != "tiny"]
GRADIENT_CASES += [
    Case(dim=600, seqlen=9, dstate=3),
    Case(dim=300, seqlen=66, dstate=2, layout="channel_last", D=False),
    Case(batch=1, dim=5, seqlen=257, dstate=3),
    Case(batch=19, dim=9, seqlen=3),  # more rows than the sums over rows have parts
    Case(batch=1, dim=17, seqlen=200, cu_seqlens=(0, 64, 64, 129, 194), layout="channel_last"),
]


def gradients(case: Case, tensors: dict, backend: str | None, douts=None, wanted=TENSORS):
    """(outputs, {name: gradient}) of what is present; `douts` are of (out, last_state), random by default, either may be None."""
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if t is not None and k in wanted}
    outputs = run(case, {**tensors, **leaves}, backend)
    if douts is None:
        g, state_dtype = torch.Generator().manual_seed(1), F64 if case.dtype == F64 else F32
        douts = [torch.randn(o.shape, generator=g, dtype=F64).to(dtype) for o, dtype in zip(outputs, (case.dtype, state_dtype))]
    used = [(o, d) for o, d in zip(outputs, douts) if d is not None and o.requires_grad]
    found = torch.autograd.grad([o for o, _ in used], list(leaves.values()), [d.to(o.dtype) for o, d in used], allow_unused=True)
    return outputs, {k: torch.zeros_like(leaf) if g is None else g for (k, leaf), g in zip(leaves.items(), found)}


def check_gradients(case: Case, tensors: dict, backend: str | None, douts=None):
    _, got = gradients(case, tensors, backend, douts)
    _, want = gradients(case, in_fp64(tensors), "reference", douts)
    for name, t in got.items():
        assert t.dtype == tensors[name].dtype and t.shape == tensors[name].shape
        assert_close(t, want[name], GRADIENT[t.dtype], f"d{name}[{backend}]")


@pytest.mark.parametrize("case", [c for c in GRADIENT_CASES if c.dtype != F64], ids=lambda c: c.id)
@pytest.mark.parametrize("backend", kernel_backends())
def test_gradients(case, backend):
    check_gradients(case, make_inputs(case), backend)


@pytest.mark.parametrize("case", [c._replace(batch=1) for c in LEVEL_CASES], ids=lambda c: c.id)
def test_gradients_at_every_level(cpu_level, case):
    check_gradients(case, make_inputs(case), "cpu")


INCOMING = {
    "expanded": lambda t: torch.ones((), dtype=t.dtype).expand(t.shape),
    "transposed": lambda t: torch.randn(t.shape[0], t.shape[2], t.shape[1], dtype=t.dtype).transpose(1, 2),
    "rows repeated": lambda t: torch.randn(t.shape[1:], dtype=t.dtype).expand(t.shape),
    "every second": lambda t: torch.randn(*t.shape[:2], 2 * t.shape[2], dtype=t.dtype)[..., ::2],
}


@pytest.mark.parametrize("through", ["out", "last_state", "both"])
@pytest.mark.parametrize("incoming", INCOMING)
def test_incoming_gradients_of_any_strides(through, incoming):
    case = Case(dim=21, seqlen=67, dstate=5)
    tensors = make_inputs(case)
    like = (torch.empty(2, 21, 67), torch.empty(2, 21, 5))
    douts = [INCOMING[incoming](t) if through in (name, "both") else None for name, t in zip(("out", "last_state"), like)]
    check_gradients(case, tensors, None, douts)


def gradcheck_cases() -> list[Case]:
    """Every combination of the optional arguments four times, each time with other sizes, forms of B and C, and packing."""
    rng, cases = random.Random(0), []
    for flags in itertools.product((True, False), repeat=5):
        for kind in ("short", "short", "chunks", "packed"):  # a chunk of the backward is 64 steps
            batch, seqlen, cu_seqlens = rng.randint(1, 2), rng.randint(1, 7), None
            if kind == "chunks":
                batch, seqlen = 1, rng.randint(64, 66)
            elif kind == "packed":
                batch, seqlen = 1, rng.randint(4, 7)
                cu_seqlens = (0, *sorted(rng.randint(0, seqlen) for _ in range(rng.randint(1, 3))))
            B, C = (rng.choice(("3d", 1, "dim", "constant")) for _ in range(2))
            dim, dstate = rng.randint(2, 3), rng.randint(1, 3)
            options = dict(zip(("D", "z", "bias", "softplus", "initial"), flags))
            case = Case(batch, dim, seqlen, dstate, F64, B=dim if B == "dim" else B, C=dim if C == "dim" else C, cu_seqlens=cu_seqlens, **options)
            cases.append(case._replace(steps="realistic" if case.softplus else "raw"))
    return cases


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
@pytest.mark.parametrize("part", range(8))
def test_gradcheck_in_fp64(part):
    """The kernel's backward is the derivative of its own forward, by differences: 128 configurations, long ones along random directions."""
    for case in gradcheck_cases()[part::8]:
        tensors = make_inputs(case, seed=part)
        present = [k for k, v in tensors.items() if v is not None]

        def function(*leaves, case=case, tensors=tensors, present=present):
            return run(case, {**tensors, **dict(zip(present, leaves))}, "cpu")

        assert torch.autograd.gradcheck(function, [tensors[k].requires_grad_() for k in present], fast_mode=case.seqlen > 7), case.id


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("case", [Case(dim=3, seqlen=5, dstate=2), Case(dim=3, seqlen=5, dstate=2, D=False, z=False, bias=False, initial=False)], ids=lambda c: c.id)
def test_gradient_of_each_input_alone(case, backend):
    """Asking for one gradient gives what asking for all gives."""
    tensors = make_inputs(case)
    _, together = gradients(case, tensors, backend)
    for name, expected in together.items():
        assert torch.equal(gradients(case, tensors, backend, wanted=(name,))[1][name], expected)


def test_softplus_threshold_has_the_exact_gradient_in_fp64():
    delta = torch.tensor([19.9, 20.0, 20.1, 100.0, -100.0], dtype=F64).view(-1, 1, 1).requires_grad_()
    one = torch.ones(5, 1, 1, dtype=F64)
    expected = torch.where(delta > 20, 1.0, torch.sigmoid(delta)).flatten()
    for backend in (None, "reference"):
        dt = selective_scan(one, delta, torch.zeros(1, 1, dtype=F64), one, one, None, None, None, True, backend=backend)
        (gradient,) = torch.autograd.grad(dt.sum(), delta)
        assert torch.allclose(gradient.flatten(), expected, rtol=1e-14, atol=0)
        assert (gradient[2:4] == 1).all() and 0 < gradient[4] < 1e-43


def test_states_that_forget_and_huge_steps_have_finite_gradients(cpu_level):
    """A = -inf (exp(A_log) overflowed) and dt = 1e4: the reference's gradients where it has any, and no NaN of our own."""
    case = Case(dim=20, seqlen=70, dstate=3)
    tensors = make_inputs(case)
    tensors["A"][::3, 1] = -float("inf")
    tensors["delta"][:, 5, 9:40] = 1e4
    _, got = gradients(case, tensors, "cpu")
    _, want = gradients(case, in_fp64(tensors), "reference")
    assert want["delta"].isnan().any()  # 0 * inf, which the kernel takes as 0
    for name, t in got.items():
        assert t.isfinite().all(), name
        known = want[name].isfinite()
        assert_close(t[known], want[name][known], GRADIENT[F32], f"d{name}")


# --- promises of the backward ----------------------------------------------------------------------------------------


def equal(got: dict, want: dict, names=TENSORS) -> bool:
    return all(torch.equal(got[k], want[k]) for k in names if k in want)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("layout", ["channel_first", "channel_last"])
def test_gradients_of_packed_equal_separate_bit_for_bit(backend, layout):
    case = Case(batch=1, dim=40, seqlen=200, layout=layout, B=2, cu_seqlens=(0, 1, 1, 66, 130, 197))
    t = make_inputs(case)
    douts = [torch.randn(1, 40, 200), torch.randn(5, 40, 16)]
    _, packed_grads = gradients(case, t, backend, douts)
    for name in ("u", "delta", "z", "B", "C"):
        assert (packed_grads[name][..., 197:] == 0).all(), f"d{name} in the padding"
    for i, (begin, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        part = {k: v[..., begin:end] if k in ("u", "delta", "z", "B", "C") else v for k, v in t.items()}
        part["initial_state"] = t["initial_state"][i : i + 1]
        _, alone = gradients(case._replace(cu_seqlens=None), part, backend, [douts[0][..., begin:end], douts[1][i : i + 1]])
        for name in ("u", "delta", "z", "B", "C"):
            assert torch.equal(alone[name], packed_grads[name][..., begin:end]), f"d{name} of sequence {i}"
        assert torch.equal(alone["initial_state"][0], packed_grads["initial_state"][i])


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("B, C", [("3d", "3d"), (4, 2), ("constant", "3d")])
def test_gradients_have_the_same_bits_every_run_and_whatever_the_other_rows(backend, B, C):
    case = Case(batch=3, dim=300, seqlen=70, dstate=4, B=B, C=C)
    t = make_inputs(case)
    _, first = gradients(case, t, backend)
    assert equal(gradients(case, t, backend)[1], first)
    per_row = ("u", "delta", "z", "initial_state", *(name for name in "BC" if t[name].dim() > 2))
    other = {k: v.clone() for k, v in t.items()}
    for name in per_row:
        other[name][::2] = float("nan")
    _, poisoned = gradients(case, other, backend)
    assert all(torch.equal(poisoned[name][1], first[name][1]) for name in per_row)
    douts = [torch.randn(3, 300, 70), torch.randn(3, 300, 4)]
    _, three = gradients(case, t, backend, douts)
    _, one = gradients(case._replace(batch=1), {k: v[1:2] if k in per_row else v for k, v in t.items()}, backend, [d[1:2] for d in douts])
    assert all(torch.equal(one[name][0], three[name][1]) for name in per_row)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_of_all_layouts_agree_bit_for_bit(cpu_level, dtype):
    case = Case(batch=2, dim=150, seqlen=67, dtype=dtype, dstate=5)
    t = make_inputs(case)
    _, first = gradients(case, t, "cpu")
    for layout in ("channel_last", "strided", "sliced"):
        assert equal(gradients(case, {k: laid_out(v, layout) if v.dim() > 2 else v for k, v in t.items()}, "cpu")[1], first), layout


@pytest.mark.threads
@pytest.mark.parametrize(
    "case",
    [Case(dim=600, seqlen=130), Case(dim=20, batch=7, seqlen=300, B="constant"), Case(batch=1, dim=700, seqlen=200, B=4, cu_seqlens=(0, 3, 150))],
    ids=lambda c: c.id,
)
def test_threads_change_no_bit_of_a_gradient(threads, case):
    t = make_inputs(case)
    one, two = threads(lambda: gradients(case, t, "cpu")[1], 1, 2)
    assert equal(two, one)


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
def test_memory_for_the_backward():
    """Saved: the inputs and 4 dstate / 64 bytes per channel and token. At its peak the backward adds the gradients and a workspace
    of 8 dstate bytes per token and 128 channels, and dA's parts: never (batch, dim, seqlen, dstate)."""
    batch, dim, seqlen, dstate = 2, 1024, 512, 16
    tensors = make_inputs(Case(batch, dim, seqlen, dstate, layout="channel_last"))
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, last = run(Case(), leaves)
    inputs = sum(t.untyped_storage().nbytes() for t in leaves.values())
    tokens, states = batch * seqlen, batch * dim * seqlen * dstate * 4 // 64
    assert sum(saved.values()) == inputs + states
    gradients_of_outputs = [torch.ones_like(out), torch.ones_like(last)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = torch.autograd.grad((out, last), list(leaves.values()), gradients_of_outputs)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    workspace = tokens * dstate * 8 * dim // 128 + batch * dim * (dstate + 2) * 4
    assert peak >= sum(g.untyped_storage().nbytes() for g in found)
    assert peak - sum(g.untyped_storage().nbytes() for g in found) <= 1.01 * workspace


def test_softplus_threshold_has_the_exact_gradient():
    delta = torch.tensor([19.9, 20.0, 20.1, 100.0, -100.0]).view(-1, 1, 1).requires_grad_()
    one = torch.ones(5, 1, 1)
    for backend in (None, "reference"):
        dt = selective_scan(one, delta, torch.zeros(1, 1), one, one, None, None, None, True, backend=backend)
        (gradient,) = torch.autograd.grad(dt.sum(), delta)
        assert_close(gradient.flatten(), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), 1e-6)


def test_double_backward_raises_by_name():
    t = make_inputs(Case(dim=3, seqlen=4))
    u = t["u"].requires_grad_()
    (du,) = torch.autograd.grad(run(Case(), t)[0].sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_bwd: double backward"):
        du.sum().backward()


# --- errors ----------------------------------------------------------------------------------------------------------

GOOD = {k: v.detach() for k, v in make_inputs(Case(batch=2, dim=6, seqlen=5, dstate=3)).items()}


def bad(**changes):
    return lambda: selective_scan(**{**GOOD, **changes})


def packed(*bounds, **changes):
    one = {k: v[:1] if k in ("u", "delta", "z", "B", "C") else v for k, v in GOOD.items()}
    boundaries = torch.tensor(bounds, dtype=changes.pop("dtype", torch.int64))
    return lambda: selective_scan(**{**one, "initial_state": None, "cu_seqlens": boundaries, **changes})


@pytest.mark.parametrize(
    "call, error, words",
    [
        (bad(u=GOOD["u"][0]), ShapeError, ["selective_scan: u", "(6, 5)", "(batch, dim, seqlen)"]),
        (bad(delta=GOOD["delta"][..., :4]), ShapeError, ["delta", "(2, 6, 4)", "seqlen=5", "shape of u"]),
        (bad(z=GOOD["z"][:1]), ShapeError, ["z", "(1, 6, 5)", "batch=2"]),
        (bad(A=GOOD["A"][:5]), ShapeError, ["A", "(5, 3)", "dim=6", "comes from u"]),
        (bad(A=GOOD["A"][:, :0]), ShapeError, ["A", "(6, 0)", "dstate >= 1"]),
        (bad(B=GOOD["B"][:, :2]), ShapeError, ["B", "(2, 2, 5)", "batch=2, dstate=3, seqlen=5", "dstate from A"]),
        (bad(C=GOOD["C"][..., :4]), ShapeError, ["C", "(2, 3, 4)", "seqlen=5"]),
        (bad(B=GOOD["A"][:, :2]), ShapeError, ["B", "(6, 2)", "dim=6, dstate=3", "constant"]),
        (bad(C=torch.zeros(2, 4, 3, 5)), ShapeError, ["C", "4 groups", "divisor of dim=6"]),
        (bad(B=torch.zeros(2, 2, 3, 4)), ShapeError, ["B", "(2, 2, 3, 4)", "groups", "seqlen=5"]),
        (bad(D=GOOD["D"][:5]), ShapeError, ["D", "(5,)", "dim=6"]),
        (bad(delta_bias=GOOD["D"][None]), ShapeError, ["delta_bias", "(1, 6)", "dim=6"]),
        (bad(initial_state=GOOD["initial_state"][:1]), ShapeError, ["initial_state", "(1, 6, 3)", "batch=2", "dstate from A"]),
        (bad(u=GOOD["u"].int()), DtypeError, ["u", "int32", "float32"]),
        (bad(delta=GOOD["delta"].double()), DtypeError, ["delta", "float64", "does not mix"]),
        (bad(B=None), DtypeError, ["B", "None"]),
        (bad(A=GOOD["A"].to(C64)), DtypeError, ["initial_state", "float32", "complex64"]),
        (bad(z=GOOD["z"].to("meta")), DtypeError, ["z", "meta", "cpu"]),
        (bad(cu_seqlens=torch.tensor([0, 5])), ShapeError, ["batch=2", "expected 1", "cu_seqlens"]),
        (packed(0, 5, dtype=torch.float32), DtypeError, ["cu_seqlens", "float32", "int32 or int64"]),
        (packed(1, 5), ArgumentError, ["cu_seqlens[0] is 1", "expected 0"]),
        (packed(0, 4, 3), ArgumentError, ["cu_seqlens[2] is 3", "cu_seqlens[1]=4"]),
        (packed(0, 6), ArgumentError, ["cu_seqlens[-1] is 6", "seqlen=5"]),
        (packed(), ShapeError, ["cu_seqlens", "(0,)", "num_seqs + 1"]),
        (packed(0, 2, 5, initial_state=GOOD["initial_state"][:1]), ShapeError, ["initial_state", "num_seqs=2", "cu_seqlens"]),
        (bad(backend="fast"), ArgumentError, ["backend", "'fast'", "reference, cpu, triton, cuda"]),
        (bad(backend="triton"), BackendUnavailable, ["'triton'", "cannot serve"]),
    ],
)
def test_errors_name_argument_got_and_expected(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
def test_torch_op_called_directly_stays_inside_its_tensors():
    op = torch.ops.cobra_kernels.selective_scan_fwd
    u, delta, A, B, C = (GOOD[k] for k in ("u", "delta", "A", "B", "C"))
    with pytest.raises(RuntimeError, match="delta has size 4"):
        op(u, delta[..., :4], A, B, C, None, None, None, True, None, None)
    with pytest.raises(RuntimeError, match="groups of B"):
        op(u, delta, A, torch.zeros(2, 4, 3, 5), C, None, None, None, True, None, None)
    with pytest.raises(RuntimeError, match=r"cu_seqlens\[2\] is 3"):
        op(u[:1], delta[:1], A, B[:1], C[:1], None, None, None, True, None, torch.tensor([0, 4, 3]))
    with pytest.raises(RuntimeError, match="ends at 6"):
        op(u[:1], delta[:1], A, B[:1], C[:1], None, None, None, True, None, torch.tensor([0, 6]))


def test_supports_says_what_the_op_does():
    ok, reason = cobra_kernels.supports("selective_scan", **GOOD)
    assert ok and "gradients" in reason
    ok, reason = cobra_kernels.supports("selective_scan", **GOOD, backend="cuda")
    assert not ok and "CUDA tensors" in reason
    ok, reason = cobra_kernels.supports("selective_scan", **{**GOOD, "D": GOOD["D"][:2]})
    assert not ok and "D has shape (2,)" in reason


# --- torch -----------------------------------------------------------------------------------------------------------

OPCHECK_CASES = [
    Case(dim=5, seqlen=3, dstate=2),
    Case(dim=6, seqlen=3, dstate=2, B=2, C="constant", dtype=BF16, layout="channel_last"),
    Case(dim=3, seqlen=2, dstate=1, D=False, z=False, bias=False, initial=False),
    Case(dim=3, seqlen=4, dstate=2, batch=1, cu_seqlens=(0, 1, 3)),
    Case(dim=3, seqlen=0, dstate=2),
    Case(dim=4, seqlen=3, dstate=2, B="constant", C=4, D=False, dtype=F64),
    Case(dim=4, seqlen=66, dstate=2, z=False, layout="channel_last"),
    Case(batch=0, dim=3, seqlen=3, dstate=2, softplus=False, bias=False),
]


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda c: c.id)
def test_opcheck(case):
    t = make_inputs(case)
    cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)

    def arguments(grad):
        ts = {k: v if v is None else v.detach().requires_grad_(grad) for k, v in t.items()}
        return [*(ts[k] for k in TENSORS[:8]), case.softplus, ts["initial_state"], cu_seqlens]

    torch.library.opcheck(torch.ops.cobra_kernels.selective_scan.default, (*arguments(True), "cpu"))
    torch.library.opcheck(torch.ops.cobra_kernels.selective_scan_fwd.default, tuple(arguments(False)))
    *outputs, states = torch.ops.cobra_kernels.selective_scan_fwd_states.default(*arguments(False))
    dout, dlast = (torch.randn_like(o) for o in outputs)
    torch.library.opcheck(torch.ops.cobra_kernels.selective_scan_fwd_states.default, tuple(arguments(False)))
    torch.library.opcheck(torch.ops.cobra_kernels.selective_scan_bwd.default, (dout, dlast, *arguments(False), states))


def test_compile_fullgraph():
    case = Case(batch=1, dim=8, seqlen=40, cu_seqlens=(0, 3, 33))
    t = make_inputs(case)
    leaves = [t[k].requires_grad_() for k in TENSORS]
    cu_seqlens = torch.tensor(case.cu_seqlens)

    def f(*ts):
        out, last = selective_scan(**dict(zip(TENSORS, ts)), delta_softplus=True, return_last_state=True, cu_seqlens=cu_seqlens)
        return out.sin().sum() + last.square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    cobra_kernels.reset_call_counts()
    got, want = compiled(*leaves), f(*leaves)
    assert_close(got, want, 1e-6)
    if kernel_backends():
        assert cobra_kernels.call_counts()["selective_scan", "cpu"] >= 2  # the compiled graph calls the kernel
    for mine, theirs in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
        assert_close(mine, theirs, 1e-6)


def test_autocast_accepts_the_mix():
    t = make_inputs(Case())
    with torch.autocast("cpu", dtype=BF16):
        out = run(Case(), {**t, "u": t["u"].bfloat16(), "B": t["B"].bfloat16()})[0]
    assert out.dtype == BF16
