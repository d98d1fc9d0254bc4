"""mamba_inner on its parts' Triton kernels, in the interpreter, against the fp64 reference: outputs, states and every gradient."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import cobra_kernels  # noqa: E402
from tests.ops.test_mamba_inner import Case, in_fp64, make_inputs, run  # noqa: E402
from tests.tolerances import GEMM, relative_error  # noqa: E402
from tests.triton_proof import interpreted_results  # noqa: E402

SMALL = Case(dim=4, seqlen=5, dstate=2, rank=2, d_model=3)  # the interpreter runs each program in Python
CASES = [
    SMALL._replace(initial=True),
    SMALL._replace(norms="b c dt", layout="channel_first"),
    SMALL._replace(batch=1, packed=(3, 0, 2), initial=True, biases="conv out delta B C"),
]


def interpreted() -> None:
    for case in CASES:
        inputs = make_inputs(case)
        got, want = run(inputs, "triton"), run(in_fp64(inputs), "reference")
        print(json.dumps({case.id: {name: relative_error(got[name], want[name]) for name in want}}))
    ran = {op for (op, backend), _ in cobra_kernels.call_counts().items() if backend == "triton"}
    print(json.dumps({"ran": sorted(ran)}))


@pytest.fixture(scope="module")
def results() -> dict:
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_values_states_and_gradients(results, case):
    for name, error in results[case.id].items():
        assert error <= GEMM, f"{name}: {error:.1e}"


def test_every_part_ran_in_triton(results):
    parts = {"mamba_inner", "causal_conv1d", "rms_norm", "selective_scan"}
    assert parts | {"mamba_inner_bwd", "rms_norm_bwd", "causal_conv1d_bwd"} <= set(results["ran"])
