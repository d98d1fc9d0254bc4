"""A model of the LLaVA family as the scenarios ask for it, from the classes of `transformers`, with random weights.

Best settings, so that nobody can say it was held back:
- SDPA; on a CPU linear layers on the faster of torch's two matrix libraries, as Cobra's are;
- no vision block whose output is thrown away (LLaVA reads the second-to-last one);
- prefill by the causal kernel, without a mask;
- a decode step reads a cache that is exactly as long as the context and needs no mask, so that SDPA may take its fastest kernel;
  while it answers, a static cache exactly as long as the whole conversation;
- on a GPU every decode step is a CUDA graph; torch.compile on top of that is a setting of its own.

As users run it: what transformers does when it is called: `generate` with a cache that grows by concatenation, launched from Python,
plain nn.Linear, and the vision tower's last block, whose output is not used."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer

from benchmarks.baselines.costs import DecoderShape, LdpProjector, Vlm
from benchmarks.baselines.subject import SEED, Greedy, Subject, made_on
from cobra.config import VisionConfig
from cobra.vision import VisionBackbone
from cobra_kernels.linear import RoutedLinear, route_linears

MAX_POSITIONS = 1 << 17  # rotary positions have no table; contexts beyond training measure speed only
PHI_ROTARY = 0.4  # of a head, in Phi-2


def cache_bytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class SlotLayer(DynamicLayer):
    """Keys and values of a context, and one slot more that every step writes again: (batch, heads, context + 1, head_dim)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


class Decoder:
    """The language model: a transformers decoder and its head, with the caches that reading and decoding need."""

    def __init__(self, text: nn.Module, head: nn.Module, config: Any) -> None:
        self.text, self.head, self.config = text, head, config
        self.heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads

    @property
    def like(self) -> dict[str, Any]:
        """Device and dtype of its weights."""
        return {"device": self.head.weight.device, "dtype": self.head.weight.dtype}

    def read(self, embeddings: Tensor, past: DynamicCache | None = None) -> tuple[Tensor, DynamicCache]:
        """Embeddings (batch, tokens, d_model) after `past`, which grows; returns the last token's logits (batch, vocab) and the cache."""
        seen = DynamicCache(config=self.config) if past is None else past
        hidden = self.text(inputs_embeds=embeddings, past_key_values=seen, use_cache=True).last_hidden_state
        return self.head(hidden[:, -1]), seen

    def step(self, token: Tensor, cache: Cache) -> Tensor:
        """token (batch, 1) -> logits (batch, vocab); the cache takes it in."""
        hidden = self.text(input_ids=token, past_key_values=cache, use_cache=True).last_hidden_state
        return self.head(hidden[:, -1])

    def noise(self, batch: int, context: int, room: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values (batch, heads, context + room, head_dim) of every layer, random; the room is zero. The same at every call."""
        generator = torch.Generator(self.like["device"]).manual_seed(SEED)
        for _ in range(self.config.num_hidden_layers):
            pair = []
            for _ in range(2):
                block = torch.randn(1, self.heads, 1024, self.head_dim, generator=generator, **self.like)
                t = torch.zeros(batch, self.heads, context + room, self.head_dim, **self.like)
                for start in range(0, context, 1024):
                    end = min(start + 1024, context)
                    t[:, :, start:end] = block[:, :, : end - start]
                pair.append(t)
            yield pair[0], pair[1]

    def slots(self, batch: int, context: int) -> Cache:
        """For a step after `context` tokens, repeated."""
        return Cache(layers=[SlotLayer(k, v) for k, v in self.noise(batch, context, 1)])

    def static(self, batch: int, length: int, room: int) -> StaticCache:
        """Zeros for `length` tokens that count as read, and room for more."""
        cache = StaticCache(config=self.config, max_cache_len=length + room)
        size = (batch, self.heads, length + room, self.head_dim)
        for layer in cache.layers:
            # Filled by hand: the cache's own initialisation pins shapes for CUDA graphs and every length would compile anew.
            layer.keys, layer.values = torch.zeros(size, **self.like), torch.zeros(size, **self.like)
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.batch_size, layer.num_heads = batch, self.heads
            layer.k_head_dim = layer.v_head_dim = self.head_dim
            layer.cumulative_length = torch.tensor(length, device=layer.device)
            layer.is_initialized = True
        return cache

    def fill(self, cache: StaticCache, seen: DynamicCache) -> None:
        """`cache` remembers what `seen` does, and no more."""
        length = seen.get_seq_length()
        for layer, source in zip(cache.layers, seen.layers):
            layer.keys[:, :, :length].copy_(source.keys)
            layer.values[:, :, :length].copy_(source.values)
            layer.cumulative_length.fill_(length)


class LdpV2(nn.Module):
    """MobileVLM v2's projector in its own order: Linear, GELU, Linear, average pooling of the grid, y = p + depthwise3x3(p)."""

    def __init__(self, shape: LdpProjector) -> None:
        super().__init__()
        (v, hidden), (_, out) = shape.linears
        self.mlp = nn.Sequential(nn.Linear(v, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.peg = nn.Conv2d(out, out, 3, padding=1, groups=out)
        self.grid, self.out_grid = shape.grid, shape.out_grid

    def forward(self, features: Tensor) -> Tensor:
        """(images, grid * grid, v) -> (images, out_grid * out_grid, out)."""
        hidden = self.mlp(features).transpose(1, 2).unflatten(2, (self.grid, self.grid))  # (images, out, grid, grid)
        pooled = F.adaptive_avg_pool2d(hidden, (self.out_grid, self.out_grid))
        return (pooled + self.peg(pooled)).flatten(2).transpose(1, 2)


def language_model(shape: DecoderShape) -> nn.Module:
    common = {
        "vocab_size": shape.vocab, "hidden_size": shape.d_model, "intermediate_size": shape.mlp, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "max_position_embeddings": MAX_POSITIONS, "tie_word_embeddings": False,
        "attn_implementation": "sdpa", "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if shape.kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    return PhiForCausalLM(PhiConfig(**common, partial_rotary_factor=PHI_ROTARY))


class Transformer(Subject):
    """One of benchmarks.baselines.costs.SHAPES."""

    def __init__(self, shape: Vlm, device: str, dtype: torch.dtype) -> None:
        super().__init__(shape, device, dtype)
        (tower,) = shape.towers
        with made_on(self.device, dtype):
            self.tower = VisionBackbone(VisionConfig(shape.name, (tower,)))
            built = self.tower.towers[tower.name]
            self.unused_block = type(built.encoder.layers[-1])(built.config)
            (v, hidden), (_, out) = shape.projector.linears
            is_ldp = isinstance(shape.projector, LdpProjector)
            plain = (nn.Linear(v, hidden), nn.GELU(), nn.Linear(hidden, out)) if not is_ldp else ()
            self.projector = LdpV2(shape.projector) if is_ldp else nn.Sequential(*plain)
            self.llm = language_model(shape.language)
        self.whole_tower = nn.ModuleList([self.tower, self.unused_block])
        for module in self.modules.values():
            route_linears(module.eval().requires_grad_(False))
        self.decoder = Decoder(self.llm.model, self.llm.lm_head, self.llm.config)
        self._routed = [m for part in self.modules.values() for m in part.modules() if type(m) is RoutedLinear]

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"vision": self.whole_tower, "projector": self.projector, "language": self.llm}

    @property
    def vocab(self) -> int:
        return self.shape.language.vocab

    def vision(self, pixels: Any) -> Tensor:
        return self.tower(pixels)[0]  # (images, patches, width)

    def project(self, features: Tensor) -> Tensor:
        return self.projector(features)

    def embed(self, ids: Tensor) -> Tensor:
        return self.llm.get_input_embeddings()(ids)

    def read(self, embeddings: Tensor) -> tuple[Tensor, DynamicCache]:
        return self.decoder.read(embeddings)

    def ask(self, kept: DynamicCache, ids: Tensor) -> Tensor:
        past = DynamicCache(config=self.llm.config)
        for layer, source in zip(past.layers, kept.layers):
            layer.lazy_initialization(source.keys, source.values)
            layer.keys = source.keys.expand(len(ids), -1, -1, -1)
            layer.values = source.values.expand(len(ids), -1, -1, -1)
        return self.decoder.read(self.embed(ids), past)[0]

    def step(self, batch: int, context: int, compiled: bool = False) -> Callable[[], Tensor]:
        cache, token = self.decoder.slots(batch, context), self.ids(batch, 1)
        return functools.partial(self._compiled_step if compiled else self.decoder.step, token, cache)

    def answer(self, pixels: Any, ids: Tensor, new_tokens: int, compiled: bool = False) -> Callable[[], Tensor]:
        length = len(next(iter(pixels.values()))) * self.shape.image_tokens + ids.shape[1]
        cache = self.decoder.static(1, length, new_tokens)
        step = self._compiled_step if compiled else self.decoder.step
        greedy = Greedy(lambda token: step(token, cache), 1, self.device)

        def call() -> Tensor:
            logits, seen = self.read(self._prompt(self.vision(pixels), ids))
            self.decoder.fill(cache, seen)
            return greedy(logits.argmax(-1, keepdim=True), new_tokens - 1)

        return call

    @functools.cached_property
    def _compiled_step(self) -> Callable[[Tensor, Cache], Tensor]:
        return torch.compile(self.decoder.step)

    # --- as users run it ---

    def first_token_as_users(self, pixels: Any, ids: Tensor) -> Tensor:
        with self._unrouted():
            embeddings = self._prompt(self._whole_vision(pixels), ids)
            return self.llm(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1).logits[:, -1]

    def step_as_users(self, batch: int, context: int) -> Callable[[], Tensor]:
        kept = list(self.decoder.noise(batch, context, 0))
        token, cache = self.ids(batch, 1), DynamicCache(config=self.llm.config)
        for layer, (keys, values) in zip(cache.layers, kept):
            layer.lazy_initialization(keys, values)

        def call() -> Tensor:
            for layer, (keys, values) in zip(cache.layers, kept):  # forget the token of the call before
                layer.keys, layer.values = keys, values
            with self._unrouted():
                return self.llm(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

        return call

    def answer_as_users(self, pixels: Any, ids: Tensor, new_tokens: int) -> Tensor:
        with self._unrouted():
            embeddings = self._prompt(self._whole_vision(pixels), ids)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=self.device)
            return self.llm.generate(
                inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )

    def _whole_vision(self, pixels: Any) -> Tensor:
        """The features, and the last block's work for nothing."""
        hidden = self.tower.towers[self.shape.towers[0].name](next(iter(pixels.values()))).last_hidden_state
        self.unused_block(hidden, None)
        return hidden[:, self.shape.towers[0].prefix_tokens :]

    @contextlib.contextmanager
    def _unrouted(self) -> Iterator[None]:
        """Linear layers as torch ships them."""
        for layer in self._routed:
            layer.__class__ = nn.Linear
        try:
            yield
        finally:
            for layer in self._routed:
                layer.__class__ = RoutedLinear
