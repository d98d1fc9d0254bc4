"""The projectors' Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_projector import (  # noqa: E402
    Case,
    gradient_arguments,
    in_fp64,
    make_inputs,
    op_arguments,
    roundings,
    run,
)  # fmt: skip
from tests.tolerances import GEMM, GRADIENT, OUTPUT, relative_error  # noqa: E402
from tests.triton_proof import assert_no_spills, interpreted_results  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# id: ldp, case, parts of the depth. Tiles of 16 x 16 x 16: the interpreter runs each program in Python.
CASES = {
    "base": (False, Case(lead=(2, 9), vision=(20, 13), widths=(24, 17)), 1),
    "one-layer": (False, Case(lead=(5,), vision=(33,), widths=(16,)), 1),
    "three-segments": (False, Case(lead=(3,), vision=(5, 1, 17), widths=(9,), bias=False), 1),
    "no-channels": (False, Case(lead=(3,), vision=(0, 5), widths=(9,)), 1),
    "bf16": (False, Case(lead=(17,), vision=(16, 17), widths=(33, 8), dtype=BF16), 1),
    "fp16-mixed": (False, Case(lead=(4,), vision=(9, 30), widths=(20, 3), dtype=F16, weight_dtype=F32), 1),
    "parts": (False, Case(lead=(17,), vision=(40, 33), widths=(18, 7)), 3),
    "more-parts-than-steps": (False, Case(lead=(3,), vision=(20, 5), widths=(18,), bias=False), 5),
    "transposed": (False, Case(lead=(3, 4), vision=(20, 5), widths=(18, 5), layout="transposed"), 2),
    "sliced": (False, Case(lead=(3, 4), vision=(20, 5), widths=(18, 5), layout="sliced", dtype=BF16), 1),
    "expanded": (False, Case(lead=(3, 4), vision=(20,), widths=(18, 5), layout="expanded"), 1),
    "empty": (False, Case(lead=(0,), vision=(20,), widths=(18, 5)), 1),
    "ldp": (True, Case(lead=(2, 35), vision=(5, 4), widths=(17, 20), grid=(5, 7), out_grid=(3, 4)), 1),
    "ldp-overlapping-bins": (True, Case(lead=(1, 6), vision=(9,), widths=(33, 7), grid=(2, 3), out_grid=(5, 5), bias=False), 1),
    "ldp-bf16": (True, Case(lead=(2, 9), vision=(9,), widths=(17, 18), dtype=BF16), 2),
    "ldp-empty": (True, Case(lead=(0, 9), vision=(9,), widths=(17, 18)), 1),
}  # fmt: skip


# id: ldp, case, indices of the tensors whose gradients are wanted (None: all).
GRADIENT_CASES = {
    "base": (False, Case(lead=(2, 9), vision=(20, 13), widths=(24, 17)), None),
    "three-layers": (False, Case(lead=(19,), vision=(9,), widths=(18, 7, 5)), None),
    "one-layer": (False, Case(lead=(5,), vision=(33, 2), widths=(16,)), None),
    "bf16": (False, Case(lead=(17,), vision=(16, 17), widths=(33, 8), dtype=BF16), None),
    "fp16-mixed": (False, Case(lead=(4,), vision=(9, 30), widths=(20, 3), dtype=F16, weight_dtype=F32), None),
    "expanded": (False, Case(lead=(3, 4), vision=(20,), widths=(18, 5), layout="expanded"), None),
    "bias-of-the-first-layer": (False, Case(lead=(3,), vision=(4,), widths=(5, 6)), (3,)),
    "empty": (False, Case(lead=(0,), vision=(20,), widths=(18, 5)), None),
    "ldp": (True, Case(lead=(2, 35), vision=(5, 4), widths=(17, 20), grid=(5, 7), out_grid=(3, 4)), None),
    "ldp-overlapping-bins": (True, Case(lead=(1, 6), vision=(9,), widths=(33, 7), grid=(2, 3), out_grid=(5, 5), bias=False), None),
    "ldp-bf16": (True, Case(lead=(2, 9), vision=(9,), widths=(17, 18), dtype=BF16), None),
    "ldp-filter-alone": (True, Case(lead=(2, 9), vision=(9,), widths=(17, 18)), (5,)),
    "ldp-empty": (True, Case(lead=(0, 9), vision=(9,), widths=(17, 18)), None),
}  # fmt: skip


# As small as can be: opcheck runs each some thirty times.
TINY = Case(lead=(1, 4), vision=(3,), widths=(4, 2), out_grid=(1, 2))
OPCHECKS = [TINY, *(TINY._replace(**change) for change in (
    {"bias": False}, {"dtype": BF16}, {"lead": (0, 4)}, {"layout": "transposed"}, {"vision": (2, 1)}, {"weight_dtype": F16},
    {"lead": (1, 2), "grid": (1, 2), "out_grid": (1, 1)}))]  # fmt: skip


def opchecks() -> None:
    """All four tests of the differentiable ops by Triton, of their forward and their backward."""
    op = torch.ops.cobra_kernels
    for case in OPCHECKS:
        for name, ldp in (("mlp_projector", False), ("ldp_projector", True)):
            tensors = make_inputs(case, ldp)
            torch.library.opcheck(getattr(op, f"{name}_fwd_triton").default, op_arguments(case, tensors, ldp))
            torch.library.opcheck(getattr(op, f"{name}_bwd_triton").default, gradient_arguments(case, tensors, ldp, "triton"))
            leaves = [t if t is None else t.requires_grad_() for t in tensors]
            torch.library.opcheck(getattr(op, name).default, (*op_arguments(case, leaves, ldp), "triton"))


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, [error, limit], of gradients the worst ratio of the two."""
    from cobra_kernels import call_counts
    from cobra_kernels.ops.projector import triton_kernel

    triton_kernel.SMALL_TILE = {"BLOCK_ROWS": 16, "BLOCK_COLS": 16, "BLOCK_DEPTH": 16}
    triton_kernel.BLOCK_CHANNELS = triton_kernel.SUM_COLUMNS = 16
    for name, (ldp, case, split) in CASES.items():
        triton_kernel.linear_split = lambda *_, split=split: split
        tensors = make_inputs(case, ldp)
        out = run(case, tensors, "triton", ldp)
        assert out.dtype == case.dtype and out.is_contiguous()
        expected = run(case, in_fp64(tensors), "reference", ldp)
        # The interpreter cuts fp32 to bf16 instead of rounding it, which a GPU does: twice the error.
        limit = GEMM if case.dtype == F32 else OUTPUT[case.dtype] * roundings(case, ldp) ** 0.5 * (2 if case.dtype == BF16 else 1)
        print(json.dumps({name: [relative_error(out, expected), limit]}))
    for name, (ldp, case, want) in GRADIENT_CASES.items():
        triton_kernel.linear_split = lambda *_: 1
        results = []
        for backend, tensors in (("triton", make_inputs(case, ldp)), ("reference", in_fp64(make_inputs(case, ldp)))):
            leaves = [t.requires_grad_() if t is not None and (want is None or i in want) else t for i, t in enumerate(tensors)]
            out = run(case, leaves, backend, ldp)
            dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(case.dtype).to(out.dtype)
            dout = dout[..., :1].expand(out.shape) if case.layout == "expanded" else dout.transpose(0, -1).contiguous().transpose(0, -1)
            results.append(torch.autograd.grad(out, [t for t in leaves if t is not None and t.requires_grad], dout))
        limits = [max(GRADIENT[t.dtype], GRADIENT[case.dtype]) * (2 * roundings(case, ldp) ** 0.5 if case.dtype != F32 else 1) for t in results[0]]
        print(json.dumps({f"gradient-{name}": max([relative_error(t, wide) / limit for t, wide, limit in zip(*results, limits)])}))
    opchecks()
    assert call_counts()[("mlp_projector_bwd", "triton")] and call_counts()[("ldp_projector_bwd", "triton")]
    assert call_counts()[("mlp_projector", "triton")] and call_counts()[("ldp_projector", "triton")]


@pytest.fixture(scope="module")
def errors():
    """case -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", CASES)
def test_interpreter(errors, case):
    error, limit = errors[case]
    assert error <= limit


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_interpreted_gradients(errors, case):
    assert errors[f"gradient-{case}"] <= 1


def test_split_fills_the_gpu():
    from cobra_kernels.ops.projector.triton_kernel import linear_split

    assert linear_split(408, 34, 132) == 1  # 729 x 8704
    assert linear_split(40, 136, 132) == 3  # 196 x 2560
    assert linear_split(1, 10**6, 132) == 16
    assert linear_split(1, 1, 132) == 1


# --- registers -------------------------------------------------------------------------------------------------------


def kernel_signature(kernel_name: str, dtype: str, pool: bool = False):
    """(kernel, arguments, warps) as a launch on plain tensors would specialise them."""
    from cobra_kernels.ops.projector import triton_kernel

    widen = dtype == "*fp32"
    constants = {
        **(triton_kernel.SMALL_TILE if widen else triton_kernel.TILE), "SPLIT": 2 if kernel_name == "_parts_kernel" else 1, "HAS_BIAS": True,
        "GELU": True, "WIDEN": widen, "BLOCK": 1024 if kernel_name == "_parts_kernel" else triton_kernel.BLOCK_CHANNELS, "x0_step": 1, "x1_step": 1, "weight_step": 1,
        "bias_step": 1, "p_bias_step": 1, "d_step": 1, "dy_channel": 1, "HAS_SUMS": True, "STORE_DZ": True, "STORE_SUM": True,
        "STORE_SUMS": True, "STORE_DP": True, "POOL": pool, "WIDE_GRID": False, "BLOCKS": 128, "COLUMNS": triton_kernel.SUM_COLUMNS,
    }  # fmt: skip
    kernel = getattr(triton_kernel, kernel_name)
    arguments = []
    for name in kernel.arg_names:
        if name in constants:
            kind = ("constexpr", constants[name])
        elif name in ("parts", "sums", "partial"):
            kind = "*fp32"
        elif name in ("x0", "x1", "weight", "bias", "y", "hidden", "pooled", "p", "out", "d", "dz", "dy", "dp", "p_bias"):
            kind = dtype
        else:
            kind = "i32"
        arguments.append((name, kind))
    return kernel, arguments, 8 if kernel_name == "_linear_kernel" else 4


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, dtype", [("_linear_kernel", "*bf16"), ("_linear_kernel", "*fp32"), ("_parts_kernel", "*fp16"),
                                           ("_pool_kernel", "*bf16"), ("_peg_kernel", "*bf16"), ("_gelu_bwd_kernel", "*bf16"),
                                           ("_gelu_bwd_kernel-pool", "*fp32"), ("_peg_bwd_kernel", "*bf16"), ("_taps_kernel", "*bf16"),
                                           ("_column_sums_kernel", "*bf16")])  # fmt: skip
def test_cross_compiled_without_spills(kernel, dtype, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps = kernel_signature(kernel.removesuffix("-pool"), dtype, kernel.endswith("-pool"))
    divisible = [name for name, kind in arguments if isinstance(kind, str)]
    compiled = cross_compile(function, arguments, capability, warps, divisible)
    assert_no_spills(compiled, tmp_path, f"{kernel} on sm_{capability}")
