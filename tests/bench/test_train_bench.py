"""The training benches: two models of one size, and both sides of the GPU case take a step."""

from __future__ import annotations

import torch

from benchmarks.model import bench_train
from benchmarks.shapes import LM, LMShape


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())  # a tied weight counts once


def test_the_transformer_has_the_parameters_of_the_mamba():
    for name in ("130m", "370m"):
        mamba, transformer = (parameters(make(LM[name], "meta", False)) for make in (bench_train.on_gpu, bench_train.transformer))
        assert abs(transformer / mamba - 1) < 0.01, (name, mamba, transformer)


def test_both_sides_of_the_gpu_case_take_a_step():
    shape = LMShape(64, 2, vocab=96)
    ids = torch.randint(shape.vocab, (2, 65), generator=torch.Generator().manual_seed(0))
    for make in (bench_train.on_gpu, bench_train.transformer):
        loss = bench_train.gpu_step(make, shape, False)(ids)
        assert loss.isfinite() and abs(loss.item() - torch.log(torch.tensor(96.0)).item()) < 0.5
        assert all(p.grad is not None and p.grad.isfinite().all() for p in make(shape, "cpu", False).parameters())
