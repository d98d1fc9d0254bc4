"""Failures that users of such kernels reported, kept from coming back: installing, CPU, memory. docs/catalogue.md maps rows to tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cobra_kernels
from cobra_kernels import causal_conv1d, causal_conv1d_update, extension, ops, rms_norm, selective_scan, selective_state_update, selfcheck
from cobra_kernels.errors import ArgumentError, BackendUnavailable, CobraKernelsError
from tests.conftest import kernel_backends
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(extension.absence() is not None, reason=f"no compiled kernels: {extension.absence()}")


def python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- A1: installing and importing ------------------------------------------------------------------------------------


def test_row_003_torch_is_not_a_build_requirement():
    requires = re.search(r"^requires = (\[.*\])", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE).group(1)
    assert "torch" not in requires
    assert not re.search(r"^\s*(import|from) torch", (ROOT / "setup.py").read_text(), flags=re.MULTILINE)


def test_row_005_every_absent_backend_has_a_reason():
    assert set(cobra_kernels.backends()) == {"reference", "cpu", "triton", "cuda"}
    assert cobra_kernels.backends()["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in cobra_kernels.backends().values())


SCHEMAS = {
    "rms_norm_fwd": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, ScalarType? s_dtype, float eps, bool is_rms_norm) -> (Tensor, Tensor)",
    "rms_norm_bwd": "(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool is_rms_norm) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_row_006_schemas_do_not_drift(name):
    schema = getattr(torch.ops.cobra_kernels, name).default._schema
    assert str(schema) == f"cobra_kernels::{name}{SCHEMAS[name]}"


def test_row_007_a_library_that_does_not_load_says_why(tmp_path):
    code = f"""
import pathlib, shutil, sys
shutil.copytree({str(ROOT / "cobra_kernels")!r}, {str(tmp_path / "cobra_kernels")!r})
pathlib.Path({str(tmp_path / "cobra_kernels" / "_C.abi3.so")!r}).write_bytes(b"not a library")
sys.path.insert(0, {str(tmp_path)!r})
import cobra_kernels, torch
print(cobra_kernels.backends()["cpu"])
try:
    cobra_kernels.rms_norm(torch.ones(1, 2), torch.ones(2), backend="cpu")
except cobra_kernels.errors.BackendUnavailable as error:
    print("raised", error)
"""
    said = python(code)
    assert said.count("does not load") == 2 and "raised" in said


@needs_kernels
def test_row_008_ptx_serves_gpus_without_an_image():
    images = extension.cuda_images()
    if not images:
        pytest.skip("built without CUDA")
    assert "compute_80" in images and any(i.startswith("sm_") for i in images)


def test_row_012_triton_is_imported_by_no_one_who_does_not_use_it():
    code = "import sys, torch, cobra_kernels as c; c.rms_norm(torch.ones(1, 4), torch.ones(4)); print('triton' in sys.modules)"
    assert python(code).strip().endswith("False")


def test_row_013_and_031_every_cuda_entry_guards_the_device():
    entries = 0
    for binding in (ROOT / "csrc").glob("*/*_binding.cpp"):
        for body in re.findall(r"^\w[\w:<>, ]* \w+_cuda\(.*?^}", binding.read_text(), flags=re.MULTILINE | re.DOTALL):
            if "Tensor" not in body[: body.index("{")]:
                continue  # a measurement of the roof: the caller passes device pointers and the stream
            entries += 1
            assert "DeviceGuard" in body and "current_stream(" in body and "check_launch(" in body, f"{binding.name}:\n{body}"
    assert entries >= 9, "rms_norm twice, two convolutions, scan, state update, the projector's layer and passes"


def test_row_014_the_doctor_gives_a_diagnosis():
    said = python("from cobra_kernels import doctor; raise SystemExit(doctor.main())")
    assert all(word in said for word in ("cobra_kernels", "torch", "triton", "GPU", "extension", "backends", "rms_norm"))


@needs_kernels
def test_row_004_and_015_and_018_every_op_runs_compiled_on_a_cpu_and_counters_prove_it():
    cobra_kernels.reset_call_counts()
    seen = set()
    for case in selfcheck.cases():
        if case.op not in seen:
            seen.add(case.op)
            selfcheck.run(case, None)
    counts = cobra_kernels.call_counts()
    assert seen == set(ops.PLANS)
    assert {(op, "cpu") for op in seen} <= set(counts) and not any(backend == "reference" for _, backend in counts)


# --- A2: CPU ---------------------------------------------------------------------------------------------------------


def test_row_019_stepping_down_is_loud_once_and_strict_forbids_it():
    hide = "import cobra_kernels.extension as e; e._reason = 'hidden by a test'; import torch, warnings, cobra_kernels as c; "
    twice = hide + "warnings.simplefilter('always'); [c.rms_norm(torch.ones(1, 4), torch.ones(4)) for _ in range(3)]"
    assert python(twice).count("rms_norm runs on 'reference', not on the default backend (cpu: hidden by a test)") == 1
    assert "BackendUnavailable" in python(twice, COBRA_KERNELS_STRICT="1")
    assert "cannot serve: hidden by a test" in python(hide + "c.rms_norm(torch.ones(1, 4), torch.ones(4), backend='cpu')")


@pytest.mark.threads
@needs_kernels
def test_row_021_fork_after_an_op(threads):
    """Every room runs with two threads, then in a forked child, with a time limit on the child."""
    code = """
import os, signal, torch
torch.set_num_threads(2)
from cobra_kernels import selfcheck
once = {case.op: case for case in selfcheck.cases()}
before = {op: selfcheck.run(case, 'cpu') for op, case in once.items()}
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    same = all(torch.equal(a, b) for op, case in once.items() if 'projector' not in op for a, b in zip(selfcheck.run(case, 'cpu'), before[op]))
    os._exit(0 if same else 3)
print('child status', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert "child status 0" in python(code, OMP_NUM_THREADS="2")


@needs_kernels
def test_the_environment_gives_way_to_the_argument():
    code = """
import torch, cobra_kernels as k
x, w = torch.ones(2, 8), torch.ones(8)
def ran(call):
    k.reset_call_counts()
    call()
    return k.call_counts().get(('rms_norm', 'cpu'), 0)
print('ran', ran(lambda: k.rms_norm(x, w)), ran(lambda: k.rms_norm(x, w, backend='cpu')))
"""
    assert "ran 0 1" in python(code, COBRA_KERNELS_BACKEND="reference")


def test_environment_values_are_checked():
    assert "COBRA_KERNELS_BACKEND: got 'gpu'" in python("import cobra_kernels", COBRA_KERNELS_BACKEND="gpu")
    assert "COBRA_KERNELS_CPU_LEVEL: got 'sse'" in python("import cobra_kernels", COBRA_KERNELS_CPU_LEVEL="sse")
    assert "avx2" in python("import cobra_kernels.extension as e; print(e.cpu_level())", COBRA_KERNELS_CPU_LEVEL="avx2") or (
        extension.best_cpu_level() == "scalar"
    )
    with pytest.raises(ArgumentError):
        cobra_kernels.use_backend("fastest").__enter__()


# --- A3: offsets and memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan", "causal_conv1d_update", "selective_state_update"])
def test_row_022_and_023_strides_beyond_32_bits(op, backend, tmp_path):
    """Two batch rows 2^31 + 7 elements apart on a sparse file: a 32-bit offset reads or writes elsewhere."""
    stride, g = 2**31 + 7, generator()

    def far(t, name):
        size = stride + t[0].numel()
        storage = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=t.dtype)
        return storage.as_strided(t.shape, (stride, *t[0].stride())).copy_(t)

    case = {
        "causal_conv1d": lambda: (selfcheck.causal_conv1d_inputs(g, 2, 5, 9, dtype=torch.bfloat16), "x", causal_conv1d),
        "selective_scan": lambda: (selfcheck.selective_scan_inputs(g, 2, 5, 9, 4, dtype=torch.bfloat16), "u", selective_scan),
        "causal_conv1d_update": lambda: (selfcheck.causal_conv1d_update_inputs(g, 2, 5, dtype=torch.bfloat16), "conv_state", causal_conv1d_update),
        "selective_state_update": lambda: (
            selfcheck.selective_state_update_inputs(g, 2, 5, 4, state_dtype=torch.bfloat16),
            "state",
            selective_state_update,
        ),
    }[op]
    inputs, name, f = case()
    near = inputs[name].clone()
    moved = far(inputs[name], op)
    assert torch.equal(f(**{**inputs, name: moved}, backend=backend), f(**{**inputs, name: near}, backend=backend))
    assert torch.equal(moved, near)  # the same, also after an in-place update


def test_row_024_triton_offsets_are_64_bit():
    for kernel in (ROOT / "cobra_kernels" / "ops").glob("*/triton_kernel.py"):
        for line in kernel.read_text().splitlines():
            if "tl.program_id" in line:
                assert "int64" in line, f"{kernel.parent.name}: {line.strip()}"


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
def test_row_025_dim_above_the_old_grid_limit(backend):
    dim = 65_537
    inputs = selfcheck.selective_scan_inputs(generator(), 1, dim, 2, 1)
    out = selective_scan(**inputs, backend=backend)
    tail = {k: v[:, -3:] if k in ("u", "delta", "z") else v[-3:] if k in ("A", "D", "delta_bias") else v for k, v in inputs.items()}
    assert_close(out[:, -3:], selective_scan(**tail, backend="reference"), 1e-6)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize(
    "indices, words", [([0, 7], "7"), ([1, 1], "1"), ([0, 2**31], str(2**31))], ids=["out of range", "duplicate", "beyond 32 bits"]
)
def test_row_027_state_indices_are_checked(backend, indices, words):
    index = torch.tensor(indices)
    update = selfcheck.selective_state_update_inputs(generator(), 2, 5, 4)
    before = update["state"].clone()
    with pytest.raises(CobraKernelsError) as caught:
        selective_state_update(**update, state_batch_indices=index, backend=backend)
    assert "state_batch_indices" in str(caught.value) and words in str(caught.value) and torch.equal(update["state"], before)
    conv = selfcheck.causal_conv1d_update_inputs(generator(), 2, 5)
    before = conv["conv_state"].clone()
    with pytest.raises(CobraKernelsError, match="conv_state_indices"):
        causal_conv1d_update(**conv, conv_state_indices=index, backend=backend)
    assert torch.equal(conv["conv_state"], before)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("seqlen", [1023, 1024, 1025, 1026, 1027])
def test_row_029_lengths_around_a_chunk_with_and_without_a_state(backend, initial, seqlen):
    inputs = selfcheck.selective_scan_inputs(generator(), 1, 3, seqlen, 4, initial=initial)
    wide = {k: selfcheck.map_tensors(v, selfcheck.in_fp64) for k, v in inputs.items()}
    assert_close(selective_scan(**inputs, backend=backend), selective_scan(**wide, backend="reference"), 1e-6)


@pytest.mark.parametrize("backend", ["reference", *kernel_backends()])
@pytest.mark.parametrize("form", ["expanded", "transposed", "every second"])
def test_row_030_incoming_gradients_of_any_layout(backend, form):
    shape = (2, 6, 10)
    dout = {
        "expanded": torch.randn(1, 1, 1).expand(shape),
        "transposed": torch.randn(10, 6, 2).permute(2, 1, 0),
        "every second": torch.randn(2, 6, 20)[..., ::2],
    }[form]
    for op, inputs, name in (
        (rms_norm, selfcheck.rms_norm_inputs(generator(), 12, 10), "x"),
        (causal_conv1d, selfcheck.causal_conv1d_inputs(generator(), 2, 6, 10), "x"),
        (selective_scan, selfcheck.selective_scan_inputs(generator(), 2, 6, 10, 4), "u"),
    ):
        leaf = inputs[name].requires_grad_()
        out = op(**inputs, backend=backend)
        (got,) = torch.autograd.grad(out, leaf, dout.reshape(out.shape) if out.shape != shape else dout)
        (want,) = torch.autograd.grad(op(**inputs, backend="reference"), leaf, dout.contiguous().reshape(out.shape))
        assert_close(got, want, 1e-5)


def test_backend_unavailable_is_a_runtime_error():
    with pytest.raises(BackendUnavailable) as caught:
        rms_norm(torch.ones(1, 2), torch.ones(2), backend="cuda")
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, CobraKernelsError)
