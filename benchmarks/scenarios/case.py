"""The interface of the scenarios: a case, its entries, their limits, and the results of running it."""

from __future__ import annotations

import functools
import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.baselines.memory import available_memory
from benchmarks.baselines.pool import POOL
from benchmarks.harness.bench import Cost, disagreement
from benchmarks.harness.environment import stamp
from benchmarks.harness.records import Record
from benchmarks.harness.table import bytes_text, seconds_text
from benchmarks.harness.timing import Provider, Timing, measure
from benchmarks.scenarios.energy import joules_per_call

# Largest L2-relative difference between two settings of one model that is still the same answer: whole models, so many roundings.
SAME_MODEL = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.05}
CALLS = 5  # fewest calls that a measurement of a long call makes: a trial, the first, three samples


@dataclass(frozen=True)
class Roofs:
    """What this machine reached in a measurement of its own (`benchmarks.roofline`)."""

    bytes_per_second: float  # the faster of a read and a copy
    flops_per_second: float  # fp32 on a CPU, bf16 on a GPU
    exps_per_second: float | None  # None: no floor on this device, exponentials then set no limit


@functools.cache
def machine(device: str = "cpu", seconds: float = 0.5) -> Roofs:
    """The roofs of this machine, measured once per process."""
    roofs = roofline.machine_roofs(device, seconds)
    exps = roofs.get("exp_per_ns")
    return Roofs(
        1e9 * max(roofs["read_gbps"], roofs["copy_gbps"]), 1e9 * roofs["matmul_gflops"], None if exps is None else 1e9 * exps
    )


@dataclass(frozen=True)
class Limit:
    """No implementation of this shape is faster on this machine: bytes, FLOPs and exponentials perfectly overlapped."""

    seconds: float
    by: str  # "bytes", "flops" or "exps": what binds

    @classmethod
    def of(cls, cost: Cost, roofs: Roofs) -> Limit:
        needs = {"bytes": cost.bytes / roofs.bytes_per_second, "flops": cost.flops / roofs.flops_per_second}
        if roofs.exps_per_second:
            needs["exps"] = cost.exps / roofs.exps_per_second
        by = max(needs, key=needs.__getitem__)
        return cls(needs[by], by)


@dataclass(frozen=True)
class Entry:
    """One model at one setting in a case."""

    model: str  # a key of benchmarks.baselines.costs.SHAPES, or a preset of cobra
    setting: str  # "best", "torch.compile" or "as users run it"
    cost: Cost  # of one call: the least that any implementation of this shape must do
    units: float  # what one call yields, in the case's unit
    weights: int  # bytes, shared by all entries of the model
    working: int  # bytes beside the weights while it runs: states, caches, activations
    numbers: dict[str, float]  # computed from the shape: "state_bytes", "batch", "sequences", ...
    make: Callable[[], Provider]  # builds what it needs and returns the runnable; memory is taken from here on
    refused: str = ""  # why it is not run whatever the machine

    @property
    def name(self) -> str:
        return self.model if self.setting == "best" else f"{self.model}, {self.setting}"


@dataclass
class Result:
    """One entry of a case, measured or not. JSON by `to_dict`, back by `from_dict`.

    rate = units / record.median, in `unit` a second. fraction = limit_seconds / record.median."""

    case: str
    scenario: str
    mode: str
    entry: str
    model: str
    setting: str
    device: str  # "cpu", "cuda"
    dtype: str
    parameters: dict[str, int]
    unit: str
    units: float
    bytes: int
    flops: int
    exps: int
    limit_seconds: float
    limit_by: str
    numbers: dict[str, float]
    status: str  # "run" or "not run"
    reason: str = ""  # why not; empty when run
    record: Record | None = None  # None when not run
    samples: list[float] = field(default_factory=list)  # seconds a call, one of each block
    rounds: list[int] = field(default_factory=list)  # in which each block ran: entries of one group share them
    group: int = 0  # entries of one group were measured in the same rounds; ratios across groups are of medians only
    joules: float | None = None  # a call, where the device reports its energy
    energy_source: str = ""

    @property
    def rate(self) -> float | None:
        return None if self.record is None else self.units / self.record.median

    @property
    def limit_rate(self) -> float:
        return self.units / self.limit_seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Result:
        record = fields["record"]
        return cls(**{**fields, "record": None if record is None else Record(**record)})


@dataclass(frozen=True)
class Case:
    """One point of one scenario. Making a case builds no model and measures nothing."""

    scenario: str
    mode: str  # what of it: "vision", "prefill", "step", ...
    device: str
    dtype: str
    parameters: dict[str, int]  # "batch", "context", "images", "text_tokens", "new_tokens", ...
    unit: str  # what `units` count: "tokens", "answers", "images"
    entries: tuple[Entry, ...]
    seconds: float = 0.4  # measuring time of one entry
    patience: float = math.inf  # seconds that all calls of one entry may take; beyond it the entry is not run
    energy: bool = False  # measure joules too, where the device reports them
    note: str = ""  # what a reader of the plot must know

    @property
    def id(self) -> str:
        """Stable and unique within a preset: "decode-context/step/batch=1,context=8192"."""
        return f"{self.scenario}/{self.mode}/" + ",".join(f"{k}={v}" for k, v in self.parameters.items())

    def cost(self) -> dict[str, Cost]:
        """Entry name -> what one call must do at least."""
        return {e.name: e.cost for e in self.entries}

    def limits(self, roofs: Roofs | None = None) -> dict[str, Limit]:
        """Entry name -> the limit that its shape and this machine's roofs set (measured now, once, if not given)."""
        roofs = roofs or machine(self.device)
        return {e.name: Limit.of(e.cost, roofs) for e in self.entries}

    def providers(self, names: Sequence[str] | None = None) -> dict[str, Provider]:
        """Builds the entries named (all that are not refused, if None) and returns their runnables, for
        `benchmarks.harness.timing.measure`. Nothing is checked against memory or time: `run` does that."""
        wanted = [e for e in self.entries if (e.name in names if names is not None else not e.refused)]
        return {e.name: e.make() for e in wanted}

    def not_run(self, roofs: Roofs, memory: int | None = None) -> dict[str, str]:
        """Entry name -> why it will not be run, known before anything is built. memory: bytes free once no model is held."""
        memory = _free(self.device) if memory is None else memory
        reasons = {}
        for e in self.entries:
            needed, least = e.weights + e.working, CALLS * Limit.of(e.cost, roofs).seconds
            if e.refused:
                reasons[e.name] = e.refused
            elif needed > memory:
                reasons[e.name] = f"needs {bytes_text(needed)} of memory, {bytes_text(memory)} are free"
            elif least > self.patience:
                reasons[e.name] = f"{CALLS} calls take {seconds_text(least)} at the limit already, {seconds_text(self.patience)} are allowed"
        return reasons

    def groups(self, runnable: Sequence[Entry], memory: int) -> list[list[Entry]]:
        """Entries that fit into memory together, in their order; weights of one model count once."""
        groups: list[list[Entry]] = []
        for entry in runnable:
            for group in groups:
                together = [*group, entry]
                if sum({e.model: e.weights for e in together}.values()) + sum(e.working for e in together) <= memory:
                    group.append(entry)
                    break
            else:
                groups.append([entry])
        return groups

    def run(
        self, roofs: Roofs | None = None, *, seconds: float | None = None, seed: int = 0, say: Callable[[str], None] = lambda text: None,
        environment: dict | None = None,
    ) -> list[Result]:  # fmt: skip
        """Measures what fits; one result per entry, in their order. Never raises for what a machine or a model cannot do.

        seconds: measuring time of one entry, instead of the case's. say: called with one line per step. environment: of the
        records (`benchmarks.harness.environment.stamp`), taken now if None."""
        roofs = roofs or machine(self.device)
        environment = environment or stamp(self.device)
        memory = _free(self.device)
        reasons = self.not_run(roofs, memory)
        measured: dict[str, tuple[Record, Timing, int, float | None, str]] = {}
        for index, group in enumerate(self.groups([e for e in self.entries if e.name not in reasons], memory)):
            say(f"{self.id}: {', '.join(e.name for e in group)}")
            try:
                done = self._measure(group, roofs, seconds or self.seconds, seed, environment, reasons)
            finally:
                _release()
            measured |= {name: (record, timing, index, joules, source) for name, (record, timing, joules, source) in done.items()}
        return [self._result(e, Limit.of(e.cost, roofs), measured.get(e.name), reasons.get(e.name, "")) for e in self.entries]

    def lost(self, roofs: Roofs, reason: str) -> list[Result]:
        """What `run` would have returned, had it not ended otherwise: no entry run, each with its limit."""
        return [self._result(e, Limit.of(e.cost, roofs), None, reason) for e in self.entries]

    def _measure(
        self, group: list[Entry], roofs: Roofs, seconds: float, seed: int, environment: dict, reasons: dict[str, str]
    ) -> dict[str, tuple[Record, Timing, float | None, str]]:
        """Name -> (record, its samples, joules a call, their source) of what ran; `reasons` gains what did not."""
        POOL.keep({e.model for e in group})
        providers: dict[str, Provider] = {}
        trials: dict[str, float] = {}
        answers: dict[str, Any] = {}  # of each model, by its first entry
        for entry in group:
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    provider = entry.make()
                    inputs = provider.make_inputs(0) if provider.make_inputs else ()
                    start = time.perf_counter()
                    answer = provider.call(*inputs)
                    _synchronize(self.device)
                    trials[entry.name] = time.perf_counter() - start
                    error = disagreement(answer, answers.setdefault(entry.model, answer)) if provider.comparable else 0.0
            except Exception as failure:  # out of memory, no compiler, a library that cannot: this entry alone is lost
                reasons[entry.name] = _words(failure)
                _release()
                continue
            if error > SAME_MODEL[self.dtype]:
                reasons[entry.name] = f"its result differs from the same model's by {error:.1e}: not timed"
            elif trials[entry.name] * (CALLS - 1) > self.patience:
                allowed = seconds_text(self.patience)
                reasons[entry.name] = f"one call took {seconds_text(trials[entry.name])}, {CALLS} calls may take {allowed}"
            else:
                providers[entry.name] = provider
        del answers
        if not providers:
            return {}
        try:
            with torch.no_grad():
                timings = measure(list(providers.values()), cache="warm", seconds=seconds, seed=seed, device=self.device, called=True)
                energies = {name: joules_per_call(p, self.device) if self.energy else (None, "") for name, p in providers.items()}
        except Exception as failure:  # out of memory once all of them run: none has a figure
            reasons.update(dict.fromkeys(providers, _words(failure)))
            return {}
        by_name = {e.name: e for e in group}
        return {
            name: (self._record(by_name[name], timing, trials[name], roofs, environment), timing, *energies[name])
            for name, timing in timings.items()
        }

    def _record(self, entry: Entry, timing: Timing, trial: float, roofs: Roofs, environment: dict) -> Record:
        timing.first_call = trial
        limit = Limit.of(entry.cost, roofs)
        dims = {**self.parameters, **{k: int(v) for k, v in entry.numbers.items()}}
        return Record.of(
            timing, op=self.scenario, mode=self.mode, dtype=self.dtype, shape=entry.model, dims=dims, bytes=entry.cost.bytes,
            flops=entry.cost.flops, exps=entry.cost.exps, roof=f"limit ({limit.by})", roof_seconds=limit.seconds,
            fraction=limit.seconds / timing.median, environment=environment,
        )  # fmt: skip

    def _result(self, entry: Entry, limit: Limit, measured: tuple | None, reason: str) -> Result:
        record, timing, group, joules, source = measured or (None, None, 0, None, "")
        return Result(
            case=self.id, scenario=self.scenario, mode=self.mode, entry=entry.name, model=entry.model, setting=entry.setting,
            device=torch.device(self.device).type, dtype=self.dtype, parameters=self.parameters, unit=self.unit, units=entry.units,
            bytes=entry.cost.bytes, flops=entry.cost.flops, exps=entry.cost.exps, limit_seconds=limit.seconds, limit_by=limit.by,
            numbers=entry.numbers, status="run" if record else "not run", reason="" if record else reason, record=record, group=group,
            samples=timing.samples if timing else [], rounds=timing.rounds if timing else [], joules=joules, energy_source=source,
        )  # fmt: skip


def _free(device: str) -> int:
    """Bytes that the entries of one case may use: what is free now and what held models would give back, with a margin."""
    return int(0.85 * (available_memory(device) + POOL.held_bytes(device)))


def _words(failure: Exception) -> str:
    """An exception in a line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0][:200]}" if lines else type(failure).__name__


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
