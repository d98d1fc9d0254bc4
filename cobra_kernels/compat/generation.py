"""Generation as mamba_ssm's callers know it: one batch of equal lengths, tokens appended to the prompt, scores on request.

The drawing is cobra_kernels.modules.sampling; the loop below only keeps upstream's arguments, outputs and stopping rule.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cobra_kernels import errors
from cobra_kernels.modules import sampling
from cobra_kernels.modules.mamba import InferenceParams
from cobra_kernels.modules.sampling import Sampling


class Decoded(NamedTuple):
    """What transformers' GreedySearchDecoderOnlyOutput has, for callers that did not import it or have a version without it."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """logits (batch, vocab) -> tokens (batch,). top_k 1 is greedy, 0 no limit; top_p 0 no limit; min_p is of the best probability."""
    return sampling.sample(logits, _sampling(top_k, top_p, min_p, temperature))


def _sampling(top_k: int, top_p: float, min_p: float, temperature: float) -> Sampling:
    if top_k == 1:
        return sampling.GREEDY
    return Sampling(temperature=float(temperature), top_k=top_k, top_p=float(top_p) or 1.0, min_p=float(min_p))


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """-inf for all but the k best, in place."""
    logits.masked_fill_(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """-inf for all but the fewest best whose probabilities add up to top_p, in place; 0 and 1 keep all."""
    if 0.0 < top_p < 1.0:
        _keep(logits, Sampling(temperature=1.0, top_p=top_p))


def modify_logits_for_min_p_filtering(logits: Tensor, min_p: float) -> None:
    """-inf for tokens less than min_p times as probable as the best, in place; 0 keeps all."""
    if 0.0 < min_p < 1.0:
        _keep(logits, Sampling(temperature=1.0, min_p=min_p))


def _keep(logits: Tensor, rule: Sampling) -> None:
    logits.masked_fill_(sampling.distribution(logits, rule) == 0, -torch.inf)


def modify_logit_for_repetition_penalty(logits: Tensor, prev_output_tokens: Tensor, repetition_penalty: float = 1.0) -> Tensor:
    """Makes tokens that were said less likely, in place; logits (batch, vocab), prev_output_tokens (batch, n)."""
    if repetition_penalty == 1.0:
        return logits
    seen = sampling.seen_tokens(prev_output_tokens, logits.shape[-1])
    return logits.copy_(sampling.apply_repetition_penalty(logits, seen, repetition_penalty))


@torch.inference_mode()
def decode(
    input_ids: Tensor,
    model,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer=None,
):
    """input_ids (batch, seqlen) -> sequences (batch, up to max_length), prompt included, and the scores of each step if wanted.

    It ends when every row says eos_token_id in one step. teacher_outputs (batch, n): tokens to say instead. vocab_size: tokens that
    can be drawn. cg: decode in a CUDA graph, where there is a GPU. Returns transformers' output object, or `Decoded` where the caller
    has none.
    """
    if streamer is not None:
        streamer.put(input_ids.cpu())
    batch, prompt_length = input_ids.shape
    if cg:
        cache = getattr(model, "_decoding_cache", None)
        model._decoding_cache = cache = update_graph_cache(model, cache, batch, prompt_length, max_length)
        params = cache.inference_params
        params.reset(max_length, batch)
    else:
        params = InferenceParams(max_seqlen=max_length, max_batch_size=batch)
    teacher_length = 0 if teacher_outputs is None else teacher_outputs.shape[1]
    rule = _sampling(top_k, top_p, min_p, temperature)
    start = time.perf_counter()
    sequences, scores, tokens = input_ids, [], input_ids
    while True:
        at = params.seqlen_offset
        position_ids = torch.full((batch, 1), at, dtype=torch.long, device=tokens.device) if at else None  # for models that are not ours
        if cg and at:
            logits = cache.run(tokens, position_ids, at).squeeze(1)
        else:
            logits = model(tokens, position_ids=position_ids, inference_params=params, num_last_tokens=1).logits.squeeze(1)
        logits = logits[..., :vocab_size]
        params.seqlen_offset += tokens.shape[1]
        if output_scores:
            scores.append(logits.clone())
        at = params.seqlen_offset
        if at < teacher_length:
            tokens = teacher_outputs[:, at : at + 1]
        else:
            seen = sampling.seen_tokens(sequences, logits.shape[-1]) if repetition_penalty != 1.0 else None
            logits = sampling.apply_repetition_penalty(logits, seen, repetition_penalty)
            tokens = sampling.sample(logits, rule)[:, None]
        sequences = torch.cat([sequences, tokens], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        if (eos_token_id is not None and bool((tokens == eos_token_id).all())) or params.seqlen_offset >= max_length - 1:
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        print(f"Prompt processing + decoding time: {(time.perf_counter() - start) * 1000:.0f}ms")
    return _output(sequences, tuple(scores) if output_scores else None, greedy=rule.is_greedy)


def _output(sequences: Tensor, scores: tuple[Tensor, ...] | None, greedy: bool):
    known = sys.modules.get("transformers.generation")  # not imported for this alone: it takes seconds
    cls = getattr(known, "GreedySearchDecoderOnlyOutput" if greedy else "SampleDecoderOnlyOutput", Decoded)
    return cls(sequences=sequences, scores=scores)


class GenerationMixin:
    """Gives a language model `generate`."""

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        """{layer index: states} of the model, which has to say."""
        raise NotImplementedError(f"{type(self).__name__} has no allocate_inference_cache, which cg=True needs")

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ):
        """Sequences (batch, up to max_length), or `decode`'s output; the other arguments are `decode`'s."""
        out = decode(
            input_ids,
            self,
            max_length,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            temperature=temperature,
            output_scores=output_scores,
            **kwargs,
        )
        return out if return_dict_in_generate else out.sequences


# --- graphs ----------------------------------------------------------------------------------------------------------


@dataclass
class DecodingCGCache:
    """One graph per number of tokens a step, for one batch size, and the state that they share."""

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict = field(default_factory=dict)
    mempool: Any = None
    inference_params: InferenceParams | None = None
    run: Callable | None = None


@torch.inference_mode()
def update_graph_cache(
    model,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens=(1,),
    dtype=None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """A cache whose `run(input_ids, position_ids, seqlen)` decodes from `inference_params`: in a CUDA graph where there is a GPU."""
    cache = DecodingCGCache() if cache is None else cache
    weight = next(iter(model.parameters()))
    dtype = weight.dtype if dtype is None else dtype
    # Another batch size needs another state, a smaller one too.
    if (weight.device, dtype, batch_size) != (cache.device, cache.dtype, cache.max_batch_size) or max_seqlen > cache.max_seqlen:
        cache.callables, cache.mempool, cache.device, cache.dtype = {}, None, weight.device, dtype
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        states = model.allocate_inference_cache(batch_size, max_seqlen, dtype)
        lengths = torch.full((batch_size,), seqlen_og, dtype=torch.int32, device=weight.device)
        cache.inference_params = InferenceParams(
            max_seqlen, batch_size, seqlen_offset=seqlen_og, key_value_memory_dict=states, lengths_per_sample=lengths
        )
        cache.mempool = torch.cuda.graphs.graph_pool_handle() if weight.is_cuda else None
    for length in decoding_seqlens:
        if (batch_size, length) not in cache.callables:
            cache.callables[batch_size, length] = capture_graph(
                model, cache.inference_params, batch_size, max_seqlen, length, cache.mempool, n_warmups
            )

    def run(input_ids: Tensor, position_ids: Tensor | None, seqlen: int) -> Tensor:
        key = tuple(input_ids.shape)
        if key not in cache.callables:
            raise errors.ArgumentError(
                f"update_graph_cache: run was given input_ids of shape {key}, expected one of {list(cache.callables)}"
            )
        return cache.callables[key](input_ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.seqlen_offset = 0
    return cache


def capture_graph(
    model, inference_params: InferenceParams, batch_size: int, max_seqlen: int, decoding_seqlen: int = 1, mempool=None, n_warmups: int = 2
):
    """run(input_ids (batch_size, decoding_seqlen), position_ids, seqlen) -> logits; the state in inference_params is written."""

    def forward(input_ids, position_ids):
        out = model(input_ids, position_ids=position_ids, inference_params=inference_params, num_last_tokens=decoding_seqlen)
        return out.logits

    lengths = inference_params.lengths_per_sample

    def direct(input_ids, position_ids, seqlen):
        before, inference_params.seqlen_offset = inference_params.seqlen_offset, seqlen
        if lengths is not None:
            lengths.fill_(seqlen)
        out = forward(input_ids, position_ids)
        inference_params.seqlen_offset = before
        return out

    device = next(iter(model.parameters())).device
    if device.type != "cuda":
        return direct
    held = torch.zeros(batch_size, decoding_seqlen, dtype=torch.long, device=device)
    held_positions = torch.zeros_like(held)
    offset = inference_params.seqlen_offset
    inference_params.seqlen_offset = max_seqlen - decoding_seqlen  # above 0: a decoding step
    if lengths is not None:
        lengths.fill_(inference_params.seqlen_offset)
    states = [t.clone() for pair in inference_params.key_value_memory_dict.values() for t in pair]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(n_warmups):
            forward(held, held_positions)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits = forward(held, held_positions)
    inference_params.seqlen_offset = offset
    for t, kept in zip((t for pair in inference_params.key_value_memory_dict.values() for t in pair), states):
        t.copy_(kept)

    def replay(input_ids, position_ids, seqlen):
        held.copy_(input_ids)
        if position_ids is not None:
            held_positions.copy_(position_ids)
        if lengths is not None:
            lengths.fill_(seqlen)
        graph.replay()
        return logits.clone()

    return replay
