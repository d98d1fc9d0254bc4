"""The tensor-core kernel of selective_scan, emulated: values against fp64, equal bits, what it serves, and that nothing leaks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from tests.simt import harness
from tests.simt.harness import Tensor, check_close
from tests.simt.room_selective_scan import expected_scan, per_channel
from tests.simt.test_rooms import ORDERS

DSTATE = 16


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 2
    dim: int = 40
    seqlen: int = 70
    D: bool = True
    z: bool = True
    delta_bias: bool = True
    softplus: bool = True
    initial: str = "fp32"  # dtype; empty: none
    weight_dtype: str = "fp32"
    gap: int = 0  # elements between rows of the first tensor; twice as many in the next, so no two have the same strides
    packed: tuple[int, ...] | None = None
    index: str = "i4"
    forget: bool = False  # some A are -inf: those states are their last step's alone

    @property
    def id(self) -> str:
        base = Case()
        return "-".join(f"{k}={v}" for k, v in self._asdict().items() if v != getattr(base, k)).replace(" ", "") or "base"


CASES = [
    Case(),
    *(Case(dim=dim) for dim in (8, 16, 24, 32, 64, 72)),
    *(Case(seqlen=n) for n in (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 96, 97, 128, 129, 161)),
    *(Case(batch=b, seqlen=33) for b in (1, 3)),
    *(Case(**{name: False}) for name in ("D", "z", "delta_bias", "softplus")),
    Case(D=False, z=False, delta_bias=False, softplus=False, initial=""),
    *(Case(initial=dtype, weight_dtype=dtype) for dtype in ("bf16", "fp16")),
    Case(initial=""),
    *(Case(gap=8, batch=b) for b in (1, 2)),
    Case(forget=True),
    *(Case(batch=1, packed=p, index=i) for p in ((0, 0, 1, 3, 3, 36, 68), (0, 70), (0, 32, 64), (0,)) for i in ("i4", "i8")),
]  # fmt: skip
BY_ID = [pytest.param(case, id=case.id) for case in CASES]


def channel_last(values, gap=0):
    """(tensor, its view (batch, dim, seqlen)): bf16, channels side by side."""
    batch, dim, seqlen = values.shape
    tensor = Tensor((batch, seqlen, dim + gap), "bf16")
    view = tensor.array[..., :dim].transpose(0, 2, 1)
    view[...] = harness.rounded(values, "bf16")
    tensor.before = tensor.buffer.copy()
    return tensor, view


def inputs_of(case: Case, seed: int = 0, log_dt: tuple[float, float] | None = None) -> dict:
    """Arguments of host.selective_scan by name; u, delta, z, B, C and out channel-last."""
    rng = np.random.default_rng(seed)
    shape = (case.batch, case.dim, case.seqlen)
    states = (case.batch if case.packed is None else len(case.packed) - 1, case.dim, DSTATE)

    def weight(shape, dtype, scale=1.0, offset=0.0):
        return Tensor(shape, dtype, "contiguous", rng.standard_normal(shape) * scale + offset).array

    gaps = iter(range(case.gap, 6 * case.gap + 1, case.gap or 1))

    def sequence(shape, scale=1.0, offset=0.0):
        return channel_last(rng.standard_normal(shape) * scale + offset, next(gaps, 0))[1]

    projected = (case.batch, DSTATE, case.seqlen)
    A = weight((case.dim, DSTATE), case.weight_dtype, 0.3, -1.0)
    if case.forget:
        A[::3, ::2] = -np.inf
    delta = sequence(shape, 0.5, 0.0 if case.softplus else 5.0)  # above 0 with the bias, so that nothing grows
    if log_dt:  # softplus(delta) log-uniform over channels
        dt = np.exp(rng.uniform(*np.log(log_dt), (1, case.dim, 1)) + 0.3 * rng.standard_normal(shape))
        delta = channel_last(dt + np.log(-np.expm1(-dt)))[1]
        A[...] = -np.arange(1, DSTATE + 1)
    return {
        "u": sequence(shape), "delta": delta, "A": A, "B": sequence(projected), "C": sequence(projected),
        "D": weight((case.dim,), case.weight_dtype) if case.D else None, "z": sequence(shape) if case.z else None,
        "delta_bias": weight((case.dim,), case.weight_dtype) if case.delta_bias else None, "softplus": case.softplus,
        "initial": weight(states, case.initial) if case.initial else None,
        "cu_seqlens": None if case.packed is None else np.array(case.packed, case.index),
    }  # fmt: skip


def scan(host, inputs: dict, workers: int = 0, out_layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """(out, last_state), out as (batch, seqlen, dim); `workers` share the chains of 32 channels on the line."""
    batch, dim, seqlen = inputs["u"].shape
    rows = batch if inputs["cu_seqlens"] is None else len(inputs["cu_seqlens"]) - 1
    out, last = Tensor((batch, seqlen, dim), "bf16", out_layout), Tensor((rows, dim, DSTATE), "fp32")
    line = np.zeros(host.selective_scan_line_words(workers), np.uint32)
    host.selective_scan("cuda_mma", *inputs.values(), out.array.transpose(0, 2, 1), last.array, 132, workers, line)
    assert not line.any(), f"{workers} workers left their workspace {line.nonzero()[0].tolist()} not zero"
    return out, last


def expected_of(inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """(out as (batch, seqlen, dim), last_state) in fp64."""
    wide = {name: harness.to_fp64(v) for name, v in inputs.items() if isinstance(v, np.ndarray) and name != "cu_seqlens"}
    u, cu_seqlens = wide["u"], inputs["cu_seqlens"]
    batch, dim, seqlen = u.shape
    delta = wide["delta"] + (wide["delta_bias"][:, None] if "delta_bias" in wide else 0)
    delta = np.logaddexp(0, delta) if inputs["softplus"] else delta
    B, C = (per_channel(wide[name], (batch, dim, DSTATE, seqlen)) for name in "BC")
    bounds = None if cu_seqlens is None else [int(i) for i in cu_seqlens]
    pieces = [(b, b, 0, seqlen) for b in range(batch)] if bounds is None else [(0, i, *bounds[i : i + 2]) for i in range(len(bounds) - 1)]
    out, last = np.zeros_like(u), np.zeros((len(pieces), dim, DSTATE))
    for b, row, begin, end in pieces:
        at = np.s_[..., begin:end]
        h = wide["initial"][row] if "initial" in wide else last[row]
        out[b][at], last[row] = expected_scan(u[b][at], delta[b][at], wide["A"], B[b][at], C[b][at], wide.get("D"), h)
    if "z" in wide:
        out *= wide["z"] / (1 + np.exp(-wide["z"]))
    return out.transpose(0, 2, 1), last


def check(host, case: Case) -> None:
    """One case against fp64: outputs written whole, nothing else touched."""
    inputs = inputs_of(case)
    before = {name: v.copy() for name, v in inputs.items() if isinstance(v, np.ndarray)}
    out, last = scan(host, inputs, out_layout="padded" if case.gap else "contiguous")
    expected, expected_last = expected_of(inputs)
    check_close(out, expected, harness.OUTPUT["bf16"], "out")
    check_close(last, expected_last, harness.OUTPUT["fp32"], "last_state")
    for name, copy in before.items():
        assert copy.tobytes() == inputs[name].tobytes(), f"the kernel wrote to {name}"


@pytest.mark.parametrize("case", BY_ID)
def test_values(host, case):
    for name, options in ORDERS.items():
        host.set_simt(**options)
        try:
            check(host, case)
        except (AssertionError, host.SimtFailure) as error:
            raise AssertionError(f"[order {name}] {error}") from error


@pytest.mark.parametrize("log_dt", [(1e-4, 1e-2), (1e-3, 0.1), (1e-2, 16.0)], ids=str)
def test_errors_on_a_long_sequence(host, log_dt):
    """The state stays fp32's although B dt u goes through tf32; out is bf16's rounding and little more, in every channel."""
    inputs = inputs_of(Case(batch=1, dim=64, seqlen=1500, D=False, delta_bias=False, initial=""), log_dt=log_dt)
    out, last = scan(host, inputs)
    expected, expected_last = expected_of(inputs)
    check_close(out, expected, 1.75e-3, "out")
    assert abs((out.values() * expected).sum() / (expected**2).sum() - 1) <= 2e-4, "what the cut of h loses on average is not put back"
    error = np.linalg.norm(out.values() - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() <= harness.OUTPUT["bf16"]
    check_close(last, expected_last, harness.OUTPUT["fp32"], "last_state")


def test_bits_do_not_depend_on_the_batch_or_the_order(host):
    inputs = inputs_of(Case(batch=3, seqlen=37))
    out, last = scan(host, inputs)
    for options in ORDERS.values():
        host.set_simt(**options)
        again, again_last = scan(host, inputs)
        assert np.array_equal(again.array, out.array) and np.array_equal(again_last.array, last.array)
        for b in range(3):
            row = {name: v[b : b + 1] if name in ("u", "delta", "B", "C", "z", "initial") else v for name, v in inputs.items()}
            alone, alone_last = scan(host, row)
            assert np.array_equal(alone.array[0], out.array[b]) and np.array_equal(alone_last.array[0], last.array[b])


@pytest.mark.parametrize("cut", [1, 7, 8, 31, 32, 33, 69])
def test_a_prefill_in_two_pieces_has_the_same_bits(host, cut):
    """Wherever the cut is: a token's place in its step of 8 and its tile of 32 leaves no trace. Packed together, the same again."""
    case = Case(batch=1)
    inputs = inputs_of(case)
    out, last = scan(host, inputs)

    def piece(begin, end, initial):
        return {name: v[..., begin:end] if name in ("u", "delta", "B", "C", "z") else v for name, v in inputs.items()} | {"initial": initial}

    first, half = scan(host, piece(0, cut, inputs["initial"]))
    second, end = scan(host, piece(cut, case.seqlen, half.array))
    assert np.array_equal(np.concatenate([first.array, second.array], 1), out.array)
    assert np.array_equal(end.array, last.array)
    states = np.concatenate([inputs["initial"], half.array])
    both, ends = scan(host, inputs | {"initial": states, "cu_seqlens": np.array([0, cut, case.seqlen], "i4")})
    assert np.array_equal(both.array, out.array)
    assert np.array_equal(ends.array, np.concatenate([half.array, last.array]))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6])
def test_shares_of_the_line_have_the_same_bits(host, workers):
    """Chains cut between tiles and handed over from block to block, with any number of blocks in flight: nothing changes."""
    inputs = inputs_of(Case(seqlen=161, dim=72))  # 6 chains of 6 tiles
    inputs["B"][0, 6, 40] = harness.rounded(np.array(np.inf), "bf16")  # marks a tile of one row, not that of the next one
    out, last = scan(host, inputs)
    for options in (*ORDERS.values(), {"order": "reverse", "resident": 2}, {"order": "random", "resident": 0, "seed": 7}):
        host.set_simt(**options)
        shared, shared_last = scan(host, inputs, workers)
        assert shared.buffer.tobytes() == out.buffer.tobytes() and shared_last.buffer.tobytes() == last.buffer.tobytes(), options


def test_packed_sequences_do_not_take_the_line(host):
    inputs = inputs_of(Case(batch=1, packed=(0, 3, 36, 68)))
    assert all(np.array_equal(a.array, b.array) for a, b in zip(scan(host, inputs), scan(host, inputs, workers=2)))


@pytest.mark.parametrize(
    "batch, dim, seqlen, workers",
    [
        (1, 5120, 800, 132),  # 160 chains: 1.2 for each multiprocessor
        (1, 5120, 255, 0),  # too short
        (1, 4224, 800, 0),  # 132: one each
        (1, 2560, 800, 0),
        (1, 7680, 800, 0),  # 240: two blocks for most
        (2, 5120, 800, 264),  # 320: a second wave that is mostly empty
        (8, 5120, 2048, 0),  # 1280: 4.8 waves
        (0, 5120, 800, 0),
        (1, 0, 800, 0),
        (1, 5120, 2**33, 0),  # numbers on the line have 31 bits
    ],
)
def test_when_the_line_is_used(host, batch, dim, seqlen, workers):
    assert host.selective_scan_line_workers(batch, dim, seqlen, 132, mma=True) == workers


@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_nan_stays_in_its_channel_and_its_future(host, name):
    inputs = inputs_of(Case(batch=2, dim=32, seqlen=70))
    before, last = scan(host, inputs)
    inputs[name][1, 11, 37] = harness.NAN_BITS["bf16"]
    after, after_last = scan(host, inputs)
    reached = np.zeros(before.array.shape, bool)
    reached[1, 37 : (38 if name == "z" else None), 11] = True
    assert np.array_equal(np.isnan(after.values()), reached)
    assert np.array_equal(after.array[~reached], before.array[~reached])
    poisoned = np.zeros(last.array.shape, bool)
    poisoned[1, 11] = name != "z"
    assert np.array_equal(np.isnan(after_last.array), poisoned)
    assert np.array_equal(after_last.array[~poisoned], last.array[~poisoned])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 5, 31, 32, 38, 69])
def test_irregular_B_stays_out_of_the_past(host, bad, at):
    """An infinity in B meets zeros in the outer product. Tokens before it, in its own step of 8 too, and other states are as without."""
    inputs = inputs_of(Case(batch=1, dim=40, seqlen=70))
    for options in ORDERS.values():
        host.set_simt(**options)
        clean, clean_last = scan(host, inputs)
        spoilt = inputs | {"B": channel_last(harness.to_fp64(inputs["B"]))[1]}
        spoilt["B"][0, 6, at] = harness.rounded(np.array(bad), "bf16") if not np.isnan(bad) else harness.NAN_BITS["bf16"]
        out, last = scan(host, spoilt)
        with np.errstate(invalid="ignore"):
            expected, expected_last = expected_of(spoilt)
        assert np.array_equal(np.isfinite(out.values()), np.isfinite(expected))
        values, near = out.values()[:, :at], expected[:, :at]
        assert np.linalg.norm(values - near) <= harness.OUTPUT["bf16"] * np.linalg.norm(near)
        tile = at // 32 * 32
        assert np.array_equal(out.array[:, :tile], clean.array[:, :tile]), "an earlier tile has other bits"
        good = np.isfinite(expected_last)
        assert np.array_equal(np.isfinite(last.array), good) and good.any()
        assert np.allclose(last.array[good], clean_last.array[good], rtol=1e-5, atol=1e-6)


def test_irregular_C_reaches_one_token(host):
    inputs = inputs_of(Case(batch=1, dim=40, seqlen=70))
    before, last = scan(host, inputs)
    inputs["C"][0, 3, 37] = harness.NAN_BITS["bf16"]
    after, after_last = scan(host, inputs)
    reached = np.zeros(before.array.shape, bool)
    reached[0, 37] = True
    assert np.array_equal(np.isnan(after.values()), reached)
    assert np.array_equal(after.array[~reached], before.array[~reached]) and np.array_equal(after_last.array, last.array)


def test_offsets_have_64_bits(host):
    """Time steps, then batch rows, of every tensor further apart than 32 bits count elements."""
    dim, step = 8, 2**31 + 64
    rng = np.random.default_rng(0)
    try:
        far = {name: harness.sparse_rows(3, n, step).view(np.uint16) for name, n in (("u", dim), ("out", dim), ("B", DSTATE))}
    except harness.AddressSpaceRefused as refusal:
        pytest.skip(str(refusal))
    for name in "uB":
        far[name][...] = harness.rounded(rng.standard_normal(far[name].shape), "bf16")
    A = -rng.random((dim, DSTATE)).astype(np.float32)
    for view in (lambda t: t[None].transpose(0, 2, 1), lambda t: t[:, :, None]):
        u, B, out = (view(far[name]) for name in ("u", "B", "out"))
        out[...] = 0x7FAD
        inputs = {"u": u, "delta": u, "A": A, "B": B, "C": B, "D": None, "z": u, "delta_bias": None, "softplus": True, "initial": None, "cu_seqlens": None}
        last = np.empty((u.shape[0], dim, DSTATE), np.float32)
        host.selective_scan("cuda_mma", *inputs.values(), out, last, 132, 0, None)
        expected, expected_last = expected_of(inputs)
        values = harness.to_fp64(out).transpose(0, 2, 1)
        assert np.linalg.norm(values - expected) <= harness.OUTPUT["bf16"] * np.linalg.norm(expected)
        assert np.linalg.norm(last - expected_last) <= harness.OUTPUT["fp32"] * np.linalg.norm(expected_last)


def test_what_it_serves(host):
    """16-bit channel-last rows on 16-byte boundaries, 16 states, one group: anything else is the fp32 kernel's."""
    base = inputs_of(Case(batch=2, dim=40, seqlen=9))

    def serves(out_layout="contiguous", **changes):
        inputs = base | changes
        try:
            scan(host, inputs, out_layout=out_layout)
        except ValueError as error:
            assert "does not serve" in str(error)
            return False
        return True

    def fp32(name):
        return harness.to_fp64(base[name]).astype(np.float32)

    assert serves()
    assert serves(z=None, D=None, delta_bias=None, initial=None)
    assert serves(A=base["A"].astype(np.float16))
    assert serves(B=base["B"][:, None], C=base["C"][:, None])  # one group by name
    for name in ("u", "delta", "z", "B", "C"):
        assert not serves(**{name: np.ascontiguousarray(base[name])}), f"{name} channel-first"
        assert not serves(**{name: channel_last(fp32(name), gap=3)[1]}), f"rows of {name} not on 16 bytes"
        assert not serves(**{name: fp32(name).transpose(0, 2, 1).copy().transpose(0, 2, 1)}), f"{name} in fp32"
        apart = Tensor((2, base[name].shape[1] * 9 + 4), "bf16").array
        rows = np.lib.stride_tricks.as_strided(apart, (2, 9, base[name].shape[1]), (apart.strides[0], 2 * base[name].shape[1], 2))
        rows[...] = base[name].transpose(0, 2, 1)
        assert not serves(**{name: rows.transpose(0, 2, 1)}), f"batch rows of {name} not on 16 bytes"
    for name in "BC":
        constant = np.zeros((40, DSTATE), np.uint16)
        assert not serves(**{name: constant}), f"{name} constant"
        assert not serves(**{name: np.stack([base[name]] * 2, 1)}), f"two groups of {name}"
    odd = inputs_of(Case(dim=36, seqlen=9))
    odd |= {name: channel_last(harness.to_fp64(odd[name]), gap=4)[1] for name in ("u", "delta", "z")}
    assert not serves("padded", **odd), "36 channels, although every row is on 16 bytes"
    one = inputs_of(Case(batch=1, seqlen=1))
    assert serves(**one)
    assert serves(**one | {name: np.ascontiguousarray(one[name]) for name in ("u", "delta", "z", "B", "C")})  # a dim of size 1 has no stride
    host.set_simt(max_grid_x=3)
    assert not serves()
