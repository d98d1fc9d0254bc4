"""The CUDA backwards in double, where nothing hides behind rounding: their directional derivatives against finite differences.

The same source against the fp64 formulas: the fp64 cases of room_<op>.py. The forward here is the CPU's, in fp64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

LIMIT = 1e-9  # of the sum of what the two sides add up; the stencil's own error is some 1e-12

Arrays = dict[str, np.ndarray]


def check_derivatives(loss: Callable[[Arrays], float], inputs: Arrays, gradients: Arrays) -> None:
    """<gradient, v> of each input against the fourth-order central difference of the loss along v, for a random v."""
    rng, step = np.random.default_rng(1), 1e-3
    for name, gradient in gradients.items():
        v = rng.standard_normal(gradient.shape)

        def along(steps: float, name=name, v=v) -> float:
            return loss(inputs | {name: inputs[name] + steps * step * v})

        expected = (8 * (along(1) - along(-1)) - (along(2) - along(-2))) / (12 * step)
        got, scale = float((gradient * v).sum()), float(np.abs(gradient * v).sum())
        assert abs(got - expected) <= LIMIT * scale, f"d{name}: {got:.15g} along v, finite difference {expected:.15g}"


def unwritten(inputs: Arrays) -> Arrays:
    """A gradient of NaN for every input."""
    return {name: np.full_like(a, np.nan) for name, a in inputs.items()}


OPTIONS = ((True, None), (False, None), (True, (0, 3, 3, 17)))  # silu, cu_seqlens
CONVOLUTIONS = [(x, width, silu, packed) for x in (False, True) for width in (4, 6, 9) for silu, packed in OPTIONS]


@pytest.mark.parametrize("transposed, width, silu, packed", CONVOLUTIONS)
def test_causal_conv1d(host, transposed, width, silu, packed):
    rng = np.random.default_rng(0)
    batch, dim, seqlen = 1 if packed else 2, 8, 21  # channel-last packs, granules of time, one by one (9 taps)
    states, cu_seqlens = len(packed) - 1 if packed else batch, None if packed is None else np.array(packed)

    def laid_out(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.transpose(0, 2, 1)).transpose(0, 2, 1) if transposed else np.ascontiguousarray(a)

    sizes = {"x": (batch, dim, seqlen), "weight": (dim, width), "bias": (dim,), "initial_states": (states, dim, width - 1)}
    inputs = {name: rng.standard_normal(size) for name, size in sizes.items()}
    inputs["x"] = laid_out(inputs["x"])
    dy, dfinal = laid_out(rng.standard_normal(sizes["x"])), rng.standard_normal(sizes["initial_states"])
    if packed:
        dy[..., packed[-1] :] = 0  # padding has no gradient

    def loss(at: Arrays) -> float:
        y, final = laid_out(np.zeros(sizes["x"])), np.empty(sizes["initial_states"])
        host.causal_conv1d("cpu", laid_out(at["x"]), at["weight"], at["bias"], None, at["initial_states"], silu, cu_seqlens, y, final)
        return float((dy * y).sum() + (dfinal * final).sum())

    gradients = unwritten(inputs)
    host.causal_conv1d_bwd("cuda", dy, dfinal, inputs["x"], inputs["weight"], inputs["bias"], None, inputs["initial_states"], silu, cu_seqlens,
                           *gradients.values(), lambda rows: np.full((rows, width + 1, dim), np.nan))  # fmt: skip
    check_derivatives(loss, inputs, gradients)


@pytest.mark.parametrize("dim", [13, 24, 1040])  # the strided kernel; rows of a warp, of a block
@pytest.mark.parametrize("is_rms_norm", [True, False])
def test_rms_norm(host, dim, is_rms_norm):
    rng = np.random.default_rng(0)
    rows, eps = 5, 1e-6
    sizes = {"x": (rows, dim), "residual": (rows, dim), "weight": dim, "bias": dim}
    inputs = {name: rng.standard_normal(size) for name, size in sizes.items()}
    dy, ds = rng.standard_normal((2, rows, dim))

    def loss(at: Arrays) -> float:
        y, s = np.empty((rows, dim)), np.empty((rows, dim))
        host.rms_norm_fwd("cpu", at["x"], at["weight"], at["bias"], at["residual"], y, s, eps, is_rms_norm)
        return float((dy * y).sum() + (ds * s).sum())

    gradients = unwritten(inputs)
    partial = np.full((2, host.rms_norm_bwd_row_blocks("cuda", rows, dim), dim), np.nan)
    host.rms_norm_bwd("cuda", dy, ds, inputs["x"], inputs["residual"], inputs["weight"], *gradients.values(), partial, eps, is_rms_norm)
    check_derivatives(loss, inputs, gradients)


@pytest.mark.parametrize("channels", [8, 9])  # vectors, and one by one
@pytest.mark.parametrize("grid", [(), (5, 7, 3, 4)])
def test_projector_gelu(host, channels, grid):
    rng = np.random.default_rng(0)
    height, width, *out = grid or (1, 35)
    rows = 2 * height * width
    inputs = {"sums": 2 * rng.standard_normal((rows, channels)), "bias": rng.standard_normal(channels)}
    d = rng.standard_normal((2, out[0] * out[1], channels) if grid else (rows, channels))

    def loss(at: Arrays) -> float:
        y = np.empty(d.shape)
        if grid:
            host.projector_gelu_pool("cpu", at["sums"].reshape(2, -1, channels), at["bias"], *grid, y, y, True)
        else:
            host.projector_bias_gelu("cpu", at["sums"], at["bias"], y, y)
        return float((d * y).sum())

    gradients = unwritten(inputs)
    partial = np.full((host.projector_sum_blocks(rows, 16), channels), np.nan)
    host.projector_gelu_bwd("cuda", d, *inputs.values(), list(grid), *gradients.values(), partial)
    check_derivatives(loss, inputs, gradients)


@pytest.mark.parametrize("channels", [8, 9])
def test_projector_peg(host, channels):
    rng = np.random.default_rng(0)
    batch, height, width = 2, 5, 4
    sizes = {"p": (batch, height * width, channels), "weight": (channels, 1, 3, 3), "bias": (channels,)}
    inputs = {name: rng.standard_normal(size) for name, size in sizes.items()}
    dy = rng.standard_normal(sizes["p"])

    def loss(at: Arrays) -> float:
        y = np.empty(sizes["p"])
        host.projector_peg("cpu", at["p"], at["weight"], at["bias"], height, width, y)
        return float((dy * y).sum())

    gradients = unwritten(inputs)
    partial = np.full((11, host.projector_sum_blocks(batch * height, 1), channels), np.nan)
    host.projector_peg_bwd("cuda", dy, inputs["p"], None, inputs["weight"], height, width, *gradients.values(), None, partial)
    check_derivatives(loss, inputs, gradients)
