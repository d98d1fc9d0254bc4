"""selective_scan's Triton source without a GPU: values in the interpreter (a process of its own), registers by cross-compiling."""

from __future__ import annotations

import json
import tempfile

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from cobra_kernels.triton_utils import cross_compile  # noqa: E402
from tests.ops.test_selective_scan import BF16, F16, F32, Case, cached, make_inputs, run  # noqa: E402
from tests.tolerances import OUTPUT, relative_error  # noqa: E402
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

    # Gradients are the reference's formula, from the kernel's inputs.
    case = SMALL._replace(dim=3)
    grads = []
    for backend in ("triton", "reference"):
        leaves = {k: t.clone().requires_grad_() for k, t in make_inputs(case).items()}
        out, last = run(case, leaves, backend)
        grads.append(torch.autograd.grad(out.sum() + last.sum(), list(leaves.values())))
    print(json.dumps({"gradients": {str(i): [relative_error(a, b.double()), 1e-5] for i, (a, b) in enumerate(zip(*grads))}}))


@pytest.fixture(scope="module")
def errors():
    """case -> result -> [error, limit], from one interpreter process."""
    return interpreted_results(__name__)


@pytest.mark.parametrize(
    "case", [*(case.id for case in CASES), "packed", "wild bounds", "one program", "far steps", "infinite decay", "gradients"]
)
def test_interpreter(errors, case):
    wrong = {name: pair for name, pair in errors[case].items() if not pair[0] <= pair[1]}
    assert not wrong, f"result: [relative error, limit]: {wrong}"


# --- registers -------------------------------------------------------------------------------------------------------


def signature(span: int, dstate: int, packed: bool, constant: bool):
    """(kernel, arguments, warps) as a launch on plain channel-last tensors would specialise them."""
    from cobra_kernels.ops.selective_scan import triton_kernel

    config = triton_kernel._config(span, dstate)
    warps = config.pop("num_warps")
    kernel = triton_kernel._scan_kernel
    flags = {"PACKED": packed, "B_CONSTANT": constant, "C_CONSTANT": constant} | config
    unit = ("u_dim", "delta_dim", "z_dim", "out_dim", "A_state", "B_state", "C_state", "D_dim", "bias_dim", "initial_states", "cu_stride")
    pointers = {"A": "*fp32", "D": "*fp32", "delta_bias": "*fp32", "initial_state": "*fp32", "last_state": "*fp32", "cu_seqlens": "*i32"}
    arguments = []
    for name in kernel.arg_names:
        if name in flags or name.isupper() and len(name) > 1:
            kind = ("constexpr", flags.get(name, True))
        elif name in unit:
            kind = ("constexpr", 1)
        elif name in pointers:
            kind = pointers[name]
        else:
            kind = "*bf16" if name in ("u", "delta", "z", "B", "C", "out") else "i64"
        arguments.append((name, kind))
    return kernel, arguments, warps


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("span, dstate, packed, constant", [(5120, 16, False, False), (64, 256, True, True)])
def test_cross_compiled_without_spills(span, dstate, packed, constant, capability, tmp_path):
    """No stack, which is where a spill would go."""
    function, arguments, warps = signature(span, dstate, packed, constant)
    compiled = cross_compile(function, arguments, capability, warps)
    assert_no_spills(compiled, tmp_path, f"the kernel on sm_{capability}")
