"""Token by token: `stream_tokens` yields them as they come, `generate` collects them.

Both take any model with `prefill(prompt, state, lengths=, attention_mask=) -> (logits, state)`, `decode(tokens, state,
rows=)` and `config.vocab_size`. Rows that have stopped leave the batch: the ones still running cost what they would
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cobra_kernels import errors
from cobra_kernels.modules.mamba import MambaState
from cobra_kernels.modules.sampling import GREEDY, Sampling, sample, seen_tokens

FINISHED = -1  # in place of a token, for a row that has stopped


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: list[list[int]]  # per row, the stop token included
    finish_reasons: list[str]  # per row, "stop" or "length"
    state: MambaState  # has read everything but the last token of each row


def stream_tokens(
    model,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop_token_ids: Sequence[int] = (),
    state: MambaState | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    vocab_size: int | None = None,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next tokens (batch,) int64, -1 for rows that have stopped; at most max_new_tokens times.

    prompt: ids (batch, seqlen) int or embeddings (batch, seqlen, d_model); padded rows with lengths (batch,) or
        attention_mask (batch, seqlen). It is read when the first token is asked for.
    stop_token_ids: a row stops after yielding one of these.
    state: continued from and **written in place**; None: a new one. A row's state has read its prompt and its tokens
        but the last: begin the next prompt with that one.
    prompt_ids: (batch, n) int, negative ignored, that repetition_penalty counts as seen; None: the prompt, if ids.
    vocab_size: tokens that can be drawn, `model.config.vocab_size` if None; the padded rest never is.
    seed: of the draws. A row's draws do not depend on when other rows stop. None: torch's default generator.

    Bad arguments raise here, not at the first token. Runs under no_grad.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise errors.ArgumentError(f"generate: max_new_tokens has {max_new_tokens!r}, expected an int >= 1")
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    if type(vocab_size) is not int or vocab_size < 1:
        raise errors.ArgumentError(f"generate: vocab_size has {vocab_size!r}, expected an int >= 1")
    for token in stop_token_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise errors.ArgumentError(
                f"generate: stop_token_ids has {token!r}, expected ints in 0..{vocab_size - 1}; vocab_size "
                "comes from the argument or the model's config"
            )
    is_ids = not prompt.is_floating_point()
    if prompt_ids is None and is_ids:
        if lengths is not None:  # what lies in the padding was never said
            columns = torch.arange(prompt.shape[1], device=prompt.device)
            prompt_ids = prompt.masked_fill(columns >= torch.as_tensor(lengths, device=prompt.device)[:, None], -1)
        elif attention_mask is not None:
            prompt_ids = prompt.masked_fill(~attention_mask.to(torch.bool), -1)
        else:
            prompt_ids = prompt
    if prompt_ids is not None and (prompt_ids.dim() != 2 or prompt_ids.shape[0] != prompt.shape[0]):
        raise errors.ShapeError(
            f"generate: prompt_ids has shape {tuple(prompt_ids.shape)}, expected (batch={prompt.shape[0]}, n); batch comes from prompt"
        )
    generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    padding = {"lengths": lengths, "attention_mask": attention_mask}
    return _stream(model, prompt, state, padding, sampling, max_new_tokens, list(stop_token_ids), prompt_ids, vocab_size, generator)


@torch.no_grad()
def _stream(model, prompt, state, padding, sampling, max_new_tokens, stop_token_ids, prompt_ids, vocab_size, generator):
    logits, state = model.prefill(prompt, state, **padding)
    batch, device = logits.shape[0], logits.device
    rows = torch.arange(batch, device=device)  # the rows still running
    stops = torch.tensor(stop_token_ids, dtype=torch.int64, device=device)
    seen = None
    if sampling.repetition_penalty != 1:
        nothing = torch.empty(batch, 0, dtype=torch.int64, device=device)
        seen = seen_tokens(nothing if prompt_ids is None else prompt_ids.to(device), vocab_size)

    for step in range(max_new_tokens):
        uniform = None
        if not sampling.is_greedy:  # one draw for every row, running or not
            uniform = torch.rand(batch, dtype=torch.float64, generator=generator, device=device)[rows]
        tokens = sample(logits[:, :vocab_size], sampling, seen=seen, uniform=uniform)
        yield torch.full((batch,), FINISHED, dtype=torch.int64, device=device).index_copy_(0, rows, tokens)
        if step + 1 == max_new_tokens:
            return
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        if stop_token_ids:
            running = ~torch.isin(tokens, stops)
            if not bool(running.all()):
                rows, tokens = rows[running], tokens[running]
                seen = None if seen is None else seen[running]
        if not len(rows):
            return
        logits = model.decode(tokens, state, rows=None if len(rows) == batch else rows)


def generate(model, prompt: Tensor, *, state: MambaState | None = None, streamer=None, **options) -> Generation:
    """Generate to the end; options are those of `stream_tokens`.

    streamer: any object with `put(tokens)` and `end()`, such as transformers' TextStreamer. It is given the prompt's
        ids first (none for embeddings), then the tokens (batch,) of each step, on the CPU.
    """
    is_ids = not prompt.is_floating_point()
    batch = prompt.shape[0]
    if state is None:  # made here, to be returned
        state = model.allocate_state(batch, None if is_ids else prompt.dtype)
    stream = stream_tokens(model, prompt, state=state, **options)
    if streamer is not None:
        streamer.put(prompt.cpu() if is_ids else torch.empty(batch, 0, dtype=torch.int64))
    stops = set(options.get("stop_token_ids", ()))
    tokens: list[list[int]] = [[] for _ in range(batch)]
    for column in stream:
        column = column.cpu()
        if streamer is not None:
            streamer.put(column)
        for row, token in zip(tokens, column.tolist()):
            if token != FINISHED:
                row.append(token)
    if streamer is not None:
        streamer.end()
    return Generation(tokens, ["stop" if row and row[-1] in stops else "length" for row in tokens], state)
