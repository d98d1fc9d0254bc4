"""As test suites of mamba_ssm and causal_conv1d are written: their names, their references, their grids and their tolerances.

Only the device is another: such a file runs here with `device = "cuda"` changed to "cpu". The grids are thinner. Our own limits, which
are far below these tolerances, are in the other files of this folder.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("shims")
device = "cpu"
RTOL_ATOL = {torch.float32: (3e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2), torch.float16: (3e-3, 5e-3)}


def close(a, b, rtol, atol):
    assert a.shape == b.shape
    assert torch.allclose(a.float(), b.float(), rtol=rtol, atol=atol), f"max diff: {(a.float() - b.float()).abs().max().item()}"


def scan_cases():
    """Upstream's grid: odd and even lengths, dtypes, real and complex A, constant and variable B and C. Groups are for both B and C.

    Thinned: complex A, which is plain torch here and slow, at one length and in fp32.
    """
    for itype in (torch.float32, torch.float16, torch.bfloat16):
        for is_variable_B, is_variable_C, groups in (
            (True, True, 1),
            (True, True, 2),
            (True, False, 1),
            (False, True, 1),
            (False, False, 1),
        ):
            for has_D_z_bias in (False, True):
                yield 151, itype, torch.float32, is_variable_B, is_variable_C, has_D_z_bias, groups
                if itype == torch.float32:
                    yield 128, itype, torch.float32, is_variable_B, is_variable_C, has_D_z_bias, groups
                    yield 33, itype, torch.complex64, is_variable_B, is_variable_C, has_D_z_bias, groups


@pytest.mark.parametrize("seqlen, itype, wtype, is_variable_B, is_variable_C, has_D_z_bias, varBC_groups", list(scan_cases()))
def test_selective_scan(seqlen, itype, wtype, is_variable_B, is_variable_C, has_D_z_bias, varBC_groups):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    is_complex = wtype == torch.complex64
    torch.random.manual_seed(0)
    rtol, atol = RTOL_ATOL[itype]
    rtolw, atolw = max(1e-3, rtol), max(1e-3, atol)
    batch_size, dim, dstate = 2, 4, 8
    A = (-0.5 * torch.rand(dim, dstate, device=device, dtype=wtype)).requires_grad_()

    def make_BC(is_variable):
        if not is_variable:
            return torch.randn(dim, dstate, device=device, dtype=wtype, requires_grad=True)
        lead = (batch_size, dstate) if varBC_groups == 1 else (batch_size, varBC_groups, dstate)
        return torch.randn(*lead, seqlen * (2 if is_complex else 1), device=device, dtype=itype, requires_grad=True)

    B, C = make_BC(is_variable_B), make_BC(is_variable_C)
    u = torch.randn(batch_size, dim, seqlen, device=device, dtype=itype, requires_grad=True)
    delta = (0.5 * torch.rand(batch_size, dim, seqlen, device=device, dtype=itype)).requires_grad_()
    D = z = delta_bias = None
    if has_D_z_bias:
        D = torch.randn(dim, device=device, dtype=torch.float32, requires_grad=True)
        z = torch.randn(batch_size, dim, seqlen, device=device, dtype=itype, requires_grad=True)
        delta_bias = (0.5 * torch.rand(dim, device=device, dtype=torch.float32)).requires_grad_()
    leaves = [u, delta, A, B, C, D, z, delta_bias]
    leaves_ref = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    out, state = selective_scan_fn(*leaves, delta_softplus=True, return_last_state=True)
    out_ref, state_ref = selective_scan_ref(*leaves_ref, delta_softplus=True, return_last_state=True)
    close(out, out_ref, rtol, atol)
    assert torch.allclose(state, state_ref, rtol=rtol, atol=atol)

    g = torch.randn_like(out)
    out_ref.backward(g)
    out.backward(g)
    for name, t, t_ref in zip(("u", "delta", "A", "B", "C", "D", "z", "delta_bias"), leaves, leaves_ref):
        if t is None:
            continue
        assert t.grad.dtype == t.dtype, name
        scale = 5 if name in ("A", "D", "delta_bias") else 2
        rt, at = (rtolw, atolw) if name in ("A", "D", "delta_bias") or t.dim() == 2 else (rtol, atol)
        assert torch.allclose(t.grad, t_ref.grad, rtol=scale * rt, atol=scale * at), name


@pytest.mark.parametrize("is_variable_B, is_variable_C", [(True, True), (False, False)])
@pytest.mark.parametrize("wtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("seqlen", [33, 128])
def test_mamba_inner_fn(wtype, seqlen, is_variable_B, is_variable_C):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_ref

    torch.random.manual_seed(0)
    batch_size, dim, dstate, dt_rank = 2, 48, 8, 12
    is_complex = wtype == torch.complex64
    columns = dt_rank + (is_variable_B + is_variable_C) * dstate * (2 if is_complex else 1)

    def randn(*shape, dtype=torch.float32, scale=1.0):
        return (scale * torch.randn(*shape, device=device, dtype=dtype)).requires_grad_()

    arguments = [
        randn(batch_size, 2 * dim, seqlen), randn(dim, 1, 3), randn(dim), randn(columns, dim, scale=0.2), randn(dim, dt_rank, scale=0.2),
        randn(dim // 2, dim, scale=0.2), None, (-0.5 * torch.rand(dim, dstate, device=device, dtype=wtype)).requires_grad_(),
        None if is_variable_B else randn(dim, dstate, dtype=wtype), None if is_variable_C else randn(dim, dstate, dtype=wtype), randn(dim),
        (0.5 * torch.rand(dim, device=device)).requires_grad_(),
    ]  # fmt: skip
    arguments_ref = [None if t is None else t.detach().clone().requires_grad_() for t in arguments]
    out = mamba_inner_fn(*arguments, delta_softplus=True)
    out_ref = mamba_inner_ref(*arguments_ref, delta_softplus=True)
    close(out, out_ref, *RTOL_ATOL[torch.float32])
    g = torch.randn_like(out)
    out_ref.backward(g)
    out.backward(g)
    for t, t_ref in zip(arguments, arguments_ref):
        if t is not None:
            assert torch.allclose(t.grad, t_ref.grad, rtol=1e-3, atol=1e-3 * t_ref.grad.abs().max().item())


@pytest.mark.parametrize("itype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_z", [False, True])
@pytest.mark.parametrize("dstate", [16, 64])
@pytest.mark.parametrize("dim", [2048 + 16, 63])
def test_selective_state_update(dim, dstate, has_z, itype):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref

    rtol, atol = (3e-4, 1e-3) if itype == torch.float32 else (1e-2, 1e-1)
    torch.random.manual_seed(0)
    batch_size = 2
    state = torch.randn(batch_size, dim, dstate, dtype=itype, device=device)
    x = torch.randn(batch_size, dim, device=device, dtype=itype)
    dt = torch.randn(batch_size, dim, device=device, dtype=itype)
    dt_bias = torch.rand(dim, device=device) - 4.0
    A = -torch.rand(dim, dstate, device=device) - 1.0
    B, C = torch.randn(2, batch_size, dstate, device=device)
    D = torch.randn(dim, device=device)
    z = torch.randn_like(x) if has_z else None
    state_ref = state.detach().clone()
    out = selective_state_update(state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    out_ref = selective_state_update_ref(state_ref, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    close(state, state_ref, rtol, atol)
    close(out, out_ref, rtol, atol)


@pytest.mark.parametrize("has_initial_states, return_final_states", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("silu_activation, has_bias", [(False, False), (True, True)])
@pytest.mark.parametrize(
    "dim, itype, width, seqlen",  # thinned: each length and width, in one dtype or another
    [
        (64, torch.float32, 4, 151),
        (56, torch.bfloat16, 3, 151),
        (64, torch.float16, 2, 784),
        (64, torch.float32, 4, 1),
        (63, torch.bfloat16, 4, 2),
    ],
)
def test_causal_conv1d(dim, seqlen, width, has_bias, silu_activation, itype, channel_last, has_initial_states, return_final_states):
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_ref

    rtol, atol = RTOL_ATOL[itype]
    rtolw, atolw = 1e-3, 1e-3
    torch.random.manual_seed(0)
    batch = 2
    if channel_last:
        x = torch.randn(batch, seqlen, 4096 + dim, device=device, dtype=itype)[:, :, 4096 : 4096 + dim].transpose(1, 2)
    else:
        x = torch.randn(batch, 4096 + dim, seqlen, device=device, dtype=itype)[:, 4096 : 4096 + dim, :]
    x = x.requires_grad_()
    weight = torch.randn(dim, width, device=device, dtype=torch.float32, requires_grad=True)
    bias = torch.randn(dim, device=device, dtype=torch.float32, requires_grad=True) if has_bias else None
    initial_states = None
    if has_initial_states:
        initial_states = torch.randn(batch, width - 1, dim, device=device, dtype=itype).transpose(1, 2).requires_grad_()
    leaves = [x, weight, bias, initial_states]
    x_ref, weight_ref, bias_ref, initial_states_ref = leaves_ref = [
        None if t is None else t.detach().clone().requires_grad_() for t in leaves
    ]
    activation = "silu" if silu_activation else None
    out = causal_conv1d_fn(
        x, weight, bias, initial_states=initial_states, return_final_states=return_final_states, activation=activation
    )  # fmt: skip
    out_ref = causal_conv1d_ref(
        x_ref, weight_ref, bias_ref, initial_states=initial_states_ref, return_final_states=return_final_states, activation=activation
    )  # fmt: skip
    if return_final_states:
        out, final_states = out
        out_ref, final_states_ref = out_ref
        assert torch.equal(final_states, final_states_ref)
        out, out_ref = out + final_states[..., :1].sigmoid(), out_ref + final_states_ref[..., :1].sigmoid()
    close(out, out_ref, rtol, atol)
    g = torch.randn_like(out)
    out.backward(g)
    out_ref.backward(g)
    for t, t_ref in zip(leaves, leaves_ref):
        if t is not None:
            weights = t is weight or t is bias
            close(t.grad, t_ref.grad, *((rtolw, atolw * 10) if weights else (rtol, atol)))


@pytest.mark.parametrize("itype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_cache_seqlens", [False, True])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("seqlen", [1, 4, 5])
@pytest.mark.parametrize("dim", [2048 + 16, 63])
def test_causal_conv1d_update(dim, width, seqlen, has_cache_seqlens, itype):
    from causal_conv1d import causal_conv1d_update
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_update_ref

    torch.random.manual_seed(0)
    batch = 3
    x = torch.randn(batch, seqlen, dim, device=device, dtype=itype).transpose(-1, -2)
    state_len = width - 1 + (dim % 2)  # the least there may be, which 4 and 5 steps go around, and one more
    conv_state = torch.randn(batch, state_len, dim, device=device, dtype=itype).transpose(-1, -2)
    weight = torch.randn(dim, width, device=device, dtype=torch.float32)
    bias = torch.randn(dim, device=device, dtype=torch.float32)
    cache_seqlens = torch.randint(0, 1024, (batch,), dtype=torch.int32, device=device) if has_cache_seqlens else None
    conv_state_ref = conv_state.detach().clone()
    out = causal_conv1d_update(x, conv_state, weight, bias, activation="silu", cache_seqlens=cache_seqlens)
    out_ref = causal_conv1d_update_ref(x, conv_state_ref, weight, bias, activation="silu", cache_seqlens=cache_seqlens)
    assert torch.equal(conv_state, conv_state_ref)
    close(out, out_ref, *RTOL_ATOL[itype])


@pytest.mark.parametrize("itype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [2048, 63])
def test_causal_conv1d_get_states(dim, itype):
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states, causal_conv1d_varlen_states_ref

    torch.random.manual_seed(0)
    seqlens = torch.randint(1, 32, (100,), device=device)
    x = torch.randn(int(seqlens.sum()), dim, device=device, dtype=itype)
    cu_seqlens = F.pad(seqlens.cumsum(0), (1, 0))
    out = causal_conv1d_varlen_states(x, cu_seqlens, 4)
    assert torch.equal(out, causal_conv1d_varlen_states_ref(x, cu_seqlens, 4))


def test_causal_conv1d_race_condition():
    """Forward and backward, many times over: the same bits."""
    from causal_conv1d import causal_conv1d_fn

    x = torch.randn(2, 64, 151, device=device, requires_grad=True)
    weight, bias = torch.randn(64, 4, device=device, requires_grad=True), torch.randn(64, device=device, requires_grad=True)
    g = torch.randn(2, 64, 151)
    out0 = causal_conv1d_fn(x, weight, bias, activation="silu")
    grads0 = torch.autograd.grad(out0, (x, weight, bias), g)
    for _ in range(20):
        out = causal_conv1d_fn(x, weight, bias, activation="silu")
        assert torch.equal(out, out0)
        for a, b in zip(torch.autograd.grad(out, (x, weight, bias), g), grads0):
            assert torch.equal(a, b)


@torch.inference_mode()
def test_generation():
    """Teacher-forced decoding with a cache, a step at a time, gives the logits of one forward over everything."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(2357)
    config = MambaConfig(d_model=64, n_layer=4, vocab_size=1000, rms_norm=True, residual_in_fp32=True, fused_add_norm=True)
    model = MambaLMHeadModel(config, device=device, dtype=torch.float32).eval()
    input_ids = torch.randint(1, 1000, (3, 10), device=device)
    out_ref = model(input_ids).logits
    for cg in (False, True):
        out = model.generate(input_ids=input_ids, max_length=19, output_scores=True, return_dict_in_generate=True, cg=cg)
        assert out.sequences.shape == (3, 19)
        whole = model(out.sequences).logits
        scores = torch.stack(out.scores, dim=1)
        assert torch.allclose(scores[:, 0], out_ref[:, -1], rtol=1e-3, atol=1e-4)
        assert torch.allclose(scores, whole[:, 9:-1], rtol=1e-3, atol=1e-4)
        forced = model.generate(
            input_ids=input_ids, max_length=19, teacher_outputs=out.sequences.flip(0), return_dict_in_generate=True, cg=cg
        )  # fmt: skip
        assert torch.equal(forced.sequences[:, 10:], out.sequences.flip(0)[:, 10:])
