"""The scan's CUDA backward beyond the shared cases: several spans of a sequence, and the formulas in fp64, where nothing hides behind rounding."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simt import room_selective_scan as room
from tests.simt.harness import Tensor
from tests.simt.room_selective_scan import Case

# A span is 256 steps. With 132 multiprocessors spans run side by side, with none a block walks them all: same bits (check_backward).
SPANS = [
    *(Case(batch=1, dim=5, seqlen=n, layout=x) for n in (255, 256, 257, 513) for x in room.BOTH),
    Case(batch=1, dim=70, seqlen=300, initial=True, dtype="bf16", layout="transposed"),
    Case(dim=4, seqlen=330, dstate=18, B=2, C="constant", initial=True),
    Case(batch=1, dim=6, seqlen=900, packed=(0, 0, 300, 300, 560, 811, 880), initial=True),
    Case(batch=1, dim=6, seqlen=600, packed=(0,)),  # padding alone
    Case(batch=1, dim=20, seqlen=300, max_grid_x=2),
]
DOUBLE = [
    Case(dtype="fp64", dim=dim, seqlen=n, dstate=d, B=b, C=c, options=o, initial=i, packed=p, batch=1 if p else 2, layout=x)
    for dim, n, d, b, c, o, i, p, x in (
        (6, 300, 16, "3d", "3d", True, True, None, "contiguous"),
        (6, 70, 16, "3d", "3d", False, False, None, "transposed"),
        (6, 20, 5, "constant", 3, True, True, None, "contiguous"),
        (6, 20, 33, 2, "constant", True, True, None, "strided"),
        (6, 20, 4, "constant", "constant", True, False, None, "contiguous"),
        (4, 66, 3, "3d", 2, True, True, (0, 0, 1, 3, 40, 60), "contiguous"),
    )
]  # fmt: skip


def check(host, case: Case) -> None:
    want = room.problem(case)
    compute = "fp64" if case.dtype == "fp64" else "fp32"
    room.check_backward(host, case, "cuda", want, Tensor(want.states.shape, compute, values=np.nan_to_num(want.states)))


@pytest.mark.parametrize("case", SPANS, ids=lambda case: case.id)
def test_spans(host, case):
    for options in ({"order": "forward"}, {"order": "random", "resident": 3}):
        host.set_simt(**options, **({"max_grid_x": case.max_grid_x} if case.max_grid_x else {}))
        check(host, case)


@pytest.mark.parametrize("case", DOUBLE, ids=lambda case: case.id)
def test_formulas_in_double(host, case):
    host.set_simt(order="reverse")
    check(host, case)


def test_softplus_threshold(host):
    """The derivative is 1 above 20 and sigmoid below, and large arguments of either sign stay finite."""
    case = Case(batch=1, dim=8, seqlen=9, dstate=3)
    want = room.problem(case)
    inputs = {name: None if t is None else t.array.copy() for name, t in want.inputs.items() if name != "initial_state"}
    inputs["delta_bias"][:] = 0
    inputs["delta"][0, :, 0] = (19.9, 20.0, 20.1, 100, -100, 0, 5, -5)
    dout, states = want.dout.array, np.zeros((1, 1, 3, 8), np.float32)
    grads = {name: None if a is None else np.full(a.shape, np.nan, a.dtype) for name, a in inputs.items()}
    host.set_simt(order="forward")
    for softplus in (True, False):
        if not softplus:
            raw = inputs["delta"].astype(np.float64)
            inputs["delta"] = np.where(raw > 20, raw, np.log1p(np.exp(np.minimum(raw, 20)))).astype(np.float32)
        host.selective_scan_bwd("cuda", dout, None, *inputs.values(), softplus, None, None, states, *grads.values(), None, 0)
        if softplus:
            through = grads["delta"].astype(np.float64).copy()
    slope = np.where(raw > 20, 1.0, 1 / (1 + np.exp(-raw)))
    expected = grads["delta"] * slope
    assert np.isfinite(through).all()
    np.testing.assert_allclose(through, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())
