"""The model: prefill and decode, the state after an image, ragged batches, loss; all on cobra-tiny, with random weights."""

import pytest
import torch
import torch.nn.functional as F

from cobra.config import PRESETS, preset
from cobra.errors import RequestError
from cobra.model import CobraVLM
from cobra.splice import IGNORE_INDEX
from cobra_kernels.errors import ShapeError
from tests.model.conftest import make_vlm

IMAGE_TOKENS = 64  # of cobra-tiny


def ids(*shape, seed=0):
    return torch.randint(1, 257, shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, limit=1e-5):
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= limit, f"relative error {error:.2e}, expected at most {limit:.0e}"


# --- shape ------------------------------------------------------------------------------------------------------------


def test_cobra_3b_has_the_published_parameter_counts():
    vlm = CobraVLM(preset("cobra-3b"), device="meta")
    assert sum(p.numel() for p in vlm.llm.parameters()) == 2_768_345_600
    assert sum(p.numel() for p in vlm.projector.parameters()) == 47_789_568
    assert all(p.is_meta for p in vlm.parameters())
    assert vlm.llm.lm_head.weight is vlm.llm.backbone.embedding.weight
    # 23.6 MB of memory for an image in bf16, 13.1 MB with a bf16 recurrence state
    assert vlm.llm.allocate_state(1, torch.bfloat16).nbytes == 64 * 5120 * (4 * 2 + 16 * 4) == 23_592_960
    assert vlm.llm.allocate_state(1, torch.bfloat16, ssm_dtype=torch.bfloat16).nbytes == 13_107_200


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"cobra-3b"}))
def test_presets_build_what_their_config_says(name):
    config = preset(name)
    vlm = CobraVLM(config, device="meta")
    assert sum(p.numel() for p in vlm.llm.parameters()) == config.lm.num_parameters
    assert sum(p.numel() for p in vlm.projector.parameters()) == config.projector.num_parameters
    assert vlm.config.num_image_tokens == {"cobra-ldp": 196, "cobra-tiny": 64}.get(name, 729)


def test_parameter_names(vlm):
    names = set(vlm.state_dict())
    assert {name.split(".")[0] for name in names} == {"vision", "projector", "llm"}
    for name in (
        "vision.towers.dino.embeddings.register_tokens",
        "vision.towers.siglip.encoder.layers.1.mlp.fc2.weight",
        "projector.projector.4.bias",
        "llm.backbone.embedding.weight",
        "llm.backbone.layers.1.mixer.A_log",
        "llm.backbone.norm_f.weight",
        "llm.lm_head.weight",
    ):
        assert name in names
    assert not list(vlm.buffers()) or all(not n.endswith("position_ids") for n in names)


# --- image to embeddings ----------------------------------------------------------------------------------------------


def test_preprocess_takes_one_or_many(vlm, photos):
    one, many = vlm.preprocess(photos[0]), vlm.preprocess(photos)
    assert {k: tuple(v.shape) for k, v in one.items()} == {"dino": (1, 3, 112, 112), "siglip": (1, 3, 112, 112)}
    assert all(len(v) == 3 and torch.equal(v[:1], one[k]) for k, v in many.items())
    with pytest.raises(RequestError, match="empty list"):
        vlm.preprocess([])


def test_the_prompt_is_image_then_text_and_nothing_else(vlm, photos):
    pixels, text = vlm.preprocess(photos[:2]), ids(2, 5)
    logits, state = vlm.prefill(text, pixels)
    with torch.no_grad():
        features = vlm.vision(pixels)
        image = vlm.projector(features)
        by_hand = torch.cat([image, vlm.llm.backbone.embedding(text)], dim=1)
        assert image.shape == (2, IMAGE_TOKENS, 64) and by_hand.shape[1] == IMAGE_TOKENS + 5
        close(logits, vlm.llm(None, inputs_embeds=by_hand).logits[:, -1])
    assert state.batch_size == 2


# --- prefill and decode are one recurrence ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 2, 3, 4, 6])
def test_prefill_then_decode_equals_one_long_prefill(vlm, photos, split):
    """Also for prompts shorter than the convolution is wide."""
    pixels, text = vlm.preprocess(photos[:2]), ids(2, 7)
    logits, state = vlm.prefill(text[:, :split], pixels)
    for t in range(split, 7):
        logits = vlm.decode(text[:, t], state)
    want, want_state = vlm.prefill(text, pixels)
    close(logits, want)
    for (conv, ssm), (want_conv, want_ssm) in zip(state, want_state):
        close(conv, want_conv)
        close(ssm, want_ssm)


def test_greedy_tokens_equal_a_recomputation_for_every_token(vlm, photos):
    pixels, text = vlm.preprocess(photos[0]), ids(1, 4)
    logits, state = vlm.prefill(text, pixels)
    tokens = []
    for _ in range(8):
        token = logits.argmax(-1)
        again = vlm(torch.cat([text, *[t[:, None] for t in tokens]], dim=1), pixel_values=pixels, num_last_tokens=1).logits[:, -1]
        close(logits, again)
        best = again.topk(2).values[0]
        assert best[0] - best[1] > 1e-4, "the test needs another seed: two tokens are equally good"
        assert torch.equal(token, again.argmax(-1))
        tokens.append(token)
        logits = vlm.decode(token, state)
    assert len({int(t) for t in tokens}) > 1  # the test would prove little on a constant


def test_text_alone(vlm):
    logits, _ = vlm.prefill(ids(2, 5))
    with torch.no_grad():
        close(logits, vlm.llm(ids(2, 5)).logits[:, -1])
    close(vlm(ids(2, 5)).logits[:, -1], logits)


# --- the state after an image -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_len", [1, 2, 3, 9])
def test_image_state_equals_the_one_shot_path(vlm, photos, text_len):
    text = ids(1, text_len)
    kept = vlm.encode_image(photos[0])
    assert kept.num_image_tokens == IMAGE_TOKENS and len(kept) == 1
    assert kept.nbytes == 2 * 128 * (4 * 4 + 16 * 4)  # layers * d_inner * (W conv + N ssm), both fp32 here
    logits, state = vlm.prefill(text, image_state=kept)
    want, want_state = vlm.prefill(text, vlm.preprocess(photos[0]))
    close(logits, want)
    for got, expected in zip((*state.conv, *state.ssm), (*want_state.conv, *want_state.ssm)):
        close(got, expected)


def test_questions_skip_vision_and_projector_and_leave_the_state_alone(vlm, photos, monkeypatch):
    kept = vlm.encode_image(photos[0])
    before = kept.state.clone()

    def never(*args, **kwargs):
        raise AssertionError("the image was read again")

    monkeypatch.setattr(vlm.vision, "forward", never)
    monkeypatch.setattr(vlm.projector, "forward", never)
    first, state = vlm.prefill(ids(1, 5), image_state=kept)
    vlm.decode(first.argmax(-1), state)
    vlm.prefill(ids(1, 3, seed=1), image_state=kept)
    again, _ = vlm.prefill(ids(1, 5), image_state=kept)
    assert torch.equal(first, again)
    for got, want in zip((*kept.state.conv, *kept.state.ssm), (*before.conv, *before.ssm)):
        assert torch.equal(got, want)


def test_one_image_serves_a_batch_of_questions(vlm, photos):
    kept = vlm.encode_image(photos[0])
    text = ids(3, 6)
    got, state = vlm.prefill(text, image_state=kept, lengths=[6, 2, 4])
    expanded, _ = vlm.prefill(text, image_state=kept.expand(3), lengths=[6, 2, 4])
    assert torch.equal(got, expanded) and state.batch_size == 3
    for i, n in enumerate((6, 2, 4)):
        close(got[i : i + 1], vlm.prefill(text[i : i + 1, :n], image_state=kept)[0])


def test_many_images(vlm, photos):
    kept = vlm.encode_image(photos)
    assert len(kept) == 3 and kept.nbytes == 3 * vlm.encode_image(photos[0]).nbytes
    text = ids(3, 4)
    close(vlm.prefill(text, image_state=kept)[0], vlm.prefill(text, vlm.preprocess(photos))[0])
    close(kept[1].state.ssm[0], vlm.encode_image(photos[1]).state.ssm[0])
    close(kept[-1].state.ssm[1], kept.state.ssm[1][2:])
    with pytest.raises(IndexError):
        kept[3]


def test_half_precision_recurrence_state(vlm, photos):
    whole, half = vlm.encode_image(photos[0]), vlm.encode_image(photos[0], ssm_dtype=torch.bfloat16)
    assert half.nbytes < whole.nbytes and {t.dtype for t in half.state.ssm} == {torch.bfloat16}
    assert whole.to(ssm_dtype=torch.bfloat16).nbytes == half.nbytes
    close(vlm.prefill(ids(1, 5), image_state=half)[0], vlm.prefill(ids(1, 5), image_state=whole)[0], 2e-2)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_ragged_rows_equal_single_rows(vlm, photos):
    pixels, text, lengths = vlm.preprocess(photos), ids(3, 9), [9, 1, 4]
    batch, state = vlm.prefill(text, pixels, lengths=lengths)
    batch_next = vlm.decode(torch.tensor([5, 6, 7]), state)
    for i, n in enumerate(lengths):
        one, one_state = vlm.prefill(text[i : i + 1, :n], {k: v[i : i + 1] for k, v in pixels.items()})
        close(batch[i : i + 1], one)
        close(batch_next[i : i + 1], vlm.decode(torch.tensor([5 + i]), one_state))


def test_rows_with_and_without_an_image(vlm, photos):
    pixels, text = vlm.preprocess(photos[:2]), ids(4, 6)
    got, _ = vlm.prefill(text, pixels, lengths=[6, 3, 6, 2], image_rows=[3, 0])
    one_image = [{k: v[i : i + 1] for k, v in pixels.items()} for i in range(2)]
    close(got[3:], vlm.prefill(text[3:, :2], one_image[0])[0])
    close(got[:1], vlm.prefill(text[:1], one_image[1])[0])
    close(got[1:2], vlm.prefill(text[1:2, :3])[0])
    close(got[2:3], vlm.prefill(text[2:3])[0])


def test_decoding_some_rows_leaves_the_others(vlm):
    _, state = vlm.prefill(ids(3, 4))
    untouched = state.ssm[0][1].clone()
    got = vlm.decode(torch.tensor([9, 8]), state, rows=torch.tensor([2, 0]))
    assert torch.equal(state.ssm[0][1], untouched)
    _, alone = vlm.prefill(ids(3, 4)[2:])
    close(got[:1], vlm.decode(torch.tensor([9]), alone))


# --- forward ----------------------------------------------------------------------------------------------------------


def test_loss_is_the_shifted_cross_entropy_of_text_tokens(vlm, photos):
    pixels, text = vlm.preprocess(photos[:2]), ids(2, 6)
    labels = text.clone()
    labels[0, :3] = IGNORE_INDEX
    loss, logits = vlm(text, None, pixels, labels)
    assert logits.shape == (2, IMAGE_TOKENS + 6, 512) and loss.dtype == torch.float32
    log_p = F.log_softmax(logits.double(), -1)
    terms = [-log_p[b, IMAGE_TOKENS + t - 1, text[b, t]] for b in range(2) for t in range(6) if labels[b, t] != IGNORE_INDEX]
    close(loss, torch.stack(terms).mean())  # the first text token is predicted by the last image token
    last = vlm(text, None, pixels, labels, num_last_tokens=2)
    assert torch.equal(last.logits, logits[:, -2:]) and torch.equal(last.loss, loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(vlm, photos, side):
    pixels, tokens = vlm.preprocess(photos[:2]), ids(2, 5)
    text, mask = torch.full((2, 5), 77), torch.zeros(2, 5, dtype=torch.long)
    place = slice(3, 5) if side == "left" else slice(0, 2)
    text[0, place], mask[0, place] = tokens[0, :2], 1
    text[1], mask[1] = tokens[1], 1
    labels = text.masked_fill(mask == 0, IGNORE_INDEX)
    loss, logits = vlm(text, mask, pixels, labels)
    close(logits[0, : IMAGE_TOKENS + 2], vlm(tokens[:1, :2], None, {k: v[:1] for k, v in pixels.items()}).logits[0])
    close(logits[1], vlm(tokens[1:], None, {k: v[1:] for k, v in pixels.items()}).logits[0])
    alone = [vlm(t, None, {k: v[i : i + 1] for k, v in pixels.items()}, t).loss for i, t in enumerate((tokens[:1, :2], tokens[1:]))]
    close(loss, (2 * alone[0] + 5 * alone[1]) / 7)


def test_gradients_reach_every_parameter(photos):
    vlm = make_vlm().requires_grad_(True)
    text = ids(2, 4)
    vlm(text, None, vlm.preprocess(photos[:1]), text, multimodal_indices=[1]).loss.backward()
    missing = [name for name, p in vlm.named_parameters() if p.grad is None or not p.grad.any()]
    # softmax ignores what is added to all keys alike, so the gradient of a key bias is 0 up to rounding
    assert [name for name in missing if "k_proj.bias" not in name] == []


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_bf16_weights_keep_the_recurrence_in_fp32(photos, vlm):
    half = make_vlm().to(torch.bfloat16)
    mixer = half.llm.backbone.layers[0].mixer
    assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_proj.bias.dtype} == {torch.float32}
    logits, state = half.prefill(ids(1, 5), half.preprocess(photos[0]))
    assert logits.dtype == torch.bfloat16
    assert {t.dtype for t in state.conv} == {torch.bfloat16} and {t.dtype for t in state.ssm} == {torch.float32}
    close(logits, vlm.prefill(ids(1, 5), vlm.preprocess(photos[0]))[0], 0.1)
    assert half.decode(torch.tensor([3]), state).isfinite().all()
    kept = half.encode_image(photos[0])
    close(half.prefill(ids(1, 5), image_state=kept)[0], logits, 3e-2)


def test_autocast(vlm, photos):
    with torch.autocast("cpu", torch.bfloat16):
        logits, state = vlm.prefill(ids(1, 5), vlm.preprocess(photos[0]))
        following = vlm.decode(torch.tensor([3]), state)
    want, want_state = vlm.prefill(ids(1, 5), vlm.preprocess(photos[0]))
    close(logits, want, 0.1)
    close(following, vlm.decode(torch.tensor([3]), want_state), 0.1)


def test_cobra_laptop_runs():
    """729 image tokens, then one; prefill and decode meet here as well."""
    torch.manual_seed(0)
    vlm = CobraVLM(preset("cobra-laptop")).eval()
    pixels = {name: torch.randn(1, 3, 384, 384) for name in ("dino", "siglip")}
    kept = vlm.encode_image(pixels)
    assert kept.num_image_tokens == 729
    logits, state = vlm.prefill(ids(1, 2), image_state=kept)
    following = vlm.decode(torch.tensor([7]), state)
    want, _ = vlm.prefill(torch.cat([ids(1, 2), torch.tensor([[7]])], 1), image_state=kept)
    close(following, want)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors(vlm, photos):
    kept = vlm.encode_image(photos[:2])
    with pytest.raises(RequestError, match="image_state is given with pixel_values"):
        vlm.prefill(ids(1, 3), vlm.preprocess(photos[0]), image_state=kept[0])
    with pytest.raises(ShapeError, match="image_state has 2 images, expected 1 or batch=3"):
        vlm.prefill(ids(3, 3), image_state=kept)
    with pytest.raises(ShapeError, match="2 images for 3 rows of text"):
        vlm.prefill(ids(3, 3), vlm.preprocess(photos[:2]))
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(1, 2\)"):
        vlm(ids(1, 3), torch.ones(1, 2))
    other = CobraVLM(preset("cobra-laptop"), device="meta").llm.allocate_state(1)
    with pytest.raises(ShapeError, match="image_state is MambaState.*expected n_layer=2 layers"):
        vlm.prefill(ids(1, 3), image_state=type(kept)(other, 729))
