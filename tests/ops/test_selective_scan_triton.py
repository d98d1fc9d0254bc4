"""selective_scan's Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json
import tempfile

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_selective_scan import BF16, F16, F32, Case, cached, in_fp64, laid_out, make_inputs, run  # noqa: E402
from tests.tolerances import GRADIENT, OUTPUT, relative_error  # noqa: E402
from tests.triton_proof import assert_no_spills, interpreted_results  # noqa: E402

# Tiny: the interpreter runs each program in Python, step by step. A program owns 32 channels up to 128 states; steps go four at a time.
SMALL = Case(batch=1, dim=5, seqlen=6, dstate=3)
CASES = [
    Case(dim=17, seqlen=11),
    *(SMALL._replace(seqlen=n) for n in (0, 1, 3, 4, 5, 7, 8, 9)),
    *(SMALL._replace(dim=n, dstate=16) for n in (1, 31, 32, 33)),
    *(SMALL._replace(dstate=n) for n in (1, 2, 4, 17, 64, 257)),
    *(SMALL._replace(batch=2, dim=12, B=b, C=c) for b, c in ((1, 1), (2, 2), (3, 4), (12, 1), ("3d", 6), (6, 4))),
    *(SMALL._replace(B=b, C=c) for b, c in (("constant", "constant"), ("constant", "3d"), (5, "constant"))),
    *(SMALL._replace(**{name: False}) for name in ("D", "z", "bias", "softplus", "initial")),
    SMALL._replace(D=False, z=False, bias=False, softplus=False, initial=False, steps="raw"),
    *(SMALL._replace(batch=2, dim=18, layout=x) for x in ("channel_last", "mixed", "strided", "sliced", "expanded", "token_major")),
    *(SMALL._replace(dtype=d, layout="channel_last", dim=17, dstate=16) for d in (BF16, F16)),
    SMALL._replace(dtype=BF16, mixed=(F32, F16, BF16)),
    SMALL._replace(mixed=(BF16, F16)),
    *(SMALL._replace(seqlen=14, cu_seqlens=c) for c in ((0,), (0, 0, 14), (0, 1, 6, 6, 7, 12), (0, 4, 4))),
    SMALL._replace(seqlen=14, cu_seqlens=(0, 3, 9), layout="channel_last", dtype=BF16, initial=False, B=5),
    SMALL._replace(batch=0),
    SMALL._replace(dim=0),
]

# A program of the backward owns up to 32 channels of up to 16 states, and starts again from a saved state after 64 steps.
BACKWARD = [
    SMALL,
    SMALL._replace(dim=2, dstate=2, seqlen=66),
    *(SMALL._replace(seqlen=n, dim=2) for n in (0, 1, 4)),
    SMALL._replace(dim=33, dstate=16, seqlen=5),
    *(SMALL._replace(dstate=n, dim=2, seqlen=3) for n in (1, 257)),
    *(SMALL._replace(batch=2, dim=4, seqlen=3, B=b, C=c) for b, c in ((2, 4), ("3d", 2))),
    *(SMALL._replace(B=b, C=c, batch=2, dim=3) for b, c in (("constant", "constant"), ("constant", "3d"), (3, "constant"))),
    *(SMALL._replace(**{name: False}) for name in ("D", "z", "bias", "softplus", "initial")),
    SMALL._replace(D=False, z=False, bias=False, softplus=False, initial=False, steps="raw"),
    *(SMALL._replace(batch=2, dim=3, layout=x) for x in ("sliced", "expanded")),
    SMALL._replace(dtype=F16, mixed=(F32, F16), layout="channel_last"),
    SMALL._replace(dtype=BF16, mixed=(F32, F16, BF16)),
    *(SMALL._replace(seqlen=14, cu_seqlens=c) for c in ((0,), (0, 1, 6, 6, 7, 12))),
    SMALL._replace(seqlen=74, dim=1, dstate=2, cu_seqlens=(0, 3, 72), initial=False),
    SMALL._replace(batch=0),
    SMALL._replace(dim=0),
]


def gradients(case: Case, tensors: dict, backend: str, douts) -> list[torch.Tensor]:
    """Of every tensor argument, in their order; zeros where autograd of the reference has none."""
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if t is not None}
    outputs = [(o, d) for o, d in zip(run(case, {**tensors, **leaves}, backend), douts) if d is not None]
    outputs, incoming = zip(*outputs)
    return torch.autograd.grad(outputs, list(leaves.values()), incoming, allow_unused=True, materialize_grads=True)


def incoming_gradients(case: Case) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    rows = case.batch if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    shapes = (case.batch, case.dim, case.seqlen), (rows, case.dim, case.dstate)
    return [torch.randn(shape, generator=g).to(dtype) for shape, dtype in zip(shapes, (case.dtype, F32))]


def compared(case: Case, tensors: dict, douts) -> dict[str, list[float]]:
    got = gradients(case, tensors, "triton", douts)
    expected = gradients(case, in_fp64(tensors), "reference", [None if d is None else d.double() for d in douts])
    given = {k: t for k, t in tensors.items() if t is not None}
    assert all(g.dtype == t.dtype and g.shape == t.shape for g, t in zip(got, given.values()))
    # The interpreter cuts fp32 to bf16 instead of rounding it, as above.
    return {n: [relative_error(g, e), GRADIENT[g.dtype] * (2 if g.dtype == BF16 else 1)] for n, g, e in zip(given, got, expected)}


def interpreted_backward() -> None:
    """The part of `interpreted` that is about gradients."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty makes with NaN
    for case in BACKWARD:
        print(json.dumps({f"gradients-{case.id}": compared(case, make_inputs(case), incoming_gradients(case))}))

    case = SMALL._replace(batch=2)
    tensors, (dout, dlast) = make_inputs(case), incoming_gradients(case)
    forms = {
        "through out": (dout, None),
        "through last_state": (None, dlast),
        "expanded": (torch.ones(()).expand(dout.shape), torch.ones(3).expand(dlast.shape)),
        "transposed": (laid_out(dout, "channel_last"), laid_out(dlast, "channel_last")),
    }
    print(json.dumps({"incoming": {f"{k}: {n}": pair for k, d in forms.items() for n, pair in compared(case, tensors, d).items()}}))

    # Same bits again; a row's gradients do not depend on the others, nor on being packed.
    got = dict(zip(tensors, gradients(case, tensors, "triton", (dout, dlast))))
    again = gradients(case, tensors, "triton", (dout, dlast))
    per_row = ("u", "delta", "B", "C", "z", "initial_state")
    row = {k: t[1:] if k in per_row else t for k, t in tensors.items()}
    alone = dict(zip(row, gradients(case._replace(batch=1), row, "triton", (dout[1:], dlast[1:]))))
    packed = {k: torch.cat(tuple(t), -1)[None] if k in per_row[:5] else t for k, t in tensors.items()}
    bounds = case._replace(batch=1, seqlen=12, cu_seqlens=(0, 6, 12))
    packed = dict(zip(packed, gradients(bounds, packed, "triton", (torch.cat(tuple(dout), -1)[None], dlast))))
    different = {
        "again": sum(int((a != b).sum()) for a, b in zip(got.values(), again)),
        "alone": sum(int((alone[k] != got[k][1:]).sum()) for k in per_row),
        "packed": sum(int((packed[k] != (torch.cat(tuple(got[k]), -1)[None] if k in per_row[:5] else got[k])).sum()) for k in tensors),
    }
    print(json.dumps({"gradient bits": {name: [count, 0] for name, count in different.items()}}))

    # Saved states: those of a scan that stops there, and 0 in the slots of no chunk.
    ops = torch.ops.cobra_kernels
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    case = SMALL._replace(dim=2, dstate=2, seqlen=140, cu_seqlens=(0, 3, 70))
    tensors = make_inputs(case)
    cu_seqlens = torch.tensor(case.cu_seqlens)
    saved = ops.selective_scan_fwd_states_triton(*(tensors[n] for n in names), True, tensors["initial_state"], cu_seqlens)[2]
    until = {k: t[..., 3:67] if k in ("u", "delta", "z", "B", "C") else t for k, t in tensors.items()}
    until["initial_state"] = tensors["initial_state"][1:]
    state = run(case._replace(cu_seqlens=None), until, "triton")[1]
    initial = tensors["initial_state"].transpose(1, 2)
    wanted = torch.stack([initial[0], initial[1], state[0].T, torch.zeros(2, 2)])[None]
    print(json.dumps({"saved states": {"different bits": [int((saved != wanted).sum()) if saved.shape == wanted.shape else -1.5, 0]}}))

    # Wrong bounds that no check stopped: nothing outside is read or written.
    wild = torch.tensor([-5, 0, 9, 0, 10**12])[::2]
    outs = ops.selective_scan_fwd_states_triton(*(tensors[n] for n in names), True, None, wild)
    grads = ops.selective_scan_bwd_triton(outs[0], None, *(tensors[n] for n in names), True, None, wild, outs[2])
    print(json.dumps({"wild bounds backward": {"not finite": [sum(int((~g.isfinite()).sum()) for g in grads), 0]}}))
    torch.use_deterministic_algorithms(False)

    # The torch side of the ops: opcheck's four tests.
    for case in (SMALL._replace(dim=2, seqlen=3), SMALL._replace(dim=2, seqlen=5, B=2, C="constant", D=False, cu_seqlens=(0, 2, 4))):
        tensors, (dout, dlast) = make_inputs(case), incoming_gradients(case)
        cu_seqlens = None if case.cu_seqlens is None else torch.tensor(case.cu_seqlens)
        arguments = (*(tensors[n] for n in names), case.softplus, tensors["initial_state"], cu_seqlens)
        torch.library.opcheck(ops.selective_scan_fwd_states_triton.default, arguments)
        states = ops.selective_scan_fwd_states_triton(*arguments)[2]
        torch.library.opcheck(ops.selective_scan_bwd_triton.default, (dout, dlast, *arguments, states))
    print(json.dumps({"opcheck": {}}))


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints one JSON line per case, result -> [error, limit]."""
    for case in CASES:
        tensors, expected = cached(case)
        got = run(case, tensors, "triton")
        # The interpreter cuts fp32 to bf16 instead of rounding it, which a GPU does: twice the error.
        limits = [OUTPUT[t.dtype] * (2 if t.dtype == BF16 else 1) for t in got]
        results = {n: [relative_error(g, e), limit] for n, g, e, limit in zip(("out", "last_state"), got, expected, limits)}
        if case.cu_seqlens is not None:
            results["padding"] = [got[0][..., case.cu_seqlens[-1] :].abs().sum().item(), 0.0]
        print(json.dumps({case.id: results}))

    # Packed sequences, and a prefill in two pieces, give the bits of separate runs.
    case = SMALL._replace(dim=18, seqlen=14, cu_seqlens=(0, 1, 1, 6, 13))
    tensors, different = make_inputs(case), 0
    out, last = run(case, tensors, "triton")
    for i, (begin, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
        part = {k: t[..., begin:end] if k in ("u", "delta", "z", "B", "C") else t for k, t in tensors.items()}
        part["initial_state"] = tensors["initial_state"][i : i + 1]
        alone, state = run(case._replace(cu_seqlens=None), part, "triton")
        different += int((alone != out[..., begin:end]).sum() + (state[0] != last[i]).sum())
    begin, end = case.cu_seqlens[3:5]
    poison = {k: t.clone() for k, t in tensors.items()}
    for name in ("u", "delta", "z", "B", "C"):
        poison[name][..., begin:] = float("nan")  # the last sequence, and the padding behind it
    poisoned, poisoned_last = run(case, poison, "triton")
    leaks = int(
        (poisoned[..., :begin] != out[..., :begin]).sum() + (poisoned_last[:3] != last[:3]).sum() + (poisoned[..., end:] != 0).sum()
    )
    print(json.dumps({"packed": {"different bits": [different, 0], "leaks": [leaks, 0]}}))

    # Bounds that no check stopped: clamped, so nothing outside is touched.
    wild = tensors | {"initial_state": tensors["initial_state"][:2]}
    from cobra_kernels.ops.selective_scan import triton_kernel

    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    bounds = torch.tensor([-5, 0, 9, 0, 10**12])[::2]
    out, last = triton_kernel.selective_scan_fwd(*(wild[n] for n in names), True, wild["initial_state"], bounds)
    clamped = triton_kernel.selective_scan_fwd(*(wild[n] for n in names), True, wild["initial_state"], torch.tensor([0, 9, 14]))
    print(json.dumps({"wild bounds": {"different bits": [int((out != clamped[0]).sum() + (last != clamped[1]).sum()), 0]}}))

    # A program writes its own sequence and nothing else: the first of three runs alone, on outputs that are NaN before.
    kernel = triton_kernel._scan_kernel
    triton_kernel._scan_kernel = {(3,): kernel[1,]}
    torch.use_deterministic_algorithms(True)
    out = triton_kernel.selective_scan_fwd(*(tensors[n] for n in names), True, tensors["initial_state"], torch.tensor([0, 3, 9, 12]))[0]
    torch.use_deterministic_algorithms(False)
    triton_kernel._scan_kernel = kernel
    print(json.dumps({"one program": {"written": [int(out[..., 3:].isfinite().sum() + out[..., :3].isnan().sum()), 0]}}))

    # Steps 2^30 + 7 elements apart, on a sparse file: the third lies beyond what 32 bits count.
    case = SMALL._replace(dim=2, seqlen=3, dtype=BF16)
    tensors, apart = make_inputs(case), 2**30 + 7
    out, last = run(case, tensors, "triton")
    with tempfile.NamedTemporaryFile() as file:
        storage = torch.from_file(file.name, shared=True, size=2 * apart + 2, dtype=BF16)
        far = storage.as_strided((1, 2, 3), (1, 1, apart)).copy_(tensors["u"])
        there = triton_kernel.selective_scan_fwd(*((tensors | {"u": far})[n] for n in names), True, tensors["initial_state"], None)
    print(json.dumps({"far steps": {"different bits": [int((there[0] != out).sum() + (there[1] != last).sum()), 0]}}))

    # An infinite rate of decay forgets everything, and the steps of 0 behind the end forget nothing.
    u, delta, B = torch.randn(1, 5, 6), torch.rand(1, 5, 6) + 0.1, torch.randn(1, 3, 6)
    from cobra_kernels import selective_scan

    out, last = selective_scan(
        u, delta, torch.full((5, 3), -float("inf")), B, torch.ones(1, 3, 6), return_last_state=True, backend="triton"
    )
    expected = (delta * u * B.sum(1, keepdim=True)).double(), ((delta * u)[..., -1:] * B[..., -1][:, None]).double()
    print(
        json.dumps({"infinite decay": {n: [relative_error(g, e), 1e-6] for n, g, e in zip(("out", "last_state"), (out, last), expected)}})
    )

    interpreted_backward()


@pytest.fixture(scope="module")
def errors():
    """case -> result -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


EVENTS = ("packed", "wild bounds", "one program", "far steps", "infinite decay")
BACKWARD_EVENTS = ("incoming", "gradient bits", "saved states", "wild bounds backward", "opcheck")


@pytest.mark.parametrize("case", [*(c.id for c in CASES), *EVENTS, *(f"gradients-{c.id}" for c in BACKWARD), *BACKWARD_EVENTS])
def test_interpreter(errors, case):
    wrong = {name: pair for name, pair in errors[case].items() if not pair[0] <= pair[1]}
    assert not wrong, f"result: [relative error, limit]: {wrong}"


# --- registers -------------------------------------------------------------------------------------------------------


def signature(kernel_name: str, span: int, dstate: int, packed: bool, constant: bool):
    """(kernel, arguments, warps, multiples of 16) as a launch on plain channel-last tensors would specialise them."""
    from cobra_kernels.ops.selective_scan import triton_kernel

    backward = kernel_name == "_bwd_kernel"
    config = (triton_kernel._bwd_config if backward else triton_kernel._config)(span, dstate)
    warps = config.pop("num_warps")
    kernel = getattr(triton_kernel, kernel_name)
    flags = {"PACKED": packed, "B_CONSTANT": constant, "C_CONSTANT": constant} | config
    sequences = ("u", "delta", "z", "out", "dout", "du", "ddelta", "dz")
    unit = ("A_state", "B_state", "C_state", "D_dim", "bias_dim", "initial_states", "dlast_states", "dinitial_states", "cu_stride")
    arguments = []
    for name in kernel.arg_names:
        if name in flags or name.isupper() and len(name) > 1:
            kind = ("constexpr", flags.get(name, True))
        elif name in unit or name in [f"{sequence}_dim" for sequence in sequences]:
            kind = ("constexpr", 1)
        elif name in (*sequences, "B", "C"):
            kind = "*bf16"
        elif name == "cu_seqlens":
            kind = "*i32"
        else:
            pointers = ("A", "D", "delta_bias", "initial_state", "last_state", "dlast_state", "dinitial_state", "saved", "scratch")
            kind = "*fp32" if name in pointers or name in ("dA", "dB", "dC", "dD", "ddelta_bias") else "i64"
        arguments.append((name, kind))
    counts = ("num_seqs", "slots", "channels_per_B", "channels_per_C")
    divisible = [name for name, kind in arguments if isinstance(kind, str) and name not in counts]
    return kernel, arguments, warps, divisible if backward else ()


SHAPES = [
    ("_scan_kernel", 5120, 16, False, False),
    ("_scan_kernel", 64, 256, True, True),
    ("_bwd_kernel", 5120, 16, False, False),
    ("_bwd_kernel", 5120, 16, True, True),
    ("_bwd_kernel", 64, 32, False, False),
    ("_bwd_kernel", 64, 256, True, True),
]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, span, dstate, packed, constant", SHAPES)
def test_cross_compiled_without_spills(kernel, span, dstate, packed, constant, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps, divisible = signature(kernel, span, dstate, packed, constant)
    compiled = cross_compile(function, arguments, capability, warps, divisible)
    assert_no_spills(compiled, tmp_path, f"{kernel} on sm_{capability}")
