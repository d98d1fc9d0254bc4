"""One training step of the Mamba language model: loss of the next token, forward and backward.
`python -m benchmarks.model.bench_train --threads 2`, on a GPU `--device cuda`

On a CPU: 130M shape, fp32, batch 2 x 512 tokens.

130m    the whole model. Yardstick: its matrix products alone, forward, for inputs and for weights, by the faster library.
24th    1 of the 24 layers and a 24th of the vocabulary: every part of the step in its share, because the peers take minutes for the
        whole. The same weights in transformers' Mamba (the slow path, as it runs without CUDA kernels: its loop reads step t as a
        slice, whose gradient is a tensor of all steps, so a step of training costs the square of the length)
        and in mambapy (its parallel scan; its layers, with the embedding, norm and head of ours).

On a GPU: 370M shape, 4 x 8192 tokens, fp32 weights under bf16 autocast.
370m    next to a Llama-shaped Transformer of its parameter count (within 1%) that attends through SDPA without a mask, so by FlashAttention;
        each as it is and under torch.compile. Two models: their losses are not compared.
"""

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

SHAPES = {"130m": LM["130m"], "24th": replace(LM["130m"], layers=1, vocab=LM["130m"].vocab // 24)}
BATCH, TOKENS = 2, 512
GPU_SHAPE, GPU_BATCH, GPU_TOKENS = "370m", 4, 8192
COMPARED = ("layers.0.mixer.A_log", "layers.0.mixer.in_proj.weight", "layers.0.mixer.conv1d.weight")  # gradients that must agree


def matrices(shape: LMShape) -> list[tuple[int, int]]:
    """(in, out) of every product of a forward: four a layer, and the head."""
    d, e, r, n = shape.d_inner, shape.d_model, shape.dt_rank, shape.dstate
    return shape.layers * [(e, 2 * d), (d, r + 2 * n), (r, d), (d, e)] + [(e, shape.vocab)]


def cost(shape: LMShape, rows: int = BATCH * TOKENS) -> Cost:
    """`rows` tokens. FLOPs of the products: one forward, two backward. Exponentials of the scan in both directions, softplus and both SiLUs. Every
    weight read twice, its gradient written."""
    weights = sum(i * o for i, o in matrices(shape))
    channels = shape.layers * rows * shape.d_inner
    return Cost(bytes=4 * 3 * weights, flops=3 * 2 * rows * weights, exps=2 * channels * (shape.dstate + 3))


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


@functools.cache
def on_gpu(shape: LMShape, device: str, compiled: bool) -> nn.Module:
    """Our model on the GPU, fp32 weights."""
    from cobra_kernels.modules import MambaConfig, MambaLMHeadModel

    config = MambaConfig(d_model=shape.d_model, n_layer=shape.layers, vocab_size=shape.vocab, pad_vocab_size_multiple=1)
    model = MambaLMHeadModel(config, device=device)
    return torch.compile(model) if compiled else model


def transformer_config(shape: LMShape):
    """A Llama of the Mamba's width and half its layers, whose MLP is as wide as makes the parameter counts equal."""
    from transformers import LlamaConfig

    layers, d = shape.layers // 2, shape.d_model
    mamba = shape.layers * (3 * d * shape.d_inner + shape.d_inner * (2 * shape.dt_rank + 3 * shape.dstate + shape.width + 3) + d)
    mlp = (mamba - layers * (4 * d * d + 2 * d)) / layers
    return LlamaConfig(
        vocab_size=shape.vocab, hidden_size=d, intermediate_size=round(mlp / (3 * d) / 64) * 64, num_hidden_layers=layers,
        num_attention_heads=d // 64, max_position_embeddings=GPU_TOKENS, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip


@functools.cache
def transformer(shape: LMShape, device: str, compiled: bool) -> nn.Module:
    from transformers import LlamaForCausalLM

    with torch.device(device):
        model = LlamaForCausalLM(transformer_config(shape))
    return torch.compile(model) if compiled else model


def gpu_step(make_model: Callable[..., nn.Module], shape: LMShape, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(ids: torch.Tensor) -> torch.Tensor:
        model = make_model(shape, str(ids.device), compiled)
        model.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = model(ids[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    return call


def gpu_case(device: str) -> Case:
    shape, rows = LM[GPU_SHAPE], GPU_BATCH * GPU_TOKENS
    providers = [
        Provider(name + (", compiled" if compiled else ""), gpu_step(make, shape, compiled), comparable=False, graph=False, slow_start=compiled)
        for name, make in (("cobra_kernels", on_gpu), ("transformer, SDPA", transformer))
        for compiled in (False, True)
    ]

    def tokens(index: int) -> tuple:
        return (torch.randint(shape.vocab, (GPU_BATCH, GPU_TOKENS + 1), generator=torch.Generator().manual_seed(index)).to(device),)

    dims = {"batch": GPU_BATCH, "tokens": GPU_TOKENS, "layers": shape.layers, "vocab": shape.vocab}
    return Case("step", "bf16", GPU_SHAPE, dims, cost(shape, rows), "matmul", tokens, providers, cache="warm", quick=True)


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
    if args.device != "cpu":
        yield gpu_case(args.device)
        return
    for name, shape in SHAPES.items():

        def tokens(index: int, shape=shape) -> tuple:
            return (torch.randint(shape.vocab, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(index)),)

        providers = [
            Provider("cobra_kernels", step(ours, shape)),
            Provider("gemms alone", gemms_alone(shape), comparable=False),
        ]
        if name == "24th":
            providers.append(Provider("transformers mamba", step(hugging_face, shape), slow_start=True))
            if importlib.util.find_spec("mambapy"):
                providers.append(Provider("mambapy", step(mambapy, shape), slow_start=True))
            else:
                print("left out: mambapy is not installed")
        dims = {"batch": BATCH, "tokens": TOKENS, "layers": shape.layers, "vocab": shape.vocab}
        yield Case(
            "step", "fp32", name, dims, cost(shape), "matmul", tokens, providers, cache="warm", quick=name == "24th"
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("train", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
