"""The Mamba block and its state: one meaning whether the tokens come at once, in pieces, packed or one by one."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import cobra_kernels
from cobra_kernels import errors
from cobra_kernels.modules import Block, InferenceParams, Mamba, MambaState, RMSNorm, mamba
from tests.modules.models import make_lm, randomise
from tests.tolerances import CHUNKED, GEMM, assert_close, relative_error

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


# --- training: the fused block, and what must not go through it --------------------------------------------------------

PARTS = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


def fused_calls(call) -> int:
    """How many times call() ran mamba_inner."""
    cobra_kernels.reset_call_counts()
    call()
    return sum(n for (op, _), n in cobra_kernels.call_counts().items() if op == "mamba_inner")


def gradients(m: nn.Module, hidden: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """Of every parameter and of the input, for a loss in which every output counts differently."""
    leaf = hidden.detach().requires_grad_()
    m.zero_grad()
    out = m(leaf, **options)
    (out.float() * make_hidden(*out.shape, seed=9)).sum().backward()
    return {"hidden": leaf.grad, **{name: p.grad for name, p in m.named_parameters() if p.requires_grad}}


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"conv_bias": False}, {"d_conv": 2, "d_state": 5, "dt_rank": 7}], ids=str)
def test_fused_and_unfused_training_agree(options):
    m, hidden = make_mixer(**options), make_hidden(2, 70)
    assert fused_calls(lambda: m(hidden)) == 1
    with torch.no_grad():
        assert fused_calls(lambda: m(hidden)) == 0
    fused = gradients(m, hidden)
    m.use_fast_path = False
    assert fused_calls(lambda: m(hidden)) == 0
    unfused = gradients(m, hidden)
    assert fused.keys() == unfused.keys()
    for name, want in unfused.items():
        assert_close(fused[name], want, GEMM, name)


def test_fused_and_unfused_training_agree_on_states_and_packed_sequences():
    m, hidden, cu = make_mixer(), make_hidden(1, 40), torch.tensor([0, 7, 7, 36])
    for packed, rows in ((None, 1), (cu, 3)):
        state = m.allocate_inference_cache(rows)
        with torch.no_grad():
            m(make_hidden(rows, 5, seed=3), state=state)
        results = []
        for m.use_fast_path in (True, False):
            mine = tuple(t.clone() for t in state)
            end = 36 if packed is not None else 40
            results.append({**gradients(m, hidden, state=mine, cu_seqlens=packed), "conv": mine[0], "ssm": mine[1]})
            results[-1]["hidden"] = results[-1]["hidden"][:, :end]
            assert not mine[1].requires_grad
        for name, want in results[1].items():
            assert_close(results[0][name], want, GEMM, name)


def test_padding_after_packed_sequences_is_zero_whatever_the_path():
    m, hidden, cu = make_mixer(bias=True), make_hidden(1, 40), torch.tensor([0, 7, 7, 36])
    assert m.out_proj.bias.abs().min() > 0
    fused = m(hidden, cu_seqlens=cu)
    m.use_fast_path = False
    with torch.no_grad():
        without_gradients = m(hidden, cu_seqlens=cu)
    for out in (fused, m(hidden, cu_seqlens=cu), without_gradients):
        assert not out[:, 36:].any()
        assert_close(out, fused, GEMM)


def test_one_frozen_layer_or_all_of_them_still_fuse():
    m, hidden = make_mixer(), make_hidden(1, 9)
    want = gradients(m, hidden)
    m.out_proj.requires_grad_(False)
    got = gradients(m, hidden)
    assert "out_proj.weight" not in got and all(torch.equal(g, want[name]) for name, g in got.items())
    m.requires_grad_(False)
    assert fused_calls(lambda: m(hidden)) == 0  # no gradient wanted at all
    leaf = hidden.detach().requires_grad_()
    assert fused_calls(lambda: m(leaf)) == 1
    got = gradients(m, hidden)
    assert got.keys() == {"hidden"} and torch.equal(got["hidden"], want["hidden"])
    assert all(p.grad is None for p in m.parameters())


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, w):
        return 2 * w


def doubling(m: nn.Module, name: str, how: str) -> None:
    """Makes the layer's own forward give twice its product, in one of the ways that leave `.weight` alone or change it late."""
    layer = getattr(m, name)
    if how == "subclass":
        kind = type(layer)
        layer.__class__ = type("Doubled", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    elif how == "forward hook":
        layer.register_forward_hook(lambda module, args, out: 2 * out)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif how == "forward replaced":
        plain = layer.forward
        layer.forward = lambda x: 2 * plain(x)
    elif how == "parametrization":
        parametrize.register_parametrization(layer, "weight", Doubled())


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ["subclass", "forward hook", "pre-hook", "forward replaced", "parametrization"])
def test_a_layer_that_is_not_plain_runs_its_own_forward(name, how):
    """Forward, gradients, packed sequences and single steps: as if its weight were what its forward makes of it."""
    m, hidden = make_mixer(conv_bias=False), make_hidden(1, 9)
    with torch.no_grad():
        m.dt_proj.bias.zero_()  # a bias would be doubled by some ways and not by others
    doubled = copy.deepcopy(m)
    with torch.no_grad():
        getattr(doubled, name).weight.mul_(2)
    want = gradients(doubled, hidden)
    doubling(m, name, how)
    assert fused_calls(lambda: m(hidden)) == (name == "in_proj")
    got = gradients(m, hidden)
    assert_close(m(hidden), doubled(hidden), GEMM)
    assert_close(got["hidden"], want["hidden"], GEMM, "hidden")
    for key, gradient in got.items():
        layer = key.split(".")[0]
        if key == f"{name}.bias":
            continue  # its gradient is doubled by some ways and not by others
        expected = want[key.replace(".parametrizations", "").replace(".original", "")]
        assert_close(gradient, 2 * expected if layer == name else expected, GEMM, key)
    with torch.no_grad():
        states = [x.allocate_inference_cache(2) for x in (m, doubled)]
        cu = torch.tensor([0, 4, 9])
        assert_close(m(hidden, state=states[0], cu_seqlens=cu), doubled(hidden, state=states[1], cu_seqlens=cu), GEMM, "packed")
        token, indices = make_hidden(3, 1, seed=4), torch.tensor([1, -1, 0])
        ours = m(token, state=states[0], state_indices=indices)
        assert_close(ours[[0, 2]], doubled(token, state=states[1], state_indices=indices)[[0, 2]], GEMM, "step")
        for a, b in zip(*states):
            assert_close(a, b, GEMM, "state")


def test_backward_hooks_and_pruning_and_spectral_norm_are_seen():
    for touch in (
        lambda layer, seen: layer.register_full_backward_hook(lambda *a: seen.append("backward")),
        lambda layer, seen: layer.register_full_backward_pre_hook(lambda *a: seen.append("pre")),
        lambda layer, seen: (prune.l1_unstructured(layer, "weight", 0.5), seen.append("pruned")),
        lambda layer, seen: (nn.utils.parametrizations.spectral_norm(layer), seen.append("normed")),
    ):
        for name in PARTS[1:]:
            m, seen = make_mixer(), []
            touch(getattr(m, name), seen)
            assert fused_calls(lambda: gradients(m, make_hidden(1, 5))) == 0
            assert seen, name
    m, seen = make_mixer(), []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module).__name__)):
        assert fused_calls(lambda: m(make_hidden(1, 5))) == 0
    assert sorted(set(seen)) == ["Conv1d", "Linear", "Mamba"] and fused_calls(lambda: m(make_hidden(1, 5))) == 1


def test_a_bias_of_x_proj_is_served_unfused():
    m, hidden = make_mixer(), make_hidden(1, 5)
    plain = m(hidden)
    biased = nn.Linear(m.d_inner, m.dt_rank + 2 * m.d_state)
    with torch.no_grad():
        biased.weight.copy_(m.x_proj.weight)
        biased.bias.zero_()
    m.x_proj = biased
    assert fused_calls(lambda: assert_close(m(hidden), plain, GEMM)) == 0
    assert gradients(m, hidden)["x_proj.bias"].abs().max() > 0


@pytest.mark.parametrize("targets", [*((name,) for name in PARTS), PARTS], ids="-".join)
def test_peft_adapters_get_gradients(targets):
    """LoRA on any of the five layers: every matrix of every adapter, once B is not 0 any more; merged weights agree."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    m, hidden = make_mixer(), make_hidden(2, 9)
    rank = m.d_inner if "conv1d" in targets else 4  # an adapter of a depthwise convolution needs a multiple of its groups
    model = peft.get_peft_model(nn.ModuleDict({"mixer": m}), peft.LoraConfig(r=rank, lora_alpha=8, target_modules=list(targets)))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # peft starts with 0, where A has no gradient
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    mixer = model.base_model.model["mixer"]
    fused = fused_calls(lambda: gradients(mixer, hidden))
    assert fused == (targets == ("in_proj",))
    adapters = {name: p.grad for name, p in mixer.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * len(targets)
    for name, grad in adapters.items():
        assert grad is not None and grad.abs().max() > 0, name
    assert all(p.grad is None for name, p in mixer.named_parameters() if "lora_" not in name)
    with torch.no_grad():
        state, out = mixer.allocate_inference_cache(2), mixer(hidden)
        steps = torch.cat([mixer.step(hidden[:, t : t + 1], *state)[0] for t in range(9)], dim=1)
        assert_close(steps, out, CHUNKED, "step^L with adapters")
        if "conv1d" in targets:
            return  # peft cannot merge into a depthwise convolution
        merged = model.merge_and_unload()["mixer"]
        assert_close(merged(hidden), out, GEMM, "merged")
        assert fused_calls(lambda: merged(hidden)) == 0 and type(merged.out_proj) is nn.Linear


def test_activation_checkpointing_gives_the_same_bits():
    m, hidden = make_mixer(), make_hidden(2, 20)
    want = gradients(m, hidden)
    leaf = hidden.detach().requires_grad_()
    m.zero_grad()
    out = checkpoint(m, leaf, use_reentrant=False)
    (out * make_hidden(*out.shape, seed=9)).sum().backward()
    for name, p in m.named_parameters():
        assert torch.equal(p.grad, want[name]), name
    assert torch.equal(leaf.grad, want["hidden"])


@pytest.mark.parametrize("fast", [True, False])
def test_compile_of_the_block_forward_and_backward(fast):
    block = randomise(Block(24, Mamba, RMSNorm, fused_add_norm=True))
    block.mixer.use_fast_path = fast
    hidden, residual = make_hidden(2, 9), make_hidden(2, 9, seed=2)

    def loss(f):
        block.zero_grad()
        leaf = hidden.detach().requires_grad_()
        y, stream = f(leaf, residual)
        (y.square().sum() + stream.square().sum()).backward()
        return {"hidden": leaf.grad, **{name: p.grad.clone() for name, p in block.named_parameters()}}

    want = loss(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for name, grad in loss(compiled).items():
        assert_close(grad, want[name], GEMM, name)


def test_func_grad_of_a_block():
    m, hidden = make_mixer(), make_hidden(1, 9)
    want = gradients(m, hidden)
    parameters = {name: p.detach() for name, p in m.named_parameters()}

    def loss(parameters):
        return (torch.func.functional_call(m, parameters, (hidden,)) * make_hidden(1, 9, seed=9)).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # each op says that the reference serves transforms
        got = torch.func.grad(loss)(parameters)
    for name, grad in got.items():
        assert_close(grad, want[name], GEMM, name)


def test_training_under_autocast():
    m, hidden = make_mixer(), make_hidden(2, 40)
    want = gradients(m, hidden)
    results = []
    for m.use_fast_path in (True, False):
        m.zero_grad()
        leaf = hidden.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = m(leaf)
        assert out.dtype == torch.bfloat16
        (out.float() * make_hidden(*out.shape, seed=9)).sum().backward()
        results.append({"hidden": leaf.grad, **{name: p.grad for name, p in m.named_parameters()}})
    for name, exact in want.items():
        fused, unfused = (relative_error(r[name], exact) for r in results)
        assert results[0][name].dtype == torch.float32 and fused <= max(2 * unfused, 5e-3), (name, fused, unfused)


def test_a_fused_block_keeps_half_of_what_the_ops_keep():
    def kept(m, hidden) -> int:
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            out = m(hidden)
        assert out.requires_grad
        return sum(storages.values())

    m, lengths = make_mixer(64), (64, 576)
    per_token = {}
    for m.use_fast_path in (True, False):
        few, many = (kept(m, make_hidden(1, n, 64)) for n in lengths)
        per_token[m.use_fast_path] = (many - few) / 512
    # hidden, xz and x_proj's output; the ops one by one also keep convolution, delta, the scan's output and its states
    assert per_token[True] == 4 * (64 + 2 * 128 + 4 + 32)
    assert per_token[True] < 0.55 * per_token[False]


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
