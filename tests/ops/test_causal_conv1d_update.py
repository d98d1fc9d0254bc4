"""causal_conv1d_update: an independent loop, every backend against the fp64 reference, the state bit for bit, errors, torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import cobra_kernels
from cobra_kernels import causal_conv1d, causal_conv1d_update
from cobra_kernels.errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError
from tests.conftest import kernel_backends
from tests.tolerances import OUTPUT, assert_close

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
needs_kernels = pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 3
    dim: int = 24
    width: int = 4
    extra: int = 1  # state_len - (width - 1)
    steps: int | None = None  # None: x (batch, dim)
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # None: as x
    state_dtype: torch.dtype | None = None  # None: as x
    bias: bool = True
    activation: str | None = "silu"
    layout: str = "contiguous"  # of x and conv_state
    seen: tuple[int, ...] | None = None  # cache_seqlens, repeated over the batch
    pool: tuple[int, ...] | None = None  # conv_state_indices of a pool of 7

    @property
    def id(self) -> str:
        base = Case()
        changed = [f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in self._asdict().items() if v != getattr(base, k)]
        return "-".join(changed) or "base"


LAYOUTS = ("contiguous", "channel_last", "sliced", "unaligned", "strided")
SEEN = (0, 2, 9)
CASES = [
    *(Case(dim=d) for d in (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 256, 257, 600)),
    *(Case(batch=b) for b in (0, 1, 2, 65)),
    *(Case(width=w, extra=e, steps=s, seen=c)
      for w in (1, 2, 3, 4, 5, 8, 11) for e in (0, 1, 3) for s in (None, 1, 3) for c in (None, SEEN) if c is None or (s or 1) <= w - 1 + e),
    *(Case(steps=s, extra=e) for s in (0, 1, 2, 3, 4, 5, 9, 40) for e in (0, 1, 30)),
    *(Case(steps=s, extra=2, seen=SEEN) for s in (0, 1, 2, 4, 5)),
    *(Case(seen=(-1, 3, 2**31 - 1))._replace(extra=e) for e in (0, 1)),
    *(Case(layout=x, steps=s, seen=c) for x in LAYOUTS for s in (None, 3) for c in (None, SEEN)),
    *(Case(dtype=d, steps=s, layout=x) for d in (BF16, F16, F64) for s in (None, 2) for x in ("contiguous", "channel_last")),
    *(Case(dtype=d, weight_dtype=w, state_dtype=i) for d, w, i in ((F32, BF16, BF16), (BF16, F32, F32), (F16, F32, BF16), (BF16, BF16, F16))),
    *(Case(bias=b, activation=a) for b in (True, False) for a in (None, "swish")),
    *(Case(pool=p, seen=c, steps=s) for p in ((4, 0, 6), (-1, 2, -7), (-1, -1, -1)) for c in (None, SEEN) for s in (None, 2)),
]  # fmt: skip
CASES = list(dict.fromkeys(CASES))


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "channel_last":
        return t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() == 3 else t
    if layout == "sliced":  # inner view of a larger NaN-filled buffer
        outer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
        return outer[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)
    if layout == "unaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    if layout == "strided":  # stride 1 nowhere
        return torch.stack([t, t], -1)[..., 0]
    return t.clone()


def make_inputs(case: Case, seed: int = 0) -> dict:
    """Keyword arguments of causal_conv1d_update."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype):
        return torch.randn(shape, generator=g, dtype=F64).to(dtype)

    weight_dtype = case.weight_dtype or case.dtype
    sizes = (case.batch, case.dim) if case.steps is None else (case.batch, case.dim, case.steps)
    rows = case.batch if case.pool is None else 7
    kwargs = {
        "x": laid_out(randn(*sizes, dtype=case.dtype), case.layout),
        "conv_state": laid_out(randn(rows, case.dim, case.width - 1 + case.extra, dtype=case.state_dtype or case.dtype), case.layout),
        "weight": randn(case.dim, case.width, dtype=weight_dtype) / case.width,
        "bias": randn(case.dim, dtype=weight_dtype) if case.bias else None,
        "activation": case.activation,
    }
    if case.seen is not None:
        kwargs["cache_seqlens"] = torch.tensor((case.seen * case.batch)[: case.batch], dtype=torch.int32)
    if case.pool is not None:
        kwargs["conv_state_indices"] = torch.tensor(case.pool)
    return kwargs


def run(kwargs, backend):
    """(out, conv_state after it); the caller's conv_state stays as it was, its layout is kept."""
    state = kwargs["conv_state"]
    if state.is_contiguous():
        state = state.clone()
    else:  # a copy of the whole storage, so that the strides survive
        state = torch.empty(0, dtype=state.dtype).set_(state.untyped_storage().clone(), state.storage_offset(), state.shape, state.stride())
    return causal_conv1d_update(**{**kwargs, "conv_state": state}, backend=backend), state


def in_fp64(kwargs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def new_state(kwargs):
    """conv_state after the update, by moving columns: exact in any dtype."""
    state, x = kwargs["conv_state"].clone(), kwargs["x"]
    x = (x[..., None] if x.dim() == 2 else x).to(state.dtype)
    length = state.shape[2]
    for b in range(len(x)):
        row = b if "conv_state_indices" not in kwargs else int(kwargs["conv_state_indices"][b])
        if row < 0:
            continue
        if "cache_seqlens" not in kwargs:
            state[row] = torch.cat([state[row], x[b]], -1)[:, x.shape[2] :]
        else:
            for s in range(x.shape[2]):
                state[row, :, (int(kwargs["cache_seqlens"][b]) + s) % length] = x[b, :, s]
    return state


# --- the reference against an independent loop -----------------------------------------------------------------------


def oracle(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None):
    """One scalar at a time, from the definition; a list is the history of a channel."""
    x = x[:, :, None] if x.ndim == 2 else x
    batch, dim, steps = x.shape
    width, length = weight.shape[1], conv_state.shape[2]
    out = np.zeros((batch, dim, steps))
    for b in range(batch):
        row = b if conv_state_indices is None else int(conv_state_indices[b])
        if row < 0:
            continue
        for d in range(dim):
            if cache_seqlens is None:
                history = list(conv_state[row, d])
            else:
                seen = int(cache_seqlens[b])
                history = [conv_state[row, d, (seen - width + 1 + j) % length] for j in range(width - 1)]
            for s in range(steps):
                history.append(x[b, d, s])
                total = sum(weight[d, w] * history[len(history) - width + w] for w in range(width)) + (0 if bias is None else bias[d])
                out[b, d, s] = total / (1 + math.exp(-total)) if activation else total
    return out


@pytest.mark.parametrize("case", [c for c in CASES if c.dim <= 24 and c.batch <= 3 and c.dtype == F32 and c.state_dtype is None][::3], ids=lambda c: c.id)
def test_reference_against_a_plain_loop(case):
    kwargs = make_inputs(case._replace(dtype=F64, dim=min(case.dim, 3)))
    arrays = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    out, state = run(kwargs, "reference")
    np.testing.assert_allclose(out.numpy().reshape(-1), oracle(**arrays).reshape(-1), rtol=0, atol=1e-13)
    assert torch.equal(state, new_state(kwargs))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_values(case, backend):
    kwargs = make_inputs(case)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: an element never written shows
    try:
        out, state = run(kwargs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    want, _ = run(in_fp64(kwargs), "reference")
    assert out.dtype == case.dtype and out.stride() == torch.empty_like(kwargs["x"]).stride()
    assert_close(out, want, OUTPUT[case.dtype], backend)
    assert torch.equal(state, new_state(kwargs))
    if case.pool is not None:
        assert (out[torch.tensor(case.pool) < 0] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_level(cpu_level, dtype, layout):
    for dim, width, steps, seen in ((1, 4, None, None), (37, 2, 1, SEEN), (300, 4, None, SEEN), (16, 8, 3, None), (40, 11, 2, None)):
        kwargs = make_inputs(Case(dim=dim, width=width, steps=steps, seen=seen, dtype=dtype, layout=layout), dim)
        out, state = run(kwargs, "cpu")
        assert_close(out, run(in_fp64(kwargs), "reference")[0], OUTPUT[dtype], f"{dim} {width} {steps} {seen}")
        assert torch.equal(state, new_state(kwargs))


@needs_kernels
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("seen", [None, SEEN])
def test_kept_values_are_the_same_bits(dtype, seen):
    """Also those no arithmetic keeps: NaN payloads, infinities, -0, subnormals."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    kwargs = make_inputs(Case(dim=1100, dtype=dtype, seen=seen, width=4))
    limits = torch.iinfo(bits)
    patterns = torch.randint(limits.min, limits.max, kwargs["conv_state"].shape, dtype=bits)
    patterns[..., 0] = limits.min  # -0
    kwargs["conv_state"] = patterns.view(dtype)
    kwargs["x"] = torch.randint(limits.min, limits.max, kwargs["x"].shape, dtype=bits).view(dtype)
    _, state = run(kwargs, "cpu")
    assert torch.equal(state.view(bits), new_state(kwargs).view(bits))


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_steps_equal_one_convolution(backend, circular, steps, dtype):
    x, weight, bias = torch.randn(2, 40, 12).to(dtype), torch.randn(40, 4), torch.randn(40)
    want, final = causal_conv1d(x, weight, bias, return_final_states=True, activation="silu", backend=backend)
    state = torch.zeros(2, 40, 5, dtype=dtype)
    outs = []
    for t in range(0, 12, steps):
        seen = torch.full((2,), t) if circular else None
        outs.append(causal_conv1d_update(x[..., t : t + steps], state, weight, bias, "silu", seen, backend=backend))
    got = torch.cat(outs, -1)
    assert torch.equal(got, want) if backend == "cpu" else torch.allclose(got, want, rtol=1e-2 if dtype == BF16 else 1e-6, atol=1e-6)
    if circular:  # step t lies in column t mod 5
        state = state[..., [(t % 5) for t in range(7, 12)]]
    assert torch.equal(state[..., -3:], final)


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_nan_stays_in_its_row_and_inputs_are_not_written(backend):
    kwargs = make_inputs(Case(batch=4, dim=33))
    before = {k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    out, state = run(kwargs, backend)
    assert all(torch.equal(kwargs[k], v) for k, v in before.items())
    assert out.data_ptr() not in {v.data_ptr() for v in (*before.values(), kwargs["x"], state)}
    kwargs["conv_state"][2, 17, 2] = float("nan")
    poisoned, poisoned_state = run(kwargs, backend)
    assert poisoned[2, 17].isnan() and poisoned_state[2, 17, 1].isnan()
    poisoned[2, 17] = out[2, 17]
    poisoned_state[2, 17, 1] = state[2, 17, 1]
    assert torch.equal(poisoned, out) and torch.equal(poisoned_state, state)


@needs_kernels
@pytest.mark.parametrize("case", [Case(batch=5, dim=50, steps=2), Case(batch=5, dim=50, seen=SEEN, dtype=BF16)], ids=lambda c: c.id)
def test_batch_rows_and_channels_are_independent_bit_for_bit(case):
    kwargs = make_inputs(case)
    out, state = run(kwargs, "cpu")
    rows, channels = torch.tensor([3, 0, 4, 2, 1]), torch.randperm(50)
    picked = {k: kwargs[k][rows][:, channels] for k in ("x", "conv_state")} | {k: kwargs[k][channels] for k in ("weight", "bias")}
    if case.seen is not None:
        picked["cache_seqlens"] = kwargs["cache_seqlens"][rows]
    out2, state2 = run({**kwargs, **picked}, "cpu")
    assert torch.equal(out2, out[rows][:, channels]) and torch.equal(state2, state[rows][:, channels])


@needs_kernels
@pytest.mark.threads
@pytest.mark.parametrize("case", [Case(batch=9, dim=700), Case(batch=3, dim=700, seen=SEEN, pool=(5, -1, 0))], ids=lambda c: c.id)
def test_threads_change_no_bit(threads, case):
    kwargs = make_inputs(case)
    (one, state1), (two, state2) = threads(lambda: run(kwargs, "cpu"), 1, 2)
    assert torch.equal(one, two) and torch.equal(state1, state2)


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_forward_only(backend):
    kwargs = make_inputs(Case())
    for name in ("x", "conv_state", "weight", "bias"):
        kwargs[name] = kwargs[name].requires_grad_()
    out = causal_conv1d_update(**kwargs, backend=backend)
    assert not out.requires_grad and torch.equal(kwargs["conv_state"].detach()[..., -1], kwargs["x"].detach())


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_activation_as_a_bool(backend):
    kwargs = make_inputs(Case())
    for flag, name in ((True, "silu"), (False, None)):
        assert torch.equal(run({**kwargs, "activation": flag}, backend)[0], run({**kwargs, "activation": name}, backend)[0])


@needs_kernels
@pytest.mark.parametrize("strides", [(2**31 + 7, 4, 1), (4, 2**31 + 7, 1), (4, 8, 2**31 + 7)], ids=["pool", "dim", "state_len"])
def test_stride_beyond_32_bits(tmp_path, strides):
    """conv_state on a sparse file: an int offset would read or write elsewhere."""
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**31 + 4096, dtype=BF16)
    sizes = (1, 9, 2) if strides[2] > 2**31 else (2, 9, 3) if strides[0] > 2**31 else (1, 2, 3)
    state = storage.as_strided(sizes, strides)
    state.copy_(torch.randn(sizes))
    dense = state.clone(memory_format=torch.contiguous_format)
    x, weight = torch.randn(sizes[:2]).to(BF16), torch.randn(sizes[1], 3)
    got, want = (causal_conv1d_update(x, s, weight, backend="cpu") for s in (state, dense))
    assert torch.equal(got, want) and torch.equal(state, dense)


# --- errors ----------------------------------------------------------------------------------------------------------

X, S, W = torch.zeros(2, 8), torch.zeros(2, 8, 4), torch.ones(8, 4)
I32 = torch.tensor([0, 1], dtype=torch.int32)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: causal_conv1d_update(X[0], S, W), ShapeError, ["causal_conv1d_update: x", "(8,)", "(batch, dim, steps)"]),
        (lambda: causal_conv1d_update(X, S[:1], W), ShapeError, ["conv_state", "(1, 8, 4)", "batch", "dim=8"]),
        (lambda: causal_conv1d_update(X, S[:, :7], W), ShapeError, ["conv_state", "(2, 7, 4)", "dim=8"]),
        (lambda: causal_conv1d_update(X, S[..., :2], W), ShapeError, ["conv_state", "state_len=2", "width - 1 = 3"]),
        (lambda: causal_conv1d_update(X, S[:1].expand(2, 8, 4), W), ArgumentError, ["conv_state", "expanded", "stride 0 at dim 0"]),
        (lambda: causal_conv1d_update(X, S, W[:7]), ShapeError, ["weight", "(7, 4)", "dim=8"]),
        (lambda: causal_conv1d_update(X, S, W[:, :0]), ShapeError, ["weight", "width >= 1"]),
        (lambda: causal_conv1d_update(X, S, W, W[:7, 0]), ShapeError, ["bias", "(7,)"]),
        (lambda: causal_conv1d_update(X, S, W, activation="relu"), ArgumentError, ["activation", "'relu'"]),
        (lambda: causal_conv1d_update(X, S, W, cache_seqlens=I32[:1]), ShapeError, ["cache_seqlens", "(1,)", "batch=2"]),
        (lambda: causal_conv1d_update(X, S, W, cache_seqlens=I32.float()), DtypeError, ["cache_seqlens", "float32"]),
        (lambda: causal_conv1d_update(torch.zeros(2, 8, 5), S, W, cache_seqlens=I32), ShapeError, ["steps=5", "state_len=4"]),
        (lambda: causal_conv1d_update(X, S, W, conv_state_indices=I32[:1]), ShapeError, ["conv_state_indices", "(1,)", "batch=2"]),
        (lambda: causal_conv1d_update(X, S, W, conv_state_indices=I32.short()), DtypeError, ["conv_state_indices", "int16"]),
        (lambda: causal_conv1d_update(X, S, W, conv_state_indices=I32 + 1), ArgumentError, ["conv_state_indices[1] is 2", "pool=2"]),
        (lambda: causal_conv1d_update(X, S, W, conv_state_indices=I32 * 0), ArgumentError, ["conv_state_indices[1] is 0", "earlier batch row"]),
        (lambda: causal_conv1d_update(X, S.double(), W), DtypeError, ["conv_state", "float64", "does not mix"]),
        (lambda: causal_conv1d_update(X.long(), S, W), DtypeError, ["x", "int64"]),
        (lambda: causal_conv1d_update(X, S, W, backend="cuda"), BackendUnavailable, ["'cuda'"]),
    ],
)
def test_errors_name_argument_got_and_expected_and_nothing_is_written(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert (S == 0).all()


@needs_kernels
def test_torch_op_called_directly_stays_inside_its_tensors():
    op, ones = torch.ops.cobra_kernels.causal_conv1d_update_fwd, torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="weight has size 7"):
        op(ones, S, W[:7], None, False, None, None)
    with pytest.raises(RuntimeError, match="state_len 2"):
        op(ones, S[..., :2], W, None, False, None, None)
    with pytest.raises(RuntimeError, match="is 2, conv_state has 2 rows"):
        op(ones, S, W, None, False, None, I32 + 1)
    with pytest.raises(RuntimeError, match="twice"):
        op(ones, S, W, None, False, None, I32 * 0)
    with pytest.raises(RuntimeError, match="5 steps"):
        op(torch.ones(2, 8, 5), S, W, None, False, I32, None)
    assert (S == 0).all()


# --- torch -----------------------------------------------------------------------------------------------------------

OPCHECK_CASES = [Case(), Case(steps=3), Case(seen=SEEN), Case(pool=(4, -1, 0)), Case(dtype=BF16, layout="channel_last"), Case(batch=0),
                 Case(width=1, extra=0, bias=False), Case(layout="strided", state_dtype=F16)]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda c: c.id)
def test_opcheck(case):
    k = make_inputs(case)
    arguments = (k["x"], k["conv_state"], k["weight"], k["bias"], True, k.get("cache_seqlens"), k.get("conv_state_indices"))
    torch.library.opcheck(torch.ops.cobra_kernels.causal_conv1d_update_fwd.default, arguments)


def test_compile_fullgraph():
    kwargs = make_inputs(Case())

    def f(x, conv_state, weight, bias):
        return causal_conv1d_update(x, conv_state, weight, bias, "silu").sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    states = [kwargs["conv_state"].clone() for _ in range(2)]
    cobra_kernels.reset_call_counts()
    for _ in range(3):
        got = compiled(kwargs["x"], states[0], kwargs["weight"], kwargs["bias"])
    if kernel_backends():
        assert cobra_kernels.call_counts()["causal_conv1d_update", "cpu"] == 3  # the compiled graph calls the kernel
    for _ in range(3):
        want = f(kwargs["x"], states[1], kwargs["weight"], kwargs["bias"])
    assert torch.equal(got, want) and torch.equal(states[0], states[1])


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("width", [1, 3, 4, 9])
def test_filters_of_any_layout(backend, width):
    """A transposed, an every-second and an expanded weight, a strided bias: read in place, the same bits."""
    x, state, bias = torch.randn(2, 7), torch.randn(2, 7, width), torch.randn(14)[::2]
    for weight in (torch.randn(width, 7).t(), torch.randn(14, 2 * width)[::2, ::2], torch.randn(1, width).expand(7, width)):
        plain = causal_conv1d_update(x, state.clone(), weight.contiguous(), bias.contiguous(), backend=backend)
        assert torch.equal(causal_conv1d_update(x, state.clone(), weight, bias, backend=backend), plain)
