"""selftest(): quick, and able to fail."""

from __future__ import annotations

import time

import pytest
import torch

import cobra_kernels
from cobra_kernels import ops, selfcheck
from cobra_kernels.errors import ArgumentError, CobraKernelsError


def test_selftest_passes_and_reports_every_op(capsys):
    start = time.monotonic()
    worst = cobra_kernels.selftest()
    assert set(worst) == set(ops.PLANS) and all(0 <= share <= 1 for share in worst.values())
    assert time.monotonic() - start < 60
    said = capsys.readouterr().out
    assert all(op in said for op in ops.PLANS) and "all right on cpu" in said


def test_a_wrong_kernel_is_named(monkeypatch):
    right = cobra_kernels.rms_norm

    def wrong(*args, backend=None, **kwargs):
        y, s = right(*args, backend=backend, **kwargs)
        return (y if backend == "reference" else y * (1 + 1e-5)), s

    monkeypatch.setattr(cobra_kernels, "rms_norm", wrong)
    with pytest.raises(CobraKernelsError, match="rms_norm on cpu is wrong.*doctor"):
        cobra_kernels.selftest(verbose=False)


def test_unknown_backend():
    with pytest.raises(ArgumentError, match="'fast'"):
        cobra_kernels.selftest(backend="fast")


def test_realistic_inputs_cover_forgetting_and_memory():
    g = torch.Generator().manual_seed(0)
    inputs = selfcheck.selective_scan_inputs(g, 4, 64, 64, 16)
    dt = torch.nn.functional.softplus(inputs["delta"].double() + inputs["delta_bias"].double()[:, None])
    decay = torch.exp(dt[..., None] * inputs["A"].double()[:, None])
    assert dt.min() < 2e-4 and dt.max() > 10
    assert (decay > 0.999).double().mean() > 0.1 and decay.min() < 1e-7
