"""A tiny Cobra with random weights, and the simplest tokenizer there is."""

import numpy as np
import pytest
import torch

from cobra.config import preset
from cobra.model import CobraVLM


class ByteTokenizer:
    """Token 0 ends a text; token b + 1 is the byte b."""

    eos_token_id = 0

    def __len__(self):
        return 257

    def encode(self, text):
        return [b + 1 for b in text.encode()]

    def decode(self, ids):
        return bytes(i - 1 for i in ids if 0 < i <= 256).decode("utf-8", errors="replace")


def make_vlm(dtype=None):
    torch.manual_seed(0)
    vlm = CobraVLM(preset("cobra-tiny"), ByteTokenizer(), dtype=dtype)
    with torch.no_grad():  # as initialised, all logits are nearly equal and the text hardly matters
        vlm.llm.backbone.embedding.weight *= 10
        for layer in vlm.llm.backbone.layers:
            layer.mixer.in_proj.weight *= 2
            layer.mixer.x_proj.weight *= 4
            layer.mixer.out_proj.weight *= 10
        for p in vlm.projector.parameters():
            p *= 2
    return vlm.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vlm():
    """Shared: tests do not change it."""
    return make_vlm()


@pytest.fixture(scope="session")
def photos():
    """Three different pictures (height, width, 3) uint8, of different sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 60), (112, 112), (30, 20))]
