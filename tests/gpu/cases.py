"""The calls that the tests of this folder make: one maker per op, small for the rehearsal, of the users' sizes on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cobra_kernels import selfcheck
from cobra_kernels.selfcheck import Case, map_tensors
from tests.sampler import sample

BF16 = torch.bfloat16
OPS = (
    "rms_norm", "causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update", "mlp_projector", "ldp_projector",
)  # fmt: skip
# Calls with gradients: forward and backward in one.
TRAINED = tuple(f"{op}-gradients" for op in ("rms_norm", "causal_conv1d", "selective_scan", "mlp_projector", "ldp_projector", "mamba_inner"))
CALLS = (*OPS, "mamba_inner", *TRAINED)
GEMM_OPS = ("mlp_projector", "ldp_projector", "mamba_inner")  # a library's products: other bits for another split of a sum
IN_PLACE = {"causal_conv1d_update": ("conv_state",), "selective_state_update": ("state",)}


def make(op: str, batch: int, large: bool, seed: int = 0) -> Case:
    """bf16, as in a Cobra of 3B parameters or tiny; channel-last where the model is. `op` is one of CALLS."""
    op, _, gradients = op.partition("-")
    g = torch.Generator().manual_seed(seed)
    dim, seqlen = (5120, 800) if large else (40, 37)
    extra: dict = {}
    if op == "rms_norm":
        kwargs = selfcheck.rms_norm_inputs(g, batch * seqlen, dim // 2, BF16)
        extra = {"prenorm": True}
    elif op == "causal_conv1d":
        kwargs = selfcheck.causal_conv1d_inputs(g, batch, dim, seqlen, 4, BF16, initial=True)
        kwargs["x"] = kwargs["x"].transpose(1, 2).contiguous().transpose(1, 2)
        extra = {"activation": "silu", "return_final_states": True}
    elif op == "causal_conv1d_update":
        kwargs = selfcheck.causal_conv1d_update_inputs(g, batch, dim, 4, 4, None, BF16)
        extra = {"activation": "silu"}
    elif op == "selective_scan":
        kwargs = selfcheck.selective_scan_inputs(g, batch, dim, seqlen, dtype=BF16, initial=True, channel_last=True)
        for name in ("B", "C"):  # (batch, dstate, seqlen), columns of x_proj's output
            kwargs[name] = kwargs[name][:, 0].transpose(1, 2).contiguous().transpose(1, 2)
        extra = {"return_last_state": True}
    elif op == "selective_state_update":
        kwargs = selfcheck.selective_state_update_inputs(g, batch, dim, 16, BF16)
    elif op == "mlp_projector":
        features, layers = ((1024, 1152), (8704, 2560, 2560)) if large else ((24, 40), (64, 32, 32))
        kwargs = selfcheck.mlp_projector_inputs(g, (batch, 729 if large else 9), features, layers, BF16)
    elif op == "mamba_inner":
        dt_rank, d_model = (160, 2560) if large else (3, 24)
        kwargs = selfcheck.mamba_inner_inputs(g, batch, dim, seqlen, 16, dt_rank, d_model, dtype=BF16, initial=True)
        extra = {"return_states": True}
    else:
        grid, features, layers = ((27, 27), (1024, 1152), (8704, 2560)) if large else ((5, 5), (24, 40), (64, 32))
        kwargs = selfcheck.ldp_projector_inputs(g, batch, grid, (14, 14) if large else (3, 3), features, layers, BF16)
    return Case(op, {**kwargs, **extra}, IN_PLACE.get(op, ()), bool(gradients))


def placed(case: Case, put) -> Case:
    """The case with every tensor through `put`."""
    return case._replace(kwargs={k: map_tensors(v, put) for k, v in case.kwargs.items()})


def refill(case: Case, other: Case) -> None:
    """Overwrites the tensors of `case` with the values of `other`, in place: what a caller of a captured graph does."""
    for name, value in case.kwargs.items():
        sources: list[torch.Tensor] = []
        map_tensors(other.kwargs[name], lambda t: sources.append(t) or t)
        targets = iter(sources)
        map_tensors(value, lambda t: t.copy_(next(targets)))


def with_elements(op: str, elements: int, narrow: int, device: str) -> Case:
    """A call whose largest tensor has more than `elements` elements; `narrow` is the size of its other dim."""
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape, dtype=BF16):
        return torch.empty(shape, device=device, dtype=dtype).normal_(generator=g)

    rows = elements // narrow + 3
    if op == "rms_norm":
        return Case(op, {"x": randn(rows, narrow + 1), "weight": randn(narrow + 1)})
    if op in ("causal_conv1d", "selective_scan"):  # channel-last, (1, narrow + 8, rows)
        x = randn(1, rows, narrow + 8).transpose(1, 2)
        if op == "causal_conv1d":
            return Case(op, {"x": x, "weight": randn(narrow + 8, 4, dtype=torch.float32), "activation": "silu"})
        kwargs = {"u": x, "delta": randn(1, rows, narrow + 8).transpose(1, 2), "A": -torch.rand(narrow + 8, 16, device=device) - 0.05}
        kwargs |= {name: randn(1, rows, 16).transpose(1, 2) for name in ("B", "C")}
        return Case(op, {**kwargs, "delta_softplus": True, "return_last_state": True})
    if op == "causal_conv1d_update":
        batch = elements // (4 * narrow) + 3
        kwargs = {"x": randn(batch, narrow), "conv_state": randn(batch, narrow, 4), "weight": randn(narrow, 4, dtype=torch.float32)}
        return Case(op, kwargs, ("conv_state",))
    if op == "selective_state_update":
        batch = elements // (16 * narrow) + 3
        kwargs = {"state": randn(batch, narrow, 16), "x": randn(batch, narrow), "dt": randn(batch, narrow), "B": randn(batch, 16)}
        kwargs |= {"C": randn(batch, 16), "A": -torch.rand(narrow, 16, device=device) - 0.05, "dt_softplus": True}
        return Case(op, kwargs, ("state",))
    weights = (randn(32, narrow).mul_(narrow**-0.5), randn(16, 32).mul_(32**-0.5))
    biases = (randn(32), randn(16))
    if op == "mlp_projector":
        return Case(op, {"features": randn(rows, narrow), "weights": weights, "biases": biases})
    batch = elements // (9 * narrow) + 3
    peg = {"peg_weight": randn(16, 1, 3, 3), "peg_bias": randn(16), "grid": (3, 3), "out_grid": (2, 2)}
    return Case(op, {"features": randn(batch, 9, narrow), "weights": weights, "biases": biases, **peg})


def tail_of(case: Case) -> Case:
    """The last rows (or, for sequences, channels) of a call, as a call of its own."""
    rows = {"x", "state", "conv_state", "dt", "B", "C", "features", "delta", "u"}
    if case.op in ("causal_conv1d", "selective_scan"):  # channels are dim 1, or dim 0 of what has no batch
        cut = {"x": 1, "u": 1, "delta": 1, "weight": 0, "A": 0}
        kwargs = {k: v.narrow(cut[k], v.shape[cut[k]] - 8, 8).clone() if k in cut else v for k, v in case.kwargs.items()}
    else:
        kwargs = {k: v[-5:].clone() if k in rows else v for k, v in case.kwargs.items()}
    return case._replace(kwargs=kwargs)


def tail_of_outputs(case: Case, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    if case.op in ("causal_conv1d", "selective_scan"):
        return [t.narrow(1, t.shape[1] - 8, 8) for t in outputs]
    return [t[-5:] for t in outputs]


def sampled(count: int, shard: int = 0, shards: int = 1) -> Iterator[tuple[int, Case]]:
    """(seed, case) of the first `count` seeded boundary cases that GPU backends serve (no fp64), every shards-th of them."""
    seed = found = 0
    while found < count:
        case = sample(seed)
        tensors: list[torch.Tensor] = []
        map_tensors(list(case.kwargs.values()), lambda t: tensors.append(t) or t)
        if all(t.dtype != torch.float64 for t in tensors):
            if found % shards == shard:
                yield seed, case
            found += 1
        seed += 1
