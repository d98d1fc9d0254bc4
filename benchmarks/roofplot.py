"""The roofline picture of a device, from its records: `python -m benchmarks.roofline --plot`.

Left, floating-point operations: the slanted roof is bandwidth, the flat one a large matrix product. Right, what a scan is bound by:
exponentials. Every roof is what the records' own runs measured (median; the band holds 80% of them). A filled mark is ours, a
hollow one a peer in the same case; a mark's distance below the roof is what is left to gain. The bytes and operations are the least
that any implementation needs (the bench's `cost`), not what the hardware did: a mark moves up only by being faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import records as store
from benchmarks.harness.records import Record
from benchmarks.harness.timing import quantile

OURS = ("cpu", "cuda", "cobra_kernels")
COLOURS = ("#0b7a70", "#b4530a", "#4453c4", "#a3286a", "#6b7a12", "#7a4fb5", "#1f7fb5", "#8a5a2b", "#c23b3b", "#2f8f3e", "#5d636b")


@dataclass(frozen=True)
class Point:
    op: str
    ours: bool
    intensity: float  # operations per byte
    rate: float  # operations per second


@dataclass(frozen=True)
class Panel:
    """One kind of work: its marks, and samples of its roofs, operations per second and bytes per second."""

    title: str
    unit: str
    points: list[Point]
    peaks: list[float]
    bandwidths: list[float]


def work(record: Record, kind: str) -> int:
    return record.exps if kind == "exp" else record.flops


def panels(records: Sequence[Record]) -> list[Panel]:
    """Operations, and exponentials: each record goes where its own yardstick is. A panel without marks or without roofs is left out."""
    cold = [r for r in records if r.roof_seconds]
    bandwidths = [r.bytes / r.roof_seconds for r in cold if r.roof in ("copy", "read") and (r.cache == "cold" or r.roof == "read")]
    found = []
    for kind, title, unit in (("matmul", "floating-point operations", "FLOP"), ("exp", "exponentials", "exp")):
        mine = [r for r in records if (r.roof == "exp") == (kind == "exp") and r.roof not in ("", "goal") and r.bytes and work(r, kind)]
        points = [Point(r.op, r.provider in OURS, work(r, kind) / r.bytes, work(r, kind) / r.median) for r in mine]
        peaks = [work(r, kind) / r.roof_seconds for r in cold if r.roof == kind]
        if points and peaks and bandwidths:
            found.append(Panel(title, unit, points, peaks, bandwidths))
    return found


def last_records(folder: Path) -> list[Record]:
    """The last record of every case of a device, in the dtype that its benches are about: fp32 on a CPU, bf16 on a GPU."""
    found = [r for path in sorted(folder.glob("*.jsonl")) for r in store.latest(store.load(path)).values()]
    return [r for r in found if r.dtype == ("bf16" if "driver" in r.environment else "fp32")]


def draw(folder: Path, out: Path) -> list[Path]:
    """Writes roofline-<device>.svg and .png; [] when the device has no records of the kind. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = last_records(folder)
    shown = panels(records)
    if not shown:
        return []
    ops = sorted({p.op for panel in shown for p in panel.points})
    colour = {op: COLOURS[i % len(COLOURS)] for i, op in enumerate(ops)}
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "svg.hashsalt": folder.name}
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(shown), figsize=(6.2 * len(shown), 5.4), squeeze=False)
        for panel, ax in zip(shown, axes[0]):
            draw_panel(panel, ax, colour)
        marks = [plt.Line2D([], [], color=colour[op], marker="o", lw=0, label=op) for op in ops]
        marks.append(plt.Line2D([], [], color="#5d636b", marker="o", mfc="none", lw=0, label="a peer"))
        figure.legend(handles=marks, loc="upper center", ncols=5, frameon=False, fontsize=9.5)
        e = records[-1].environment
        commits = ", ".join(dict.fromkeys(r.environment["commit"][:7] for r in records))
        setting = f"driver {e['driver']}, bf16" if "driver" in e else f"{e['threads']} threads, {e['cpu_level']}, fp32"
        figure.text(0.01, 0.01, f"{e['device']}, {setting}, torch {e['torch']}, commits {commits}; bytes: the least", fontsize=8.5, color="#5d636b")
        figure.tight_layout(rect=(0, 0.03, 1, 0.88))
        out.mkdir(parents=True, exist_ok=True)
        paths = [out / f"roofline-{folder.name}.{kind}" for kind in ("svg", "png")]
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)
    return paths


def draw_panel(panel: Panel, ax, colour: dict[str, str]) -> None:
    from matplotlib.ticker import NullFormatter

    xs = [p.intensity for p in panel.points]
    peak, bandwidth = quantile(panel.peaks, 0.5), quantile(panel.bandwidths, 0.5)
    low, high = min(*xs, peak / bandwidth) / 5, max(*xs, peak / bandwidth) * 5
    grid = [low * (high / low) ** (i / 200) for i in range(201)]

    def roof(bytes_per_second: float, most: float) -> list[float]:
        return [min(bytes_per_second * x, most) for x in grid]

    # 10% to 90% of what the runs measured: a copy that other work held up is no roof
    bands = [(quantile(panel.bandwidths, q), quantile(panel.peaks, q)) for q in (0.1, 0.9)]
    ax.fill_between(grid, roof(*bands[0]), roof(*bands[1]), color="#9aa0a6", alpha=0.25, lw=0)
    ax.plot(grid, roof(bandwidth, peak), color="#3c4146", lw=1.8)
    for p in panel.points:
        ax.plot(p.intensity, p.rate, "o", color=colour[p.op], ms=7 if p.ours else 5, mfc=colour[p.op] if p.ours else "none", zorder=3 if p.ours else 2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_title(f"{panel.title}: {bandwidth * 1e-9:.0f} GB/s, {peak * 1e-9:.3g} G{panel.unit}/s", fontsize=11)
    ax.set_xlabel(f"{panel.unit} per byte")
    ax.set_ylabel(f"{panel.unit} per second")
    ax.grid(which="major", color="#e3e6e9")
    ax.set_axisbelow(True)
