"""Shared by every test: backends as parameters, the CPU level fixture, and the time table printed at the end of a run."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import pytest
import torch

import cobra_kernels
from cobra_kernels import extension

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=extension.CPU_LEVELS)
def cpu_level(request):
    """Runs the test at every instruction-set level of this processor; a level it lacks is skipped by name."""
    levels = extension.CPU_LEVELS
    if extension.absence() is not None:
        pytest.skip(f"no compiled kernels: {extension.absence()}")
    if levels.index(request.param) > levels.index(extension.best_cpu_level()):
        pytest.skip(f"this processor reaches {extension.best_cpu_level()}, not {request.param}")
    before = extension.cpu_level()
    extension.set_cpu_level(request.param)
    yield request.param
    extension.set_cpu_level(before)


@pytest.fixture
def threads():
    """Calls f once per thread count given and restores torch's setting; only in tests marked `threads`."""
    before = torch.get_num_threads()

    def run(f, *counts):
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(f())
        return results

    yield run
    torch.set_num_threads(before)


def kernel_backends(device: str = "cpu") -> list[str]:
    """The compiled backends to compare with the reference on this machine."""
    available = cobra_kernels.backends()
    wanted = ("cpu",) if device == "cpu" else ("cuda", "triton")
    return [name for name in wanted if available[name] is None]


# --- time table ------------------------------------------------------------------------------------------------------

_seconds: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])


def pytest_runtest_logreport(report):
    """Sums up seconds per test file (with workers, on the controller)."""
    row = _seconds[report.nodeid.split("::")[0]]
    row[0] += report.when == "call"
    row[1] += report.duration


def pytest_terminal_summary(terminalreporter):
    """One line per test file, slowest first."""
    rows = sorted(((seconds, count, name) for name, (count, seconds) in _seconds.items()), reverse=True)
    if not rows or "PYTEST_XDIST_WORKER" in os.environ:
        return
    terminalreporter.section("time per file (sum over workers)", sep="-")
    for seconds, count, name in rows:
        if seconds >= 0.5:
            terminalreporter.write_line(f"{seconds:7.1f} s  {count:6d} tests  {name}")
