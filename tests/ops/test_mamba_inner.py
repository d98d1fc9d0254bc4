"""mamba_inner: an independent loop, every backend against the fp64 reference, every gradient, what it saves, edges, errors."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import cobra_kernels
from cobra_kernels import causal_conv1d, mamba_inner, selective_scan
from cobra_kernels import linear as linear_module
from cobra_kernels.errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError
from cobra_kernels.ops.mamba_inner import fused
from cobra_kernels.ops.mamba_inner.arguments import DIFFERENTIABLE
from tests.conftest import kernel_backends
from tests.tolerances import GEMM, GRADIENT, OUTPUT, assert_close, relative_error

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
KERNELS = kernel_backends()
BACKENDS = ["reference", *KERNELS]
NO_KERNELS = pytest.mark.skipif(not KERNELS, reason="no compiled kernels")
NORMS = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    batch: int = 2
    dim: int = 12
    seqlen: int = 19
    dstate: int = 5
    rank: int = 3
    d_model: int = 8
    width: int = 4
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # of the three products' weights; None: as xz
    layout: str = "channel_last"
    B: str = "made"  # made | constant | variable | one_group | groups
    C: str = "made"
    biases: str = "conv out delta"  # of: conv out delta B C
    norms: str = ""  # of: b c dt
    D: bool = True
    softplus: bool = True
    initial: bool = False
    packed: tuple[int, ...] | None = None  # lengths

    @property
    def id(self) -> str:
        base = Case()
        changed = [f"{k}={v}".replace("torch.", "") for k, v in self._asdict().items() if v != getattr(base, k)]
        return "-".join(changed).replace(" ", "+") or "base"


CASES = [
    Case(),
    *(Case(seqlen=n) for n in (0, 1, 2, 3, 63, 64, 65, 129)),
    *(Case(batch=n) for n in (0, 1, 5)),
    *(Case(dim=n) for n in (1, 17, 48)),
    *(Case(dstate=n) for n in (1, 16, 21)),
    *(Case(rank=n) for n in (1, 12)),
    *(Case(width=n) for n in (1, 2, 7)),
    Case(d_model=1),
    *(Case(layout=x) for x in ("channel_first", "dim_major", "sliced", "strided", "expanded", "unaligned")),
    Case(layout="channel_first", batch=1),
    *(Case(**{name: form}) for name in "BC" for form in ("constant", "variable", "one_group", "groups")),
    Case(B="constant", C="variable"),
    Case(B="groups", C="constant", initial=True),
    *(Case(biases=b) for b in ("", "conv", "out", "delta", "B", "C", "conv out delta B C")),
    *(Case(norms=n) for n in ("b", "c", "dt", "b c dt")),
    Case(norms="b c dt", biases="conv out delta B C"),
    Case(norms="b c", B="variable", C="one_group"),
    Case(D=False),
    Case(softplus=False, biases="conv out"),
    *(Case(initial=True, seqlen=n) for n in (0, 1, 2, 65)),
    *(Case(initial=i, batch=1, packed=(5, 1, 0, 9)) for i in (False, True)),
    Case(batch=1, packed=(70, 0, 59), seqlen=140, initial=True, norms="b c dt", biases="conv out delta B C"),
    Case(batch=1, packed=(), seqlen=4),
    *(Case(dtype=d, initial=True) for d in (F64, BF16, F16)),
    *(Case(dtype=d, weight_dtype=w) for d, w in ((F32, BF16), (BF16, F32), (F16, BF16))),
    Case(dtype=BF16, norms="b c dt", biases="conv out delta B C"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def make_inputs(case: Case, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    weights = case.weight_dtype or case.dtype
    wide = F64 if case.dtype == F64 else F32  # what stays wide beside 16-bit activations

    def randn(*shape, dtype=wide, scale=1.0):
        return (torch.randn(shape, generator=g, dtype=F64) * scale).to(dtype)

    def projection(form):
        steps = {
            "variable": (case.batch, case.dstate, case.seqlen),
            "one_group": (case.batch, 1, case.dstate, case.seqlen),
            "groups": (case.batch, 2, case.dstate, case.seqlen),
        }
        return None if form == "made" else randn(*((case.dim, case.dstate) if form == "constant" else steps[form]), dtype=case.dtype)

    b, d, n = case.batch, case.dim, case.dstate
    rows = b if case.packed is None else len(case.packed)
    made = (case.B == "made") + (case.C == "made")
    on = set(case.biases.split())
    inputs = {
        "xz": laid_out(randn(b, case.seqlen, 2 * d, dtype=case.dtype), case.layout),
        "conv1d_weight": randn(d, 1, case.width, scale=case.width**-0.5),
        "conv1d_bias": randn(d, scale=0.3) if "conv" in on else None,
        "x_proj_weight": randn(case.rank + made * n, d, dtype=weights, scale=1.5 * d**-0.5),
        "delta_proj_weight": randn(d, case.rank, dtype=weights, scale=case.rank**-0.5),
        "out_proj_weight": randn(case.d_model, d, dtype=weights, scale=d**-0.5),
        "out_proj_bias": randn(case.d_model, dtype=weights) if "out" in on else None,
        "A": -(torch.rand(d, n, generator=g, dtype=F64) * 1.5 + 0.05).to(wide),
        "B": projection(case.B),
        "C": projection(case.C),
        "D": randn(d) if case.D else None,
        "delta_bias": (randn(d) - 2) if "delta" in on else None,
        "B_proj_bias": randn(n) if "B" in on else None,
        "C_proj_bias": randn(n) if "C" in on else None,
        "delta_softplus": case.softplus,
        "b_rms_weight": randn(n) if "b" in case.norms.split() else None,
        "c_rms_weight": randn(n) if "c" in case.norms.split() else None,
        "dt_rms_weight": randn(d) if "dt" in case.norms.split() else None,
        "initial_conv_state": randn(rows, d, case.width - 1, dtype=case.dtype) if case.initial else None,
        "initial_ssm_state": randn(rows, d, n) if case.initial else None,
        "return_states": True,
    }
    if not case.softplus:  # a negative step would grow the state
        inputs["delta_bias"] = torch.full((d,), 3.0, dtype=wide)
        inputs["delta_proj_weight"] = inputs["delta_proj_weight"] * 0.2
    if case.packed is not None:
        inputs["cu_seqlens"] = F.pad(torch.tensor(case.packed, dtype=torch.int64).cumsum(0), (1, 0)).int()
    return inputs


def laid_out(tokens: torch.Tensor, layout: str) -> torch.Tensor:
    """(batch, seqlen, channels) -> (batch, channels, seqlen) of the same values, in some memory layout."""
    xz = tokens.transpose(1, 2)
    if layout == "channel_first":
        return xz.contiguous()
    if layout == "dim_major":  # as upstream's block makes it: (channels, batch * seqlen)
        return xz.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":  # inner view of a larger NaN-filled buffer
        outer = torch.full([n + 3 for n in tokens.shape], float("nan"), dtype=tokens.dtype)
        return outer[tuple(slice(1, 1 + n) for n in tokens.shape)].copy_(tokens).transpose(1, 2)
    if layout == "strided":
        return torch.stack([tokens, torch.full_like(tokens, float("nan"))], -1)[..., 0].transpose(1, 2)
    if layout == "expanded":
        return xz[:1].expand(xz.shape)
    if layout == "unaligned":
        return torch.cat([tokens.new_zeros(1), tokens.flatten()])[1:].view(tokens.shape).transpose(1, 2)
    return xz


def in_fp64(inputs: dict) -> dict:
    return {k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def weighted(outputs, seed: int = 1):
    """A scalar in which every output counts, differently."""
    g = torch.Generator().manual_seed(seed)
    return sum((o * torch.randn(o.shape, generator=g, dtype=F64).to(o.dtype)).sum() for o in outputs)


def run(inputs: dict, backend: str | None, **options) -> dict[str, torch.Tensor]:
    """Outputs and the gradient of every tensor."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    outputs = mamba_inner(**{**inputs, **leaves}, backend=backend, **options)
    weighted(outputs).backward()
    for t in leaves.values():
        if t.grad is None and backend == "reference":  # autograd's word for the zero gradient of what no step has touched
            t.grad = torch.zeros_like(t)
        assert t.grad.dtype == t.dtype and t.grad.shape == t.shape
    return dict(zip(("out", "conv_state", "ssm_state"), (o.detach() for o in outputs))) | {f"d{k}": t.grad for k, t in leaves.items()}


# --- the definition --------------------------------------------------------------------------------------------------


def plain(i: dict) -> list[torch.Tensor]:
    """One token after the other in fp64, sharing no op with the package."""
    xz, w = i["xz"], i["conv1d_weight"][:, 0]
    dim, width = w.shape
    n, rank = i["A"].shape[1], i["delta_proj_weight"].shape[1]
    silu = lambda v: v / (1 + torch.exp(-v))
    norm = lambda v, weight: v if weight is None else v / torch.sqrt((v * v).mean() + 1e-6) * weight
    add = lambda v, bias: v if bias is None else v + bias

    def of_step(given, columns, bias, weight, row, t):  # (dim, dstate)
        if given is None:
            return norm(add(columns, bias), weight).expand(dim, n)
        if given.dim() == 2:
            return given
        step = given[row, ..., t]
        if step.dim() == 1:
            return norm(step, weight).expand(dim, n)
        return torch.stack([norm(step[c * len(step) // dim], weight) for c in range(dim)])

    if i.get("cu_seqlens") is None:
        spans = [(row, 0, xz.shape[2]) for row in range(len(xz))]
    else:
        bounds = i["cu_seqlens"].tolist()
        spans = [(0, begin, end) for begin, end in zip(bounds, bounds[1:])]
    out = torch.zeros(len(xz), xz.shape[2], len(i["out_proj_weight"]), dtype=F64)
    convs, states = torch.zeros(len(spans), dim, width - 1, dtype=F64), torch.zeros(len(spans), dim, n, dtype=F64)
    for s, (row, begin, end) in enumerate(spans):
        past = list(i["initial_conv_state"][s].unbind(1)) if i["initial_conv_state"] is not None else [torch.zeros(dim, dtype=F64)] * (width - 1)
        h = i["initial_ssm_state"][s] if i["initial_ssm_state"] is not None else torch.zeros(dim, n, dtype=F64)
        for t in range(begin, end):
            x, z = xz[row, :dim, t], xz[row, dim:, t]
            window = [*past[len(past) - width + 1 :], x]
            past.append(x)
            u = silu(add(sum(w[:, k] * v for k, v in enumerate(window)), i["conv1d_bias"]))
            made = i["x_proj_weight"] @ u
            delta = add(norm(i["delta_proj_weight"] @ made[:rank], i["dt_rms_weight"]), i["delta_bias"])
            if i["delta_softplus"]:
                delta = torch.log1p(torch.exp(delta))
            B = of_step(i["B"], made[rank : rank + n], i["B_proj_bias"], i["b_rms_weight"], row, t)
            C = of_step(i["C"], made[-n:], i["C_proj_bias"], i["c_rms_weight"], row, t)
            h = torch.exp(delta[:, None] * i["A"]) * h + (delta * u)[:, None] * B
            y = (h * C).sum(1) + (0 if i["D"] is None else i["D"] * u)
            out[row, t] = add(i["out_proj_weight"] @ (y * silu(z)), i["out_proj_bias"])
        convs[s] = torch.stack(past[len(past) - width + 1 :], 1) if width > 1 else convs[s]
        states[s] = h
    return [out, convs, states]


@every_case
def test_the_reference_is_the_formula(case):
    inputs = in_fp64(make_inputs(case))
    for name, got, want in zip(("out", "conv_state", "ssm_state"), mamba_inner(**inputs, backend="reference"), plain(inputs)):
        assert_close(got, want, 1e-12, name)


# --- values, states and gradients ------------------------------------------------------------------------------------


@every_case
@every_backend
def test_values_states_and_gradients(case, backend):
    inputs = make_inputs(case)
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    got, want = run(inputs, backend), run(in_fp64(inputs), "reference")
    for name, tensor in inputs.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, before[name]), f"{name} was written"
    low = next((d for d in (case.dtype, case.weight_dtype) if d in (BF16, F16)), None)
    torchs = unfused(inputs) if low and case.B == case.C == "made" else {}
    for name, expected in want.items():
        if low is None:
            limit = {F32: GEMM, F64: GRADIENT[F64]}[case.dtype]
        else:  # every stage rounds: twice the error of the ops called one by one, or that of a few roundings
            limit = max(3 * OUTPUT[low], 2 * relative_error(torchs[name].double(), expected))
        assert_close(got[name], expected, limit, name)


def unfused(inputs: dict) -> dict[str, torch.Tensor]:
    """The same out of causal_conv1d, F.linear and selective_scan, in the dtypes given: how wrong 16 bits are."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    i = {**inputs, **leaves}
    dtype, n, rank = i["xz"].dtype, i["A"].shape[1], i["delta_proj_weight"].shape[1]

    def linear(x, weight, bias=None):
        common = torch.promote_types(x.dtype, weight.dtype)
        return F.linear(x.to(common), weight.to(common), None if bias is None else bias.to(common)).to(dtype)

    def norm(x, weight):
        return x if weight is None else cobra_kernels.rms_norm(x, weight)

    x, z = i["xz"].chunk(2, 1)
    u, conv_state = causal_conv1d(
        x, i["conv1d_weight"].squeeze(1), i["conv1d_bias"], initial_states=i["initial_conv_state"], return_final_states=True, activation="silu"
    )  # fmt: skip
    dt, B, C = linear(u.transpose(1, 2), i["x_proj_weight"]).split([rank, n, n], -1)
    B = norm(B if i["B_proj_bias"] is None else B + i["B_proj_bias"].to(dtype), i["b_rms_weight"])
    C = norm(C if i["C_proj_bias"] is None else C + i["C_proj_bias"].to(dtype), i["c_rms_weight"])
    delta = norm(linear(dt, i["delta_proj_weight"]), i["dt_rms_weight"])
    y, ssm_state = selective_scan(
        u, delta.transpose(1, 2), i["A"], B.transpose(1, 2), C.transpose(1, 2), i["D"], z, i["delta_bias"], True, True,
        initial_state=i["initial_ssm_state"],
    )  # fmt: skip
    outputs = (linear(y.transpose(1, 2), i["out_proj_weight"], i["out_proj_bias"]), conv_state, ssm_state)
    weighted(outputs).backward()
    return dict(zip(("out", "conv_state", "ssm_state"), (o.detach() for o in outputs))) | {f"d{k}": t.grad for k, t in leaves.items()}


@NO_KERNELS
@pytest.mark.parametrize("case", [Case(seqlen=65), Case(layout="channel_first"), Case(norms="b c dt", initial=True)], ids=lambda c: c.id)
def test_gradients_by_the_library_of_large_products(case, monkeypatch):
    """Small products stay with one library, and every other case here is small: the other one reads the same transposed views."""
    seen, original = [], linear_module._onednn
    if original is None:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(linear_module, "_onednn", lambda x, *rest: seen.append(x.shape) or original(x, *rest))
    monkeypatch.setattr(linear_module, "MIN_PRODUCTS", 1)
    inputs = make_inputs(case)
    got = run(inputs, "cpu")
    assert len(seen) == 9
    for name, want in run(in_fp64(inputs), "reference").items():
        assert_close(got[name], want, GEMM, name)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == F32][::3], ids=lambda c: c.id)
@pytest.mark.parametrize("backend", KERNELS)
def test_both_checkpoint_levels_and_every_run_give_the_same_bits(case, backend):
    inputs = make_inputs(case)
    first = run(inputs, backend)
    for level in (0, 1):
        again = run(inputs, backend, checkpoint_lvl=level)
        assert all(torch.equal(again[name], t) for name, t in first.items()), level


@every_backend
def test_outputs_are_shaped_as_told(backend):
    inputs = make_inputs(Case(dtype=BF16, initial=True))
    out, conv_state, ssm_state = mamba_inner(**inputs, backend=backend)
    assert out.shape == (2, 19, 8) and out.dtype == BF16 and out.is_contiguous()
    assert conv_state.shape == (2, 12, 3) and conv_state.dtype == BF16 and conv_state.is_contiguous()
    assert ssm_state.shape == (2, 12, 5) and ssm_state.dtype == F32 and ssm_state.is_contiguous()
    inputs["return_states"] = False
    assert torch.equal(mamba_inner(**inputs, backend=backend), out)


@every_backend
def test_gradients_that_arrive_expanded_transposed_or_not_at_all(backend):
    inputs = make_inputs(Case(initial=True))
    g = torch.randn(8, 19, 2, generator=torch.Generator().manual_seed(3)).permute(2, 1, 0)
    seeds = {"expanded": (torch.ones(()).expand(2, 19, 8), None, None), "transposed": (g, None, None), "states only": (None, g[:, :12, :3], g[:, :12, :5])}
    for what, (dout, dconv, dssm) in seeds.items():
        grads = []
        for who, given in ((backend, inputs), ("reference", in_fp64(inputs))):
            leaves = {k: v.detach().requires_grad_() for k, v in given.items() if isinstance(v, torch.Tensor)}
            outputs = mamba_inner(**{**given, **leaves}, backend=who)
            chosen = [(o, d) for o, d in zip(outputs, (dout, dconv, dssm)) if d is not None]
            if dconv is not None:
                chosen = [(o, d[..., : o.shape[-1]].expand(o.shape).to(o.dtype) if d.shape != o.shape else d.to(o.dtype)) for o, d in chosen]
            tensors = list(leaves.values())
            got = torch.autograd.grad([o for o, _ in chosen], tensors, [d.to(o.dtype) for o, d in chosen], allow_unused=True)
            grads.append(dict(zip(leaves, (torch.zeros_like(t) if x is None else x for t, x in zip(tensors, got)))))
        for name, want in grads[1].items():
            assert_close(grads[0][name], want, GEMM, f"{what}: {name}")


def sampled(count: int, seed: int = 0) -> list[Case]:
    """Small cases over all combinations of optional arguments."""
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        packed = rng.choice((None, None, (3, 0, 2)))
        cases.append(Case(
            batch=1 if packed else 2, dim=4, seqlen=rng.choice((1, 3, 6)) if not packed else 6, dstate=rng.choice((1, 3)), rank=2, d_model=3,
            width=rng.choice((1, 2, 4)), dtype=F64, layout=rng.choice(("channel_last", "channel_first", "dim_major")),
            B=(b := rng.choice(("made", "made", "constant", "variable", "groups"))), C=(c := rng.choice(("made", "made", "constant", "one_group"))),
            biases=" ".join(x for x in ("conv", "out", "delta", *("B",) * (b == "made"), *("C",) * (c == "made")) if rng.random() < 0.5),
            norms=" ".join(x for x in (*("b",) * (b in ("made", "variable")), *("c",) * (c != "constant"), "dt") if rng.random() < 0.4),
            D=rng.random() < 0.5, initial=rng.random() < 0.5, packed=packed,
        ))  # fmt: skip
    return cases


@pytest.mark.parametrize("case", sampled(40), ids=lambda c: c.id)
@pytest.mark.parametrize("backend", KERNELS)
def test_gradcheck(case, backend):
    inputs = make_inputs(case)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def call(*tensors):
        return mamba_inner(**{**inputs, **dict(zip(names, tensors))}, backend=backend, checkpoint_lvl=len(case.biases) % 2)

    assert torch.autograd.gradcheck(call, [inputs[n].detach().requires_grad_() for n in names], fast_mode=True, atol=1e-6)


# --- complex A -------------------------------------------------------------------------------------------------------


def complex_inputs(B: str = "made") -> dict:
    inputs = make_inputs(Case(dtype=F64, dim=4, seqlen=5, dstate=2, d_model=3, initial=True))
    g = torch.Generator().manual_seed(5)
    randn = lambda *shape, dtype=F64: torch.randn(shape, generator=g, dtype=dtype)
    inputs["A"] = torch.complex(inputs["A"], randn(4, 2))
    inputs["initial_ssm_state"] = randn(2, 4, 2, dtype=torch.complex128)
    inputs["x_proj_weight"] = randn(3 + (8 if B == "made" else 4), 4)
    inputs["C_proj_bias"] = randn(4)
    if B != "made":
        inputs["B"] = randn(4, 2, dtype=torch.complex128) if B == "constant" else randn(2, 2, 10)
    return inputs


@pytest.mark.parametrize("B", ["made", "constant", "variable"])
def test_complex_A_on_the_reference(B):
    inputs = complex_inputs(B)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor)]

    def call(*tensors):
        out, conv_state, ssm_state = mamba_inner(**{**inputs, **dict(zip(names, tensors))}, backend="reference")
        return out, conv_state, torch.view_as_real(ssm_state)

    assert torch.autograd.gradcheck(call, [inputs[n].detach().requires_grad_() for n in names], fast_mode=True, atol=1e-6)
    # Conjugate pairs: a complex scan whose imaginary parts are 0 is twice the real one.
    if B == "made":
        real = make_inputs(Case(dtype=F64, dim=4, seqlen=5, dstate=2, d_model=3, D=False, biases="delta"))
        split = lambda w: torch.stack([w, torch.zeros_like(w)], 1).flatten(0, 1)  # rows (re, im), (re, im), ..
        w = real["x_proj_weight"]
        paired = {**real, "A": real["A"] + 0j, "x_proj_weight": torch.cat([w[:3], split(w[3:5]), split(w[5:])])}
        assert_close(mamba_inner(**paired, backend="reference")[0], 2 * mamba_inner(**real, backend="reference")[0], 1e-12)


@NO_KERNELS
def test_complex_A_is_refused_by_the_kernels_and_left_to_the_reference():
    inputs = complex_inputs()
    with pytest.raises(BackendUnavailable, match="mamba_inner: backend 'cpu' cannot serve: complex A is served by reference only"):
        mamba_inner(**inputs, backend="cpu")
    inputs.pop("return_states")
    assert cobra_kernels.supports("mamba_inner", **inputs)[1].startswith("reference")


# --- packed sequences ------------------------------------------------------------------------------------------------


@every_backend
def test_packed_sequences_equal_separate_ones_and_padding_is_zero(backend):
    lengths, seqlen = (5, 1, 0, 66, 3), 80
    case = Case(batch=1, seqlen=seqlen, packed=lengths, initial=True, biases="conv out delta B C")
    inputs = make_inputs(case)
    with torch.no_grad():
        inputs["xz"][..., sum(lengths) :] = float("nan")  # nothing of padding may be read
    leaf = inputs["xz"].detach().requires_grad_()
    out, conv_state, ssm_state = mamba_inner(**{**inputs, "xz": leaf}, backend=backend)
    assert not out[:, sum(lengths) :].any()
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    dout[:, sum(lengths) :] = float("nan")
    (dxz,) = torch.autograd.grad(out, leaf, dout)
    assert not dxz[..., sum(lengths) :].any()
    begin = 0
    for i, length in enumerate(lengths):
        one = {**inputs, "xz": inputs["xz"][..., begin : begin + length].detach().requires_grad_(), "cu_seqlens": None}
        one |= {k: inputs[k][i : i + 1] for k in ("initial_conv_state", "initial_ssm_state")}
        alone, conv_alone, ssm_alone = mamba_inner(**one, backend=backend)
        assert_close(out[:, begin : begin + length], alone, GEMM, f"sequence {i}")
        assert_close(conv_state[i : i + 1], conv_alone, 0.0, f"conv_state {i}")
        assert_close(ssm_state[i : i + 1], ssm_alone, GEMM, f"ssm_state {i}")
        (dalone,) = torch.autograd.grad(alone, one["xz"], dout[:, begin : begin + length])
        assert_close(dxz[..., begin : begin + length], dalone, GEMM, f"gradient {i}")
        begin += length


@every_backend
def test_a_block_in_two_pieces_equals_one(backend):
    inputs = make_inputs(Case(seqlen=70, initial=True))
    out, conv_state, ssm_state = mamba_inner(**inputs, backend=backend)
    first = mamba_inner(**{**inputs, "xz": inputs["xz"][..., :23]}, backend=backend)
    states = {"initial_conv_state": first[1], "initial_ssm_state": first[2]}
    second = mamba_inner(**{**inputs, "xz": inputs["xz"][..., 23:], **states}, backend=backend)
    assert_close(torch.cat([first[0], second[0]], 1), out, GEMM)
    assert_close(second[1], conv_state, 0.0)
    assert_close(second[2], ssm_state, GEMM)


# --- what it keeps ---------------------------------------------------------------------------------------------------


def saved_bytes(call) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of call()."""
    storages: dict[int, int] = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = call()
    assert kept is not None
    return sum(storages.values())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("level", [0, 1])
def test_bytes_saved_per_token(backend, level):
    """Level 1: xz and x_proj's output. Level 0: also convolution, delta, the scan's output, and its state every 64 steps."""
    case = Case(dim=64, dstate=16, rank=4, d_model=32)
    per_token = []
    for seqlen in (128, 1152):
        inputs = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in make_inputs(case._replace(seqlen=seqlen)).items()}
        per_token.append(saved_bytes(lambda i=inputs: mamba_inner(**i, backend=backend, checkpoint_lvl=level)))
    tokens = case.batch * 1024
    expected = 4 * (2 * case.dim + case.rank + 2 * case.dstate)
    if level == 0:
        expected += 4 * (3 * case.dim + case.dim * case.dstate // 64)
    assert (per_token[1] - per_token[0]) / tokens == expected


@NO_KERNELS
def test_products_for_gradients_that_nobody_wants_are_not_made(monkeypatch):
    """A frozen block passes gradients on: three products forward; delta again, dy, dt and du; none for weights."""
    full = run(make_inputs(Case()), "cpu")
    products, linear = [], fused.linear
    monkeypatch.setattr(fused, "linear", lambda x, weight, bias=None: products.append(weight.shape) or linear(x, weight, bias))
    counts = {}
    for what in ("xz", "all"):
        inputs = make_inputs(Case())
        inputs |= {k: v.detach().requires_grad_(what == "all" or k == what) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        weighted(mamba_inner(**inputs, backend="cpu")).backward()
        counts[what] = len(products)
        products.clear()
        assert torch.equal(inputs["xz"].grad, full["dxz"])
    assert counts == {"xz": 6, "all": 9}  # du's is added in place, by addmm


def test_who_ran():
    if not KERNELS:
        pytest.skip("no compiled kernels")
    cobra_kernels.reset_call_counts()
    run(make_inputs(Case()), None)
    counts = cobra_kernels.call_counts()
    assert counts["mamba_inner", "cpu"] == counts["mamba_inner_bwd", "cpu"] == 1
    assert counts["causal_conv1d", "cpu"] == 2 and counts["selective_scan", "cpu"] == 2  # forward, and made again for the backward
    with torch.no_grad():
        mamba_inner(**make_inputs(Case()))
    assert cobra_kernels.call_counts()["mamba_inner", "cpu"] == 2


# --- torch: opcheck, compile, autocast, checkpoint, func ---------------------------------------------------------------

OPCHECKED = [  # checkpoint levels 0 and 1 in turn
    Case(),
    Case(seqlen=65, initial=True),
    Case(layout="channel_first", norms="b c dt"),
    Case(B="constant", C="variable"),
    Case(biases="conv out delta B C", norms="b dt"),
    Case(batch=1, packed=(5, 1, 0, 9), initial=True),
    Case(D=False, biases=""),
    Case(dtype=BF16),
    Case(dtype=BF16, weight_dtype=F32),
    Case(seqlen=0),
]


@pytest.mark.parametrize("level, case", [(i % 2, c) for i, c in enumerate(OPCHECKED)], ids=lambda v: v.id if isinstance(v, Case) else str(v))
@NO_KERNELS
def test_opcheck(level, case):
    inputs = make_inputs(case)
    given = [inputs.get(name) for name in (*DIFFERENTIABLE, "cu_seqlens")]
    given = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in given]
    torch.library.opcheck(torch.ops.cobra_kernels.mamba_inner.default, (*given, True, 1e-6, True, level, None, "cpu"))


@NO_KERNELS
def test_compile_forward_and_backward_without_a_break():
    inputs = make_inputs(Case(initial=True))
    expected = run(inputs, "cpu")
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    options = {k: v for k, v in inputs.items() if not isinstance(v, torch.Tensor)}
    torch._dynamo.reset()
    call = torch.compile(lambda tensors: mamba_inner(**tensors, **options, backend="cpu"), fullgraph=True, backend="aot_eager")
    outputs = call(leaves)
    weighted(outputs).backward()
    for name, got in zip(("out", "conv_state", "ssm_state"), outputs):
        assert_close(got, expected[name], GEMM, name)
    for name, leaf in leaves.items():
        assert_close(leaf.grad, expected[f"d{name}"], GEMM, name)


@every_backend
def test_autocast_casts_the_operands_of_the_products_only(backend):
    inputs = make_inputs(Case(seqlen=40))
    del inputs["return_states"]
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    with torch.autocast("cpu", dtype=BF16):
        out = mamba_inner(**{**inputs, **leaves}, backend=backend)
    assert out.dtype == BF16
    out.float().square().sum().backward()

    others = {k: v.detach().clone().requires_grad_() for k, v in leaves.items()}
    with torch.autocast("cpu", dtype=BF16):  # the ops one by one
        i = {**inputs, **others}
        x, z = i["xz"].chunk(2, 1)
        u = causal_conv1d(x, i["conv1d_weight"].squeeze(1), i["conv1d_bias"], activation="silu", backend=backend)
        dt, B, C = F.linear(u.transpose(1, 2), i["x_proj_weight"]).split([3, 5, 5], -1)
        delta = F.linear(dt, i["delta_proj_weight"]).transpose(1, 2)
        y = selective_scan(u, delta, i["A"], B.transpose(1, 2), C.transpose(1, 2), i["D"], z, i["delta_bias"], True, backend=backend)
        assert u.dtype == y.dtype == F32 and B.dtype == BF16
        expected = F.linear(y.transpose(1, 2), i["out_proj_weight"], i["out_proj_bias"])
    assert_close(out, expected, 1e-6)
    expected.float().square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == F32
        assert_close(leaf.grad, others[name].grad, 3 * OUTPUT[BF16], name)


@pytest.mark.parametrize("backend", KERNELS)  # the reference's backward is torch's own
def test_a_backward_inside_autocast_stays_in_fp32(backend):
    inputs = make_inputs(Case())
    expected = run(inputs, backend)
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    loss = weighted(mamba_inner(**{**inputs, **leaves}, backend=backend))
    with torch.autocast("cpu", dtype=BF16):
        loss.backward()
    assert all(torch.equal(leaf.grad, expected[f"d{name}"]) for name, leaf in leaves.items())


@NO_KERNELS
def test_a_bias_gradient_is_summed_in_fp32_and_rounded_once():
    inputs = make_inputs(Case(dtype=BF16, seqlen=129))
    inputs["out_proj_bias"].requires_grad_()
    dout = torch.randn(2, 129, 8, generator=torch.Generator().manual_seed(4)).bfloat16()
    mamba_inner(**inputs, backend="cpu")[0].backward(dout)
    assert torch.equal(inputs["out_proj_bias"].grad, dout.sum((0, 1), dtype=F32).bfloat16())


@every_backend
def test_fp64_ignores_autocast(backend):
    inputs = make_inputs(Case(dtype=F64))
    with torch.autocast("cpu", dtype=BF16):
        got = mamba_inner(**inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, mamba_inner(**inputs, backend=backend)))


@every_backend
def test_activation_checkpointing_gives_the_same_bits(backend):
    inputs = make_inputs(Case(initial=True))
    expected = run(inputs, backend)
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    outputs = checkpoint(lambda: mamba_inner(**{**inputs, **leaves}, backend=backend), use_reentrant=False)
    weighted(outputs).backward()
    assert all(torch.equal(leaf.grad, expected[f"d{name}"]) for name, leaf in leaves.items())


def test_func_grad_goes_through_the_reference_and_kernels_say_why_not():
    inputs = make_inputs(Case())
    expected = run(inputs, "reference")["dxz"]
    with pytest.warns(RuntimeWarning, match="mamba_inner runs on 'reference'") if KERNELS else pytest.MonkeyPatch.context():
        cobra_kernels.dispatch._warned.discard(("mamba_inner", "reference"))
        got = torch.func.grad(lambda xz: weighted(mamba_inner(**{**inputs, "xz": xz})))(inputs["xz"])
    assert_close(got, expected, 1e-6)
    if KERNELS:
        with pytest.raises(BackendUnavailable, match="torch.func transforms"):
            torch.func.grad(lambda xz: weighted(mamba_inner(**{**inputs, "xz": xz}, backend="cpu")))(inputs["xz"])


@NO_KERNELS
def test_double_backward_is_refused_by_name():
    inputs = make_inputs(Case())
    xz = inputs["xz"].detach().requires_grad_()
    (dxz,) = torch.autograd.grad(mamba_inner(**{**inputs, "xz": xz}, backend="cpu")[0].square().sum(), xz, create_graph=True)
    with pytest.raises(RuntimeError, match="cobra_kernels.mamba_inner_bwd: double backward is not supported"):
        dxz.sum().backward()


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = [
    (ShapeError, r"xz has shape \(2, 23, 19\), expected \(batch, 2 \* dim, seqlen\)", {"xz": torch.randn(2, 23, 19)}),
    (ShapeError, r"conv1d_weight has shape \(12, 4\), expected \(dim=12, 1, width >= 1\)", {"conv1d_weight": torch.randn(12, 4)}),
    (ShapeError, r"conv1d_bias has shape \(11,\), expected \(dim=12\)", {"conv1d_bias": torch.randn(11)}),
    (ShapeError, r"x_proj_weight has shape \(12, 12\), expected \(dt_rank \+ dstate for B \+ dstate for C=13, dim=12\)", {"x_proj_weight": torch.randn(12, 12)}),
    (ShapeError, r"expected \(dt_rank \+ dstate for C=8, dim=12\)", {"B": torch.randn(12, 5)}),
    (ShapeError, r"delta_proj_weight has shape \(11, 3\)", {"delta_proj_weight": torch.randn(11, 3)}),
    (ShapeError, r"out_proj_weight has shape \(8, 11\)", {"out_proj_weight": torch.randn(8, 11)}),
    (ShapeError, r"out_proj_bias has shape \(7,\), expected \(d_model=8\)", {"out_proj_bias": torch.randn(7)}),
    (ShapeError, r"A has shape \(11, 5\), expected \(dim=12, dstate >= 1\)", {"A": torch.randn(11, 5)}),
    (ShapeError, r"D has shape \(5,\)", {"D": torch.randn(5)}),
    (ShapeError, r"delta_bias has shape \(5,\)", {"delta_bias": torch.randn(5)}),
    (ShapeError, r"dt_rms_weight has shape \(3,\), expected \(dim=12\)", {"dt_rms_weight": torch.randn(3)}),
    (ShapeError, r"b_rms_weight has shape \(4,\), expected \(dstate=5\)", {"b_rms_weight": torch.randn(4)}),
    (ShapeError, r"C_proj_bias has shape \(4,\), expected \(dstate=5\)", {"C_proj_bias": torch.randn(4)}),
    (ShapeError, r"B has shape \(2, 5, 18\), expected \(12, 5\), \(2, 5, 19\) or \(2, groups, 5, 19\)", {"B": torch.randn(2, 5, 18), "x_proj_weight": torch.randn(8, 12)}),
    (ShapeError, r"C has 5 groups, expected a divisor of dim=12", {"C": torch.randn(2, 5, 5, 19), "x_proj_weight": torch.randn(8, 12)}),
    (ArgumentError, "B_proj_bias was given with B", {"B": torch.randn(12, 5), "B_proj_bias": torch.randn(5), "x_proj_weight": torch.randn(8, 12)}),
    (ArgumentError, r"b_rms_weight was given with B of shape \(12, 5\)", {"B": torch.randn(12, 5), "b_rms_weight": torch.randn(5), "x_proj_weight": torch.randn(8, 12)}),
    (ArgumentError, "checkpoint_lvl is 2, expected 0 or 1", {"checkpoint_lvl": 2}),
    (ShapeError, r"initial_conv_state has shape \(2, 12, 4\), expected \(batch=2, dim=12, width - 1=3\)", {"initial_conv_state": torch.randn(2, 12, 4)}),
    (ShapeError, r"initial_ssm_state has shape \(1, 12, 5\), expected \(batch=2, dim=12, dstate=5\)", {"initial_ssm_state": torch.randn(1, 12, 5)}),
    (ShapeError, "xz has batch=2, expected 1 with cu_seqlens", {"cu_seqlens": torch.tensor([0, 19])}),
    (DtypeError, "cu_seqlens has dtype float32", {"cu_seqlens": torch.tensor([0.0, 19.0])}),
    (DtypeError, "xz has dtype int64", {"xz": torch.ones(2, 24, 19, dtype=torch.int64)}),
    (DtypeError, "out_proj_weight is None", {"out_proj_weight": None}),
    (DtypeError, "D has dtype float64, xz has float32", {"D": torch.randn(12, dtype=F64)}),
    (DtypeError, "A has dtype complex128, expected complex64", {"A": torch.randn(12, 5, dtype=torch.complex128)}),
]  # fmt: skip


@pytest.mark.parametrize("error, message, changes", ERRORS, ids=[f"{i}-{'-'.join(e[2])}" for i, e in enumerate(ERRORS)])
def test_errors(error, message, changes):
    with pytest.raises(error, match=f"mamba_inner: .*{message}"):
        mamba_inner(**{**make_inputs(Case()), **changes})


def test_bad_boundaries_are_named():
    inputs = make_inputs(Case(batch=1))
    for bounds, message in (([1, 19], r"cu_seqlens\[0\] is 1"), ([0, 9, 5], r"cu_seqlens\[2\] is 5"), ([0, 20], r"cu_seqlens\[-1\] is 20, expected at most seqlen=19")):
        with pytest.raises(ArgumentError, match=message):
            mamba_inner(**inputs, cu_seqlens=torch.tensor(bounds))
