"""causal_conv1d's names on our kernels, against its references in plain torch, in every historic call form."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.tolerances import GRADIENT, OUTPUT, assert_close

pytestmark = pytest.mark.usefixtures("shims")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype=torch.float32, batch=2, dim=10, seqlen=17, width=4, channel_last=False):
    g = torch.Generator().manual_seed(seqlen * 10 + width)
    x = (
        torch.randn(batch, seqlen, dim, generator=g).to(dtype).transpose(1, 2)
        if channel_last
        else torch.randn(batch, dim, seqlen, generator=g).to(dtype)
    )
    return x, torch.randn(dim, width, generator=g), torch.randn(dim, generator=g), torch.randn(batch, dim, width - 1, generator=g).to(dtype)


def expected(x, weight, bias, initial_states=None, **options):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    return causal_conv1d_ref(
        x.double(), weight.double(), bias.double(), None if initial_states is None else initial_states.double(), **options
    )


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("seqlen", [1, 2, 3, 7, 16, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_states(dtype, seqlen, channel_last):
    from causal_conv1d import causal_conv1d_fn

    x, weight, bias, initial = inputs(dtype, seqlen=seqlen, channel_last=channel_last)
    out, final = causal_conv1d_fn(x, weight, bias, initial_states=initial, return_final_states=True, activation="silu")
    want, want_final = expected(x, weight, bias, initial, return_final_states=True, activation="silu")
    assert out.dtype == final.dtype == dtype
    assert_close(out, want, OUTPUT[dtype])
    assert torch.equal(final.double(), want_final)


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_every_mix_of_dtypes(dtype, weight_dtype):
    """Through the output, by a gradient that is expanded as `.sum()` makes it, and through the final states."""
    from causal_conv1d.causal_conv1d_interface import CausalConv1dFn, causal_conv1d_ref

    x, weight, bias, initial = inputs(dtype, seqlen=19, width=3)
    leaves = [t.requires_grad_() for t in (x, weight.to(weight_dtype), bias.to(weight_dtype), initial)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out, final = CausalConv1dFn.apply(*leaves[:3], None, leaves[3], True, None, "swish")
    want, want_final = causal_conv1d_ref(*wide, return_final_states=True, activation="swish")
    assert torch.equal(final.double(), want_final)
    dout, dfinal = torch.randn(1, 10, 1).expand(out.shape).to(dtype), torch.randn(final.shape).to(dtype)
    got = torch.autograd.grad((out, final), leaves, (dout, dfinal))
    for g, w in zip(got, torch.autograd.grad((want, want_final), wide, (dout.double(), dfinal.double())), strict=True):
        assert_close(g, w, GRADIENT[g.dtype])


def test_packed_sequences_are_those_run_alone():
    """seq_idx: nothing crosses a boundary, and what is negative is padding, 0 with gradient 0."""
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    x, weight, bias, _ = inputs(batch=1, seqlen=20, channel_last=True)
    x.requires_grad_()
    seq_idx = torch.tensor([[3] * 3 + [1] + [2] * 9 + [-1] * 2 + [0] * 5], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")
    assert_close(out, causal_conv1d_ref(x.double(), weight.double(), bias.double(), activation="silu", seq_idx=seq_idx), OUTPUT[x.dtype])
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    for index in range(4):
        at = seq_idx[0] == index
        alone = x.detach()[:, :, at].requires_grad_()
        want = causal_conv1d_fn(alone, weight, bias, activation="silu")
        assert torch.equal(out[:, :, at], want)
        assert torch.equal(grad[:, :, at], torch.autograd.grad(want.square().sum(), alone)[0])
    assert (out[:, :, seq_idx[0] < 0] == 0).all() and (grad[:, :, seq_idx[0] < 0] == 0).all()


@pytest.mark.parametrize("first", [1, 2, 5])
def test_initial_states_belong_to_the_first_packed_sequence(first):
    """Fewer positions than the state has, and more; through the raw entry as well."""
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    leaves = [t.requires_grad_() for t in inputs(seqlen=9)]
    seq_idx = torch.tensor([[7] * first + [3] * (9 - first)] * 2)
    out = causal_conv1d_fn(*leaves[:3], seq_idx, leaves[3], activation="silu")
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = causal_conv1d_ref(*wide, activation="silu", seq_idx=seq_idx)
    assert_close(out, want, OUTPUT[torch.float32])
    head = causal_conv1d_ref(wide[0][..., :first], *wide[1:], activation="silu")
    assert_close(out[..., :first], head, OUTPUT[torch.float32])
    raw = importlib.import_module("causal_conv1d_cuda")
    assert torch.equal(raw.causal_conv1d_fwd(*leaves[:3], seq_idx, leaves[3], None, True), out)
    dout = torch.randn(out.shape)
    grads = torch.autograd.grad(out, leaves, dout)
    of_raw = raw.causal_conv1d_bwd(*leaves[:3], dout, seq_idx, leaves[3], None, None, True, True)
    for g, r, w in zip(grads, of_raw, torch.autograd.grad(want, wide, dout.double()), strict=True):
        assert_close(g, w, GRADIENT[torch.float32])
        assert torch.equal(g, r)


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_of_a_pool(dtype):
    """Rows by index, padding left alone, the state's bits."""
    from causal_conv1d import causal_conv1d_update
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    x, weight, bias, _ = inputs(dtype, batch=3, seqlen=2)
    pool = torch.randn(6, 10, 4, generator=torch.Generator().manual_seed(5)).to(dtype)
    state, before = pool.clone(), pool[[5, 2]].clone()
    out = causal_conv1d_update(x, state, weight, bias, "silu", None, torch.tensor([5, -1, 2], dtype=torch.int32))
    wide = before.double()
    want = causal_conv1d_update_ref(x[[0, 2]].double(), wide, weight.double(), bias.double(), "silu")
    assert_close(out[[0, 2]], want, OUTPUT[dtype])
    assert torch.equal(state[[5, 2]].double(), wide) and torch.equal(state[[0, 1, 3, 4]], pool[[0, 1, 3, 4]])
    assert (out[1] == 0).all()


def test_update_shifts_and_turns():
    from causal_conv1d import causal_conv1d_update
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    x, weight, bias, _ = inputs(seqlen=3)
    for cache_seqlens in (None, torch.tensor([2, 7], dtype=torch.int32)):
        state = torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(5))
        wide = state.double()
        out = causal_conv1d_update(x, state, weight, bias, "silu", cache_seqlens)
        assert_close(
            out, causal_conv1d_update_ref(x.double(), wide, weight.double(), bias.double(), "silu", cache_seqlens), OUTPUT[x.dtype]
        )
        assert torch.equal(state.double(), wide)


def test_the_forms_of_the_raw_forward():
    raw = importlib.import_module("causal_conv1d_cuda")
    x, weight, bias, initial = inputs()
    want = expected(x, weight, bias, initial, activation="silu")
    plain = expected(x, weight, bias, activation="silu")
    assert_close(raw.causal_conv1d_fwd(x, weight, bias, True), plain, 1e-6)
    assert_close(raw.causal_conv1d_fwd(x, weight, bias, None, True), plain, 1e-6)
    assert_close(raw.causal_conv1d_fwd(x, weight, bias, None, None, None, True), plain, 1e-6)
    assert_close(raw.causal_conv1d_fwd(x, weight, bias, None, initial, None, True), want, 1e-6)
    out, final = torch.empty_like(x), torch.empty_like(initial)
    assert raw.causal_conv1d_fwd(x, weight, bias, None, initial, out, final, True) is None
    assert_close(out, want, 1e-6)
    assert torch.equal(final, x[..., -3:])
    with pytest.raises(ValueError, match="6 arguments, expected 4 .1.0.; 5"):
        raw.causal_conv1d_fwd(x, weight, bias, None, None, True)


def test_the_forms_of_the_raw_backward():
    raw = importlib.import_module("causal_conv1d_cuda")
    x, weight, bias, initial = inputs()
    dout = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, initial)]
    want = torch.autograd.grad(expected(*leaves, activation="silu"), leaves, dout.double())
    without = [t.double().requires_grad_() for t in (x, weight, bias)]
    plain = torch.autograd.grad(expected(*without, activation="silu"), without, dout.double())

    def same(got, wanted):
        for g, w in zip(got, wanted, strict=True):
            assert_close(g, w, GRADIENT[torch.float32])

    same(raw.causal_conv1d_bwd(x, weight, bias, dout, None, True), plain)
    same(raw.causal_conv1d_bwd(x, weight, bias, dout, None, None, True), plain)
    dxz = torch.zeros(2, 20, 17)
    dx = dxz.chunk(2, dim=1)[0]  # where mamba_ssm's block wants it
    assert raw.causal_conv1d_bwd(x, weight, bias, dout, None, dx, True)[0] is dx
    assert_close(dxz[:, :10], plain[0], GRADIENT[torch.float32])
    assert (dxz[:, 10:] == 0).all()
    got = raw.causal_conv1d_bwd(x, weight, bias, dout, None, initial, None, dx, True, True)
    same(got, want)
    assert got[0] is dx
    assert raw.causal_conv1d_bwd(x, weight, bias, dout, None, initial, None, None, False, True)[3] is None
    written = [torch.empty_like(t) for t in (x, weight, bias, initial)]
    assert raw.causal_conv1d_bwd(x, weight, bias, dout, None, initial, None, *written, True) is None
    same(written, want)


def test_the_forms_of_the_raw_update():
    raw = importlib.import_module("causal_conv1d_cuda")
    x, weight, bias, _ = inputs(seqlen=1)
    x = x[..., 0]
    start = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(5))
    results = []
    for form in range(4):
        state, out = start.clone(), torch.empty_like(x)
        arguments = [(x, state, weight, bias, True), (x, state, weight, bias, True, None), (x, state, weight, bias, True, None, None),
                     (x, state, weight, bias, out, True, None, None)][form]  # fmt: skip
        returned = raw.causal_conv1d_update(*arguments)
        results.append((out if form == 3 else returned, state))
        assert form != 3 or returned is None
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(state, results[0][1])
    assert not torch.equal(results[0][1], start)


def test_functions_that_mamba_ssm_calls():
    from causal_conv1d.cpp_functions import causal_conv1d_bwd_function, causal_conv1d_fwd_function, causal_conv1d_update_function

    x, weight, bias, _ = inputs()
    assert_close(causal_conv1d_fwd_function(x, weight, bias, None, None, None, True), expected(x, weight, bias, activation="silu"), 1e-6)
    dx, dweight, dbias, dinitial = causal_conv1d_bwd_function(x, weight, bias, torch.ones_like(x), None, None, None, None, False, False)
    assert_close(dbias, torch.full_like(bias, x.shape[0] * x.shape[2]), 1e-6)
    assert dinitial is None and dx.shape == x.shape and dweight.shape == weight.shape
    state = torch.zeros(2, 10, 4)
    assert causal_conv1d_update_function(x[..., 0], state, weight, bias, True).shape == (2, 10)


@pytest.mark.parametrize("state_len", [1, 3, 4, 9])
def test_varlen_states(state_len):
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref

    x = torch.randn(12, 5)
    cu_seqlens = torch.tensor([0, 0, 1, 6, 12], dtype=torch.int32)
    assert torch.equal(causal_conv1d_varlen_states(x, cu_seqlens, state_len), causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len))
