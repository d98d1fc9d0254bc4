"""rms_norm's Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile, merge_rows  # noqa: E402
from tests.tolerances import GRADIENT, OUTPUT, relative_error  # noqa: E402
from tests.triton_proof import assert_no_spills, interpreted_results, opchecked  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# id: shape, x dtype, residual dtype, keywords. Tiny: the interpreter runs each program in Python.
CASES = {
    "base": ((3, 40), F32, F32, {}),
    "layer-norm": ((3, 33), F32, F32, {"is_rms_norm": False}),
    "one-channel": ((4, 1), F32, None, {}),
    "bf16": ((2, 65), BF16, F32, {}),
    "fp16-no-residual": ((2, 64), F16, None, {"residual_in_fp32": True}),
    "row-blocks": ((35, 9), F32, BF16, {}),
    "wide": ((2, 40), F32, F32, {"block": 16}),
    "wide-layer-norm-bf16": ((3, 33), BF16, BF16, {"block": 16, "is_rms_norm": False}),
    "transposed": ((3, 4, 17), F32, F32, {"layout": "transposed"}),
    "sliced": ((2, 3, 4, 17), F32, F32, {"layout": "sliced"}),
    "expanded": ((3, 4, 16), F32, F32, {"layout": "expanded"}),
    "no-rows": ((0, 16), F32, F32, {}),
}

# id: shape, x dtype, residual dtype, bias and LayerNorm, layout.
OPCHECKS = {
    "opcheck": ((3, 17), F32, F32, False, "contiguous"),
    "opcheck-layer-norm-bf16": ((2, 3, 8), BF16, None, True, "contiguous"),
    "opcheck-transposed": ((3, 4, 5), F32, F32, True, "transposed"),
    "opcheck-no-rows": ((0, 8), F16, F16, False, "contiguous"),
}


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, result -> [error, limit]."""
    from cobra_kernels import rms_norm
    from cobra_kernels.ops.rms_norm import triton_kernel
    from tests.ops.test_rms_norm import laid_out

    blocks = triton_kernel.MAX_BLOCK_FWD, triton_kernel.MAX_BLOCK_BWD
    for name, (shape, dtype, residual_dtype, options) in CASES.items():
        block, layout = options.get("block"), options.get("layout", "contiguous")
        keywords = {k: v for k, v in options.items() if k not in ("block", "layout")}
        triton_kernel.MAX_BLOCK_FWD, triton_kernel.MAX_BLOCK_BWD = (block, block) if block else blocks
        g = torch.Generator().manual_seed(0)
        x = laid_out((torch.randn(shape, generator=g) + 0.5).to(dtype), layout)
        weight, bias = torch.randn(shape[-1], generator=g).to(dtype), torch.randn(shape[-1], generator=g)
        residual = None if residual_dtype is None else laid_out(torch.randn(shape, generator=g).to(residual_dtype), layout)
        dy, ds = torch.randn(shape, generator=g), torch.randn(shape, generator=g)

        def run(backend, convert, inputs=(x, weight, bias, residual), keywords=keywords, dy=dy, ds=ds):
            leaves = [None if t is None else convert(t).detach().requires_grad_() for t in inputs]
            y, s = rms_norm(*leaves, prenorm=True, backend=backend, **keywords)
            given = [t for t in leaves if t is not None]
            grads = torch.autograd.grad([y, s], given, [dy.to(y.dtype).to(y), ds.to(s.dtype)])
            limits = [OUTPUT[y.dtype], OUTPUT[s.dtype], *(GRADIENT[t.dtype] for t in given)]
            # The interpreter cuts fp32 to bf16 instead of rounding it, which a GPU does: twice the error.
            return [y, s, *grads], [2 * limit if t.dtype == BF16 else limit for t, limit in zip((y, s, *given), limits)]

        got, limits = run("triton", lambda t: t)
        # The incoming gradients are rounded as the kernel sees them.
        dy64, ds64 = dy.to(got[0].dtype).double(), ds.to(got[1].dtype).double()
        expected, _ = run("reference", torch.Tensor.double, dy=dy64, ds=ds64)
        names = ["y", "s", "dx", "dweight", "dbias", "dresidual"]
        print(json.dumps({name: {n: [relative_error(a, b), limit] for n, a, b, limit in zip(names, got, expected, limits)}}))

    triton_kernel.MAX_BLOCK_FWD, triton_kernel.MAX_BLOCK_BWD = blocks
    ops = torch.ops.cobra_kernels
    for name, (shape, dtype, residual_dtype, full, layout) in OPCHECKS.items():
        x, dy = (laid_out(torch.randn(shape).to(dtype), layout) for _ in range(2))
        residual = None if residual_dtype is None else laid_out(torch.randn(shape).to(residual_dtype), layout)
        weight, bias = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]) if full else None
        ds = None if residual is None else torch.randn_like(residual)
        inputs = (x, weight, bias, residual)
        results = {f"fwd {k}": v for k, v in opchecked(ops.rms_norm_fwd_triton.default, (*inputs, residual_dtype, 1e-5, not full)).items()}
        results |= {f"bwd {k}": v for k, v in opchecked(ops.rms_norm_bwd_triton.default, (dy, ds, *inputs, 1e-5, not full)).items()}
        leaves = [t if t is None else t.requires_grad_() for t in inputs]
        results |= opchecked(ops.rms_norm.default, (*leaves, residual_dtype, 1e-5, not full, "triton"))
        print(json.dumps({name: results}))


@pytest.fixture(scope="module")
def errors():
    """case -> result -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", [*CASES, *OPCHECKS])
def test_interpreter(errors, case):
    wrong = {name: pair for name, pair in errors[case].items() if not pair[0] <= pair[1]}
    assert not wrong, f"result: [relative error, limit]: {wrong}"


def test_merge_rows():
    t = torch.empty(2, 3, 4, 5)
    assert merge_rows(t) == ((24,), [(5,)])
    assert merge_rows(t, None) == ((24,), [(5,), (0,)])
    assert merge_rows(t.transpose(1, 2)) == ((2, 4, 3), [(60, 5, 20)])
    assert merge_rows(t[:, :2], t.new_empty(2, 2, 4, 5)) == ((2, 8), [(60, 5), (40, 5)])
    assert merge_rows(t.new_empty(1, 1, 5)) == ((1,), [(0,)])
    assert merge_rows(t.new_empty(5)) == ((1,), [(0,)])
    assert merge_rows(t.new_empty(1, 7).expand(6, 7)) == ((6,), [(0,)])


# --- registers -------------------------------------------------------------------------------------------------------


def constexpr(value):
    return ("constexpr", value)


def norm_signature(kernel_name: str, dtype: str, dim: int):
    """(kernel, arguments, warps) as a launch on plain tensors of width `dim` would specialise them."""
    from cobra_kernels.ops.rms_norm import triton_kernel

    forward = kernel_name == "_fwd_kernel"
    config = triton_kernel._block(dim, triton_kernel.MAX_BLOCK_FWD if forward else triton_kernel.MAX_BLOCK_BWD)
    warps = config.pop("num_warps")
    kernel = getattr(triton_kernel, kernel_name)
    pointers = {"x": dtype, "weight": dtype, "bias": dtype, "y": dtype, "dy": dtype, "dx": dtype}
    arguments = []
    for name in kernel.arg_names:
        if name in config:
            kind = constexpr(config[name])
        elif name in ("HAS_RESIDUAL", "HAS_BIAS", "STORE_S", "HAS_DS"):
            kind = constexpr(True)
        elif name == "RMS":
            kind = constexpr(False)  # LayerNorm holds more
        elif name == "NDIM" or name.endswith("_stride"):
            kind = constexpr(1)
        elif name.endswith("_rows") or name == "sizes":
            kind = ("i64",)
        elif name in ("rows", "rows_per_block"):
            kind = "i64"
        else:
            kind = {"dim": "i32", "eps": "fp32"}.get(name) or pointers.get(name, "*fp32")
        arguments.append((name, kind))
    return kernel, arguments, warps


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, dim", [("_fwd_kernel", 8192), ("_bwd_kernel", 4096), ("_bwd_kernel", 9000)])
def test_cross_compiled_without_spills(kernel, dim, capability, tmp_path):
    """The widest block of each kind: no stack, which is where a spill would go."""
    function, arguments, warps = norm_signature(kernel, "*bf16", dim)
    compiled = cross_compile(function, arguments, capability, warps)
    assert_no_spills(compiled, tmp_path, f"{kernel} on sm_{capability}")
