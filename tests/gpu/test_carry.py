"""The plugin that runs tests/ops on GPU backends: layouts survive the journey, and the suite passes under its rehearsal."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import cobra_kernels
from tests.conftest import ROOT
from tests.gpu import carry
from tests.sampler import lay_out


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "unaligned", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_moved_tensor_keeps_its_layout(layout, dtype):
    t = lay_out(torch.arange(24).reshape(2, 3, 4).to(dtype), layout) if dtype.is_floating_point else torch.arange(24)[3::2]
    there = carry.moved(t, "cpu")
    assert torch.equal(there, t) and there.stride() == t.stride() and there.storage_offset() == t.storage_offset()
    assert there.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_a_moved_empty_tensor():
    assert carry.moved(torch.empty(0, 5), "cpu").shape == (0, 5)


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
def test_the_suite_of_the_ops_runs_carried():
    """A part of it, as `make gpu-test` runs all of it. The count says that nothing was left out unseen."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.carry", "tests/ops/test_rms_norm.py", "tests/ops/test_causal_conv1d_update.py"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"} | {"COBRA_CARRY": carry.REHEARSAL}
    done = subprocess.run([*command, "-k", "rehearsal"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    tests = sum(int(n) for n in re.findall(r"(\d+) tests ", done.stdout))
    assert tests >= 150, done.stdout[-1000:]


def test_an_unknown_backend_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.gpu.carry", "tests/ops/test_rms_norm.py"], cwd=ROOT, check=False,
        env={**os.environ, "COBRA_CARRY": "metal"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "COBRA_CARRY=metal" in done.stdout + done.stderr
