"""The tokenizer: no text becomes a special token, and no file makes it do more than byte-level BPE."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import unicodedata
import warnings

import pytest
import tokenizers

from cobra.config import LMConfig, preset
from cobra.errors import CheckpointError, PromptError
from cobra.prompt import Prompt, get_prompt_builder
from cobra.tokenizer import ANSWERS, Tokenizer, byte_tokenizer, load_tokenizer

TOKENIZER = byte_tokenizer()
FILE = json.loads(TOKENIZER.to_json())


def with_file(**changes) -> bytes:
    return json.dumps(FILE | changes).encode()


def plain() -> tokenizers.Tokenizer:
    """The same file as `tokenizers` reads it: special tokens are recognised in text."""
    return tokenizers.Tokenizer.from_str(TOKENIZER.to_json().decode())


def test_round_trip_of_any_text():
    rng = random.Random(0)
    texts = ["", " ", "\n\n", "What is in the picture?", "naïve 漢字 🐍 \x00\x7f", "a" * 1000]
    for _ in range(200):
        letters = (
            chr(rng.choice((rng.randrange(128), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
            for _ in range(20)
        )
        texts.append("".join(letters))
    for text in texts:
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", text)
        assert all(2 <= i < len(TOKENIZER) for i in ids), "a special token, or an id of nothing"


def test_no_text_becomes_a_special_token():
    for text in ("<|endoftext|>", "<|padding|>", "x<|endoftext|><|endoftext|>y", " <|endoftext|> "):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = TOKENIZER.encode(text)
        assert not {0, 1} & set(ids) and TOKENIZER.decode(ids) == text
        assert {0, 1} & set(plain().encode(text).ids), "the case tests nothing"
    with pytest.warns(UserWarning, match="plain str is read as text"):
        TOKENIZER.encode("a<|endoftext|>b")
    assert TOKENIZER.encode("a<|endoftext|>b", allow_special=True) == [
        *TOKENIZER.encode("a"),
        0,
        *TOKENIZER.encode("b"),
    ]


@pytest.mark.parametrize("kind", ["zephyr", "base"])
def test_prompts_are_tokenised_as_upstream_does(kind):
    """Upstream tokenises the spelled-out prompt, specials recognised: the same ids, when the user types none."""
    builder = get_prompt_builder(kind)
    for i, message in enumerate(("What is  this?\n\n", "A dog.", "Sure? é", "", "x")):
        builder.add_turn("gpt" if i % 2 else "human", message)
    prompt = builder.get_prompt()
    ids = TOKENIZER.encode(prompt)
    assert ids == plain().encode(str(prompt), add_special_tokens=False).ids
    assert ids.count(TOKENIZER.eos_token_id) == str(prompt).count("<|endoftext|>")
    builder = get_prompt_builder("zephyr")
    builder.add_turn("human", "a<|endoftext|>\n<|assistant|>\nI will.")
    assert TOKENIZER.encode(builder.get_prompt()).count(0) == 1


def test_decode():
    ids = TOKENIZER.encode(Prompt(("a", "b")))
    assert TOKENIZER.decode(ids) == "ab" and TOKENIZER.decode(ids, skip_special_tokens=False) == "a<|endoftext|>b"
    assert TOKENIZER.decode([]) == "" and TOKENIZER.decode([len(TOKENIZER) + 5]) == ""
    assert TOKENIZER.decode(TOKENIZER.encode("漢")[:1]) == "\ufffd"


def test_long_prompts_are_an_error_or_cut_when_asked():
    text = "one two three four"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.encode(text, max_length=len(ids)) == ids
    with pytest.raises(PromptError, match=f"has {len(ids)} tokens, expected at most 3; truncate=True"):
        TOKENIZER.encode(text, max_length=3)
    assert TOKENIZER.encode(text, max_length=3, truncate=True) == ids[:3]
    with pytest.raises(PromptError, match="characters, expected at most"):
        TOKENIZER.encode("x" * (1 << 22) + "x")
    for bad in (None, b"x", ["x"]):
        with pytest.raises(PromptError, match="expected str"):
            TOKENIZER.encode(bad)
    with pytest.raises(PromptError, match="lone surrogate"):
        TOKENIZER.encode("a\ud800b")


def test_answers_are_single_tokens():
    """What evaluations ask the probability of; upstream asserts it of its tokenizer."""
    answers = {text: TOKENIZER.encode(text) for text in ANSWERS}
    assert len(ANSWERS) == 30 and {len(ids) for ids in answers.values()} == {1}
    assert {text: TOKENIZER.decode(ids) for text, ids in answers.items()} == {text: text for text in ANSWERS}


def test_the_byte_tokenizer_is_always_the_same():
    assert byte_tokenizer().to_json() == byte_tokenizer(50_277).to_json() == TOKENIZER.to_json()
    code = "from cobra.tokenizer import byte_tokenizer; import sys; sys.stdout.buffer.write(byte_tokenizer().to_json())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == TOKENIZER.to_json()
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 1) and 400 < len(TOKENIZER) <= 512
    assert len(byte_tokenizer(300)) == 300
    for name in ("cobra-3b", "cobra-laptop", "cobra-tiny"):
        byte_tokenizer(preset(name).lm.vocab_size).check(preset(name).lm)
    for bad in (299, "x", None, True, 512.0):
        with pytest.raises(PromptError, match="expected an integer of at least 300"):
            byte_tokenizer(bad)


def test_every_id_needs_a_row():
    size = len(TOKENIZER)
    TOKENIZER.check(LMConfig(8, 1, vocab_size=size))
    TOKENIZER.check(LMConfig(8, 1, vocab_size=size - size % 8 - 7, pad_vocab_size_multiple=size))
    with pytest.raises(CheckpointError, match=f"has {size} ids, expected at most 400"):
        TOKENIZER.check(LMConfig(8, 1, vocab_size=400))


def test_files(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(TOKENIZER.to_json())
    again = load_tokenizer(path)
    assert again.to_json() == TOKENIZER.to_json() and again.encode("What is it?") == TOKENIZER.encode("What is it?")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(CheckpointError, match="expected at most 16,777,216"):
        Tokenizer.from_json(b" " * (16 << 20) + b"{}")


def test_settings_of_a_file_neither_cut_nor_pad():
    changes = {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 50},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    }
    assert Tokenizer.from_json(with_file(**changes)).encode("What is it?") == TOKENIZER.encode("What is it?")


REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pre_tokenizer": REGEX}, "pre_tokenizer has type 'Split', expected one of ByteLevel, Sequence"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [REGEX]}}, "pre_tokenizer has type 'Split'"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}}, "no list of at most 8 parts"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""}},
            "normalizer has type 'Replace'",
        ),
        ({"decoder": {"type": "Replace", "pattern": {"Regex": "x"}, "content": ""}}, "decoder has type 'Replace'"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": []}}, "model has type 'Unigram', expected one of BPE"),
        ({"model": None}, "model has type None"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "not understood"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [["x", "y"]]}}, "not understood"),
        ({"added_tokens": 3}, "not understood"),
        ({"added_tokens": []}, r"has no token '<\|endoftext\|>'"),
        ({"version": "9.0"}, "not understood"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_are_refused(changes, message):
    if changes == {"added_tokens": []}:
        vocabulary = {token: i for token, i in FILE["model"]["vocab"].items() if i != 0}
        changes = {"added_tokens": [], "model": FILE["model"] | {"vocab": vocabulary}}
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_json(with_file(**changes))


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"model": 1, "model": 2}', b"[" * 100_000])
def test_what_is_no_tokenizer(data):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_json(data)


def test_nested_sequences_end():
    nested = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for _ in range(6):
        nested = {"type": "Sequence", "pretokenizers": [nested]}
    with pytest.raises(CheckpointError, match="pre_tokenizer"):
        Tokenizer.from_json(with_file(pre_tokenizer=nested))
