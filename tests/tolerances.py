"""Every error limit of the test suite, in one place, and how errors are measured: against fp64, relative in L2."""

from __future__ import annotations

import torch

# L2-relative error of outputs on realistic inputs: fp32 after accumulation, 16-bit after one rounding of the output.
OUTPUT = {torch.float32: 1e-6, torch.bfloat16: 2.9e-3, torch.float16: 3.7e-4, torch.float64: 1e-13}
# Gradients: fp32 1e-5, 16-bit one rounding of the gradient.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2.9e-3, torch.float16: 3.7e-4, torch.float64: 1e-12}
# Paths through a library GEMM (projector, LM), fp32.
GEMM = 1e-5
# Chunked against one-shot, step^L against scan, fp32.
CHUNKED = 1e-5
# Logits of one model computed in two ways, fp32.
LOGITS = 1e-4


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected| in L2 and fp64; inf when got has a NaN that expected has not."""
    got, expected = got.detach().double(), expected.detach().double()
    if got.numel() == 0:
        return 0.0
    norm = expected.norm().item()
    error = (got - expected).norm().item()
    if error != error:
        return float("inf")
    return error / norm if norm > 0 else error


def assert_close(got: torch.Tensor, expected: torch.Tensor, limit: float, what: str = "output") -> None:
    """Shapes equal and relative_error within `limit`; the message gives the worst element."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(got, expected)
    if error <= limit:
        return
    difference = (got.detach().double() - expected.detach().double()).abs().nan_to_num(float("inf")).flatten()
    worst = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
    raise AssertionError(
        f"{what}: L2-relative error {error:.3e} > {limit:.1e}; worst at {index}: got {got.flatten()[worst].item():.9g}, "
        f"expected {expected.flatten()[worst].item():.9g}"
    )
