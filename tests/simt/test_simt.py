"""The emulator itself: the probe's kernels (csrc/simt/probe.cu) have one right answer in every order, and the broken ones fail."""

from __future__ import annotations

import threading

import numpy as np
import pytest

ORDERS = [("forward", 1), ("reverse", 1), *(("random", seed) for seed in range(1, 6))]
WARP, BLOCK, CHAIN, ROUND, BROKEN, LANGUAGE, MMA, PRODUCER_CONSUMER, TOO_LARGE = range(9)
BAR_0, LEFT_EARLY, MISSING_LANE, NOT_IN_MASK, MIXED, NAMED_DEADLOCK, NAMED_COUNTS, NAMED_LEFT, COPY_LEFT = range(9)
NO_WAIT, NO_EMPTY = 1, 2
BROKEN_RULES = [
    (BAR_0, "deadlock: warp 1 waits in a collective|left the kernel while|deadlock: 32 of the block's"),
    (LEFT_EARLY, "left the kernel while|after 1 threads of the block left"),
    (MISSING_LANE, "deadlock: warp . waits in a collective with mask 0xffffffff, only lanes 0xffffffdf came"),
    (NOT_IN_MASK, "lane 31 is not in its own mask 0x7fffffff"),
    (MIXED, "lanes of mask 0xffffffff are in different warp collectives"),
    (NAMED_DEADLOCK, "deadlock: barrier 3 waits for 64 threads, 32 came"),
    (NAMED_COUNTS, "barrier 3 for (32|64) threads, others came to it for (32|64)"),
    (NAMED_LEFT, "the block ended with 32 of 64 threads at barrier 3"),
]


def probe(host, kernel, blocks=1, out=1024, values=(), **options):
    """Runs a probe kernel and returns its output, filled with -1 before."""
    result = np.full(out, -1, np.int32)
    zeros = [np.zeros(2 * max(blocks, 1), t) for t in (np.int32, np.uint32, np.uint32)]
    code = host.probe(kernel, blocks, np.asarray(values, np.float32), result, *zeros, **options)
    return result, code, zeros


@pytest.mark.parametrize("order, seed", ORDERS)
def test_warp_collectives(host, order, seed):
    host.set_simt(order=order, seed=seed)
    out = probe(host, WARP)[0].reshape(64, 16)
    for thread in range(64):
        lane = thread % 32
        expected = [
            50,
            (lane // 8 * 8 + (lane + 3) % 8) * 10,
            max(lane - 2, lane if lane < 2 else 0),
            lane if lane % 8 < 2 else lane - 2,
            lane if lane > 28 else lane + 3,
            lane if lane % 4 > 0 else lane + 3,
            lane ^ 1,
            lane if lane < 16 else lane ^ 16,  # a piece of 8 may read a lower piece, not a higher one
            sum(1 << i for i in range(0, 32, 3)),
            1,
            0,
            3 if lane < 16 else 20,
            12,
            lane ^ 2,
            lane.bit_count() + 100 * ((lane & -lane).bit_length()) + 10000 * (32 - lane.bit_length()),
            (1 << 24) - 1 if lane < 24 else -1,
        ]
        assert out[thread].tolist() == expected, f"thread {thread}"


@pytest.mark.parametrize("resident", [1, 3, 0])
@pytest.mark.parametrize("order, seed", ORDERS)
def test_block_barriers_and_shared_memory(host, order, seed, resident):
    host.set_simt(order=order, seed=seed, resident=resident)
    out, code, (maximum, _, _) = probe(host, BLOCK, blocks=5, out=5 * 64 * 8)
    i = np.arange(64)
    expected = np.stack([63 - i, 63 - i, 0 * i + 32, 0 * i + 128, 0 * i + 1, 0 * i, np.where(i < 32, 2 * (31 - i), -1), 0 * i + 1], 1)
    assert code == 0
    assert (out.reshape(5, 64, 8) == expected).all()
    assert maximum[0] == 5 * 64 - 1


@pytest.mark.parametrize("resident", [1, 2, 7, 0])
@pytest.mark.parametrize("order, seed", ORDERS)
def test_blocks_hand_over_by_ticket_with_any_number_resident(host, order, seed, resident):
    host.set_simt(order=order, seed=seed, resident=resident)
    out, _, _ = probe(host, CHAIN, blocks=20, out=20)
    assert out.tolist() == np.cumsum(np.arange(20)).tolist()


@pytest.mark.parametrize("order, seed", ORDERS)
def test_language(host, order, seed):
    host.set_simt(order=order, seed=seed, resident=2)
    out, code, (minimum, _, _) = probe(host, LANGUAGE, blocks=3, out=6 * 30 * 16, values=[2, 3, 4])
    assert code == 0
    assert minimum[0] == -29
    for block, rows in enumerate(out.reshape(6, 30, 16).tolist()):
        for thread, row in enumerate(rows):
            table = (3, 1, 4, 1)[thread % 4] * 32
            floats = int(100 * (np.exp(1) + np.log(2) + 0.25 + 0.5 + 0.125))
            shared = [0, 7, 7, 5] if thread == 0 else [-1] * 4
            expected = [block * 1000 + thread, table, 3 * thread + 3, 1, thread, block, 3 + thread, 5 + thread, floats, 1, *shared, -1, -1]
            assert row == expected, f"block {block}, thread {thread}"


def tf32(values):
    """What a tensor core sees of fp32 numbers: 10 bits behind the point, cut off."""
    return (values.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("order, seed", ORDERS)
def test_tensor_core_instruction(host, order, seed):
    """Every element of D = A B + C against numpy; one NaN in A stays in its row, one in B in its column."""
    host.set_simt(order=order, seed=seed)
    A, B, C = (np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))

    def run():
        return probe(host, MMA, out=128, values=np.concatenate([A.ravel(), B.ravel(), C.ravel()]))[0].view(np.float32).reshape(16, 8)

    assert np.abs(run() - (tf32(A) @ tf32(B) + C)).max() < 1e-6
    A[11, 5], B[2, 6] = np.nan, np.nan
    nan = np.zeros((16, 8), bool)
    nan[11], nan[:, 6] = True, True
    assert np.array_equal(np.isnan(run()), nan)


def produce_and_consume(host, rounds=7, **options):
    """(output, expected) of the kernel whose warps hand pieces to each other through named barriers and asynchronous copies."""
    values = np.arange(rounds * 256, dtype=np.float32)
    expected = values.reshape(rounds, 64, 4)[:, ::-1, :2].astype(np.int32)
    expected[-1] = 0
    return probe(host, PRODUCER_CONSUMER, out=rounds * 128, values=values, **options)[0], expected.ravel()


@pytest.mark.parametrize("order, seed", ORDERS)
def test_named_barriers_and_asynchronous_copies(host, order, seed):
    host.set_simt(order=order, seed=seed)
    out, expected = produce_and_consume(host)
    assert np.array_equal(out, expected)


def test_asynchronous_copies_are_as_late_or_early_as_they_can_be(host):
    """Nobody waits for a copy: forward order still shows NaN. A place is taken too early: reverse order shows the later piece."""
    host.set_simt(order="forward")
    assert not np.array_equal(*produce_and_consume(host, what=NO_WAIT))
    host.set_simt(order="reverse")
    assert not np.array_equal(*produce_and_consume(host, what=NO_EMPTY))


def test_a_copy_that_nobody_waits_for_is_a_failure(host):
    host.set_simt(order="forward")
    with pytest.raises(host.SimtFailure, match="left the kernel without waiting for its asynchronous copies"):
        probe(host, BROKEN, what=COPY_LEFT)
    assert probe(host, BLOCK, out=64 * 8)[1] == 0


def test_waiting_for_a_block_that_has_not_started_is_a_hang(host):
    """blockIdx order is no promise: with all blocks resident it works, with two it hangs when blocks start from the end."""
    host.set_simt(order="reverse", resident=0)
    assert probe(host, CHAIN, blocks=20, out=20, by_block_index=True)[0][-1] == 190
    host.set_simt(order="reverse", resident=2, step_limit=2000)
    with pytest.raises(host.SimtFailure, match="hang: the launch passed its limit of 2000 spins"):
        probe(host, CHAIN, blocks=20, out=20, by_block_index=True)
    host.set_simt(resident=0, step_limit=2000)
    with pytest.raises(host.SimtFailure, match="hang"):
        probe(host, CHAIN, blocks=3, out=3, forget_flag=True)


def test_too_many_resident_threads_are_refused(host):
    host.set_simt(resident=0)
    with pytest.raises(host.SimtFailure, match="at most \\d+ threads can be resident"):
        probe(host, ROUND, blocks=1000)


@pytest.mark.parametrize("what, message", BROKEN_RULES)
@pytest.mark.parametrize("order, seed", ORDERS)
def test_a_broken_rule_is_an_exception(host, order, seed, what, message):
    host.set_simt(order=order, seed=seed)
    with pytest.raises(host.SimtFailure, match=rf"simt: block \(0,0,0\) thread \(\d+,0,0\): .*({message})"):
        probe(host, BROKEN, what=what)
    assert probe(host, BLOCK, out=64 * 8)[1] == 0  # the next launch is whole


def test_launch_errors_are_cuda_s(host):
    assert probe(host, ROUND, blocks=0)[1] == 9  # cudaErrorInvalidConfiguration
    assert probe(host, TOO_LARGE)[1] == 9


def test_rounding_of_16_bit_floats(host):
    rng = np.random.default_rng(0)
    specials = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 65504.0, 65519.9, 65520.0, 3.3895e38, 5.96e-8, 2.98e-8, 1 + 2**-8, 1 + 2**-9 * 3]
    values = np.concatenate([np.float32(specials), rng.integers(0, 2**32, 5000, np.uint32).view(np.float32)])
    out, _, _ = probe(host, ROUND, blocks=(len(values) + 127) // 128, out=len(values), values=values)
    bits, nan = out.view(np.uint32), np.isnan(values)
    source = values.view(np.uint32).astype(np.uint64)
    bf16 = ((source + 0x7FFF + ((source >> 16) & 1)) >> 16).astype(np.uint32)
    with np.errstate(over="ignore"):
        fp16 = values.astype(np.float16)
    assert (bits & 0xFFFF)[~nan].tolist() == bf16[~nan].tolist()
    assert (bits >> 16).astype(np.uint16).view(np.float16)[~nan].tolist() == fp16[~nan].tolist()
    assert np.isnan(((bits & 0xFFFF) << 16).view(np.float32)[nan]).all()


def test_two_threads_launch_at_once(host):
    """Options, blocks and fibers belong to the OS thread that launches."""
    results = {}

    def launch(order):
        host.set_simt(order=order, seed=4, resident=3)
        results[order] = [probe(host, CHAIN, blocks=50, out=50)[0][-1] for _ in range(20)]

    threads = [threading.Thread(target=launch, args=(order,)) for order in ("reverse", "random")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {order: [49 * 50 // 2] * 20 for order in ("reverse", "random")}
