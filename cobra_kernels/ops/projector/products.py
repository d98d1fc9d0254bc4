"""The library's matrix products on a GPU, for the backward: operands of 16 bits where every tensor of the product has that dtype,
else fp32; sums in fp32. Segments are multiplied one by one, never concatenated."""

from __future__ import annotations

import torch

SIXTEEN = (torch.bfloat16, torch.float16)


def product_dtype(features, weights) -> torch.dtype:
    dtype = features[0].dtype
    return dtype if dtype in SIXTEEN and all(w.dtype == dtype for w in weights) else torch.float32


def as_dtype(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def inputs(features, dtype: torch.dtype) -> list[torch.Tensor]:
    return [as_dtype(t, dtype) for t in features]


def times(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a (m, k) @ b (k, n) in dtype: that of a, or fp32. b may have another dtype than a where a is fp32."""
    b = as_dtype(b, a.dtype)
    if a.dtype == dtype or a.dtype == torch.float32 or not a.is_cuda or not a.numel() or not b.numel():
        if a.dtype != dtype and a.dtype != torch.float32:
            a, b = a.float(), b.float()  # torch has products of 16-bit matrices with an fp32 result on GPUs only
        return as_dtype(torch.mm(a, b), dtype)
    return torch.ops.aten.mm.dtype(a, b, dtype)


def sums(x: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """[x_1, .., x_K] @ weight.T, fp32 (rows, out)."""
    rows, column, total = x[0].shape[:-1].numel(), 0, None
    for t in x:
        t = t.reshape(rows, t.shape[-1])
        part = times(t, weight[:, column : column + t.shape[1]].t(), torch.float32)
        total = part if total is None else total.add_(part)
        column += t.shape[1]
    return total
