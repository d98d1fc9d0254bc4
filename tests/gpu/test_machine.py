"""The lines that only a GPU runs, on a torch.cuda that is played: every name that they use exists, and is used in order."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks.harness.timing import CudaTimer
from tests.gpu.machine import Cuda


@pytest.fixture
def played(monkeypatch):
    """Calls of torch.cuda by name, in order."""
    calls: list[str] = []

    class Stream:
        def wait_stream(self, other):
            calls.append("wait_stream")

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextlib.contextmanager
    def inside(name):
        calls.append(f"in {name}")
        yield
        calls.append(f"out {name}")

    def play(name, function):
        assert hasattr(torch.cuda, name), f"torch.cuda has no {name}"
        monkeypatch.setattr(torch.cuda, name, function)

    play("Stream", Stream)
    play("CUDAGraph", Graph)
    play("current_stream", Stream)
    play("stream", lambda stream: inside("stream"))
    play("graph", lambda graph: inside("graph"))
    play("synchronize", lambda: calls.append("synchronize"))
    play("_sleep", lambda cycles: calls.append("sleep"))
    play("set_sync_debug_mode", lambda mode: calls.append(f"sync {mode}"))
    play("empty_cache", lambda: calls.append("empty_cache"))
    play("mem_get_info", lambda: (5, 9))
    return calls


def test_streams_clocks_and_memory(played):
    gpu = Cuda("cuda")
    first, second = gpu.streams(2)
    with second():
        gpu.occupy()
    with gpu.no_synchronisation():
        pass
    gpu.synchronize()
    assert gpu.free_bytes() == 5
    assert played == ["in stream", "sleep", "out stream", "sync error", "sync default", "synchronize", "empty_cache"]


def test_capture_runs_once_before_it_captures(played):
    replay, outputs = Cuda("cuda").capture(lambda: played.append("work") or ["out"])
    assert outputs == ["out"]
    replay()
    assert played == ["wait_stream", "in stream", "work", "out stream", "wait_stream", "in graph", "work", "out graph", "replay"]


def test_the_timers_graph(played):
    replay = CudaTimer.capture(lambda: played.append("work"))
    replay()
    assert played == ["synchronize", "in graph", "work", "out graph", "replay", "synchronize", "replay"]

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    assert CudaTimer.capture(fails) is None


def test_compiled_functions(played):
    gpu = Cuda("cuda")
    assert callable(gpu.compile(lambda x: x))
    gpu.next_iteration()
