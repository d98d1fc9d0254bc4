"""A LLaVA-shaped Transformer of a wanted size, at its best settings: the other side of the demo.

Architecture of LLaVA-1.5 (CLIP ViT at 336 px and patch 14: 576 tokens; two-layer GELU projector; Llama decoder), from
`transformers`, scaled down, random weights. Best settings: SDPA; linear layers on the faster of torch's two matrix libraries,
as Cobra's are; no vision block whose output is thrown away; prefill takes the causal kernel without a mask; decode runs
on a static cache exactly as long as needed (a longer one would be read in full at every step), eager or compiled,
whichever is faster in the run."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)

from benchmarks.baselines.transformer import Decoder, cache_bytes
from cobra_kernels.linear import route_linears

IMAGE_SIZE, PATCH = 336, 14
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def _round(value: float, multiple: int = 16) -> int:
    return max(multiple, round(value / multiple) * multiple)


def matched_config(
    vision_parameters: int, language_parameters: int, *, d_model: int, layers: int, vocab: int, vision_width: int,
    vision_layers: int,
) -> LlavaConfig:  # fmt: skip
    """Shapes of LLaVA, with both MLP widths chosen so that each half has as many parameters as asked for."""
    attention = 4 * d_model**2 + 2 * d_model  # q, k, v, o and two norms
    per_layer = (language_parameters - vocab * d_model - d_model) / layers
    vision_attention = 4 * vision_width**2 + 4 * vision_width + 4 * vision_width  # q, k, v, o with biases, two LayerNorms
    patches = (IMAGE_SIZE // PATCH) ** 2
    embeddings = 3 * PATCH**2 * vision_width + (patches + 2) * vision_width + 4 * vision_width
    vision_per_layer = (vision_parameters - embeddings) / vision_layers - vision_attention - vision_width
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_width, intermediate_size=_round(vision_per_layer / (2 * vision_width + 1)),
            num_hidden_layers=vision_layers, num_attention_heads=vision_width // 64, image_size=IMAGE_SIZE, patch_size=PATCH,
            projection_dim=vision_width,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab, hidden_size=d_model, intermediate_size=_round((per_layer - attention) / (3 * d_model)),
            num_hidden_layers=layers, num_attention_heads=d_model // 64, max_position_embeddings=1 << 17,
            tie_word_embeddings=True,
        ),
        vision_feature_layer=-1, image_seq_length=patches, tie_word_embeddings=True,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return config


class Llava:
    """The demo's view of a model: preprocess, vision, project, prefill, decode."""

    label = "LLaVA-shaped Transformer"
    short = "Transformer"
    image_size = IMAGE_SIZE
    settings = (
        "SDPA; linear layers on the faster of torch's two matrix libraries, as Cobra's are; prefill with the causal kernel; "
        "static cache exactly as long as needed; decode eager or compiled, whichever is faster here; no vision block whose "
        "output is thrown away"
    )

    def __init__(self, config: LlavaConfig, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = route_linears(LlavaForConditionalGeneration(config).eval().requires_grad_(False))
        self.core = self.model.model
        self.decoder = Decoder(self.core.language_model, self.model.lm_head, config.text_config)
        self.image_tokens = config.image_seq_length
        self._step = self.decoder.step
        self.decode_mode = "eager"

    @property
    def parameters(self) -> dict[str, int]:
        parts = {
            "vision": self.core.vision_tower,
            "projector": self.core.multi_modal_projector,
            "language": self.core.language_model,
        }
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def preprocess(self, image: Image.Image) -> Tensor:
        resized = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)
        return ((pixels - CLIP_MEAN) / CLIP_STD)[None].contiguous()  # (1, 3, 336, 336)

    def vision(self, pixels: Tensor) -> Tensor:
        return self.core.vision_tower(pixels).last_hidden_state[:, 1:]  # (1, 576, vision_width), class token dropped

    def project(self, features: Tensor) -> Tensor:
        return self.core.multi_modal_projector(features)  # (1, 576, d_model)

    def prefill(self, image: Tensor, input_ids: Tensor, room: int) -> tuple[Tensor, StaticCache]:
        """Image tokens, then text. Returns the logits of the last token and a cache with room for `room` tokens."""
        logits, seen = self.decoder.read(torch.cat([image, self.core.language_model.embed_tokens(input_ids)], dim=1))
        return logits, self._grown(seen, room)

    def encode(self, pixels: Tensor) -> DynamicCache:
        """What is kept of an image between questions: its keys and values."""
        return self.decoder.read(self.project(self.vision(pixels)))[1]

    def kept_bytes(self, kept: DynamicCache) -> int:
        return cache_bytes(kept)

    def ask(self, kept: DynamicCache, input_ids: Tensor, room: int) -> tuple[Tensor, StaticCache]:
        """A question on a kept image; `kept` stays as it is."""
        cache = self._grown(kept, input_ids.shape[1] + room)
        return self.decoder.step(input_ids, cache), cache

    def state_at(self, context: int, room: int) -> StaticCache:
        """A cache as after `context` tokens, with random keys and values: the time of a step does not depend on them."""
        cache = self.decoder.static(1, context, room)
        for layer, (keys, values) in zip(cache.layers, self.decoder.noise(1, context, room)):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
        return cache

    def state_bytes(self, cache: StaticCache) -> int:
        return cache_bytes(cache)

    def rewind(self, cache: StaticCache, context: int) -> None:
        """Forget what was decoded after `context` tokens."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def decode(self, token: Tensor, cache: StaticCache) -> Tensor:
        """token (1, 1) -> logits (1, vocab); the cache grows by one."""
        return self._step(token, cache)

    def _grown(self, seen: DynamicCache, room: int) -> StaticCache:
        cache = self.decoder.static(1, seen.get_seq_length(), room)
        self.decoder.fill(cache, seen)
        return cache

    def compile_decode(self) -> None:
        """torch.compile of the step, one dynamic-length graph for every context."""
        self._step = torch.compile(self.decoder.step, dynamic=True)
        self.decode_mode = "torch.compile"

    def eager_decode(self) -> None:
        self._step = self.decoder.step
        self.decode_mode = "eager"
