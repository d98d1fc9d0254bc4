"""The official repository's model, on the shims, against `cobra` with the same weights."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import cobra_kernels
from cobra.config import ProjectorConfig
from cobra.projector import Projector
from tests.model.conftest import make_vlm
from tests.tolerances import GEMM, LOGITS, assert_close

pytestmark = pytest.mark.usefixtures("shims")


@pytest.fixture
def official():
    """The module, imported under the shims."""
    module = importlib.import_module("tests.compat.official_cobra")
    yield module
    sys.modules.pop(module.__name__)


def both(official):
    """cobra's model and the official one, with the weights of a checkpoint between them."""
    vlm = make_vlm()
    checkpoint = {
        "projector": vlm.projector.state_dict(),
        "llm_backbone": {f"llm.{name}": t for name, t in vlm.llm.state_dict().items()},
    }
    lm = vlm.config.lm
    kind = vlm.config.projector
    theirs = official.CobraVLM(
        vlm.vision,
        official.Projector(kind.kind, kind.in_width, kind.out_width),
        official.LLMBackbone(d_model=lm.d_model, n_layer=lm.n_layer, vocab_size=lm.vocab_size, ssm_cfg={}, eps=lm.norm_epsilon),
    ).eval()
    for name, weights in checkpoint.items():
        getattr(theirs, name).load_state_dict(weights)  # strict: the names are the published ones
    return vlm, theirs


def inputs(vlm, batch, text_len, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = {t.name: torch.randn(batch, 3, t.image_size, t.image_size, generator=g) for t in vlm.config.vision.towers}
    return torch.randint(1, 257, (batch, text_len), generator=g), pixels


def test_one_forward(official):
    vlm, theirs = both(official)
    ids, pixels = inputs(vlm, 2, 7)
    cobra_kernels.reset_call_counts()
    with torch.no_grad():
        got = theirs(ids, pixel_values=pixels).logits
    ran = {op for op, _ in cobra_kernels.call_counts()}
    assert ran >= {"rms_norm", "causal_conv1d", "selective_scan"}
    assert_close(got, vlm(ids, pixel_values=pixels).logits, LOGITS)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("text_len", [1, 2, 9])
def test_greedy_tokens(official, use_cache, text_len):
    """Prefill and decode, token by token; two batch sizes after each other, which share the official model's decoding cache."""
    vlm, theirs = both(official)
    for batch in (1, 3, 1):
        ids, pixels = inputs(vlm, batch, text_len)
        cobra_kernels.reset_call_counts()
        sequences, scores = official.decode(theirs, ids, pixels, 6, use_cache, vocab_size=vlm.config.lm.vocab_size)
        assert {"causal_conv1d_update", "selective_state_update"} <= {op for op, _ in cobra_kernels.call_counts()}
        logits, state = vlm.prefill(ids, pixels)
        for step in range(6):
            want = logits[:, : vlm.config.lm.vocab_size]
            assert_close(scores[:, step], want, LOGITS)
            best = want.topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-4, "the test needs another seed: two tokens are equally good"
            token = want.argmax(-1)
            assert torch.equal(sequences[:, text_len + step], token)
            logits = vlm.decode(token, state)


def test_training(official):
    """Rows with and without an image, labels, and the gradient of every trained weight; through the fused block."""
    vlm, theirs = both(official)
    vlm.projector.requires_grad_(True), vlm.llm.requires_grad_(True)
    ids, pixels = inputs(vlm, 3, 5)
    rows = [0, 2]
    pixels = {name: p[rows] for name, p in pixels.items()}
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    cobra_kernels.reset_call_counts()
    got = theirs(ids, pixel_values=pixels, labels=labels, multimodal_indices=rows)
    assert any(op == "mamba_inner" for op, _ in cobra_kernels.call_counts())
    want = vlm(ids, pixel_values=pixels, labels=labels, multimodal_indices=rows)
    assert_close(got.loss, want.loss, GEMM)
    patches = vlm.config.num_image_tokens
    assert_close(got.logits[:2], want.logits[rows], LOGITS)
    assert_close(got.logits[2:, :5], want.logits[1:2, :5], LOGITS)
    assert got.logits.shape[1] == patches + 5
    got.loss.backward(), want.loss.backward()
    theirs_grads = {
        n.removeprefix("projector.").removeprefix("llm_backbone.llm."): p.grad for n, p in theirs.named_parameters() if p.grad is not None
    }
    ours_grads = {n.removeprefix("projector.").removeprefix("llm."): p.grad for n, p in vlm.named_parameters() if p.grad is not None}
    assert theirs_grads.keys() == ours_grads.keys()
    for name, grad in theirs_grads.items():
        assert_close(grad, ours_grads[name], LOGITS, name)


@pytest.mark.parametrize("kind", ["linear", "gelu-mlp", "fused-gelu-mlp", "ldpnet", "fused-ldpnet"])
def test_projectors(official, kind):
    """The official ones, plain torch on concatenated features, against ours, which read the towers' features where they are."""
    ours = Projector(ProjectorConfig(kind, in_width=20, out_width=12, grid=27))
    theirs = official.Projector(kind, 20, 12)
    theirs.load_state_dict(ours.state_dict())
    features = torch.randn(2, 729, 8), torch.randn(2, 729, 12)
    with torch.no_grad():
        got = ours(features)
        assert_close(got, theirs(torch.cat(features, dim=2)), GEMM)
    assert got.shape[1] == (196 if kind.endswith("ldpnet") else 729)
