"""The Mamba language model, 130M shape, fp32, batch 1: prefill and decode. `python -m benchmarks.model.bench_lm --help`.

prefill  reads 512 tokens, returns the last token's logits and a state to go on from. Yardstick: its matrix products alone.
decode   one more token. Yardstick: reading every weight once.

Peers: the same weights in transformers' Mamba (the slow path, as it runs without CUDA kernels) and in llama.cpp where llama-cpp-python and gguf
are installed (a gguf file of them, also quantized), and for prefill a GPT-NeoX of 12 layers and the same width in the same library (SDPA), as it is and with its linear layers on oneDNN like ours."""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.harness.bench import Case, Cost, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.model import gguf_peer
from benchmarks.shapes import LM
from cobra_kernels.linear import linear, route_linears

SHAPE = LM["130m"]
LENGTHS = {"prompt-512": 512, "image": 800}
MOST_TOKENS = 1024  # that llama.cpp takes in one pass


def matrices() -> list[tuple[int, int]]:
    """(in, out) of the four projections of one layer: in, x, dt, out."""
    d, e, r, n = SHAPE.d_inner, SHAPE.d_model, SHAPE.dt_rank, SHAPE.dstate
    return [(e, 2 * d), (d, r + 2 * n), (r, d), (d, e)]


def cost(tokens: int) -> Cost:
    """FLOPs of the matrix products (logits of one token only); exponentials of the scan; every weight read once."""
    weights = SHAPE.layers * sum(i * o for i, o in matrices())
    head = SHAPE.vocab * SHAPE.d_model
    scan = SHAPE.layers * tokens * SHAPE.d_inner
    state = SHAPE.layers * SHAPE.d_inner * (SHAPE.dstate + SHAPE.width)
    return Cost(
        bytes=4 * (weights + head + 2 * state), flops=2 * (tokens * weights + head), exps=scan * (SHAPE.dstate + 3)
    )


@functools.cache
def ours():
    from cobra_kernels.modules import MambaConfig, MambaLMHeadModel

    torch.manual_seed(0)
    config = MambaConfig(d_model=SHAPE.d_model, n_layer=SHAPE.layers, vocab_size=SHAPE.vocab)
    return MambaLMHeadModel(config).eval().requires_grad_(False)


@functools.cache
def hugging_face():
    """transformers' Mamba with our weights."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=SHAPE.vocab, hidden_size=SHAPE.d_model, num_hidden_layers=SHAPE.layers, state_size=SHAPE.dstate,
        layer_norm_epsilon=1e-5, residual_in_fp32=True,
    )  # fmt: skip
    model = MambaForCausalLM(config).eval().requires_grad_(False)
    weights = {name.replace("backbone.embedding.", "backbone.embeddings."): w for name, w in ours().state_dict().items()}
    model.load_state_dict(weights)
    return model


@functools.cache
def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=SHAPE.vocab, hidden_size=SHAPE.d_model, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=4 * SHAPE.d_model, max_position_embeddings=2048,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return GPTNeoXForCausalLM(config).eval().requires_grad_(False)


@functools.cache
def neox_routed():
    """The same with its linear layers on the faster library, as ours are: what is left is the difference of the models."""
    return route_linears(copy.deepcopy(neox()))


def prefill_ours(ids: torch.Tensor) -> torch.Tensor:
    return ours().prefill(ids)[0]


@torch.no_grad()
def prefill_hugging_face(ids: torch.Tensor) -> torch.Tensor:
    model = hugging_face()
    return model.lm_head(model.backbone(ids, use_cache=True).last_hidden_state[:, -1])


@torch.no_grad()
def prefill_neox(ids: torch.Tensor, routed: bool = False) -> torch.Tensor:
    model = neox_routed() if routed else neox()
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


def gemms_alone(tokens: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The matrix products of a prefill with our weights on ready inputs, by the same route, and nothing between them."""
    layers = [
        [getattr(layer.mixer, name).weight for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
        for layer in ours().backbone.layers
    ]
    inputs = [torch.randn(tokens, width) for width, _ in matrices()]
    last, head = torch.randn(1, SHAPE.d_model), ours().lm_head.weight

    @torch.no_grad()
    def call(ids: torch.Tensor) -> torch.Tensor:
        for weights in layers:
            for x, weight in zip(inputs, weights):
                linear(x, weight)
        return linear(last, head)

    return call


def decode_ours() -> Callable[[torch.Tensor], torch.Tensor]:
    state = ours().prefill(torch.zeros(1, 16, dtype=torch.long))[1]
    return lambda token: ours().decode(token[0], state)


def decode_hugging_face() -> Callable[[torch.Tensor], torch.Tensor]:
    model = hugging_face()
    with torch.no_grad():
        cache = model.backbone(torch.zeros(1, 16, dtype=torch.long), use_cache=True).cache_params

    @torch.no_grad()
    def call(token: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model.backbone(token, cache_params=cache, use_cache=True).last_hidden_state[:, -1])

    return call


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for shape, tokens in LENGTHS.items():

        def prompt(index: int, tokens=tokens) -> tuple:
            return (torch.randint(SHAPE.vocab, (1, tokens), generator=torch.Generator().manual_seed(index)),)

        yield Case(
            "prefill", "fp32", f"130m-{shape}", {"batch": 1, "tokens": tokens}, cost(tokens), "matmul", prompt,
            [
                Provider("cobra_kernels", prefill_ours),
                Provider("gemms alone", gemms_alone(tokens), comparable=False),
                Provider("transformers mamba", prefill_hugging_face, slow_start=True),
                Provider("transformers gpt-neox", prefill_neox, comparable=False),
                Provider("gpt-neox, oneDNN", functools.partial(prefill_neox, routed=True), comparable=False),
                *gguf_peer.providers(gguf_peer.prefill, ours, SHAPE, MOST_TOKENS),
            ],
            cache="warm", quick=shape == "prompt-512",
        )  # fmt: skip

    def token(index: int) -> tuple:
        return (torch.randint(SHAPE.vocab, (1, 1), generator=torch.Generator().manual_seed(index)),)

    yield Case(
        "decode", "fp32", "130m", {"batch": 1}, cost(1), "read", token,
        [
            Provider("cobra_kernels", decode_ours()),
            Provider("transformers mamba", decode_hugging_face(), slow_start=True),
            *gguf_peer.providers(gguf_peer.decode, ours, SHAPE, MOST_TOKENS),
        ],
        cache="warm", quick=True,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("lm", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
