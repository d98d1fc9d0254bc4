"""Peers on a CPU compute what we compute: what a bench times side by side is the same work."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.harness.bench import AGREEMENT, disagreement
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
