"""Hugging Face transformers on our kernels: each family against its own torch path, logits, gradients, generation, padding, adapters."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
import torch

import cobra_kernels
from cobra_kernels import compat
from cobra_kernels.linear import RoutedLinear
from tests.tolerances import relative_error

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BASE = {"vocab_size": 50, "hidden_size": 32, "pad_token_id": 0, "eos_token_id": 2}
ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4}
MAMBA1 = {
    "Mamba": {"num_hidden_layers": 2, "state_size": 8},
    "FalconMamba": {"num_hidden_layers": 2, "state_size": 8},
    "Jamba": {"num_hidden_layers": 2, "mamba_d_state": 8, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_key_value_heads": 2, **ATTENTION},
    "Zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "mamba_d_state": 8, "n_mamba_heads": 2,
              "num_key_value_heads": 4, **ATTENTION},
}  # fmt: skip
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "num_key_value_heads": 2, **ATTENTION}
MAMBA2 = {
    "Mamba2": {"num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "Bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1], **HEADS},
    "Zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 8, **ATTENTION},
    "FalconH1": {"num_hidden_layers": 2, "mamba_d_ssm": 64, **HEADS},
    "GraniteMoeHybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "num_local_experts": 2,
                         "shared_intermediate_size": 32, **HEADS},
    "NemotronH": {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
                  "n_groups": 2, "head_dim": 8, "num_key_value_heads": 2, **ATTENTION},
}  # fmt: skip
# Of the many families that have no more than the convolution from us.
CONVOLUTION = {"Lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_key_value_heads": 2, **ATTENTION}}
FAMILIES = MAMBA1 | MAMBA2 | CONVOLUTION
every_family = pytest.mark.parametrize("family", FAMILIES)
mamba1_families = pytest.mark.parametrize("family", MAMBA1)
PROJECTIONS = ("in_proj", "x_proj", "out_proj")
FUSED = ("Mamba",)  # whose training step is mamba_inner


def make(family: str, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**BASE | FAMILIES[family] | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if any(part in name for part in PROJECTIONS):
            p.data.mul_(4)  # a fresh mixer adds next to nothing to what it is given
        if "conv1d.bias" in name:
            p.data.uniform_(-0.5, 0.5)  # 0 in a fresh model: what padding leaves behind the convolution would not be seen
    return model


@pytest.fixture(autouse=True)
def undone():
    yield
    compat.undo()


def tokens(rows=2, length=11):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def padded(side: str):
    """Rows of 11 and 6 tokens, and their mask."""
    ids, mask = tokens(), torch.ones(2, 11, dtype=torch.long)
    hidden = slice(0, 5) if side == "left" else slice(6, 11)
    ids[1, hidden], mask[1, hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model, **inputs):
    """Of a loss that leaves padding out."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    model.train().zero_grad()
    model(**inputs, labels=inputs["input_ids"].masked_fill(mask == 0, -100)).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(got, want, limit=1e-4):
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert relative_error(got[name], gradient) <= limit, name


def ops_that_ran():
    return {op for op, _ in cobra_kernels.call_counts()}


@every_family
def test_logits_gradients_and_generation(family):
    model, ids = make(family), {"input_ids": tokens(), "attention_mask": torch.ones(2, 11, dtype=torch.long)}

    def everything():
        with torch.no_grad():
            out = model(**ids).logits, model.generate(**ids, max_new_tokens=6, do_sample=False)
        return *out, gradients(model, **ids)

    cobra_kernels.reset_call_counts()
    logits, generated, grads = everything()
    assert not ops_that_ran()
    assert compat.apply_to_transformers(model)
    cobra_kernels.reset_call_counts()
    got_logits, got_generated, got_grads = everything()
    ran = ops_that_ran()
    assert ran >= {"causal_conv1d", "causal_conv1d_update"}
    assert family in CONVOLUTION or "selective_state_update" in ran
    assert family not in MAMBA1 or ran >= {"selective_scan", "selective_scan_bwd"}
    assert ("mamba_inner_bwd" if family in FUSED else "causal_conv1d_bwd") in ran
    assert relative_error(got_logits, logits) <= 1e-5
    assert torch.equal(got_generated, generated)
    same_gradients(got_grads, grads)


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_padding(family, side):
    model, inputs = make(family), padded(side)

    def everything():
        with torch.no_grad():
            new = model.generate(**inputs, max_new_tokens=5, do_sample=False) if side == "left" else None
            return model(**inputs).logits, new, gradients_of(model, inputs)

    def gradients_of(model, inputs):
        with torch.enable_grad():
            return gradients(model, **inputs)

    logits, new, grads = everything()
    compat.apply_to_transformers(model)
    got_logits, got_new, got_grads = everything()
    assert relative_error(got_logits, logits) <= 1e-5
    assert new is None or torch.equal(got_new, new)
    same_gradients(got_grads, grads)


@every_family
def test_bfloat16(family):
    """As close to the fp32 model as transformers' own bf16 is, and generating what forwards without a cache say."""
    model, ids = make(family), tokens()
    with torch.no_grad():
        exact = model(ids).logits
        model.to(torch.bfloat16)
        own = relative_error(model(ids).logits.float(), exact)
        compat.apply_to_transformers(model)
        assert relative_error(model(ids).logits.float(), exact) <= 1.5 * own
        out = model(ids, use_cache=True)
        cache = {name: out[name] for name in ("cache_params", "past_key_values") if name in out}
        token = out.logits[:, -1:].argmax(-1)
        cached = model(token, use_cache=True, **cache).logits[:, -1]
        assert relative_error(cached.float(), model(torch.cat([ids, token], 1)).logits[:, -1].float()) <= 2 * own
    assert all(bool(g.isfinite().all()) for g in gradients(model, input_ids=ids).values())


@mamba1_families
def test_beams(family):
    """Beam search reorders the rows of a cache."""
    model, ids = make(family), tokens()
    arguments = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with torch.no_grad():
        want = model.generate(ids, **arguments)
        compat.apply_to_transformers(model)
        assert torch.equal(model.generate(ids, **arguments), want)


@mamba1_families
def test_continuing_a_cache(family):
    """transformers starts the recurrence again at a second prompt; with continue_from_cache every split is the whole."""
    model, ids = make(family), tokens()
    for name, p in model.named_parameters():
        if any(part in name for part in PROJECTIONS):
            p.data.mul_(3)
    argument = "cache_params" if family.endswith("Mamba") else "past_key_values"

    def in_two(at):
        first = model(ids[:, :at], use_cache=True)
        return torch.cat([first.logits, model(ids[:, at:], use_cache=True, **{argument: getattr(first, argument)}).logits], 1)

    with torch.no_grad():
        whole = model(ids).logits
        assert relative_error(in_two(4), whole) > 1e-6  # the day this fails, the option has no use any more
        done = compat.apply_to_transformers(model, continue_from_cache=True)
        assert any(name.endswith("Mixer.forward") for name in done)
        for at in range(1, 11):
            assert relative_error(in_two(at), whole) <= 1e-5, f"split at {at}"


def test_undo_and_again():
    model = make("Mamba")
    module = sys.modules["transformers.models.mamba.modeling_mamba"]
    before = {name: getattr(module, name) for name in compat.transformers.FUNCTIONS if hasattr(module, name)}
    forward = module.MambaMixer.forward
    first = compat.apply_to_transformers(model, continue_from_cache=True)
    replaced = {name.removeprefix(f"{module.__name__}.") for name in first}
    assert replaced == {*before, "MambaMixer.forward", "MambaForCausalLM.forward"} and len(first) == len(replaced)
    model(tokens())
    assert type(model.lm_head) is RoutedLinear
    assert compat.apply_to_transformers(model, continue_from_cache=True) == []
    compat.undo()
    assert all(getattr(module, name) is value for name, value in before.items()) and module.MambaMixer.forward is forward
    assert type(model.lm_head) is torch.nn.Linear
    compat.undo()


@mamba1_families
def test_the_option_may_come_later(family):
    """install() changes a modeling file when it is imported; asking for continue_from_cache afterwards is still heard."""
    model = make(family)
    assert compat.apply_to_transformers()
    done = compat.apply_to_transformers(model, continue_from_cache=True)
    assert any(name.endswith("Mixer.forward") for name in done)


class Offloaded:
    """What accelerate hangs on a layer whose weights come only when it is called."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1

    def post_forward(self, module, output):
        return output


@pytest.mark.parametrize("change", ["weight_norm", "offloaded", "fp64", "gelu", "checkpointing"])
@pytest.mark.parametrize("family", FUSED)
def test_what_is_not_plain(family, change):
    """Mixers that our forward does not stand for, and dtypes and activations that our kernels lack, keep transformers' way."""
    model, ids = make(family, hidden_act="gelu" if change == "gelu" else "silu"), {"input_ids": tokens()}
    if change == "weight_norm":
        mixer = model.backbone.layers[0].mixer
        torch.nn.utils.parametrizations.weight_norm(mixer.conv1d)
        torch.nn.utils.parametrizations.weight_norm(mixer.x_proj)
    hook = Offloaded()
    if change == "offloaded":
        conv1d = model.backbone.layers[0].mixer.conv1d
        conv1d._hf_hook, conv1d.forward = hook, conv1d.forward
    if change == "fp64":
        model.double()
    if change == "checkpointing":
        model.gradient_checkpointing_enable()
    with torch.no_grad():
        logits = model(**ids).logits
    generated, grads = model.generate(**ids, max_new_tokens=3, do_sample=False), gradients(model, **ids)
    compat.apply_to_transformers(model)
    hook.calls = 0
    with torch.no_grad():
        assert relative_error(model(**ids).logits, logits) <= 1e-5
    assert hook.calls == (change == "offloaded")
    assert torch.equal(model.generate(**ids, max_new_tokens=3, do_sample=False), generated)
    same_gradients(gradients(model, **ids), grads)


def test_compiled():
    """One graph without a cache; with one, pieces of a prompt continue each other."""
    model, ids, argument = make("Mamba", num_hidden_layers=1), tokens(), "cache_params"  # one family, one layer: compiling takes its time
    torch.compiler.reset()
    compat.apply_to_transformers(model, continue_from_cache=True)
    with torch.no_grad():
        want = model(ids).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_error(compiled(ids, use_cache=False).logits, want) <= 1e-5
        compiled = torch.compile(model, backend="eager")
        cache = getattr(model(ids[:, :6], use_cache=True), argument)
        assert relative_error(compiled(ids[:, 6:], use_cache=True, **{argument: cache}).logits, want[:, 6:]) <= 1e-5


def test_a_model_that_is_gone_is_forgotten():
    model = make("Mamba")
    compat.apply_to_transformers(model)
    model(tokens())
    head = weakref.ref(model.lm_head)
    del model
    gc.collect()
    assert head() is None


def test_one_model_leaves_other_families_alone():
    model = make("Mamba")
    make("FalconMamba")
    done = compat.apply_to_transformers(model)
    assert done and all(name.startswith("transformers.models.mamba.") for name in done)


@pytest.mark.parametrize("family", ["Mamba", "FalconMamba"])
def test_adapters_train(family):
    """LoRA around each layer of a mixer, in training, where transformers hands weights to the fused function."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["in_proj", "x_proj"]  # peft itself refuses out_proj and conv1d of these models
    model = peft.get_peft_model(make(family), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    compat.apply_to_transformers(model)
    grads = gradients(model, input_ids=tokens())
    for target in targets:
        found = [g for name, g in grads.items() if f"{target}.lora_" in name]
        assert len(found) == 4 and all(g.abs().sum() > 0 for g in found), target


def test_install_before_the_import():
    """One line before `import transformers`, in a process of its own."""
    code = """
import sys, torch, cobra_kernels, cobra_kernels.compat
cobra_kernels.compat.install()
from transformers import MambaConfig, MambaForCausalLM

def ops():
    cobra_kernels.reset_call_counts()
    model(ids, labels=ids).loss.backward()
    return sorted({op for op, _ in cobra_kernels.call_counts()})

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()
ids = torch.randint(3, 50, (1, 9))
model.generate(ids, max_new_tokens=3, do_sample=False)
print(sorted({op for op, _ in cobra_kernels.call_counts()}))
model.train()
print(ops())
from transformers.models.mamba import modeling_mamba
print(hasattr(modeling_mamba.MambaMixer.forward, "_cobra_kernels"))
cobra_kernels.compat.undo()  # the names of mamba_ssm are left, which a subprocess finds too
model.eval()
cobra_kernels.reset_call_counts()
model.generate(ids, max_new_tokens=3, do_sample=False)
print(sorted({op for op, _ in cobra_kernels.call_counts()}))
model.train()
print(ops())
model.requires_grad_(False)
model.backbone.embeddings.requires_grad_(True)
print(ops())
from transformers import Mamba2Config, Mamba2ForCausalLM
model = Mamba2ForCausalLM(Mamba2Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1))
print(ops())
cobra_kernels.compat.uninstall()
from transformers import FalconMambaConfig, FalconMambaForCausalLM
model = FalconMambaForCausalLM(FalconMambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8))
print(ops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    served, trained, replaced, served_by_name, trained_by_name, frozen, mamba2, uninstalled = done.stdout.strip().splitlines()
    generation = "['causal_conv1d', 'causal_conv1d_update', 'selective_scan', 'selective_state_update']"
    assert served == served_by_name == generation
    assert "'mamba_inner_bwd'" in trained and "'mamba_inner_bwd'" in trained_by_name and replaced == "True"
    assert "mamba_inner" not in frozen and "'selective_scan_bwd'" in frozen
    assert mamba2 == "['causal_conv1d', 'causal_conv1d_bwd']"
    assert uninstalled == "[]"
