"""The sampler against exact distributions, transformers' own warpers, and the values that break samplers."""

from __future__ import annotations

import math

import pytest
import torch

from cobra_kernels import errors
from cobra_kernels.modules import Sampling, sample
from cobra_kernels.modules.sampling import apply_repetition_penalty, distribution, seen_tokens

transformers = pytest.importorskip("transformers")
DRAWS = 40_000

SAMPLINGS = [
    Sampling(1.0),
    Sampling(0.4),
    Sampling(2.5),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=5),
    Sampling(0.7, top_k=10**9),
    Sampling(1.0, top_p=0.8),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, min_p=0.1),
    Sampling(1.0, min_p=1.0),
    Sampling(0.8, top_k=8, top_p=0.7),
    Sampling(1.3, top_k=12, top_p=0.9, min_p=0.05),
    Sampling(1.3, top_p=0.9, min_p=0.2),
]


def make_logits(batch: int = 3, vocab: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def by_hand(logits: torch.Tensor, s: Sampling) -> torch.Tensor:
    """One row in fp64, filter after filter on a sorted list: temperature, top-k, top-p, min-p."""
    p = torch.softmax(logits.double() / s.temperature, dim=-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    order = order[: s.top_k] if s.top_k else order
    total, kept = sum(p[i] for i in order), []
    for i in order:
        if kept and sum(p[j] for j in kept) / total >= s.top_p:
            break
        kept.append(i)
    kept = [i for i in kept if p[i] >= s.min_p * p[kept[0]]]
    out = torch.zeros(len(p), dtype=torch.float64)
    for i in kept:
        out[i] = p[i] / sum(p[j] for j in kept)
    return out


def warpers(s: Sampling):
    """transformers' own, in the order its `generate` runs them."""
    t = transformers
    return [
        t.TemperatureLogitsWarper(s.temperature),
        *([t.TopKLogitsWarper(s.top_k)] if s.top_k else []),
        *([t.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []),
        *([t.MinPLogitsWarper(s.min_p)] if s.min_p else []),
    ]


@pytest.mark.parametrize("s", SAMPLINGS, ids=str)
def test_distribution_equals_the_definition_and_transformers(s):
    for vocab in (1, 2, 24, 1000):
        logits = make_logits(vocab=vocab, seed=vocab)
        before = logits.clone()
        p = distribution(logits, s)
        scores = logits
        for warp in warpers(s):
            scores = warp(None, scores)
        theirs = torch.softmax(scores, dim=-1)
        assert torch.equal(p > 0, theirs > 0)
        assert torch.allclose(p, theirs, atol=1e-6)
        for row, expected in zip(p, logits):
            assert torch.allclose(row.double(), by_hand(expected, s), atol=1e-6)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("s", SAMPLINGS, ids=str)
def test_draws_follow_the_distribution(s):
    """Chi-square, fixed seed: beyond 4 standard deviations of the statistic is a wrong sampler, not bad luck."""
    logits = make_logits(1)
    tokens = sample(logits.expand(DRAWS, -1), s, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(tokens, minlength=24).double()
    expected = by_hand(logits[0], s) * DRAWS
    assert not counts[expected == 0].any()
    live = expected >= 5  # the usual condition of the test; the rest goes into one cell
    cells = torch.cat([counts[live], counts[~live].sum()[None]])
    wanted = torch.cat([expected[live], expected[~live].sum()[None]])
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    chi2, freedom = ((cells - wanted) ** 2 / wanted).sum().item(), len(cells) - 1
    assert chi2 <= freedom + 4 * math.sqrt(2 * freedom), (chi2, freedom)


def test_the_test_above_sees_a_wrong_sampler():
    logits = make_logits(1)
    tokens = sample(logits.expand(DRAWS, -1), Sampling(1.05), generator=torch.Generator().manual_seed(1))
    counts, expected = torch.bincount(tokens, minlength=24).double(), by_hand(logits[0], Sampling(1.0)) * DRAWS
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert chi2 > 23 + 4 * math.sqrt(46)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_temperature_zero_is_greedy_whatever_else_is_set(dtype):
    logits = make_logits(5).to(dtype)
    for s in (Sampling(), Sampling(0, top_k=3, top_p=0.5, min_p=0.3), Sampling(0.0, top_k=0)):
        assert torch.equal(sample(logits, s), logits.argmax(-1))
        assert torch.equal(distribution(logits, s).argmax(-1), logits.argmax(-1))
        assert distribution(logits, s).sum() == 5


def test_tiny_temperature_does_not_overflow():
    logits = make_logits(4) * 1e4
    for temperature in (1e-3, 1e-30, 5e-324):
        p = distribution(logits, Sampling(temperature))
        assert torch.isfinite(p).all() and torch.equal(p.argmax(-1), logits.argmax(-1)) and torch.allclose(p.amax(-1), torch.ones(4))


def test_one_token_is_always_kept():
    logits = torch.full((2, 9), -math.inf)
    logits[0, 3], logits[1, 5] = -1e30, 7.0
    for s in SAMPLINGS:
        assert sample(logits, s, generator=torch.Generator().manual_seed(0)).tolist() == [3, 5]
    flat = torch.zeros(1, 9)
    assert torch.allclose(distribution(flat, Sampling(1.0, top_k=1, top_p=1e-3, min_p=1.0)), torch.full((1, 9), 1 / 9))  # all tie


def test_draws_at_the_ends_of_the_interval():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for u, token in ((0.0, 1), (0.49999, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert sample(logits, Sampling(1.0), uniform=torch.tensor([u], dtype=torch.float64)).item() == token


def test_a_prefix_sum_that_rounds_upwards_cannot_reach_a_filtered_token(monkeypatch):
    """Parallel prefix sums are not monotonic to the last bit; here one is bent at a token of probability 0."""
    logits, cumsum = torch.tensor([[0.0, -math.inf, 0.0]]), torch.Tensor.cumsum
    bump = torch.tensor([0.0, 1e-3, 0.0])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: cumsum(self, dim) + bump)
    assert sample(logits, Sampling(1.0), uniform=torch.tensor([0.5], dtype=torch.float64)).item() != 1


def test_seeds_repeat_and_rows_are_their_own():
    logits, s = make_logits(6), Sampling(1.0)

    def draw(seed):
        return sample(logits, s, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert any(not torch.equal(draw(3), draw(seed)) for seed in range(4, 8))
    uniform = torch.rand(6, dtype=torch.float64)
    whole = sample(logits, s, uniform=uniform)
    assert torch.equal(whole[2:4], sample(logits[2:4], s, uniform=uniform[2:4]))


def test_repetition_penalty():
    logits = make_logits(2)
    before = logits.clone()
    ids = torch.tensor([[3, 3, 7], [0, -1, 23]])
    seen = seen_tokens(ids, 24)
    assert seen.sum().item() == 4 and seen[0, [3, 7]].all() and seen[1, [0, 23]].all()
    assert not seen_tokens(torch.tensor([[24, 99, -1]]), 24).any()
    got = apply_repetition_penalty(logits, seen, 1.7)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids[:1], logits[:1].clone())
    assert torch.equal(got[:1], theirs)
    assert torch.equal(logits, before)  # the caller's logits
    assert apply_repetition_penalty(logits, None, 1.7) is logits and apply_repetition_penalty(logits, seen, 1.0) is logits
    best = logits.argmax(-1, keepdim=True)
    assert (sample(logits, Sampling(repetition_penalty=100.0), seen=seen_tokens(best, 24)) != best[:, 0]).all()
    with pytest.raises(errors.ShapeError, match=r"seen has shape \(2, 9\), expected \(2, 24\)"):
        sample(logits, Sampling(repetition_penalty=2.0), seen=torch.zeros(2, 9, dtype=torch.bool))


BAD = [
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "hot"},
    {"temperature": None},
    {"temperature": True},
    {"top_k": -1},
    {"top_k": 2.0},
    {"top_k": True},
    {"top_p": 0},
    {"top_p": -0.5},
    {"top_p": 1.01},
    {"top_p": math.nan},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"min_p": math.nan},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1.0},
    {"repetition_penalty": math.inf},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_values_are_errors(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(errors.ArgumentError) as caught:
        Sampling(**bad)
    assert f"{name} has {value!r}, expected a" in str(caught.value)


def test_bad_logits_are_errors():
    for logits in (torch.zeros(5), torch.zeros(2, 0), torch.zeros(1, 2, 3)):
        with pytest.raises(errors.ShapeError, match="logits has shape"):
            sample(logits)
    assert sample(torch.zeros(0, 5), Sampling(1.0)).shape == (0,)


def test_no_synchronisation():
    """On the meta device any look at a value raises: the sampler takes none."""
    logits, seen = torch.empty(2, 9, device="meta"), torch.empty(2, 9, dtype=torch.bool, device="meta")
    for s in (Sampling(repetition_penalty=2.0), Sampling(0.7, 5, 0.9, 0.1, 1.5), Sampling(1.0, top_p=0.5)):
        assert sample(logits, s, seen=seen, uniform=torch.empty(2, dtype=torch.float64, device="meta")).shape == (2,)
