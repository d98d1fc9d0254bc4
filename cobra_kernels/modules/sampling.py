"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, in this order, then one draw.

Each of the three filters keeps the tokens whose logit reaches a threshold, so all of them together are one comparison,
batched, with no synchronisation. The best token always passes. Tokens equal to the last one kept are kept too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cobra_kernels import errors


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. The default is greedy. Bad values raise `ArgumentError`.

    temperature: logits are divided by it; 0 is greedy, whatever the filters say.
    top_k: keep the k best tokens; 0: all.
    top_p: keep the fewest best tokens whose probabilities, after top_k, add up to top_p; 1: all.
    min_p: keep tokens at least min_p times as probable as the best one; 0: all.
    repetition_penalty: logits of tokens already seen are divided by it if positive, multiplied if negative; 1: none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        _check(self, "temperature", "a finite number >= 0", lambda v: v >= 0)
        _check(self, "top_p", "a number in (0, 1]", lambda v: 0 < v <= 1)
        _check(self, "min_p", "a number in [0, 1]", lambda v: 0 <= v <= 1)
        _check(self, "repetition_penalty", "a finite number > 0", lambda v: v > 0)
        if type(self.top_k) is not int or self.top_k < 0:
            raise errors.ArgumentError(f"Sampling: top_k has {self.top_k!r}, expected an int >= 0 (0: no limit)")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def _check(sampling: Sampling, name: str, expected: str, accepts) -> None:
    value = getattr(sampling, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not accepts(value):
        raise errors.ArgumentError(f"Sampling: {name} has {value!r}, expected {expected}")


GREEDY = Sampling()


def sample(
    logits: Tensor,
    sampling: Sampling = GREEDY,
    *,
    seen: Tensor | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits (batch, vocab), any float dtype, not written -> tokens (batch,) int64.

    Columns of padded vocabulary must be cut off before: `logits[:, :vocab_size]`.
    seen: (batch, vocab) bool, the tokens that repetition_penalty is for. None: none.
    uniform: (batch,) fp64 in [0, 1), the draw of each row. None: drawn here, with `generator` (the default one if
        None).
    """
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise errors.ShapeError(f"sample: logits has shape {tuple(logits.shape)}, expected (batch, vocab >= 1)")
    logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.is_greedy:
        return logits.argmax(dim=-1)
    probs = distribution(logits, sampling)
    if uniform is None:
        uniform = torch.rand(logits.shape[0], dtype=torch.float64, generator=generator, device=_device(generator, logits))
    # Inverse of the distribution function. The strict comparison never stops at a token of probability 0 ...
    cdf = probs.double().cumsum(dim=-1)
    target = uniform.to(device=cdf.device, dtype=cdf.dtype)[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, target, right=True).clamp_(max=probs.shape[1] - 1)
    # ... unless a parallel prefix sum rounds upwards at one.
    return torch.where(probs.gather(1, tokens) > 0, tokens, probs.argmax(dim=-1, keepdim=True)).squeeze(1)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits (batch, vocab) -> the probabilities (batch, vocab) fp32 that `sample` draws from, 0 where filtered out."""
    logits = logits.float()
    best = logits.amax(dim=-1, keepdim=True)
    if sampling.is_greedy:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1.0)
    # The maximum goes first: a tiny temperature then makes -inf of the others, never inf - inf.
    logits = (logits - best) / max(sampling.temperature, torch.finfo(logits.dtype).tiny)
    return torch.softmax(logits.masked_fill(logits < _threshold(logits, sampling), -math.inf), dim=-1)


def _threshold(logits: Tensor, sampling: Sampling) -> Tensor:
    """The lowest logit (batch, 1) that top_k, top_p and min_p keep; the best logit of each row is 0."""
    vocab = logits.shape[1]
    threshold = torch.full_like(logits[:, :1], -math.inf)
    k = min(sampling.top_k or vocab, vocab)
    if sampling.top_p < 1 or k < vocab:
        # Sorted from the best down. A full sort only when there is no k to limit it.
        kept = logits.topk(k, dim=-1).values if k < vocab else logits.sort(dim=-1, descending=True).values
        threshold = kept[:, -1:]
        if sampling.top_p < 1:
            probs = torch.softmax(kept, dim=-1)
            before = probs.cumsum(dim=-1) - probs  # the mass of all better tokens: 0 for the best, which always stays
            threshold = kept.masked_fill(before >= sampling.top_p, 0.0).amin(dim=-1, keepdim=True)
    if sampling.min_p > 0:
        threshold = threshold.clamp(min=math.log(sampling.min_p))
    return threshold


def apply_repetition_penalty(logits: Tensor, seen: Tensor | None, penalty: float) -> Tensor:
    """logits (batch, vocab), those of `seen` (batch, vocab) bool made less likely; the argument is not written."""
    if seen is None or penalty == 1:
        return logits
    if seen.shape != logits.shape:
        raise errors.ShapeError(
            f"sample: seen has shape {tuple(seen.shape)}, expected {tuple(logits.shape)} (batch, vocab); both come from logits"
        )
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_tokens(token_ids: Tensor, vocab_size: int) -> Tensor:
    """token_ids (batch, n) int, values outside 0..vocab_size-1 ignored -> (batch, vocab_size) bool for `sample`."""
    real = (token_ids >= 0) & (token_ids < vocab_size)
    seen = torch.zeros(token_ids.shape[0], vocab_size + 1, dtype=torch.bool, device=token_ids.device)
    return seen.scatter_(1, token_ids.masked_fill(~real, vocab_size), True)[:, :vocab_size]


def _device(generator: torch.Generator | None, logits: Tensor) -> torch.device:
    return logits.device if generator is None else generator.device
