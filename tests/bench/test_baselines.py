"""The LLaVA family and the costs of both families: counted parameters, counted FLOPs, published figures, and that every setting of a
model computes the same thing."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cobra_kernels
from benchmarks.baselines import memory
from benchmarks.baselines.costs import REAL, SHAPES, TINY, TWINS, LdpProjector, MambaShape, shape_of
from benchmarks.baselines.pool import Pool
from benchmarks.baselines.subject import build, made_on
from benchmarks.ops.bench_selective_scan import cost as scan_cost

FAMILY = [shape.name for shape in TINY]
EVERYONE = [*FAMILY, "cobra-tiny"]


@pytest.fixture(scope="module")
def subject():
    """subject(name): a tiny model, built once for this file; gradients off as in every benchmark."""
    with torch.no_grad():
        yield functools.cache(build)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYONE)
def test_parameters_are_those_of_the_model(subject, name):
    model = subject(name)
    assert model.parameters == model.shape.parameters
    buffers = sum(b.nbytes for m in model.modules.values() for b in m.buffers())
    assert model.nbytes - buffers == model.shape.weight_bytes(4)


@pytest.mark.parametrize("name", [*(s.name for s in REAL), *(s.name for s in TWINS), "cobra-3b", "cobra-laptop"])
def test_real_sizes_are_built_on_the_meta_device(name):
    """Every parameter in the wanted dtype, none of them real."""
    model = build(name, "meta", torch.bfloat16)
    assert model.parameters == model.shape.parameters
    tensors = [p for m in model.modules.values() for p in m.parameters()]
    assert all(p.is_meta for p in tensors)
    assert sum(p.nbytes for p in tensors) == model.shape.weight_bytes(2)  # Cobra keeps A, D and dt's bias in fp32


@pytest.mark.parametrize("name", EVERYONE)
def test_every_parameter_has_a_value(subject, name):
    """Built without torch's initialisation and filled by hand: nothing is forgotten, no two rows or matrices are alike."""
    model = subject(name)
    for part, module in model.modules.items():
        firsts = [p[0].flatten()[:24] for key, p in module.named_parameters() if p.dim() == 2 and not key.endswith("A_log") and p.shape[1] >= 24]
        assert len(torch.stack(firsts).unique(dim=0)) == len(firsts), part
        for key, p in module.named_parameters():
            assert p.isfinite().all() and (p.abs() < 10).all(), (part, key)
            if p.dim() == 2 and not key.endswith("A_log") and p.numel() > 1000:
                assert 0.015 < p.std().item() < 0.025, (part, key)
                assert len(p.unique(dim=0)) == len(p), (part, key)
            elif p.dim() == 1 and "norm" in key:
                assert (p == (0 if key.endswith("bias") else 1)).all(), (part, key)


def test_a_recurrence_keeps_its_decays(subject):
    import cobra

    with pytest.warns(cobra.RandomWeightsWarning):
        expected = dict(cobra.from_preset("cobra-tiny").llm.named_parameters())
    for key, p in subject("cobra-tiny").modules["language"].named_parameters():
        if key.endswith(("A_log", ".D")):
            assert torch.equal(p, expected[key])
        elif key.endswith("dt_proj.bias"):  # drawn: between the same bounds
            assert (torch.nn.functional.softplus(p) > 9e-4).all() and (torch.nn.functional.softplus(p) < 0.11).all()


def test_published_parameter_counts():
    """Llama-2-7B, Phi-2, Mamba-2.8B; CLIP-L/336's tower has 303,507,456, of which a final LayerNorm (2048) is not used."""
    counts = {name: shape_of(name).parameters for name in ("llava-1.5-7b", "tinyllava-3.1b", "cobra-3b")}
    assert counts["llava-1.5-7b"] == {"vision": 303_507_456 - 2048, "projector": 20_979_712, "language": 6_738_415_616}
    assert counts["tinyllava-3.1b"]["language"] == 2_779_683_840
    assert counts["cobra-3b"]["language"] == 2_768_345_600
    assert counts["cobra-3b"]["projector"] == 47_789_568
    assert [shape.image_tokens for shape in REAL] == [576, 729, 144, 576]
    assert shape_of("cobra-3b").image_tokens == 729


def test_twins_keep_the_ratios():
    """Width, depth and image tokens are to each other as in the real sizes; cobra-laptop is cobra-3b's."""
    pairs = [*zip(REAL, TWINS), (shape_of("cobra-3b"), shape_of("cobra-laptop"))]
    for real, twin in pairs:
        assert twin.image_tokens == real.image_tokens
        wide, deep = ("d_model", "n_layer") if isinstance(real.language, MambaShape) else ("d_model", "layers")
        a, b = (getattr(s.language, "lm", s.language) for s in (real, twin))
        assert getattr(b, wide) / getattr(a, wide) == pytest.approx(0.3, rel=0.05)
        assert getattr(b, deep) / getattr(a, deep) == 0.375
        assert len(real.towers) == len(twin.towers)
        for t, small in zip(real.towers, twin.towers):
            assert (small.kind, small.image_size, small.patch_size) == (t.kind, t.image_size, t.patch_size)
            assert 0.33 < small.width / t.width < 0.38 and 0.44 <= small.depth / t.depth <= 0.5
            assert small.mlp_width / small.width == pytest.approx(t.mlp_width / t.width, rel=0.08)
        if not isinstance(real.language, MambaShape):
            assert b.mlp / b.d_model == pytest.approx(a.mlp / a.d_model, rel=0.01)
            assert b.vocab == a.vocab


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="shape_of: name has 'llava-2', expected one of llava-1.5-7b, .*cobra-3b"):
        shape_of("llava-2")


# --- FLOPs and bytes --------------------------------------------------------------------------------------------------


def counted(call) -> dict[str, int]:
    """FLOPs by kind as torch counts them. Attention is taken apart into products, our kernels are the plain reference, and no
    product goes to a library that the counter does not know."""
    with (
        FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False),
        cobra_kernels.use_backend("reference"),
    ):  # fmt: skip
        call()
    return {str(op).removeprefix("aten."): flops for op, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("name", EVERYONE)
def test_flops_are_those_that_torch_counts(subject, name):
    model, images, tokens, batch, context = subject(name), 2, 11, 3, 20
    shape, language = model.shape, model.shape.language
    pixels = model.pixels(images)
    features = model.vision(pixels)
    assert sum(counted(lambda: model.vision(pixels)).values()) == shape.vision(4, images).flops

    projector = sum(counted(lambda: model.project(features)).values())
    if isinstance(shape.projector, LdpProjector):  # the plain module runs its second Linear before the pooling
        early = shape.projector.grid**2 - shape.projector.tokens
        projector -= 2 * images * early * shape.projector.linears[1][0] * shape.projector.linears[1][1]
    assert projector == shape.project(4, images).flops

    embeddings = torch.randn(batch, tokens, shape.projector.linears[-1][1])
    prefill, step = counted(lambda: model.read(embeddings)), counted(model.step(batch, context))
    if isinstance(language, MambaShape):  # the recurrence and the convolution are no products: the room's bench counts them
        lm = language.lm
        for counts, cost, length in ((prefill, shape.prefill(tokens, 4, batch), tokens), (step, shape.decode(batch, context, 4), 1)):
            counts.pop("convolution")
            scan = scan_cost(batch, lm.d_inner, length, lm.d_state, torch.float32)
            convolution = batch * length * lm.d_inner * 2 * lm.d_conv
            assert sum(counts.values()) == cost.flops - lm.n_layer * (scan.flops + convolution)
            assert cost.exps == lm.n_layer * scan.exps
    else:
        above = batch * language.layers * 4 * language.d_model * tokens * (tokens - 1) // 2  # scores that causality never needs
        assert sum(prefill.values()) - above == shape.prefill(tokens, 4, batch).flops
        assert sum(step.values()) == shape.decode(batch, context, 4).flops


@pytest.mark.parametrize("name", EVERYONE)
def test_state_bytes_are_those_of_the_state(subject, name):
    model = subject(name)
    kept = model.keep(model.pixels(1))
    held = kept.nbytes if name == "cobra-tiny" else sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert held == model.shape.kept_bytes(4)
    assert held == model.shape.state_bytes(model.shape.image_tokens, 4)


def test_bytes_of_a_step_by_hand():
    """TinyLLaVA, bf16, 2 sequences at 100: weights without the embedding table, keys and values read and one written, the rows of two
    embeddings. Cobra: the weights, and each state read and written, at any context."""
    phi = shape_of("tinyllava-3.1b")
    weights = 2 * (phi.parameters["language"] - 51200 * 2560)
    assert phi.decode(2, 100, 2).bytes == weights + 2 * (2 * 2560) + 2 * 101 * 327_680
    cobra = shape_of("cobra-3b")
    state = 64 * 5120 * (4 * 2 + 16 * 4)
    weights = 2 * cobra.parameters["language"] + 2 * 64 * 5120 * (16 + 2)  # A, D and dt's bias take two bytes more
    assert cobra.decode(2, 100, 2).bytes == cobra.decode(2, 32768, 2).bytes == weights + 2 * (2 * 2560) + 2 * 2 * state


def test_shared_prefix_is_read_once():
    shape = SHAPES["llava-phi"]
    alone, shared = (shape.prefill(64, 2, batch=16, past=576, sharing=sharing) for sharing in (1, 16))
    assert alone.bytes - shared.bytes == 15 * 576 * 327_680
    assert alone.flops == shared.flops


# --- the same arithmetic at every setting -----------------------------------------------------------------------------


@pytest.fixture
def lively(subject):
    """lively(name): a tiny model whose answers are not one token for ever: larger weights, and a head that is not the embedding."""

    def make(name):
        model = build(name)
        language = model.modules["language"]
        for key, p in language.named_parameters():
            if p.dim() > 1 and not key.endswith("A_log"):
                p.mul_(10)
        language.lm_head.weight = torch.nn.Parameter(torch.randn(language.lm_head.weight.shape), requires_grad=False)
        return model

    return make


@pytest.mark.parametrize("name", EVERYONE)
def test_settings_of_one_model_agree(lively, name):
    model = lively(name)
    pixels, ids = model.pixels(2), model.ids(1, 5)
    torch.testing.assert_close(model.first_token_as_users(pixels, ids), model.first_token(pixels, ids), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.step_as_users(2, 1030)(), model.step(2, 1030)(), atol=1e-5, rtol=1e-5)
    pixels = model.pixels(1)
    answer = model.answer(pixels, ids, 6)
    tokens = answer()
    assert tokens.shape == (1, 6) and len(tokens.unique()) > 3
    assert torch.equal(tokens, answer())  # nothing is left over from the call before
    assert torch.equal(tokens, model.answer_as_users(pixels, ids, 6))


@pytest.mark.parametrize("name", EVERYONE)
def test_a_kept_image_answers_as_a_fresh_one(subject, name):
    model = subject(name)
    pixels, ids = model.pixels(1), model.ids(3, 5)
    kept = model.keep(pixels)
    fresh = model.first_token(pixels, ids[:1])
    for _ in range(2):  # a question leaves no trace
        torch.testing.assert_close(model.ask(kept, ids), fresh.expand(3, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILY[:2])
def test_a_step_on_slots_is_the_next_token_of_a_long_prefill(subject, name):
    from transformers import Cache

    from benchmarks.baselines.transformer import SlotLayer

    model = subject(name)
    ids = torch.randint(2, 512, (2, 10))
    expected = model.read(model.embed(ids))[0]
    seen = model.read(model.embed(ids[:, :-1]))[1]
    pad = torch.zeros_like(seen.layers[0].keys[:, :, :1])
    cache = Cache(layers=[SlotLayer(torch.cat([s.keys, pad], 2), torch.cat([s.values, pad], 2)) for s in seen.layers])
    for _ in range(2):  # the slot is written again
        torch.testing.assert_close(model.decoder.step(ids[:, -1:], cache), expected, atol=1e-5, rtol=1e-5)


def test_the_pooling_projector_is_ldp(subject):
    """Linear, GELU, Linear, average pooling, y = p + depthwise3x3(p): what the room's reference computes, and MobileVLM v2 too."""
    model = subject("mobilevlm-v2-3b-tiny")
    features, module = model.vision(model.pixels(2)), model.projector
    first, _, second = module.mlp
    expected = cobra_kernels.ldp_projector(
        features, [first.weight, second.weight], [first.bias, second.bias], module.peg.weight, module.peg.bias, out_grid=(4, 4),
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(model.project(features), expected, atol=1e-6, rtol=1e-5)


def test_repeated_steps_are_one_step(subject):
    """What is timed does not drift: a Transformer's step reads the same cache at every call."""
    for name in FAMILY:
        for step in (subject(name).step(2, 7), subject(name).step_as_users(2, 7)):
            assert torch.equal(step(), step())


def test_users_run_the_whole_tower_and_plain_linear_layers(subject, monkeypatch):
    from cobra_kernels.linear import RoutedLinear

    model = subject("tinyllava-3.1b-tiny")
    routed = [m for part in model.modules.values() for m in part.modules() if type(m) is RoutedLinear]
    ran = []
    handle = model.unused_block.register_forward_hook(lambda module, args, out: ran.append({type(m) for m in routed}))
    try:
        model.first_token(model.pixels(1), model.ids(1, 3))
        assert not ran
        model.first_token_as_users(model.pixels(1), model.ids(1, 3))
        assert ran == [{torch.nn.Linear}]
    finally:
        handle.remove()
    monkeypatch.setattr(model, "_whole_vision", lambda pixels: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.first_token_as_users(model.pixels(1), model.ids(1, 3))
    assert routed and {type(m) for m in routed} == {RoutedLinear}


# --- memory -----------------------------------------------------------------------------------------------------------


def test_made_on_restores_the_default_dtype():
    with pytest.raises(ZeroDivisionError), made_on("meta", torch.bfloat16):
        assert torch.nn.Linear(2, 2).weight.dtype == torch.bfloat16
        assert torch.empty(1).is_meta
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32 and not torch.empty(1).is_meta


def test_the_pool_builds_once_and_lets_go():
    pool = Pool()
    first = pool.get("cobra-tiny", "cpu", torch.float32)
    assert pool.get("cobra-tiny", "cpu", torch.float32) is first
    assert pool.held_bytes("cpu") == first.nbytes and pool.held_bytes("cuda") == 0
    pool.keep({"cobra-tiny"})
    assert pool.held_bytes("cpu") == first.nbytes
    pool.keep(set())
    assert pool.held_bytes("cpu") == 0


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"memory.current": "700", "memory.max": "1000", "memory.stat": "anon 5\ninactive_file 50\n"}, 350),
        ({"memory.current": "700", "memory.max": "max", "memory.stat": "inactive_file 50\n"}, float("inf")),
        ({}, float("inf")),
    ],
    ids=["limit", "no limit", "no control group"],
)  # fmt: skip
def test_memory_of_a_container(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path)
    assert memory._control_group_memory() == expected
