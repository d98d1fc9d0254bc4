"""selective_state_update in plain torch: the definition that the kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of the recurrence; writes `state`, returns a new tensor like x. Shapes as in op.py."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch = x.shape[0]
    heads = x.shape[1]  # of the single-head form: its channels, each a head with one (absent) channel
    if state_batch_indices is None:
        rows = live = torch.arange(batch, device=x.device)
    else:
        live = torch.nonzero(state_batch_indices >= 0).flatten()  # batch rows that are not padding
        rows = state_batch_indices[live].long()  # their rows of the pool

    def groups_to_heads(b: Tensor) -> Tensor:
        """(batch, dstate) or (batch, groups, dstate) -> (live, heads, [1,] dstate)."""
        b = (b if b.is_complex() else b.to(compute))[live]
        b = b[:, None] if b.dim() == 2 else b
        b = b.repeat_interleave(heads // b.shape[1], dim=1)
        return b if x.dim() == 2 else b[:, :, None]

    u = x[live].to(compute)  # (live, dim) or (live, heads, dim)
    delta = dt[live].to(compute)
    if dt_bias is not None:
        delta = delta + dt_bias.to(compute)
    if dt_softplus:
        delta = torch.where(delta > 20, delta, torch.log1p(torch.exp(delta)))
    A = A if A.is_complex() else A.to(compute)

    h = state[rows] if state.is_complex() else state[rows].to(compute)  # (live, .., dstate)
    h = torch.exp(delta[..., None] * A) * h + (delta * u)[..., None] * groups_to_heads(B)
    y = (h * groups_to_heads(C)).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D.to(compute) * u
    if z is not None:
        y = y * F.silu(z[live].to(compute))

    state[rows] = h.to(state.dtype)
    out = torch.zeros_like(x)
    out[live] = y.to(x.dtype)
    return out
