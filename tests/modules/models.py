"""Small models whose weights make every term count, shared by the tests of this folder."""

from __future__ import annotations

import torch

from cobra_kernels.modules import MambaConfig, MambaLMHeadModel

# Untied: with a large tied embedding a random model only repeats its last token.
TINY = {"d_model": 32, "n_layer": 3, "vocab_size": 61, "tie_embeddings": False}


def randomise(module, seed: int = 0):
    """Overwrite what initialises to constants (A_log, D, norms, biases) or too small to matter (embedding)."""
    g = torch.Generator().manual_seed(seed)

    def noise(p, scale):
        return torch.randn(p.shape, generator=g, dtype=torch.float32).to(p.dtype) * scale

    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("embedding.weight", "lm_head.weight")):
                p.copy_(noise(p, 3 / p.shape[1] ** 0.5))
            elif name.endswith("dt_proj.bias"):
                p.copy_(noise(p, 1.0) - 3)  # dt of 0.02 .. 0.3
            elif name.endswith(("A_log", "norm.weight", "norm_f.weight", "D")):
                p.add_(noise(p, 0.3))
            elif p.dim() == 1:
                p.copy_(noise(p, 0.3))
            else:
                p.copy_(noise(p, 0.7 / p[0].numel() ** 0.5))
    return module


def make_lm(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> MambaLMHeadModel:
    config = MambaConfig(**{**TINY, **overrides})
    return randomise(MambaLMHeadModel(config, dtype=dtype), seed).eval()


def make_ids(*shape: int, vocab: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
