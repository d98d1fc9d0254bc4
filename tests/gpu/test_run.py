"""The driver of the `make gpu-*` verbs: it reads reports, ends what takes too long, and keeps what it wrote."""

from __future__ import annotations

import json
import sys
import time

import pytest

import cobra_kernels
from tests.gpu import run

REPORT = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at cobra::(anonymous namespace)::rms_norm_fwd_vector_kernel<float, 8>(cobra::RmsNormFwdParams)+0x1b0
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f0000000200 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Uninitialized __global__ memory read of size 8 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x90
=========     by thread (0,0,0) in block (1,0,0)
=========
========= Uninitialized __global__ memory read of size 8 bytes
=========     at _fwd_kernel+0x90
=========     by thread (0,0,0) in block (1,0,0)
=========
========= Error: Race reported between Write access at cobra::scan_kernel(cobra::Params)+0x90
=========     and Read access at cobra::scan_kernel(cobra::Params)+0xe0 [28 hazards]
=========
========= Barrier error detected. Divergent thread(s) in block.
=========     at void cutlass::Kernel<x>(x)+0x10
=========
========= ERROR SUMMARY: 5 errors
"""


def test_findings_tell_our_kernels_from_a_librarys():
    mine, others = run.findings(REPORT, run.our_kernels())
    assert others == 2
    assert [line.split(" |")[0].split(" ")[0] for line in mine] == ["Invalid", "Uninitialized", "Error:"]
    assert "rms_norm_fwd_vector_kernel" in mine[0]
    assert run.findings("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", run.our_kernels()) == ([], 0)


def test_an_error_outside_any_kernel_is_ours():
    assert len(run.findings("========= Program hit cudaErrorInvalidValue on cudaLaunchKernel\n=========\n", run.our_kernels())[0]) == 1


def test_counters_are_read_with_their_units():
    report = (
        '==PROF== Connected\n"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum"\n'
        '"","","","","us","Mbyte"\n"0","scan_kernel","(128, 1, 1)","(160, 1, 1)","31.2","33.1"\n'
    )
    lines = run.counters(report)
    assert lines[0].startswith("scan_kernel  grid (160, 1, 1)")
    assert any("time" in line and "31.2 us" in line for line in lines) and any("DRAM read" in line and "33.1 Mbyte" in line for line in lines)
    assert run.counters("==ERROR== no such kernel") == []


@pytest.fixture
def session(tmp_path, capsys):
    return run.Session("test", tmp_path, rehearse=True)


def test_a_step_past_the_deadline_is_ended_and_recorded(session, tmp_path):
    session.deadline = time.monotonic() + 1.0
    status, output = session.step("slow", [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"])
    assert status == 124 and output == "begun" and session.end() == 1
    lines = [json.loads(line) for line in (tmp_path / "gpu-test.jsonl").read_text().splitlines()]
    assert lines[0]["environment"]["commit"] is None or len(lines[0]["environment"]["commit"]) == 12
    assert lines[1]["step"] == "slow" and lines[1]["exit"] == 124 and lines[1]["summary"] == "begun"
    assert "begun" in (tmp_path / "gpu-test.txt").read_text()


def test_records_are_on_disk_before_the_next_step(session, tmp_path):
    session.step("quick", [sys.executable, "-c", "print('done')"])
    assert json.loads((tmp_path / "gpu-test.jsonl").read_text().splitlines()[-1])["summary"] == "done"


def test_without_a_device_the_verbs_say_so(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["test"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_op_of_a_kernel_comes_from_the_table():
    assert run.op_of("rms_norm_fwd_vector_kernel") == "rms_norm" and run.op_of("selective_scan_fwd") == "selective_scan"
    assert run.op_of("no_such_kernel") is None and run.op_of("probe_kernel") is None  # the benchmarks' own


@pytest.mark.parametrize("kernel, backward", [("selective_scan_bwd_kernel", True), ("selective_scan_fwd", False), ("any_bwd_kernel", True)])
def test_a_kernel_of_a_backward_is_profiled_in_a_case_that_has_one(session, kernel, backward, monkeypatch):
    commands = []
    monkeypatch.setattr(session, "step", lambda name, command: commands.append(command) or (0, ""))
    assert run.profile(session, kernel, None, None) == 0
    assert ("--backward" in commands[-1]) is backward


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
def test_what_is_compiled_in_advance_has_backwards_too():
    cobra_kernels.reset_call_counts()
    done, errors = run._compile(("cpu", 0, 4, 8))
    assert done and not errors and any(name.endswith("_bwd") for name, _ in cobra_kernels.call_counts())
