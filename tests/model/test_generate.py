"""Text in, text out: pieces, stops, sampling options, batches, string probabilities."""

import random

import pytest
import torch

from cobra.errors import PromptError, RequestError
from cobra.generate import Options, TextStream, encode_prompts
from cobra_kernels.modules import Sampling
from tests.model.conftest import ByteTokenizer

PROMPTS = ["What is this?", "Hi", "Say something long about the picture."]


def run(tokens, decode, stops=()):
    """The pieces that a TextStream gives, the last one from `finish`."""
    stream, pieces = TextStream(decode, stops), []
    for token in tokens:
        pieces.append(stream.put(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


class fixed_tokenizer(ByteTokenizer):
    """A ByteTokenizer with another end of text."""

    def __init__(self, eos_token_id):
        self.eos_token_id = eos_token_id


@pytest.fixture
def with_eos(vlm, monkeypatch):
    """with_eos(token): greedy answers end at that token."""
    return lambda token: monkeypatch.setattr(vlm, "tokenizer", fixed_tokenizer(token))


def greedy_tokens(vlm, image, prompt, n):
    """The oracle: prefill, then argmax and decode."""
    logits, state = vlm.prefill(torch.tensor([vlm.tokenizer.encode(prompt)]), vlm.preprocess(image))
    tokens = []
    for _ in range(n):
        tokens.append(int(logits[0, : len(vlm.tokenizer)].argmax()))
        logits = vlm.decode(torch.tensor(tokens[-1:]), state)
    return tokens


# --- pieces of text ---------------------------------------------------------------------------------------------------


def test_pieces_never_split_a_character():
    text = "aé€😀b"
    pieces = run([b + 1 for b in text.encode()], ByteTokenizer().decode)
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_pieces_join_to_the_whole_for_any_bytes():
    decode, rng = ByteTokenizer().decode, random.Random(0)
    common = [*range(0x20), *range(0x7F, 0xC4), 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80]
    for _ in range(500):
        tokens = [rng.choice(common) + 1 for _ in range(rng.randrange(12))]
        pieces = run(tokens, decode)
        assert "".join(pieces) == decode(tokens), tokens


def test_an_unfinished_character_comes_out_at_the_end():
    assert run([0xE2 + 1, 0x82 + 1], ByteTokenizer().decode) == ["", "", "\ufffd"]


@pytest.mark.parametrize(
    "text, stops, want",
    [
        ("hello world", [], "hello world"),
        ("hello world", ["lo w"], "hel"),
        ("hello world", ["world", "o"], "hell"),  # the earliest, whatever the order
        ("hello", ["lox"], "hello"),  # a beginning of a stop that never comes
        ("aaab", ["aab"], "a"),  # overlaps itself
        ("ababac", ["abac"], "ab"),
        ("x", ["x"], ""),
        ("a😀b", ["😀"], "a"),
    ],
)
def test_stops(text, stops, want):
    pieces = run([b + 1 for b in text.encode()], ByteTokenizer().decode, stops)
    assert "".join(pieces) == want


def test_a_possible_stop_is_held_back_and_nothing_else():
    stream = TextStream(ByteTokenizer().decode, ["\n\n"])
    assert [stream.put(ord(c) + 1) for c in "a\nb\n"] == ["a", "", "\nb", ""]
    assert stream.put(ord("\n") + 1) == "" and stream.stopped
    assert stream.put(ord("z") + 1) == "" and stream.finish() == ""


def test_stops_against_a_simple_oracle():
    rng, decode = random.Random(1), ByteTokenizer().decode
    for _ in range(500):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(10)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        ends = [text.index(s) + len(s) for s in stops if s in text]  # the stop that is complete first ends the answer
        want = text
        if ends:
            seen = text[: min(ends)]
            want = seen[: min(seen.index(s) for s in stops if s in seen)]
        assert "".join(run([ord(c) + 1 for c in text], decode, stops)) == want, (text, stops)


# --- options ----------------------------------------------------------------------------------------------------------


def test_the_default_is_greedy_and_sampling_has_no_hidden_top_k():
    assert Options().sampling == Sampling() and Options().sampling.is_greedy
    assert Options(temperature=0.4, top_p=0.5).sampling == Sampling()
    assert Options(do_sample=True, temperature=0.4).sampling == Sampling(temperature=0.4, top_k=0)
    assert Options(repetition_penalty=1.5).sampling == Sampling(repetition_penalty=1.5)


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"max_new_tokens": 1.5},
        {"do_sample": 1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [3]},
        {"seed": -1},
        {"seed": 1.0},
        {"use_cache": None},
        {"num_beams": 4},
    ],
)
def test_bad_options_are_refused_before_anything_runs(vlm, option):
    (name,) = option
    with pytest.raises(RequestError, match=name):
        vlm.stream(None, "hi", **option)
    with pytest.raises(RequestError, match=name):
        vlm.generate_batch(None, ["hi"], **option)


# --- one prompt -------------------------------------------------------------------------------------------------------


def test_greedy_answer(vlm, photos):
    want = vlm.tokenizer.decode(greedy_tokens(vlm, photos[0], PROMPTS[0], 12))
    assert vlm.generate(photos[0], PROMPTS[0], max_new_tokens=12) == want
    assert vlm.generate(vlm.preprocess(photos[0]), PROMPTS[0], max_new_tokens=12) == want
    assert vlm.generate(vlm.encode_image(photos[0]), PROMPTS[0], max_new_tokens=12) == want
    assert vlm.generate(photos[0], PROMPTS[0], max_new_tokens=12, use_cache=True, temperature=5.0) == want
    assert vlm.generate(photos[1], PROMPTS[0], max_new_tokens=12) != want  # it does look


def test_one_piece_per_token(vlm, photos):
    pieces = list(vlm.stream(photos[0], PROMPTS[0], max_new_tokens=12))
    assert len(pieces) == 12 and "".join(pieces) == vlm.generate(photos[0], PROMPTS[0], max_new_tokens=12)


def test_end_of_text_stops_and_is_no_text(vlm, photos, with_eos):
    tokens = greedy_tokens(vlm, photos[0], PROMPTS[0], 12)
    eos = next(t for t in tokens[1:] if t != tokens[0])
    cut = tokens[: tokens.index(eos)]
    with_eos(eos)
    pieces = list(vlm.stream(photos[0], PROMPTS[0], max_new_tokens=12))
    assert "".join(pieces) == vlm.tokenizer.decode(cut) and len(pieces) == len(cut) + 1


def test_stop_string_ends_the_answer(vlm):
    whole = vlm.generate(None, PROMPTS[1], max_new_tokens=20)
    stop = whole[3:5]
    assert vlm.generate(None, PROMPTS[1], max_new_tokens=20, stop=stop) == whole[: whole.index(stop)]
    assert vlm.generate_batch(None, PROMPTS[1:2], max_new_tokens=20, stop=[stop]) == [whole[: whole.index(stop)]]


def test_sampling(vlm):
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}
    one, same, other = (vlm.generate(None, "Hi", seed=seed, **options) for seed in (1, 1, 2))
    assert one == same != other
    greedy = vlm.generate(None, "Hi", max_new_tokens=12)
    assert vlm.generate(None, "Hi", seed=1, **{**options, "temperature": 0.0}) == greedy
    assert vlm.generate(None, "Hi", seed=1, top_k=1, **options) == greedy
    assert vlm.generate(None, "Hi", seed=1, **options) != greedy
    torch.manual_seed(5)
    first = vlm.generate(None, "Hi", **options)  # no seed: torch's generator
    torch.manual_seed(5)
    assert vlm.generate(None, "Hi", **options) == first


def test_repetition_penalty_counts_the_prompt_but_not_its_padding(vlm):
    """A penalty so large that a token is only ever said again when all are used up."""
    prompts = ["Hi", "A much longer prompt than the other one"]
    options = {"max_new_tokens": 30, "repetition_penalty": 1e6}
    alone = [vlm.generate(None, prompt, **options) for prompt in prompts]
    assert alone == vlm.generate_batch(None, prompts, **options)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ByteTokenizer, "decode", lambda self, ids: said.append(ids[-1]) or "x")
        vlm.generate(None, prompts[0], **options)
    assert len(said) == len(set(said)) == 30 and not set(said) & set(vlm.tokenizer.encode(prompts[0]))


@pytest.fixture
def spied(monkeypatch):
    """What `stream_tokens` was called with, and how many columns were taken from it."""
    from cobra import generate

    whole, seen = generate.stream_tokens, {"columns": 0}

    def stream_tokens(*args, **kwargs):
        seen.update(kwargs)
        for column in whole(*args, **kwargs):
            seen["columns"] += 1
            yield column

    monkeypatch.setattr(generate, "stream_tokens", stream_tokens)
    return seen


def test_padding_was_never_said(vlm, spied):
    vlm.generate_batch(None, ["ab", "c"], max_new_tokens=1)
    assert spied["prompt_ids"].tolist() == [[98, 99], [100, -1]]


def test_a_batch_ends_when_every_row_has_stopped(vlm, spied):
    whole = vlm.generate_batch(None, PROMPTS, max_new_tokens=30)
    spied["columns"] = 0
    stops = [text[2:4] for text in whole]
    vlm.generate_batch(None, PROMPTS, max_new_tokens=30, stop=stops)
    assert 2 <= spied["columns"] < 30


def test_only_tokens_of_the_tokenizer_are_drawn(vlm, monkeypatch):
    """cobra-tiny has 512 rows of logits, the tokenizer 257 tokens."""
    drawn = []
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: drawn.extend(ids) or "x")
    vlm.generate(None, "Hi", max_new_tokens=200, do_sample=True, temperature=100.0, seed=0)
    assert drawn and max(drawn) < 257


def test_prompts_that_cannot_be(vlm, monkeypatch):
    with pytest.raises(PromptError, match="prompt is empty"):
        vlm.generate(None, "")
    with pytest.raises(PromptError, match="prompt is a bytes"):
        vlm.generate(None, b"hi")
    with pytest.raises(PromptError, match="prompt has 2049 tokens, expected at most 2048"):
        vlm.generate(None, "a" * 2049)
    monkeypatch.setattr(vlm, "tokenizer", None)
    with pytest.raises(PromptError, match="no tokenizer"):
        vlm.generate(None, "hi")


def test_encode_prompts_pads_on_the_right(vlm):
    ids, lengths = encode_prompts(vlm, ["ab", "c"])
    assert ids.tolist() == [[98, 99], [100, 0]] and lengths.tolist() == [2, 1]


# --- many prompts -----------------------------------------------------------------------------------------------------


def test_batch_equals_singles(vlm, photos):
    singles = [vlm.generate(image, prompt, max_new_tokens=10) for image, prompt in zip(photos, PROMPTS)]
    assert len(set(singles)) == 3
    assert vlm.generate_batch(photos, PROMPTS, max_new_tokens=10) == singles
    assert vlm.generate_batch(vlm.preprocess(photos), PROMPTS, max_new_tokens=10) == singles
    assert vlm.generate_batch(vlm.encode_image(photos), PROMPTS, max_new_tokens=10) == singles


def test_batch_with_rows_that_end_early(vlm, photos, with_eos):
    tokens = greedy_tokens(vlm, photos[0], PROMPTS[0], 10)
    with_eos(next(t for t in tokens[1:] if t != tokens[0]))
    singles = [vlm.generate(image, prompt, max_new_tokens=10) for image, prompt in zip(photos, PROMPTS)]
    assert vlm.generate_batch(photos, PROMPTS, max_new_tokens=10) == singles


def test_one_image_for_all(vlm, photos, monkeypatch):
    singles = [vlm.generate(photos[0], prompt, max_new_tokens=8) for prompt in PROMPTS]
    calls = []
    whole = vlm.vision.forward
    monkeypatch.setattr(vlm.vision, "forward", lambda pixels: calls.append(len(pixels["dino"])) or whole(pixels))
    assert vlm.generate_batch(photos[0], PROMPTS, max_new_tokens=8) == singles
    assert calls == [1]  # read once
    assert vlm.generate_batch(vlm.encode_image(photos[0]), PROMPTS, max_new_tokens=8) == singles


def test_batch_of_text_alone(vlm):
    assert vlm.generate_batch(None, PROMPTS, max_new_tokens=5) == [vlm.generate(None, p, max_new_tokens=5) for p in PROMPTS]
    assert vlm.generate_batch(None, []) == []
    assert vlm.generate_batch(None, [], ["A"]) == ([], [])


def test_sampled_batch_is_reproducible(vlm):
    options = {"max_new_tokens": 5, "do_sample": True, "seed": 3}
    assert vlm.generate_batch(None, PROMPTS, **options) == vlm.generate_batch(None, PROMPTS, **options)


def test_string_probabilities(vlm, photos):
    answers, probabilities = vlm.generate_batch(photos, PROMPTS, ["A", "Z", "b"], max_new_tokens=4)
    assert answers == vlm.generate_batch(photos, PROMPTS, max_new_tokens=4)
    for image, prompt, got in zip(photos, PROMPTS, probabilities):
        logits, _ = vlm.prefill(torch.tensor([vlm.tokenizer.encode(prompt)]), vlm.preprocess(image))
        want = torch.softmax(logits[0, [ord(c) + 1 for c in "AZb"]], 0)
        assert torch.allclose(torch.tensor(got), want, atol=1e-5) and abs(sum(got) - 1) < 1e-6


def test_string2idx_has_what_is_one_token(vlm):
    assert vlm.string2idx == {c: ord(c) + 1 for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}  # bytes: "Yes" is three tokens
    with pytest.raises(RequestError, match="'Yes', 3 tokens, expected strings of one token"):
        vlm.generate_batch(None, ["hi"], ["Yes", "No"])


def test_batch_errors(vlm, photos):
    with pytest.raises(RequestError, match="2 images for 3 texts"):
        vlm.generate_batch(photos[:2], PROMPTS)
    with pytest.raises(RequestError, match="texts is one str"):
        vlm.generate_batch(photos, "hi")
    with pytest.raises(RequestError, match="3 images for 1 texts"):
        vlm.generate(photos, "hi")
