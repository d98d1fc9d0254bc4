"""The measuring instrument, measured. Timings run on shared machines, so each claim about time gets a few attempts: a right
instrument passes one of them, a wrong one none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.harness import environment, records, table, timing
from benchmarks.harness.bench import Case, Cost, disagreement, parser, rows_of, selected
from benchmarks.harness.timing import Provider, Ring, Timing, compare, measure

ATTEMPTS = 5


def eventually(attempt, what: str):
    """attempt() -> (passed, detail), at most ATTEMPTS times."""
    seen = []
    for _ in range(ATTEMPTS):
        passed, detail = attempt()
        if passed:
            return
        seen.append(detail)
    pytest.fail(f"{what}: in {ATTEMPTS} attempts got {seen}")


def spin(seconds: float, clock=time.perf_counter):
    """Work of a known duration: reads the clock until the time is over."""

    def run():
        end = clock() + seconds
        while clock() < end:
            pass

    return run


def a_timing(samples, provider="a", cache="cold", first_call=1.0) -> Timing:
    return Timing(provider, "perf_counter", cache, first_call, 1, list(samples), list(range(len(samples))), 1, 0)


def reported_against_real(work) -> tuple[float, float]:
    """(seconds that the harness reports for its sampled calls, seconds that the calls measured themselves)."""
    real = []

    def call():
        start = time.monotonic()
        work()
        real.append(time.monotonic() - start)

    t = measure([Provider("work", call)], seconds=0.15, rounds=11)["work"]
    return sum(t.samples) * t.calls, sum(real[-len(t.samples) * t.calls :])


def test_known_sleep_within_5_percent():
    def attempt():
        got, want = reported_against_real(lambda: time.sleep(0.005))
        return want >= 11 * 0.005 and abs(got / want - 1) < 0.05, (got, want)

    eventually(attempt, "5 ms sleeps")


def test_known_copy_within_5_percent():
    source = torch.ones(4 << 20)
    target = torch.empty_like(source)

    def attempt():
        got, want = reported_against_real(lambda: target.copy_(source))
        return abs(got / want - 1) < 0.05, (got, want)

    eventually(attempt, "16 MiB copies")


class ThreadTimer:
    """The time this thread ran: other work on the machine does not count, so the verdicts below can be exact."""

    name = "thread_time"

    def __call__(self, work):
        start = time.thread_time()
        work()
        return time.thread_time() - start


def test_planted_slowdown_is_detected_and_a_a_is_not(monkeypatch):
    monkeypatch.setattr(timing, "timer_for", lambda device: ThreadTimer())

    def job(name: str, seconds: float) -> Provider:
        return Provider(name, spin(seconds, time.thread_time))

    def attempt():
        t = measure([job("a", 4e-4), job("twin", 4e-4), job("slow", 4.4e-4)], seconds=0.12)
        slow, twin = compare(t["slow"], t["a"]), compare(t["twin"], t["a"])
        good = slow.verdict == "slower" and 1.05 < slow.median < 1.15 and compare(t["a"], t["slow"]).verdict == "faster"
        return good and twin.verdict == "same", (slow, twin)

    eventually(attempt, "10% slowdown")


def test_ratio_interval_covers_and_refuses():
    steady = [1.0, 1.02, 0.98] * 7
    assert compare(a_timing([1.1 * s for s in steady]), a_timing(steady, "b")).verdict == "slower"
    assert compare(a_timing(steady), a_timing(steady, "b")).verdict == "same"
    assert compare(a_timing([1.01 * s for s in steady]), a_timing(steady, "b")).verdict == "same"  # below the threshold
    few = compare(a_timing([2.0] * 4), a_timing([1.0] * 4, "b"))
    assert few.median == 2.0 and few.verdict == "same"  # four rounds prove nothing
    # Noise shared by the rounds cancels: both providers slow down together.
    drift = [1.0 + 0.5 * i for i in range(21)]
    ratio = compare(a_timing([1.1 * d for d in drift]), a_timing(drift, "b"))
    assert ratio.verdict == "slower" and ratio.median == pytest.approx(1.1)


def test_first_call_stays_out_of_the_samples():
    calls = []

    def lazy():
        calls.append(1)
        spin(0.03 if len(calls) == 1 else 2e-4)()

    t = measure([Provider("lazy", lazy)], seconds=0.05)["lazy"]
    assert t.first_call >= 0.03 and t.median < 0.01


def test_median_spread_outliers_and_note():
    t = a_timing([1.0] * 18 + [1.01, 9.0])
    assert (t.median, t.p20, t.p80, t.outliers) == (1.0, 1.0, 1.0, 1)
    assert t.note == "1 of 20 blocks far above the median"
    assert "busy machine" in a_timing([1.0, 1.0, 1.5, 1.5, 1.5, 1.0]).note
    assert timing.quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5


def test_cold_ring_exceeds_twice_the_cache_and_warm_does_not(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda device="cpu": 1 << 20)
    cold = Ring.make(lambda i: (torch.full((1 << 15,), float(i)),), "cold")  # 128 KiB a set
    assert cold.cache == "cold" and timing.storage_bytes(cold.sets) > 2 << 20
    seen = [cold.take()[0].data_ptr() for _ in range(2 * len(cold.sets))]
    assert len(set(seen)) == len(cold.sets) and seen[: len(cold.sets)] == seen[len(cold.sets) :]
    warm = Ring.make(lambda i: (torch.zeros(1 << 15),), "warm")
    assert warm.cache == "warm" and len(warm.sets) == 1
    tiny = Ring.make(lambda i: (torch.zeros(4),), "cold")  # cannot be cold: says so instead of claiming it
    assert tiny.cache == "warm"
    with pytest.raises(ValueError, match="expected 'cold' or 'warm'"):
        Ring.make(lambda i: (), "lukewarm")


def test_storage_bytes_counts_each_storage_once():
    x = torch.zeros(10, 10)
    assert timing.storage_bytes(x, x[2:], (x.t(), {"y": torch.zeros(5)})) == 420


def test_slow_provider_gets_fewer_rounds_and_shares_them():
    t = measure([Provider("slow", spin(0.01)), Provider("fast", spin(1e-4))], seconds=0.06, rounds=21)
    assert 3 <= len(t["slow"].samples) < 21 == len(t["fast"].samples)
    assert compare(t["slow"], t["fast"]).rounds == len(t["slow"].samples)


def test_order_is_seeded():
    def order(seed):
        seen = []
        providers = [Provider(name, lambda n=name: seen.append(n)) for name in "abcd"]
        measure(providers, seconds=0.004, rounds=8, block_seconds=1e-9, seed=seed)
        return seen[-32:]

    assert order(1) == order(1) != order(2)


def test_equal_names_are_refused():
    with pytest.raises(ValueError, match="each name once"):
        measure([Provider("a", spin(1e-5)), Provider("a", spin(1e-5))])


def a_record(**changes) -> records.Record:
    fields = {
        "op": "rms_norm", "mode": "fwd", "dtype": "fp32", "shape": "s", "dims": {"rows": 2}, "bytes": 3_000_000, "flops": 0,
        "exps": 0, "roof": "copy", "roof_seconds": 0.5, "fraction": 0.5, "environment": {"device": "x"},
    }  # fmt: skip
    return records.Record.of(a_timing([1.0, 1.0, 1.1]), **(fields | changes))


def test_records_append_load_and_latest(tmp_path):
    path = tmp_path / "device" / "rms_norm.jsonl"
    records.append([a_record()], path)
    first = path.read_text()
    records.append([a_record(fraction=0.7), a_record(dtype="bf16")], path)
    assert path.read_text().startswith(first)  # appended, never rewritten
    loaded = records.load(path)
    assert [r.fraction for r in loaded] == [0.5, 0.7, 0.5] and loaded[0] == a_record()
    assert records.latest(loaded)[a_record().key].fraction == 0.7
    path.write_text(json.dumps({**json.loads(first), "schema": 99}) + "\n")
    with pytest.raises(ValueError, match="schema is 99, this tree reads 1"):
        records.load(path)


def test_adopt_files_records_by_device_and_op(tmp_path, capsys):
    from benchmarks.__main__ import main

    cpu = a_record(environment={"device": "AMD EPYC 7", "cores": 2})
    gpu = a_record(op="other", environment={"device": "NVIDIA H200", "cores": 16, "driver": "580"})
    records.append([cpu, gpu, gpu], tmp_path / "all.jsonl")
    assert main(["adopt", str(tmp_path / "all.jsonl"), "--results", str(tmp_path / "results")]) == 0
    assert len(records.load(tmp_path / "results" / "amd-epyc-7-2-cores" / "rms_norm.jsonl")) == 1
    assert len(records.load(tmp_path / "results" / "nvidia-h200" / "other.jsonl")) == 2


def test_no_bench_is_begun_without_time(capsys):
    from benchmarks.__main__ import main

    assert main(["--quick", "--only", "rms_norm", "--no-record", "--within", "5"]) == 1
    assert "no time left" in capsys.readouterr().out


def test_committed_records_load_and_carry_their_environment():
    for path in records.RESULTS.glob("*/*.jsonl"):
        for record in records.load(path):
            assert record.environment["commit"] and record.environment["device"], path
            assert record.median > 0 and record.p20 <= record.median <= record.p80, path


def test_stamp_has_what_a_reader_needs_and_no_machine_paths():
    stamp = environment.stamp()
    for key in ("commit", "dirty", "date", "command", "device", "cpu", "cores", "threads", "cpu_level", "torch", "python", "os"):
        assert key in stamp
    assert stamp["allocator"] and stamp["last_level_cache_bytes"] > 0
    assert str(environment.ROOT) not in json.dumps(stamp)
    slug = environment.device_slug()
    assert slug and set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_plain_table_is_aligned_and_used_without_a_terminal(capsys):
    table.print_table("t", [("name", "<"), ("n", ">")], [["a", "1"], ["long", "20"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "t" and lines[1:] == ["name   n", "----  --", "a      1", "long  20"]
    assert table.seconds_text(1.234e-5) == "12.3 us" and table.bytes_text(4_000_000) == "4.00 MB"


def test_rows_compare_with_the_last_record():
    old, new = a_record(), a_record()
    new.median = 2.0
    [row] = rows_of([new], {old.key: old})
    assert row[0] == "rms_norm" and "2.00x" in row and "50% copy" in row
    second = rows_of([new, a_record(dtype="bf16")], {})[1]
    assert second[0] == "" and second[2] == "bf16"  # the op is said once
    assert rows_of([new, a_record(op="other")], {})[1][:3] == ["other", "fwd", "fp32"]
    assert "-" in rows_of([new], {})[0]


def test_wrong_provider_is_seen_before_it_is_timed():
    x = torch.randn(100)
    assert disagreement((x, x), (x, x)) == 0
    assert disagreement(x * 1.001, x) == pytest.approx(1e-3, rel=1e-3)
    assert disagreement(x[:50], x) == float("inf") and disagreement(x * float("nan"), x) == float("inf")


def test_case_selection():
    def case(shape, quick):
        return Case("fwd", "fp32", shape, {}, Cost(1), "", lambda i: (), (), quick=quick)

    cases = [case("a", True), case("b", False)]
    assert [c.shape for c in selected(cases, parser("x").parse_args([]))] == ["a", "b"]
    assert [c.shape for c in selected(cases, parser("x").parse_args(["--quick"]))] == ["a"]
    assert [c.shape for c in selected(cases, parser("x").parse_args(["--shape", "b"]))] == ["b"]


def test_harness_imports_neither_cobra_nor_a_backend():
    code = "import sys, benchmarks.harness; sys.exit(any(m.split('.')[0] in ('cobra', 'triton') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=environment.ROOT, check=False).returncode == 0


def test_the_gpu_floor_counts_what_its_kernel_computes():
    from benchmarks import roofline

    text = (environment.ROOT / "csrc/roof/roof.h").read_text()
    threads, chains = (int(re.search(rf"{name} = (\d+)", text)[1]) for name in ("kExp2Threads", "kExp2Chains"))
    assert roofline.CUDA_EXP_PER_ITERATION == threads * chains


def test_exp_floor_counts_what_it_computes():
    from benchmarks import roofline
    from cobra_kernels import extension

    if extension.absence() is not None:
        pytest.skip(f"csrc/roof needs the extension: {extension.absence()}")
    run = roofline.exp2_floor()
    assert run(roofline.EXP_BLOCKS) == roofline.EXP_COUNT
    one = measure([Provider("one", lambda: run(64)), Provider("four", lambda: run(256))], seconds=0.05)
    assert compare(one["four"], one["one"]).median > 2  # work grows with the count: nothing was optimised away


def test_roof_fraction_comes_from_paired_rounds():
    from benchmarks import roofline

    roof = roofline.Roof("matmul", 0.5, [Provider("roof matmul", lambda: None)])
    op, peak = a_timing([4.0] * 9, "op"), a_timing([2.0] * 9, "roof matmul")
    assert roof.judge(op, {"roof matmul": peak, "op": op}) == (1.0, 0.25)
    assert roofline.roof_for("", Cost(1)).judge(op, {}) == (None, None)
    assert roofline.roof_for("matmul", Cost(0, flops=2 * roofline.matmul_flops())).scale == 2
    with pytest.raises(ValueError, match="expected one of"):
        roofline.roof_for("datasheet", Cost(1))


def test_command_line_lists_benches_and_refuses_strangers(capsys):
    from benchmarks.__main__ import main

    assert main(["list"]) == 0
    assert {"rms_norm", "overhead"} <= set(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        main(["room", "no_such_room"])
    assert "'no_such_room' has no bench" in capsys.readouterr().err


def test_gpu_questions_divide_rightly():
    from benchmarks import gpu_questions as questions

    text = (environment.ROOT / "csrc/roof/roof.h").read_text()
    names = re.search(r"enum class Probe : int32_t \{(.*?)\}", text)[1].split(",")
    assert len(names) == len(questions.PROBES)

    def run(probe, chains, warps, iterations):  # an imaginary unit: latency 24, one instruction in 8 clocks per scheduler
        return [max(24, 8 * chains * warps) * iterations] * (4 * warps)

    answers = {(a.probe, a.warps, a.chains): a for a in questions.ask(run, repeats=1)}
    assert answers["ex2", 1, 1].clocks_of_a_warp == 24
    assert answers["ex2", 4, 4].clocks_per_instruction == 8 and answers["ex2", 4, 4].lanes_per_clock == 16
    rows = questions.rows(list(answers.values()), 2000, 100)
    assert len(rows) == len(questions.PROBES) * len(questions.SETTINGS)
    bf16 = answers["mma bf16", 4, 4]  # 2048 multiply-adds x 4 schedulers / 8 clocks x 2 GHz x 100
    assert float(rows[list(answers.values()).index(bf16)][-1]) == pytest.approx(2 * 2048 * 4 / 8 * 2e9 * 100 * 1e-12, rel=0.01)


def test_gpu_questions_say_what_they_need(capsys, monkeypatch):
    from benchmarks import gpu_questions

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_questions.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().out
