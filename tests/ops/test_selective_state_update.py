"""selective_state_update: an independent loop, every backend against the fp64 reference, indices, properties, edges, errors."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

import cobra_kernels
from cobra_kernels import selective_scan, selective_state_update
from cobra_kernels.errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError
from tests.conftest import kernel_backends
from tests.tolerances import OUTPUT, assert_close, relative_error

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BACKENDS = ["reference", *kernel_backends()]


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 3
    heads: int | None = None  # None: Mamba-1 form
    dim: int = 65
    dstate: int = 16
    groups: int | None = None  # None: B, C (batch, dstate)
    dtype: torch.dtype = F32
    state_dtype: torch.dtype | None = None  # None: as x
    weight_dtype: torch.dtype | None = None  # of A, D, dt_bias; None: fp32, or fp64 with fp64
    D: bool = True
    z: bool = True
    dt_bias: bool = True
    dt_softplus: bool = True
    indices: torch.dtype | None = None
    layout: str = "contiguous"  # contiguous | transposed | sliced | unaligned
    tie: bool = False  # one A, dt, dt_bias per head (per tensor in Mamba-1 form), expanded

    @property
    def id(self) -> str:
        base = Case()
        changed = [f"{k}={v}".replace("torch.", "") for k, v in self._asdict().items() if v != getattr(base, k)]
        return "-".join(changed) or "base"


DIMS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 100, 128, 129, 192)
DSTATES = (1, 2, 3, 7, 8, 15, 17, 32, 64, 128, 255, 256, 257)
CASES = [
    Case(),
    *(Case(dim=dim) for dim in DIMS),
    *(Case(dstate=dstate) for dstate in DSTATES),
    *(Case(batch=batch) for batch in (0, 1, 2, 5)),
    *(Case(dtype=d) for d in (BF16, F16, F64)),
    *(Case(dtype=BF16, state_dtype=s) for s in (F32, F16)),
    *(Case(state_dtype=s) for s in (BF16, F16)),
    Case(dtype=BF16, weight_dtype=F16),
    *(Case(**{name: False}) for name in ("D", "z", "dt_bias", "dt_softplus")),
    Case(D=False, z=False, dt_bias=False, dt_softplus=False),
    *(Case(groups=g) for g in (1, 5, 65)),
    *(Case(heads=4, dim=20, groups=g) for g in (1, 2, 4)),
    *(Case(heads=4, dim=64, groups=2, dstate=n, tie=True) for n in (1, 16, 100, 128)),
    Case(heads=3, dim=1, groups=3),
    Case(tie=True),
    *(Case(indices=i) for i in (torch.int32, torch.int64)),
    Case(heads=2, dim=9, groups=1, indices=torch.int32, state_dtype=BF16),
    *(Case(layout=x) for x in ("transposed", "sliced", "unaligned")),
    *(Case(heads=2, dim=33, groups=2, layout=x, dtype=BF16) for x in ("transposed", "sliced", "unaligned")),
]


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # inner view of a larger NaN-filled buffer
        outer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
        return outer[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)
    if layout == "unaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t


def make_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Arguments by name; dt is log-uniform over 1e-4 .. 16 after the softplus."""
    g = torch.Generator().manual_seed(seed)
    channels = (case.dim,) if case.heads is None else (case.heads, case.dim)
    rows, weight_dtype = (case.batch, *channels), case.weight_dtype or (F64 if case.dtype == F64 else F32)

    def randn(shape, dtype=case.dtype):
        return laid_out(torch.randn(shape, generator=g, dtype=F64).to(dtype), case.layout)

    def per_channel(t):  # with tie: one value per head, expanded over its channels
        return t[..., :1].expand(t.shape) if case.tie else t

    dt = torch.exp(torch.rand(rows, generator=g, dtype=F64) * math.log(16 / 1e-4) + math.log(1e-4))
    bias = torch.rand(channels, generator=g, dtype=F64) * (-2)
    dt = torch.where(dt > 20, dt, torch.log(torch.expm1(dt))) if case.dt_softplus else dt
    dt = dt - bias if case.dt_bias else dt
    A = -torch.rand((*channels, case.dstate), generator=g, dtype=F64) - 0.1
    A = laid_out(A.to(weight_dtype), case.layout)
    projected = (case.batch, case.dstate) if case.groups is None else (case.batch, case.groups, case.dstate)
    pool = case.batch if case.indices is None else 2 * case.batch + 1
    indices = None
    if case.indices is not None:
        indices = torch.randperm(pool, generator=g)[: case.batch].to(case.indices)
        indices[-1:] = -7
    return {
        "state": randn((pool, *channels, case.dstate), case.state_dtype or case.dtype),
        "x": randn(rows),
        "dt": per_channel(laid_out(dt.to(case.dtype), case.layout)),
        "A": A[..., :1, :1].expand(A.shape) if case.tie and case.dim else A,
        "B": randn(projected),
        "C": randn(projected),
        "D": randn(channels, weight_dtype) if case.D else None,
        "z": randn(rows) if case.z else None,
        "dt_bias": per_channel(laid_out(bias.to(weight_dtype), case.layout)) if case.dt_bias else None,
        "dt_softplus": case.dt_softplus,
        "state_batch_indices": indices,
    }


def run(tensors: dict, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, state after), on a copy of the state that keeps its layout."""
    state = tensors["state"].clone() if tensors["state"].is_contiguous() else torch.empty_strided(
        tensors["state"].shape, tensors["state"].stride(), dtype=tensors["state"].dtype
    ).copy_(tensors["state"])  # fmt: skip
    out = selective_state_update(**{**tensors, "state": state}, backend=backend)
    return out, state


def in_fp64(tensors: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in tensors.items()}


def plain_loop(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices):
    """The definition, one number at a time, in fp64 numpy; heads and channels spelled out. Returns out and the new state."""
    arrays = [None if t is None else t.detach().double().numpy() for t in (state, x, dt, A, B, C, D, z, dt_bias)]
    state, x, dt, A, B, C, D, z, dt_bias = arrays
    state, out = state.copy(), np.zeros_like(x)
    rows = range(x.shape[0]) if state_batch_indices is None else state_batch_indices.tolist()
    for b, row in enumerate(rows):
        if row < 0:
            continue
        for channel in np.ndindex(*x.shape[1:]):
            step = dt[(b, *channel)] + (0.0 if dt_bias is None else dt_bias[channel])
            if dt_softplus and step <= 20:
                step = math.log1p(math.exp(step))
            y = 0.0
            for n in range(state.shape[-1]):
                group = () if B.ndim == 2 else (channel[0] // (x.shape[1] // B.shape[1]),)
                h = math.exp(step * A[(*channel, n)]) * state[(row, *channel, n)] + step * B[(b, *group, n)] * x[(b, *channel)]
                state[(row, *channel, n)] = h
                y += C[(b, *group, n)] * h
            y += 0.0 if D is None else D[channel] * x[(b, *channel)]
            gate = 1.0 if z is None else z[(b, *channel)] / (1 + math.exp(-z[(b, *channel)]))
            out[(b, *channel)] = y * gate
    return torch.from_numpy(out), torch.from_numpy(state)


def assert_rounded(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within the limit of its dtype, or as good as the exact value rounded: in a small tensor one element can carry the norm, and
    a single rounding of it may exceed the average that the limit stands for."""
    rounding = relative_error(expected.to(got.dtype), expected)
    assert_close(got, expected, max(OUTPUT[got.dtype], 1.05 * rounding), what)


# --- values ----------------------------------------------------------------------------------------------------------

LOOP_CASES = [Case(dim=6, dstate=3), Case(dim=6, dstate=3, groups=2), Case(dim=6, dstate=2, indices=torch.int64),
              Case(heads=4, dim=3, dstate=2, groups=2), Case(heads=2, dim=3, dstate=4, groups=1, tie=True, D=False, z=False),
              Case(dim=4, dstate=3, dt_bias=False, dt_softplus=False)]  # fmt: skip


@pytest.mark.parametrize("case", LOOP_CASES, ids=lambda c: c.id)
def test_reference_against_a_plain_loop(case):
    tensors = in_fp64(make_inputs(case))
    for got, want in zip(run(tensors, "reference"), plain_loop(**tensors)):
        assert_close(got, want, 1e-14)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(case, backend):
    tensors = make_inputs(case)
    out, state = run(tensors, backend)
    expected_out, expected_state = run(in_fp64(tensors), "reference")
    assert out.dtype == case.dtype and out.stride() == torch.empty_like(tensors["x"]).stride()
    assert_rounded(out, expected_out, f"out[{backend}]")
    assert_rounded(state, expected_state, f"state[{backend}]")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_every_level(cpu_level, dtype):
    for dim, dstate in ((1, 1), (5, 3), (64, 16), (100, 16), (70, 32), (33, 100), (17, 8)):
        for tie in (False, True):
            case = Case(dim=dim, dstate=dstate, dtype=dtype, tie=tie)
            tensors = make_inputs(case, seed=dim)
            for what, got, want in zip(("out", "state"), run(tensors, "cpu"), run(in_fp64(tensors), "reference")):
                assert_rounded(got, want, f"{what}, {case.id}")


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("seed", range(6))
def test_sampled(backend, seed):
    """60 boundary shapes per seed, every option drawn; replay one with make_inputs(case, seed * 1000 + i)."""
    rng = random.Random(seed)
    floats = (F32, BF16, F16)
    for i in range(60):
        heads = rng.choice((None, None, 1, 2, 6))
        dim = rng.choice((1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65, 100) if heads is None else (1, 3, 8, 17, 64))
        divisors = [g for g in (1, 2, 3, 5, 8) if (heads or dim) % g == 0]
        case = Case(
            batch=rng.choice((0, 1, 2, 3, 5)), heads=heads, dim=dim, dstate=rng.choice((1, 2, 3, 7, 8, 15, 16, 17, 32, 64, 128, 257)),
            groups=rng.choice(divisors if heads else [None, *divisors]), dtype=rng.choice(floats), state_dtype=rng.choice(floats),
            weight_dtype=rng.choice(floats), D=rng.random() < 0.5, z=rng.random() < 0.5, dt_bias=rng.random() < 0.5,
            dt_softplus=rng.random() < 0.8, indices=rng.choice((None, torch.int32, torch.int64)),
            layout=rng.choice(("contiguous", "transposed", "sliced", "unaligned")), tie=rng.random() < 0.3,
        )  # fmt: skip
        tensors = make_inputs(case, seed * 1000 + i)
        for what, got, want in zip(("out", "state"), run(tensors, backend), run(in_fp64(tensors), "reference")):
            assert_rounded(got, want, f"{what}, seed {seed * 1000 + i}, {case.id}")


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_softplus_around_its_threshold_and_extremes(backend):
    raw = torch.tensor([[-200.0, -100.0, -17.5, -1e-3, 0.0, 19.9, 20.0, 20.1, 100.0, 1e4]])
    dim = raw.shape[1]
    one = torch.ones(1, dim)
    # A = 0, B = 1, x = 1, h = 0: the state becomes the step itself.
    state = torch.zeros(1, dim, 1)
    selective_state_update(state, one, raw, torch.zeros(dim, 1), one[:, :1], one[:, :1], dt_softplus=True, backend=backend)
    wide = raw.double()
    expected = torch.where(wide > 20, wide, torch.log1p(torch.exp(wide)))
    assert torch.allclose(state[..., 0].double(), expected, rtol=3e-7, atol=1e-38)
    # A step that underflows to 0 keeps the state and gives C h + D x; a huge one forgets everything.
    state = torch.randn(1, dim, 16)
    before, C, D = state.clone(), torch.randn(1, 16), torch.randn(dim)
    out = selective_state_update(state, one, one * -200, -torch.rand(dim, 16), torch.randn(1, 16), C, D, dt_softplus=True, backend=backend)
    assert torch.equal(state, before)
    assert_close(out, (before.double() * C.double()).sum(-1) + D.double(), 1e-6)
    B = torch.randn(1, 16)
    out = selective_state_update(state, one, one * 1e4, -torch.ones(dim, 16), B, C, backend=backend)
    assert_close(out, 1e4 * (B.double() * C.double()).sum(-1, keepdim=True).expand(1, dim), 1e-6)


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_give_zeros_and_leave_the_pool_alone(backend):
    tensors = make_inputs(Case(batch=5, indices=torch.int32))
    tensors["state_batch_indices"] = torch.tensor([7, -1, 0, -100, 3], dtype=torch.int32)
    tensors["x"][1], tensors["dt"][3] = float("nan"), float("inf")  # padding may hold anything
    before = tensors["state"].clone()
    out, state = run(tensors, backend)
    assert (out[[1, 3]] == 0).all() and not out.isnan().any()
    untouched = [row for row in range(len(state)) if row not in (7, 0, 3)]
    assert torch.equal(state[untouched], before[untouched])
    rows = torch.tensor([0, 2, 4])
    alone = {k: t[rows] if k in ("x", "dt", "B", "C", "z") else t for k, t in tensors.items()}
    alone |= {"state": before[[7, 0, 3]], "state_batch_indices": None}
    one_by_one, states = run(alone, backend)
    assert torch.equal(out[rows], one_by_one) and torch.equal(state[[7, 0, 3]], states)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_padding_needs_no_pool(backend):
    tensors = make_inputs(Case(batch=2, indices=torch.int64))
    tensors |= {"state": tensors["state"][:0], "state_batch_indices": torch.tensor([-1, -1])}
    assert (run(tensors, backend)[0] == 0).all()


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_equal_the_scan(backend):
    """Six updates against one scan of the same backend, and both against a plain recurrence in fp64."""
    batch, dim, dstate, steps = 2, 40, 16, 6
    g = torch.Generator().manual_seed(3)
    u, delta = torch.randn(2, batch, dim, steps, generator=g)
    A, (B, C) = -torch.rand(dim, dstate, generator=g), torch.randn(2, batch, dstate, steps, generator=g)
    D, bias = torch.randn(2, dim, generator=g)
    z, h = torch.randn(batch, dim, steps, generator=g), torch.randn(batch, dim, dstate, generator=g)
    wide, state = h.double(), h.clone()
    scanned, last = selective_scan(u, delta, A, B, C, D, z, bias, True, True, initial_state=h, backend=backend)
    for t in range(steps):
        dt = torch.nn.functional.softplus(delta[..., t].double() + bias.double())
        wide = torch.exp(dt[..., None] * A.double()) * wide + (dt * u[..., t].double())[..., None] * B[:, None, :, t].double()
        y = (wide * C[:, None, :, t].double()).sum(-1) + D.double() * u[..., t].double()
        expected = y * torch.nn.functional.silu(z[..., t].double())
        out = selective_state_update(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True, backend=backend
        )  # fmt: skip
        assert_close(out, expected, 1e-6, f"out of step {t}")
        assert_close(out, scanned[..., t], 1e-6, f"step {t} and the scan")
    assert_close(state, wide, 1e-6, "state")
    assert_close(state, last, 1e-6, "state and the scan's")


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_A(backend):
    """Complex A is the reference's: 2 Re(sum C h), as the scan of a conjugate pair."""
    g = torch.Generator().manual_seed(0)
    state, A, B, C = (torch.randn(s, dtype=torch.complex128, generator=g) for s in ((2, 5, 3), (5, 3), (2, 3), (2, 3)))
    x, dt = torch.randn(2, 2, 5, dtype=F64, generator=g)
    before = state.clone()
    if backend != "reference":
        with pytest.raises(BackendUnavailable, match="complex A"):
            selective_state_update(state, x, dt, A, B, C, backend=backend)
        assert torch.equal(state, before)
        return
    out = selective_state_update(state, x, dt, A, B, C, backend=backend)
    h = torch.exp(dt[..., None] * A) * before + (dt * x)[..., None] * B[:, None]
    assert torch.allclose(state, h) and torch.allclose(out, 2 * (h * C[:, None]).sum(-1).real)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_are_independent_bit_for_bit(backend, dtype):
    tensors = make_inputs(Case(batch=5, dim=100, dtype=dtype))
    out, state = run(tensors, backend)
    again = run(tensors, backend)
    assert torch.equal(out, again[0]) and torch.equal(state, again[1])
    order = torch.randperm(5)
    rows = ("state", "x", "dt", "B", "C", "z")
    permuted = run({k: t[order] if k in rows else t for k, t in tensors.items()}, backend)
    assert torch.equal(permuted[0], out[order]) and torch.equal(permuted[1], state[order])
    tensors["x"][2, 41] = float("nan")
    poisoned, poisoned_state = run(tensors, backend)
    keep = torch.ones(5, 100, dtype=torch.bool)
    keep[2, 41] = False
    assert torch.equal(poisoned[keep], out[keep]) and torch.equal(poisoned_state[keep], state[keep])
    assert poisoned[2, 41].isnan() and poisoned_state[2, 41].isnan().all()


@pytest.mark.threads
@pytest.mark.parametrize(
    "case", [Case(batch=16, dim=513), Case(batch=5, heads=8, dim=70, dstate=128, groups=2, tie=True)], ids=lambda c: c.id
)
def test_threads_change_no_bit(threads, case):
    tensors = make_inputs(case)
    one, two = threads(lambda: run(tensors, "cpu"), 1, 2)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_state_is_written_and_nothing_requires_grad(backend):
    tensors = make_inputs(Case())
    before = {k: t.clone() for k, t in tensors.items() if isinstance(t, torch.Tensor)}
    for name in ("x", "A", "D"):
        tensors[name].requires_grad_()
    state = tensors["state"]
    out = selective_state_update(**tensors, backend=backend)
    assert not out.requires_grad and not state.requires_grad and not torch.equal(state, before["state"])
    assert all(torch.equal(tensors[k], v) for k, v in before.items() if k != "state")
    assert out.data_ptr() not in {t.data_ptr() for t in tensors.values() if isinstance(t, torch.Tensor)}


def test_stride_beyond_32_bits(tmp_path):
    """Two rows of the pool 2^31 + 7 elements apart, on a sparse file: an int offset would write elsewhere."""
    tensors = make_inputs(Case(batch=2, dim=20, state_dtype=BF16))
    stride = 2**31 + 7
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 20 * 16, dtype=BF16)
    far = storage.as_strided((2, 20, 16), (stride, 16, 1)).copy_(tensors["state"])
    out, state = run(tensors, "cpu")
    assert torch.equal(selective_state_update(**{**tensors, "state": far}, backend="cpu"), out)
    assert torch.equal(far, state)


# --- errors ----------------------------------------------------------------------------------------------------------


def call(backend=None, **changed):
    names = ("state", "x", "dt", "A", "B", "C")
    shapes = ((2, 6, 4), (2, 6), (2, 6), (6, 4), (2, 4), (2, 4))
    return selective_state_update(**{n: torch.zeros(s) for n, s in zip(names, shapes)} | changed, backend=backend)


def heads(**changed):
    names = ("state", "x", "dt", "A", "B", "C")
    shapes = ((2, 6, 3, 4), (2, 6, 3), (2, 6, 3), (6, 3, 4), (2, 2, 4), (2, 2, 4))
    return selective_state_update(**{n: torch.zeros(s) for n, s in zip(names, shapes)} | changed)


Z = torch.zeros


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: call(state=Z(2, 6)), ShapeError, ["selective_state_update: state", "(2, 6)", "(batch, dim, dstate)"]),
        (lambda: call(state=Z(3, 6, 4)), ShapeError, ["state", "(3, 6, 4)", "batch=2", "from x"]),
        (lambda: call(state=Z(2, 6, 0)), ShapeError, ["state", "dstate >= 1"]),
        (lambda: call(x=Z(2, 6, 1)), ShapeError, ["x", "(2, 6, 1)", "(batch, dim)", "3 dims"]),
        (lambda: call(dt=Z(2, 5)), ShapeError, ["dt", "(2, 5)", "batch=2", "dim=6"]),
        (lambda: call(z=Z(6)), ShapeError, ["z", "(6,)", "dim=6"]),
        (lambda: call(A=Z(6, 5)), ShapeError, ["A", "(6, 5)", "dstate=4", "from state"]),
        (lambda: call(B=Z(2, 5)), ShapeError, ["B", "(2, 5)", "dstate=4"]),
        (lambda: call(B=Z(3, 4)), ShapeError, ["B", "(3, 4)", "batch=2"]),
        (lambda: call(B=Z(2, 4, 4), C=Z(2, 4, 4)), ShapeError, ["4 groups", "dim=6"]),
        (lambda: call(C=Z(2, 1, 4)), ShapeError, ["C", "(2, 1, 4)", "the shape of B"]),
        (lambda: call(D=Z(5)), ShapeError, ["D", "(5,)", "dim=6"]),
        (lambda: call(dt_bias=Z(6, 1)), ShapeError, ["dt_bias", "(6, 1)", "dim=6"]),
        (lambda: heads(B=Z(2, 4)), ShapeError, ["B", "(2, 4)", "groups", "dstate=4"]),
        (lambda: heads(B=Z(2, 4, 4), C=Z(2, 4, 4)), ShapeError, ["4 groups", "heads=6"]),
        (lambda: heads(D=Z(6)), ShapeError, ["D", "(6,)", "heads=6", "dim=3"]),
        (lambda: call(state=Z(2, 1, 4).expand(2, 6, 4)), ArgumentError, ["state", "stride 0 at dim 1", "in place"]),
        (lambda: call(state_batch_indices=Z(3, dtype=torch.int32)), ShapeError, ["state_batch_indices", "(3,)", "batch=2"]),
        (lambda: call(state_batch_indices=Z(2)), DtypeError, ["state_batch_indices", "float32", "int32 or int64"]),
        (lambda: call(state_batch_indices=torch.tensor([0, 2])), ArgumentError, ["[1] is 2", "pool=2"]),
        (lambda: call(state_batch_indices=torch.tensor([1, 1])), ArgumentError, ["[1] is 1", "earlier"]),
        (lambda: call(state=Z(2, 6, 4, dtype=F64)), DtypeError, ["state", "float64", "does not mix"]),
        (lambda: call(x=Z(2, 6, dtype=torch.int64)), DtypeError, ["x", "int64"]),
        (lambda: call(A=[1.0]), DtypeError, ["A", "list"]),
        (lambda: call(A=Z(6, 4, dtype=torch.complex64)), DtypeError, ["state", "float32", "complex64"]),
        (lambda: call(B=Z(2, 4, device="meta")), DtypeError, ["B", "meta", "cpu"]),
        (lambda: call(backend="fast"), ArgumentError, ["backend", "'fast'"]),
        (lambda: call(backend="cuda"), BackendUnavailable, ["'cuda'", "CUDA tensors"]),
    ],
)
def test_errors_name_argument_got_and_expected(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("bad", [{"state_batch_indices": torch.tensor([0, 0])}, {"D": Z(5)}, {"backend": "cuda"}])
def test_nothing_is_written_when_an_argument_is_bad(bad):
    state = torch.ones(2, 6, 4)
    with pytest.raises(cobra_kernels.errors.CobraKernelsError):
        call(**{"state": state, "dt": torch.ones(2, 6), "x": torch.ones(2, 6), "B": torch.ones(2, 4), **bad})
    assert (state == 1).all()


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
def test_torch_op_called_directly_stays_inside_its_tensors():
    op = torch.ops.cobra_kernels.selective_state_update_fwd
    x, projected = Z(2, 6), Z(2, 4)
    for changed, message in (({"A": Z(5, 4)}, "A has size 5"), ({"state": Z(1, 6, 4)}, "1 rows"), ({"dt": Z(2, 5)}, "dt has size 5"),
                             ({"state_batch_indices": torch.tensor([0, 9])}, "is 9"), ({"state_batch_indices": torch.tensor([1, 1])}, "twice"),
                             ({"D": Z(6, dtype=F64)}, "float64"), ({"D": Z(6).int()}, "D is not float32"),
                             ({"state_batch_indices": Z(2)}, "not int32 or int64")):  # fmt: skip
        arguments = dict(state=Z(2, 6, 4), x=x, dt=x, A=Z(6, 4), B=projected, C=projected, D=None, z=None, dt_bias=None, dt_softplus=True)
        with pytest.raises(RuntimeError, match=message):
            op(**{**arguments, "state_batch_indices": None, **changed})


def test_supports_says_what_the_op_does():
    arguments = (Z(2, 6, 4), Z(2, 6), Z(2, 6), Z(6, 4), Z(2, 4), Z(2, 4))
    answer = cobra_kernels.supports("selective_state_update", *arguments, backend="reference")
    assert answer == (True, "reference; gradients: none (forward only)")
    for backend in ("triton", "cuda"):
        ok, reason = cobra_kernels.supports("selective_state_update", *arguments, backend=backend)
        assert not ok and "CUDA tensors" in reason


# --- torch -----------------------------------------------------------------------------------------------------------

OPCHECK_CASES = [Case(dim=17), Case(dim=8, dstate=3, dtype=BF16), Case(D=False, z=False, dt_bias=False), Case(batch=0),
                 Case(heads=4, dim=6, groups=2), Case(indices=torch.int32), Case(layout="transposed"), Case(dtype=F16, state_dtype=F32)]  # fmt: skip


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda c: c.id)
def test_opcheck(case):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if case.indices is not None:  # which rows are live is data, so a dynamic trace of random indices cannot be replayed
        tests = tests[:3]
    torch.library.opcheck(torch.ops.cobra_kernels.selective_state_update_fwd.default, tuple(make_inputs(case).values()), test_utils=tests)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compile_fullgraph(backend):
    tensors = make_inputs(Case())

    def f(state, **arguments):
        return selective_state_update(state, **arguments, backend=backend).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    states = [tensors.pop("state")]
    states.append(states[0].clone())
    cobra_kernels.reset_call_counts()
    out = compiled(states[0], **tensors)
    if backend is None and kernel_backends():
        assert cobra_kernels.call_counts()["selective_state_update", "cpu"] == 1  # the compiled graph calls the kernel
    assert_close(out, f(states[1], **tensors), 1e-6)
    assert_close(states[0], states[1], 1e-6)  # the mutation survives functionalisation
