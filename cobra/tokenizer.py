"""Text to token ids and back, around a `tokenizer.json` of the byte-level BPE kind that Cobra's language models use.

User text never becomes a special token: specials are switched off in the tokenizer, and the end-of-text tokens of a
prompt format are put between the segments of a `Prompt` by id.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from .config import LMConfig, strict_json
from .errors import CheckpointError, PromptError
from .prompt import END_OF_TEXT, Prompt

MAX_BYTES = 16 << 20
MAX_PROMPT_CHARACTERS = 1 << 22
PADDING = "<|padding|>"
ANSWERS = ("True", "False", "Yes", "No", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ")  # what evaluations ask the probability of

# What a component may be. Nothing here takes a regular expression from the file, or a rule that loops over it.
_COMPONENTS = {
    "normalizer": ("NFC", "Sequence"),
    "pre_tokenizer": ("ByteLevel", "Sequence"),
    "post_processor": ("ByteLevel", "TemplateProcessing", "Sequence"),
    "decoder": ("ByteLevel", "Sequence"),
    "model": ("BPE",),
}


class Tokenizer:
    """A byte-level BPE. `len()` is one more than its largest id; logits from there on belong to no token."""

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        backend.no_truncation()  # a file may carry settings that cut or pad; ours are explicit
        backend.no_padding()
        self._backend = backend
        self._size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eos = backend.token_to_id(END_OF_TEXT)
        if eos is None:
            raise CheckpointError(f"tokenizer: has no token {END_OF_TEXT!r}, expected one; the prompt formats need it")
        self.eos_token_id: int = eos
        pad = backend.token_to_id(PADDING)
        self.pad_token_id: int = eos if pad is None else pad

    @classmethod
    def from_json(cls, data: bytes) -> Tokenizer:
        """From the bytes of a tokenizer.json, at most 16 MiB; raises CheckpointError for anything that is none."""
        if len(data) > MAX_BYTES:
            raise CheckpointError(f"tokenizer.json: {len(data):,} bytes, expected at most {MAX_BYTES:,}")
        document = strict_json(data, "tokenizer.json")
        if not isinstance(document, dict):
            raise CheckpointError(f"tokenizer.json: top level is {type(document).__name__}, expected an object")
        for name, allowed in _COMPONENTS.items():
            _check_component(name, document.get(name), allowed, optional=name != "model")
        try:
            return cls(tokenizers.Tokenizer.from_str(data.decode("utf-8")))
        except CheckpointError:
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001  a panic in the Rust code is no Exception
            raise CheckpointError(f"tokenizer.json: not understood: {error!s:.200}") from None

    def to_json(self) -> bytes:
        return self._backend.to_str(pretty=False).encode("utf-8")

    def check(self, lm: LMConfig) -> None:
        """Every id must have a row in the embedding; raises CheckpointError."""
        if len(self) > lm.padded_vocab_size:
            raise CheckpointError(
                f"tokenizer: has {len(self):,} ids, expected at most {lm.padded_vocab_size:,}; the config's vocab_size decides"
            )

    def __len__(self) -> int:
        return self._size

    def encode(
        self,
        text: str,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        allow_special: bool = False,
    ) -> list[int]:
        """Token ids of a prompt; nothing is added in front.

        text: a `Prompt`, whose end-of-text tokens become their id, or a str, in which everything is text.
        max_length: more tokens raise PromptError; with truncate=True the end is cut off instead.
        allow_special: read the spelling of special tokens in a str as the tokens. For trusted text only.
        """
        if not isinstance(text, str):
            raise PromptError(f"encode: text is {type(text).__name__}, expected str")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise PromptError(f"encode: text has {len(text):,} characters, expected at most {MAX_PROMPT_CHARACTERS:,}")
        if isinstance(text, Prompt):
            segments: Sequence[str] = text.segments
        elif allow_special:
            segments = text.split(END_OF_TEXT)
        else:
            segments = (text,)
            if END_OF_TEXT in text:
                warnings.warn(
                    f"encode: {END_OF_TEXT} in a plain str is read as text; a prompt builder inserts the token",
                    UserWarning,
                    stacklevel=2,
                )
        ids: list[int] = []
        for i, segment in enumerate(segments):
            if i:
                ids.append(self.eos_token_id)
            try:
                ids += self._backend.encode(segment, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError):
                raise PromptError("encode: text has a lone surrogate, expected valid Unicode") from None
        if max_length is not None and len(ids) > max_length:
            if not truncate:
                raise PromptError(
                    f"encode: text has {len(ids):,} tokens, expected at most {max_length:,}; truncate=True cuts the end off"
                )
            del ids[max_length:]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids of no token are skipped."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def _check_component(name: str, component: Any, allowed: tuple[str, ...], *, optional: bool, depth: int = 0) -> None:
    if component is None and optional:
        return
    kind = component.get("type") if isinstance(component, dict) else None
    if kind not in allowed or depth > 4:
        raise CheckpointError(f"tokenizer.json: {name} has type {kind!r:.80}, expected one of {', '.join(allowed)}")
    if kind == "Sequence":
        for key in ("normalizers", "pretokenizers", "processors", "decoders"):
            parts = component.get(key, [])
            if not isinstance(parts, list) or len(parts) > 8:
                raise CheckpointError(f"tokenizer.json: {name} is no list of at most 8 parts")
            for part in parts:
                _check_component(name, part, allowed, optional=False, depth=depth + 1)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """From a tokenizer.json file; raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            return Tokenizer.from_json(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise CheckpointError(f"tokenizer.json: cannot be read: {error}") from error


# ------------------------------------------------------------------------------------------------ without a file

BYTE_TOKENIZER_SIZE = 512
_SAMPLE = (
    "What is in the picture? Describe the image in detail. How many people are there? Is this a photo of a dog or of a cat? "
    "The picture shows a woman who stands in front of a flag and smiles at the camera. There is a white car on the left side "
    "of the street, and behind it are two trees with green leaves. The man on the right holds a red cup in his hand. "
    "What color is the sky? It is blue, with some clouds. Which of these is true? I think that the answer is yes, because "
    "the other one would not be here. Please look at the text on the sign and read it to me. <|user|>\n<|assistant|>\n"
)


def byte_tokenizer(vocab_size: int = BYTE_TOKENIZER_SIZE) -> Tokenizer:
    """A small tokenizer for models without trained weights, trained here and always the same: no file, no download.

    vocab_size: at least 300; the tokenizer has no more ids than that, nor than 512: two specials, all bytes (so any text
    can be written), and common English pieces. True, False, Yes, No and A to Z are single tokens.
    """
    if type(vocab_size) is not int or vocab_size < 300:
        raise PromptError(f"byte_tokenizer: vocab_size is {vocab_size!r:.80}, expected an integer of at least 300")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, BYTE_TOKENIZER_SIZE),
        special_tokens=[END_OF_TEXT, PADDING],  # ids 0 and 1, as in GPT-NeoX
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = [word for word in ("True", "False", "Yes", "No") for _ in range(1000)]  # merged before anything else
    backend.train_from_iterator([*words, _SAMPLE], trainer)
    return Tokenizer(backend)
