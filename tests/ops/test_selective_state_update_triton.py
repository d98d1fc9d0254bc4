"""selective_state_update's Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json
import re
import tempfile

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels import selective_state_update  # noqa: E402
from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_selective_state_update import BF16, F16, F32, Case, in_fp64, make_inputs, run  # noqa: E402
from tests.tolerances import OUTPUT, relative_error  # noqa: E402
from tests.triton_proof import OPCHECK_TESTS, assert_no_spills, interpreted_results, opchecked  # noqa: E402

# Tiny: the interpreter runs each program in Python. On both sides of a block of channels (64 at 16 states) and of states (128).
CASES = [
    Case(batch=2),
    Case(dim=1, dstate=1),
    Case(dim=7, dstate=3, dtype=BF16),
    Case(dim=64, dtype=F16, state_dtype=F32),
    Case(dim=9, dstate=128, batch=1),
    Case(dim=9, dstate=257, batch=1),
    Case(dtype=BF16, state_dtype=F32, weight_dtype=F16, dim=20),
    Case(D=False, z=False, dt_bias=False, dt_softplus=False, dim=5),
    Case(dim=20, groups=5),
    Case(heads=4, dim=9, groups=2, dstate=5),
    Case(heads=4, dim=9, groups=2, indices=torch.int32, state_dtype=BF16, tie=True),
    Case(dim=17, batch=5, indices=torch.int64),
    *(Case(dim=17, dstate=6, layout=x) for x in ("transposed", "sliced", "unaligned")),
    Case(batch=0),
    Case(dim=0),
]
OPCHECKS = {
    "opcheck": Case(dim=9),
    "opcheck-heads": Case(heads=4, dim=3, groups=2, dtype=BF16, dstate=3),
    "opcheck-bare": Case(dim=5, D=False, z=False, dt_bias=False, layout="transposed"),
    "opcheck-pool": Case(dim=5, indices=torch.int32),
    "opcheck-no-rows": Case(batch=0, dim=5),
}


def limit_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """As test_selective_state_update's. The interpreter cuts fp32 to bf16 instead of rounding it, which a GPU does: twice the error."""
    rounding = relative_error(expected.to(got.dtype), expected)
    return max(OUTPUT[got.dtype], 1.05 * rounding) * (2 if got.dtype == BF16 else 1)


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, result -> [error, limit]."""
    for case in CASES:
        tensors = make_inputs(case)
        if case.indices is not None:
            tensors["x"][-1] = float("nan")  # padding may hold anything
        got, expected = run(tensors, "triton"), run(in_fp64(tensors), "reference")
        print(json.dumps({case.id: {n: [relative_error(g, e), limit_of(g, e)] for n, g, e in zip(("out", "state"), got, expected)}}))
    # Nothing but padding, and a pool without rows.
    tensors = make_inputs(Case(batch=2, dim=5, indices=torch.int64)) | {"state_batch_indices": torch.tensor([-1, -7])}
    tensors["state"] = tensors["state"][:0]
    print(json.dumps({"padding": {"out": [run(tensors, "triton")[0].abs().max().item(), 0.0]}}))
    # An index beyond the pool that no check stopped: clamped to its last row. A strided view of the indices.
    from cobra_kernels.ops.selective_state_update import triton_kernel

    tensors = make_inputs(Case(batch=2, dim=5, indices=torch.int64))
    state, _ = tensors.pop("state"), tensors.pop("state_batch_indices")
    clamped = triton_kernel.selective_state_update(state.clone(), *tensors.values(), torch.tensor([10**9, 0, 1])[::2])
    expected = triton_kernel.selective_state_update(state.clone(), *tensors.values(), torch.tensor([state.shape[0] - 1, 1]))
    print(json.dumps({"wild indices": {"different bits": [int((clamped != expected).sum()), 0]}}))

    # Rows of the pool 2^31 + 7 elements apart, on a sparse file: an offset of 32 bits would write elsewhere.
    tensors, apart = make_inputs(Case(batch=2, dim=5, dstate=4, dtype=BF16)), 2**31 + 7
    out, state = run(tensors, "triton")
    with tempfile.NamedTemporaryFile() as file:
        storage = torch.from_file(file.name, shared=True, size=apart + 20, dtype=BF16)
        far = storage.as_strided((2, 5, 4), (apart, 4, 1)).copy_(tensors["state"])
        there = selective_state_update(**{**tensors, "state": far}, backend="triton")
        different = int((there != out).sum() + (far != state).sum())
    print(json.dumps({"far rows": {"different bits": [different, 0]}}))

    # With A = 0, B = C = x = 1 and no state, out is the step itself.
    raw = torch.tensor([[-200.0, -80.0, -17.5, -3.2, -1e-3, 0.0, 1e-3, 3.2, 19.9, 20.1, 100.0, 1e4]])
    state, one = torch.zeros(1, 12, 1), torch.ones(1, 12)
    tensors = {"state": state, "x": one, "dt": raw, "A": torch.zeros(12, 1), "B": one[:, :1], "C": one[:, :1], "dt_softplus": True}
    step = run(tensors, "triton")[0]
    wide = raw.double()
    expected = torch.where(wide > 20, wide, torch.log1p(torch.exp(wide)))
    print(json.dumps({"softplus": {"worst": [((step - expected).abs() / expected.clamp(min=1e-37)).max().item(), 6e-7]}}))

    for name, case in OPCHECKS.items():
        # Which rows of a pool are live is data, so a dynamic trace of random indices cannot be replayed.
        tests = OPCHECK_TESTS if case.indices is None else OPCHECK_TESTS[:3]
        op = torch.ops.cobra_kernels.selective_state_update_fwd_triton.default
        print(json.dumps({name: opchecked(op, tuple(make_inputs(case).values()), tests)}))


@pytest.fixture(scope="module")
def errors():
    """case -> result -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", [*(case.id for case in CASES), "padding", "wild indices", "far rows", "softplus", *OPCHECKS])
def test_interpreter(errors, case):
    wrong = {name: pair for name, pair in errors[case].items() if not pair[0] <= pair[1]}
    assert not wrong, f"result: [relative error, limit]: {wrong}"


# --- registers -------------------------------------------------------------------------------------------------------


def signature(state_dtype: str, dim: int, dstate: int, flags: bool):
    """(kernel, arguments, warps) as a launch on plain tensors would specialise them."""
    from cobra_kernels.ops.selective_state_update import triton_kernel

    config = triton_kernel._config(dim, dstate)
    warps = config.pop("num_warps")
    kernel = triton_kernel._update_kernel
    arguments = []
    for name in kernel.arg_names:
        if name in config:
            kind = ("constexpr", config[name])
        elif name.startswith("HAS_") or name == "SOFTPLUS":
            kind = ("constexpr", flags)
        elif name.endswith("_state") or name in ("x_dim", "dt_dim", "z_dim", "out_dim", "D_dim", "bias_dim", "indices_stride"):
            kind = ("constexpr", 1)  # contiguous
        elif name == "state":
            kind = state_dtype
        elif name in ("A", "D", "dt_bias"):
            kind = "*fp32"
        elif name in ("x", "dt", "B", "C", "z", "out"):
            kind = "*bf16"
        else:
            kind = "*i32" if name == "indices" else "i64"
        arguments.append((name, kind))
    return kernel, arguments, warps


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("state_dtype, dim, dstate, flags", [("*fp32", 5120, 16, True), ("*bf16", 64, 256, False)])
def test_cross_compiled_without_spills(state_dtype, dim, dstate, flags, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps = signature(state_dtype, dim, dstate, flags)
    compiled = cross_compile(function, arguments, capability, warps)
    assert_no_spills(compiled, tmp_path, f"the kernel on sm_{capability}")


@pytest.mark.parametrize("state_dtype, bytes_each", [("*fp32", 4), ("*bf16", 2)])
def test_states_move_16_bytes_at_a_time(state_dtype, bytes_each):
    """Mamba-1's decode step as a launch specialises it: every state and A of a thread's 8, nothing of them in smaller pieces."""
    function, arguments, warps = signature(state_dtype, 5120, 16, True)
    divisible = [name for name, kind in arguments if isinstance(kind, str)]  # aligned pointers; sizes and strides are multiples of 16
    ptx = cross_compile(function, arguments, 90, warps, divisible).asm["ptx"]
    loads, stores = (re.findall(rf"{kind}\.global\S*\.v4\.b32", ptx) for kind in ("ld", "st"))
    assert len(stores) == 8 * bytes_each // 16, ptx
    assert len(loads) >= 8 * (bytes_each + 4) // 16, ptx
    assert not re.search(r"st\.global\S*\.b32", ptx.replace(".v4.b32", "")), "states are stored in words"
