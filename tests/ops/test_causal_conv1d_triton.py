"""causal_conv1d's Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_causal_conv1d import BF16, F16, F32, STATES, Case, in_fp64, make_inputs, run  # noqa: E402
from tests.tolerances import OUTPUT, relative_error  # noqa: E402
from tests.triton_proof import assert_no_spills, interpreted_results  # noqa: E402

# Tiny: the interpreter runs each program in Python. On both sides of a tile: 128 channels by 16 steps, 512 steps by 4 channels.
CASES = [
    *(Case(layout=x, states=s) for x in ("channel_first", "channel_last") for s in STATES),
    *(Case(width=w, states=s) for w in (1, 7) for s in ("initial", "packed_initial", "seq_idx")),
    Case(seqlen=2, states="initial"),
    Case(seqlen=2, states="none", layout="channel_last"),
    Case(dim=130, seqlen=17, layout="channel_last", batch=1),
    Case(dim=5, seqlen=515, batch=1),
    Case(dim=70, width=6, seqlen=3, states="initial"),
    *(Case(layout=x, states="packed_initial") for x in ("sliced_first", "sliced_last", "unaligned", "strided")),
    Case(layout="expanded", states="seq_idx"),
    Case(dtype=BF16, layout="channel_last"),
    Case(dtype=F16, weight_dtype=F32, state_dtype=BF16, states="initial"),
    Case(bias=False, activation=None),
    *(Case(states="packed", bounds=b) for b in ((0,), (0, 0, 0), (0, 1, 2, 3, 19))),
    Case(seqlen=0, states="initial"),
    Case(dim=0),
]
BAD_BOUNDS = ([-5, 40], [3, 1, 99], [10, 0], [0, 4, 2, 10], [6, 8, 7, 10])


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, result -> [error, limit]."""
    for case in CASES:
        kwargs = make_inputs(case)
        got, expected = run(kwargs, "triton"), run(in_fp64(kwargs), "reference")
        # The interpreter cuts fp32 to bf16 instead of rounding it, which a GPU does: twice the error.
        limit = OUTPUT[case.dtype] * (2 if case.dtype == BF16 else 1)
        print(json.dumps({case.id: {n: [relative_error(g, e), limit] for n, g, e in zip(("y", "final_states"), got, expected)}}))

    # A NaN in one sequence, or in padding, reaches no other output; bad boundaries reach nothing outside a tensor.
    kwargs = make_inputs(Case(states="packed"))
    clean = run(kwargs, "triton")[0]
    kwargs["x"][..., 5:7] = kwargs["x"][..., 18:] = float("nan")
    y = run(kwargs, "triton")[0]
    same = torch.ones(19, dtype=torch.bool)
    same[5:7] = False
    print(json.dumps({"nan": {"changed": [float((y[..., same] != clean[..., same]).sum()), 0.0]}}))
    op = torch.ops.cobra_kernels.causal_conv1d_fwd_triton
    for bounds in BAD_BOUNDS:
        initial = torch.full((len(bounds) - 1, 3, 23), float("nan"))
        initial[..., 20:] = 1
        y, final = op(torch.ones(1, 3, 10), torch.ones(3, 4), None, None, initial[..., 20:], True, False, torch.tensor(bounds))
        print(json.dumps({f"bounds={bounds}": {"bad": [float((~y.isfinite()).sum() + (~final.isfinite()).sum()), 0.0]}}))


@pytest.fixture(scope="module")
def errors():
    """case -> result -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", [*(case.id for case in CASES), "nan", *(f"bounds={b}" for b in BAD_BOUNDS)])
def test_interpreter(errors, case):
    wrong = {name: pair for name, pair in errors[case].items() if not pair[0] <= pair[1]}
    assert not wrong, f"result: [relative error, limit]: {wrong}"


# --- registers -------------------------------------------------------------------------------------------------------


def signature(kernel_name: str, channel_last: bool, flags: bool):
    """(kernel, arguments, warps) as a launch on plain bf16 tensors would specialise them."""
    from cobra_kernels.ops.causal_conv1d import triton_kernel

    config = triton_kernel._tile(5120, 2048, channel_last)
    warps = config.pop("num_warps")
    kernel = getattr(triton_kernel, kernel_name)
    config |= {"WIDTH": 4, "BLOCK": triton_kernel.FINAL_CHANNELS, "HAS_SEQ_IDX": False, "SILU": True}
    unit_strides = ("weight_width", "bias_stride", "cu_stride", *(("x_dim", "y_dim") if channel_last else ("x_time", "y_time")))
    arguments = []
    for name in kernel.arg_names:
        if name in config:
            kind = ("constexpr", config[name])
        elif name.startswith("HAS_") or name == "PACKED":
            kind = ("constexpr", flags)
        elif name in unit_strides:
            kind = ("constexpr", 1)
        elif name in ("x", "weight", "bias", "initial", "y", "final"):
            kind = "*bf16"
        elif name in ("cu_seqlens", "seq_idx"):
            kind = "*i32"
        else:
            kind = "i32" if name in ("dim", "seqlen", "num_seqs", "search_steps", "past") else "i64"
        arguments.append((name, kind))
    return kernel, arguments, warps


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, channel_last, flags", [("_fwd_kernel", True, True), ("_fwd_kernel", False, True), ("_final_kernel", True, True)])
def test_cross_compiled_without_spills(kernel, channel_last, flags, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps = signature(kernel, channel_last, flags)
    compiled = cross_compile(function, arguments, capability, warps)
    assert_no_spills(compiled, tmp_path, f"{kernel} on sm_{capability}")
