"""causal_conv1d's Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_causal_conv1d import (  # noqa: E402
    BF16,
    F16,
    F32,
    STATES,
    Case,
    gradients,
    in_fp64,
    laid_out,
    leaves_of,
    make_inputs,
    random_douts,
    run,
)
from tests.tolerances import GRADIENT, OUTPUT, relative_error  # noqa: E402
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


# Backward tiles hold 1024 elements, a program walks 8 of them: case -> layout of the incoming gradient where it is not x's.
GRADIENT_CASES = {
    **{Case(layout=x, states=s): x for x in ("channel_first", "channel_last") for s in STATES},
    **{Case(width=w, states=s, dim=5): "channel_first" for w, s in ((1, "packed_initial"), (7, "initial"), (7, "seq_idx"))},
    **{Case(states=s, dim=5): incoming for s, incoming in (("initial", "expanded"), ("packed", "channel_last"), ("seq_idx", "strided"))},
    Case(seqlen=2, states="initial", layout="channel_last"): "expanded",
    Case(dim=130, seqlen=10, layout="channel_last", batch=1): "channel_last",
    Case(dim=2, seqlen=77, layout="channel_last", batch=1): "sliced_last",
    Case(dim=3, seqlen=259, batch=1): "unaligned",
    Case(states="packed_initial", layout="strided", dim=5): "channel_first",
    Case(dtype=BF16, weight_dtype=F32, layout="channel_last"): "channel_last",
    Case(dtype=F16, weight_dtype=F32, state_dtype=BF16, states="initial", dim=5): "channel_first",
    Case(bias=False, activation=None, dim=5): "channel_first",
    **{Case(states="packed_initial", bounds=b, dim=5): "channel_first" for b in ((0,), (0, 0, 0), (0, 1, 2, 3, 19))},
    Case(seqlen=0, states="initial"): "channel_first",
    Case(dim=0): "channel_first",
}  # fmt: skip


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, result -> [error, limit]."""
    for case, incoming in GRADIENT_CASES.items():
        kwargs = make_inputs(case)
        leaves, douts = leaves_of(kwargs), random_douts(kwargs)
        got = gradients(kwargs, leaves, "triton", [laid_out(d, incoming) if d.numel() else d for d in douts])
        rounded = [laid_out(d, incoming).double() if d.numel() else d.double() for d in douts]
        expected = gradients(in_fp64(kwargs), leaves_of(kwargs, wide=True), "reference", rounded)
        limits = [GRADIENT[g.dtype] * (2 if g.dtype == BF16 else 1) for g in got]  # the interpreter cuts: see below
        pairs = {name: [relative_error(g, e), limit] for name, g, e, limit in zip(leaves, got, expected, limits)}
        print(json.dumps({f"gradients-{case.id}": pairs}))

    # The torch side of the ops: opcheck's four tests, and a second differentiation that refuses by name.
    ops = torch.ops.cobra_kernels
    for states in ("packed_initial", "seq_idx"):  # the tests of the cpu backend cover the rest
        kwargs = make_inputs(Case(states=states, dim=3, seqlen=5, bounds=(0, 2, 4)))
        arguments = [kwargs.get(k) for k in ("x", "weight", "bias", "seq_idx", "initial_states")]
        final, cu_seqlens = kwargs.get("return_final_states", False), kwargs.get("cu_seqlens")
        douts = random_douts(kwargs)
        torch.library.opcheck(ops.causal_conv1d_fwd_triton.default, (*arguments, final, True, cu_seqlens))
        dfinal = douts[1] if final else None
        torch.library.opcheck(ops.causal_conv1d_bwd_triton.default, (douts[0], dfinal, *arguments, True, cu_seqlens))
        arguments = [a.requires_grad_() if a is not None and a.is_floating_point() else a for a in arguments]
        torch.library.opcheck(ops.causal_conv1d.default, (*arguments, final, True, cu_seqlens, "triton"))
    kwargs = make_inputs(Case(dim=3, seqlen=5))
    leaves = leaves_of(kwargs)
    first = torch.autograd.grad(run({**kwargs, **leaves}, "triton")[0].sum(), leaves["x"], create_graph=True)[0]
    try:
        first.sum().backward()
        message = ""
    except RuntimeError as error:
        message = str(error)
    print(json.dumps({"ops": {"double backward": [float("causal_conv1d_bwd_triton: double backward" not in message), 0.0]}}))

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
        bwd = torch.ops.cobra_kernels.causal_conv1d_bwd_triton
        dy, dfinal = torch.ones(1, 3, 10), torch.ones_like(final)
        grads = bwd(dy, dfinal, dy, torch.ones(3, 4), torch.ones(3), None, initial[..., 20:], True, torch.tensor(bounds))
        bad = sum(float((~t.isfinite()).sum()) for t in (y, final, *grads))
        print(json.dumps({f"bounds={bounds}": {"bad": [bad, 0.0]}}))


@pytest.fixture(scope="module")
def errors():
    """case -> result -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize("case", [*(case.id for case in CASES), *(f"gradients-{case.id}" for case in GRADIENT_CASES), "ops", "nan", *(f"bounds={b}" for b in BAD_BOUNDS)])
def test_interpreter(errors, case):
    wrong = {name: pair for name, pair in errors[case].items() if not pair[0] <= pair[1]}
    assert not wrong, f"result: [relative error, limit]: {wrong}"


# --- registers -------------------------------------------------------------------------------------------------------


def signature(kernel_name: str, channel_last: bool, flags: bool):
    """(kernel, arguments, warps) as a launch on plain bf16 tensors would specialise them."""
    from cobra_kernels.ops.causal_conv1d import triton_kernel

    backward = kernel_name == "_bwd_kernel"
    config = triton_kernel._tile(5120, 2048, channel_last, triton_kernel.TILE_BWD if backward else triton_kernel.TILE)
    if kernel_name == "_initial_kernel":
        config |= {"BLOCK_T": 4, "BLOCK_D": 128}
    warps = config.pop("num_warps")
    kernel = getattr(triton_kernel, kernel_name)
    rows = triton_kernel.REDUCE_ROWS if kernel_name == "_reduce_kernel" else 8
    config |= {"WIDTH": 4, "BLOCK": triton_kernel.FINAL_CHANNELS, "HAS_SEQ_IDX": False, "SILU": True, "HAS_DFINAL": True, "ROWS": rows}
    config |= {"TILES": triton_kernel.TILES, "COLUMNS": triton_kernel.REDUCE_COLUMNS}
    fast = "dim" if channel_last else "time"
    unit_strides = ("weight_width", "bias_stride", "cu_stride", *(f"{t}_{fast}" for t in ("x", "y", "dy", "dx")))
    pointers = ("x", "weight", "bias", "initial", "y", "final", "dy", "dx", "dfinal", "dinitial", "dweight", "dbias")
    arguments = []
    for name in kernel.arg_names:
        if name in config:
            kind = ("constexpr", config[name])
        elif name.startswith("HAS_") or name == "PACKED":
            kind = ("constexpr", flags)
        elif name in unit_strides:
            kind = ("constexpr", 1)
        elif name in pointers:
            kind = "*bf16"
        elif name == "partial":
            kind = "*fp32"
        elif name in ("cu_seqlens", "seq_idx"):
            kind = "*i32"
        else:
            kind = "i32" if name in ("dim", "seqlen", "num_seqs", "search_steps", "past", "time_programs", "rows") else "i64"
        arguments.append((name, kind))
    return kernel, arguments, warps


COMPILED = [
    ("_fwd_kernel", True, True), ("_fwd_kernel", False, True), ("_final_kernel", True, True),
    ("_bwd_kernel", True, True), ("_bwd_kernel", False, True), ("_initial_kernel", True, True), ("_reduce_kernel", True, True),
]  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, channel_last, flags", COMPILED)
def test_cross_compiled_without_spills(kernel, channel_last, flags, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps = signature(kernel, channel_last, flags)
    compiled = cross_compile(function, arguments, capability, warps)
    assert_no_spills(compiled, tmp_path, f"{kernel} on sm_{capability}")
