"""What training code does to a model: adapters, sharding, checkpointing, compiling, all on the classes that mamba_ssm's names give."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import cobra_kernels
from tests.tolerances import GEMM, assert_close

pytestmark = pytest.mark.usefixtures("shims")
LAYERS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def make():
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=45, ssm_cfg={"layer": "Mamba1", "d_state": 4}))


def tokens():
    return torch.randint(45, (2, 11), generator=torch.Generator().manual_seed(1))


def loss(model):
    ids = tokens()
    return F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fused_calls(f) -> int:
    cobra_kernels.reset_call_counts()
    f()
    return sum(n for (op, _), n in cobra_kernels.call_counts().items() if op == "mamba_inner")


class Adapter(nn.Module):
    """LoRA by hand: base(x) + up(down(x)), the base frozen."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_down = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.lora_up = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.lora_down.T @ self.lora_up.T


def adapt_by_hand(model, targets):
    model.requires_grad_(False)
    for layer in model.backbone.layers:
        for target in targets:
            setattr(layer.mixer, target, Adapter(getattr(layer.mixer, target)))
    return model


def adapt_by_peft(model, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))


@pytest.mark.parametrize("targets", [("in_proj",), ("out_proj",), LAYERS], ids="-".join)
@pytest.mark.parametrize("adapt", [adapt_by_hand, adapt_by_peft])
def test_adapters_train_and_are_used(adapt, targets):
    plain = loss(make())
    model = adapt(make(), targets)
    grads = {}
    fused = fused_calls(lambda: grads.update(gradients(model)))
    assert fused == (2 if targets == ("in_proj",) else 0)  # the fused block is given weights: only what is outside it may be wrapped
    assert len(grads) == 2 * 2 * len(targets) and all("lora" in name for name in grads)
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
    assert (loss(model) - plain).abs() > 1e-4
    if adapt is adapt_by_peft:
        before = loss(model)
        assert_close(loss(model.merge_and_unload()), before, GEMM)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, **options):
    """As FSDP2's tutorial: each block, then the rest."""
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in model.backbone.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def test_fsdp2(one_process):
    """Gradients and an optimiser's step, the same bits as without; the fused block still runs, on the gathered weights."""
    model = make()
    want = gradients(model)
    sharded = shard(copy.deepcopy(model))
    assert isinstance(sharded.backbone.layers[0], FSDPModule)
    got = {}
    assert fused_calls(lambda: got.update(gradients(sharded))) == 2
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert torch.equal(grad.full_tensor(), want[name]), name
    for m in (model, sharded):
        torch.optim.AdamW(m.parameters(), 1e-2).step()
    for (name, p), q in zip(sharded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q), name
    state = sharded.state_dict()
    assert state.keys() == model.state_dict().keys()


def test_fsdp2_in_mixed_precision(one_process):
    """fp32 weights, computed with in bf16: that of a model whose parameters were all cast, A_log too, as FSDP casts them.

    cast_forward_inputs=False, or FSDP rounds the residual stream, which is fp32, before each block.
    """
    model = make()
    sharded = shard(copy.deepcopy(model), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False))
    for p in model.parameters():
        p.data = p.data.bfloat16()
    with pytest.warns(UserWarning, match="A_log"):
        want = gradients(model)
    for name, grad in gradients(sharded).items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad.full_tensor(), want[name].float()), name


@torch.no_grad()
def test_fsdp2_gathers_what_the_optimizer_wrote(one_process):
    """Without gradients the block keeps what it made of A_log; FSDP2 fills the gathered A_log anew, at one address."""
    model = make()
    sharded = shard(copy.deepcopy(model))
    losses = []
    for _ in range(3):
        losses.append(loss(sharded))
        assert torch.equal(losses[-1], loss(model))
        for m in (model, sharded):
            for layer in m.backbone.layers:
                layer.mixer.A_log.add_(1.0)
                layer.mixer.D.mul_(3.0)
    assert len({float(value) for value in losses}) == 3


@pytest.mark.parametrize("how", ["by_layer", "by_wrapper"])
def test_activation_checkpointing_gives_the_same_bits(how):
    from mamba_ssm.modules.block import Block

    model = make()
    want = gradients(model)
    if how == "by_layer":
        for layer in model.backbone.layers:
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    else:  # as Cobra's training does: every Block, found by its class
        wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda part: isinstance(part, Block))
    got = {}
    assert fused_calls(lambda: got.update(gradients(model))) == 4  # each block twice
    for name, grad in got.items():
        assert torch.equal(grad, want[name.replace("_checkpoint_wrapped_module.", "")]), name


def test_compile_of_the_language_model():
    """One graph, forward and backward."""
    model = make()
    want = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(compiled).items()}
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert_close(grad, want[name], GEMM, name)


def test_compile_of_the_functions():
    """What a foreign module calls, in one graph."""
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    def f(x, weight, A, B, projection):
        x = rms_norm_fn(x.transpose(1, 2), weight[:, 0], None).transpose(1, 2)
        y = selective_scan_fn(causal_conv1d_fn(x, weight, activation="silu"), x, A, B, B, delta_softplus=True)
        xz = torch.cat([y, x], dim=1)
        return mamba_inner_fn(xz, weight[:, None], None, projection[:7], projection[:6, :1], projection[6:, :6], None, A)

    g = torch.Generator().manual_seed(0)
    x, weight, A, B, projection = (torch.randn(*s, generator=g) for s in ((2, 6, 9), (6, 4), (6, 3), (2, 3, 9), (11, 6)))
    arguments = [t.requires_grad_() for t in (x, weight, -A.abs(), B, projection)]
    want = f(*arguments)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(*arguments)
    assert_close(got, want, GEMM)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), arguments) for out in (got, want)), strict=True):
        assert_close(a, b, GEMM)
