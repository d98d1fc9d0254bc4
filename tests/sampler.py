"""Random op calls at boundary shapes, one integer each: `python -m tests.sampler 1234` replays case 1234.

Sizes come from the lists where kernels break (0, 1, width - 1, around vectors, tiles and chunks), thinned by chance rather than
crossed; layouts and dtypes are drawn per tensor. Values are the realistic profile of cobra_kernels.selftest.
"""

from __future__ import annotations

import random
import sys

import torch

import cobra_kernels
from cobra_kernels import selfcheck
from cobra_kernels.selfcheck import Case, map_tensors
from tests.tolerances import GRADIENT, OUTPUT

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

BATCHES = (0, 1, 2, 3, 5)
LENGTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)
LONG = (127, 128, 129, 255, 256, 257)
LONGER = (1023, 1024, 1025, 2047, 2049)
DIMS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 192)
DSTATES = (1, 2, 3, 7, 8, 15, 16, 17, 32, 64)
WIDTHS = (1, 2, 3, 4, 4, 5, 6, 7, 8)
LAYOUTS = ("contiguous", "contiguous", "transposed", "sliced", "unaligned", "expanded")
MAX_ELEMENTS = 60_000

# op -> share of the cases
OPS = {
    "rms_norm": 4,
    "causal_conv1d": 5,
    "causal_conv1d_update": 3,
    "selective_scan": 5,
    "selective_state_update": 3,
    "mlp_projector": 1,
    "ldp_projector": 1,
}


def lay_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same shape in another memory layout; `expanded` repeats the first slice of one dim at stride 0."""
    if layout == "transposed" and t.dim() > 1:  # last two dims swapped in memory: channels innermost for (batch, dim, seqlen)
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":  # an inner view of a NaN-filled buffer: a read outside shows
        outer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
        return outer[tuple(slice(2, 2 + n) for n in t.shape)].copy_(t)
    if layout == "unaligned":
        return torch.cat([t.new_full((1,), float("nan")), t.flatten()])[1:].view(t.shape)
    if layout == "expanded" and t.dim() > 1 and t.shape[0] > 0:
        return t[:1].expand(t.shape)
    return t


def _mix(rng: random.Random, kwargs: dict, first: str, written: tuple[str, ...]) -> dict:
    """Each float tensor in a dtype and layout of its own; fp64 is all or nothing. Written arguments are never expanded."""
    wide = rng.random() < 0.08
    mixed = rng.random() < 0.5
    first_dtype = F64 if wide else kwargs[first].dtype
    out = {}
    for name, value in kwargs.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            out[name] = value
            continue
        dtype = F64 if wide else rng.choice((F32, BF16, F16)) if mixed and name not in (first, "A") else value.dtype
        dtype = first_dtype if name == first else dtype
        layout = rng.choice(LAYOUTS)
        if name in written and layout == "expanded":
            layout = "transposed"
        out[name] = lay_out(value.to(dtype), layout)
    return out


def _length(rng: random.Random, per_step: int) -> int:
    pick = rng.random()
    length = rng.choice(LENGTHS if pick < 0.85 else LONG if pick < 0.97 else LONGER)
    return min(length, max(1, MAX_ELEMENTS // max(1, per_step)))


def _boundaries(rng: random.Random, seqlen: int) -> torch.Tensor:
    """cu_seqlens of 0..5 sequences, some empty, with padding behind the last in half of the cases."""
    end = seqlen if rng.random() < 0.5 else rng.randint(0, seqlen)
    count = rng.randint(0, 5)
    cuts = sorted(rng.randint(0, end) for _ in range(max(0, count - 1)))
    cu = [0, *cuts, end] if count else [0]
    return torch.tensor(cu, dtype=rng.choice((torch.int32, torch.int64)))


def _indices(rng: random.Random, batch: int, pool: int) -> torch.Tensor:
    rows = [i if rng.random() < 0.8 else -1 - rng.randint(0, 3) for i in rng.sample(range(pool), batch)]
    return torch.tensor(rows, dtype=rng.choice((torch.int32, torch.int64)))


def sample(seed: int) -> Case:
    """The call of one seed."""
    rng = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    op = rng.choices(list(OPS), list(OPS.values()))[0]
    dtype = rng.choice((F32, F32, BF16, F16))
    return globals()[f"_{op}"](rng, g, dtype)


def _rms_norm(rng, g, dtype):
    dim = rng.choice((*DIMS, 255, 256, 257, 1536, 2560))
    rows = rng.choice((0, 1, 2, 3, 15, 16, 17, 33))
    kwargs = selfcheck.rms_norm_inputs(g, rows, dim, dtype, rng.random() < 0.5, rng.random() < 0.6)
    kwargs = _mix(rng, kwargs, "x", ())
    return Case("rms_norm", {**kwargs, "prenorm": True, "is_rms_norm": rng.random() < 0.6, "residual_in_fp32": rng.random() < 0.5})


def _causal_conv1d(rng, g, dtype):
    batch, dim, width = rng.choice(BATCHES), rng.choice(DIMS), rng.choice(WIDTHS)
    seqlen = _length(rng, batch * dim)
    kind = rng.choice(("plain", "initial", "packed", "seq_idx"))
    kwargs = selfcheck.causal_conv1d_inputs(g, 1 if kind == "packed" else batch, dim, seqlen, width, dtype, rng.random() < 0.7, kind == "initial")
    extra: dict = {"activation": rng.choice((None, "silu", "swish"))}
    if kind == "packed":
        extra["cu_seqlens"] = _boundaries(rng, seqlen)
        if rng.random() < 0.5:
            count = len(extra["cu_seqlens"]) - 1
            kwargs["initial_states"] = torch.randn(count, dim, width - 1, generator=g).to(dtype)
    kwargs = _mix(rng, kwargs, "x", ())
    if kind == "seq_idx":
        steps = torch.tensor([[rng.random() < 0.2 for _ in range(seqlen)] for _ in range(batch)], dtype=torch.int32).reshape(batch, seqlen)
        extra["seq_idx"] = torch.cumsum(steps, 1, dtype=torch.int32) - (1 if rng.random() < 0.5 else 0)
    else:
        extra["return_final_states"] = rng.random() < 0.7
    return Case("causal_conv1d", {**kwargs, **extra})


def _causal_conv1d_update(rng, g, dtype):
    batch, dim, width = rng.choice(BATCHES), rng.choice(DIMS), rng.choice(WIDTHS)
    state_len = max(1, width - 1 + rng.choice((0, 1, 1, 3)))
    steps = rng.choice((None, None, 1, 2, 3, state_len))
    steps = None if steps is None else min(steps, state_len)
    kwargs = selfcheck.causal_conv1d_update_inputs(g, batch, dim, width, state_len, steps, dtype, rng.random() < 0.7)
    extra: dict = {"activation": rng.choice((None, "silu"))}
    if rng.random() < 0.4:
        pool = batch + rng.randint(0, 3)
        kwargs["conv_state"] = torch.randn(pool, dim, state_len, generator=g).to(dtype)
        extra["conv_state_indices"] = _indices(rng, batch, pool)
    if rng.random() < 0.4:
        extra["cache_seqlens"] = torch.tensor([rng.randint(0, 40) for _ in range(batch)], dtype=torch.int32)
    return Case("causal_conv1d_update", {**_mix(rng, kwargs, "x", ("conv_state",)), **extra}, ("conv_state",))


def _selective_scan(rng, g, dtype):
    groups = rng.choice((1, 1, 1, 2, 3))
    batch, dim, dstate = rng.choice(BATCHES), rng.choice(DIMS) * groups, rng.choice(DSTATES)
    packed = rng.random() < 0.25
    batch = 1 if packed else batch
    seqlen = _length(rng, batch * dim * dstate)
    on = [rng.random() < p for p in (0.6, 0.6, 0.7, 0.5)]
    kwargs = selfcheck.selective_scan_inputs(g, batch, dim, seqlen, dstate, groups, dtype, on[0], on[1], on[2], on[3], rng.random() < 0.5)
    for name in ("B", "C"):
        form = rng.choice(("groups", "groups", "plain", "constant", "token-major"))
        if form == "constant":
            kwargs[name] = torch.randn(dim, dstate, generator=g)
        elif form == "plain" and groups == 1:
            kwargs[name] = kwargs[name][:, 0]
        elif form == "token-major":  # columns of x_dbl
            kwargs[name] = kwargs[name].movedim(-1, 1).contiguous().movedim(1, -1)
    if rng.random() < 0.3:
        kwargs["delta_bias"] = None
    extra = {"return_last_state": True}
    if packed:
        extra["cu_seqlens"] = _boundaries(rng, seqlen)
        count = len(extra["cu_seqlens"]) - 1
        kwargs["initial_state"] = torch.randn(count, dim, dstate, generator=g) if on[3] else None
    keep_layout = rng.random() < 0.5
    return Case("selective_scan", {**(kwargs if keep_layout else _mix(rng, kwargs, "u", ())), **extra})


def _selective_state_update(rng, g, dtype):
    batch, dim, dstate = rng.choice(BATCHES), rng.choice(DIMS), rng.choice(DSTATES)
    on = [rng.random() < 0.6 for _ in range(2)]
    kwargs = selfcheck.selective_state_update_inputs(g, batch, dim, dstate, dtype, rng.choice((F32, F32, BF16, F16)), *on)
    extra: dict = {}
    if rng.random() < 0.3:
        pool = batch + rng.randint(0, 3)
        kwargs["state"] = torch.randn(pool, dim, dstate, generator=g).to(kwargs["state"].dtype)
        extra["state_batch_indices"] = _indices(rng, batch, pool)
    if rng.random() < 0.3:  # multi-head: heads of dim channels, groups of heads
        groups = rng.choice((1, 2))
        heads = groups * rng.choice((1, 2))
        kwargs["state"] = torch.randn(kwargs["state"].shape[0], heads, dim, dstate, generator=g).to(kwargs["state"].dtype)
        for name in ("x", "dt", "z"):
            if kwargs[name] is not None:
                kwargs[name] = kwargs[name][:, None].repeat(1, heads, 1)
        kwargs["A"] = kwargs["A"][None].repeat(heads, 1, 1)
        for name in ("B", "C"):
            kwargs[name] = torch.randn(batch, groups, dstate, generator=g).to(dtype)
        for name in ("D", "dt_bias"):
            if kwargs[name] is not None:
                kwargs[name] = kwargs[name][None].repeat(heads, 1)
    return Case("selective_state_update", {**_mix(rng, kwargs, "x", ("state",)), **extra}, ("state",))


def _mlp_projector(rng, g, dtype):
    features = tuple(rng.choice((1, 3, 8, 17, 32)) for _ in range(rng.randint(1, 3)))
    layers = tuple(rng.choice((1, 4, 9, 33)) for _ in range(rng.randint(1, 3)))
    tokens = rng.choice(((0, 3), (1, 1), (2, 5), (17,), (2, 2, 3)))
    kwargs = selfcheck.mlp_projector_inputs(g, tokens, features, layers, dtype, rng.random() < 0.7)
    layout = rng.choice(LAYOUTS)
    return Case("mlp_projector", {**kwargs, "features": tuple(lay_out(f, layout) for f in kwargs["features"])})


def _ldp_projector(rng, g, dtype):
    grid = rng.choice(((1, 1), (3, 3), (4, 6), (9, 9)))
    out_grid = rng.choice(((1, 1), (2, 3), (3, 3), (5, 5)))
    features = tuple(rng.choice((1, 8, 17)) for _ in range(rng.randint(1, 2)))
    return Case("ldp_projector", selfcheck.ldp_projector_inputs(g, rng.choice((0, 1, 2)), grid, out_grid, features, (rng.choice((5, 16)), rng.choice((4, 9))), dtype))


# --- judging ---------------------------------------------------------------------------------------------------------


def magnitudes(case: Case) -> list[torch.Tensor]:
    """Outputs of the same call with every term made positive, fp64: what rounding errors scale with when terms cancel."""
    positive = {"u", "x", "B", "C", "D", "initial_state", "initial_states", "weight", "bias", "residual", "state", "conv_state",
                "features", "weights", "biases", "peg_weight", "peg_bias"}  # fmt: skip
    kwargs = {k: map_tensors(v, lambda t: t.abs()) if k in positive else v for k, v in case.kwargs.items()}
    if "activation" in kwargs:
        kwargs["activation"] = None  # SiLU's slope is at most 1.1
    return [m.abs() for m in selfcheck.expected(case._replace(kwargs=kwargs))]


def limit_of(case: Case, got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> float:
    """Absolute L2 limit: the relative one of the dtype, plus a few fp32 roundings of the terms that cancelled."""
    relative = OUTPUT[got.dtype]
    eps = 2.0**-53 if got.dtype == F64 else 2.0**-24
    terms = 8
    if "projector" in case.op:  # every layer is rounded to T
        relative, terms = {F64: 1e-13, F32: 1e-5}.get(got.dtype, 3 * relative), 64 if got.dtype in (F32, F64) else 2**16
    rounding = (want.to(got.dtype).double() - want).norm().item()  # of a few elements, one rounding alone can exceed the average
    return max(relative * want.norm().item(), 1.01 * rounding) + terms * eps * magnitude.norm().item()


def check(case: Case, backend: str) -> None:
    """Runs a case on `backend` with NaN-filled allocations, compares with fp64, and sees that no input was written."""
    flat: list[torch.Tensor] = []
    for name, value in case.kwargs.items():
        if name not in case.in_place:
            map_tensors(value, lambda t: flat.append(t) or t)
    before = [t.clone() for t in flat]
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN: an element never written shows
    try:
        outputs = [t.cpu() for t in selfcheck.run(case, backend)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(flat, before)), "an input was written"
    wanted = selfcheck.expected(case)
    sizes = None
    for index, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        assert got.shape == want.shape, f"output {index}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = (got.double() - want).norm().item()
        if error <= OUTPUT[got.dtype] * want.norm().item():
            continue
        sizes = sizes or magnitudes(case)
        limit = limit_of(case, got, want, sizes[index])
        assert error <= limit, f"output {index} ({got.dtype}): L2 error {error:.3e} > {limit:.3e}, norm {want.norm().item():.3e}"


# Ops with gradients, and the longest sequence whose gradients the reference computes in good time.
DIFFERENTIABLE = ("rms_norm", "causal_conv1d", "selective_scan", "mlp_projector", "ldp_projector")
MAX_STEPS = 140


def has_gradients(case: Case) -> bool:
    first = next(iter(case.kwargs.values()))
    if case.op == "rms_norm":  # LayerNorm of one channel: equal terms that cancel, times 1 / sqrt(eps)
        return case.kwargs["is_rms_norm"] or first.shape[-1] > 1
    return case.op in DIFFERENTIABLE and (case.op not in ("causal_conv1d", "selective_scan") or first.shape[-1] <= MAX_STEPS)


def check_gradients(case: Case, backend: str) -> None:
    """Gradients of the case's call on `backend`, with NaN-filled allocations, against fp64.

    Where terms cancel, the error may be twice that of the reference itself: in fp32, or in the call's own dtypes for the
    projectors, whose layers are rounded between (and once more than in the reference: they pool before the second layer).
    """
    outputs = len(selfcheck.run(case, backend))
    case = case._replace(gradients=True)
    torch.use_deterministic_algorithms(True)
    try:
        got = [t.cpu() for t in selfcheck.run(case, backend)][outputs:]
    finally:
        torch.use_deterministic_algorithms(False)
    wanted = selfcheck.expected(case)[outputs:]
    plain: list[torch.Tensor] = []
    for index, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g.shape == w.shape, f"gradient {index}: shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        error, rounding = (g.double() - w).norm().item(), (w.to(g.dtype).double() - w).norm().item()
        relative = GRADIENT[g.dtype] * (3 if "projector" in case.op and g.dtype in (F16, BF16) else 1)
        limit = max(relative * w.norm().item(), 1.01 * rounding)
        if error <= limit:
            continue
        plain = plain or selfcheck.run(case if "projector" in case.op else _in_fp32(case), "reference")[outputs:]
        own = (plain[index].double() - w).norm().item()
        assert error <= limit + 2 * own, f"gradient {index} ({g.dtype}): L2 error {error:.3e} > {limit:.3e} + 2 x {own:.3e}, norm {w.norm().item():.3e}"


def _in_fp32(case: Case) -> Case:
    """The same values; fp64 stays fp64."""
    return case._replace(kwargs={k: map_tensors(v, lambda t: t.float() if t.dtype in (F16, BF16) else t) for k, v in case.kwargs.items()})


def describe(case: Case) -> str:
    """One line per argument."""

    def text(value):
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype)[6:]} {tuple(value.shape)} strides {value.stride()}"
        return "(" + ", ".join(map(text, value)) + ")" if isinstance(value, tuple) else repr(value)

    return "\n".join([case.op, *(f"  {k} = {text(v)}" for k, v in case.kwargs.items())])


if __name__ == "__main__":
    for replayed in sys.argv[1:]:
        one = sample(int(replayed))
        print(describe(one))
        for name in ("reference", "cpu"):
            if cobra_kernels.backends()[name] is None:
                check(one, name)
                print(f"  ok on {name}")
