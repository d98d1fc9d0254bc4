"""What a scenario asks of a model: the same questions to a Cobra and to a Transformer.

Methods that are timed return the logits of the next token, (batch, vocab), so that two settings of one model can be compared.
Those that prepare (`step`, `answer`) return the function that is timed."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.costs import SHAPES, Vlm
from benchmarks.harness.timing import CudaTimer

SEED = 0
PRIME = 1_000_003  # numbers of `fill`'s block: no width divides it, so that no two rows of a matrix are alike


class Subject(ABC):
    """A model with random weights. `shape` says what it must do; `name` is the shape's."""

    def __init__(self, shape: Vlm, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype

    @property
    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """{"vision", "projector", "language"}: every parameter is in exactly one."""

    @property
    def parameters(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in module.parameters()) for name, module in self.modules.items()}

    @property
    def nbytes(self) -> int:
        tensors = {t for m in self.modules.values() for t in (*m.parameters(), *m.buffers())}
        return sum(t.nbytes for t in tensors)

    # --- inputs ---

    def pixels(self, images: int) -> Any:
        """Random pixels, as `vision` takes them: (images, 3, px, px) per tower."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        made = {}
        for tower in self.shape.towers:
            size = (images, 3, tower.image_size, tower.image_size)
            made[tower.name] = torch.randn(size, generator=generator, device=self.device).to(self.dtype)
        return made

    def ids(self, batch: int, tokens: int) -> Tensor:
        """Random token ids (batch, tokens), the same in every row."""
        generator = torch.Generator(self.device).manual_seed(SEED)
        return torch.randint(2, self.vocab, (1, tokens), generator=generator, device=self.device).repeat(batch, 1)

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Token ids that may be asked for."""

    # --- the stages ---

    @abstractmethod
    def vision(self, pixels: Any) -> Any:
        """Pixels to features, as `project` takes them."""

    @abstractmethod
    def project(self, features: Any) -> Tensor:
        """Features to image embeddings (images, image tokens, d_model)."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """(batch, tokens) to (batch, tokens, d_model)."""

    @abstractmethod
    def read(self, embeddings: Tensor) -> tuple[Tensor, Any]:
        """Embeddings (batch, tokens, d_model) to the next token's logits and what is remembered of them."""

    def first_token(self, pixels: Any, ids: Tensor) -> Tensor:
        """All images, then the question (1, tokens), in one sequence."""
        return self.read(self._prompt(self.vision(pixels), ids))[0]

    def _prompt(self, features: Any, ids: Tensor) -> Tensor:
        image = self.project(features)  # (images, image tokens, d_model)
        return torch.cat([image.reshape(1, -1, image.shape[-1]), self.embed(ids)], dim=1)

    @abstractmethod
    def first_token_as_users(self, pixels: Any, ids: Tensor) -> Tensor: ...

    # --- a kept image ---

    def keep(self, pixels: Any) -> Any:
        """What is remembered of one image, for `ask`."""
        image = self.project(self.vision(pixels))
        return self.read(image)[1]

    @abstractmethod
    def ask(self, kept: Any, ids: Tensor) -> Tensor:
        """Questions (batch, tokens) on one kept image, which stays as it is."""

    # --- decoding ---

    @abstractmethod
    def step(self, batch: int, context: int, compiled: bool = False) -> Callable[[], Tensor]:
        """A function that reads one more token in `batch` sequences which have read `context` tokens, random ones: the time of a
        step does not depend on them. It may be called any number of times."""

    @abstractmethod
    def step_as_users(self, batch: int, context: int) -> Callable[[], Tensor]: ...

    @abstractmethod
    def answer(self, pixels: Any, ids: Tensor, new_tokens: int, compiled: bool = False) -> Callable[[], Tensor]:
        """A function from image and question (1, tokens) to the answer's greedy tokens (1, new_tokens), at its best settings."""

    @abstractmethod
    def answer_as_users(self, pixels: Any, ids: Tensor, new_tokens: int) -> Tensor: ...


class Greedy:
    """Greedy decoding on fixed buffers: `step(token (batch, 1)) -> logits`, on a GPU one CUDA graph per token.

    Making it runs the step a few times, which the caller's state must have room for; set the state after that."""

    def __init__(self, step: Callable[[Tensor], Tensor], batch: int, device: torch.device) -> None:
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)

        def advance() -> None:
            self.token.copy_(step(self.token).argmax(-1, keepdim=True))

        self.advance = advance
        if device.type == "cuda":
            side = torch.cuda.Stream(device)  # what a first call sets up must not land in the graph
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                advance()
                advance()
            torch.cuda.current_stream(device).wait_stream(side)
            replay = CudaTimer.capture(advance)
            if replay is None:
                raise RuntimeError("the decode step cannot be captured as a CUDA graph")
            self.advance = replay

    def __call__(self, first: Tensor, steps: int) -> Tensor:
        """first (batch, 1), the prefill's token; returns (batch, 1 + steps)."""
        tokens = torch.empty(len(first), 1 + steps, dtype=torch.long, device=first.device)
        tokens[:, :1] = first
        self.token.copy_(first)
        for i in range(1, 1 + steps):
            self.advance()
            tokens[:, i : i + 1].copy_(self.token)
        return tokens


@contextlib.contextmanager
def made_on(device: str | torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Tensors and parameters made inside are on `device`, floating ones in `dtype`: no copy in another dtype ever exists."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Values for parameters made without any: matrices with random numbers of deviation 0.02, weights of norms with 1, biases with 0;
    what decides a recurrence's decay keeps the values that its module computed.

    The random numbers of all matrices are the same million, each time from another place on: drawing billions takes minutes."""
    generator = torch.Generator().manual_seed(SEED)
    blocks: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    for index, (name, p) in enumerate(module.named_parameters()):
        if p.is_meta or name.endswith(("A_log", ".D", "dt_proj.bias")):
            continue
        if p.dim() < 2:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if (p.device, p.dtype) not in blocks:
            blocks[p.device, p.dtype] = 0.02 * torch.randn(PRIME, generator=generator).to(p.device, p.dtype)
        block, flat = blocks[p.device, p.dtype].roll(1009 * index), p.view(-1)
        for start in range(0, len(flat), PRIME):
            part = flat[start : start + PRIME]
            part.copy_(block[: len(part)])


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """A baseline (benchmarks.baselines.costs.SHAPES) or a preset of cobra, random weights in `dtype` on `device`."""
    from transformers.initialization import no_init_weights

    from benchmarks.baselines.cobra import CobraSubject
    from benchmarks.baselines.transformer import Transformer

    with no_init_weights():
        subject = Transformer(SHAPES[name], device, dtype) if name in SHAPES else CobraSubject(name, device, dtype)
    for module in subject.modules.values():
        fill(module)
    return subject
