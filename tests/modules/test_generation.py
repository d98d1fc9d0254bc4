"""Token by token: what is generated is what the model says, for every row, however the others fare."""

from __future__ import annotations

import pytest
import torch

from cobra_kernels import errors
from cobra_kernels.modules import Sampling, generate, stream_tokens
from tests.modules.models import make_ids, make_lm
from tests.tolerances import CHUNKED, assert_close


def greedy_by_hand(lm, ids: torch.Tensor, count: int) -> list[int]:
    """One row, the whole text read again for every token."""
    ids = ids.clone()
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, lm(ids[None]).logits[0, -1, : lm.config.vocab_size].argmax()[None]])
    return ids[-count:].tolist()


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 9])
def test_greedy_is_the_argmax_of_the_whole_text(prompt):
    lm, ids = make_lm(), make_ids(2, prompt)
    result = generate(lm, ids, max_new_tokens=12)
    assert result.tokens == [greedy_by_hand(lm, row, 12) for row in ids]
    assert result.finish_reasons == ["length", "length"]


def test_rows_stop_one_by_one_and_do_not_disturb_the_others():
    lm, ids = make_lm(), make_ids(4, 6)
    free = generate(lm, ids, max_new_tokens=20).tokens
    stop = free[1][3]  # some rows meet it early, some late or never
    result = generate(lm, ids, max_new_tokens=20, stop_token_ids=[stop])
    for row, reason, whole in zip(result.tokens, result.finish_reasons, free):
        end = whole.index(stop) + 1 if stop in whole else 20
        assert row == whole[:end]
        assert reason == ("stop" if stop in whole else "length")
    assert len({len(row) for row in result.tokens}) > 1
    columns = list(stream_tokens(lm, ids, max_new_tokens=20, stop_token_ids=[stop]))
    for i, row in enumerate(result.tokens):
        assert [int(c[i]) for c in columns] == row + [-1] * (len(columns) - len(row))
    assert len(columns) == max(map(len, result.tokens))


def test_the_penalty_follows_rows_that_leave():
    lm, ids, penalty = make_lm(), make_ids(4, 6), Sampling(repetition_penalty=1e9)
    free = generate(lm, ids, max_new_tokens=12, sampling=penalty).tokens
    result = generate(lm, ids, max_new_tokens=12, sampling=penalty, stop_token_ids=[free[0][2]])
    assert result.tokens[0] == free[0][:3]
    assert any(len(row) > 3 for row in result.tokens)
    for row, whole in zip(result.tokens, free):
        assert row == whole[: len(row)]


def test_all_rows_stopped_ends_the_stream_and_counts_decodes(monkeypatch):
    lm, ids = make_lm(), make_ids(2, 6)
    first = [row[0] for row in generate(lm, ids, max_new_tokens=1).tokens]
    calls = []
    decode = lm.decode
    monkeypatch.setattr(lm, "decode", lambda tokens, *a, **k: calls.append(len(tokens)) or decode(tokens, *a, **k))
    assert generate(lm, ids, max_new_tokens=9, stop_token_ids=first).tokens == [[first[0]], [first[1]]]
    assert not calls  # the last token is never read
    if first[0] != first[1]:
        generate(lm, ids, max_new_tokens=3, stop_token_ids=first[:1])
        assert calls == [1, 1]  # the stopped row has left the batch


def test_ragged_prompts_equal_single_ones():
    lm = make_lm()
    rows = [make_ids(n, seed=n) for n in (5, 1, 8, 3)]
    right, left = torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4, 8, dtype=torch.int64)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    for i, row in enumerate(rows):
        right[i, : len(row)], left[i, 8 - len(row) :], mask[i, 8 - len(row) :] = row, row, True
    singles = [generate(lm, row[None], max_new_tokens=10).tokens[0] for row in rows]
    assert generate(lm, right, max_new_tokens=10, lengths=[5, 1, 8, 3]).tokens == singles
    assert generate(lm, left, max_new_tokens=10, attention_mask=mask).tokens == singles
    # and what is padding has not been "seen"
    penalty = Sampling(repetition_penalty=1e9)
    singles = [generate(lm, row[None], max_new_tokens=10, sampling=penalty).tokens[0] for row in rows]
    for i, row in enumerate(rows):
        right[i, len(row) :], left[i, : 8 - len(row)] = singles[i][0], singles[i][0]
    assert generate(lm, right, max_new_tokens=10, lengths=[5, 1, 8, 3], sampling=penalty).tokens == singles
    assert generate(lm, left, max_new_tokens=10, attention_mask=mask, sampling=penalty).tokens == singles


def test_state_continues_a_conversation():
    lm, first, second = make_lm(), make_ids(1, 5), make_ids(1, 4, seed=7)
    one = generate(lm, first, max_new_tokens=6)
    said = torch.tensor(one.tokens)
    # the state has read all but the last token
    _, expected = lm.prefill(torch.cat([first, said[:, :-1]], dim=1))
    assert_close(one.state.ssm[2], expected.ssm[2], CHUNKED)
    two = generate(lm, torch.cat([said[:, -1:], second], dim=1), max_new_tokens=6, state=one.state)
    assert two.state is one.state
    assert two.tokens[0] == greedy_by_hand(lm, torch.cat([first, said, second], dim=1)[0], 6)


def test_embeddings_as_prompt():
    lm, ids = make_lm(), make_ids(2, 5)
    embeds = lm.backbone.embedding(ids).detach()
    assert generate(lm, embeds, max_new_tokens=8).tokens == generate(lm, ids, max_new_tokens=8).tokens
    penalty = Sampling(repetition_penalty=3.0)
    by_ids = generate(lm, ids, max_new_tokens=8, sampling=penalty).tokens
    assert generate(lm, embeds, max_new_tokens=8, sampling=penalty, prompt_ids=ids).tokens == by_ids
    assert generate(lm, embeds, max_new_tokens=8, sampling=penalty).tokens != by_ids


def test_repetition_penalty_forbids_in_the_limit():
    lm, ids = make_lm(), make_ids(2, 5)
    result = generate(lm, ids, max_new_tokens=20, sampling=Sampling(repetition_penalty=1e9))
    for row, prompt in zip(result.tokens, ids.tolist()):
        assert len(set(row)) == len(row) and not set(row) & set(prompt)


def test_padded_vocabulary_is_never_drawn():
    lm = make_lm()
    with torch.no_grad():
        lm.lm_head.weight[61:] *= 100  # rows of the padding: the largest logits there are, either sign
    ids = make_ids(8, 5)
    with torch.no_grad():
        assert (lm.prefill(ids)[0].argmax(-1) >= 61).any()
    for s in (Sampling(), Sampling(5.0)):
        assert all(0 <= t < 61 for row in generate(lm, ids, max_new_tokens=10, sampling=s, seed=0).tokens for t in row)
    assert all(t < 7 for row in generate(lm, ids, max_new_tokens=10, vocab_size=7).tokens for t in row)


def test_seeded_draws_repeat_and_do_not_depend_on_rows_that_stop():
    lm, ids, s = make_lm(), make_ids(3, 5), Sampling(1.5)
    free = generate(lm, ids, max_new_tokens=15, sampling=s, seed=4).tokens
    assert free == generate(lm, ids, max_new_tokens=15, sampling=s, seed=4).tokens
    assert free != generate(lm, ids, max_new_tokens=15, sampling=s, seed=5).tokens
    stop = free[0][2]
    stopped = generate(lm, ids, max_new_tokens=15, sampling=s, seed=4, stop_token_ids=[stop]).tokens
    for row, whole in zip(stopped, free):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_streamer_protocol():
    class Recorder:
        def __init__(self):
            self.put_calls, self.ended = [], 0

        def put(self, value):
            self.put_calls.append(value.tolist())

        def end(self):
            self.ended += 1

    lm, ids = make_lm(), make_ids(1, 5)
    recorder = Recorder()
    tokens = generate(lm, ids, max_new_tokens=4, streamer=recorder).tokens[0]
    assert recorder.put_calls == [ids.tolist(), *([t] for t in tokens)] and recorder.ended == 1
    recorder = Recorder()
    generate(lm, lm.backbone.embedding(ids).detach(), max_new_tokens=4, streamer=recorder)
    assert recorder.put_calls == [[[]], *([t] for t in tokens)]


def test_the_stream_is_lazy_but_its_arguments_are_not():
    lm, ids = make_lm(), make_ids(2, 5)
    state = lm.allocate_state(2)
    stream = stream_tokens(lm, ids, max_new_tokens=3, state=state)
    assert not state.ssm[0].any()  # nothing is read before the first token is asked for
    first = next(stream)
    assert state.ssm[0].any() and first.dtype == torch.int64 and not first.requires_grad
    assert torch.is_grad_enabled()  # between tokens the caller's mode is the caller's
    stream.close()
    cases = [
        (errors.ArgumentError, "max_new_tokens has 0, expected an int >= 1", {"max_new_tokens": 0}),
        (errors.ArgumentError, "max_new_tokens has 2.0", {"max_new_tokens": 2.0}),
        (errors.ArgumentError, "vocab_size has 0", {"vocab_size": 0}),
        (errors.ArgumentError, r"stop_token_ids has 61, expected ints in 0..60", {"stop_token_ids": [3, 61]}),
        (errors.ArgumentError, "stop_token_ids has -1", {"stop_token_ids": [-1]}),
        (errors.ShapeError, r"prompt_ids has shape \(1, 5\), expected \(batch=2, n\)", {"prompt_ids": ids[:1]}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            stream_tokens(lm, ids, **{"max_new_tokens": 3, **options})
