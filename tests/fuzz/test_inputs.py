"""20,000 hostile inputs a run: each ends in a result or one typed error, in bounded time and memory."""

from __future__ import annotations

import collections
import time
from pathlib import Path

import pytest

from tests.fuzz import inputs

CHUNK, CHUNKS = 500, 40
SECONDS = 5.0  # of one case, on a core shared with others; the median is a millisecond
MEGABYTES = 700  # by which the resident memory may rise: 64 MPx of RGBA, and their RGB


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) // 1024


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_inputs(chunk):
    inputs.pictures()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before, outcomes, failures = _status("VmRSS"), collections.Counter(), []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        start = time.process_time()
        try:
            outcomes[inputs.execute(seed).split(":")[0]] += 1
        except Exception as error:  # noqa: BLE001  every failure is reported with its seed
            failures.append(f"python -m tests.fuzz.inputs {seed}   {type(error).__name__}: {error!s:.300}")
        if time.process_time() - start > SECONDS:
            failures.append(f"python -m tests.fuzz.inputs {seed}   took {time.process_time() - start:.1f} s")
    assert not failures, f"{len(failures)} of {CHUNK} cases:\n" + "\n".join(failures[:5])
    assert _status("VmHWM") - before < MEGABYTES
    assert outcomes["result"] > CHUNK // 20, "hardly anything is read: the cases test only the first check"
    assert outcomes["ImageError"] > CHUNK // 20 and outcomes["CheckpointError"] > CHUNK // 5


def test_a_seed_is_a_case():
    """The same whatever ran before it: forwards and backwards agree."""
    forwards = {seed: (inputs.case(seed)[0], inputs.execute(seed)) for seed in range(300)}
    for seed in reversed(forwards):
        assert (inputs.case(seed)[0], inputs.execute(seed)) == forwards[seed]
