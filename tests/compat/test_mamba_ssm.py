"""mamba_ssm's names on our kernels, against its references in plain torch, and the block and language model it is imported for."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tolerances import GRADIENT, OUTPUT, assert_close

pytestmark = pytest.mark.usefixtures("shims")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scan_inputs(dtype=torch.float32, seqlen=19, B="3d", C="3d", batch=2, dim=12, dstate=5, wide=False):
    g = torch.Generator().manual_seed(seqlen)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(torch.float64 if wide else dtype)

    forms = {"3d": (batch, dstate, seqlen), "groups": (batch, 3, dstate, seqlen), "constant": (dim, dstate)}
    one = torch.float32
    return [
        randn(batch, dim, seqlen), randn(batch, dim, seqlen), -randn(dim, dstate, dtype=one).abs() - 0.1,
        randn(*forms[B], dtype=one if B == "constant" else dtype), randn(*forms[C], dtype=one if C == "constant" else dtype),
        randn(dim, dtype=one), randn(batch, dim, seqlen), randn(dim, dtype=one),
    ]  # fmt: skip


def in_fp64(tensors):
    return [None if t is None else t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_() for t in tensors]


@pytest.mark.parametrize("B, C", [("3d", "3d"), ("groups", "groups"), ("constant", "3d"), ("groups", "constant"), ("constant", "constant")])
@pytest.mark.parametrize("seqlen", [1, 2, 65, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selective_scan(dtype, seqlen, B, C):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    tensors = [t.requires_grad_() for t in scan_inputs(dtype, seqlen, B, C)]
    out, last = selective_scan_fn(*tensors, delta_softplus=True, return_last_state=True)
    wide = in_fp64(tensors)
    want, want_last = selective_scan_ref(*wide, delta_softplus=True, return_last_state=True)
    assert_close(out, want, OUTPUT[dtype])
    assert_close(last, want_last, 3 * OUTPUT[torch.float32])
    dout = torch.randn(1, 1, seqlen).expand(out.shape)  # as `.sum()` makes them
    grads = torch.autograd.grad(out, tensors, dout.to(dtype))
    for index, (got, w) in enumerate(zip(grads, torch.autograd.grad(want, wide, dout.to(dtype).double()), strict=True)):
        assert_close(got, w, GRADIENT[got.dtype], f"gradient {index}")


@pytest.mark.parametrize("absent", ["D", "z", "delta_bias"])
def test_optional_arguments(absent):
    from mamba_ssm import selective_scan_fn
    from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn, selective_scan_ref

    tensors = scan_inputs()
    tensors[{"D": 5, "z": 6, "delta_bias": 7}[absent]] = None
    want = selective_scan_ref(*in_fp64(tensors))
    assert_close(selective_scan_fn(*tensors), want, OUTPUT[torch.float32])
    assert_close(SelectiveScanFn.apply(*tensors, False, False), want, OUTPUT[torch.float32])


def test_complex_scan():
    from mamba_ssm import selective_scan_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    u, delta, A, _, _, D, z, bias = scan_inputs()
    A = torch.complex(A, torch.randn(A.shape))
    B, C = torch.randn(2, 5, 38), torch.randn(12, 5, dtype=torch.complex64)
    tensors = [u, delta, A, B, C, D, z, bias]
    assert_close(selective_scan_fn(*tensors, delta_softplus=True), selective_scan_ref(*in_fp64(tensors), delta_softplus=True), 1e-6)


@pytest.mark.parametrize("with_z", [False, True])
def test_raw_scan(with_z):
    raw = importlib.import_module("selective_scan_cuda")
    u, delta, A, B, C, D, z, bias = scan_inputs(B="groups", C="groups")
    z = z if with_z else None
    out, x, *gated = raw.fwd(u, delta, A, B, C, D, z, bias, True)
    wide = in_fp64([u, delta, A, B, C, D, z, bias])
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    want, last = selective_scan_ref(*wide, delta_softplus=True, return_last_state=True)
    assert_close(gated[0] if with_z else out, want, 1e-6)
    assert_close(out, selective_scan_ref(*wide[:6], None, wide[7], True), 1e-6)
    assert_close(x[:, :, -1, 1::2], last, 1e-6)
    dout, dz = torch.randn(u.shape), torch.empty(u.shape)
    got = raw.bwd(u, delta, A, B, C, D, z, bias, dout, x, out, dz if with_z else None, True, with_z)
    order = [0, 1, 2, 3, 4, 5, 7, 6] if with_z else [0, 1, 2, 3, 4, 5, 7]
    leaves = [wide[i] for i in order]
    for index, (g, w) in enumerate(zip(got, torch.autograd.grad(want, leaves, dout.double()))):
        assert_close(g, w, GRADIENT[torch.float32], f"gradient {index}")
    assert len(got) == (9 if with_z else 7)
    if with_z:
        assert got[7] is dz
        assert torch.equal(got[8], gated[0])


@pytest.mark.parametrize("out_float", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vmamba_raw_scan(dtype, out_float):
    """Its two modules; oflex keeps the output of 16-bit inputs in fp32."""
    raw = importlib.import_module("selective_scan_cuda_oflex" if out_float else "selective_scan_cuda_core")
    u, delta, A, B, C, D, _, bias = scan_inputs(dtype, B="groups", C="groups")
    out, x, *rest = raw.fwd(u, delta, A, B, C, D, bias, True, 1, *([True] if out_float else []))
    result = torch.float32 if out_float else dtype
    assert out.dtype == result and not rest
    wide = in_fp64([u, delta, A, B, C, D, bias])
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    want = selective_scan_ref(*wide[:6], None, wide[6], True)
    assert_close(out, want, OUTPUT[result])
    dout = torch.randn(out.shape).to(result)
    got = raw.bwd(u, delta, A, B, C, D, bias, dout, x, True, 1)
    for index, (g, w, t) in enumerate(zip(got, torch.autograd.grad(want, wide, dout.double()), [u, delta, A, B, C, D, bias], strict=True)):
        assert g.dtype == t.dtype
        assert_close(g, w, GRADIENT[t.dtype], f"gradient {index}")


@pytest.mark.parametrize("given", ["", "B", "BC", "norms"])
def test_mamba_inner(given):
    from mamba_ssm.ops.selective_scan_interface import MambaInnerFn, mamba_inner_fn, mamba_inner_ref

    g = torch.Generator().manual_seed(0)
    dim, dstate, rank, width, d_model, seqlen = 12, 5, 3, 4, 7, 21

    def randn(*shape, scale=0.5):
        return (torch.randn(*shape, generator=g) * scale).requires_grad_()

    made = 2 - sum(name in given for name in "BC")
    tensors = [
        randn(2, 2 * dim, seqlen), randn(dim, 1, width), randn(dim), randn(rank + made * dstate, dim), randn(dim, rank), randn(d_model, dim),
        randn(d_model), (-torch.rand(dim, dstate, generator=g) - 0.1).requires_grad_(),
        randn(2, 1, dstate, seqlen) if "B" in given else None, randn(dim, dstate) if "C" in given else None, randn(dim), randn(dim),
        None if "B" in given else randn(dstate), None, True,
    ]  # fmt: skip
    norms = [randn(dstate, scale=1), randn(dstate, scale=1), randn(dim, scale=1)] if given == "norms" else [None] * 3
    out = mamba_inner_fn(*tensors, 1, *norms)
    leaves = [t for t in (*tensors, *norms) if isinstance(t, torch.Tensor)]
    wide = [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in (*tensors, *norms)]
    want = mamba_inner_ref(*wide)
    assert_close(out, want, 1e-5)
    assert torch.equal(MambaInnerFn.apply(*tensors, 1, *norms), out)
    wide_leaves = [t for t in wide if isinstance(t, torch.Tensor)]
    dout = torch.randn(out.shape, generator=g)
    for index, (got, w) in enumerate(
        zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want, wide_leaves, dout.double()), strict=True)
    ):
        assert_close(got, w, 2e-5, f"gradient {index}")


def test_mamba_inner_of_complex_A():
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_ref

    g = torch.Generator().manual_seed(0)
    dim, dstate, rank = 6, 3, 2
    shapes = [(2, 2 * dim, 9), (dim, 1, 4), (dim,), (rank + 4 * dstate, dim), (dim, rank), (5, dim), (5,)]
    A = torch.complex(-torch.rand(dim, dstate, generator=g), torch.randn(dim, dstate, generator=g))
    tensors = [*(torch.randn(*shape, generator=g) * 0.5 for shape in shapes), A]
    assert_close(mamba_inner_fn(*tensors, D=torch.ones(dim)), mamba_inner_ref(*in_fp64(tensors), D=torch.ones(dim).double()), 1e-5)


@pytest.mark.parametrize("heads", [False, True])
def test_state_update(heads):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref

    g = torch.Generator().manual_seed(0)
    lead = (4,) if heads else ()

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    state, projected = randn(3, *lead, 6, 5), (3, 2, 5) if heads else (3, 5)
    arguments = [
        randn(3, *lead, 6),
        randn(3, *lead, 6),
        -randn(*lead, 6, 5).abs(),
        randn(*projected),
        randn(*projected),
        randn(*lead, 6),
        randn(3, *lead, 6),
        randn(*lead, 6),
    ]
    wide = state.double()
    out = selective_state_update(state, *arguments, True)
    want = selective_state_update_ref(wide, *(t.double() for t in arguments), dt_softplus=True)
    assert_close(out, want, 1e-6)
    assert_close(state, wide, 1e-6)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [(), ("D",), ("dt_bias",), ("D", "z", "dt_bias")])
def test_state_update_of_a_pool(missing, state_dtype):
    """What upstream's kernel stumbles on: no D, no dt_bias; A, dt and dt_bias one number a head; padding."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref

    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    pool, batch, heads, dim, dstate = 5, 3, 4, 6, 7
    state = randn(pool, heads, dim, dstate).to(state_dtype)
    arguments = {
        "x": randn(batch, heads, dim), "dt": randn(batch, heads, 1).expand(batch, heads, dim),
        "A": -randn(heads, 1, 1).abs().expand(heads, dim, dstate),
        "B": randn(batch, 2, dstate), "C": randn(batch, 2, dstate), "D": randn(heads, 1).expand(heads, dim), "z": randn(batch, heads, dim),
        "dt_bias": randn(heads, 1).expand(heads, dim),
    }  # fmt: skip
    arguments = {name: None if name in missing else t for name, t in arguments.items()}
    rows = torch.tensor([4, -1, 0], dtype=torch.int32)
    before = state.clone()
    out = selective_state_update(state, **arguments, dt_softplus=True, state_batch_indices=rows)
    taken = [0, 2]
    wide = before[[4, 0]].double()
    per_row = ("x", "dt", "B", "C", "z")
    of_taken = {name: t if t is None else (t[taken] if name in per_row else t).double() for name, t in arguments.items()}
    want = selective_state_update_ref(wide, **of_taken, dt_softplus=True)
    assert_close(out[taken], want, OUTPUT[torch.float32])
    assert_close(state[[4, 0]], wide, OUTPUT[state_dtype])
    assert (out[1] == 0).all()
    assert torch.equal(state[[1, 2, 3]], before[[1, 2, 3]])


@pytest.mark.parametrize("module", ["layernorm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_under_both_names(module, dtype):
    norms = importlib.import_module(f"mamba_ssm.ops.triton.{module}")
    x, residual, weight, bias = torch.randn(3, 4, 33).to(dtype), torch.randn(3, 4, 33), torch.randn(33), torch.randn(33)
    for fn, ref in ((norms.rms_norm_fn, norms.rms_norm_ref), (norms.layer_norm_fn, norms.layer_norm_ref)):
        y, s = fn(x, weight, bias, residual=residual, eps=1e-5, prenorm=True, residual_in_fp32=True)
        want, want_s = ref(x.double(), weight.double(), bias.double(), residual.double(), eps=1e-5, prenorm=True)
        assert y.dtype == dtype and s.dtype == torch.float32
        assert_close(y, want, OUTPUT[dtype])
        assert_close(s, want_s, OUTPUT[torch.float32])
    y = norms.layer_norm_linear_fn(x, weight, bias, torch.eye(33).to(dtype), None, is_rms_norm=True)
    assert_close(y, norms.rms_norm_ref(x.double(), weight.double(), bias.double()), 2 * OUTPUT[dtype])
    assert norms.RMSNorm(33)(x.float()).shape == x.shape


def test_norms_take_the_arguments_of_their_version_by_position():
    from mamba_ssm.ops.triton import layer_norm as v2
    from mamba_ssm.ops.triton import layernorm as v1

    x, residual, w, b = torch.randn(5, 33), torch.randn(5, 33), *torch.randn(2, 33)
    for name in ("layer_norm", "rms_norm"):
        want = getattr(v2, f"{name}_ref")(x, w, b, residual, eps=0.1, prenorm=True)
        of_v1 = (0.1, True) if name == "layer_norm" else (True, False, 0.1)
        calls = [
            (getattr(v1, f"{name}_ref"), (0.1, True)),
            (getattr(v1, f"{name}_fn"), of_v1),
            (getattr(v2, f"{name}_fn"), (None, None, None, 0.1, 0.0, None, True)),
            (getattr(v2, f"{name}_ref"), (None, None, None, 0.1, 0.0, None, True)),
        ]
        for fn, rest in calls:
            for got, expected in zip(fn(x, w, b, residual, *rest), want, strict=True):
                assert_close(got, expected, OUTPUT[torch.float32], f"{fn.__module__}.{fn.__name__}")


def test_rms_norm_of_2_x_drops_out_in_training():
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    x, residual = torch.ones(64, 33), torch.full((64, 33), 5.0)
    norm = RMSNorm(33, 1e-5, 0.5)
    assert set(norm(x, residual, prenorm=True)[1].unique().tolist()) == {5.0, 7.0}
    assert torch.equal(norm.eval()(x, residual, prenorm=True)[1], x + residual)
    assert list(norm.state_dict()) == ["weight"] and RMSNorm(33).drop is None


def test_norms_of_two_inputs_with_two_weights():
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref

    x, x1, residual, w, b, w1, b1 = torch.randn(5, 33), torch.randn(5, 33), torch.randn(5, 33), *torch.randn(4, 33)
    rowscale = torch.rand(5)
    out = layer_norm_fn(x, w, b, residual, x1, w1, b1, rowscale=rowscale, prenorm=True)
    want = layer_norm_ref(*(t.double() for t in (x, w, b, residual, x1, w1, b1)), rowscale=rowscale.double(), prenorm=True)
    for got, expected in zip(out, want, strict=True):
        assert_close(got, expected, 1e-6)
    torch.manual_seed(0)
    y, keep, keep1 = layer_norm_fn(x, w, b, None, x1, dropout_p=0.4, return_dropout_mask=True)
    assert_close(
        y,
        layer_norm_ref(x.double(), w.double(), b.double(), None, x1.double(), dropout_p=0.4, dropout_mask=keep, dropout_mask1=keep1),
        1e-6,
    )
    assert 0 < (~keep).sum() < keep.numel()


def test_one_implementation():
    from mamba_ssm import Mamba
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, _init_weights, create_block
    from mamba_ssm.modules.mamba_simple import Block
    from mamba_ssm.utils.generation import InferenceParams

    from cobra_kernels import modules
    from cobra_kernels.modules import lm, mamba

    assert Mamba is modules.Mamba and Block is mamba.Block and InferenceParams is mamba.InferenceParams
    assert issubclass(MambaConfig, modules.MambaConfig)
    assert issubclass(MambaLMHeadModel, lm.MambaLMHeadModel) and _init_weights is lm._init_weights
    block = create_block(16, ssm_cfg={"d_state": 4}, rms_norm=True, fused_add_norm=True, residual_in_fp32=True, layer_idx=3)
    assert isinstance(block, Block) and block.mixer.layer_idx == 3 and block.layer_idx == 3
    for model in (MixerModel(16, 2, 50), MixerModel(16, 2, 0, 50), MixerModel(d_model=16, n_layer=2, vocab_size=50, rms_norm=True)):
        assert model.embedding.weight.shape == (50, 16)
    with pytest.raises(ValueError, match="attn_layer_idx"):
        create_block(16, attn_layer_idx=[1])


def test_the_parts_of_a_model_are_of_upstreams_classes():
    """Training code finds what to shard, checkpoint or freeze by isinstance, under the module names of 1.x and of 2.x."""
    from mamba_ssm.models.mixer_seq_simple import MixerModel
    from mamba_ssm.modules import block, mamba_simple
    from mamba_ssm.ops.triton import layer_norm, layernorm

    model = language_model()
    assert isinstance(model.backbone, MixerModel)
    for index, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, block.Block) and isinstance(layer, mamba_simple.Block) and isinstance(layer.mixer, mamba_simple.Mamba)
        assert isinstance(layer.norm, layer_norm.RMSNorm) and isinstance(layer.norm, layernorm.RMSNorm)
        assert layer.layer_idx == index and layer.mlp is None
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("fused", [True, False])
def test_block_of_2_x(fused):
    """By position, with the branch behind the mixer and without."""
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mamba_simple import Block as OldBlock
    from mamba_ssm.modules.mamba_simple import Mamba

    hidden, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    old = OldBlock(16, Mamba, nn.LayerNorm, fused, True)
    new = Block(16, Mamba, nn.Identity, nn.LayerNorm, fused, True)
    new.load_state_dict(old.state_dict())
    for got, want in zip(new(hidden, residual), old(hidden, residual), strict=True):
        assert torch.equal(got, want)
    wide = Block(16, Mamba, lambda dim: nn.Linear(dim, dim), nn.LayerNorm, fused, True)
    wide.load_state_dict(old.state_dict(), strict=False)
    nn.init.uniform_(wide.norm2.weight)
    got, stream = wide(hidden, residual)
    mixed, before = old(hidden, residual)
    assert_close(stream, mixed + before, OUTPUT[torch.float32])
    assert_close(got, wide.mlp(F.layer_norm(mixed + before, (16,), wide.norm2.weight)), 1e-5)


def test_config_of_2_x():
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(
        d_model=16, d_intermediate=0, n_layer=1, vocab_size=45, ssm_cfg={"layer": "Mamba1", "d_state": 4}, attn_layer_idx=[], attn_cfg={},
    )  # fmt: skip
    assert MambaLMHeadModel(config).backbone.layers[0].mixer.d_state == 4
    for foreign in ({"d_intermediate": 8}, {"attn_layer_idx": [1]}, {"attn_cfg": {"num_heads": 2}}, {"ssm_cfg": {"layer": "Mamba2"}}):
        with pytest.raises(ValueError, match=next(iter(foreign))):
            MambaConfig(d_model=16, **foreign)


def language_model(**options):
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    torch.manual_seed(0)
    return MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=45), **options).eval()


@pytest.mark.parametrize(
    "sampling", [{}, {"top_k": 5, "top_p": 0.9, "temperature": 0.7}, {"top_k": 0, "min_p": 0.1}, {"repetition_penalty": 1.5}]
)
def test_generate(sampling):
    """With a cache, with the graph's interface, and by hand through the names that Cobra's own loop uses."""
    from mamba_ssm.utils.generation import InferenceParams, modify_logit_for_repetition_penalty, sample

    model, ids = language_model(), torch.randint(45, (2, 5), generator=torch.Generator().manual_seed(0))
    outputs = []
    for cg in (False, True):
        torch.manual_seed(3)
        outputs.append(model.generate(ids, 12, cg=cg, vocab_size=45, return_dict_in_generate=True, output_scores=True, **sampling))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].sequences.shape == (2, 12) and len(outputs[0].scores) == 7

    options = dict(sampling)
    penalty = options.pop("repetition_penalty", 1.0)
    params, tokens, sequences = InferenceParams(max_seqlen=12, max_batch_size=2), ids, ids
    torch.manual_seed(3)
    with torch.inference_mode():
        while sequences.shape[1] < 12:
            logits = model(tokens, inference_params=params, num_last_tokens=1).logits[:, 0, :45]
            params.seqlen_offset += tokens.shape[1]
            logits = modify_logit_for_repetition_penalty(logits.clone(), sequences, penalty)
            tokens = sample(logits, **options)[:, None]
            sequences = torch.cat([sequences, tokens], 1)
    assert torch.equal(sequences, outputs[0].sequences)


def test_a_graph_cache_serves_other_batch_sizes():
    """1, then 4, then 1 again: a state of four rows is none for one."""
    model = language_model()
    for batch in (1, 4, 1):
        ids = torch.randint(45, (batch, 5), generator=torch.Generator().manual_seed(batch))
        assert torch.equal(model.generate(ids, 9, cg=True), model.generate(ids, 9))


def test_generation_of_a_foreign_model():
    """It is told the position of each token, as upstream tells it, in decoding."""
    from mamba_ssm.utils.generation import GenerationMixin

    class Counting(nn.Module, GenerationMixin):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(1)), []

        def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
            return {}

        def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
            self.seen.append((position_ids.tolist() if position_ids is not None else None, inference_params.seqlen_offset))
            logits = F.one_hot(input_ids[:, -num_last_tokens:] + 1, 50).float()
            return SimpleNamespace(logits=logits)

    ids = torch.tensor([[3, 4], [7, 8]])
    for cg in (False, True):
        model = Counting()
        assert model.generate(ids, 5, cg=cg).tolist() == [[3, 4, 5, 6, 7], [7, 8, 9, 10, 11]]
        assert model.seen == [(None, 0), ([[2], [2]], 2), ([[3], [3]], 3)]


def test_generate_stops_and_listens():
    model, ids = language_model(), torch.randint(45, (1, 4), generator=torch.Generator().manual_seed(0))
    free = model.generate(ids, 10)
    eos = int(free[0, 6])
    end = next(i for i in range(4, 10) if free[0, i] == eos)
    assert model.generate(ids, 10, eos_token_id=eos).shape[1] == end + 1
    teacher = torch.arange(9).expand(1, 9)
    assert torch.equal(model.generate(ids, 10, teacher_outputs=teacher)[0, 4:9], torch.arange(4, 9))

    class Streamer:
        got, ended = [], False

        def put(self, tokens):
            self.got.append(tokens)

        def end(self):
            self.ended = True

    streamer = Streamer()
    model.generate(ids, 8, streamer=streamer)
    assert torch.equal(torch.cat([t.reshape(1, -1) for t in streamer.got], 1), free[:, :8]) and streamer.ended


def test_logit_filters():
    from mamba_ssm.utils import generation

    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    for name, limit, kept in (
        ("top_k", 4, logits >= logits.topk(4).values[:, -1:]),
        ("min_p", 0.2, probs >= 0.2 * probs.amax(-1, keepdim=True)),
        ("top_p", 0.6, None),
    ):
        filtered = logits.clone()
        assert getattr(generation, f"modify_logits_for_{name}_filtering")(filtered, limit) is None
        if kept is None:
            order = probs.sort(descending=True)
            kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order.indices, order.values.cumsum(-1) - order.values < 0.6)
        assert torch.equal(filtered, logits.masked_fill(~kept, -torch.inf)), name


def test_save_and_load(tmp_path):
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf

    model, ids = language_model(), torch.randint(45, (1, 6))
    model.save_pretrained(tmp_path)
    assert load_config_hf(tmp_path)["d_model"] == 16
    assert set(load_state_dict_hf(tmp_path)) == set(model.state_dict())
    again = MambaLMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits) and again.lm_head.weight is again.backbone.embedding.weight
    upstream_knows = {"d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm"}
    assert set(load_config_hf(tmp_path)) == {*upstream_knows, "pad_vocab_size_multiple", "tie_embeddings"}
    half = MambaLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert half.backbone.layers[0].mixer.A_log.dtype == torch.float32

    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    weights["extra"] = weights.pop("backbone.norm_f.weight")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="1 missing: backbone.norm_f.weight; 1 unexpected: extra"):
        MambaLMHeadModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        MambaLMHeadModel.from_pretrained(tmp_path / "..")


def test_lm_trains():
    """The loss of a few steps goes down, through the fused block."""
    model, ids = language_model().train(), torch.randint(45, (2, 20), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(14):
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
