"""How a time is taken: providers interleaved in random order, over rotating buffers, with a median and its spread.

One round runs one block of calls of every provider, in an order drawn from a seeded generator, so a noisy neighbour or a
falling clock meets all of them alike and the ratio of two providers inside a round is worth more than their two medians."""

from __future__ import annotations

import gc
import math
import random
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.harness.environment import last_level_cache_bytes, steady_allocator

MAX_BUFFER_SETS = 1024
LONG_CALL = 0.2  # seconds


class Timer(Protocol):
    """Seconds that `work()` takes on the device. `name` goes into the record."""

    name: str

    def __call__(self, work: Callable[[], None]) -> float: ...


class CpuTimer:
    name = "perf_counter"

    def __call__(self, work: Callable[[], None]) -> float:
        start = time.perf_counter_ns()
        work()
        return (time.perf_counter_ns() - start) * 1e-9


class CudaTimer:
    """Events on the current stream around the block."""

    name = "cuda_event"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("CudaTimer: torch sees no CUDA device")
        self.start = torch.cuda.Event(enable_timing=True)
        self.stop = torch.cuda.Event(enable_timing=True)

    def __call__(self, work: Callable[[], None]) -> float:
        self.start.record()
        work()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) * 1e-3

    @staticmethod
    def capture(work: Callable[[], None]) -> Callable[[], None] | None:
        """Replays `work` as a CUDA graph: what the device needs, without the gaps of a host that launches too slowly. None
        when something in it cannot be captured; then it is timed as it is launched, and the record's timer says so."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except Exception:
            torch.cuda.synchronize()
            return None
        graph.replay()  # the first replay uploads the graph
        torch.cuda.synchronize()
        return graph.replay


def timer_for(device: str) -> Timer:
    return CpuTimer() if torch.device(device).type == "cpu" else CudaTimer()


@dataclass(frozen=True)
class Provider:
    """One way to do the work. `call(*inputs)` runs it once; inputs are the case's, or `make_inputs(index)` of its own.

    `slow_start`: the first call takes seconds (a compiler runs, a slow peer), so `--quick` leaves it out and says so.
    `comparable`: its result is the op's result, and is checked; False for a part of the work or another model.
    `graph`: on a GPU its calls are replayed as a CUDA graph; False to time them as Python launches them."""

    name: str
    call: Callable[..., Any]
    make_inputs: Callable[[int], tuple] | None = None
    slow_start: bool = False
    comparable: bool = True
    graph: bool = True


@dataclass
class Timing:
    """Seconds per call of one provider. Each sample is the mean of one block of `calls` calls."""

    provider: str
    timer: str
    cache: str  # "cold": every call reads buffers last touched > 2x last-level cache ago; "warm": the same buffers each time
    first_call: float  # the very first call: compilation, lazy set-up and page faults included, kept out of the samples
    calls: int
    samples: list[float]
    rounds: list[int]  # round of each sample
    buffers: int
    preemptions: int  # times the scheduler took the core away during the samples (0 = quiet)

    @property
    def median(self) -> float:
        return quantile(self.samples, 0.5)

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)

    @property
    def outliers(self) -> int:
        """Samples beyond the median by more than 3x the p20..p80 width (and 5%): reported, never removed."""
        limit = self.median + max(3 * (self.p80 - self.p20), 0.05 * self.median)
        return sum(s > limit for s in self.samples)

    @property
    def note(self) -> str:
        spread = (self.p80 - self.p20) / self.median
        words = [f"{self.outliers} of {len(self.samples)} blocks far above the median"] if self.outliers else []
        if spread > 0.2:
            words.append(f"spread {spread:.0%}: a busy machine, trust the ratio within the run only")
        return "; ".join(words)


@dataclass(frozen=True)
class Ratio:
    """time(a) / time(b) over the rounds both ran in: median and a distribution-free 99% interval of that median."""

    median: float
    low: float
    high: float
    rounds: int
    threshold: float = 0.02  # smaller effects are not claimed, however narrow the interval

    @property
    def differs(self) -> bool:
        outside = self.low > 1 or self.high < 1
        return outside and abs(self.median - 1) > self.threshold

    @property
    def verdict(self) -> str:
        if not self.differs:
            return "same"
        return "slower" if self.median > 1 else "faster"


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    if not ordered:
        return math.nan
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median_interval(values: Sequence[float], error: float = 0.01) -> tuple[float, float]:
    """Where the median lies, for any distribution of noise: a pair of order statistics, chosen so that a fair coin lands outside
    with probability <= error. (0, inf) when the values are too few for that: 8 are needed at 1%."""
    ordered, tail, k = sorted(values), 0.0, 0
    n = len(ordered)
    while n and (tail := tail + math.comb(n, k) * 0.5**n) <= error / 2:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


def compare(a: Timing, b: Timing) -> Ratio:
    """How much slower a is than b, from their paired rounds: the median of their ratios and its 99% interval."""
    seconds = dict(zip(b.rounds, b.samples))
    ratios = [s / seconds[r] for r, s in zip(a.rounds, a.samples) if r in seconds]
    if not ratios:
        return Ratio(math.nan, math.nan, math.nan, 0)
    return Ratio(quantile(ratios, 0.5), *median_interval(ratios), len(ratios))


def storage_bytes(*values: Any) -> int:
    """Bytes of the distinct storages behind the tensors in (nested) values."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    visit(values)
    return sum(sizes.values())


@dataclass
class Ring:
    """Buffer sets used in turn. Cold: together they exceed twice the last-level cache, so that no set survives in it."""

    sets: list[tuple]
    cache: str
    at: int = 0

    @classmethod
    def make(cls, make_inputs: Callable[[int], tuple], cache: str, device: str = "cpu") -> Ring:
        if cache not in ("cold", "warm"):
            raise ValueError(f"Ring: cache has {cache!r}, expected 'cold' or 'warm'")
        first = make_inputs(0)
        size = storage_bytes(first)
        if cache == "warm" or size == 0:
            return cls([first], "warm")
        wanted = 2 * last_level_cache_bytes(device)
        count = 1 if size > wanted else math.ceil(wanted / size) + 1
        if count > MAX_BUFFER_SETS:  # too small to be cold in any real use either; the record says warm
            return cls([first], "warm")
        return cls([first, *(make_inputs(i) for i in range(1, count))], "cold")

    def take(self) -> tuple:
        self.at = (self.at + 1) % len(self.sets)
        return self.sets[self.at]


@dataclass
class Runner:
    """A provider with its buffers, warmed up once and then sampled block by block."""

    provider: Provider
    ring: Ring
    timer: Timer
    kept: deque = field(default_factory=deque)  # the last results, so that output memory rotates like the inputs
    calls: int = 1
    first_call: float = 0.0
    estimate: float = 0.0  # seconds of one block
    rounds: int = 0
    samples: list[float] = field(default_factory=list)
    sample_rounds: list[int] = field(default_factory=list)
    preemptions: int = 0
    replay: Callable[[], None] | None = None  # the block as a CUDA graph

    def block(self) -> None:
        call, take, keep = self.provider.call, self.ring.take, self.kept.append
        for _ in range(self.calls):
            keep(call(*take()))

    def warm_up(self, block_seconds: float, warm_up_seconds: float, called: bool = False) -> None:
        self.kept = deque(maxlen=len(self.ring.sets))
        self.first_call = self.timer(self.block)
        # Twice round the ring (but no longer than the budget): every buffer and every output has its pages by then.
        spent, done, fastest = 0.0, 0, math.inf
        if called and self.first_call > LONG_CALL:  # and compiled nothing: it is warm
            done, fastest = math.inf, self.first_call
        while done < 2 * len(self.ring.sets) + 1 and (done == 0 or spent < warm_up_seconds):
            one = self.timer(self.block)
            spent, done, fastest = spent + one, done + 1, min(fastest, one)
        for _ in range(2):  # the second time with the overhead of the timer itself amortised
            self.calls = min(max(1, round(block_seconds / max(fastest, 1e-9))), 1_000_000)
            if self.calls > 1:
                fastest = self.timer(self.block) / self.calls
        if isinstance(self.timer, CudaTimer) and self.provider.graph:
            self.replay = self.timer.capture(self.block)
        self.estimate = fastest * self.calls

    def sample(self, round_index: int) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        self.samples.append(self.timer(self.replay or self.block) / self.calls)
        self.preemptions += resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        self.sample_rounds.append(round_index)

    def timing(self) -> Timing:
        return Timing(
            self.provider.name, "cuda_graph" if self.replay else self.timer.name, self.ring.cache, self.first_call, self.calls, self.samples,
            self.sample_rounds, len(self.ring.sets), self.preemptions,
        )  # fmt: skip


def measure(
    providers: Sequence[Provider],
    make_inputs: Callable[[int], tuple] = lambda index: (),
    *,
    cache: str = "cold",
    seconds: float = 0.4,
    rounds: int = 31,
    block_seconds: float = 0.01,
    seed: int = 0,
    device: str = "cpu",
    called: bool = False,
) -> dict[str, Timing]:
    """Time every provider, interleaved. `seconds` is the share of one provider; a call slower than seconds/rounds gets
    fewer samples (at least 3), spread evenly over the rounds. Providers without inputs of their own share one ring. `called`: each
    was called before, so that nothing is compiled here."""
    names = [p.name for p in providers]
    if len(set(names)) != len(names):
        raise ValueError(f"measure: providers has names {names}, expected each name once")
    steady_allocator()
    timer = timer_for(device)
    block_seconds = min(block_seconds, seconds / rounds)
    shared: Ring | None = None
    runners = []
    for provider in providers:
        if provider.make_inputs is None:
            ring = shared = shared or Ring.make(make_inputs, cache, device)
        else:
            ring = Ring.make(provider.make_inputs, cache, device)
        runners.append(Runner(provider, ring, timer))
    for runner in runners:
        runner.warm_up(block_seconds, seconds / 2, called)
        slow = runner.calls == 1
        runner.rounds = min(rounds, max(3, int(seconds / runner.estimate))) if slow else rounds
    order = random.Random(seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            # Slow providers sit out some rounds: r of n rounds are those where floor(i r / n) steps.
            turn = [r for r in runners if (index + 1) * r.rounds // rounds > index * r.rounds // rounds]
            order.shuffle(turn)
            for runner in turn:
                runner.sample(index)
    finally:
        if collecting:
            gc.enable()
    return {r.provider.name: r.timing() for r in runners}
