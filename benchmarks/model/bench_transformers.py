"""Hugging Face's MambaForCausalLM with and without our kernels: 130M shape, fp32, batch 1, one model for all.
`python -m benchmarks.model.bench_transformers --threads 2`

prefill  reads 512 tokens, returns the last token's logits and a cache. Yardstick: a large matrix product.
decode   one more token with that cache. Yardstick: reading every weight once.
train    loss, forward and backward of 128 tokens: without kernels the time grows with their square, and 512 take minutes.

install()     as compat.install() before the import of transformers leaves it; here apply_to_transformers() after it, and undo()
transformers  its own torch path, as it runs without CUDA kernels"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

import cobra_kernels
from benchmarks.harness.bench import Case, Cost, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.model import bench_lm
from benchmarks.shapes import LM
from cobra_kernels import compat

SHAPE = LM["130m"]
PROMPT, TRAINED = 512, 128  # tokens
COMPARED = ("layers.0.mixer.A_log", "layers.0.mixer.in_proj.weight", "layers.0.mixer.conv1d.weight")  # gradients that must agree

_served: list[str] = ["transformers"]  # the one who serves the model now


@functools.cache
def model():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=SHAPE.vocab, hidden_size=SHAPE.d_model, num_hidden_layers=SHAPE.layers, state_size=SHAPE.dstate, layer_norm_epsilon=1e-5,
        initializer_range=0.02,  # its default of 0.1 makes a model that turns the rounding of fp32 into differences of 1e-3
    )  # fmt: skip
    return MambaForCausalLM(config)


def serve(name: str) -> None:
    served = model()  # transformers is imported by now
    if _served[0] != name:
        compat.undo()
        if name != "transformers":
            compat.apply_to_transformers(served)
        _served[0] = name


def prefill() -> Callable[[torch.Tensor], torch.Tensor]:
    @torch.no_grad()
    def call(ids: torch.Tensor) -> torch.Tensor:
        return model().eval()(ids, use_cache=True, logits_to_keep=1).logits

    return call


def decode() -> Callable[[torch.Tensor], torch.Tensor]:
    caches = []  # of this provider alone, made when it is first served

    @torch.no_grad()
    def call(token: torch.Tensor) -> torch.Tensor:
        if not caches:
            caches.append(model().eval()(torch.arange(16)[None], use_cache=True).cache_params)
        return model()(token, cache_params=caches[0], use_cache=True).logits

    return call


def train() -> Callable[[torch.Tensor], list[torch.Tensor]]:
    def call(ids: torch.Tensor) -> list[torch.Tensor]:
        model().train().zero_grad(set_to_none=True)
        loss = model()(ids, labels=ids).loss
        loss.backward()
        grads = {name: p.grad for name, p in model().named_parameters()}
        return [loss.detach(), *(next(g for name, g in grads.items() if name.endswith(want)) for want in COMPARED)]

    return call


def provider(name: str, call: Callable) -> Provider:
    """`call` on the model as `name` serves it. The counters prove each time that our kernels ran, or that none did."""

    def run(ids: torch.Tensor):
        serve(name)
        before = sum(cobra_kernels.call_counts().values())
        result = call(ids)
        ran = sum(cobra_kernels.call_counts().values()) - before
        if (ran > 0) == (name == "transformers"):
            raise RuntimeError(f"bench_transformers: {ran} calls of our kernels in one of {name}")
        return result

    return Provider(name, run, slow_start=name == "transformers")


def train_cost() -> Cost:
    """FLOPs of the products, one forward and two backward; exponentials in both directions; weights read twice, a gradient written."""
    weights = SHAPE.layers * sum(i * o for i, o in bench_lm.matrices()) + SHAPE.d_model * SHAPE.vocab
    exps = 2 * SHAPE.layers * TRAINED * SHAPE.d_inner * (SHAPE.dstate + 3)
    return Cost(bytes=4 * 3 * weights, flops=3 * 2 * TRAINED * weights, exps=exps)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    modes = (
        ("prefill", prefill, PROMPT, bench_lm.cost(PROMPT), "matmul"),
        ("decode", decode, 1, bench_lm.cost(1), "read"),
        ("train", train, TRAINED, train_cost(), "matmul"),
    )
    for mode, make_call, tokens, cost, roof in modes:

        def ids(index: int, tokens=tokens) -> tuple:
            return (torch.randint(SHAPE.vocab, (1, tokens), generator=torch.Generator().manual_seed(index)),)

        providers = [provider(name, make_call()) for name in ("install()", "transformers")]
        yield Case(mode, "fp32", "130m", {"batch": 1, "tokens": tokens}, cost, roof, ids, providers, cache="warm", quick=mode == "decode")


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("transformers", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
