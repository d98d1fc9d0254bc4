"""Time to first token of a Cobra on a GPU: pixels of one image and a question of 71 tokens, to the logits of the next token.
`python -m benchmarks.model.bench_ttft --device cuda`

Preprocessing is left out, everything after it is in: both towers, the projector, the prefill of 729 + 71 tokens, the states.
Random weights, bf16, made on the device. The peer is the same model with mamba-ssm's and causal-conv1d's kernels, in the order
of mamba-ssm's own prefill. On a CPU the shape is the tiny preset: a rehearsal."""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness.bench import Case, Cost, run_bench
from benchmarks.harness.timing import Provider

TEXT_TOKENS = 71
GOAL = 12.5e-3  # seconds, cobra-3b on an H200: 1.5 times what its products and exponentials need
PRESETS = {"cuda": "cobra-3b", "cpu": "cobra-tiny"}


@functools.cache
def model(preset: str, device: str):
    import cobra

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cobra.RandomWeightsWarning)
        return cobra.from_preset(preset, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


def make_inputs(preset: str, device: str, index: int) -> tuple:
    vlm = model(preset, device)
    g = torch.Generator(device).manual_seed(index)
    pixels = {
        tower.name: torch.randn(1, 3, tower.image_size, tower.image_size, generator=g, device=device).to(vlm.dtype)
        for tower in vlm.config.vision.towers
    }
    return pixels, torch.randint(vlm.config.lm.vocab_size, (1, TEXT_TOKENS), generator=g, device=device)


@torch.no_grad()
def embeddings(vlm, pixels: dict, ids: torch.Tensor) -> torch.Tensor:
    """(1, image tokens + text tokens, d_model)."""
    return torch.cat([vlm.projector(vlm.vision(pixels)), vlm.llm.backbone.embedding(ids)], dim=1)


@torch.no_grad()
def ours(vlm, pixels: dict, ids: torch.Tensor) -> torch.Tensor:
    return vlm.llm.prefill(embeddings(vlm, pixels, ids))[0]


def upstream_mixer(mixer, hidden: torch.Tensor, conv: Callable, scan: Callable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mamba-ssm's prefill with a state to keep: channel-first from the first product on. Returns out, conv state, ssm state."""
    batch, seqlen, _ = hidden.shape
    xz = (mixer.in_proj.weight @ hidden.flatten(0, 1).t()).unflatten(1, (batch, seqlen)).transpose(0, 1)  # (batch, 2 d_inner, seqlen)
    x, z = xz.chunk(2, dim=1)
    conv_state = F.pad(x, (mixer.d_conv - seqlen, 0)).clone()
    x = conv(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, activation="silu")
    x_dbl = mixer.x_proj(x.transpose(1, 2).flatten(0, 1))
    dt, B, C = x_dbl.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    dt = (mixer.dt_proj.weight @ dt.t()).unflatten(1, (batch, seqlen)).transpose(0, 1)
    B, C = (t.unflatten(0, (batch, seqlen)).transpose(1, 2).contiguous() for t in (B, C))
    A = -torch.exp(mixer.A_log.float())
    y, ssm_state = scan(x, dt, A, B, C, mixer.D.float(), z, mixer.dt_proj.bias.float(), True, True)
    return mixer.out_proj(y.transpose(1, 2)), conv_state, ssm_state


@torch.no_grad()
def upstream(vlm, pixels: dict, ids: torch.Tensor, *, conv: Callable, scan: Callable, norm: Callable) -> torch.Tensor:
    hidden, residual, states = embeddings(vlm, pixels, ids), None, []
    backbone = vlm.llm.backbone
    for block in backbone.layers:
        hidden, residual = norm(hidden, block.norm.weight, None, residual, eps=block.norm.eps, prenorm=True, residual_in_fp32=True)
        hidden, *state = upstream_mixer(block.mixer, hidden, conv, scan)
        states.append(state)
    hidden = norm(hidden[:, -1:], backbone.norm_f.weight, None, residual[:, -1:], eps=backbone.norm_f.eps, residual_in_fp32=True)
    return vlm.llm.lm_head(hidden[:, -1])


def peer(vlm) -> list[Provider]:
    """[Provider] of the same weights on upstream's kernels, or [] when one of them is not there."""
    kernels = {
        "conv": peers.function("causal_conv1d", "causal_conv1d_interface", "causal_conv1d_fn"),
        "scan": peers.function("mamba_ssm", "ops.selective_scan_interface", "selective_scan_fn"),
        "norm": peers.function("mamba_ssm", "ops.triton.layer_norm", "rms_norm_fn"),
    }
    if None in kernels.values():
        return []
    return [Provider("over mamba-ssm", functools.partial(upstream, vlm, **kernels))]


def cost(vlm) -> Cost:
    """FLOPs of the language model's and the projector's products, and the scan's exponentials; weights read once."""
    lm, tokens = vlm.config.lm, vlm.config.num_image_tokens + TEXT_TOKENS
    mixer = vlm.llm.backbone.layers[0].mixer
    weights = lm.n_layer * sum(p.numel() for p in (mixer.in_proj.weight, mixer.x_proj.weight, mixer.dt_proj.weight, mixer.out_proj.weight))
    projector = sum(p.numel() for p in vlm.projector.parameters() if p.dim() == 2)
    every = sum(p.numel() * p.element_size() for p in vlm.parameters())
    flops = 2 * (tokens * weights + vlm.config.num_image_tokens * projector + vlm.llm.lm_head.weight.numel())
    return Cost(bytes=every, flops=flops, exps=lm.n_layer * tokens * mixer.d_inner * (mixer.d_state + 3))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    device = torch.device(args.device).type
    preset = PRESETS[device]
    vlm = model(preset, args.device)
    call = functools.partial(ours, vlm)
    providers = [
        Provider("cobra_kernels", call),
        Provider("cobra_kernels, launched from Python", call, graph=False),
        *(peer(vlm) if device == "cuda" else []),
    ]
    tokens = {"image": vlm.config.num_image_tokens, "text": TEXT_TOKENS}
    yield Case(
        "ttft", "fp32" if device == "cpu" else "bf16", preset, tokens, cost(vlm), "", functools.partial(make_inputs, preset, args.device),
        providers, cache="warm", goal=GOAL if device == "cuda" else None, quick=True,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    return run_bench("ttft", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
