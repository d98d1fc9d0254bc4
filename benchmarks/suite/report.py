"""report.html, the same plots as PNG, results.json and results.csv of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from benchmarks import page as pieces
from benchmarks.harness.table import bytes_text, figures, seconds_text
from benchmarks.page import SORT, WIDE, environment_table, legend, responsive, table
from benchmarks.suite.compare import Pair, caution
from benchmarks.suite.results import complete, write_csv, write_json
from benchmarks.svg import Bar, Series, line_chart, stacked_bars

COLOURS = ("#0b7a70", "#b4530a", "#4f55c9", "#a8326b", "#4d6b10", "#7a5a2f")  # s0 .. s5 of the light page
MARKERS = ("o", "s", "^", "D", "v", "p")
BINARY = ("context", "memory")  # parameters that are counted in powers of two


# --- what is plotted, whatever draws it ---------------------------------------------------------------------------------


@dataclass
class Plot:
    """One picture: lines over the parameter `x`, or bars when there is none."""

    name: str
    title: str
    x: str | None
    y_label: str
    rate: bool  # a rate, higher is better; else seconds
    models: list[str]  # their order gives their colours, the same in every picture of a run
    rows: list[dict] = field(default_factory=list)  # results

    def y(self, result: dict) -> float:
        return result["rate"] if self.rate else result["record"]["median"]

    def band(self, result: dict) -> tuple[float, float]:
        low, high = result["record"]["p20"], result["record"]["p80"]
        return (result["units"] / high, result["units"] / low) if self.rate else (low, high)

    def limit(self, result: dict) -> float | None:
        return result["limit_rate"] if self.rate else result["limit_seconds"]

    def lines(self) -> Iterable[tuple[int, str, list[dict], list[dict]]]:
        """(colour, name, results measured, results with a limit) of every entry; a limit is drawn once per model."""
        for entry in dict.fromkeys(r["entry"] for r in self.rows):
            rows = sorted((r for r in self.rows if r["entry"] == entry), key=lambda r: r["parameters"][self.x])
            limits = [r for r in rows if self.limit(r) is not None] if rows[0]["setting"] == "best" else []
            yield self.models.index(rows[0]["model"]), entry, [r for r in rows if r["record"]], limits

    @property
    def log_y(self) -> bool:
        values = [self.y(r) for r in self.rows if r["record"]] + [v for r in self.rows if (v := self.limit(r))]
        return max(values) > 20 * min(values)

    def x_text(self, value: float) -> str:
        return f"{value / 1024:g}k" if self.x in BINARY and value >= 1024 else f"{value:g}"

    def y_text(self, value: float) -> str:
        return f"{value:g}" if self.rate else seconds_text(value) if value else "0"


def models_of(run: dict) -> list[str]:
    """Every model of the run, in the order in which its cases name them."""
    return list(dict.fromkeys(r["model"] for case in run["cases"] for r in case["results"]))


def plots_of(run: dict, scenario: str) -> list[Plot]:
    """One picture per mode, and per value of the parameters that are not on its x axis. Cases in which nothing ran have none."""
    cases = [case for case in run["cases"] if case["scenario"] == scenario and any(r["record"] for r in case["results"])]
    found = []
    for mode in dict.fromkeys(case["mode"] for case in cases):
        rows = [r for case in run["cases"] if (case["scenario"], case["mode"]) == (scenario, mode) for r in case["results"]]
        values = {key: {r["parameters"].get(key) for r in rows} for key in rows[0]["parameters"]}
        x = max(values, key=lambda key: len(values[key]), default=None)
        x = x if x is not None and len(values[x]) > 1 and all(isinstance(v, (int, float)) and v > 0 for v in values[x]) else None
        rest = [key for key in values if key != x and len(values[key]) > 1]
        for fixed in dict.fromkeys(tuple(r["parameters"].get(k) for k in rest) for r in rows):
            mine = [r for r in rows if tuple(r["parameters"].get(k) for k in rest) == fixed]
            if not any(r["record"] for r in mine):
                continue
            where = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in zip(rest, fixed))
            rate = mine[0]["unit"] == "tokens"  # several a call, and not as many for every model
            name = "-".join(filter(None, (scenario, mode, where))).replace(" ", "-").replace(",", "")
            title = f"{scenario}: {mode}" + (f", {where}" if where else "")
            found.append(Plot(name, title, x, f"{mine[0]['unit']} per second" if rate else "seconds", rate, models_of(run), mine))
    return found


# --- SVG ----------------------------------------------------------------------------------------------------------------


def svg(plot: Plot) -> str:
    return _line_figure(plot) if plot.x else _bar_figure(plot)


def _line_figure(plot: Plot) -> str:
    series, entries, others = [], [], []
    for colour, entry, rows, limits in plot.lines():
        style = f"s{colour % len(COLOURS)}"
        if limits:
            series.append(Series(f"limit of {entry}", [(r["parameters"][plot.x], plot.limit(r)) for r in limits], (), style, limit=True))
        if rows:
            best = rows[0]["setting"] == "best"
            points = [(r["parameters"][plot.x], plot.y(r)) for r in rows]
            series.append(Series(entry, points, [plot.band(r) for r in rows], style if best else f"{style} soft"))
            if best:
                entries.append((entry, style))
            else:
                others.append(rows[0]["setting"])
    ticks = [(x, plot.x_text(x)) for x in sorted({r["parameters"][plot.x] for r in plot.rows})]
    label = "tokens of context" if plot.x == "context" else plot.x.replace("_", " ")
    figure = responsive(
        lambda w, c: line_chart(
            series, title=plot.title, x_label=label, y_label=plot.y_label + (" (log scale)" if plot.log_y else ""), width=w,
            height=340 if w == WIDE else 280, x_ticks=ticks, y_text=plot.y_text, log_y=plot.log_y, names=False, cls=c,
        )
    )  # fmt: skip
    hollow = [(f"hollow: {', '.join(dict.fromkeys(others))}", "")] if others else []
    return legend([*entries, *hollow, ("limit of the same colour's shape on this machine", "dashed")]) + figure


def _bar_figure(plot: Plot) -> str:
    bars = []
    for r in (r for r in plot.rows if r["record"]):
        style = f"s{plot.models.index(r['model']) % len(COLOURS)}" + ("" if r["setting"] == "best" else " b")
        reached = rate_text(r["rate"], r["unit"]) if plot.rate else seconds_text(r["record"]["median"])
        bars.append(Bar(r["entry"], [("", plot.y(r), style)], f"{reached}, {r['fraction']:.0%} of limit", plot.limit(r)))
    better = "longer bars are better" if plot.rate else "shorter bars are better"
    return legend([(f"limit of the shape on this machine; {better}", "dashed")]) + responsive(
        lambda w, c: stacked_bars(bars, title=plot.title, width=w, cls=c, bar_height=20)
    )


# --- PNG ----------------------------------------------------------------------------------------------------------------


def pngs(run: dict, folder: Path) -> list[Path]:
    """Every plot of the page with matplotlib; [] when it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    e = run["environment"]
    i = run["identity"]
    foot = f"{i['device']}, {e['threads']} threads, torch {e['torch']}, source {i['source']}; random weights; dashed: limit"
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e3e6e9",
        "axes.axisbelow": True,
    }
    paths = []
    for plot in (p for scenario in scenarios_of(run) for p in plots_of(run, scenario)):
        with plt.rc_context(style):
            figure, axes = plt.subplots(figsize=(8.6, 4.8 if plot.x else 1.6 + 0.42 * len(plot.rows)), dpi=130)
            _draw_lines(plot, axes) if plot.x else _draw_bars(plot, axes)
            axes.set_title(plot.title, loc="left", fontweight="bold")
            figure.text(0.01, 0.01, foot, fontsize=7.5, color="#5d636b")
            figure.tight_layout(rect=(0, 0.035, 1, 1))
            paths.append(folder / f"{plot.name}.png")
            figure.savefig(paths[-1])
            plt.close(figure)
    return paths


def _draw_lines(plot: Plot, axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for colour, entry, rows, limits in plot.lines():
        colour %= len(COLOURS)
        if rows:
            best = rows[0]["setting"] == "best"
            xs = [r["parameters"][plot.x] for r in rows]
            axes.plot(
                xs,
                [plot.y(r) for r in rows],
                color=COLOURS[colour],
                marker=MARKERS[colour],
                lw=2 if best else 1,
                alpha=1 if best else 0.6,
                label=entry,
            )
            low, high = zip(*(plot.band(r) for r in rows))
            axes.fill_between(xs, low, high, color=COLOURS[colour], alpha=0.15, lw=0)
        if limits:
            xs, ys = [r["parameters"][plot.x] for r in limits], [plot.limit(r) for r in limits]
            if len(xs) == 1:
                xs, ys = [0.9 * xs[0], 1.1 * xs[0]], ys * 2
            axes.plot(xs, ys, color=COLOURS[colour], ls="--", lw=1.4)
    xs = sorted({r["parameters"][plot.x] for r in plot.rows})
    axes.set_xscale("log")
    axes.set_xticks(xs, [plot.x_text(x) for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    if plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plot.y_text(v)))
    axes.set(xlabel=plot.x.replace("_", " "), ylabel=plot.y_label)
    axes.legend(frameon=False, fontsize=9)


def _draw_bars(plot: Plot, axes) -> None:
    rows = [r for r in plot.rows if r["record"]][::-1]
    for i, r in enumerate(rows):
        colour, best = COLOURS[plot.models.index(r["model"]) % len(COLOURS)], r["setting"] == "best"
        axes.barh(i, plot.y(r), height=0.6, color=colour, alpha=1 if best else 0.6)
        if plot.limit(r):
            axes.vlines(plot.limit(r), i - 0.42, i + 0.42, color="#1c1e21", ls="--", lw=1.4)
    axes.set_yticks(range(len(rows)), [r["entry"] for r in rows])
    axes.set_xlabel(plot.y_label)


# --- HTML ---------------------------------------------------------------------------------------------------------------


def scenarios_of(run: dict) -> list[str]:
    return list(dict.fromkeys(case["scenario"] for case in run["cases"]))


def rate_text(rate: float | None, unit: str) -> str:
    return "-" if rate is None else f"{figures(rate)} {unit}/s"


def parameters_text(parameters: dict) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {bytes_text(v) if k == 'memory' else v}" for k, v in parameters.items())


def _spread(record: dict) -> str:
    median = seconds_text(record["median"])
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[median.split()[1]]
    return f"{median} ({figures(record['p20'] * scale)}–{figures(record['p80'] * scale)})"


def ratio_text(ratio: float, low: float | None, high: float | None) -> str:
    return f"{figures(ratio)}x" + (f" ({figures(low)}–{figures(high)})" if low is not None else "")


def numbers_text(numbers: dict) -> str:
    """weights 512 MB, state 3.1 MB, sequences 1300"""
    return ", ".join(
        f"{k.removesuffix('_bytes').replace('_', ' ')} {bytes_text(v) if k.endswith('_bytes') else f'{v:g}'}" for k, v in numbers.items()
    )


HEADS = ("model", "case", "median", "rate", "of limit", "limit", "bound by", "time a unit / first", "bytes", "FLOPs", "joules", "shape")


def case_table(cases: Sequence[dict]) -> str:
    rows = []
    for case in cases:
        ratios = {r["entry"]: r for r in case["ratios"]}
        for r in case["results"]:
            record, ratio = r["record"], ratios.get(r["entry"])
            flag = " *" if r["notes"] or (record and case["notes"]) else ""
            rows.append(
                [
                    r["entry"], f"{case['mode']}: {parameters_text(r['parameters'])}",
                    (_spread(record) + flag, record["median"]) if record else ("not run", None),
                    (rate_text(r["rate"], r["unit"]), r["rate"]), ("-" if r["fraction"] is None else f"{r['fraction']:.0%}", r["fraction"]),
                    ("-" if r["limit_seconds"] is None else seconds_text(r["limit_seconds"]), r["limit_seconds"]), r["limit_by"] or "-",
                    ("-", None) if ratio is None else (ratio_text(ratio["ratio"], ratio["low"], ratio["high"]), ratio["ratio"]),
                    (bytes_text(r["bytes"]), r["bytes"]), (f"{r['flops']:.3g}", r["flops"]),
                    ("-" if r["joules"] is None else figures(r["joules"]), r["joules"]),
                    numbers_text(r["numbers"]),
                ]
            )  # fmt: skip
    return table(HEADS, rows, sortable=True)


def remarks(cases: Sequence[dict]) -> str:
    """What did not run and why, and what to know about what did, folded away."""
    lines = []
    for case in cases:
        where = f"{case['mode']}: {parameters_text(case['results'][0]['parameters'])}" if case["results"] else case["mode"]
        if case["status"] != "done":
            lines.append(f"{where}: {case['status']}: {case['reason']}")
        else:
            lines += [f"{where}, {r['entry']}: not run: {r['reason']}" for r in case["results"] if not r["record"]]
        lines += [f"{where}: {note}" for note in [case["note"], *case["notes"]] if note]
        lines += [f"{where}, {r['entry']}: {note}" for r in case["results"] for note in r["notes"]]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{len(lines)} notes: what did not run and why, outliers, drift</summary><ul>{items}</ul></details>"


def comparison(run: dict, other: dict, pairs: Sequence[Pair]) -> str:
    rows = [
        [
            p.case, p.entry, (seconds_text(p.old), p.old), (seconds_text(p.new), p.new),
            (ratio_text(p.ratio.median, p.ratio.low if p.known else None, p.ratio.high), p.ratio.median), p.verdict,
        ]
        for p in pairs
    ]  # fmt: skip
    count = {word: sum(p.verdict == word for p in pairs) for word in ("faster", "slower", "same", "too few rounds")}
    said = ", ".join(f"{n} {word}" for word, n in count.items() if n) or "nothing was measured in both"
    warnings = "".join(f'<p class="warn">{escape(line)}</p>' for line in caution(run, other))
    return f"""<h2>{escape(run["run"])} against {escape(other["run"])}</h2>
<p class="soft">{said}. Ratio: time now / time then, with the 99% interval of both medians together. Less than 2%, or an interval that
contains 1, is the same. The two runs were not interleaved: what else the machine did is part of the difference.</p>
{warnings}{table(("case", "model", other["run"], run["run"], "ratio", "it is"), rows, sortable=True)}"""


READING = """
<li>Random weights everywhere: speed and memory, never the quality of an answer.</li>
<li>A limit is what the bytes, FLOPs or exponentials of a shape cost at the rates this machine reached in this run (below),
whichever takes longest. It is each side's own, so "of limit" judges the code and the limits judge the architectures.</li>
<li>At batch 1 and short context both architectures read the same weights per token: their limits are the same there.</li>
<li>Models of a case take turns in shuffled order; median (p20–p80) of blocks. "time a unit / first" is the median ratio within a round
with its 99% interval. * marks outliers, drift or a busy machine: see the notes.</li>
<li>"Not run" did not fit into memory, time or this machine; its limit is computed from its shape.</li>
"""


def html(run: dict, other: dict | None = None, pairs: Sequence[Pair] = ()) -> str:
    e, about = run["environment"], run["about"]
    marked = [case for case in run["cases"] if case["status"] not in ("done", "not run")]
    warnings = []
    if not complete(run):
        warnings.append(f"{len(run['cases'])} of {run['planned']} cases of the preset so far.")
    if marked:
        warnings.append("; ".join(f"{case['id']}: {case['status']} ({case['reason']})" for case in marked))
    sections = []
    for scenario in scenarios_of(run):
        cases = [case for case in run["cases"] if case["scenario"] == scenario]
        pictures = "\n".join(f'<h3 class="plot">{escape(p.title)}</h3>{svg(p)}' for p in plots_of(run, scenario))
        text = about.get(scenario, "")
        sections.append(f"<h2>{escape(scenario)}</h2><p class=soft>{escape(text)}</p>{pictures}{case_table(cases)}{remarks(cases)}")
    roofs = [
        [name, f"{figures(value / scale)} {unit}"]
        for entry in run["roofs"]
        for key, name, scale, unit in (
            ("bytes_per_second", "memory", 1e9, "GB/s"), ("flops_per_second", "matrix product", 1e9, "GFLOP/s"),
            ("exps_per_second", "exponentials", 1e9, "per ns"),
        )
        if (value := entry["roofs"][key])
    ]  # fmt: skip
    calls: dict[tuple[str, str], int] = {}
    for case in run["cases"]:
        for b in case["backends"]:
            calls[b["op"], b["backend"]] = calls.get((b["op"], b["backend"]), 0) + b["calls"]
    backends = table(("op", "backend", "calls"), [[op, backend, str(n)] for (op, backend), n in sorted(calls.items())]) if calls else ""
    body = f"""<h1>cobra bench: {escape(run["run"])}</h1>
<p class="soft">{escape(run["identity"]["device"])}, {e["threads"]} threads, {escape(e["cpu_level"])} · torch {escape(e["torch"])} ·
source {escape(run["identity"]["source"])} · {escape(e["date"].replace("T", " ").replace("Z", " UTC"))}</p>
{"".join(f'<p class="warn">{escape(line)}</p>' for line in warnings)}
{comparison(run, other, pairs) if other else ""}
{"".join(sections)}
<h2>How to read this</h2>
<ul>{READING}</ul>
<h2>The machine</h2>
{table(("rate reached in this run", "value"), roofs) if roofs else ""}
{backends}
{environment_table({**e, "command": None})}
<p class="soft">Again: <code>{escape(e["command"])}</code>. All samples: results.json beside this page.</p>"""
    return pieces.page(f"cobra bench: {run['run']}", body, SORT)


def write(run: dict, folder: Path, other: dict | None = None, pairs: Sequence[Pair] = ()) -> list[Path]:
    """results.json, results.csv, report.html and the PNG into the run's folder; returns their paths."""
    written = [folder / "report.html", folder / "results.json", folder / "results.csv"]
    written[0].write_text(html(run, other, pairs))
    write_json(run, written[1])
    write_csv(run, written[2])
    return [*written, *pngs(run, folder)]
