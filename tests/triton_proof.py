"""What the Triton tests of every room share: a process with the interpreter on, and the registers of a cross-compiled kernel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

OPCHECK_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def run_interpreted(module: str) -> str:
    """What `interpreted()` of a test module prints in a process with TRITON_INTERPRET=1: the variable is read at import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    code = f"from {module} import interpreted; interpreted()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def interpreted_results(module: str) -> dict:
    """case -> what it printed, a JSON object per line, from one interpreter process."""
    results: dict = {}
    for line in run_interpreted(module).splitlines():
        results.update(json.loads(line))
    return results


def opchecked(op, arguments: tuple, tests: tuple[str, ...] = OPCHECK_TESTS) -> dict[str, list]:
    """opcheck's tests of a Triton op, in the interpreter's process, as a result: test -> [it failed, 0], what it said if it did."""
    import torch

    outcome = torch.library.opcheck(op, arguments, test_utils=tests, raise_exception=False)
    return {name: [0, 0] if said == "SUCCESS" else [1, 0, str(said)[-1500:]] for name, said in outcome.items()}


def assert_no_spills(compiled, folder: Path, what: str) -> None:
    """No stack, which is where a spill would go. `compiled` is what triton_utils.cross_compile returned."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this triton carries no cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    figures = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert figures["STACK"] == figures["LOCAL"] == 0, f"{what} spills: {figures}"
    assert 0 < figures["REG"] <= 255, f"{what}: {figures}"
