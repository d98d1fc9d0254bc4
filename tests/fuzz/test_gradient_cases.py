"""Gradients of seeded op calls on the compiled CPU kernels, against autograd of the reference in fp64."""

from __future__ import annotations

import pytest

import cobra_kernels
from tests.sampler import check_gradients, describe, has_gradients, sample

CHUNK, CHUNKS = 50, 30  # of which two in three have gradients


@pytest.mark.skipif(cobra_kernels.backends()["cpu"] is not None, reason="no compiled kernels")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_gradients(chunk):
    failures = []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case = sample(seed)
        if not has_gradients(case):
            continue
        try:
            check_gradients(case, "cpu")
        except Exception as error:  # every failure is reported with its seed
            failures.append(f"python -m tests.sampler {seed}   {type(error).__name__}: {error}\n{describe(case)}")
    assert not failures, f"{len(failures)} cases:\n" + "\n".join(failures[:3])
