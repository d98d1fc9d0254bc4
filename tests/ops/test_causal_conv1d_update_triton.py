"""causal_conv1d_update's Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_causal_conv1d_update import BF16, F16, F32, SEEN, Case, in_fp64, make_inputs, new_state, run  # noqa: E402
from tests.tolerances import OUTPUT, relative_error  # noqa: E402
from tests.triton_proof import assert_no_spills, interpreted_results, opchecked  # noqa: E402

# Tiny: the interpreter runs each program in Python. On both sides of a tile: 256 channels of 4 columns, 256 columns.
CASES = [
    Case(),
    *(Case(dim=d) for d in (0, 1, 7, 257)),
    Case(batch=0),
    Case(dim=3, extra=0),
    *(Case(width=w, extra=e, steps=s, seen=c, dim=5)
      for w in (1, 2, 4, 7) for e in (0, 3) for s in (None, 3) for c in (None, SEEN) if c is None or (s or 1) <= w - 1 + e),
    *(Case(dim=5, steps=s, extra=e) for s in (0, 2, 5, 9) for e in (0, 1)),
    Case(dim=3, batch=1, steps=4, extra=300),
    Case(dim=3, batch=1, steps=258, extra=260, seen=SEEN),
    Case(seen=(-1, 3, 2**31 - 1), dim=5),
    *(Case(layout=x, steps=s, seen=c, dim=9) for x in ("channel_last", "sliced", "unaligned", "strided") for s, c in ((None, None), (3, None), (3, SEEN))),
    *(Case(dtype=d, weight_dtype=w, state_dtype=i, dim=20) for d, w, i in ((F32, BF16, BF16), (BF16, F32, F32), (F16, F32, BF16), (BF16, None, None))),
    Case(bias=False, activation=None),
    *(Case(pool=p, seen=c, dim=5, steps=s) for p in ((4, 0, 6), (-1, 2, -7), (-1, -1, -1)) for c, s in ((None, 2), (SEEN, None))),
]  # fmt: skip


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, result -> [error, limit]."""
    for case in CASES:
        kwargs = make_inputs(case)
        (out, state), (expected, _) = run(kwargs, "triton"), run(in_fp64(kwargs), "reference")
        # The interpreter cuts fp32 to bf16 instead of rounding it, which a GPU does: twice the error.
        scale = 2 if BF16 in (case.dtype, case.state_dtype) else 1
        exact = state.dtype == case.dtype
        limits = OUTPUT[out.dtype] * scale, 0.0 if exact else OUTPUT[state.dtype] * scale
        errors = relative_error(out, expected), relative_error(state, new_state(kwargs).double())
        print(json.dumps({case.id: {"out": [errors[0], limits[0]], "conv_state": [errors[1], limits[1]]}}))

    # What is kept or new is moved as bits, signalling NaNs too.
    for dtype in (F32, BF16, F16):
        bits = torch.int32 if dtype == F32 else torch.int16
        kwargs = make_inputs(Case(dim=40, dtype=dtype))
        for name in ("x", "conv_state"):
            info = torch.iinfo(bits)
            kwargs[name] = torch.randint(info.min, info.max, kwargs[name].shape, dtype=bits).view(dtype)
        state = run(kwargs, "triton")[1].view(bits)
        expected = torch.cat([kwargs["conv_state"][..., 1:], kwargs["x"][..., None]], -1).view(bits)
        print(json.dumps({f"bits-{dtype}": {"changed": [float((state != expected).sum()), 0.0]}}))

    # An index beyond the pool is clamped; a pool without rows is all padding.
    kwargs = make_inputs(Case(batch=2, dim=5, pool=(3, 99)))
    state = run(kwargs | {"conv_state_indices": torch.tensor([3, 6])}, "triton")[1]
    clamped = kwargs["conv_state"].clone()
    op = torch.ops.cobra_kernels.causal_conv1d_update_fwd_triton
    op(kwargs["x"], clamped, kwargs["weight"], kwargs["bias"], True, None, kwargs["conv_state_indices"])
    print(json.dumps({"clamped": {"changed": [float((clamped != state).sum()), 0.0]}}))
    out = op(kwargs["x"], kwargs["conv_state"][:0], kwargs["weight"], kwargs["bias"], True, None, kwargs["conv_state_indices"])
    print(json.dumps({"empty pool": {"out": [float(out.abs().max()), 0.0]}}))

    for name, case in OPCHECKS.items():
        k = make_inputs(case)
        print(json.dumps({name: opchecked(op.default, (*(k[n] for n in ("x", "conv_state", "weight", "bias")), True, k.get("cache_seqlens"),
                                                       k.get("conv_state_indices")))}))  # fmt: skip


OPCHECKS = {
    "opcheck": Case(dim=5),
    "opcheck-steps-bf16": Case(dim=5, steps=3, dtype=BF16, layout="channel_last"),
    "opcheck-circular": Case(dim=5, seen=SEEN),
    "opcheck-pool": Case(dim=5, pool=(4, -1, 0)),
    "opcheck-no-rows": Case(batch=0, dim=5),
}
EXTRA = [*OPCHECKS, *(f"bits-{dtype}" for dtype in (F32, BF16, F16)), "clamped", "empty pool"]


@pytest.fixture(scope="module")
def errors():
    """case -> result -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", [*(case.id for case in CASES), *EXTRA])
def test_interpreter(errors, case):
    wrong = {name: pair for name, pair in errors[case].items() if not pair[0] <= pair[1]}
    assert not wrong, f"result: [relative error, limit]: {wrong}"


# --- registers -------------------------------------------------------------------------------------------------------


def signature(state_len: int, circular: bool, flags: bool):
    """(kernel, arguments, warps) as a launch on plain bf16 tensors would specialise them."""
    from cobra_kernels.ops.causal_conv1d_update import triton_kernel

    config = triton_kernel._config(5120, state_len)
    warps = config.pop("num_warps")
    kernel = triton_kernel._update_kernel
    config |= {"WIDTH": 4, "CIRCULAR": circular, "SAME_DTYPE": flags, "SILU": True, "HAS_BIAS": True, "HAS_INDICES": flags}
    arguments = []
    for name in kernel.arg_names:
        if name in config:
            kind = ("constexpr", config[name])
        elif name in ("x_dim", "y_dim", "state_column", "weight_width", "bias_stride", "seen_stride", "indices_stride"):
            kind = ("constexpr", 1)
        elif name in ("x", "state", "weight", "bias", "y"):
            kind = "*fp32" if name == "state" and not flags else "*bf16"
        elif name in ("cache_seqlens", "indices"):
            kind = "*i32"
        else:
            kind = "i32" if name in ("dim", "steps", "state_len", "pool") else "i64"
        arguments.append((name, kind))
    return kernel, arguments, warps


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("state_len, circular, flags", [(4, False, True), (256, True, False)])
def test_cross_compiled_without_spills(state_len, circular, flags, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps = signature(state_len, circular, flags)
    compiled = cross_compile(function, arguments, capability, warps)
    assert_no_spills(compiled, tmp_path, f"the kernel on sm_{capability}")
