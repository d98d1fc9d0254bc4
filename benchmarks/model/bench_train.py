"""One training step of the Mamba language model, 130M shape, fp32, batch 2 x 512 tokens: loss of the next token, forward and backward.
`python -m benchmarks.model.bench_train --threads 2`

130m    the whole model. Yardstick: its matrix products alone, forward, for inputs and for weights, by the faster library.
sixth   4 of the 24 layers and a sixth of the vocabulary: every part of the step in its share, in a sixth of the time, because the peers
        take many seconds for the whole. The same weights in transformers' Mamba (the slow path, as it runs without CUDA kernels)
        and in mambapy (its parallel scan; its layers, with the embedding, norm and head of ours)."""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness.bench import Case, Cost, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import LM, LMShape
from cobra_kernels.linear import linear

SHAPES = {"130m": LM["130m"], "sixth": replace(LM["130m"], layers=4, vocab=LM["130m"].vocab // 6)}
BATCH, TOKENS = 2, 512
COMPARED = ("layers.0.mixer.A_log", "layers.0.mixer.in_proj.weight", "layers.0.mixer.conv1d.weight")  # gradients that must agree


def matrices(shape: LMShape) -> list[tuple[int, int]]:
    """(in, out) of every product of a forward: four a layer, and the head."""
    d, e, r, n = shape.d_inner, shape.d_model, shape.dt_rank, shape.dstate
    return shape.layers * [(e, 2 * d), (d, r + 2 * n), (r, d), (d, e)] + [(e, shape.vocab)]


def cost(shape: LMShape) -> Cost:
    """FLOPs of the products: one forward, two backward. Exponentials of the scan in both directions, softplus and both SiLUs. Every
    weight read twice, its gradient written."""
    weights = sum(i * o for i, o in matrices(shape))
    channels = shape.layers * BATCH * TOKENS * shape.d_inner
    return Cost(bytes=4 * 3 * weights, flops=3 * 2 * BATCH * TOKENS * weights, exps=2 * channels * (shape.dstate + 3))


@functools.cache
def ours(shape: LMShape):
    from cobra_kernels.modules import MambaConfig, MambaLMHeadModel

    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=shape.d_model, n_layer=shape.layers, vocab_size=shape.vocab, pad_vocab_size_multiple=1))


@functools.cache
def hugging_face(shape: LMShape):
    """transformers' Mamba with our weights."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=shape.vocab, hidden_size=shape.d_model, num_hidden_layers=shape.layers, state_size=shape.dstate,
        layer_norm_epsilon=1e-5, residual_in_fp32=True, use_cache=False,
    )  # fmt: skip
    model = MambaForCausalLM(config).train()
    model.load_state_dict({name.replace("backbone.embedding.", "backbone.embeddings."): w for name, w in ours(shape).state_dict().items()})
    return model


class MambaPy(nn.Module):
    """mambapy's layers between an embedding and a head; its own language model needs a package more."""

    def __init__(self, shape: LMShape):
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.d_model)
        self.backbone = Mamba(MambaConfig(d_model=shape.d_model, n_layers=shape.layers, d_state=shape.dstate))
        self.norm_f = RMSNorm(shape.d_model, 1e-5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm_f(self.backbone(self.embedding(ids))), self.embedding.weight)


@functools.cache
def mambapy(shape: LMShape):
    """mambapy with our weights; the head is the embedding, as ours."""
    model = MambaPy(shape)
    weights = ours(shape).backbone.state_dict()
    own = {name: name if name.startswith(("embedding", "norm_f")) else f"backbone.{name}" for name in weights}
    model.load_state_dict({own[name]: w for name, w in weights.items()})
    return model


def step(make_model: Callable[[LMShape], nn.Module], shape: LMShape) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """One step on `ids` (batch, tokens + 1): the loss, and the gradients that are compared."""

    def call(ids: torch.Tensor) -> list[torch.Tensor]:
        model = make_model(shape)
        model.zero_grad(set_to_none=True)
        out = model(ids[:, :-1])
        logits = out if isinstance(out, torch.Tensor) else out.logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return [loss.detach(), *(next(g for name, g in grads.items() if name.endswith(want)) for want in COMPARED)]

    return call


def gemms_alone(shape: LMShape) -> Callable[[torch.Tensor], None]:
    """The matrix products of a step on ready operands, forward, for the input and for the weight, and nothing between them."""
    operands = {}
    for i, o in matrices(shape):
        operands.setdefault((i, o), (torch.randn(BATCH * TOKENS, i), torch.randn(o, i), torch.randn(BATCH * TOKENS, o)))

    @torch.no_grad()
    def call(ids: torch.Tensor) -> None:
        for size in matrices(shape):
            x, weight, dy = operands[size]
            linear(x, weight)
            linear(dy, weight.t())
            linear(dy.t(), x.t())

    return call


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for name, shape in SHAPES.items():

        def tokens(index: int, shape=shape) -> tuple:
            return (torch.randint(shape.vocab, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(index)),)

        providers = [
            Provider("cobra_kernels", step(ours, shape)),
            Provider("gemms alone", gemms_alone(shape), comparable=False),
        ]
        if name == "sixth":
            providers.append(Provider("transformers mamba", step(hugging_face, shape), slow_start=True))
            if importlib.util.find_spec("mambapy"):
                providers.append(Provider("mambapy", step(mambapy, shape), slow_start=True))
            else:
                print("left out: mambapy is not installed")
        dims = {"batch": BATCH, "tokens": TOKENS, "layers": shape.layers, "vocab": shape.vocab}
        yield Case(
            "step", "fp32", name, dims, cost(shape), "matmul", tokens, providers, cache="warm", quick=name == "sixth"
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("train", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
