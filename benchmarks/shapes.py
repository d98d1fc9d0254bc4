"""Named shapes, so that a record says `cobra-3b` and everyone knows what ran."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LMShape:
    """The Mamba LM of a preset. d_inner is `dim` of the ops."""

    d_model: int
    layers: int
    vocab: int = 50280
    dstate: int = 16
    width: int = 4

    @property
    def d_inner(self) -> int:
        return 2 * self.d_model

    @property
    def dt_rank(self) -> int:
        return -(-self.d_model // 16)


LM = {
    "130m": LMShape(768, 24),
    "370m": LMShape(1024, 48),
    "790m": LMShape(1536, 48),
    "1.4b": LMShape(2048, 48),
    "cobra-3b": LMShape(2560, 64),
    "cobra-8b": LMShape(4096, 64),
}

# Sequence lengths: one image (27 x 27 patches) and a short question; the LDP projector's 14 x 14; a round long one.
LENGTHS = {"image": 800, "image-ldp": 267, "2k": 2048}
BATCHES = {"decode-1": 1, "decode-8": 8, "decode-64": 64}
# What a GPU is asked instead: bf16, the model of 3B parameters, and lengths that no vector width divides.
GPU_LENGTHS = {"image": 800, "odd": 801, "2k": 2048, "8k": 8192, "32k": 32768}
GPU_BATCHES = {"decode-1": 1, "decode-64": 64, "decode-256": 256}


@dataclass(frozen=True)
class ProjectorShape:
    tokens: int
    vision_dims: tuple[int, ...]
    hidden: int
    d_model: int


PROJECTOR = {
    "laptop": ProjectorShape(729, (384, 384), 4 * 768, 768),
    "cobra-3b": ProjectorShape(729, (1024, 1152), 4 * 2176, 2560),
}
