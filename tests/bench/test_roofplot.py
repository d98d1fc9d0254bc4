"""The roofline picture: marks and roofs are those of the records."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks import roofline, roofplot
from benchmarks.harness import records as store
from benchmarks.harness.timing import Timing

CPU = {
    "device": "CPU 9", "cores": 2, "threads": 2, "cpu_level": "avx2", "torch": "2.13", "commit": "0123456789ab", "dirty": False,
    "date": "2026-01-01T00:00:00Z",
}  # fmt: skip


def record(op: str, provider: str, seconds: float, roof: str, roof_seconds: float, **work) -> store.Record:
    timing = Timing(provider, "perf_counter", "cold", 1.0, 1, [seconds] * 3, [0, 1, 2], 1, 0)
    fields = {"bytes": 1000, "flops": 0, "exps": 0, **work}
    return store.Record.of(
        timing, op=op, mode="fwd", dtype="fp32", shape="s", dims={}, roof=roof, roof_seconds=roof_seconds, fraction=roof_seconds / seconds,
        environment=CPU, **fields,
    )  # fmt: skip


RECORDS = [
    record("rms_norm", "cpu", 2e-6, "copy", 1e-6, flops=500),
    record("rms_norm", "torch", 4e-6, "copy", 1e-6, flops=500),
    record("mlp_projector", "cpu", 1e-5, "matmul", 8e-6, flops=400_000),
    record("selective_scan", "cpu", 2e-6, "exp", 1e-6, exps=3000, flops=9000),
    record("overhead", "rms_norm", 1e-5, "goal", 1.5e-5, bytes=0),
]


def test_panels_hold_what_the_records_say():
    flops, exps = roofplot.panels(RECORDS)
    assert (flops.unit, exps.unit) == ("FLOP", "exp") and flops.bandwidths == exps.bandwidths == [pytest.approx(1e9)] * 2
    assert flops.peaks == [pytest.approx(5e10)] and exps.peaks == [pytest.approx(3e9)]
    marks = {(p.op, p.ours): (p.intensity, p.rate) for p in flops.points}
    assert marks[("rms_norm", True)] == (0.5, pytest.approx(2.5e8)) and marks[("rms_norm", False)] == (0.5, pytest.approx(1.25e8))
    assert marks[("mlp_projector", True)] == (400.0, pytest.approx(4e10)) and len(marks) == 3
    assert [(p.op, p.intensity, p.rate) for p in exps.points] == [("selective_scan", 3.0, pytest.approx(1.5e9))]
    assert roofplot.panels(RECORDS[:2]) == []  # no product was measured: no flat roof, no picture
    warm = [replace(r, cache="warm") for r in RECORDS]
    assert roofplot.panels(warm) == []  # a copy inside the cache is no roof


def test_picture_of_every_device_with_records(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: no pictures")
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "cpu-9").mkdir(parents=True)
    arguments = ["--plot", "--results", str(results), "--out", str(out)]
    assert roofline.main(arguments) == 1 and "make bench" in capsys.readouterr().out
    for r in [replace(RECORDS[0], median=1.0), *RECORDS]:  # the first is an older record of the same case
        store.append([r], results / "cpu-9" / f"{r.op}.jsonl")
    assert len([r for r in roofplot.last_records(results / "cpu-9") if r.op == "rms_norm"]) == 2
    assert roofline.main(arguments) == 0
    svg = (out / "roofline-cpu-9.svg").read_text()
    assert svg.count("<svg") == 1 and (out / "roofline-cpu-9.png").stat().st_size > 10_000
    texts = re.findall(r"<!-- (.*?) -->", svg)  # matplotlib draws letters as paths and leaves the text beside them
    for wanted in ("rms_norm", "mlp_projector", "selective_scan", "a peer", "FLOP per byte", "exp per byte"):
        assert any(wanted in text for text in texts), wanted
    assert any("1 GB/s, 50 GFLOP/s" in text for text in texts) and any("commits 0123456" in text for text in texts)
