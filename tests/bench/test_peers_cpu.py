"""Peers on a CPU compute what we compute: what a bench times side by side is the same work."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.harness.bench import AGREEMENT, disagreement, parser
from benchmarks.model import gguf_peer
from benchmarks.shapes import LMShape


@pytest.fixture(scope="module")
def model():
    from cobra_kernels.modules import MambaConfig, MambaLMHeadModel

    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=64, n_layer=2, vocab_size=96)).eval().requires_grad_(False)


@pytest.mark.skipif(gguf_peer.absence() is not None, reason=f"llama.cpp: {gguf_peer.absence()}")
def test_llama_cpp_with_our_weights_gives_our_logits(model):
    shape = LMShape(64, 2, vocab=96)

    def make():
        return model

    ids = torch.randint(96, (1, 33), generator=torch.Generator().manual_seed(0))
    exact, quantized = gguf_peer.providers(gguf_peer.prefill, make, shape, 64)
    want, _ = model.prefill(ids)
    for _ in range(2):  # each call begins with an empty state
        assert disagreement(exact.call(ids), want) < 1e-5
    assert 1e-4 < disagreement(quantized.call(ids), want) < 0.1 and not quantized.comparable
    state = model.prefill(torch.zeros(1, gguf_peer.PAST, dtype=torch.long))[1]
    step = gguf_peer.providers(gguf_peer.decode, make, shape, 64)[0]
    for token in range(70):  # beyond the tokens of one pass
        ids = torch.tensor([[token]])
        assert disagreement(step.call(ids), model.decode(ids[0], state)) < 1e-5 < AGREEMENT["fp32"]


def test_without_llama_cpp_the_bench_says_so_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_peer._say.cache_clear()
    for _ in range(2):
        assert gguf_peer.providers(gguf_peer.prefill, None, LMShape(64, 2), 64) == []
    assert capsys.readouterr().out.count("left out: llama.cpp: ModuleNotFoundError") == 1


def agree(providers, inputs, dtype: str = "fp32") -> list[str]:
    """Compares every provider with the first, as the harness does before it times them."""
    want = providers[0].call(*inputs)
    for provider in providers[1:]:
        error = disagreement(provider.call(*inputs), want)
        assert error <= AGREEMENT[dtype], f"{provider.name} differs from {providers[0].name} by {error:.1e}"
    return [p.name for p in providers]


SCAN_NAMES = ["cpu", "materialised loop (transformers)", "mambapy", "reference", "torch", "torch.compile"]


@pytest.mark.parametrize("shape, train", [("130m-image", False), ("130m-train", True), ("130m-image", True)])
def test_scans(shape, train, monkeypatch):
    from benchmarks.ops import bench_selective_scan as bench

    monkeypatch.setattr(bench.torch, "compile", lambda function, **kwargs: function)  # its chunks, without the compiler
    monkeypatch.setattr(bench, "SHAPES", {shape: (2, 24, 13, 5)})
    mode = "fwd+bwd" if train else "fwd"
    case = next(c for c in bench.cases(parser("selective_scan").parse_args([])) if c.mode == f"{mode} channel-last" and c.dtype == "fp32")
    names = agree(case.providers, case.make_inputs(0))
    assert names == SCAN_NAMES[: 6 if not train else 3 if shape == "130m-train" else 1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_norms(dtype, monkeypatch):
    from benchmarks.ops import bench_rms_norm as bench

    monkeypatch.setattr(bench.torch, "compile", lambda function, **kwargs: function)
    monkeypatch.setattr(bench, "SHAPES", {"cobra-3b-image": (7, 48)})
    cases = [c for c in bench.cases(parser("rms_norm").parse_args([])) if c.dtype == dtype]
    assert len(cases) == 2
    for case in cases:
        assert agree(case.providers, case.make_inputs(0), dtype)[-2:] == ["transformers", "mambapy"]


def test_blocks(monkeypatch):
    from benchmarks.ops import bench_mamba_inner as bench

    monkeypatch.setattr(bench.torch, "compile", lambda function, **kwargs: function)
    monkeypatch.setattr(bench, "SHAPES", {"130m-train": bench.Shape(2, 11, LMShape(32, 1, dstate=5))})
    forward, train = bench.cases(parser("mamba_inner").parse_args([]))
    assert agree(forward.providers, forward.make_inputs(0)) == ["cpu", "transformers", "mambapy", "torch", "torch.compile"]
    assert agree(train.providers, train.make_inputs(0)) == ["cpu", "mambapy"]
    one = bench.cost(bench.Shape(1, 11, LMShape(32, 1)), torch.float32, "fwd")
    assert one.flops == 2 * 11 * (64 * (2 + 2 * 16) + 2 * 64 + 64 * 32) and one.exps == 11 * 64 * 21


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_products_of_few_rows(dtype, monkeypatch):
    from benchmarks.ops import bench_linear as bench

    monkeypatch.setattr(bench, "WEIGHTS", {"in": (19, 33)})
    cases = [c for c in bench.cases(parser("linear").parse_args([])) if c.dtype == dtype]
    assert len(cases) == len(bench.ROWS)
    for case in cases:
        assert "torch" in agree(case.providers, case.make_inputs(0), dtype)
