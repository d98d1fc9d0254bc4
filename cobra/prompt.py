"""Prompts in the formats that Cobra's language models were trained with.

A prompt is a `str` that remembers where its format put an end-of-text token, so that the tokenizer inserts it by id: the
same characters typed by a user stay text. (`<|user|>` and `<|assistant|>` are ordinary text to these models: a message that
contains them is not escaped, because no token separates the roles.)
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable

from .errors import PromptError

END_OF_TEXT = "<|endoftext|>"
IMAGE = "<image>"  # a placeholder in other models' datasets; Cobra's image always comes first


class Prompt(str):
    """Text segments with one end-of-text token between each two; as a str, the tokens are spelled out."""

    segments: tuple[str, ...]

    def __new__(cls, segments: Iterable[str] = ("",)) -> Prompt:  # noqa: PYI034  typing.Self is newer than our oldest Python
        parts = tuple(str(segment) for segment in segments)
        self = super().__new__(cls, END_OF_TEXT.join(parts))
        self.segments = parts
        return self

    def __add__(self, other: str) -> Prompt:
        after = other.segments if isinstance(other, Prompt) else (other,)
        return Prompt((*self.segments[:-1], self.segments[-1] + after[0], *after[1:]))

    def __radd__(self, other: str) -> Prompt:
        return Prompt((other + self.segments[0], *self.segments[1:]))

    def __getnewargs__(self) -> tuple[tuple[str, ...]]:
        return (self.segments,)


class PromptBuilder(ABC):
    """Turns of a conversation, human first, to a prompt. Subclasses say how a human turn is wrapped."""

    def __init__(self, system_prompt: str | None = None):
        """system_prompt: these formats have none; a non-empty one is ignored with a warning."""
        if system_prompt:
            warnings.warn(
                "get_prompt_builder: this prompt format has no system prompt; it is ignored", UserWarning, stacklevel=3
            )
        self.prompt = Prompt()
        self.turn_count = 0

    @abstractmethod
    def wrap_human(self, message: str) -> Prompt:
        """A question, up to where the answer begins."""

    def wrap_gpt(self, message: str) -> Prompt:
        """An answer and its end; an empty answer is one space."""
        return Prompt((message or " ", ""))

    def add_turn(self, role: str, message: str) -> Prompt:
        """Append a turn and return what it added. role: "human" and "gpt" in alternation; "<image>" is removed."""
        expected = "human" if self.turn_count % 2 == 0 else "gpt"
        if role != expected:
            raise PromptError(f"add_turn: role is {role!r:.80}, expected {expected!r}; turn {self.turn_count} decides")
        message = _text("add_turn", message).replace(IMAGE, "").strip()
        if role == "gpt":
            turn = self.wrap_gpt(message)
        else:
            turn = ("\n" if self.turn_count else "") + self.wrap_human(message)
        self.prompt += turn
        self.turn_count += 1
        return turn

    def get_potential_prompt(self, message: str) -> Prompt:
        """The prompt if `message` were the next human turn; nothing is appended.

        As upstream, and unlike `add_turn`: the message is used as it is ("<image>" and blanks stay), and after the
        first turn there is no newline before it. For what the model was trained on, use `add_turn` and `get_prompt`.
        """
        return self.prompt + self.wrap_human(_text("get_potential_prompt", message))

    def get_prompt(self) -> Prompt:
        """All turns so far."""
        return self.prompt


class ZephyrPromptBuilder(PromptBuilder):
    """`<|user|>`, message, end of text, `<|assistant|>`: the chat models."""

    def wrap_human(self, message: str) -> Prompt:
        return Prompt((f"<|user|>\n{message}", "\n<|assistant|>\n"))


class BasePromptBuilder(PromptBuilder):
    """`In: message`, `Out: `: the models that were not tuned for chat."""

    def wrap_human(self, message: str) -> Prompt:
        return Prompt((f"In: {message}\nOut: ",))


def _text(op: str, message: str) -> str:
    if not isinstance(message, str):
        raise PromptError(f"{op}: message is {type(message).__name__}, expected str")
    return message


def get_prompt_builder(prompt: str, system_prompt: str | None = None) -> PromptBuilder:
    """prompt: "zephyr" or "base", the `prompt` of a `CobraConfig`."""
    builders = {"zephyr": ZephyrPromptBuilder, "base": BasePromptBuilder}
    if prompt not in builders:
        raise PromptError(f"get_prompt_builder: prompt is {prompt!r:.80}, expected one of {', '.join(builders)}")
    return builders[prompt](system_prompt)
