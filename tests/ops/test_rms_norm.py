"""rms_norm: every backend against the fp64 reference, values and gradients, edges, errors, torch integration."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import cobra_kernels
from cobra_kernels import rms_norm
from cobra_kernels.errors import ArgumentError, BackendUnavailable, DtypeError, ShapeError
from tests.conftest import kernel_backends
from tests.tolerances import GRADIENT, OUTPUT, assert_close

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Case(NamedTuple):
    """The base case; each row of CASES varies one thing."""

    shape: tuple[int, ...] = (3, 129)
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype | None = None  # None: as x
    residual_dtype: torch.dtype | None = F32  # None: no residual
    bias: bool = False
    is_rms_norm: bool = True
    prenorm: bool = True
    residual_in_fp32: bool = False
    layout: str = "contiguous"  # contiguous | transposed | sliced | unaligned | expanded

    @property
    def id(self) -> str:
        base = Case()
        changed = [f"{k}={v}".replace("torch.", "") for k, v in self._asdict().items() if v != getattr(base, k)]
        return "-".join(changed) or "base"


CASES = [
    Case(),
    *(Case(shape=(2, dim)) for dim in (1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 255, 257, 1023, 2560, 5121)),
    *(Case(shape=(rows, 40)) for rows in (0, 1, 15, 16, 17, 33, 2100)),  # 16 rows a block, 128 blocks at most
    *(Case(shape=shape) for shape in ((64,), (2, 3, 4, 65), (1, 1, 5, 8), (4, 0, 8))),
    *(Case(dtype=d) for d in (BF16, F16)),
    *(Case(dtype=F64, residual_dtype=r) for r in (None, F64)),
    *(Case(dtype=BF16, weight_dtype=w, residual_dtype=r, bias=b) for w, r, b in ((F32, F32, True), (F16, BF16, False), (BF16, None, True))),
    *(Case(residual_dtype=r, prenorm=p) for r in (None, F16) for p in (True, False)),
    *(Case(dtype=BF16, residual_dtype=None, residual_in_fp32=True, prenorm=p) for p in (True, False)),
    *(Case(is_rms_norm=False, bias=b, dtype=d) for b in (True, False) for d in (F32, BF16)),
    *(Case(shape=(5, 6, 33), layout=x) for x in ("transposed", "sliced", "unaligned", "expanded")),
    Case(shape=(5, 6, 33), layout="transposed", dtype=BF16),
]


def laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":  # inner view of a larger NaN-filled buffer
        outer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
        view = outer[tuple(slice(1, 1 + n) for n in t.shape)]
        return view.copy_(t)
    if layout == "unaligned":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    if layout == "expanded" and t.dim() > 1:
        return t[:1].expand(t.shape)
    return t


def make_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """x, weight, bias, residual; x has a mean, so that LayerNorm has something to remove."""
    g = torch.Generator().manual_seed(seed)
    dim = case.shape[-1]

    def randn(shape, dtype):
        return torch.randn(shape, generator=g, dtype=F64).to(dtype)

    return {
        "x": laid_out(randn(case.shape, case.dtype) + 0.5, case.layout),
        "weight": randn((dim,), case.weight_dtype or case.dtype),
        "bias": randn((dim,), case.weight_dtype or case.dtype) if case.bias else None,
        "residual": None if case.residual_dtype is None else laid_out(randn(case.shape, case.residual_dtype), case.layout),
    }


def residual_case(case: Case) -> Case:
    """fp64 does not mix: the base case's fp32 residual becomes fp64."""
    return case._replace(residual_dtype=F64) if case.dtype == F64 and case.residual_dtype is not None else case


def run(case: Case, tensors, backend: str | None):
    """(y, s) or (y,) as a tuple."""
    out = rms_norm(
        tensors["x"],
        tensors["weight"],
        tensors["bias"],
        tensors["residual"],
        case.prenorm,
        case.residual_in_fp32,
        1e-5,
        is_rms_norm=case.is_rms_norm,
        backend=backend,
    )
    return out if isinstance(out, tuple) else (out,)


def in_fp64(tensors):
    return {k: None if t is None else t.detach().double() for k, t in tensors.items()}


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_values(case, backend):
    tensors = make_inputs(case)
    outs = run(case, tensors, backend)
    expected = run(case, in_fp64(tensors), "reference")
    assert outs[0].dtype == case.dtype and outs[0].stride() == torch.empty_like(tensors["x"]).stride()
    if case.prenorm:
        s_dtype = case.residual_dtype or (F32 if case.residual_in_fp32 else case.dtype)
        assert outs[1].dtype == s_dtype
    for name, got, want in zip(("y", "s"), outs, expected):
        assert_close(got, want, OUTPUT[got.dtype], f"{name}[{backend}]")


@pytest.mark.parametrize("layouts", [("contiguous", "transposed"), ("transposed", "sliced"), ("expanded", "contiguous")], ids="-".join)
@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_a_layout_of_its_own_for_every_tensor(backend, layouts):
    """No tensor may be read by the strides of another, nor have its leading dims merged because another's merge."""
    case = Case(shape=(5, 6, 33), bias=True)
    tensors = make_inputs(case)
    tensors |= {name: laid_out(tensors[name], layout) for name, layout in zip(("x", "residual"), layouts)}
    tensors |= {name: tensors[name].repeat_interleave(step)[::step] for name, step in (("weight", 2), ("bias", 3))}
    for got, want in zip(run(case, tensors, backend), run(case, in_fp64(tensors), "reference")):
        assert_close(got, want, OUTPUT[got.dtype], f"{layouts}[{backend}]")


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_every_level(cpu_level, dtype, is_rms_norm):
    for dim in (1, 5, 16, 64, 100, 2560):
        case = Case(shape=(19, dim), dtype=dtype, bias=True, is_rms_norm=is_rms_norm)
        tensors = make_inputs(case, seed=dim)
        for got, want in zip(run(case, tensors, "cpu"), run(case, in_fp64(tensors), "reference")):
            assert_close(got, want, OUTPUT[got.dtype], f"dim {dim}")


def test_reference_against_a_plain_loop():
    tensors = in_fp64(make_inputs(Case(shape=(4, 7), bias=True)))
    x, w, b, r = (tensors[k].tolist() for k in ("x", "weight", "bias", "residual"))
    y, s = rms_norm(*(tensors[k] for k in ("x", "weight", "bias", "residual")), True, eps=1e-3, backend="reference")
    for i in range(4):
        total = [x[i][j] + r[i][j] for j in range(7)]
        scale = (sum(v * v for v in total) / 7 + 1e-3) ** -0.5
        for j in range(7):
            assert abs(s[i, j].item() - total[j]) < 1e-12
            assert abs(y[i, j].item() - (total[j] * scale * w[j] + b[j])) < 1e-12


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_closed_forms(backend):
    ones = torch.ones(64)
    # Scaling x changes nothing when eps is 0; a constant row normalises to +-1; LayerNorm of a constant row is the bias.
    x = torch.randn(3, 64)
    assert_close(rms_norm(1000 * x, ones, eps=0.0, backend=backend), rms_norm(x, ones, eps=0.0, backend=backend), 1e-6)
    assert_close(rms_norm(torch.full((2, 64), -3.0), ones, eps=0.0, backend=backend), -torch.ones(2, 64), 1e-6)
    bias = torch.randn(64)
    constant = rms_norm(torch.full((2, 64), 4.0), ones, bias, eps=1e-6, is_rms_norm=False, backend=backend)
    assert_close(constant, bias.expand(2, 64), 1e-6)
    # The sum is not rounded before the statistics: in bf16, 1 + 2^-9 would round to 1.
    x, r = torch.full((1, 8), 1.0, dtype=BF16), torch.full((1, 8), 2.0**-9, dtype=BF16)
    y, s = rms_norm(x, torch.ones(8), None, r.float(), True, eps=0.0, backend=backend)
    assert (s == 1 + 2.0**-9).all() and (y == 1).all()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != F64], ids=lambda c: c.id)
@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("incoming", ["contiguous", "expanded", "transposed"])
def test_gradients(case, backend, incoming):
    tensors = make_inputs(case)
    leaves = {k: t.clone(memory_format=torch.preserve_format).requires_grad_() for k, t in tensors.items() if t is not None}
    wide = {k: t.detach().double().requires_grad_() for k, t in leaves.items()}
    outs = run(case, {**tensors, **leaves}, backend)
    expected = run(case, {**in_fp64(tensors), **wide}, "reference")
    douts = [laid_out(torch.randn(o.shape, dtype=F64).to(o.dtype), incoming if o.dim() > 1 and o.numel() else "contiguous") for o in outs]
    got = torch.autograd.grad(outs, list(leaves.values()), douts)
    want = torch.autograd.grad(expected, list(wide.values()), [d.double() for d in douts])
    for name, g, w in zip(leaves, got, want):
        assert g.dtype == leaves[name].dtype
        # With one channel y is +-weight whatever x is: exact gradients are 0 or cancel, so rounding is judged absolutely.
        if case.shape[-1] == 1:
            assert (g.double() - w).abs().max() <= 1e-4
        else:
            assert_close(g, w, GRADIENT[g.dtype], f"d{name}[{backend}]")


@pytest.mark.parametrize("through", ["y", "s"])
def test_gradient_through_one_output_only(through):
    tensors = make_inputs(Case())
    x = tensors["x"].requires_grad_()
    y, s = rms_norm(x, tensors["weight"], None, tensors["residual"], True)
    (dx,) = torch.autograd.grad((y if through == "y" else s).sum(), x)
    wide = x.detach().double().requires_grad_()
    y, s = rms_norm(wide, tensors["weight"].double(), None, tensors["residual"].double(), True, backend="reference")
    assert_close(dx, torch.autograd.grad((y if through == "y" else s).sum(), wide)[0], GRADIENT[F32])


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_gradient_of_one_tensor_alone(backend, name):
    """The call is recorded whichever tensor wants a gradient."""
    case, tensors = Case(bias=True), make_inputs(Case(bias=True))
    tensors[name].requires_grad_()
    wide = in_fp64(tensors)
    wide[name].requires_grad_()
    gradients = [
        torch.autograd.grad(sum((out.double() ** 2).sum() for out in run(case, t, b)), t[name])[0]
        for t, b in ((tensors, backend), (wide, "reference"))
    ]
    assert_close(*gradients, GRADIENT[F32])


@pytest.mark.parametrize("is_rms_norm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_in_fp64(is_rms_norm, residual, bias):
    case = Case(shape=(3, 5), dtype=F64, residual_dtype=F64 if residual else None, bias=bias, is_rms_norm=is_rms_norm)
    tensors = [t if t is None else t.requires_grad_() for t in make_inputs(case).values()]

    def f(x, weight, bias, residual):
        return rms_norm(x, weight, bias, residual, prenorm=True, is_rms_norm=is_rms_norm, backend="cpu")

    assert torch.autograd.gradcheck(f, tensors)


def test_double_backward_raises_by_name():
    x = torch.randn(2, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, torch.ones(8)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm_bwd: double backward"):
        dx.sum().backward()


# --- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rows_are_independent_bit_for_bit(backend, dtype):
    case = Case(shape=(37, 100), dtype=dtype)
    t = make_inputs(case)
    y, s = run(case, t, backend)
    again = run(case, t, backend)
    assert torch.equal(y, again[0]) and torch.equal(s, again[1])
    one = run(case, {**t, "x": t["x"][5:6], "residual": t["residual"][5:6]}, backend)
    assert torch.equal(one[0], y[5:6])
    t["x"][20, 3] = float("nan")
    poisoned, _ = run(case, t, backend)
    keep = torch.arange(37) != 20
    assert torch.equal(poisoned[keep], y[keep]) and poisoned[20].isnan().all()


@pytest.mark.threads
@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_threads_change_no_bit(threads, is_rms_norm):
    case = Case(shape=(513, 257), bias=True, is_rms_norm=is_rms_norm)
    leaves = [t.requires_grad_() for t in make_inputs(case).values()]

    def once():
        y, s = rms_norm(*leaves, prenorm=True, is_rms_norm=is_rms_norm, backend="cpu")
        return [y, s, *torch.autograd.grad((y.sum() + s.square().sum()), leaves)]

    one, two = threads(once, 1, 2)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_inputs_are_not_written_and_outputs_are_new():
    t = make_inputs(Case())
    before = {k: v.clone() for k, v in t.items() if v is not None}
    y, s = run(Case(), t, None)
    assert all(torch.equal(t[k], v) for k, v in before.items())
    assert {y.data_ptr(), s.data_ptr()}.isdisjoint(v.data_ptr() for v in before.values())


def test_sum_is_x_itself_when_nothing_was_added():
    x = torch.randn(2, 8)
    _, s = rms_norm(x, torch.ones(8), prenorm=True)
    assert s is x
    _, s = rms_norm(x, torch.ones(8), prenorm=True, residual_in_fp32=True)
    assert s is x


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("dims", [6, 7, 9, 17])
def test_any_number_of_dims(backend, dims):
    """Reversed leading dims never merge; a kernel indexes 6 of them."""
    x, residual, dy = (torch.randn([2] * dims + [1]).expand(*[2] * dims, 3).permute(*range(dims - 1, -1, -1), dims) for _ in range(3))
    leaves = [t.detach().requires_grad_() for t in (x, torch.randn(3), residual)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y, s = rms_norm(leaves[0], leaves[1], None, leaves[2], True, backend=backend)
    expected = rms_norm(wide[0], wide[1], None, wide[2], True, backend="reference")
    assert_close(y, expected[0], OUTPUT[F32], "y")
    assert_close(s, expected[1], OUTPUT[F32], "s")
    got = torch.autograd.grad((y, s), leaves, (dy, x))
    for g, w in zip(got, torch.autograd.grad(expected, wide, (dy.double(), x.double()))):
        assert_close(g, w, GRADIENT[F32])


def test_stride_beyond_32_bits(tmp_path):
    """Two rows 2^31 + 7 elements apart, on a sparse file: an int offset would read elsewhere."""
    stride, dim = 2**31 + 7, 40
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + dim, dtype=BF16)
    x = storage.as_strided((2, dim), (stride, 1))
    x.copy_(torch.randn(2, dim))
    assert torch.equal(rms_norm(x, torch.ones(dim), backend="cpu"), rms_norm(x.clone(), torch.ones(dim), backend="cpu"))


# --- errors ----------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: rms_norm(X, W[:7]), ShapeError, ["rms_norm: weight", "(7,)", "dim=8", "comes from x"]),
        (lambda: rms_norm(X, W, bias=W[:7]), ShapeError, ["bias", "(7,)", "dim=8"]),
        (lambda: rms_norm(X, W, residual=X[:1]), ShapeError, ["residual", "(1, 8)", "(2, 8)"]),
        (lambda: rms_norm(torch.zeros(()), W), ShapeError, ["x", "no dims"]),
        (lambda: rms_norm(X.long(), W), DtypeError, ["x", "int64", "float32"]),
        (lambda: rms_norm(X, W.double()), DtypeError, ["weight", "float64", "float32", "does not mix"]),
        (lambda: rms_norm(X, W.int()), DtypeError, ["weight", "int32"]),
        (lambda: rms_norm([1.0], W), DtypeError, ["x", "list", "torch.Tensor"]),
        (lambda: rms_norm(X, None), DtypeError, ["weight is None", "torch.Tensor"]),
        (lambda: rms_norm(X.to_sparse(), W), DtypeError, ["x", "sparse_coo", "strided"]),
        (lambda: rms_norm(X, W, X[0].to_sparse()), DtypeError, ["bias", "sparse_coo", "strided"]),
        (lambda: rms_norm(X, W.to("meta")), DtypeError, ["weight", "meta", "cpu"]),
        (lambda: rms_norm(X, W, backend="fast"), ArgumentError, ["backend", "'fast'", "reference, cpu, triton, cuda"]),
        (lambda: rms_norm(X, W, backend=""), ArgumentError, ["backend", "''", "reference, cpu, triton, cuda"]),
        (lambda: rms_norm(X, W, backend="cuda"), BackendUnavailable, ["'cuda'", "CUDA tensors", "cpu"]),
    ],
)
def test_errors_name_argument_got_and_expected(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
def test_torch_op_called_directly_stays_inside_its_tensors():
    with pytest.raises(RuntimeError, match="weight has size 7"):
        torch.ops.cobra_kernels.rms_norm_fwd(X, W[:7], None, None, None, 1e-6, True)
    with pytest.raises(RuntimeError, match="float64"):
        torch.ops.cobra_kernels.rms_norm_fwd(X, W, None, None, F64, 1e-6, True)
    with pytest.raises(RuntimeError, match="x is not float32"):
        torch.ops.cobra_kernels.rms_norm_fwd(X.int(), W, None, None, None, 1e-6, True)
    with pytest.raises(RuntimeError, match="bias mixes float64"):
        torch.ops.cobra_kernels.rms_norm_bwd(X, None, X, W, W.double(), None, 1e-6, True)


def test_supports_says_what_the_op_does():
    assert cobra_kernels.supports("rms_norm", X, W, backend="reference") == (True, "reference; gradients: autograd of the reference")
    ok, reason = cobra_kernels.supports("rms_norm", X, W, backend="cuda")
    assert not ok and "CUDA tensors" in reason
    ok, reason = cobra_kernels.supports("rms_norm", X, W[:7])
    assert not ok and "weight" in reason


# --- torch -----------------------------------------------------------------------------------------------------------

OPCHECK_CASES = [Case(shape=(3, 17)), Case(bias=True, shape=(2, 3, 8)), Case(dtype=BF16), Case(residual_dtype=None), Case(shape=(0, 8)),
                 Case(is_rms_norm=False), Case(layout="transposed", shape=(3, 4, 5)), Case(dtype=F16, residual_dtype=F16)]  # fmt: skip


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=lambda c: c.id)
def test_opcheck(case):
    t = make_inputs(case)
    inputs = [v if v is None else v.requires_grad_() for v in t.values()]
    s_dtype = case.residual_dtype
    torch.library.opcheck(torch.ops.cobra_kernels.rms_norm.default, (*inputs, s_dtype, 1e-5, case.is_rms_norm, "cpu"))
    detached = [v if v is None else v.detach() for v in inputs]
    torch.library.opcheck(torch.ops.cobra_kernels.rms_norm_fwd.default, (*detached, s_dtype, 1e-5, case.is_rms_norm))


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compile_fullgraph(backend):
    t = make_inputs(Case(bias=True))
    leaves = [v.requires_grad_() for v in t.values()]

    def f(*tensors):
        y, s = rms_norm(*tensors, prenorm=True, backend=backend)
        return y.sin() + s

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    cobra_kernels.reset_call_counts()
    out = compiled(*leaves)
    assert_close(out, f(*leaves), 1e-6)
    if backend is None and kernel_backends():
        assert cobra_kernels.call_counts()["rms_norm", "cpu"] >= 1  # the compiled graph calls the kernel
    for got, want in zip(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(f(*leaves).sum(), leaves)):
        assert_close(got, want, 1e-6)


@pytest.mark.skipif(not kernel_backends(), reason="no compiled kernels")
def test_use_backend_ends_with_its_block():
    """Blocks nest, and one that ends by an error ends too."""

    def served_by():
        return cobra_kernels.supports("rms_norm", X, W)[1].split(";")[0]

    default = served_by()
    with cobra_kernels.use_backend("reference"):
        with cobra_kernels.use_backend(None):
            assert served_by() == default
        assert served_by() == "reference"
    assert served_by() == default
    with pytest.raises(KeyError), cobra_kernels.use_backend("reference"):
        raise KeyError
    assert served_by() == default


@pytest.mark.skipif(not kernel_backends(), reason="no compiled kernels")
def test_compiled_code_follows_use_backend():
    f = torch.compile(lambda x: rms_norm(x, W) * 2, fullgraph=True, backend="aot_eager")
    f(X)
    cobra_kernels.reset_call_counts()
    with cobra_kernels.use_backend("reference"):
        f(X)
    assert ("rms_norm", "cpu") not in cobra_kernels.call_counts()
    f(X)
    assert cobra_kernels.call_counts()["rms_norm", "cpu"] == 1


@pytest.mark.skipif(not kernel_backends(), reason="no compiled kernels")
@pytest.mark.filterwarnings("ignore:cobra_kernels.*runs on 'reference':RuntimeWarning")
def test_torch_func_and_forward_mode_run_on_the_reference():
    x, v = torch.randn(2, 3, 8)

    def f(a, backend=None):
        return rms_norm(a, W, backend=backend)

    def g(a):
        return f(a, "reference")

    _, tangent = torch.func.jvp(f, (x,), (v,))
    assert_close(tangent, torch.func.jvp(g, (x,), (v,))[1], 1e-6)
    assert_close(torch.func.grad(lambda a: f(a).square().sum())(x), torch.func.grad(lambda a: g(a).square().sum())(x), 1e-6)
    assert_close(torch.func.vmap(f)(x[:, None]), f(x)[:, None], 1e-6)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(BackendUnavailable, match="'cpu'.*forward-mode"):
        f(x, "cpu")


def test_autocast_accepts_the_mix():
    with torch.autocast("cpu", dtype=BF16):
        x = torch.nn.functional.linear(torch.randn(3, 8), torch.randn(8, 8))
        assert rms_norm(x, torch.ones(8)).dtype == BF16
