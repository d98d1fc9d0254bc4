"""10,400 seeded op calls a run on the compiled CPU kernels, against the reference in fp64."""

from __future__ import annotations

import pytest

import cobra_kernels
from tests.sampler import check, describe, sample

CHUNK, CHUNKS = 130, 80


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_cases(chunk):
    failures = []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case = sample(seed)
        try:
            check(case, "cpu")
        except Exception as error:  # every failure is reported with its seed
            failures.append(f"python -m tests.sampler {seed}   {type(error).__name__}: {error}\n{describe(case)}")
    assert not failures, f"{len(failures)} of {CHUNK} cases:\n" + "\n".join(failures[:3])
