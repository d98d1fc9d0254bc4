"""The Mamba block and its state: one meaning whether the tokens come at once, in pieces, packed or one by one."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cobra_kernels import errors
from cobra_kernels.modules import Block, InferenceParams, Mamba, MambaState, RMSNorm, mamba
from tests.modules.models import make_lm, randomise
from tests.tolerances import CHUNKED, GEMM, assert_close

HALF = (torch.bfloat16, torch.float16)


def make_mixer(d_model: int = 24, seed: int = 0, **options) -> Mamba:
    return randomise(Mamba(d_model, layer_idx=0, **options), seed).eval()


def make_hidden(batch: int, seqlen: int, d_model: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, seqlen, d_model, generator=torch.Generator().manual_seed(seed))


def plain_mamba(m: Mamba, hidden: torch.Tensor) -> torch.Tensor:
    """The block written out in fp64, sharing no op with it: (batch, seqlen, d_model) -> the same."""
    w = {name: p.detach().double() for name, p in m.named_parameters()}
    xz = hidden.double() @ w["in_proj.weight"].T + w.get("in_proj.bias", 0)
    x, z = xz[..., : m.d_inner], xz[..., m.d_inner :]
    padded = F.pad(x, (0, 0, m.d_conv - 1, 0))
    u = sum(padded[:, k : k + x.shape[1]] * w["conv1d.weight"][:, 0, k] for k in range(m.d_conv)) + w.get("conv1d.bias", 0)
    u = u * torch.sigmoid(u)
    dbl = u @ w["x_proj.weight"].T
    dt = torch.log1p(torch.exp(dbl[..., : m.dt_rank] @ w["dt_proj.weight"].T + w["dt_proj.bias"]))
    B, C = dbl[..., m.dt_rank : m.dt_rank + m.d_state], dbl[..., m.dt_rank + m.d_state :]
    h, ys = torch.zeros(len(x), m.d_inner, m.d_state, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = torch.exp(-dt[:, t, :, None] * w["A_log"].exp()) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + w["D"] * u[:, t])
    y = torch.stack(ys, 1) * z * torch.sigmoid(z)
    return y @ w["out_proj.weight"].T + w.get("out_proj.bias", 0)


# --- parameters ------------------------------------------------------------------------------------------------------


def test_parameters_have_upstreams_names_shapes_and_order():
    m = Mamba(64, bias=True)
    assert [(name, tuple(p.shape)) for name, p in m.named_parameters()] == [
        ("A_log", (128, 16)),
        ("D", (128,)),
        ("in_proj.weight", (256, 64)),
        ("in_proj.bias", (256,)),
        ("conv1d.weight", (128, 1, 4)),
        ("conv1d.bias", (128,)),
        ("x_proj.weight", (4 + 32, 128)),
        ("dt_proj.weight", (128, 4)),
        ("dt_proj.bias", (128,)),
        ("out_proj.weight", (64, 128)),
        ("out_proj.bias", (64,)),
    ]
    plain = dict(Mamba(64, conv_bias=False, d_conv=3, d_state=5, dt_rank=7, expand=3).named_parameters())
    assert "conv1d.bias" not in plain and "in_proj.bias" not in plain
    assert plain["x_proj.weight"].shape == (7 + 10, 192) and plain["conv1d.weight"].shape == (192, 1, 3)


def test_initialisation():
    m = Mamba(512, dt_min=0.002, dt_max=0.2)
    assert torch.equal(m.A_log, torch.log(torch.arange(1.0, 17)).expand(1024, 16))
    assert torch.equal(m.D, torch.ones(1024))
    assert m.A_log._no_weight_decay and m.D._no_weight_decay and m.dt_proj.bias._no_reinit
    dt = F.softplus(m.dt_proj.bias.detach())
    assert 0.00199 < dt.min() and dt.max() < 0.201
    # log-uniform: the middle of the logarithms is where half of them lie
    middle = (dt < math.sqrt(0.002 * 0.2)).float().mean().item()
    assert abs(middle - 0.5) < 0.06
    bound = m.dt_rank**-0.5
    assert m.dt_proj.weight.abs().max() <= bound and m.dt_proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert torch.all(Mamba(32, dt_init="constant", dt_scale=0.5).dt_proj.weight == 0.5 * 2**-0.5)
    assert F.softplus(Mamba(512, dt_init_floor=0.05).dt_proj.bias.detach()).min() > 0.0499
    with pytest.raises(errors.ArgumentError, match="dt_init has 'zeros', expected 'random' or 'constant'"):
        Mamba(8, dt_init="zeros")


# --- one meaning -----------------------------------------------------------------------------------------------------

SHAPES = [  # (batch, seqlen, options): a base, then one thing at a time
    (2, 19, {}),
    (1, 1, {}),
    (3, 2, {}),
    (2, 3, {}),
    (2, 4, {}),
    (1, 65, {}),
    (2, 19, {"d_conv": 2}),
    (2, 19, {"d_conv": 7}),
    (2, 19, {"d_state": 1}),
    (2, 19, {"d_state": 21}),
    (2, 19, {"expand": 1}),
    (2, 19, {"dt_rank": 24}),
    (2, 19, {"bias": True}),
    (2, 19, {"conv_bias": False}),
]


@pytest.mark.parametrize(("batch", "seqlen", "options"), SHAPES, ids=lambda v: str(v).replace(" ", ""))
@torch.no_grad()
def test_forward_step_and_the_plain_formula_agree(batch, seqlen, options):
    m, hidden = make_mixer(**options), make_hidden(batch, seqlen)
    out = m(hidden)
    assert_close(out, plain_mamba(m, hidden), GEMM, "forward against the formula")
    conv, ssm = m.allocate_inference_cache(batch, seqlen)
    steps = torch.cat([m.step(hidden[:, t : t + 1], conv, ssm)[0] for t in range(seqlen)], dim=1)
    assert_close(steps, out, CHUNKED, "step^L")
    whole = m.allocate_inference_cache(batch)
    assert_close(m(hidden, state=whole), out, CHUNKED, "forward with a state")
    assert_close(conv, whole[0], CHUNKED, "conv_state")
    assert_close(ssm, whole[1], CHUNKED, "ssm_state")


@torch.no_grad()
def test_chunks_equal_one_forward_at_every_split_point():
    m, hidden = make_mixer(), make_hidden(2, 11)
    whole = m.allocate_inference_cache(2)
    expected = m(hidden, state=whole)
    for split in range(12):
        state = m.allocate_inference_cache(2)
        out = torch.cat([m(hidden[:, :split], state=state), m(hidden[:, split:], state=state)], dim=1)
        assert_close(out, expected, CHUNKED, f"split {split}")
        assert_close(state[0], whole[0], CHUNKED, f"conv_state, split {split}")
        assert_close(state[1], whole[1], CHUNKED, f"ssm_state, split {split}")


@torch.no_grad()
def test_conv_state_holds_the_last_inputs_of_the_convolution():
    m = make_mixer()
    for seqlen in range(7):
        hidden = make_hidden(2, seqlen)
        state = m.allocate_inference_cache(2)
        m(hidden, state=state)
        inputs = m.in_proj(hidden)[..., : m.d_inner].transpose(1, 2)
        assert torch.allclose(state[0], F.pad(inputs, (4, 0))[..., -4:], atol=1e-6), seqlen


@pytest.mark.parametrize("before", [0, 2, 6])
@torch.no_grad()
def test_packed_sequences_equal_separate_ones(before):
    m, lengths = make_mixer(), [5, 1, 0, 3, 9, 2]
    total = sum(lengths)
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    tokens, earlier = make_hidden(1, total), make_hidden(len(lengths), before, seed=2)
    state = m.allocate_inference_cache(len(lengths))
    m(earlier, state=state)
    alone = [tuple(t[i : i + 1].clone() for t in state) for i in range(len(lengths))]
    out = m(tokens, state=state, cu_seqlens=cu)
    for i, (begin, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:])):
        expected = m(tokens[:, begin:end], state=alone[i])
        assert_close(out[:, begin:end], expected, CHUNKED, f"sequence {i}")
        assert_close(state[0][i], alone[i][0][0], CHUNKED, f"conv_state {i}")
        assert_close(state[1][i], alone[i][1][0], CHUNKED, f"ssm_state {i}")


@torch.no_grad()
def test_state_indices_pick_rows_of_a_pool_and_skip_padding():
    m, hidden = make_mixer(), make_hidden(3, 1)
    pool = m.allocate_inference_cache(5)
    m(make_hidden(5, 4, seed=3), state=pool)
    before = [t.clone() for t in pool]
    rows = [t[[3, 1]].clone() for t in pool]
    out = m(hidden, state=pool, state_indices=torch.tensor([3, -1, 1]))
    expected = m(hidden[[0, 2]], state=tuple(rows))
    assert_close(out[[0, 2]], expected, CHUNKED)
    for after, old, new in zip(pool, before, rows):
        assert torch.equal(after[[0, 2, 4]], old[[0, 2, 4]])
        assert_close(after[[3, 1]], new, CHUNKED)


def test_one_token_with_gradients_is_not_the_gradient_free_step():
    m, hidden = make_mixer(), make_hidden(1, 1).requires_grad_()
    state = m.allocate_inference_cache(1)
    with torch.no_grad():
        m(make_hidden(1, 3), state=state)
    copied = tuple(t.clone() for t in state)
    out = m(hidden, state=state)
    out.square().sum().backward()
    assert hidden.grad.abs().max() > 0 and m.A_log.grad is not None
    with torch.no_grad():
        assert_close(out, m(hidden, state=copied), CHUNKED)
    assert_close(state[1], copied[1], CHUNKED)
    assert not state[1].requires_grad


def test_gradients_match_the_plain_formula():
    m = make_mixer(d_state=5)
    # plain_mamba detaches; differentiate numerically along one direction instead, in fp64
    hidden, direction = make_hidden(2, 9), make_hidden(2, 9, seed=5)
    weight = make_hidden(2, 9, seed=6).double()
    hidden.requires_grad_()
    (m(hidden) * weight.float()).sum().backward()
    eps = 1e-5
    plus, minus = ((plain_mamba(m, hidden.detach().double() + s * eps * direction.double()) * weight).sum() for s in (1, -1))
    expected = (plus - minus) / (2 * eps)
    got = (hidden.grad.double() * direction.double()).sum()
    assert abs(got - expected) <= 1e-4 * abs(expected)
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.abs().max() > 0, name


def test_an_adapter_around_a_projection_counts():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.delta = nn.Parameter(torch.full_like(base.weight, 0.01))

        @property
        def weight(self):
            return self.base.weight

        @property
        def bias(self):
            return self.base.bias

        def forward(self, x):
            return self.base(x) + F.linear(x, self.delta)

    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        m, hidden = make_mixer(), make_hidden(1, 5)
        merged = copy.deepcopy(m)
        with torch.no_grad():
            getattr(merged, name).weight.add_(0.01)
        adapter = Adapter(getattr(m, name))
        setattr(m, name, adapter)
        out = m(hidden)
        assert_close(out, merged(hidden), GEMM, name)
        out.sum().backward()
        assert adapter.delta.grad.abs().max() > 0, name
        with torch.no_grad():
            state, other = m.allocate_inference_cache(1), m.allocate_inference_cache(1)
            assert_close(m(hidden[:, :1], state=state), merged(hidden[:, :1], state=other), GEMM, f"{name}, step")


# --- mamba_ssm's way to pass states ----------------------------------------------------------------------------------


@torch.no_grad()
def test_inference_params_as_mamba_ssm_uses_them():
    m, hidden = make_mixer(), make_hidden(2, 9)
    expected = m(hidden)
    params = InferenceParams(max_seqlen=9, max_batch_size=2)
    for _ in range(2):  # the second time over states that hold an old text: offset 0 begins anew
        outs = [m(hidden[:, :5], params)]
        params.seqlen_offset = 5
        outs.append(m(hidden[:, 5:7], params))  # several tokens on a state: mamba_ssm restarts here, we continue
        params.seqlen_offset = 7
        outs += [m(hidden[:, t : t + 1], params) for t in (7, 8)]
        assert_close(torch.cat(outs, dim=1), expected, CHUNKED)
        params.reset(9, 2)
    conv, ssm = params.key_value_memory_dict[0]
    assert conv.shape == (2, 48, 4) and ssm.shape == (2, 48, 16) and ssm.dtype == torch.float32
    state = MambaState([conv], [ssm])
    shared = InferenceParams.from_state(state, 99, seqlen_offset=9)
    m(hidden[:, :1], shared)
    assert shared.key_value_memory_dict[0][1].data_ptr() == ssm.data_ptr() == state.ssm[0].data_ptr()


# --- dtypes ----------------------------------------------------------------------------------------------------------


def kept(m: Mamba) -> dict[str, torch.Tensor]:
    return {"A_log": m.A_log, "D": m.D, "dt_proj.bias": m.dt_proj.bias}


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().half(), lambda m: m.to("cpu", torch.bfloat16)])  # fmt: skip
def test_decay_parameters_stay_fp32_bit_for_bit(cast):
    m = make_mixer()
    before = {name: p.detach().clone() for name, p in kept(m).items()}
    m.A_log.grad = torch.ones_like(m.A_log)
    objects = {name: id(p) for name, p in kept(m).items()}
    cast(nn.Sequential(m))  # through a parent, as a user would
    for name, p in kept(m).items():
        assert p.dtype == torch.float32 and torch.equal(p, before[name]) and id(p) == objects[name] and p.requires_grad, name
    assert m.in_proj.weight.dtype in HALF and m.conv1d.bias.dtype in HALF and m.dt_proj.weight.dtype in HALF
    assert m.A_log.grad.dtype == torch.float32
    assert m.A_log._no_weight_decay
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        m(make_hidden(1, 3).to(m.in_proj.weight.dtype))


def test_other_casts_are_as_upstream():
    assert {p.dtype for p in make_mixer().double().parameters()} == {torch.float64}
    assert {p.dtype for p in make_mixer().bfloat16().float().parameters()} == {torch.float32}
    assert {p.dtype for p in make_mixer(keep_fp32=False).bfloat16().parameters()} == {torch.bfloat16}
    built = Mamba(16, dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in kept(built).items()} == dict.fromkeys(kept(built), torch.float32)
    assert built.in_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for p in Mamba(16, dtype=torch.float64).parameters()} == {torch.float64}
    empty = Mamba(16, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    assert empty.A_log.dtype == torch.float32 and empty.A_log.device.type == "cpu"


def test_a_foreign_cast_still_works_and_warns_once():
    m, hidden = make_mixer(), make_hidden(1, 6)
    with torch.no_grad():
        expected = m(hidden)
        for p in m.parameters():
            p.data = p.data.bfloat16()
        mamba._warn_half_precision.cache_clear()
        with pytest.warns(UserWarning, match="is torch.bfloat16, expected torch.float32"):
            out = m(hidden.bfloat16())
        assert_close(out.float(), expected, 0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            m(hidden.bfloat16())
            make_mixer().bfloat16()(hidden.bfloat16())
        mamba._warn_half_precision.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_mixer(keep_fp32=False).bfloat16()(hidden.bfloat16())


@torch.no_grad()
def test_autocast_prefills_and_decodes_with_fp32_weights():
    m, hidden = make_mixer(), make_hidden(2, 6)
    expected = m(hidden)
    state = m.allocate_inference_cache(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = [m(hidden[:, :4], state=state), m(hidden[:, 4:5], state=state), m(hidden[:, 5:], state=state)]
    assert_close(torch.cat(out, dim=1).float(), expected, 0.02)
    assert state[0].dtype == state[1].dtype == torch.float32


@torch.no_grad()
def test_state_dtypes():
    m = make_mixer().bfloat16()
    conv, ssm = m.allocate_inference_cache(1)
    assert conv.dtype == torch.bfloat16 and ssm.dtype == torch.float32
    conv, ssm = m.allocate_inference_cache(1, 10, torch.float16, ssm_dtype=torch.bfloat16)
    assert conv.dtype == torch.float16 and ssm.dtype == torch.bfloat16
    conv, ssm = make_mixer().double().allocate_inference_cache(1)
    assert conv.dtype == ssm.dtype == torch.float64


# --- A, made once ----------------------------------------------------------------------------------------------------


def test_A_is_made_once_and_again_whenever_A_log_changes():
    m = make_mixer()

    def current():
        return -torch.exp(m.A_log.detach())

    with torch.no_grad():
        A = m.A()
        assert m.A() is A and torch.equal(A, current())
        m.step(make_hidden(1, 1), *m.allocate_inference_cache(1))
        assert m.A() is A
        m.A_log.add_(0.5)  # in place
        assert torch.equal(m.A(), current())
        m.A()
        m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()})
        assert torch.equal(m.A(), current())
        m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True)
        assert torch.equal(m.A(), current())
        m.A_log.data = m.A_log.data * 0.5  # another storage
        assert torch.equal(m.A(), current())
        m.A_log = nn.Parameter(m.A_log * 2)  # another parameter
        assert torch.equal(m.A(), current())
        m.A_log.data.mul_(0.9)  # leaves no trace ...
        assert torch.equal(m.eval().A(), current())  # ... so this clears it
        m.A()
        assert torch.equal(m.double().A(), current()) and m.A().dtype == torch.float64
    m.float()
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
    with torch.no_grad():
        m.A()
    m(make_hidden(1, 3)).sum().backward()
    assert m.A_log.grad.abs().max() > 0
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(m.A(), current())
        assert torch.equal(copy.deepcopy(m).A(), current())
    with torch.inference_mode():
        other = Mamba(8)
        before = other.A()
        other.A_log.add_(1)
        assert not torch.equal(other.A(), before)


# --- norm and block --------------------------------------------------------------------------------------------------


def test_rms_norm_module():
    norm = randomise(RMSNorm(24, eps=1e-3))
    x, residual = make_hidden(2, 3), make_hidden(2, 3, seed=2)
    assert list(dict(norm.named_parameters())) == ["weight"] and norm.bias is None
    assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-3), 1e-6)
    y, s = norm(x, residual, prenorm=True)
    assert_close(s, x + residual, 1e-7)
    assert_close(y, F.rms_norm(x + residual, (24,), norm.weight, 1e-3), 1e-6)
    assert norm(x.bfloat16(), prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32


@pytest.mark.parametrize("norm_cls", [RMSNorm, nn.LayerNorm])
@torch.no_grad()
def test_block_fused_and_unfused_agree(norm_cls):
    def make(fused, fp32):
        return randomise(Block(24, Mamba, norm_cls, fused_add_norm=fused, residual_in_fp32=fp32))

    x, residual = make_hidden(2, 5), make_hidden(2, 5, seed=2)
    for r in (None, residual):
        fused, plain = (make(f, False)(x, r) for f in (True, False))
        assert_close(fused[0], plain[0], GEMM)
        assert_close(fused[1], plain[1], 1e-7)
    for fused in (True, False):
        hidden, stream = make(fused, True).bfloat16()(x.bfloat16())
        assert hidden.dtype == torch.bfloat16 and stream.dtype == torch.float32
        hidden, stream = make(fused, False).bfloat16()(x.bfloat16())
        assert hidden.dtype == torch.bfloat16 and stream.dtype == torch.bfloat16
        hidden, stream = make(fused, True).double()(x.double(), residual.double())
        assert hidden.dtype == torch.float64 and stream.dtype == torch.float64


# --- the state object ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mamba_state():
    lm = make_lm()
    state = lm.allocate_state(2)
    lm.prefill(torch.randint(0, 61, (2, 7)), state)
    assert len(state) == 3 and state.batch_size == 2 and state.device.type == "cpu"
    assert state.nbytes == 3 * 2 * 64 * (4 + 16) * 4
    assert "3 layers, batch 2, conv (64, 4) torch.float32, ssm (64, 16) torch.float32" in repr(state)

    clone = state.clone()
    picked = state.select([1, 0, 1])
    wide = state.select(torch.tensor([0])).expand(3)
    half = state.to(ssm_dtype=torch.bfloat16)
    saved = [t.clone() for pair in state for t in pair]
    for other in (clone, picked, wide):
        other.zero_()  # memory of their own
    assert all(torch.equal(a, b) for a, b in zip(saved, [t for pair in state for t in pair]))
    assert state.select([1, 0]).ssm[2][0].equal(state.ssm[2][1])
    assert all(row.equal(state.conv[1][0]) for row in state.select([0]).expand(3).conv[1])
    assert half.ssm[0].dtype == torch.bfloat16 and half.conv[0].dtype == torch.float32
    assert state.to("cpu", torch.bfloat16).conv[0].dtype == torch.bfloat16
    assert clone.copy_(state).ssm[1].equal(state.ssm[1])
    with pytest.raises(errors.ShapeError, match="batch 2, expected 1"):
        state.expand(3)
    with pytest.raises(errors.ShapeError, match=r"MambaState.copy_: other is .*batch 3"):
        state.copy_(picked)
    with pytest.raises(errors.ArgumentError, match="1 and 2 layers"):
        MambaState(state.conv[:1], state.ssm[:2])


def test_bad_arguments_are_named_and_nothing_is_written():
    m, hidden = make_mixer(), make_hidden(2, 3)
    conv, ssm = m.allocate_inference_cache(2)
    cases = [
        (errors.ShapeError, r"hidden_states has shape \(2, 24\), expected \(batch, seqlen, d_model=24\)", lambda: m(hidden[:, 0])),
        (errors.ShapeError, r"expected \(batch, seqlen, d_model=24\)", lambda: m(hidden[..., :23])),
        (errors.ShapeError, r"conv_state has shape \(2, 48, 3\), expected \(batch=2", lambda: m(hidden, state=(conv[..., 1:], ssm))),
        (errors.ShapeError, r"ssm_state has shape \(1, 48, 16\), expected \(batch=2", lambda: m(hidden, state=(conv, ssm[:1]))),
        (errors.ArgumentError, "state_indices is given for seqlen=3", lambda: m(hidden, state=(conv, ssm), state_indices=torch.arange(2))),
        (errors.ArgumentError, "both given", lambda: m(hidden, InferenceParams(1, 1), state=(conv, ssm))),
        (errors.ArgumentError, "layer_idx is None", lambda: Mamba(24)(hidden, InferenceParams(1, 1))),
        (errors.ShapeError, r"Mamba.step: hidden_states has shape \(2, 3, 24\)", lambda: m.step(hidden, conv, ssm)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert not conv.any() and not ssm.any()
