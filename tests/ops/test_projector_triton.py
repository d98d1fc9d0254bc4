"""The projectors' Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_projector import Case, in_fp64, make_inputs, roundings, run  # noqa: E402
from tests.tolerances import GEMM, OUTPUT, relative_error  # noqa: E402
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


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, [error, limit]."""
    from cobra_kernels import call_counts
    from cobra_kernels.ops.projector import triton_kernel

    triton_kernel.SMALL_TILE, triton_kernel.BLOCK_CHANNELS = {"BLOCK_ROWS": 16, "BLOCK_COLS": 16, "BLOCK_DEPTH": 16}, 16
    for name, (ldp, case, split) in CASES.items():
        triton_kernel.linear_split = lambda *_, split=split: split
        tensors = make_inputs(case, ldp)
        out = run(case, tensors, "triton", ldp)
        assert out.dtype == case.dtype and out.is_contiguous()
        expected = run(case, in_fp64(tensors), "reference", ldp)
        # The interpreter cuts fp32 to bf16 instead of rounding it, which a GPU does: twice the error.
        limit = GEMM if case.dtype == F32 else OUTPUT[case.dtype] * roundings(case, ldp) ** 0.5 * (2 if case.dtype == BF16 else 1)
        print(json.dumps({name: [relative_error(out, expected), limit]}))
    assert call_counts()[("mlp_projector", "triton")] and call_counts()[("ldp_projector", "triton")]


@pytest.fixture(scope="module")
def errors():
    """case -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", CASES)
def test_interpreter(errors, case):
    error, limit = errors[case]
    assert error <= limit


def test_split_fills_the_gpu():
    from cobra_kernels.ops.projector.triton_kernel import linear_split

    assert linear_split(408, 34, 132) == 1  # 729 x 8704
    assert linear_split(40, 136, 132) == 3  # 196 x 2560
    assert linear_split(1, 10**6, 132) == 16
    assert linear_split(1, 1, 132) == 1


# --- registers -------------------------------------------------------------------------------------------------------


def kernel_signature(kernel_name: str, dtype: str):
    """(kernel, arguments, warps) as a launch on plain tensors would specialise them."""
    from cobra_kernels.ops.projector import triton_kernel

    widen = dtype == "*fp32"
    constants = {
        **(triton_kernel.SMALL_TILE if widen else triton_kernel.TILE), "SPLIT": 2 if kernel_name == "_parts_kernel" else 1, "HAS_BIAS": True,
        "GELU": True, "WIDEN": widen, "BLOCK": 1024 if kernel_name == "_parts_kernel" else triton_kernel.BLOCK_CHANNELS, "x0_step": 1, "x1_step": 1, "weight_step": 1,
        "bias_step": 1,
    }  # fmt: skip
    kernel = getattr(triton_kernel, kernel_name)
    arguments = []
    for name in kernel.arg_names:
        if name in constants:
            kind = ("constexpr", constants[name])
        elif name == "parts":
            kind = "*fp32"
        elif name in ("x0", "x1", "weight", "bias", "y", "hidden", "pooled", "p", "out"):
            kind = dtype
        else:
            kind = "i32"
        arguments.append((name, kind))
    return kernel, arguments, 8 if kernel_name == "_linear_kernel" else 4


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, dtype", [("_linear_kernel", "*bf16"), ("_linear_kernel", "*fp32"), ("_parts_kernel", "*fp16"),
                                           ("_pool_kernel", "*bf16"), ("_peg_kernel", "*bf16")])  # fmt: skip
def test_cross_compiled_without_spills(kernel, dtype, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps = kernel_signature(kernel, dtype)
    divisible = [name for name, kind in arguments if isinstance(kind, str)]
    compiled = cross_compile(function, arguments, capability, warps, divisible)
    assert_no_spills(compiled, tmp_path, f"{kernel} on sm_{capability}")
