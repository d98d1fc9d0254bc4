"""`cobra bench`: resumed, interrupted, tampered with, on a machine that is too small; and its comparisons."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import fastjsonschema
import pytest
import torch

from benchmarks.harness import records
from benchmarks.harness.environment import ROOT
from benchmarks.scenarios.catalogue import cases
from benchmarks.suite import compare, journal, machine, report, results, run, worker
from benchmarks.suite.journal import Journal, JournalError
from tests.bench import fake_scenarios
from tests.bench.runs import ENVIRONMENT, a_run, measured

validate = fastjsonschema.compile(json.loads((ROOT / "benchmarks/suite/results.schema.json").read_text()))
FAKE = ("--scenarios", "tests.bench.fake_scenarios", "--preset", "laptop")
STEPS = (*FAKE, "--scenario", "step")


@pytest.fixture
def inline(monkeypatch):
    """Workers run in this process, without a new one each; returns the arguments of each. Nothing of ours changes meanwhile."""
    calls = []

    def run_inline(arguments, limit, log):
        calls.append([*arguments])
        out = log.parent.parent / "found.json"
        assert worker.main([*arguments, "--out", str(out)]) == 0
        found = json.loads(out.read_text())
        out.unlink()
        return "done", "", found

    monkeypatch.setattr(run, "in_own_process", run_inline)
    monkeypatch.setattr(worker, "confine", lambda device, parent: None)
    monkeypatch.setattr(worker, "steady_allocator", lambda: "as it is")
    for module in (machine, run):
        monkeypatch.setattr(module, "source", lambda: "0123456789ab")
    for module in (run, worker):  # git takes its time, and is asked elsewhere
        monkeypatch.setattr(module, "stamp", lambda device: ENVIRONMENT)
    monkeypatch.setattr(report, "pngs", lambda run, folder: [])
    gc.freeze()  # a measurement begins with a collection: of what the test made, not of torch
    yield calls
    gc.unfreeze()


def bench(folder, *arguments) -> int:
    return run.main([*arguments, "--out", str(folder)])


def load(folder, name="r") -> dict:
    found = json.loads((folder / name / "results.json").read_text())
    validate(found)
    assert found == results.load(folder / name)
    return found


# --- whole, with processes ----------------------------------------------------------------------------------------------


def test_a_crash_and_a_model_too_large_are_marked_and_the_run_ends_well(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(run.Runner, "roofs", lambda self: fake_scenarios.machine("cpu"))  # one process less; `inline` runs it
    for module in (machine, run):  # whoever edits the tree meanwhile
        monkeypatch.setattr(module, "source", lambda: "0123456789ab")
    wanted = (*FAKE, "--scenario", "crash", "--scenario", "wide", "--run", "r")
    assert bench(tmp_path, *wanted) == 0
    found = load(tmp_path)
    cases = {case["scenario"]: case for case in found["cases"]}
    crash, wide = cases["crash"], cases["wide"]
    assert crash["status"] == "crashed" and crash["reason"].startswith("ended by SIGSEGV")
    assert crash["results"][0]["status"] == "not run" and crash["results"][0]["limit_seconds"] == 1e-3
    assert len(list((tmp_path / "r" / "logs").iterdir())) == 1  # of the crash; the others said nothing worth keeping
    ours, peer = wide["results"]
    assert wide["status"] == "done" and ours["status"] == "run" and ours["record"]["median"] >= 1e-3
    assert peer["status"] == "not run" and "allocate memory" in peer["reason"]  # in its own process, and before the machine swaps
    out, err = capfd.readouterr()
    assert "CRASHED: crash/call/batch=1" in out and "2 of 4 cases, 1 of them marked" in out
    assert "[2/2]" in err and (tmp_path / "r" / "report.html").exists() and (tmp_path / "r" / "wide-call.png").exists()
    assert bench(tmp_path, *wanted) == 0 and "all 2 cases are done" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("import os; os.abort()", "crashed", "ended by SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "out of memory", "killed by the system"),
        ("print('first'); raise SystemExit('the last line')", "crashed", "exit status 1: the last line"),
        (f"import sys; print('MemoryError: too much'); sys.exit({worker.OUT_OF_MEMORY})", "out of memory", "MemoryError: too much"),
        ("import sys; open(sys.argv[-1], 'w').write('{}')", "done", ""),
    ],
)
def test_how_a_process_ends(tmp_path, code, status, reason):
    got = run.in_own_process([], 20, tmp_path / "logs" / "x.txt", (sys.executable, "-c", code))
    assert got[0] == status and got[1].startswith(reason) and got[2] == ({} if status == "done" else None)
    assert (tmp_path / "logs" / "x.txt").exists() == (status != "done")


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    child = "import time; time.sleep(0.4); open('alive', 'w')"
    start_it = f"os.chdir({str(tmp_path)!r}); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    code = f"import os, subprocess, sys, time; {start_it}"
    start = time.monotonic()
    status, reason, _ = run.in_own_process([], 0.3, tmp_path / "log.txt", (sys.executable, "-c", code))
    assert (status, reason) == ("time limit", "stopped after 0 s (--limit)") and time.monotonic() - start < 10
    time.sleep(0.5)
    assert not (tmp_path / "alive").exists()


# --- resumed ------------------------------------------------------------------------------------------------------------


def test_a_long_protocol_gets_the_time_that_its_models_may_take():
    paper = max(cases("paper", "cpu"), key=lambda case: case.patience)
    assert run.time_limit(paper, None) == paper.patience * len(paper.entries) > run.LIMIT
    for patience, wanted, expected in ((1.0, None, run.LIMIT), (math.inf, None, run.LIMIT), (1e4, 5.0, 5.0)):
        assert run.time_limit(replace(paper, patience=patience), wanted) == expected


def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, inline, monkeypatch, capsys):
    going = run.in_own_process

    def stop_at_the_second(arguments, limit, log):
        if sum(call[0] == "case" for call in inline) == 1:
            raise KeyboardInterrupt
        return going(arguments, limit, log)

    monkeypatch.setattr(run, "in_own_process", stop_at_the_second)
    assert bench(tmp_path, *STEPS, "--run", "r") == 130
    [first] = load(tmp_path)["cases"]
    assert "the same command goes on" in capsys.readouterr().err
    assert "1 of 4 cases of the preset so far" in (tmp_path / "r" / "report.html").read_text()
    monkeypatch.setattr(run, "in_own_process", going)
    assert bench(tmp_path, *STEPS, "--run", "r") == 0
    cases = load(tmp_path)["cases"]
    assert first in cases and [c["results"][0]["parameters"]["context"] for c in cases] == [1024, 4096]
    assert [call[0] for call in inline] == ["roofs", "case", "case"]  # nothing was measured twice
    assert bench(tmp_path, *STEPS, "--run", "r") == 0 and len(inline) == 3
    assert "all 2 cases are done" in capsys.readouterr().err


def test_what_failed_is_measured_again_only_when_asked(tmp_path, inline, monkeypatch):
    going = run.in_own_process
    monkeypatch.setattr(run, "in_own_process", lambda a, *rest: going(a, *rest) if a[0] == "roofs" else ("time limit", "slow", None))
    assert bench(tmp_path, *STEPS, "--run", "r") == 0
    assert [c["status"] for c in load(tmp_path)["cases"]] == ["time limit"] * 2
    monkeypatch.setattr(run, "in_own_process", going)
    assert bench(tmp_path, *STEPS, "--run", "r") == 0 and len(inline) == 1
    assert bench(tmp_path, *STEPS, "--run", "r", "--retry") == 0
    assert [c["status"] for c in load(tmp_path)["cases"]] == ["done"] * 2 and len(inline) == 3


def test_a_machine_without_the_device_runs_nothing_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(tmp_path, "--scenarios", "tests.bench.fake_scenarios", "--preset", "gpu", "--run", "r") == 0
    found = load(tmp_path)
    assert {c["status"] for c in found["cases"]} == {"not run"} and "torch sees no cuda device" in found["cases"][0]["reason"]
    assert found["cases"][0]["results"][0]["bytes"] > 0 and found["cases"][0]["results"][0]["limit_seconds"] is None
    assert "4 of 4 cases" in capsys.readouterr().out


# --- the journal --------------------------------------------------------------------------------------------------------

HERE = {"machine": "a", "device": "x", "cases": 3}


def written(path, *entries) -> list[str]:
    with Journal(path, HERE, {}, {}) as log:
        for entry in entries:
            log.append(entry)
    return path.read_text().splitlines(keepends=True)


def test_a_half_written_line_does_not_count(tmp_path):
    path = tmp_path / "j.jsonl"
    lines = written(path, {"kind": "case", "id": "a", "x": 0.1, 2: 3})
    with path.open("a") as file:
        file.write(lines[1][:40])
    with Journal(path, HERE, {}, {}) as log:
        assert [e["kind"] for e in log.entries] == ["run", "case"]
        log.append({"kind": "case", "id": "b"})
    assert [e.get("id") for e in journal.read(path)[0]] == [None, "a", "b"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: [lines[0], lines[1].replace("0.125", "0.115"), lines[2]], 2),  # a faster figure
        (lambda lines: [lines[0], lines[2]], 2),  # a case that is better not shown
        (lambda lines: [lines[0], lines[2], lines[1]], 2),
        (lambda lines: [lines[0].replace('"cases": 3', '"cases": 2'), *lines[1:]], 1),
        (lambda lines: [*lines[:2], "nonsense\n"], 3),
    ],
)
def test_a_journal_that_was_changed_is_refused(tmp_path, change, line):
    path = tmp_path / "r" / "journal.jsonl"
    lines = written(path, {"kind": "case", "id": "a", "x": 0.125}, {"kind": "case", "id": "b"})
    path.write_text("".join(change(lines)))
    with pytest.raises(JournalError, match=rf"journal.jsonl:{line}: (sha256 has|no journal line)"):
        Journal(path, HERE, {}, {})
    with pytest.raises(JournalError):
        results.load(path.parent)


def test_a_journal_of_another_machine_schema_or_writer_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    written(path)
    with pytest.raises(JournalError, match="machine has 'a', expected 'b', as here and now: .* start another run with --run"):
        Journal(path, {**HERE, "machine": "b"}, {}, {})
    with pytest.raises(JournalError, match="device has 'x', expected None"):
        Journal(path, {"machine": "a", "cases": 3}, {}, {})
    with Journal(path, HERE, {}, {}), pytest.raises(JournalError, match="another `cobra bench` is writing"):
        Journal(path, HERE, {}, {})
    monkeypatch.setattr(journal, "SCHEMA", 99)
    with pytest.raises(JournalError, match="schema has 1, expected 99"):
        Journal(path, HERE, {}, {})


def test_the_command_names_what_is_wrong(tmp_path, inline, capsys, monkeypatch):
    def error(*arguments) -> str:
        assert bench(tmp_path, *arguments) == 1
        return capsys.readouterr().err

    assert "--scenario has nothing, expected some of step, crash, wide" in error(*FAKE, "--scenario", "nothing")
    assert "--compare has 'nobody', expected a run or its folder; runs in" in error(*STEPS, "--compare", "nobody") and not inline
    assert "--run has '../x', expected letters" in error(*STEPS, "--run", "../x")
    assert "--device has 'tpu', expected cpu" in error(*STEPS, "--device", "tpu")
    assert "--scenarios has 'none.such', expected a module" in error("--scenarios", "none.such")
    assert "--limit has 0, expected more than 0 seconds" in error(*STEPS, "--limit", "0")
    monkeypatch.setattr(fake_scenarios, "cases", lambda preset, device: [])
    assert "has no case for preset laptop on cpu" in error(*STEPS)
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run.main(["--preset", "desktop"])


def test_a_journal_from_elsewhere_is_not_continued(tmp_path, inline, monkeypatch, capsys):
    first = (*FAKE, "--run", "r", "--scenario")
    assert bench(tmp_path, *first, "step") == 0
    monkeypatch.setattr(machine, "device_name", lambda device: "another processor")
    assert bench(tmp_path, *first, "wide") == 1
    assert "journal.jsonl:1: device has" in capsys.readouterr().err
    assert bench(tmp_path, *first, "step") == 0  # nothing to add: a finished run is read anywhere


def test_the_source_is_the_commit_and_a_hash_of_what_differs(monkeypatch):
    assert re.fullmatch(r"(none|[0-9a-f]{12})(\+[0-9a-f]{8})?", machine.source())

    def differs(text: bytes) -> str:
        monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, text, b""))
        return machine.source()

    monkeypatch.setattr(machine, "commit", lambda: {"commit": "0123456789ab", "dirty": True})
    assert differs(b"") == "0123456789ab" and differs(b"a") != differs(b"b") and differs(b"a").startswith("0123456789ab+")


def test_a_source_that_changes_meanwhile_ends_the_run(tmp_path, inline, monkeypatch, capsys):
    monkeypatch.setattr(run, "source", lambda: "0123456789ab" if len(inline) < 2 else "edited")
    assert bench(tmp_path, *STEPS, "--run", "r") == 1
    assert "the source is edited, expected 0123456789ab, with which r was begun" in capsys.readouterr().err
    assert len(results.load(tmp_path / "r")["cases"]) == 1


# --- order, progress, notes ---------------------------------------------------------------------------------------------


def test_cases_are_in_an_order_of_the_seed_and_scenarios_mix():
    def order(seed: int) -> list[str]:
        args = run.parser().parse_args([*FAKE, "--seed", str(seed)])
        args.device = "cpu"
        return [case.id for case in run.planned(fake_scenarios, args)[0]]

    assert order(0) == order(0) and len({tuple(order(seed)) for seed in range(8)}) > 2
    assert sorted(order(0)) == sorted(order(1))


def test_time_left_is_what_cases_took_so_far():
    estimate = run.Estimate(4)
    assert str(estimate) == ""
    estimate.add(20)
    assert str(estimate) == "about 1 min 00 s left"
    estimate.add(40)
    assert str(estimate) == "about 1 min 00 s left"
    assert str(run.Estimate(2, [3600])) == "about 2 h 00 min left" and run.duration(59.6) == "1 min 00 s"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    estimate = run.Estimate(2)
    with run.progress(estimate) as say:
        say("a/b", "")
        estimate.add(5)
        say("a/b", "ours 1 ms")
    err = capsys.readouterr().err
    assert "a/b: ours 1 ms" in err and "1/2" in err and "about 5 s left" in err


def test_drift_outliers_and_temperature_become_notes():
    steady = [1.0, 1.01, 0.99] * 4
    assert worker.drift(steady) == pytest.approx(1.0, abs=0.01) and not worker.drifted(steady) and worker.drift([1.0] * 8) is None
    climbing = [1.0 + 0.02 * i for i in range(12)]
    assert worker.drift(climbing) > 1.1 and worker.drifted(climbing) and worker.drifted(climbing[::-1])
    assert not worker.drifted([1.0, 1.4, 1.0, 1.4] * 2 + [1.6, 1.0, 1.6, 1.0])  # noise as wide as the change
    [note] = machine.thermal_notes({"pulse_seconds": 1.0}, {"pulse_seconds": 1.1})
    assert note == "the processor became 10% slower meanwhile (a fixed loop before and after)"
    assert machine.thermal_notes({"pulse_seconds": 1.0, "cpu_celsius": 50.0}, {"pulse_seconds": 1.02, "cpu_celsius": 55.0}) == []
    hot = machine.thermal_notes({"gpu_celsius": 40.0}, {"gpu_celsius": 71.0, "gpu_throttle": 0x40})
    assert hot == ["the GPU went from 40 to 71 degrees Celsius", "the GPU held its clock back (reasons 0x40)"]
    assert machine.sensors()["pulse_seconds"] > 0


def test_models_that_did_not_take_turns_have_no_ratio():
    point = fake_scenarios.cases("laptop", "cpu")[0]
    found = [measured(point, i, [0.001 * (i + 1)] * 9) for i in range(3)]
    assert [(r["entry"], r["ratio"], r["low"], r["verdict"]) for r in worker.ratios(found)] == [
        ("peer", 2.0, 2.0, "slower"), ("peer, as users run it", 3.0, 3.0, "slower"),
    ]  # fmt: skip
    found[1].units = 4.0  # four sequences a step
    assert worker.ratios(found)[0]["ratio"] == pytest.approx(0.5)
    found[1].group = 1
    assert [r["entry"] for r in worker.ratios(found)] == ["peer, as users run it"]
    few = [measured(point, i, [0.001 * (i + 1)] * 5) for i in range(2)]
    assert [(r["low"], r["verdict"]) for r in worker.ratios(few)] == [(None, "too few rounds")]


def test_gpu_sensors_are_read_as_the_driver_prints_them(monkeypatch):
    def answers(text):
        monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, text, ""))
        return machine._gpu(0)

    read = {"gpu_mhz": 1980, "gpu_celsius": 41, "gpu_watts": 312.5, "gpu_throttle": 0x40}
    assert answers("1980, 41, 312.5, 0x0000000000000041\n") == read
    assert answers("1980, 41, [N/A], Not Active\n")["gpu_watts"] is None and answers("no devices") == {}


# --- two runs -----------------------------------------------------------------------------------------------------------


def test_two_runs_side_by_side(tmp_path):
    pairs = {(p.case, p.entry): p for p in compare.pairs(a_run("after", slower=1.1), a_run("before"))}
    slow = pairs["step/call/batch=1,context=256", "ours"]
    assert slow.verdict == "slower" and slow.ratio.median == pytest.approx(1.1) and slow.ratio.low > 1
    assert pairs["wide/call/batch=1", "ours"].verdict == "same"
    assert pairs["step/call/batch=1,context=256", "peer <1>"].verdict == "too few rounds"  # four samples
    assert ("step/call/batch=1,context=32768", "peer <1>, as users run it") not in pairs  # not measured in either
    assert {p.verdict for p in compare.pairs(a_run(), a_run(slower=1.1)) if p.entry == "ours" and "step" in p.case} == {"faster"}


def test_the_interval_of_two_medians_covers_and_refuses():
    a, b = [1.0 + 0.001 * i for i in range(21)], [1.1 + 0.001 * i for i in range(21)]
    ratio = compare.ratio_of(b, a)
    assert ratio.low < ratio.median < ratio.high and ratio.verdict == "slower" and compare.ratio_of(a, b).verdict == "faster"
    assert compare.ratio_of(a, a).verdict == "same"
    assert math.isinf(compare.ratio_of(a[:8], b[:8]).high) and math.isfinite(compare.ratio_of(a[:9], b[:9]).high)
    wide = [0.5, 1.5] * 10
    assert compare.ratio_of([1.1 * s for s in wide], wide).verdict == "same"


def test_caution_names_what_else_differs():
    now, then = a_run("now"), a_run("then")
    assert compare.caution(now, then) == []
    then = copy.deepcopy(then)
    then["identity"]["torch"] = "2.11.0"
    for case in then["cases"]:
        if case["sensors"]:
            case["sensors"]["before"] = {"pulse_seconds": 0.0018, "load_average": 0.1}
    torch_differs, pulse = compare.caution(now, then)
    assert torch_differs == "torch: 2.13.0 against 2.11.0" and "11% slower in this run" in pulse


def test_compare_prints_and_reports(tmp_path, inline, capsys):
    assert bench(tmp_path, *STEPS, "--run", "before") == 0
    assert bench(tmp_path, *STEPS, "--run", "after", "--compare", "before") == 0
    assert "after against before" in capsys.readouterr().out
    page = (tmp_path / "after" / "report.html").read_text()
    assert "<h2>after against before</h2>" in page and "were not interleaved" in page


# --- records ------------------------------------------------------------------------------------------------------------


def test_a_run_is_recorded_once(tmp_path):
    (tmp_path / "run").mkdir()
    assert run.adopt(a_run(), tmp_path / "run", tmp_path / "results") == 10
    found = records.load(tmp_path / "results" / "some-cpu-more-2-cores" / "step.jsonl")
    assert len(found) == 7 and found[0].shape == "ours" and found[0].environment["run"] == "now"
    assert found[0].fraction == pytest.approx(0.25)
    with pytest.raises(run.RunError, match="was recorded before"):
        run.adopt(a_run(), tmp_path / "run", tmp_path / "results")


def test_every_preset_lists_cases_of_one_name_each(capsys):
    for preset, device in (("laptop", "cpu"), ("paper", "cpu"), ("gpu", "cuda"), ("paper", "cuda")):  # a GPU need not be there
        assert run.main(["--list", "--preset", preset, "--device", device]) == 0
        names = [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()]
        assert names and len(set(names)) == len(names)


def test_a_worker_whose_command_is_gone_ends(monkeypatch):
    limits = []
    monkeypatch.setattr(worker.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *a: limits.append(a)))
    monkeypatch.setattr(worker.resource, "setrlimit", lambda *a: limits.append(a))
    with pytest.raises(SystemExit, match="is gone"):
        worker.confine("cpu", os.getppid() + 1)
    assert limits == [(1, 9)]
