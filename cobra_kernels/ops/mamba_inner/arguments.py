"""What the fused block and its reference are given, in the order of the torch op's schema."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Arguments(NamedTuple):
    xz: Tensor  # (batch, 2 dim, seqlen)
    conv1d_weight: Tensor  # (dim, 1, width)
    conv1d_bias: Tensor | None  # (dim,)
    x_proj_weight: Tensor  # (dt_rank [+ dstate] [+ dstate], dim)
    delta_proj_weight: Tensor  # (dim, dt_rank)
    out_proj_weight: Tensor  # (d_model, dim)
    out_proj_bias: Tensor | None  # (d_model,)
    A: Tensor  # (dim, dstate)
    B: Tensor | None  # None: columns of x_proj's output
    C: Tensor | None
    D: Tensor | None  # (dim,)
    delta_bias: Tensor | None  # (dim,)
    B_proj_bias: Tensor | None  # (dstate,)
    C_proj_bias: Tensor | None  # (dstate,)
    b_rms_weight: Tensor | None  # (dstate,)
    c_rms_weight: Tensor | None  # (dstate,)
    dt_rms_weight: Tensor | None  # (dim,)
    initial_conv_state: Tensor | None  # (batch | num_seqs, dim, width - 1)
    initial_ssm_state: Tensor | None  # (batch | num_seqs, dim, dstate)
    cu_seqlens: Tensor | None  # (num_seqs + 1,)
    delta_softplus: bool
    eps: float
    return_states: bool
    checkpoint_lvl: int
    gemm_dtype: torch.dtype | None  # autocast's, where it is on
    backend: str


DIFFERENTIABLE = Arguments._fields[:19]


def inside(a: Arguments) -> Tensor:
    """(seqlen,) bool: the positions before the last boundary. On the device: reading it here would stop the host."""
    return torch.arange(a.xz.shape[2], device=a.xz.device) < a.cu_seqlens[-1]
