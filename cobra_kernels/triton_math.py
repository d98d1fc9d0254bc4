"""fp32 arithmetic that several Triton kernels need."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log1p(t), t = e^-|x|, to a few ulp on both sides of 0; equal to x above 20; NaN stays.

    log(1 + t) would lose a small t, and e^-|x| by one exp2 the low bits of |x| log2(e): so whole powers of 2 go aside first.
    """
    a = tl.minimum(tl.abs(x), 150.0)
    k = tl.floor(a * 1.4426950408889634 + 0.5)
    r = (a - k * 0.693359375) + k * 2.1219444e-4  # a - k ln2, in two exact steps
    t = tl.exp2(-k) * tl.exp2(r * -1.4426950408889634)
    p = t * 5.23269409e-3 - 2.95052379e-2  # minimax of log1p(t) / t on [0, 1]
    p = p * t + 7.82259479e-2
    p = p * t - 1.36632457e-1
    p = p * t + 1.91060066e-1
    p = p * t - 2.48429820e-1
    p = p * t + 3.33190978e-1
    p = p * t - 4.99994934e-1
    p = p * t + 1.0
    return p * t + tl.where(x < 0.0, 0.0, x)
