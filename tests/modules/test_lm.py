"""The language model: equal to transformers' Mamba, and to itself however the prompt is cut, padded or batched."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from cobra_kernels import errors
from cobra_kernels.modules import InferenceParams, MambaConfig, MambaLMHeadModel, MixerModel, RMSNorm, generate
from tests.modules.models import make_ids, make_lm, randomise
from tests.tolerances import CHUNKED, GEMM, LOGITS, assert_close

transformers = pytest.importorskip("transformers")


def hugging_face(lm: MambaLMHeadModel):
    """transformers' model with the same weights."""
    c, ssm = lm.config, lm.config.ssm_cfg
    config = transformers.MambaConfig(
        hidden_size=c.d_model,
        num_hidden_layers=c.n_layer,
        vocab_size=c.padded_vocab_size,
        state_size=ssm.get("d_state", 16),
        conv_kernel=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        time_step_rank=ssm.get("dt_rank", "auto"),
        use_bias=ssm.get("bias", False),
        use_conv_bias=ssm.get("conv_bias", True),
        layer_norm_epsilon=c.norm_epsilon,
        residual_in_fp32=c.residual_in_fp32,
        tie_word_embeddings=c.tie_embeddings,
        use_mambapy=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.MambaForCausalLM(config).eval()
    weights = {k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in lm.state_dict().items()}
    model.load_state_dict(weights, strict=True)
    return model


def assert_same_logits(got, expected, limit=LOGITS):
    """Absolute, on logits of scale 1 or more."""
    assert got.shape == expected.shape and expected.std() > 1
    worst = (got - expected).abs().max().item()
    assert worst <= limit, f"logits differ by {worst:.2e}, expected at most {limit:.0e}"


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "batch", "seqlen"),
    [
        ({}, 2, 33),
        ({}, 1, 1),
        ({}, 2, 3),
        ({"d_model": 192, "n_layer": 8, "vocab_size": 1003}, 2, 100),
        ({"tie_embeddings": True}, 2, 17),
        ({"residual_in_fp32": False}, 2, 17),
        ({"fused_add_norm": False}, 2, 17),
        ({"norm_epsilon": 1e-2}, 2, 17),
        ({"ssm_cfg": {"d_state": 8, "d_conv": 3, "dt_rank": 5, "bias": True}}, 2, 17),
        ({"ssm_cfg": {"conv_bias": False, "expand": 3}}, 2, 17),
    ],
    ids=lambda v: str(v).replace(" ", ""),
)
@torch.no_grad()
def test_logits_equal_transformers(overrides, batch, seqlen):
    lm = make_lm(**overrides)
    ids = make_ids(batch, seqlen, vocab=lm.config.vocab_size)
    expected = hugging_face(lm)(ids).logits
    assert_same_logits(lm(ids).logits, expected)
    logits, _ = lm.prefill(ids)
    assert_same_logits(logits, expected[:, -1])


def test_gradients_equal_transformers():
    lm = make_lm()
    hf = hugging_face(lm)
    ids = make_ids(2, 13)
    for logits in (lm.train()(ids).logits, hf.train()(ids).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = {k.replace("embeddings.", "embedding."): p.grad for k, p in hf.named_parameters()}
    mine = {k: p.grad for k, p in lm.named_parameters()}
    assert mine.keys() == theirs.keys()
    for name, grad in mine.items():
        assert_close(grad, theirs[name], LOGITS, name)


def test_greedy_tokens_equal_transformers_generate():
    lm = make_lm(d_model=64, n_layer=4, vocab_size=64)  # no padding: transformers would draw it
    ids = make_ids(3, 9)
    theirs = hugging_face(lm).generate(ids, max_new_tokens=24, do_sample=False)[:, 9:]
    ours = torch.tensor(generate(lm, ids, max_new_tokens=24).tokens)
    # Where the two best logits are closer than the models agree, either token is right, and the rows part for good.
    with torch.no_grad():
        logits = lm(torch.cat([ids, ours], dim=1)).logits[:, 8:-1]
    best = logits.topk(2, dim=-1).values
    sure = ((best[..., 0] - best[..., 1]) > LOGITS).cumprod(dim=1).bool()
    assert sure.float().mean() > 0.9
    assert torch.equal(ours[sure], theirs[sure])


# --- one meaning -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prefill_then_decode_equals_one_long_prefill():
    lm = make_lm(d_model=64)
    ids = make_ids(2, 30)
    expected = lm(ids).logits
    for prompt in (1, 2, 3, 4, 12):
        logits, state = lm.prefill(ids[:, :prompt])
        for t in range(prompt, 30):
            assert_same_logits(logits, expected[:, t - 1])
            assert torch.equal(logits[:, :61].argmax(-1), expected[:, t - 1, :61].argmax(-1))
            logits = lm.decode(ids[:, t], state)
        assert_same_logits(logits, expected[:, -1])
        _, whole = lm.prefill(ids)
        for got, want in zip(state, whole):
            assert_close(got[0], want[0], CHUNKED, "conv_state")
            assert_close(got[1], want[1], CHUNKED, "ssm_state")


@torch.no_grad()
def test_chunked_prefill_at_every_split_point():
    lm, ids = make_lm(), make_ids(2, 12)
    expected, whole = lm.prefill(ids)
    for split in range(1, 12):
        _, state = lm.prefill(ids[:, :split])
        logits, returned = lm.prefill(ids[:, split:], state)
        assert returned is state
        assert_close(logits, expected, CHUNKED, f"split {split}")
        for got, want in zip(state, whole):
            assert_close(got[1], want[1], CHUNKED, f"ssm_state, split {split}")


@pytest.mark.parametrize("side", ["lengths", "right mask", "left mask", "scattered mask"])
@pytest.mark.parametrize("continued", [False, True])
@torch.no_grad()
def test_a_ragged_batch_equals_its_rows_alone(side, continued):
    lm, lengths = make_lm(), [7, 1, 12, 2, 3]
    rows = [make_ids(n, seed=n) for n in lengths]
    ids = torch.full((5, 12), 60)  # the padding is a real token: it must not be read
    mask = torch.zeros(5, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = {"left mask": slice(12 - len(row), None), "scattered mask": slice(None, None, 1)}.get(side, slice(0, len(row)))
        if side == "scattered mask":
            where = torch.randperm(12, generator=torch.Generator().manual_seed(i))[: len(row)].sort().values
        ids[i, where], mask[i, where] = row, 1
    options = {"lengths": torch.tensor(lengths)} if side == "lengths" else {"attention_mask": mask}
    state = None
    if continued:
        _, state = lm.prefill(make_ids(5, 6, seed=9))
        alone = [state.select([i]) for i in range(5)]
    logits, state = lm.prefill(ids, state, **options)
    following = lm.decode(make_ids(5, seed=8), state)
    for i, row in enumerate(rows):
        expected, single = lm.prefill(row[None], alone[i] if continued else None)
        assert_close(logits[i : i + 1], expected, GEMM, f"row {i}")
        assert_close(state.select([i]).conv[2], lm_state_after(lm, single, make_ids(5, seed=8)[i : i + 1]).conv[2], GEMM, f"row {i}")
        assert_close(following[i : i + 1], lm.decode(make_ids(5, seed=8)[i : i + 1], single), GEMM, f"row {i}, next")


def lm_state_after(lm, state, token):
    """A copy of `state` that has read `token` too."""
    state = state.clone()
    lm.decode(token, state)
    return state


@torch.no_grad()
def test_a_batch_equals_its_rows_alone():
    lm, ids = make_lm(), make_ids(4, 10)
    logits, state = lm.prefill(ids)
    for i in range(4):
        expected, single = lm.prefill(ids[i : i + 1])
        assert_close(logits[i : i + 1], expected, GEMM)
        assert_close(state.ssm[2][i : i + 1], single.ssm[2], GEMM)


@torch.no_grad()
def test_decode_continues_chosen_rows_of_a_state():
    lm, ids = make_lm(), make_ids(4, 6)
    _, pool = lm.prefill(ids)
    untouched = pool.clone()
    expected_state = pool.select([3, 1])
    expected = lm.decode(ids[:2, 0], expected_state)
    logits = lm.decode(torch.tensor([ids[0, 0], 5, ids[1, 0]]), pool, rows=torch.tensor([3, -1, 1]))
    assert_close(logits[[0, 2]], expected, GEMM)
    assert torch.equal(pool.ssm[1][[0, 2]], untouched.ssm[1][[0, 2]])
    assert_close(pool.select([3, 1]).ssm[2], expected_state.ssm[2], GEMM)


@torch.no_grad()
def test_many_questions_from_one_state():
    lm = make_lm()
    picture = torch.randn(1, 9, 32)
    _, image = lm.prefill(picture)
    kept = image.clone()
    questions = make_ids(3, 5)
    logits, _ = lm.prefill(questions, image.expand(3))
    whole = torch.cat([picture.expand(3, -1, -1), lm.backbone.embedding(questions)], dim=1)
    assert_close(logits, lm.prefill(whole)[0], CHUNKED)
    assert all(torch.equal(a, b) for a, b in zip(image.ssm, kept.ssm))
    rounded, _ = lm.prefill(questions, image.to(ssm_dtype=torch.bfloat16).expand(3))
    assert_close(rounded, logits, 0.02)  # a bf16 state is an option, not an equal


@torch.no_grad()
def test_inputs_embeds_num_last_tokens_and_inference_params():
    lm, ids = make_lm(), make_ids(2, 8)
    logits = lm(ids).logits
    assert torch.equal(lm(None, inputs_embeds=lm.backbone.embedding(ids)).logits, logits)
    assert_close(lm(ids, num_last_tokens=3).logits, logits[:, -3:], GEMM)
    params = InferenceParams(max_seqlen=8, max_batch_size=2)
    assert_close(lm(ids[:, :5], inference_params=params).logits, logits[:, :5], CHUNKED)
    params.seqlen_offset = 5
    assert_close(lm(ids[:, 5:], None, params, 1).logits, logits[:, -1:], CHUNKED)
    assert set(params.key_value_memory_dict) == {0, 1, 2}


@torch.no_grad()
def test_half_precision_is_close_and_fp64_exact():
    ids = make_ids(2, 20)
    expected = make_lm().double()(ids).logits
    lm = make_lm().bfloat16()
    assert lm.allocate_state(1).conv[0].dtype == torch.bfloat16 and lm.allocate_state(1).ssm[0].dtype == torch.float32
    logits, state = lm.prefill(ids[:, :-1])
    assert logits.dtype == torch.bfloat16
    assert_close(lm.decode(ids[:, -1], state).float(), expected[:, -1].float(), 0.05)
    exact = make_lm().double()
    _, state = exact.prefill(ids[:, :-1])
    assert_close(exact.decode(ids[:, -1], state), expected[:, -1], 1e-12)


# --- construction ----------------------------------------------------------------------------------------------------


def test_names_and_tying():
    lm = make_lm(n_layer=1, tie_embeddings=True)
    assert list(lm.state_dict())[:2] == ["backbone.embedding.weight", "backbone.layers.0.mixer.A_log"]
    assert {"backbone.layers.0.norm.weight", "backbone.norm_f.weight", "lm_head.weight"} < set(lm.state_dict())
    assert lm.lm_head.weight is lm.backbone.embedding.weight
    assert lm.lm_head.weight.shape == (64, 32)  # 61 padded to a multiple of 8
    moved = MambaLMHeadModel(MambaConfig(16, 1, 30), device="meta").to_empty(device="cpu")
    assert moved.lm_head.weight is moved.backbone.embedding.weight
    loose = make_lm().bfloat16()
    assert loose.lm_head.weight is not loose.backbone.embedding.weight


def test_initialisation_follows_upstream():
    torch.manual_seed(0)
    lm = MambaLMHeadModel(MambaConfig(128, 9, 500, ssm_cfg={"bias": True}))
    assert lm.backbone.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    mixer = lm.backbone.layers[3].mixer
    bound = 256**-0.5  # kaiming_uniform_(a=sqrt(5)) over fan-in d_inner, then divided by sqrt(n_layer)
    assert bound / 3 * 0.98 < mixer.out_proj.weight.abs().max().item() <= bound / 3
    assert not mixer.in_proj.bias.any() and not mixer.out_proj.bias.any()
    assert mixer.dt_proj.bias.all()  # drawn by Mamba, and left alone
    assert torch.equal(lm.backbone.norm_f.weight, torch.ones(128))
    wide = MixerModel(MambaConfig(128, 9, 500), initializer_cfg={"initializer_range": 0.1, "rescale_prenorm_residual": False})
    assert wide.embedding.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_cobra_3b_has_exactly_its_parameters():
    with torch.device("meta"):
        lm = MambaLMHeadModel(MambaConfig())
    assert sum(p.numel() for p in lm.parameters()) == 2_768_345_600
    assert lm.lm_head.weight.shape == (50280, 2560) and lm.config.vocab_size == 50277
    state = lm.allocate_state(1, torch.bfloat16)
    assert state.nbytes == 23_592_960
    assert lm.allocate_state(1, torch.bfloat16, ssm_dtype=torch.bfloat16).nbytes == 13_107_200


def test_layer_norm_variant():
    lm = make_lm(rms_norm=False)
    plain = make_lm(rms_norm=False, fused_add_norm=False)
    plain.load_state_dict(lm.state_dict())
    ids = make_ids(2, 9)
    assert not any(isinstance(m, RMSNorm) for m in lm.modules())
    with torch.no_grad():
        assert_same_logits(lm(ids).logits, plain(ids).logits)


def test_config_reads_upstreams_json_and_refuses_the_rest():
    zephyr = {
        "d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    assert MambaConfig.from_dict(zephyr) == MambaConfig()
    saved = {**zephyr, "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "ssm_cfg": {"layer": "Mamba1", "d_state": 8}}
    assert MambaConfig.from_dict(saved).ssm_cfg == {"d_state": 8}
    config = MambaConfig.from_dict(dataclasses.asdict(MambaConfig(8, 1, 9)))
    assert config.padded_vocab_size == 16 and MambaConfig(8, 1, 16).padded_vocab_size == 16


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model has 0, expected an int >= 1"),
        ({"n_layer": 2.0}, "n_layer has 2.0, expected an int"),
        ({"vocab_size": True}, "vocab_size has True"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple has 0"),
        ({"rms_norm": 1}, "rms_norm has 1, expected a bool"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon has nan"),
        ({"norm_epsilon": "1e-5"}, "norm_epsilon has '1e-5'"),
        ({"ssm_cfg": [1]}, r"ssm_cfg has \[1\], expected a dict"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg has the key 'headdim', expected one of d_state"),
        ({"ssm_cfg": {"d_state": 0}}, r"ssm_cfg\['d_state'\] has 0"),
        ({"ssm_cfg": {"d_state": 16.0}}, r"ssm_cfg\['d_state'\] has 16.0"),
        ({"ssm_cfg": {"bias": 1}}, r"ssm_cfg\['bias'\] has 1"),
        ({"ssm_cfg": {"dt_min": float("inf")}}, r"ssm_cfg\['dt_min'\] has inf"),
        ({"ssm_cfg": {"dt_rank": "all"}}, r"ssm_cfg\['dt_rank'\] has 'all', expected an int or 'auto'"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, r"ssm_cfg\['layer'\] has 'Mamba2', expected 'Mamba1'"),
        ({"d_intermediate": 64}, "d_intermediate is set, expected nothing"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx is set"),
        ({"model_type": "mamba"}, "has the keys model_type, expected only d_model"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_configs_are_refused_by_name(values, message):
    with pytest.raises(errors.ArgumentError, match=message):
        MambaConfig.from_dict({"d_model": 16, "n_layer": 1, "vocab_size": 8, **values})


def test_bad_prompts_are_refused_by_name():
    lm, ids = make_lm(), make_ids(2, 4)
    state = lm.allocate_state(2)
    cases = [
        (errors.ShapeError, r"prompt has shape \(4,\) and dtype torch.int64, expected ids \(batch, seqlen\)", lambda: lm.prefill(ids[0])),
        (errors.ShapeError, r"prompt has shape \(2, 32\) and dtype torch.float32", lambda: lm.prefill(torch.zeros(2, 32))),
        (errors.ShapeError, r"prompt has shape \(2, 0\), expected seqlen >= 1", lambda: lm.prefill(ids[:, :0])),
        (errors.ShapeError, "state has batch 2, expected batch=1", lambda: lm.prefill(ids[:1], state)),
        (errors.ShapeError, r"lengths has shape \(1,\), expected \(batch=2,\)", lambda: lm.prefill(ids, state, lengths=[4])),
        (errors.ArgumentError, r"lengths has \[0, 4\], expected values in 1..seqlen=4", lambda: lm.prefill(ids, state, lengths=[0, 4])),
        (errors.ArgumentError, r"lengths has \[5, 4\]", lambda: lm.prefill(ids, state, lengths=[5, 4])),
        (errors.ShapeError, r"attention_mask has shape \(2, 3\)", lambda: lm.prefill(ids, state, attention_mask=torch.ones(2, 3))),
        (errors.ArgumentError, "row of zeros", lambda: lm.prefill(ids, state, attention_mask=torch.eye(2, 4) * torch.tensor([[1], [0]]))),
        (errors.ArgumentError, "both given", lambda: lm.prefill(ids, state, lengths=[4, 4], attention_mask=ids)),
        (errors.ShapeError, r"decode: input_ids has shape \(2, 4\), expected \(batch,\)", lambda: lm.decode(ids, state)),
        (errors.ShapeError, r"rows has shape \(1,\), expected \(batch=2,\)", lambda: lm.decode(ids[:, 0], state, rows=torch.zeros(1))),
        (errors.ArgumentError, "expected one of them", lambda: lm(None)),
        (errors.ShapeError, "state has 3 layers, expected n_layer=1", lambda: make_lm(n_layer=1).prefill(ids, state)),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert not any(t.any() for pair in state for t in pair)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_decode_traces_whole_and_never_again():
    lm = randomise(MambaLMHeadModel(MambaConfig(16, 2, 30))).eval()
    ids = make_ids(2, 12, vocab=30)
    torch._dynamo.reset()
    counter = CompileCounter()
    decode = torch.compile(lambda tokens, state: lm(tokens[:, None], state=state).logits[:, 0], backend=counter, fullgraph=True)
    with torch.no_grad():
        expected = lm(ids).logits
        state = lm.allocate_state(2)
        for t in range(12):
            assert_same_logits(decode(ids[:, t], state), expected[:, t])
    assert counter.frame_count == 1
