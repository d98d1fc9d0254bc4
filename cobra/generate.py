"""Text in, text out: prompts to token ids, tokens to pieces of text as they come, stops, many prompts at once.

Everything runs through one function, `_begin`, which puts images and prompts into the model and returns the columns of
tokens; `generate`, `stream` and `generate_batch` differ in what they do with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cobra.errors import PromptError, RequestError
from cobra.tokenizer import ANSWERS
from cobra_kernels.errors import ArgumentError
from cobra_kernels.modules import Sampling, stream_tokens
from cobra_kernels.modules.generation import FINISHED

if TYPE_CHECKING:
    from cobra.model import CobraVLM


@dataclass(frozen=True)
class Options:
    """How to answer. The default is greedy: `do_sample=False`, whatever the sampling parameters say.

    max_new_tokens: the answer ends here at the latest.
    do_sample: draw at random; then all of these count, in this order: repetition_penalty, temperature (0 is greedy),
        top_k (0: no limit), top_p (1: no limit), min_p (0: no limit). repetition_penalty counts in a greedy answer too.
    stop: strings at whose first occurrence the answer ends; they are not part of it.
    seed: of the draws; None: torch's default generator.
    use_cache: accepted for scripts written for Cobra's own `generate`. The state of a Mamba is its cache and always kept.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    seed: int | None = None
    use_cache: bool = True

    def __post_init__(self):
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise RequestError(f"generate: max_new_tokens is {self.max_new_tokens!r}, expected an int >= 1")
        for name in ("do_sample", "use_cache"):
            if type(getattr(self, name)) is not bool:
                raise RequestError(f"generate: {name} is {getattr(self, name)!r}, expected True or False")
        if any(not isinstance(s, str) or not s for s in self.stops):
            raise RequestError(f"generate: stop is {self.stop!r}, expected strings of at least one character")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 63):
            raise RequestError(f"generate: seed is {self.seed!r}, expected an int from 0 to 2**63 - 1, or None")
        self.sampling  # noqa: B018  (checks its numbers)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        try:
            drawn = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        except ArgumentError as error:
            raise RequestError(f"generate: {error}") from None
        return drawn if self.do_sample else Sampling(repetition_penalty=self.repetition_penalty)


class TextStream:
    """Token ids of one answer to text, piece by piece: never half a character, never the beginning of a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops = decode, tuple(stops)
        self.stopped = False  # a stop string was found
        self._pending: list[int] = []  # tokens since the last complete character
        self._sent = 0  # characters of their text that were sent
        self._held = ""  # text that may be the beginning of a stop string

    def put(self, token: int) -> str:
        """The text that is certain after one more token; may be empty."""
        self._pending.append(token)
        text = self.decode(self._pending)
        # An unfinished UTF-8 sequence reads as one replacement character, at the end. It may still become something else.
        complete = not text.endswith("\ufffd")
        end = len(text) if complete else len(text) - 1
        piece, self._sent = text[self._sent : end], end
        if complete:
            self._pending, self._sent = [], 0
        return self._release(piece)

    def finish(self) -> str:
        """What was held back, when no token will follow."""
        piece = self._release(self.decode(self._pending)[self._sent :] if self._pending else "")
        held, self._pending, self._sent, self._held = self._held, [], 0, ""
        return piece if self.stopped else piece + held

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((n for s in self.stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def encode_prompts(vlm: CobraVLM, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids (batch, longest) int64, right-padded with 0, on the model's device, and lengths (batch,) on the CPU."""
    if vlm.tokenizer is None:
        raise PromptError("generate: the model has no tokenizer, expected one; pass it to CobraVLM or load a checkpoint that has it")
    rows = []
    for text in texts:
        if not isinstance(text, str):
            raise PromptError(f"generate: prompt is a {type(text).__name__}, expected a str")
        rows.append(vlm.tokenizer.encode(text))
        if not rows[-1]:
            raise PromptError("generate: prompt is empty, expected at least one token; a prompt builder makes one")
        if len(rows[-1]) > vlm.config.llm_max_length:
            raise PromptError(
                f"generate: prompt has {len(rows[-1])} tokens, expected at most {vlm.config.llm_max_length}; "
                "llm_max_length of the config decides, and nothing is cut off silently"
            )
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids.to(vlm.device), lengths


def generate(vlm: CobraVLM, image: Any, prompt_text: str, **options) -> str:
    """The whole answer; see `Options` and `stream`."""
    return "".join(stream(vlm, image, prompt_text, **options))


def stream(vlm: CobraVLM, image: Any, prompt_text: str, **options) -> Iterator[str]:
    """Pieces of the answer, one for each token that was generated; a piece is empty while a character is unfinished.

    options: the fields of `Options`. Bad arguments raise here; the image is read here too, the prompt with the first piece.
    """
    options = _parse(options)
    columns = _begin(vlm, image, [prompt_text], options)
    return _pieces(vlm, columns, options)


def _pieces(vlm: CobraVLM, columns: Iterator[Tensor], options: Options) -> Iterator[str]:
    text = TextStream(vlm.tokenizer.decode, options.stops)
    for i, column in enumerate(columns):
        token = int(column)
        if token == vlm.tokenizer.eos_token_id:
            yield text.finish()
            return
        piece = text.put(token)
        if i + 1 == options.max_new_tokens or text.stopped:
            yield piece + text.finish()
            return
        yield piece


def generate_batch(
    vlm: CobraVLM, images: Any, texts: Sequence[str], return_string_probabilities: Sequence[str] | None = None, **options
) -> list[str] | tuple[list[str], list[list[float]]]:
    """Answers (batch), and with return_string_probabilities their probabilities (batch, strings); see `CobraVLM.generate_batch`."""
    options = _parse(options)
    if isinstance(texts, str):
        raise RequestError("generate_batch: texts is one str, expected a list of them")
    answer_ids = None if return_string_probabilities is None else _answer_ids(vlm, return_string_probabilities)
    if not len(texts):
        return [] if answer_ids is None else ([], [])
    llm = _FirstLogits(vlm.llm)
    answers = [TextStream(vlm.tokenizer.decode, options.stops) for _ in texts]
    parts: list[list[str]] = [[] for _ in texts]
    running = [True] * len(texts)
    for column in _begin(vlm, images, texts, options, llm):
        for i, token in enumerate(column.tolist()):
            if running[i]:
                running[i] = token not in (FINISHED, vlm.tokenizer.eos_token_id)
                if running[i]:
                    parts[i].append(answers[i].put(token))
                    running[i] = not answers[i].stopped
        if not any(running):
            break
    answers_text = ["".join(part) + answer.finish() for part, answer in zip(parts, answers)]
    if answer_ids is None:
        return answers_text
    return answers_text, torch.softmax(llm.first[:, answer_ids].float(), dim=-1).tolist()


def answer_tokens(vlm: CobraVLM) -> dict[str, int]:
    """Token ids of True, False, Yes, No and A to Z, of those that are one token."""
    encoded = {s: vlm.tokenizer.encode(s) for s in ANSWERS}
    return {s: ids[0] for s, ids in encoded.items() if len(ids) == 1}


def _answer_ids(vlm: CobraVLM, strings: Sequence[str]) -> list[int]:
    ids = []
    for s in strings:
        tokens = vlm.tokenizer.encode(s)
        if len(tokens) != 1:
            raise RequestError(
                f"generate_batch: return_string_probabilities has {s!r}, {len(tokens)} tokens, expected strings of one token; "
                "the tokenizer decides"
            )
        ids += tokens
    return ids


def _parse(options: Mapping[str, Any]) -> Options:
    unknown = set(options) - set(Options.__dataclass_fields__)
    if unknown:
        raise RequestError(f"generate: options has {', '.join(sorted(unknown))}, expected only {', '.join(Options.__dataclass_fields__)}")
    return Options(**options)


class _FirstLogits:
    """A language model that keeps the logits of its prefill."""

    def __init__(self, llm):
        self.llm, self.config, self.decode, self.first = llm, llm.config, llm.decode, None

    def prefill(self, *args, **kwargs):
        self.first, state = self.llm.prefill(*args, **kwargs)
        return self.first, state


@torch.no_grad()
def _begin(vlm: CobraVLM, images: Any, texts: Sequence[str], options: Options, llm=None) -> Iterator[Tensor]:
    """Read the images; returns the columns of tokens (batch,) that the model says after image and prompt, lazily."""
    ids, lengths = encode_prompts(vlm, texts)
    prompt, state = ids, None
    pixels, image_state = _images(vlm, images, len(texts))
    prompt_lengths = lengths
    if pixels is not None:
        prompt, prompt_lengths = vlm.embed_prompt(ids, pixels, lengths, None)
    elif image_state is not None:
        state = vlm.start_from(image_state, len(texts))
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    seen = ids.masked_fill(padding.to(ids.device), -1)
    return stream_tokens(
        vlm.llm if llm is None else llm,
        prompt,
        state=state,
        lengths=prompt_lengths,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        stop_token_ids=[vlm.tokenizer.eos_token_id],
        prompt_ids=seen,
        vocab_size=min(vlm.config.lm.vocab_size, len(vlm.tokenizer)),  # rows of padding are never drawn
        seed=options.seed,
    )


def _images(vlm: CobraVLM, images: Any, batch: int) -> tuple[Mapping[str, Tensor] | Tensor | None, Any]:
    """(pixels, one image per text) or (None, an ImageState) or (None, None)."""
    from cobra.model import ImageState

    if images is None:
        return None, None
    if isinstance(images, ImageState):
        count = len(images)
    else:
        images = images if isinstance(images, (Mapping, Tensor)) else vlm.preprocess(images)
        count = len(images if isinstance(images, Tensor) else next(iter(images.values())))
    if count not in (1, batch):
        raise RequestError(f"generate: {count} images for {batch} texts, expected one for each, or one for all")
    if isinstance(images, ImageState):
        return None, images
    if count == batch:
        return images, None
    return None, vlm.encode_image(images)  # one image, many questions: read it once
