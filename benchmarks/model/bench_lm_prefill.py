"""Prefill of the 130M Mamba LM, 512 tokens, fp32, against the sum of its own GEMMs, transformers' Mamba and a GPT-NeoX of its size.

    python -m benchmarks.model.bench_lm_prefill --threads 2

The GEMMs alone are the roof: the same calls of the same library on the same weights, in order, nothing between them. Everything
else that Mamba does (norms, convolution, scan, gates, states) has to fit into what the goal leaves above it. All providers run
interleaved in one process; weights are random, since no figure here depends on them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import records as store
from benchmarks.harness.bench import Bench, Cost, disagreement, parser, show
from benchmarks.harness.environment import stamp, steady_allocator
from benchmarks.harness.records import Record
from benchmarks.harness.timing import Provider, Ratio, Timing, compare, measure
from benchmarks.shapes import LM, LMShape
from cobra_kernels import call_counts, reset_call_counts
from cobra_kernels.linear import apply_linear, linear
from cobra_kernels.modules import MambaConfig, MambaLMHeadModel

OP = "lm_prefill"
SHAPE, SEQLEN = "130m", 512
AGREEMENT = 1e-4  # L2-relative, last logits of ours and of transformers' Mamba


@dataclass(frozen=True)
class Goal:
    """time(provider) / time(peer) that is promised: at most `ratio`."""

    peer: str
    ratio: float
    words: str


GOALS = (
    Goal("gemms", 1.25, "at most 1.25x its GEMMs alone"),
    Goal("transformers-mamba", 1 / 5, "at least 5x transformers' Mamba"),
    Goal("transformers-gpt-neox", 1.0, "faster than a GPT-NeoX of its size"),
)


def gemm_flops(shape: LMShape, seqlen: int) -> int:
    d, inner, low = shape.d_model, shape.d_inner, shape.dt_rank
    layer = 2 * inner * d + (low + 2 * shape.dstate) * inner + low * inner + d * inner
    return 2 * (seqlen * shape.layers * layer + shape.vocab * d)


def cost(shape: LMShape, seqlen: int) -> Cost:
    elements = seqlen * shape.layers * shape.d_inner
    exps = elements * (shape.dstate + 4)  # decay; softplus, and the SiLU of convolution and gate
    flops = gemm_flops(shape, seqlen) + elements * (6 * shape.dstate + 2 * shape.width + 20)
    return Cost(bytes=0, flops=flops, exps=exps)


def make_mamba(shape: LMShape) -> MambaLMHeadModel:
    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(shape.d_model, shape.layers, shape.vocab)).eval().requires_grad_(False)


def gemms_alone(model: MambaLMHeadModel, seqlen: int):
    """The model's projections, each on an activation of its own shape and strides."""
    mixers = [layer.mixer for layer in model.backbone.layers]
    m = mixers[0]
    hidden, inner = torch.randn(1, seqlen, m.d_model), torch.randn(1, seqlen, m.d_inner)

    def call() -> torch.Tensor:
        for mixer in mixers:
            apply_linear(mixer.in_proj, hidden)
            low = apply_linear(mixer.x_proj, inner)[..., : m.dt_rank]
            linear(low, mixer.dt_proj.weight)
            apply_linear(mixer.out_proj, inner)
        return apply_linear(model.lm_head, hidden[:, -1])

    return call


def transformers_mamba(model: MambaLMHeadModel, ids: torch.Tensor):
    from transformers import MambaConfig as Config
    from transformers import MambaForCausalLM

    c = model.config
    theirs = MambaForCausalLM(
        Config(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            num_hidden_layers=c.n_layer,
            layer_norm_epsilon=c.norm_epsilon,
            residual_in_fp32=True,
            use_mambapy=False,
        )
    )
    theirs.load_state_dict({k.replace("embedding.", "embeddings."): v for k, v in model.state_dict().items()}, strict=True)
    theirs.eval().requires_grad_(False)
    return lambda: theirs(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


def transformers_gpt_neox(shape: LMShape, ids: torch.Tensor):
    """GPT-NeoX with Mamba's width, vocabulary and, at half the blocks of twice the size, its parameters; SDPA, KV cache filled."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=shape.vocab, hidden_size=shape.d_model, num_hidden_layers=shape.layers // 2, num_attention_heads=shape.d_model // 64,
        intermediate_size=4 * shape.d_model, max_position_embeddings=2048, attn_implementation="sdpa", tie_word_embeddings=True,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    return lambda: model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


def verdict(goal: Goal, timings: dict[str, Timing]) -> tuple[str, Ratio]:
    ratio = compare(timings["cobra_kernels"], timings[goal.peer])
    met = "met" if ratio.median <= goal.ratio else "MISSED"
    words = f"{ratio.median:.3f}x {goal.peer}" if ratio.median > 0.5 else f"{1 / ratio.median:.1f} times faster than {goal.peer}"
    return f"{words} ({goal.words}): {met}", ratio


def main(argv: Sequence[str] | None = None) -> int:
    p: argparse.ArgumentParser = parser(OP)
    p.prog, p.description = "python -m benchmarks.model.bench_lm_prefill", __doc__
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.set_defaults(seconds=12.0)
    args = p.parse_args(argv)
    if args.device != "cpu" or set(args.dtype or ["fp32"]) != {"fp32"}:
        p.error("only --device cpu and --dtype fp32 have goals here")
    steady_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = LM[SHAPE]
    model = make_mamba(shape)
    ids = torch.randint(0, shape.vocab, (1, SEQLEN), generator=torch.Generator().manual_seed(0))
    providers = [
        Provider("cobra_kernels", lambda: model.prefill(ids)[0]),
        Provider("gemms", gemms_alone(model, SEQLEN)),
        Provider("transformers-gpt-neox", transformers_gpt_neox(shape, ids)),
        Provider("transformers-mamba", transformers_mamba(model, ids), slow_start=True),
    ]
    bench = Bench()
    if args.quick:  # its slowness is known; one call takes seconds
        bench.left_out += [f"{provider.name}: left out by --quick" for provider in providers if provider.slow_start]
        providers = [provider for provider in providers if not provider.slow_start]
    if args.backend:
        providers = [provider for provider in providers if provider.name in ("cobra_kernels", *args.backend)]
    if args.list:
        print(f"fwd fp32 {SHAPE}: {', '.join(provider.name for provider in providers)}")
        return 0

    environment = stamp(args.device)
    path = store.path_for(OP, args.device)
    last = store.latest(store.load(path))
    with torch.no_grad():
        reset_call_counts()
        logits = model.prefill(ids)[0]
        served = {op: backend for op, backend in call_counts()}
        by_name = {provider.name: provider for provider in providers}
        if "transformers-mamba" in by_name:
            error = disagreement(logits, by_name["transformers-mamba"].call())
            if error > AGREEMENT:
                bench.wrong.append(f"logits differ from transformers' Mamba by {error:.1e}, expected at most {AGREEMENT:.0e}")
        timings = measure(providers, seconds=args.seconds, rounds=5 if args.quick else 9, seed=args.seed)
    if set(served.values()) != {"cpu"}:
        bench.wrong.append(f"served by {served}, expected the cpu kernels for every op")

    full, gemms = cost(shape, SEQLEN), timings.get("gemms")
    flops = {"cobra_kernels": full.flops, "transformers-mamba": full.flops, "gemms": gemm_flops(shape, SEQLEN)}
    for name, timing in timings.items():
        fraction = 1 / compare(timing, gemms).median if gemms and name != "transformers-gpt-neox" else None
        bench.records.append(
            Record.of(
                timing, op=OP, mode="fwd", dtype="fp32", shape=SHAPE, dims={"batch": 1, "seqlen": SEQLEN, "layers": shape.layers},
                bytes=0, flops=flops.get(name, 0), exps=full.exps if "mamba" in name or name == "cobra_kernels" else 0,
                roof="gemms" if fraction else "", roof_seconds=gemms.median if fraction else None, fraction=fraction,
                environment=environment,
            )
        )  # fmt: skip
    show(OP, bench, last, environment)
    for goal in GOALS:
        if goal.peer in timings:
            print(verdict(goal, timings)[0])
    for target in ([args.json] if args.json else []) + ([path] if args.record else []):
        store.append(bench.records, Path(target))
        print(f"recorded: {target}")
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
