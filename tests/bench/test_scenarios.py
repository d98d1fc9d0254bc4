"""The scenarios: every case of every preset can be made, limits are the physics of the published shapes, everything runs end to end on
tiny models, and nothing that a machine or a model cannot do ends a run."""

from __future__ import annotations

import functools
import gc
import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import scenarios
from benchmarks.baselines.costs import shape_of
from benchmarks.baselines.pool import POOL
from benchmarks.baselines.subject import build
from benchmarks.harness.bench import Cost
from benchmarks.harness.timing import Provider
from benchmarks.scenarios import Case, Entry, Limit, Result, Roofs, case, catalogue, energy
from benchmarks.scenarios.catalogue import SCENARIOS, Preset, cases

ROOFS = Roofs(bytes_per_second=1e10, flops_per_second=1e11, exps_per_second=1e9)
H200 = Roofs(4.3e12, 790e12, 132 * 16 * 1.98e9)
TINY_PRESET = Preset(
    models=("cobra-tiny", "tinyllava-3.1b-tiny", "mobilevlm-v2-3b-tiny"), dtype="fp32", scenarios=tuple(SCENARIOS), text_tokens=3, contexts=(5, 9),
    user_context=9, batches=(1, 2), batch_context=4, resident_context=6, resident_memory=2 << 20, resident_at_most=(2,), questions=(1, 2),
    images=(2,), seconds=0.005,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _short_collections():
    """Every case collects garbage before it is measured: what the libraries made when they were imported is none."""
    build("cobra-tiny"), build("tinyllava-3.1b-tiny")  # imports the rest
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_models_left():
    yield
    POOL.keep(())


# --- making cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", scenarios.PRESETS)
def test_cases_of_a_preset_build_nothing(preset, monkeypatch):
    monkeypatch.setattr(POOL, "get", lambda *args: pytest.fail("a model was built"))
    made = cases(preset, "cpu")
    assert len({c.id for c in made}) == len(made)
    assert {c.scenario for c in made} == ({"paper"} if preset == "paper" else set(SCENARIOS) - ({"paper"} if preset == "laptop" else set()))
    for c in made:
        names = [e.name for e in c.entries]
        assert len(set(names)) == len(names) and set(c.cost()) == set(c.limits(ROOFS)) == set(names)
        for e in c.entries:
            assert e.cost.bytes > 0 and e.cost.flops > 0 and e.units > 0 and e.weights > 0 and e.working > 0
    assert len({e.model for e in made[0].entries}) == 5


def test_large_models_are_computed_on_a_cpu_and_not_run():
    for c in cases("gpu", "cpu"):
        assert set(c.not_run(ROOFS, memory=10**15)) == {e.name for e in c.entries}
    results = cases("gpu", "cpu", ["paper"])[0].run(ROOFS, environment={})
    assert [r.status for r in results] == ["not run"] * len(results)
    assert results[0].reason == "7.02 GB of weights: computed on a CPU, run on a GPU"
    assert all(r.limit_seconds > 0 and r.rate is None for r in results)


def test_paper_is_the_papers_protocol():
    (c,) = cases("paper", "cpu")
    assert c.parameters == {"batch": 1, "images": 1, "text_tokens": 12, "new_tokens": 256}
    assert all(e.units == 256 for e in c.entries)
    assert [e.name for e in c.entries if e.model.startswith("llava-phi")] == ["llava-phi-twin", "llava-phi-twin, as users run it"]
    cobra, shape = c.cost()["cobra-laptop"], shape_of("cobra-laptop")
    step = shape.decode(1, 800, 4)
    first = catalogue.total(shape.vision(4), shape.project(4), shape.prefill(729 + 12, 4))
    assert cobra.flops == first.flops + 255 * step.flops  # the first token is the prefill's


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="preset has 'desk', expected one of laptop, gpu, paper"):
        cases("desk")
    with pytest.raises(ValueError, match="scenarios has nap, expected some of ttft, "):
        cases("laptop", scenarios=["nap", "paper"])
    assert {c.scenario for c in cases("laptop", scenarios=["ttft"])} == {"ttft"}


def test_cases_on_a_gpu(monkeypatch):
    """Without one: a Cobra has a setting more there, compiled entries exist, memory is the device's, graphs are where they belong."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 100 * 10**9}))
    built = {}
    monkeypatch.setattr(catalogue.POOL, "get", lambda name, device, dtype: built.setdefault(name, Recorder()))
    by_id = {c.id: c for c in cases("gpu", "cuda")}
    assert by_id.keys() >= {c.id for c in cases("gpu", "cpu") if c.scenario != "resident"}
    shown = by_id["decode-context/step/batch=1,context=2048"]
    assert [e.setting for e in shown.entries if e.model == "cobra-3b"] == ["best", "as users run it"]
    assert [e.setting for e in shown.entries if e.model == "llava-phi"] == ["best", "torch.compile", "as users run it"]
    assert shown.dtype == "bf16" and not any(e.refused for e in shown.entries)
    graphs = {name: p.graph for name, p in shown.providers().items()}
    assert graphs["llava-phi"] and graphs["llava-phi, torch.compile"] and not graphs["llava-phi, as users run it"]
    assert not any(p.graph for p in cases("gpu", "cuda", ["paper"])[0].providers(["cobra-3b"]).values())  # it captures its own steps
    (resident,) = [c for c in by_id.values() if c.scenario == "resident" and c.parameters["at_most"] == 256]
    assert resident.parameters["memory"] == 80 * 10**9


class Recorder:
    """Any method returns a function."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: lambda: torch.zeros(1)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_limit_is_what_binds():
    assert Limit.of(Cost(bytes=10**10, flops=10**10, exps=10**8), ROOFS) == Limit(1.0, "bytes")
    assert Limit.of(Cost(bytes=10**9, flops=2 * 10**11, exps=10**8), ROOFS) == Limit(2.0, "flops")
    assert Limit.of(Cost(bytes=10**9, flops=10**10, exps=3 * 10**9), ROOFS) == Limit(3.0, "exps")
    assert Limit.of(Cost(bytes=10**9, flops=10**10, exps=3 * 10**9), replace(ROOFS, exps_per_second=None)) == Limit(0.1, "bytes")


def per_second(name: str, batch: int, context: int) -> float:
    return batch / Limit.of(shape_of(name).decode(batch, context, 2), H200).seconds


def test_limits_of_the_real_sizes_by_other_arithmetic():
    """Tokens per second on 4.3 TB/s, worked out by hand from gigabytes of weights and keys and values: 6.61 G parameters and 524,288
    bytes a token (LLaVA-1.5-7B), 2.65 G and 327,680 (TinyLLaVA), 2.62 G (MobileVLM v2), 5.59 GB in all for Cobra at any context."""
    for context in (100, 8192, 32768):
        assert per_second("cobra-3b", 1, context) == pytest.approx(769, rel=0.005)
    for name, context, expected in (
        ("llava-1.5-7b", 2048, 301), ("llava-1.5-7b", 8192, 246), ("llava-1.5-7b", 32768, 141), ("tinyllava-3.1b", 8192, 539),
        ("tinyllava-3.1b", 32768, 268), ("mobilevlm-v2-3b", 2048, 728), ("mobilevlm-v2-3b", 32768, 269),
    ):  # fmt: skip
        assert per_second(name, 1, context) == pytest.approx(expected, rel=0.005), (name, context)
    ratio = per_second("cobra-3b", 64, 8192) / per_second("tinyllava-3.1b", 64, 8192)
    assert ratio == pytest.approx(20.9, rel=0.02)
    assert shape_of("cobra-3b").kept_bytes(2) == 64 * 5120 * (4 * 2 + 16 * 4)
    held = {name: shape_of(name).resident(141 * 10**9, 8192, 2) for name in ("cobra-3b", "tinyllava-3.1b", "llava-1.5-7b")}
    assert held["cobra-3b"] > 100 * held["tinyllava-3.1b"] and (held["tinyllava-3.1b"], held["llava-1.5-7b"]) == (50, 29)


# --- running ----------------------------------------------------------------------------------------------------------


def test_every_scenario_runs_on_tiny_models(monkeypatch):
    monkeypatch.setattr(catalogue, "ANSWER", 4)
    seen = set()
    for c in cases(TINY_PRESET, "cpu"):
        results = c.run(ROOFS, environment={"device": "test"})
        assert [r.entry for r in results] == [e.name for e in c.entries]
        for r in results:
            assert r.status == "run", (c.id, r.entry, r.reason)
            assert r.rate == r.units / r.record.median and r.record.fraction == r.limit_seconds / r.record.median
            assert len(r.samples) == len(r.rounds) == r.record.blocks
            assert r.record.roof == f"limit ({r.limit_by})" and r.record.environment == {"device": "test"}
            assert Result.from_dict(json.loads(json.dumps(r.to_dict(), allow_nan=False))) == r
        seen.add((c.scenario, c.mode))
    assert seen == {
        ("ttft", "vision"), ("ttft", "projector"), ("ttft", "prefill"), ("ttft", "total"), ("decode-context", "step"),
        ("decode-batch", "step"), ("resident", "step"), ("second-question", "first token"), ("many-questions", "first token"),
        ("several-images", "first token"), ("paper", "answer"),
    }  # fmt: skip


def test_resident_counts_the_sequences_that_memory_holds():
    (c,) = cases(TINY_PRESET, "cpu", ["resident"])
    for e in c.entries:
        shape = shape_of(e.model)
        n = e.numbers["sequences"]
        assert n == (TINY_PRESET.resident_memory - shape.weight_bytes(4)) // shape.state_bytes(6, 4)
        assert e.units == e.numbers["batch"] == min(n, 2)
    one = shape_of("tinyllava-3.1b-tiny").weight_bytes(4) + shape_of("tinyllava-3.1b-tiny").state_bytes(6, 4) * 3 // 2
    (c,) = cases(replace(TINY_PRESET, resident_memory=one), "cpu", ["resident"])
    (e,) = [e for e in c.entries if e.model == "tinyllava-3.1b-tiny"]
    assert e.units == e.numbers["batch"] == e.numbers["sequences"] == 1
    small = replace(TINY_PRESET, resident_memory=1000)
    results = cases(small, "cpu", ["resident"])[0].run(ROOFS, environment={})
    assert {r.reason for r in results} == {"1.00 kB hold its weights and not one sequence"}


def entry(model: str, call, *, setting: str = "best", weights: int = 0, working: int = 0, **rest) -> Entry:
    name = model if setting == "best" else f"{model}, {setting}"
    return Entry(model, setting, Cost(10), 1, weights, working, {}, lambda: Provider(name, call() if callable(call) else call, **rest))


def case_of(*entries: Entry, **rest) -> Case:
    return Case("decode-context", "step", "cpu", "fp32", {"batch": 1}, "tokens", entries, seconds=0.002, **rest)


def fine():
    return lambda: torch.ones(3)


def test_what_fails_is_lost_alone():
    def broken():
        raise RuntimeError("no compiler\nand a long story")

    def breaks_when_run():
        return broken

    c = case_of(entry("a", fine), entry("b", broken), entry("c", breaks_when_run), entry("d", fine))
    a, b, broken_later, d = c.run(ROOFS, environment={})
    assert (a.status, b.status, broken_later.status, d.status) == ("run", "not run", "not run", "run")
    assert b.reason == broken_later.reason == "RuntimeError: no compiler"


def test_a_measurement_that_fails_loses_its_group():
    calls = []

    def third_time():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return torch.ones(3)

    results = case_of(entry("a", fine), entry("b", lambda: third_time)).run(ROOFS, environment={})
    assert [(r.status, r.reason) for r in results] == [("not run", "MemoryError")] * 2


def test_a_setting_with_another_result_is_not_timed():
    wrong = entry("a", lambda: lambda: torch.ones(3) * 1.01, setting="torch.compile")
    elsewhere = entry("b", lambda: lambda: torch.ones(3) * 7)  # another model may answer otherwise
    unchecked = entry("a", lambda: lambda: torch.zeros(3), setting="as users run it", comparable=False)
    good, bad, other, free = case_of(entry("a", fine), wrong, elsewhere, unchecked).run(ROOFS, environment={})
    assert (good.status, bad.status, other.status, free.status) == ("run", "not run", "run", "run")
    assert bad.reason == "its result differs from the same model's by 1.0e-02: not timed"


def test_what_does_not_fit_is_not_built(monkeypatch):
    monkeypatch.setattr(case, "available_memory", lambda device: 1000)  # 850 with the margin
    untouched = entry("wide", lambda: pytest.fail("built"), weights=800, working=100)
    small, wide = case_of(entry("small", fine, weights=800, working=50), untouched).run(ROOFS, environment={})
    assert small.status == "run"
    assert (wide.status, wide.reason, wide.record) == ("not run", "needs 900 B of memory, 850 B are free", None)
    assert wide.limit_seconds == 1e-9


def test_what_takes_too_long_is_not_run():
    slow = replace(entry("slow", lambda: pytest.fail("built")), cost=Cost(10**10))  # a second a call at the limit
    asleep = entry("asleep", lambda: lambda: time.sleep(0.25))
    quick, never, late = case_of(entry("quick", fine), slow, asleep, patience=0.6).run(ROOFS, environment={})
    assert quick.status == "run"
    assert never.reason == "5 calls take 5.00 s at the limit already, 600 ms are allowed"
    assert late.reason.startswith("one call took ") and late.reason.endswith("5 calls may take 600 ms")


def test_groups_are_what_fits_together(monkeypatch):
    """Weights of a model count once; each group is measured with only its models held."""
    held = []
    monkeypatch.setattr(case, "_free", lambda device: 100)
    monkeypatch.setattr(POOL, "keep", lambda names: held.append(set(names)))
    entries = [
        entry("a", fine, weights=40, working=10), entry("a", fine, setting="x", weights=40, working=10),
        entry("b", fine, weights=30, working=30), entry("c", fine, weights=30, working=10),
    ]  # fmt: skip
    c = case_of(*entries)
    assert [[e.name for e in g] for g in c.groups(entries, 100)] == [["a", "a, x", "c"], ["b"]]
    results = c.run(ROOFS, environment={})
    assert [r.group for r in results] == [0, 0, 1, 0] and held == [{"a", "c"}, {"b"}]
    assert results[0].rounds and all(r.status == "run" for r in results)


# --- energy -----------------------------------------------------------------------------------------------------------


def test_energy_of_a_call(tmp_path, monkeypatch):
    counter = tmp_path / "energy_uj"
    counter.write_text("1000000")
    monkeypatch.setattr(energy, "RAPL", tmp_path)

    def call():  # two joules each
        counter.write_text(str(int(counter.read_text()) + 2_000_000))

    joules, source = energy.joules_per_call(Provider("p", call), "cpu", window=0.001)
    assert (joules, source) == (2.0, "RAPL, package 0")
    assert energy.joules_per_call(Provider("p", lambda: counter.write_text("5")), "cpu", window=0) == (None, "RAPL, package 0: the counter wrapped")
    monkeypatch.setattr(case, "joules_per_call", functools.partial(energy.joules_per_call, window=0.01))
    measured = case_of(entry("a", lambda: call), energy=True).run(ROOFS, environment={})[0]
    assert measured.joules == pytest.approx(2.0) and measured.energy_source == "RAPL, package 0"
    counter.unlink()
    assert energy.joules_per_call(Provider("p", fine()), "cpu") == (None, "no energy counter that this process may read")
