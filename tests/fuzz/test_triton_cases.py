"""Seeded op calls on the Triton kernels in Triton's interpreter, small ones: every op, in layouts and dtypes of the sampler."""

from __future__ import annotations

import pytest

from tests.gpu.cases import OPS
from tests.triton_proof import run_interpreted

PER_OP, MAX_ELEMENTS = 10, 1200  # the interpreter runs each program in Python

pytest.importorskip("triton", reason="triton is not installed")


def interpreted() -> None:
    """In a process with TRITON_INTERPRET=1: prints a line per op, and one per failure."""
    import torch

    from cobra_kernels.selfcheck import map_tensors
    from tests import sampler
    from tests.gpu import cases

    sampler.OUTPUT[torch.bfloat16] *= 2  # the interpreter cuts fp32 to bf16 where a GPU rounds
    done = dict.fromkeys(OPS, 0)
    for seed, case in cases.sampled(4000):
        if min(done.values()) >= PER_OP:
            break
        sizes: list[int] = []
        map_tensors(list(case.kwargs.values()), lambda t: sizes.append(t.numel()) or t)
        if sum(sizes) > MAX_ELEMENTS or done[case.op] >= PER_OP:
            continue
        done[case.op] += 1
        try:
            sampler.check(case, "triton")
        except Exception as error:
            print(f"python -m tests.sampler {seed}   {case.op}: {type(error).__name__}: {error}")
    print(done)


def test_cases():
    lines = run_interpreted(__name__).strip().splitlines()
    assert lines == [str(dict.fromkeys(OPS, PER_OP))], "\n".join(lines[:10])
