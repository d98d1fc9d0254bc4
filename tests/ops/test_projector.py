"""mlp_projector and ldp_projector: independent loops, every backend against the fp64 reference, gradients, edges, errors."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cobra_kernels
from cobra_kernels import ldp_projector, mlp_projector
from cobra_kernels.dispatch import triton_absence
from cobra_kernels.errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError
from cobra_kernels.ops.projector import backward, cpu_kernel, cuda_kernel
from cobra_kernels.ops.projector import op as projector_op
from tests.conftest import kernel_backends
from tests.tolerances import GEMM, GRADIENT, OUTPUT, assert_close, relative_error

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BACKENDS = ["reference", *kernel_backends()]
LIMIT = OUTPUT | {F32: GEMM}  # fp32 sums are the library's
NO_TRITON = triton_absence() is not None
NO_KERNELS = pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")


class Case(NamedTuple):
    """The base case; each row of the tables varies one thing."""

    lead: tuple[int, ...] = (2, 9)  # before the channels; LDP: (batch, H*W)
    vision: tuple[int, ...] = (20, 13)
    widths: tuple[int, ...] = (40, 17)  # out of each layer
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # None: as the features
    bias: bool = True
    layout: str = "contiguous"  # contiguous | transposed | sliced | unaligned | expanded
    grid: tuple[int, int] | None = None
    out_grid: tuple[int, int] = (2, 2)

    @property
    def id(self) -> str:
        base = Case()
        changed = [f"{k}={v}".replace("torch.", "") for k, v in self._asdict().items() if v != getattr(base, k)]
        return "-".join(changed).replace(" ", "") or "base"


MLP_CASES = [
    Case(),
    *(Case(widths=w) for w in ((17,), (40, 30, 17), (8, 8, 8, 8, 8), (1, 1), (257, 1), (300, 33, 64), (15, 16))),
    *(Case(vision=v) for v in ((33,), (1, 1, 1), (0, 5), (16, 17, 1, 30))),
    *(Case(lead=x) for x in ((), (1,), (0,), (5, 0), (65,), (2, 3, 4, 1), (1, 729))),
    *(Case(dtype=d, widths=(40, 30, 17)) for d in (BF16, F16, F64)),
    *(Case(dtype=d, weight_dtype=w) for d, w in ((F32, BF16), (BF16, F32), (BF16, F16), (F16, F32))),
    Case(bias=False),
    Case(bias=False, dtype=BF16),
    *(Case(lead=(5, 6), layout=x, dtype=d) for x in ("transposed", "sliced", "unaligned", "expanded") for d in (F32, BF16)),
]
LDP_CASES = [
    Case(lead=(2, 9)),
    *(Case(lead=(2, h * w), grid=(h, w), out_grid=o) for h, w, o in (
        (1, 1, (1, 1)), (1, 1, (3, 2)), (5, 7, (5, 7)), (5, 7, (1, 1)), (5, 7, (2, 3)), (5, 7, (4, 5)), (3, 4, (7, 9)), (1, 9, (1, 4)),
        (27, 27, (14, 14)), (8, 8, (4, 4)))),
    *(Case(widths=w) for w in ((257, 300), (1, 1), (16, 255), (513, 31))),
    *(Case(lead=(b, 9)) for b in (0, 1, 5)),
    *(Case(dtype=d, lead=(2, 25), out_grid=(3, 3)) for d in (BF16, F16, F64)),
    *(Case(dtype=d, weight_dtype=w) for d, w in ((F32, BF16), (BF16, F32), (F16, BF16))),
    Case(bias=False),
    *(Case(lead=(4, 9), layout=x) for x in ("transposed", "sliced", "unaligned", "expanded")),
]  # fmt: skip


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # inner view of a larger NaN-filled buffer
        outer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
        return outer[tuple(slice(1, 1 + n) for n in t.shape)].copy_(t)
    if layout == "unaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    if layout == "expanded" and t.dim() > 1:
        return t[:1].expand(t.shape)
    return t


def make_inputs(case: Case, ldp: bool, seed: int = 0) -> list[torch.Tensor | None]:
    """Features, weights, biases and for LDP the two of the encoding, flat; weights keep the activations near 1."""
    g = torch.Generator().manual_seed(seed)

    def randn(shape, dtype, scale=1.0):
        return laid_out((torch.randn(shape, generator=g, dtype=F64) * scale).to(dtype), case.layout)

    dtype = case.weight_dtype or case.dtype
    widths = [sum(case.vision), *case.widths]
    tensors = [randn((*case.lead, v), case.dtype) for v in case.vision]
    tensors += [randn((out, into), dtype, max(1, into) ** -0.5) for into, out in zip(widths, widths[1:])]
    tensors += [randn((out,), dtype) if case.bias else None for out in widths[1:]]
    if ldp:
        tensors += [randn((widths[-1], 1, 3, 3), dtype, 0.3), randn((widths[-1],), dtype) if case.bias else None]
    return tensors


def split(case: Case, tensors: list) -> tuple[list, list, list, list]:
    k, n = len(case.vision), len(case.widths)
    return tensors[:k], tensors[k : k + n], tensors[k + n : k + 2 * n], tensors[k + 2 * n :]


def run(case: Case, tensors: list, backend: str | None, ldp: bool) -> torch.Tensor:
    features, weights, biases, peg = split(case, tensors)
    if ldp:
        return ldp_projector(features, weights, biases, *peg, grid=case.grid, out_grid=case.out_grid, backend=backend)
    return mlp_projector(features, weights, biases, backend=backend)


def in_fp64(tensors: list) -> list:
    return [None if t is None else t.detach().double() for t in tensors]


def assert_rounded(got: torch.Tensor, expected: torch.Tensor, limit: float, what: str, roundings: int = 1) -> None:
    """Within the limit of `roundings` independent roundings, or 2x the exact value's own: in a small tensor one element can carry
    the norm. A 16-bit layer rounds once; the encoding, and what is pooled, once more each."""
    if got.dtype in (BF16, F16):
        limit = limit * roundings**0.5
    assert_close(got, expected, max(limit, 2 * relative_error(expected.to(got.dtype), expected)), what)


def roundings(case: Case, ldp: bool) -> int:
    return len(case.widths) + 2 * ldp


both = pytest.mark.parametrize("ldp", [False, True], ids=["mlp", "ldp"])
ALL_CASES = [
    pytest.param(c, ldp, id=f"{name}-{c.id}") for name, ldp, cs in (("mlp", False, MLP_CASES), ("ldp", True, LDP_CASES)) for c in cs
]
every_case = pytest.mark.parametrize("case, ldp", ALL_CASES)


# --- the definition, one number at a time -----------------------------------------------------------------------------


def plain_layers(rows: np.ndarray, weights: list, biases: list) -> np.ndarray:
    for i, (weight, bias) in enumerate(zip(weights, biases)):
        out = np.zeros((len(rows), len(weight)))
        for r, o in np.ndindex(out.shape):
            x = rows[r]
            if i > 0:
                x = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
            out[r, o] = sum(x[k] * weight[o][k] for k in range(len(x))) + (0.0 if bias is None else bias[o])
        rows = out
    return rows


def arrays(tensors: list) -> list:
    return [None if t is None else t.numpy() for t in tensors]


@pytest.mark.parametrize("widths", [(3,), (4, 3), (4, 2, 3)])
def test_mlp_reference_against_a_plain_loop(widths):
    case = Case(lead=(3,), vision=(2, 3), widths=widths, dtype=F64)
    tensors = make_inputs(case, ldp=False)
    features, weights, biases, _ = split(case, arrays(tensors))
    expected = plain_layers(np.concatenate(features, -1), weights, biases)
    assert_close(run(case, tensors, "reference", False), torch.from_numpy(expected), 1e-14)


@pytest.mark.parametrize("grid, out_grid", [((3, 5), (2, 3)), ((2, 2), (3, 3)), ((4, 4), (2, 2))])
def test_ldp_reference_against_a_plain_loop(grid, out_grid):
    (H, W), (h, w) = grid, out_grid
    case = Case(lead=(2, H * W), vision=(2, 1), widths=(4, 3), dtype=F64, grid=grid, out_grid=out_grid)
    tensors = make_inputs(case, ldp=True)
    features, weights, biases, (peg_weight, peg_bias) = split(case, arrays(tensors))
    expected = np.zeros((2, h * w, 3))
    for b in range(2):
        rows = plain_layers(np.concatenate([f[b] for f in features], -1), weights, biases)
        p = np.zeros((h, w, 3))
        for i, j in np.ndindex(h, w):
            ys, xs = range(i * H // h, -(-(i + 1) * H // h)), range(j * W // w, -(-(j + 1) * W // w))
            p[i, j] = sum(rows[y * W + x] for y in ys for x in xs) / (len(ys) * len(xs))
        for i, j, c in np.ndindex(h, w, 3):
            y = p[i, j, c] + peg_bias[c]
            for di, dj in np.ndindex(3, 3):
                if 0 <= i + di - 1 < h and 0 <= j + dj - 1 < w:
                    y += peg_weight[c, 0, di, dj] * p[i + di - 1, j + dj - 1, c]
            expected[b, i * w + j, c] = y
    assert_close(run(case, tensors, "reference", True), torch.from_numpy(expected), 1e-14)


# --- values ----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_values(case, ldp, backend):
    tensors = make_inputs(case, ldp)
    out = run(case, tensors, backend, ldp)
    assert out.dtype == case.dtype and out.is_contiguous()
    assert_rounded(out, run(case, in_fp64(tensors), "reference", ldp), LIMIT[out.dtype], f"out[{backend}]", roundings(case, ldp))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@both
def test_every_level(cpu_level, dtype, ldp):
    for widths in ((1, 1), (17, 5), (256, 16), (300, 257)):
        case = Case(lead=(2, 35), widths=widths, dtype=dtype, grid=(5, 7), out_grid=(3, 4))
        tensors = make_inputs(case, ldp)
        out = run(case, tensors, "cpu", ldp)
        assert_rounded(out, run(case, in_fp64(tensors), "reference", ldp), LIMIT[dtype], case.id, roundings(case, ldp))


@NO_KERNELS
@pytest.mark.parametrize("bf16_products", [True, False])
@both
def test_bf16_with_and_without_bf16_products(monkeypatch, bf16_products, ldp):
    """Both ways a processor may take; on one without the instructions the library emulates them, slowly but right."""
    monkeypatch.setattr(cpu_kernel, "_has_bf16_products", lambda: bf16_products)
    case = Case(lead=(2, 35), vision=(64, 32), widths=(96, 48), dtype=BF16, grid=(5, 7), out_grid=(3, 4))
    tensors = make_inputs(case, ldp)
    out = run(case, tensors, "cpu", ldp)
    assert_rounded(out, run(case, in_fp64(tensors), "reference", ldp), LIMIT[BF16], "out", roundings(case, ldp))


@NO_KERNELS
def test_gelu_keeps_its_digits_in_the_tail(cpu_level):
    """Relative, element by element: 1 + erf would have lost every digit at -6."""
    x = torch.linspace(-9, 9, 20001).reshape(1, -1)
    wide = x.double()
    expected = 0.5 * wide * torch.special.erfc(-wide / math.sqrt(2))
    h = x.clone()
    torch.ops.cobra_kernels.projector_bias_gelu_(h, None, F32)
    error = ((h.double() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()
    assert error <= 4e-6, error  # the tail multiplies the rounding of x^2 / 2 by its size
    inner = (h.double() - expected)[wide.abs() < 3].norm() / expected[wide.abs() < 3].norm()
    assert inner <= 2e-7
    special = torch.tensor([[float("nan"), float("inf"), -1e30, 1e30, 0.0]])
    torch.ops.cobra_kernels.projector_bias_gelu_(special, None, F32)
    assert special[0, 0].isnan() and special[0, 1] == float("inf") and special[0, 2:].tolist() == [0.0, torch.tensor(1e30).item(), 0.0]


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("seed", range(4))
def test_sampled(backend, seed):
    """40 boundary shapes per seed, every option drawn; replay one with make_inputs(case, ldp, seed * 1000 + i)."""
    rng = random.Random(seed)
    sizes = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 256, 257)
    for i in range(40):
        ldp = rng.random() < 0.5
        grid = (rng.choice((1, 2, 3, 5, 8, 9)), rng.choice((1, 2, 3, 5, 8, 9)))
        lead = (rng.choice((0, 1, 2, 3)), grid[0] * grid[1]) if ldp else rng.choice(((), (1,), (7,), (3, 5), (0, 4), (65,)))
        case = Case(
            lead=lead, vision=tuple(rng.choice(sizes) for _ in range(rng.choice((1, 1, 2, 3)))),
            widths=tuple(rng.choice(sizes) for _ in range(2 if ldp else rng.choice((1, 2, 3)))), dtype=rng.choice((F32, BF16, F16)),
            weight_dtype=rng.choice((None, F32, BF16, F16)), bias=rng.random() < 0.8,
            layout=rng.choice(("contiguous", "transposed", "sliced", "unaligned", "expanded")), grid=grid,
            out_grid=(rng.choice((1, 2, 3, 4, 7)), rng.choice((1, 2, 3, 4, 7))),
        )  # fmt: skip
        tensors = make_inputs(case, ldp, seed * 1000 + i)
        expected = run(case, in_fp64(tensors), "reference", ldp)
        what = f"seed {seed * 1000 + i}, ldp {ldp}, {case.id}"
        assert_rounded(run(case, tensors, backend, ldp), expected, LIMIT[case.dtype], what, roundings(case, ldp))


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_are_read_as_if_concatenated(backend):
    case = Case(vision=(5, 7, 1))
    tensors = make_inputs(case, ldp=False)
    features, weights, biases, _ = split(case, tensors)
    whole = mlp_projector(torch.cat(features, -1), weights, biases, backend=backend)
    assert torch.equal(mlp_projector(features, weights, biases, backend=backend), whole)
    assert torch.equal(mlp_projector(tuple(features), tuple(weights), biases, backend=backend), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pooling_before_the_second_layer_is_pooling_after_it(backend):
    """A layer is affine and a bin's weights sum to 1; identity filters of the encoding double what was pooled."""
    case = Case(lead=(1, 729), widths=(64, 32), out_grid=(14, 14))
    tensors = make_inputs(case, ldp=True)
    features, weights, biases, _ = split(case, tensors)
    peg = torch.zeros(32, 1, 3, 3)
    peg[:, 0, 1, 1] = 1
    out = ldp_projector(features, weights, biases, peg, None, backend=backend)
    h = mlp_projector(features, weights, biases, backend="reference").transpose(1, 2).reshape(1, 32, 27, 27)
    assert_close(out, 2 * F.adaptive_avg_pool2d(h, (14, 14)).flatten(2).transpose(1, 2), GEMM)


# --- what a GPU runs, strung together here -----------------------------------------------------------------------------


@pytest.fixture
def gpu_calls(monkeypatch):
    """The GPU's own ops in plain torch for CPU tensors; a list of the layers that our product kernel was asked for."""
    calls = []

    def linear(x, weight, bias, gelu, warps, dtype=None):
        assert cuda_kernel.kernel_serves(x, weight)
        calls.append([t.data_ptr() for t in x])
        h = F.linear(torch.cat(x, -1).float(), weight.float(), None if bias is None else bias.float())
        return (F.gelu(h) if gelu else h).to(dtype or weight.dtype)

    def pool(hidden, bias, height, width, out_height, out_width, gelu, dtype):
        h = hidden if bias is None else hidden + bias
        h = F.gelu(h) if gelu else hidden.float()
        image = h.transpose(1, 2).unflatten(2, (height, width))
        return F.adaptive_avg_pool2d(image, (out_height, out_width)).flatten(2).transpose(1, 2).contiguous().to(dtype)

    library = torch.library.Library("cobra_kernels", "IMPL")
    for name, function in (("projector_linear", linear), ("projector_pool", pool)):
        library.impl(name, function, "CPU")
    # torch has products of 16-bit matrices with an fp32 result on GPUs only.
    monkeypatch.setattr(cuda_kernel, "_sums", lambda x, weight: F.linear(x.float(), weight.float()))
    yield calls
    library._destroy()


@every_case
@pytest.mark.parametrize("product", ["kernel", "library"])
@NO_KERNELS
def test_products_of_a_gpu(gpu_calls, monkeypatch, case, ldp, product):
    """The same result by either product, each layer rounded once."""
    if case.dtype == F64:
        return  # not served by a GPU
    monkeypatch.setattr(cuda_kernel, "PRODUCT", product)
    tensors = make_inputs(case, ldp)
    features, weights, biases, peg = split(case, tensors)
    if ldp:
        grid = case.grid or (math.isqrt(case.lead[1]),) * 2
        out = cuda_kernel.ldp_projector_fwd(features, weights, biases, *peg, grid, case.out_grid)
    else:
        out = cuda_kernel.mlp_projector_fwd(features, weights, biases)
    expected = run(case, in_fp64(tensors), "reference", ldp)
    assert out.dtype == case.dtype and out.shape == expected.shape and out.is_contiguous()
    assert_rounded(out, expected, LIMIT[out.dtype], product, roundings(case, ldp))
    assert not (gpu_calls and product == "library")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("product", ["kernel", "warps", "library"])
def test_products_on_a_gpu(monkeypatch, product):
    """Every case, then sizes on both sides of the kernels' tiles, and the users'; twice the same bits from our kernels."""
    monkeypatch.setattr(cuda_kernel, "PRODUCT", product)
    sizes = [
        *(Case(lead=(rows,), vision=(72, 40), widths=(cols, 24), dtype=d)
          for rows, cols, d in ((1, 8, BF16), (127, 264, F16), (129, 256, BF16), (257, 136, BF16))),
        *(Case(lead=(rows,), vision=(1024, 1152), widths=(512, 264), dtype=d) for rows, d in ((729, BF16), (64, F16))),
        Case(lead=(3, 50), vision=(16, 8, 64, 24), widths=(40,), dtype=BF16, bias=False),
    ]  # fmt: skip
    users = Case(lead=(1, 729), vision=(1024, 1152), widths=(8704, 2560), dtype=BF16, out_grid=(14, 14))
    for case, ldp in [*(p.values for p in ALL_CASES), *((c, False) for c in sizes), (users, False), (users, True)]:
        if case.dtype == F64:
            continue
        tensors = [None if t is None else t.cuda() for t in make_inputs(case, ldp)]
        out = run(case, tensors, "cuda", ldp)
        expected = run(case, in_fp64(tensors), "reference", ldp)
        assert_rounded(out, expected, LIMIT[out.dtype], f"{product}, ldp {ldp}, {case.id}", roundings(case, ldp))
        if product != "library" and case.dtype != F32:
            assert torch.equal(out, run(case, tensors, "cuda", ldp)) or not cuda_kernel.kernel_serves(tensors[: len(case.vision)], tensors[len(case.vision)])


@NO_KERNELS
def test_the_gpu_kernel_reads_features_in_place(gpu_calls, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "PRODUCT", "kernel")
    case = Case(lead=(2, 10), vision=(24, 40), widths=(64, 16), dtype=BF16)
    tensors = make_inputs(case, ldp=False)
    features, weights, biases, _ = split(case, tensors)
    views = [f[:, 1:] for f in features]  # without the class token: leading dims that do not merge
    cuda_kernel.mlp_projector_fwd(views, weights, biases)
    assert len(gpu_calls) == 2 and gpu_calls[0] == [v.data_ptr() for v in views]
    one, many = [torch.zeros(4, 8, dtype=BF16)], [torch.zeros(4, 8, dtype=BF16)] * 5
    weight = torch.zeros(3, 8, dtype=BF16)
    assert cuda_kernel.kernel_serves(one, weight) and cuda_kernel.kernel_serves([one[0].half()], weight.half())
    for x, w in (
        (many, torch.zeros(3, 40, dtype=BF16)),
        ([one[0].float()], weight.float()),
        (one, weight.half()),
        ([torch.zeros(4, 9, dtype=BF16)], torch.zeros(3, 9, dtype=BF16)),
        ([torch.zeros(33, dtype=BF16)[1:].view(4, 8)], weight),  # 2 bytes beyond a boundary
        ([torch.zeros(8, 4, dtype=BF16).t()], weight),
        ([torch.zeros(4, 12, dtype=BF16)[:, :8]], weight),
        (one, torch.zeros(8, 3, dtype=BF16).t()),
    ):
        assert not cuda_kernel.kernel_serves(x, w)


# --- gradients -------------------------------------------------------------------------------------------------------

GRADIENT_CASES = [p for p in ALL_CASES if p.values[0].dtype != F64]


@pytest.mark.parametrize("case, ldp", GRADIENT_CASES)
@pytest.mark.parametrize("backend", kernel_backends())
def test_gradients(case, ldp, backend):
    tensors = make_inputs(case, ldp)
    leaves = [t if t is None else t.clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in leaves]
    out, expected = run(case, leaves, backend, ldp), run(case, wide, "reference", ldp)
    dout = torch.randn(out.shape).to(out.dtype)
    dout = dout[..., :1].expand(out.shape) if case.layout == "expanded" else laid_out(dout, case.layout)
    used, wide_used = ([t for t in ts if t is not None] for ts in (leaves, wide))
    for i, (got, want, leaf) in enumerate(zip(
        torch.autograd.grad(out, used, dout), torch.autograd.grad(expected, wide_used, dout.double()), used
    )):  # fmt: skip
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        # The hidden values were rounded to the features' dtype: so are the gradients that they enter.
        limit = max(GRADIENT[leaf.dtype], GRADIENT[case.dtype])
        assert_rounded(got, want, limit, f"gradient {i}[{backend}]", roundings(case, ldp))


def gradients_of(case: Case, tensors: list, ldp: bool, backend: str, wanted: set[int], dout: torch.Tensor) -> dict[int, torch.Tensor]:
    """index -> gradient of the wanted of `tensors`."""
    leaves = [t if t is None else t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    used = [i for i in sorted(wanted) if leaves[i] is not None]
    return dict(zip(used, torch.autograd.grad(run(case, leaves, backend, ldp), [leaves[i] for i in used], dout)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@both
def test_gradients_at_every_level(cpu_level, dtype, ldp):
    for widths in ((9, 3), (17, 5), (256, 16), (300, 257)):
        case = Case(lead=(2, 35), widths=widths, dtype=dtype, grid=(5, 7), out_grid=(3, 4))
        tensors = make_inputs(case, ldp)
        every = set(range(len(tensors)))
        dout = torch.randn(run(case, tensors, "cpu", ldp).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = gradients_of(case, tensors, ldp, "cpu", every, dout)
        want = gradients_of(case, in_fp64(tensors), ldp, "reference", every, dout.double())
        for i in every:
            assert_rounded(got[i], want[i], GRADIENT[dtype], f"gradient {i}, {case.id}", roundings(case, ldp))


@NO_KERNELS
def test_the_slope_of_gelu_keeps_its_digits(cpu_level):
    """Absolute against the largest slope, and relative in the tail, where Phi and x Phi' have opposite signs."""
    x = torch.linspace(-9, 9, 20001).reshape(1, -1)
    wide = x.double()
    expected = 0.5 * torch.special.erfc(-wide / math.sqrt(2)) + wide * torch.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    dz, _ = torch.ops.cobra_kernels.projector_gelu_bwd(torch.ones_like(x), x, None, F32, None)
    assert (dz.double() - expected).abs().max().item() <= 3e-7
    tail = wide < -1.5
    assert ((dz.double() - expected) / expected)[tail].abs().max().item() <= 5e-6
    special = torch.tensor([[float("nan"), -1e30, 1e30, 0.0]])
    dz, _ = torch.ops.cobra_kernels.projector_gelu_bwd(torch.ones_like(special), special, None, F32, None)
    assert dz[0, 0].isnan() and dz[0, 1:3].tolist() == [0.0, 1.0] and abs(dz[0, 3] - 0.5) <= 6e-8


@every_case
@pytest.mark.parametrize("product", ["kernel", "library"])
@NO_KERNELS
def test_gradients_of_a_gpu(gpu_calls, monkeypatch, case, ldp, product):
    """The GPU's backward strung together here, its passes by the CPU's kernels: 16-bit operands are rounded once more a layer."""
    if case.dtype == F64:
        return  # not served by a GPU
    monkeypatch.setattr(cuda_kernel, "PRODUCT", product)
    tensors = make_inputs(case, ldp)
    features, weights, biases, peg = split(case, tensors)
    dout = torch.randn(run(case, tensors, "cpu", ldp).shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    wants = [[t is not None for t in group] for group in (features, weights, biases)]
    if ldp:
        grid = case.grid or (math.isqrt(case.lead[1]),) * 2
        got = backward.ldp_projector_bwd(cuda_kernel, dout, *split(case, tensors)[:3], *peg, grid, case.out_grid, *wants, [t is not None for t in peg])
    else:
        got = backward.mlp_projector_bwd(cuda_kernel, dout, features, weights, biases, *wants)
    want = gradients_of(case, in_fp64(tensors), ldp, "reference", set(range(len(tensors))), dout.double())
    for i, t in enumerate(tensors):
        if t is not None:
            assert got[i].dtype == t.dtype and got[i].shape == t.shape
            limit = max(GRADIENT[t.dtype], GRADIENT[case.dtype])
            # Expanded features make equal rows, which share the rounding of their gradients: a sum over them does not average it.
            assert_rounded(got[i], want[i], limit, f"gradient {i} by {product}", roundings(case, ldp) + 1 + (case.layout == "expanded"))
    assert not (gpu_calls and product == "library")


class Products(TorchDispatchMode):
    """What runs inside: names, of matrix products and of our passes among them; which of our backward passes stored more than sums over
    rows; how many gradients the backward op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.stored: list[bool] = []
        self.returned: list[int] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op._schema.name.split("::")[-1]
        if name.endswith("projector_bwd"):
            self.returned.append(len(out))
        elif name.endswith("_bwd"):
            self.stored.append(out[0].numel() > 0)
        self.names.append(name)
        return out


# id: LDP, the tensor whose gradient is wanted, products (of the forward again, and back), our passes forward and back. Three layers,
# or LDP's two.
SUBSETS = {
    "mlp-features": (False, 0, 2 + 3, (1, 2)),
    "mlp-first-weight": (False, 1, 2 + 3, (1, 2)),
    "mlp-first-bias": (False, 4, 2 + 2, (1, 2)),
    "mlp-second-weight": (False, 2, 2 + 2, (1, 1)),
    "mlp-second-bias": (False, 5, 2 + 1, (1, 1)),
    "mlp-last-weight": (False, 3, 2 + 1, (2, 0)),
    "mlp-last-bias": (False, 6, 0, (0, 1)),
    "ldp-features": (True, 0, 1 + 2, (0, 2)),
    "ldp-first-weight": (True, 1, 1 + 2, (0, 2)),
    "ldp-first-bias": (True, 3, 1 + 1, (0, 2)),
    "ldp-second-weight": (True, 2, 1 + 1, (1, 1)),
    "ldp-second-bias": (True, 4, 0, (0, 1)),
    "ldp-filter": (True, 5, 2, (1, 1)),
    "ldp-filter-bias": (True, 6, 0, (0, 1)),
}


@NO_KERNELS
@pytest.mark.parametrize("name", SUBSETS)
def test_no_work_for_a_gradient_nobody_wants(name):
    """One gradient alone: as many products as it takes, as many of our backward passes, and the bits of all gradients together."""
    ldp, wanted, products, passes = SUBSETS[name]
    case = Case(lead=(2, 9), vision=(20,), widths=(40, 17) if ldp else (40, 30, 17))
    tensors = make_inputs(case, ldp)
    dout = torch.randn(run(case, tensors, "cpu", ldp).shape)
    together = gradients_of(case, tensors, ldp, "cpu", set(range(len(tensors))), dout)[wanted]
    wants = [[i == wanted for i in group] for group in split(case, list(range(len(tensors))))]
    features, weights, biases, peg = split(case, tensors)
    with Products() as ran:
        if ldp:
            all_of_them = backward.ldp_projector_bwd(cpu_kernel, dout, features, weights, biases, *peg, (3, 3), case.out_grid, *wants)
        else:
            all_of_them = backward.mlp_projector_bwd(cpu_kernel, dout, features, weights, biases, *wants[:3])
    (got,) = [t for t in all_of_them if t is not None]
    assert torch.equal(got, together)
    assert sum(n in ("mm", "addmm", "_linear_pointwise") for n in ran.names) == products, ran.names
    forward = sum(n in ("projector_bias_gelu", "projector_gelu_pool") for n in ran.names)
    back = sum(n in ("projector_gelu_bwd", "projector_gelu_pool_bwd", "projector_peg_bwd") for n in ran.names)
    assert (forward, back) == passes, ran.names
    assert not ran.stored or ran.stored[-1] == (wanted < len(features) + len(weights))  # for a product to read, if one follows
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    with Products() as ran:
        run(case, leaves, "cpu", ldp).backward(dout)
    assert ran.returned == [1] and torch.equal(leaves[wanted].grad, together)


@both
@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("seed", range(3))
def test_any_subset_of_gradients(ldp, backend, seed):
    """The same values whatever else is wanted, within a library's product; what is not wanted gets none."""
    rng = random.Random(seed)
    for _ in range(6):
        case = Case(
            lead=(rng.choice((1, 2)), 12), vision=tuple(rng.choice((1, 7, 16)) for _ in range(rng.choice((1, 2, 3)))), grid=(3, 4),
            widths=tuple(rng.choice((5, 8, 33)) for _ in range(2 if ldp else rng.choice((1, 2, 3)))), bias=rng.random() < 0.8,
            layout=rng.choice(("contiguous", "transposed", "expanded")),
        )  # fmt: skip
        tensors = make_inputs(case, ldp, seed)
        present = [i for i, t in enumerate(tensors) if t is not None]
        dout = laid_out(torch.randn(run(case, tensors, backend, ldp).shape), case.layout)
        want = gradients_of(case, in_fp64(tensors), ldp, "reference", set(present), dout.double())
        wanted = set(rng.sample(present, rng.randint(1, len(present))))
        for i, got in gradients_of(case, tensors, ldp, backend, wanted, dout).items():
            assert_rounded(got, want[i], GRADIENT[F32], f"gradient {i} of {sorted(wanted)}, {case.id}")


@both
@pytest.mark.parametrize("backend", kernel_backends())
def test_expanded_and_odd_incoming_gradients(ldp, backend):
    """What .sum(), .mean(0), a slice and a permutation send back: stride 0 in every dim, in some, gaps, any order."""
    case = Case(lead=(3, 9))
    tensors = make_inputs(case, ldp)
    shape = run(case, tensors, backend, ldp).shape
    outer = torch.randn(shape[0] + 1, shape[1] * 2, shape[2] + 3)
    for dout in (torch.ones(()).expand(shape), torch.randn(shape[1:]).expand(shape), torch.randn(shape[2]).expand(shape),
                 torch.randn(shape[:2])[..., None].expand(shape), outer[1:, ::2, 1:-2], torch.randn(shape[::-1]).permute(2, 1, 0)):  # fmt: skip
        every = set(range(len(tensors)))
        got = gradients_of(case, tensors, ldp, backend, every, dout)
        want = gradients_of(case, in_fp64(tensors), ldp, "reference", every, dout.double())
        for i in every:
            assert_rounded(got[i], want[i], GRADIENT[F32], f"gradient {i}, strides {dout.stride()}")


# Each row of the tables in fp64, with and without biases, with one, two and three segments.
GRADCHECKS = [
    *(Case(lead=lead, vision=v, widths=w, bias=b, layout=x) for lead, x in (((3,), "contiguous"), ((2, 2), "transposed"), ((), "contiguous"))
      for v in ((2,), (2, 1), (1, 1, 2)) for w in ((2,), (3, 2), (2, 3, 1), (2, 1, 2, 1)) for b in (True, False)),
    *(Case(lead=(n, g[0] * g[1]), vision=v, widths=w, bias=b, grid=g, out_grid=o) for n, g, o in (
        (2, (2, 3), (2, 2)), (1, (1, 1), (2, 1)), (1, (3, 3), (2, 2)), (1, (2, 2), (3, 3)), (1, (2, 2), (2, 2)), (2, (1, 4), (1, 3)))
      for v in ((2,), (1, 2)) for w in ((2, 2), (3, 1)) for b in (True, False)),
]  # fmt: skip


@NO_KERNELS
@pytest.mark.parametrize("part", range(4))
def test_gradcheck_in_fp64(part):
    """The cpu backend's own kernels against finite differences, over all options: 120 configurations in four parts."""
    for case in GRADCHECKS[part::4]:
        case, ldp = case._replace(dtype=F64), case.grid is not None
        tensors = [t if t is None else t.requires_grad_() for t in make_inputs(case, ldp)]
        assert torch.autograd.gradcheck(lambda *ts, case=case, ldp=ldp: run(case, list(ts), "cpu", ldp), tensors, fast_mode=len(tensors) > 5), case.id


@NO_KERNELS
@both
def test_a_nan_in_the_incoming_gradient_stays_in_its_token(ldp):
    """Features' gradients: of its token, or of the tokens whose bins reach a neighbour of its bin."""
    case = Case(lead=(2, 36), out_grid=(3, 3))
    tensors = make_inputs(case, ldp)
    dout = torch.randn(run(case, tensors, "cpu", ldp).shape)
    clean = gradients_of(case, tensors, ldp, "cpu", {0}, dout)[0]
    dout[1, 0, 3] = float("nan")
    dx = gradients_of(case, tensors, ldp, "cpu", {0}, dout)[0]
    tokens = torch.arange(36)
    near = (tokens // 6 < 4) & (tokens % 6 < 4) if ldp else tokens == 0
    assert dx[1, near].isnan().all() and not dx[1, ~near].isnan().any() and not dx[0].isnan().any()
    assert_close(dx[1, ~near], clean[1, ~near], GEMM)


@NO_KERNELS
def test_float64_is_refused_by_name_where_there_is_no_kernel_for_it():
    """A direct call of the torch op on a GPU; here its implementation is called on CPU tensors."""
    for backend in ("cuda", "triton"):
        for name, function in projector_op._implementations(backend).items():
            ldp = name.startswith("ldp")
            case = Case(dtype=F64)
            tensors = make_inputs(case, ldp)
            arguments = op_arguments(case, tensors, ldp)
            if name.endswith("_bwd"):
                arguments = [run(case, tensors, "cpu", ldp), *arguments, [True] * len(tensors)]
            with pytest.raises(DtypeError, match=f"{name}: .*float64.*{backend}"):
                function(*arguments)


@NO_KERNELS
@both
def test_double_backward_raises_by_name(ldp):
    case = Case()
    tensors = make_inputs(case, ldp)
    tensors[0].requires_grad_()
    (dx,) = torch.autograd.grad(run(case, tensors, None, ldp).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="projector_bwd: double backward"):
        dx.sum().backward()


# --- promises --------------------------------------------------------------------------------------------------------


@both
def test_inputs_are_not_written_and_the_output_is_new(ldp):
    for widths in ((17,), (40, 17)) if not ldp else ((40, 17),):
        case = Case(widths=widths)
        tensors = make_inputs(case, ldp)
        before = [None if t is None else t.clone() for t in tensors]
        out = run(case, tensors, None, ldp)
        assert all(t is None or torch.equal(t, b) for t, b in zip(tensors, before))
        assert out.data_ptr() not in {t.data_ptr() for t in tensors if t is not None}


@pytest.mark.parametrize("backend", kernel_backends())
def test_a_nan_stays_in_its_token_and_bin(backend):
    case = Case(lead=(2, 36), out_grid=(3, 3))
    tensors = make_inputs(case, ldp=True)
    clean_mlp = mlp_projector(*split(case, tensors)[:3], backend=backend)
    clean = run(case, tensors, backend, True)
    tensors[0][1, 0, 3] = float("nan")  # the corner token of image 1: bin (0, 0), seen by the encoding at (0..1, 0..1)
    poisoned_mlp = mlp_projector(*split(case, tensors)[:3], backend=backend)
    assert poisoned_mlp[1, 0].isnan().all() and not poisoned_mlp[0].isnan().any() and not poisoned_mlp[1, 1:].isnan().any()
    assert_close(poisoned_mlp[1, 1:], clean_mlp[1, 1:], GEMM)
    poisoned = run(case, tensors, backend, True)
    seen = torch.tensor([0, 1, 3, 4])
    unseen = torch.tensor([2, 5, 6, 7, 8])
    assert poisoned[1, seen].isnan().all() and not poisoned[1, unseen].isnan().any()
    assert_close(poisoned[1, unseen], clean[1, unseen], GEMM)
    assert_close(poisoned[0], clean[0], GEMM)


@NO_KERNELS
@pytest.mark.threads
def test_threads_change_no_bit_of_our_passes(threads):
    """The products are the library's; the passes around them are ours."""
    g = torch.Generator().manual_seed(0)
    hidden, bias = torch.randn(2, 35, 700, generator=g), torch.randn(700, generator=g)
    weight, dy, op = torch.randn(700, 1, 3, 3, generator=g), torch.randn(12, 2, 700, generator=g).transpose(0, 1), torch.ops.cobra_kernels

    def once():
        h = hidden.flatten(0, 1).clone()
        op.projector_bias_gelu_(h, bias, BF16)
        pooled = op.projector_gelu_pool(hidden, bias, 5, 7, 3, 4, F32)
        y = op.projector_peg(pooled, weight, bias, 3, 4, F16)
        dp = op.projector_peg_bwd(dy, pooled, bias, weight, 3, 4, F32, F32, F32, BF16)
        dz = op.projector_gelu_pool_bwd(dp[0], hidden, bias, 5, 7, 3, 4, F32, F16)
        return h, pooled, y, *dp, *dz, *op.projector_gelu_bwd(dz[0], hidden.flatten(0, 1), bias, BF16, F32)

    one, two = threads(once, 1, 2)
    assert len(one) == 11 and all(torch.equal(a, b) for a, b in zip(one, two))
    assert all(torch.equal(a, b) for a, b in zip(one, once()))  # and run to run


@NO_KERNELS
def test_every_element_of_our_passes_is_written():
    """Pools and encodings of hidden values that are all equal: bins of every size give that value."""
    for grid, out_grid in (((5, 7), (3, 4)), ((2, 3), (5, 5)), ((1, 1), (4, 1))):
        hidden = torch.full((3, grid[0] * grid[1], 301), 2.0)
        pooled = torch.ops.cobra_kernels.projector_gelu_pool(hidden, None, *grid, *out_grid, F32)
        assert_close(pooled, F.gelu(torch.full_like(pooled, 2.0)), 1e-6)
        y = torch.ops.cobra_kernels.projector_peg(pooled, torch.zeros(301, 1, 3, 3), None, *out_grid, F32)
        assert torch.equal(y, pooled)


# --- errors ----------------------------------------------------------------------------------------------------------

X, X2 = torch.zeros(2, 9, 6), torch.zeros(2, 9, 2)
W1, W2, B1, B2 = torch.zeros(5, 8), torch.zeros(4, 5), torch.zeros(5), torch.zeros(4)
PW, PB = torch.zeros(4, 1, 3, 3), torch.zeros(4)


def mlp(features=(X, X2), weights=(W1, W2), biases=(B1, B2), **more):
    return mlp_projector(features, weights, biases, **more)


def ldp(features=(X, X2), weights=(W1, W2), biases=(B1, B2), peg_weight=PW, peg_bias=PB, **more):
    return ldp_projector(features, weights, biases, peg_weight, peg_bias, **{"out_grid": (2, 2), **more})


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: mlp(features=()), ArgumentError, ["mlp_projector: features is empty"]),
        (lambda: mlp(features=(X, X2[:1])), ShapeError, ["features[1]", "(1, 9, 2)", "(2, 9)", "from features[0]"]),
        (lambda: mlp(features=(X, X2.half())), DtypeError, ["features[1]", "float16", "float32"]),
        (lambda: mlp(features=X.int()), DtypeError, ["features[0]", "int32"]),
        (lambda: mlp(features=None), ArgumentError, ["features", "NoneType", "a tensor or a sequence of tensors"]),
        (lambda: mlp(features=3), ArgumentError, ["features", "int", "a tensor or a sequence of tensors"]),
        (lambda: mlp(weights=W1), ArgumentError, ["weights", "Tensor", "one per layer"]),
        (lambda: mlp(weights=None), ArgumentError, ["weights", "NoneType", "one per layer"]),
        (lambda: mlp(biases=B1), ArgumentError, ["biases", "Tensor", "one per layer"]),
        (lambda: mlp(features=torch.zeros(())), ShapeError, ["features[0]", "no dims"]),
        (lambda: mlp(features=X), ShapeError, ["weights[0]", "(5, 8)", "in_0=6", "features, summed"]),
        (lambda: mlp(weights=()), ArgumentError, ["weights is empty"]),
        (lambda: mlp(weights=(W1, W2.t())), ShapeError, ["weights[1]", "(5, 4)", "in_1=5", "out_0 of weights[0]"]),
        (lambda: mlp(weights=(W1, None)), DtypeError, ["weights[1]", "NoneType"]),
        (lambda: mlp(weights=(W1, W2.double())), DtypeError, ["weights[1]", "float64", "does not mix"]),
        (lambda: mlp(biases=(B1,)), ArgumentError, ["biases has 1 entries", "expected 2"]),
        (lambda: mlp(biases=(B1, B1)), ShapeError, ["biases[1]", "(5,)", "out_1=4"]),
        (lambda: mlp(biases=(B1, B2.to("meta"))), DtypeError, ["biases[1]", "meta", "cpu"]),
        (lambda: mlp(backend="fast"), ArgumentError, ["backend", "'fast'"]),
        (lambda: mlp(backend="cuda"), BackendUnavailable, ["mlp_projector", "'cuda'", "CUDA tensors"]),
        (lambda: ldp(backend="triton"), BackendUnavailable, ["ldp_projector", "'triton'", "triton" if NO_TRITON else "CUDA tensors"]),
        (lambda: ldp(weights=(W1,), biases=(B1,)), ArgumentError, ["ldp_projector: weights has 1 entries", "expected 2"]),
        (lambda: ldp(features=(X[0], X2[0])), ShapeError, ["features[0]", "(9, 6)", "(batch, H*W, v)"]),
        (lambda: ldp(peg_weight=torch.zeros(4, 3, 3)), ShapeError, ["peg_weight", "(4, 3, 3)", "out=4", "weights[1]"]),
        (lambda: ldp(peg_weight=None), DtypeError, ["peg_weight", "NoneType"]),
        (lambda: ldp(peg_bias=B1), ShapeError, ["peg_bias", "(5,)", "out=4"]),
        (lambda: ldp(features=(X[:, :8], X2[:, :8])), ShapeError, ["8 tokens", "not a square", "grid=(H, W)"]),
        (lambda: ldp(features=(X[:, :0], X2[:, :0])), ShapeError, ["0 tokens", "not a square"]),
        (lambda: ldp(grid=(2, 4)), ShapeError, ["9 tokens", "H*W=8", "grid=(2, 4)"]),
        (lambda: ldp(grid=(9,)), ArgumentError, ["grid", "(9,)", "two integers"]),
        (lambda: ldp(out_grid=(0, 2)), ArgumentError, ["out_grid", "(0, 2)", ">= 1"]),
        (lambda: ldp(out_grid=2), ArgumentError, ["out_grid", "2", "two integers"]),
    ],
)
def test_errors_name_argument_got_and_expected(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@NO_KERNELS
def test_torch_ops_called_directly_stay_inside_their_tensors():
    op = torch.ops.cobra_kernels
    hidden, pooled = torch.zeros(1, 6, 4), torch.zeros(1, 4, 4)
    for call, message in (
        (lambda: op.projector_bias_gelu_(hidden[0].t(), None, F32), "contiguous"),
        (lambda: op.projector_bias_gelu_(hidden[0], torch.zeros(3), F32), "bias has size 3"),
        (lambda: op.projector_bias_gelu_(hidden[0], torch.zeros(4, dtype=F64), F32), "float64"),
        (lambda: op.projector_gelu_pool(hidden, None, 2, 2, 1, 1, F32), "grid"),
        (lambda: op.projector_gelu_pool(hidden, None, 2, 3, 0, 1, F32), "grid"),
        (lambda: op.projector_peg(pooled, torch.zeros(4, 1, 3, 2), None, 2, 2, F32), "weight has size 2"),
        (lambda: op.projector_peg(pooled, torch.zeros(4, 1, 3, 3), None, 3, 2, F32), "grid"),
        (lambda: op.projector_peg(pooled, torch.zeros(4, 1, 3, 3), None, 2, 2, F64), "float64"),
        (lambda: op.projector_bias_gelu(hidden[0], None, F32, F64), "float64"),
        (lambda: op.projector_gelu_bwd(hidden[0], hidden[0, :5], None, F32, None), "sums has size 5"),
        (lambda: op.projector_gelu_bwd(hidden[0], hidden[0].half(), None, F32, None), "compute dtype"),
        (lambda: op.projector_gelu_bwd(hidden[0], hidden[0].t().contiguous().t(), None, F32, None), "not contiguous"),
        (lambda: op.projector_gelu_bwd(hidden[0], None, torch.zeros(4), F32, None), "bias without sums"),
        (lambda: op.projector_gelu_bwd(hidden[0], hidden[0], torch.zeros(3), F32, None), "bias has size 3"),
        (lambda: op.projector_gelu_bwd(hidden[0], hidden[0], None, F64, None), "dz_dtype mixes float64"),
        (lambda: op.projector_gelu_pool_bwd(pooled, hidden, None, 2, 3, 2, 3, F32, None), "grid"),
        (lambda: op.projector_gelu_pool_bwd(pooled, hidden, None, 2, 2, 2, 2, F32, None), "sums has size 6"),
        (lambda: op.projector_peg_bwd(pooled, None, None, torch.zeros(4, 1, 3, 3), 2, 2, F32, F32, None, None), "dweight needs"),
        (lambda: op.projector_peg_bwd(pooled, None, None, torch.zeros(4, 1, 3, 2), 2, 2, F32, None, None, None), "weight has size 2"),
        (lambda: op.projector_peg_bwd(pooled, hidden, None, torch.zeros(4, 1, 3, 3), 2, 2, F32, F32, None, None), "sums has size 6"),
        (lambda: op.projector_peg_bwd(pooled, None, None, torch.zeros(4, 1, 3, 3), 3, 2, F32, None, None, None), "grid"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_supports_says_what_the_op_does():
    ok, reason = cobra_kernels.supports("mlp_projector", [X, X2], [W1, W2], None, backend="reference")
    assert ok and reason == "reference; gradients: autograd of the reference"
    if not cobra_kernels.backends()["cpu"]:
        assert cobra_kernels.supports("mlp_projector", [X, X2], [W1, W2], None)[1].startswith("cpu; gradients: C++ kernels (GELU")
    ok, reason = cobra_kernels.supports("ldp_projector", [X, X2], [W1, W2], None, PW, PB, backend="cuda")
    assert not ok and "CUDA tensors" in reason
    ok, reason = cobra_kernels.supports("ldp_projector", [X], [W1, W2], None, PW, PB)
    assert not ok and "weights[0]" in reason


# --- torch -----------------------------------------------------------------------------------------------------------

OPCHECK_CASES = [Case(), Case(bias=False), Case(dtype=BF16), Case(lead=(0, 9)), Case(layout="transposed", lead=(4, 9)),
                 Case(vision=(7,)), Case(weight_dtype=F16), Case(lead=(1, 35), grid=(5, 7), out_grid=(3, 4))]  # fmt: skip


def op_arguments(case: Case, tensors: list, ldp: bool) -> list:
    """What the torch ops take: the public arguments with present biases only, and which layers have one."""
    features, weights, biases, peg = split(case, tensors)
    side = math.isqrt(case.lead[1])
    grids = [case.grid or (side, side), case.out_grid] if ldp else []
    return [features, weights, [b for b in biases if b is not None], [b is not None for b in biases], *peg, *grids]


def gradient_arguments(case: Case, tensors: list, ldp: bool, backend: str) -> tuple:
    """Of the backward ops: every gradient wanted."""
    peg = split(case, tensors)[3]
    wanted = [True] * sum(t is not None for t in tensors) + [False] * sum(t is None for t in peg)
    return run(case, tensors, backend, ldp), *op_arguments(case, tensors, ldp), wanted


@NO_KERNELS
@both
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda c: c.id)
def test_opcheck(case, ldp):
    tensors = make_inputs(case, ldp)
    op = torch.ops.cobra_kernels
    name = "ldp_projector" if ldp else "mlp_projector"
    torch.library.opcheck(getattr(op, f"{name}_fwd").default, op_arguments(case, tensors, ldp))
    torch.library.opcheck(getattr(op, f"{name}_bwd").default, gradient_arguments(case, tensors, ldp, "cpu"))
    leaves = [t if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(getattr(op, name).default, (*op_arguments(case, leaves, ldp), "cpu"))


@NO_KERNELS
def test_opcheck_of_the_backward_passes():
    g = torch.Generator().manual_seed(0)
    d, hidden, dy = (torch.randn(shape, generator=g) for shape in ((6, 5), (2, 6, 5), (2, 4, 5)))
    bias, weight, op = torch.randn(5, generator=g), torch.randn(5, 1, 3, 3, generator=g), torch.ops.cobra_kernels
    for dtypes in ((F32, F16), (BF16, None)):
        torch.library.opcheck(op.projector_gelu_bwd.default, (d, d + 1, bias, *dtypes))
        torch.library.opcheck(op.projector_gelu_bwd.default, (hidden.transpose(0, 1), None, None, *dtypes))
        torch.library.opcheck(op.projector_gelu_pool_bwd.default, (dy, hidden, bias, 2, 3, 2, 2, *dtypes))
        torch.library.opcheck(op.projector_peg_bwd.default, (dy.transpose(0, 1).contiguous().transpose(0, 1), dy, bias, weight, 2, 2, *dtypes, *dtypes))


@both
@pytest.mark.parametrize("backend", [None, "reference"])
def test_compile_fullgraph(ldp, backend):
    case = Case()
    leaves = [t.requires_grad_() for t in make_inputs(case, ldp)]

    def f(*tensors):
        return run(case, list(tensors), backend, ldp).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    cobra_kernels.reset_call_counts()
    out = compiled(*leaves)
    name = "ldp_projector" if ldp else "mlp_projector"
    if backend is None and kernel_backends():
        assert cobra_kernels.call_counts()[name, "cpu"] >= 1  # the compiled graph calls the kernel
    assert_close(out, f(*leaves), 1e-6)
    for got, want in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(f(*leaves).sum(), leaves)):
        assert_close(got, want, 1e-5)


@both
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_the_operands_as_linear_does(ldp, backend):
    case = Case(lead=(2, 9))
    tensors = make_inputs(case, ldp)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=BF16):
        out = run(case, leaves, backend, ldp)
    assert out.dtype == BF16
    assert torch.equal(out, run(case, [t.to(BF16) for t in tensors], backend, ldp))
    out.float().sum().backward()
    assert all(t.grad.dtype == F32 for t in leaves)
    wide = make_inputs(case._replace(dtype=F64), ldp)
    with torch.autocast("cpu", dtype=BF16):
        assert run(case, wide, backend, ldp).dtype == F64  # autocast leaves fp64 alone
