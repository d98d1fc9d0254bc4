"""A Cobra as the scenarios ask for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.costs import cobra_costs
from benchmarks.baselines.subject import SEED, Greedy, Subject


class CobraSubject(Subject):
    """A preset of cobra with random weights, as shipped: its own kernels, no torch.compile; a CUDA graph per token on a GPU."""

    def __init__(self, preset: str, device: str, dtype: torch.dtype) -> None:
        import cobra

        with warnings.catch_warnings():  # random weights are what benchmarks are about
            warnings.simplefilter("ignore", cobra.RandomWeightsWarning)
            self.model = cobra.from_preset(preset, SEED, device=device, dtype=dtype)
        super().__init__(cobra_costs(self.model.config), device, dtype)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"vision": self.model.vision, "projector": self.model.projector, "language": self.model.llm}

    @property
    def vocab(self) -> int:
        return self.model.config.lm.vocab_size

    def vision(self, pixels: Any) -> tuple[Tensor, ...]:
        return self.model.vision(pixels)

    def project(self, features: Any) -> Tensor:
        return self.model.projector(features)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.llm.backbone.embedding(ids)

    def read(self, embeddings: Tensor):
        return self.model.llm.prefill(embeddings)

    def first_token_as_users(self, pixels: Any, ids: Tensor) -> Tensor:
        return self.model.prefill(ids, pixels)[0] if len(next(iter(pixels.values()))) == 1 else self.first_token(pixels, ids)

    def keep(self, pixels: Any):
        return self.model.encode_image(pixels)

    def ask(self, kept: Any, ids: Tensor) -> Tensor:
        return self.model.prefill(ids, image_state=kept)[0]

    def step(self, batch: int, context: int, compiled: bool = False) -> Callable[[], Tensor]:
        """The state has one size at any context; a few tokens are read into it so that it is not zero."""
        state = self.model.llm.prefill(self.ids(1, 16))[1].expand(batch)
        tokens = self.ids(batch, 1)[:, 0]
        return lambda: self.model.decode(tokens, state)

    def step_as_users(self, batch: int, context: int) -> Callable[[], Tensor]:
        return self.step(batch, context)

    def answer(self, pixels: Any, ids: Tensor, new_tokens: int, compiled: bool = False) -> Callable[[], Tensor]:
        state = self.model.llm.allocate_state(1)
        greedy = Greedy(lambda token: self.model.decode(token[:, 0], state), 1, self.device)

        def call() -> Tensor:
            logits, fresh = self.read(self._prompt(self.vision(pixels), ids))
            state.copy_(fresh)
            return greedy(logits.argmax(-1, keepdim=True), new_tokens - 1)

        return call

    def answer_as_users(self, pixels: Any, ids: Tensor, new_tokens: int) -> Tensor:
        """cobra_kernels' own generation loop, without stop tokens."""
        from cobra_kernels.modules.generation import stream_tokens

        vocab = self.model.llm.config.padded_vocab_size  # as `answer` draws
        prompt = self._prompt(self.vision(pixels), ids)
        return torch.stack(list(stream_tokens(self.model.llm, prompt, max_new_tokens=new_tokens, vocab_size=vocab)), dim=1)
