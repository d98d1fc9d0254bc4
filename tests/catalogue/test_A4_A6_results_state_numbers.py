"""Failures that users of such kernels reported, kept from coming back: wrong results, state, numbers. docs/catalogue.md maps rows to tests."""

from __future__ import annotations

import pytest
import torch

from cobra_kernels import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update, selfcheck
from cobra_kernels.errors import CobraKernelsError, ShapeError
from tests import tolerances
from tests.conftest import kernel_backends
from tests.tolerances import OUTPUT, assert_close

BACKENDS = ["reference", *kernel_backends()]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def wide(inputs: dict) -> dict:
    return {k: selfcheck.map_tensors(v, selfcheck.in_fp64) for k, v in inputs.items()}


def scan_inputs(*args, **kwargs) -> dict:
    return selfcheck.selective_scan_inputs(generator(), *args, **kwargs)


# --- A4: wrong results -----------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("seqlen", range(1, 36))
def test_row_032_a_bias_under_softplus_does_not_leak_into_the_tail(backend, seqlen):
    """softplus(0 + bias) is not 0: lanes behind the end must be masked after it. Values, last state and gradients."""
    inputs = scan_inputs(1, 3, seqlen, 4)
    inputs["delta_bias"] = torch.full((3,), 3.0)
    leaves = [inputs[k].requires_grad_() for k in ("u", "delta", "A", "B", "C", "delta_bias")]
    out, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    expected = wide(inputs)
    wide_leaves = [expected[k].requires_grad_() for k in ("u", "delta", "A", "B", "C", "delta_bias")]
    want, want_last = selective_scan(**expected, return_last_state=True, backend="reference")
    assert_close(out, want, 1e-6)
    assert_close(last, want_last, 1e-6)
    for got, target in zip(torch.autograd.grad(out.sum() + last.sum(), leaves), torch.autograd.grad(want.sum() + want_last.sum(), wide_leaves)):
        assert_close(got, target, 1e-5)


@every_backend
@pytest.mark.parametrize("raw", [-100.0, -20.0, -1.0, 0.0, 1.0, 19.9, 20.0, 20.1, 100.0])
def test_row_034_softplus_around_its_threshold(backend, raw):
    def assert_close(got, want, limit):  # e^-100 is a denormal: fp32 kernels may give 0
        tolerances.assert_close(got, want, limit) if want.abs().max() > 1e-30 else tolerances.assert_close(1e30 * got, 0 * want, 1e-6)

    inputs = scan_inputs(1, 2, 3, 4, z=False)
    inputs |= {"delta": torch.full((1, 2, 3), raw), "delta_bias": None}
    expected = wide(inputs)
    assert_close(selective_scan(**inputs, backend=backend), selective_scan(**expected, backend="reference"), 1e-6)
    delta = inputs["delta"].clone().requires_grad_()
    (got,) = torch.autograd.grad(selective_scan(**{**inputs, "delta": delta}, backend=backend).sum(), delta)
    delta = expected["delta"].clone().requires_grad_()
    (want,) = torch.autograd.grad(selective_scan(**{**expected, "delta": delta}, backend="reference").sum(), delta)
    assert_close(got, want, 1e-5)
    update = selfcheck.selective_state_update_inputs(generator(), 1, 2, 4)
    update |= {"dt": torch.full((1, 2), raw), "dt_bias": None}
    state = update["state"].double().clone()
    want = selective_state_update(**{**wide(update), "state": state}, backend="reference")
    assert_close(selective_state_update(**update, backend=backend), want, 1e-6)
    assert_close(update["state"], state, 1e-6)


@every_backend
@pytest.mark.parametrize("groups", [1, 2, 4, 12])
def test_row_038_groups(backend, groups):
    inputs = scan_inputs(2, 12, 9, 4, groups)
    for i in range(12):  # channel by channel, with its own group
        one = {k: v[:, i : i + 1] if k in ("u", "delta", "z") else v[i : i + 1] if k in ("A", "D", "delta_bias") else v for k, v in inputs.items()}
        group = i // (12 // groups)
        one |= {k: inputs[k][:, group : group + 1] for k in ("B", "C")}
        assert_close(selective_scan(**inputs, backend=backend)[:, i : i + 1], selective_scan(**wide(one), backend="reference"), 1e-6)


@every_backend
@pytest.mark.parametrize("width", range(1, 9))
def test_row_039_and_045_sequences_shorter_than_the_window_for_every_width(backend, width):
    for seqlen in range(width + 2):
        for initial in (False, True):
            inputs = selfcheck.causal_conv1d_inputs(generator(), 2, 5, seqlen, width, initial=initial)
            leaves = [inputs[k].requires_grad_() for k in ("x", "weight", "bias")]
            out, final = causal_conv1d(**inputs, return_final_states=True, activation="silu", backend=backend)
            expected = wide(inputs)
            wide_leaves = [expected[k].requires_grad_() for k in ("x", "weight", "bias")]
            want, want_final = causal_conv1d(**expected, return_final_states=True, activation="silu", backend="reference")
            assert_close(out, want, 1e-6)
            assert torch.equal(final.double(), want_final)
            grads = torch.autograd.grad(out.sum() + final.square().sum(), leaves)
            for got, target in zip(grads, torch.autograd.grad(want.sum() + want_final.square().sum(), wide_leaves)):
                assert_close(got, target, 1e-5)


@every_backend
def test_row_040_and_055_combinations_that_cannot_be_honoured_are_refused(backend):
    cu = torch.tensor([0, 3, 9])
    with pytest.raises(ShapeError, match="batch"):
        selective_scan(**scan_inputs(2, 3, 9, 4), cu_seqlens=cu, backend=backend)
    conv = selfcheck.causal_conv1d_inputs(generator(), 2, 5, 9)
    with pytest.raises(ShapeError, match="batch"):
        causal_conv1d(**conv, cu_seqlens=cu, backend=backend)
    seq_idx = torch.zeros(2, 9, dtype=torch.int32)
    for extra in ({"return_final_states": True}, {"initial_states": torch.zeros(2, 5, 3)}):
        with pytest.raises(ShapeError, match="seq_idx"):
            causal_conv1d(**{**conv, **extra}, seq_idx=seq_idx, backend=backend)


@every_backend
@pytest.mark.parametrize("cu", [[1, 9], [0, 5, 3, 9], [0, 10], [-1, 9]], ids=str)
def test_row_036_bad_boundaries_are_refused(backend, cu):
    with pytest.raises(CobraKernelsError, match="cu_seqlens"):
        selective_scan(**scan_inputs(1, 3, 9, 4), cu_seqlens=torch.tensor(cu), backend=backend)
    with pytest.raises(CobraKernelsError, match="cu_seqlens"):
        causal_conv1d(**selfcheck.causal_conv1d_inputs(generator(), 1, 5, 9), cu_seqlens=torch.tensor(cu), backend=backend)


@every_backend
@pytest.mark.parametrize("dstate", [255, 256, 257, 300])
def test_row_046_any_dstate(backend, dstate):
    inputs = scan_inputs(1, 3, 5, dstate)
    assert_close(selective_scan(**inputs, backend=backend), selective_scan(**wide(inputs), backend="reference"), 1e-6)


@every_backend
@pytest.mark.parametrize("batch, dim, seqlen", [(2, 3, 0), (0, 3, 5), (2, 0, 5), (0, 0, 0)])
@pytest.mark.parametrize("initial", [True, False])
def test_row_047_sizes_of_zero(backend, batch, dim, seqlen, initial):
    inputs = scan_inputs(batch, dim, seqlen, 4, initial=initial)
    leaves = [v.requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
    out, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert out.shape == (batch, dim, seqlen) and last.shape == (batch, dim, 4)
    if seqlen == 0:
        assert torch.equal(last, inputs["initial_state"] if initial else torch.zeros(batch, dim, 4))
    grads = torch.autograd.grad(out.sum() + last.sum(), leaves, allow_unused=True)
    assert all(g is None or (g.shape == t.shape and g.isfinite().all()) for g, t in zip(grads, leaves))
    inputs = selfcheck.causal_conv1d_inputs(generator(), batch, dim, seqlen, 4, initial=initial)
    out, final = causal_conv1d(**inputs, return_final_states=True, backend=backend)
    assert out.shape == (batch, dim, seqlen) and final.shape == (batch, dim, 3)
    if seqlen == 0:
        assert torch.equal(final, inputs["initial_states"] if initial else torch.zeros(batch, dim, 3))


@every_backend
def test_row_044_the_strides_that_transformers_passes(backend):
    """z with strides (1408, 1, 128), B and C as columns of a (.., 34)-wide projection."""
    inputs = scan_inputs(1, 64, 11, 16, dtype=torch.float32)
    xz = torch.empty(1, 11, 128)
    z = xz[..., 64:].transpose(1, 2).copy_(inputs["z"])
    x_dbl = torch.empty(1, 11, 34)
    B = x_dbl[..., 2:18].transpose(1, 2).copy_(inputs["B"][:, 0])
    C = x_dbl[..., 18:].transpose(1, 2).copy_(inputs["C"][:, 0])
    assert z.stride() == (1408, 1, 128) and B.stride() == (374, 1, 34)
    assert_close(selective_scan(**{**inputs, "z": z, "B": B, "C": C}, backend=backend), selective_scan(**wide(inputs), backend="reference"), 1e-6)


# --- A5: state -------------------------------------------------------------------------------------------------------


@every_backend
def test_row_056_and_057_gradients_flow_through_both_states(backend):
    inputs = scan_inputs(2, 3, 7, 4, initial=True)
    h0 = inputs["initial_state"].requires_grad_()
    _, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    (got,) = torch.autograd.grad(last.square().sum(), h0)
    expected = wide(inputs)
    wide_h0 = expected["initial_state"].requires_grad_()
    _, last = selective_scan(**expected, return_last_state=True, backend="reference")
    (want,) = torch.autograd.grad(last.square().sum(), wide_h0)
    assert want.norm() > 0
    assert_close(got, want, 1e-5)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_051_conv_state_holds_inputs_bit_for_bit(backend, dtype):
    inputs = selfcheck.causal_conv1d_update_inputs(generator(), 2, 5, 4, 4, 3, dtype)
    before = inputs["conv_state"].clone()
    causal_conv1d_update(**inputs, activation="silu", backend=backend)
    assert torch.equal(inputs["conv_state"], torch.cat([before, inputs["x"]], -1)[..., -4:])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_058_the_scan_state_is_fp32_whatever_the_activations(backend, dtype):
    _, last = selective_scan(**scan_inputs(1, 3, 40, 4, dtype=dtype), return_last_state=True, backend=backend)
    assert last.dtype == torch.float32 and last.is_contiguous()
    assert not torch.equal(last, last.to(dtype).float())


# --- A6: numbers -----------------------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("delta", [1e-4, 1.0, 1e2, 1e4])
def test_row_061_finite_for_any_step_with_negative_A(backend, dtype, delta):
    inputs = scan_inputs(1, 3, 20, 4, dtype=dtype, softplus=False, z=False)
    inputs |= {"delta": torch.full((1, 3, 20), delta, dtype=dtype), "delta_bias": None, "u": inputs["u"] * 1e-3}
    out, last = selective_scan(**inputs, return_last_state=True, backend=backend)
    assert out.isfinite().all() and last.isfinite().all()


@every_backend
def test_row_061_growing_states_overflow_without_nan_elsewhere(backend):
    inputs = scan_inputs(1, 3, 40, 4, softplus=False, z=False, D=False)
    inputs |= {"delta": torch.full((1, 3, 40), 10.0), "delta_bias": None, "A": torch.ones(3, 4)}
    inputs["A"][1:] = -1.0
    out = selective_scan(**inputs, backend=backend)
    assert out[:, 1:].isfinite().all() and not out[:, 0].isfinite().all()


@every_backend
def test_row_062_the_mix_that_autocast_makes(backend):
    inputs = scan_inputs(1, 3, 9, 4, dtype=torch.bfloat16)
    inputs |= {"u": inputs["u"].float(), "B": inputs["B"].half()}
    out = selective_scan(**inputs, backend=backend)
    assert out.dtype == torch.float32
    assert_close(out, selective_scan(**wide(inputs), backend="reference"), OUTPUT[torch.float32])


@pytest.mark.parametrize("backend", kernel_backends())
def test_row_065_same_bits_run_after_run(backend):
    inputs = scan_inputs(2, 65, 200, 16)
    first = selective_scan(**inputs, return_last_state=True, backend=backend)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, selective_scan(**inputs, return_last_state=True, backend=backend)))


@pytest.mark.threads
@pytest.mark.parametrize("backend", kernel_backends())
def test_row_065_same_bits_for_any_number_of_threads(backend, threads):
    once = {case.op: case for case in selfcheck.cases(1) if "projector" not in case.op}  # library GEMMs promise no bits
    for case in once.values():
        one, two = threads(lambda case=case: selfcheck.run(case, backend), 1, 2)
        assert all(torch.equal(a, b) for a, b in zip(one, two)), case.op
