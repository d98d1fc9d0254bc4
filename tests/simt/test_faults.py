"""Proves the proof: copies of rms_norm's CUDA source, each with one fault, must each be caught by the detector that is there for it.

A fault is a text substitution on a copied file. The faulty object is linked with the other objects of the build, and runs in
a process of its own, because it may crash.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.simt import harness
from tests.simt.run_sanitized import child_command

sys.path.insert(0, str(harness.ROOT / "csrc"))
import build  # noqa: E402

sys.path.pop(0)

CASE = "base"  # (3, 136) fp32
MANY_WARPS = "shape=(2,2560)"
STRIDED = "shape=(2,129)"


class Fault(NamedTuple):
    """`old` -> `new` in `file`, seen by running `arguments` on the module built as `target`: it must say one of `finding`."""

    id: str
    file: str
    old: str
    new: str
    kernel: str  # the .cu file that holds the faulty code
    target: str
    arguments: tuple[str, ...]
    finding: str
    control: tuple[str, ...] = ()  # arguments under which this fault is invisible, to show what the detector adds


BARRIER = ("common/reduce.cuh", "    __syncthreads();\n", "")
FAULTS = [
    Fault("missing barrier, random order", *BARRIER, "rms_norm_cuda_fwd.cu", "host", ("--case", MANY_WARPS, "--order", "random"),
          "AssertionError: ", control=("--case", CASE, "--order", "forward")),
    Fault("missing barrier, race detector", *BARRIER, "rms_norm_cuda_fwd.cu", "tsan", ("--case", MANY_WARPS, "--order", "forward"),
          "ThreadSanitizer: data race"),
    Fault("shared memory overrun", "rms_norm/rms_norm_cuda_bwd.cu", "R[kSegments][kColumns], sums", "R[kSegments - 1][kColumns], sums",
          "rms_norm_cuda_bwd.cu", "asan", ("--case", CASE, "--order", "forward"), "runtime error: index 31 out of bounds"),
    Fault("shared memory overrun by pointer", "rms_norm/rms_norm_cuda_bwd.cu", "shared[i * threads + thread] =",
          "shared[(i + 1) * threads + thread] =", "rms_norm_cuda_bwd.cu", "asan", ("--case", "shape=(2,512)-dtype=bf16", "--order", "forward"),
          "AddressSanitizer: heap-buffer-overflow"),
    Fault("global write overrun, guard bands", "rms_norm/rms_norm_cuda.cuh", "if (channel < dim) store_pack", "if (channel <= dim) store_pack",
          "rms_norm_cuda_fwd.cu", "host", ("--case", CASE, "--order", "forward"), "wrote outside the tensor"),
    Fault("global read overrun", "rms_norm/rms_norm_cuda.cuh", "if (channel < dim) pack = load_pack", "if (channel <= dim) pack = load_pack",
          "rms_norm_cuda_fwd.cu", "asan", ("--case", CASE, "--order", "forward"), "AddressSanitizer: heap-buffer-overflow"),
    Fault("wrong tail mask", "rms_norm/rms_norm_cuda.cuh", "for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {\n    const R centered",
          "for (int64_t i = threadIdx.x; i + 1 < dim; i += blockDim.x) {\n    const R centered", "rms_norm_cuda_fwd.cu", "host",
          ("--case", STRIDED, "--order", "forward"), "AssertionError: y: relative error", control=("--case", CASE, "--order", "forward")),
    Fault("unwritten tail", "rms_norm/rms_norm_cuda.cuh", "if (channel < dim) store_pack", "if (channel + kWidth < dim) store_pack",
          "rms_norm_cuda_fwd.cu", "host", ("--case", CASE, "--order", "forward"), "elements are NaN"),
    Fault("32-bit offset", "common/rows.h", "offsets.of[k] += row * stride[k]->row[0]", "offsets.of[k] += int32_t(row * stride[k]->row[0])",
          "rms_norm_cuda_fwd.cu", "host", ("--large-strides",),
          "y: relative error", control=("--case", CASE, "--order", "random")),
    Fault("misaligned vector access", "rms_norm/rms_norm_cuda.cuh", "reinterpret_cast<uintptr_t>(base) % alignment == 0", "true",
          "rms_norm_cuda_fwd.cu", "asan", ("--case", "shape=(3,5,64)-dtype=bf16-layout=unaligned", "--order", "forward"),
          "misaligned address"),
    Fault("two blocks write one place", "rms_norm/rms_norm_cuda_bwd.cu",
          "R* const partial = static_cast<R*>(p.partial) + int64_t(blockIdx.x) * p.dim;",
          "R* const partial = static_cast<R*>(p.partial);", "rms_norm_cuda_bwd.cu", "tsan",
          ("--case", "shape=(33,40)", "--order", "random", "--resident", "3"), "ThreadSanitizer: data race"),
    Fault("a thread misses the barrier", "common/reduce.cuh", "    __syncthreads();\n", "    if (threadIdx.x != 40) __syncthreads();\n",
          "rms_norm_cuda_fwd.cu", "host", ("--case", MANY_WARPS, "--order", "forward"), "SimtFailure: simt: block"),
]  # fmt: skip


TARGETS = ("host", "asan", "tsan")


@pytest.fixture(scope="module")
def objects(built_host):
    """Objects of a module with this one room, and the emulated ones of each sanitizer: a faulty one replaces its original there."""
    cxx = build.find_cxx()
    with ThreadPoolExecutor(2) as pool:
        emulated = dict(zip(TARGETS, pool.map(lambda target: build.emulated_objects(cxx, target, ["rms_norm"]), TARGETS)))
    glue = [path for path in build.host_glue_objects(cxx) if path.name.startswith(("module", "probe", "rms_norm"))]
    return cxx, glue + [path for path in build.host_cpu_objects(cxx, "host") if path.parent.name in ("common", "rms_norm")], emulated


def faulty_module(objects, fault: Fault, folder: Path) -> Path:
    """The host module with `fault` in it."""
    cxx, others, emulated = objects
    source = build.CSRC / fault.file
    text = source.read_text()
    assert text.count(fault.old) == 1, f"{fault.file} has {text.count(fault.old)} times {fault.old!r}: update the fault to the source"
    copy = folder / fault.file
    copy.parent.mkdir(parents=True)
    copy.write_text(text.replace(fault.old, fault.new))
    # A header is found here before csrc: the kernel is copied too, since a file's own folder would come first.
    kernel = folder / "rms_norm" / fault.kernel
    kernel.parent.mkdir(exist_ok=True)
    if not kernel.exists():
        kernel.write_text((build.CSRC / "rms_norm" / fault.kernel).read_text())
    faulty, module = folder / "faulty.o", folder / build.host_module("host").name
    subprocess.run([cxx, f"-I{folder}", *build.emulated_flags(fault.target), "-O0", "-c", str(kernel), "-o", str(faulty)], check=True)
    kept = [str(path) for path in emulated[fault.target] if not path.name.startswith(fault.kernel)]
    assert len(kept) == len(emulated[fault.target]) - 1
    link = [cxx, "-shared", *build.HOST_FLAGS[fault.target], "-o", str(module), str(faulty), *kept, *map(str, others), "-lpthread"]
    subprocess.run(link, check=True)
    return module


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.id.replace(" ", "_").replace(",", "") for fault in FAULTS])
def test_fault_is_caught(objects, fault, tmp_path):
    module = faulty_module(objects, fault, tmp_path)

    def run(arguments):
        command, environment = child_command(fault.target, ["--module", str(module), "--room", "rms_norm", *arguments])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        return done.returncode, done.stdout + done.stderr

    code, output = run(fault.arguments)
    assert code != 0, f"not caught:\n{output}"
    assert fault.finding in output, f"caught, but not by the detector meant:\n{output[-3000:]}"
    if fault.control:
        code, output = run(fault.control)
        assert code == 0, f"expected to be invisible here:\n{output[-3000:]}"
