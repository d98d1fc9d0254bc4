"""From results to things people read: the demo's page and pictures, and tables and bars of the records.

    python -m benchmarks.report            Markdown tables of the last records of every device, and out/bench/report.html

A page is one file: style, pictures and photo are inside, and there is no link to anywhere (page.py)."""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.harness import records as store
from benchmarks.harness.environment import ROOT
from benchmarks.harness.table import bytes_text, figures, seconds_text
from benchmarks.page import WIDE, environment_table, page, responsive, table
from benchmarks.svg import Bar, Series, line_chart, stacked_bars

ORDER = ("cobra", "llava")
STYLE = {"cobra": "s0", "llava": "s1"}
STAGES = ("vision", "projector", "prefill")

# --- the demo ---------------------------------------------------------------------------------------------------------


def context_text(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens}"


def spread(s: dict) -> str:
    """400 ms (380–440): p20 and p80 in the unit of the median."""
    median = seconds_text(s["median"])
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[median.split()[1]]
    return f"{median} ({figures(s['p20'] * scale)}–{figures(s['p80'] * scale)})"


def rate_spread(s: dict) -> str:
    return f"{figures(1 / s['median'])} ({figures(1 / s['p80'])}–{figures(1 / s['p20'])})"


def rate(s: dict) -> float:
    return 1 / s["median"]


def ttft_bars(r: dict) -> list[Bar]:
    bars = []
    for name in ORDER:
        first, label = r["first"][name], r["models"][name]["short"]
        segments = [
            (f"{stage} {seconds_text(first[stage]['median'])}", first[stage]["median"], f"{STYLE[name]} {'abc'[i]}")
            for i, stage in enumerate(STAGES)
        ]
        bars.append(Bar(f"{label}, first question", segments, seconds_text(first["total"]["median"])))
        second = r["second"][name]["total"]
        segment = (f"prefill of the question {seconds_text(second['median'])}", second["median"], f"{STYLE[name]} c")
        bars.append(Bar(f"{label}, second question, image kept", [segment], seconds_text(second["median"])))
    return bars


def decode_series(r: dict) -> list[Series]:
    return [
        Series(
            r["models"][name]["short"],
            [(d["context"], rate(d[name]["step"])) for d in r["decode"]],
            [(1 / d[name]["step"]["p80"], 1 / d[name]["step"]["p20"]) for d in r["decode"]],
            STYLE[name],
        )
        for name in ORDER
    ]


def memory_series(r: dict) -> list[Series]:
    return [
        Series(r["models"][name]["short"], [(d["context"], d[name]["bytes"]) for d in r["decode"]], (), STYLE[name])
        for name in ORDER
    ]


def demo_plots(r: dict) -> dict[str, str]:
    ticks = [(d["context"], context_text(d["context"])) for d in r["decode"]]
    return {
        "ttft": responsive(
            lambda w, c: stacked_bars(ttft_bars(r), title="Time to the first token, by stage", width=w, cls=c)
        ),
        "decode": responsive(
            lambda w, c: line_chart(
                decode_series(r), title="Decode tokens per second against context length", x_label="tokens of context",
                y_label="tokens per second", width=w, height=320 if w == WIDE else 280, x_ticks=ticks,
                y_text=lambda v: f"{v:g}", cls=c,
            )
        ),
        "memory": responsive(
            lambda w, c: line_chart(
                memory_series(r), title="Bytes kept per conversation against context length", x_label="tokens of context",
                y_label="state or KV cache (log scale)", width=w, height=320 if w == WIDE else 280, x_ticks=ticks,
                y_text=lambda v: bytes_text(v).replace(".00", "").replace(".0", ""), log_y=True, cls=c,
            )
        ),
    }  # fmt: skip


def card(title: str, values: dict[str, str], models: dict) -> str:
    lines = "".join(
        f'<div><i class="{STYLE[n]}"></i><b>{escape(values[n])}</b><span>{escape(models[n]["short"])}</span></div>' for n in ORDER
    )
    return f'<div class="card"><h3>{escape(title)}</h3>{lines}</div>'


def disturbance(r: dict) -> str | None:
    """A warning when the rounds of this run disagree: figures of a busy machine are not to be quoted."""
    spreads = [r["first"][n]["total"] for n in ORDER] + [d[n]["step"] for d in r["decode"] for n in ORDER]
    worst = max((s["p80"] - s["p20"]) / s["median"] for s in spreads)
    if worst <= 0.3:
        return None
    load = r["environment"]["load_average"][0]
    return (
        f"Other work shared this machine: rounds differ by up to {worst:.0%} (p20 to p80), load average {load} at the start. "
        "Run it again on a quiet one before quoting a figure."
    )


def findings(r: dict) -> list[str]:
    """What this run shows, in sentences made from its own numbers; the same sentence serves either winner."""
    cobra, llava = (r["models"][n]["short"] for n in ORDER)
    first, second, decode = r["first"], r["second"], r["decode"]
    near, far = decode[0], decode[-1]

    def compared(a: float, b: float, more: str, less: str) -> str:
        """a against b where larger is `more`: "1.4x `more` than", "the same as"."""
        if 0.97 < a / b < 1.03:
            return "the same as"
        return f"{figures(max(a / b, b / a))}x {more if a > b else less} than"

    c, t = first["cobra"]["total"]["median"], first["llava"]["total"]["median"]
    lines = []
    lines.append(
        f"First token of the first question: {seconds_text(c)} for {cobra}, {compared(c, t, 'slower', 'faster')} the {llava} "
        f"({seconds_text(t)}); {r['models']['cobra']['image_tokens']} against {r['models']['llava']['image_tokens']} image tokens."
    )
    c2, t2 = second["cobra"]["total"]["median"], second["llava"]["total"]["median"]
    kept = {n: r["encode"][n]["bytes"] for n in ORDER}
    lines.append(
        f"Second question on the kept image: {seconds_text(c2)} ({figures(c / c2)}x sooner than its first) against "
        f"{seconds_text(t2)}. Keeping the image costs {bytes_text(kept['cobra'])} as a Cobra state and "
        f"{bytes_text(kept['llava'])} as a KV cache."
    )
    a, b = rate(near["cobra"]["step"]), rate(near["llava"]["step"])
    lines.append(
        f"Decode at {context_text(near['context'])} tokens of context: {figures(a)} tokens/s, "
        f"{compared(a, b, 'faster', 'slower')} the {llava} ({figures(b)}). At {context_text(far['context'])}: "
        f"{figures(rate(far['cobra']['step']))} against {figures(rate(far['llava']['step']))}."
    )
    ratio = far["llava"]["bytes"] / far["cobra"]["bytes"]
    lines.append(
        f"Memory of one conversation at {context_text(far['context'])} tokens: {bytes_text(far['cobra']['bytes'])} at any length "
        f"against {bytes_text(far['llava']['bytes'])} and growing: {figures(ratio)}x."
    )
    return lines


def caveats(r: dict) -> list[str]:
    m, s, e = r["models"], r["settings"], r["environment"]
    sizes = " and ".join(f"{m[n]['parameters']['total'] / 1e6:.1f} M" for n in ORDER)
    shared = ", a virtual one whose host others share" if e.get("virtual_machine") else ""
    text = f"""
Both models have random weights. This is speed and memory, not quality: their answers are noise and are not shown. Equal size
means equal parameters ({sizes}), not equal skill.

At short context and batch 1, decoding reads every weight once per token in either architecture: the same bytes, so the same
limit. A difference there is the quality of the code, not of the architecture.

A Transformer can keep an image too, as a KV cache, and here it does. What differs is how large that is and what each further
token costs.

{m["llava"]["label"]}: {m["llava"]["settings"]}.

{m["cobra"]["label"]}: {m["cobra"]["settings"]}.

Decode at a given context starts from a state of that length; the KV cache is filled with random values instead of by a prefill,
which changes no step's time. Each sample is the mean of {s["decode_tokens"]} steps.

Reading and resizing the photo is outside the time to first token (its own row), and so is the tokenizer: the question is
{s["text_tokens"]} fixed token ids.

Batch 1, {s["dtype"]}, {e["threads"]} threads, one machine{shared}, load average {e["load_average"][0]} at the start. Medians of
interleaved rounds with p20 .. p80.
"""
    return [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]


def demo_tables(r: dict) -> dict[str, str]:
    m = r["models"]
    heads = ["", *(m[n]["label"] for n in ORDER)]
    parts = [*STAGES[:2], "language", "total"]
    size = [
        *[[f"parameters, {p}", *(f"{m[n]['parameters'][p] / 1e6:.2f} M" for n in ORDER)] for p in parts],
        ["image", *(f"{m[n]['image_size']} px, {m[n]['image_tokens']} tokens" for n in ORDER)],
        ["decode runs", *(m[n]["decode_mode"] for n in ORDER)],
    ]
    first = [
        *[[stage, *(spread(r["first"][n][stage]) for n in ORDER)] for stage in ("preprocess", *STAGES)],
        ["first token, first question", *(spread(r["first"][n]["total"]) for n in ORDER)],
        ["very first call of the process", *(seconds_text(r["first"][n]["first_call"]) for n in ORDER)],
        ["encode the image once and keep it", *(spread(r["encode"][n]["total"]) for n in ORDER)],
        ["bytes kept for the image", *(bytes_text(r["encode"][n]["bytes"]) for n in ORDER)],
        ["first token, second question", *(spread(r["second"][n]["total"]) for n in ORDER)],
    ]
    decode = [
        [
            context_text(d["context"]),
            *(
                text
                for n in ORDER
                for text in (rate_spread(d[n]["step"]), f"{d[n]['read_fraction']:.0%}", bytes_text(d[n]["bytes"]))
            ),
        ]
        for d in r["decode"]
    ]
    return {
        "size": table(heads, size),
        "first": table(heads, first),
        "decode": table(
            ["at", *("tokens/s", "of roof", "kept") * len(ORDER)],
            decode,
            [("", 1), *((m[n]["short"], 3) for n in ORDER)],
        ),
        "backends": table(["op", "backend", "calls"], [[b["op"], b["backend"], str(b["calls"])] for b in r["backends"]]),
        "roofs": table(
            ["roof measured in this run", "value"],
            [[name, f"{figures(r['roofs'][key])} {unit}"] for key, name, unit in ROOF_ROWS if key in r["roofs"]],
        ),
    }


ROOF_ROWS = (
    ("read_gbps", "memory read, cold", "GB/s"),
    ("copy_gbps", "memory copy, cold", "GB/s"),
    ("matmul_gflops", "fp32 matrix product", "GFLOP/s"),
    ("exp_per_ns", "exponentials, L1-resident", "per ns"),
)


def demo_page(r: dict, photo_jpeg: bytes | None = None) -> str:
    m, e = r["models"], r["environment"]
    plots, tables = demo_plots(r), demo_tables(r)
    far = r["decode"][-1]
    cards = [
        card("First token, first question", {n: seconds_text(r["first"][n]["total"]["median"]) for n in ORDER}, m),
        card("First token, second question", {n: seconds_text(r["second"][n]["total"]["median"]) for n in ORDER}, m),
        card(
            f"Decode, tokens/s at {context_text(far['context'])} context",
            {n: figures(rate(far[n]["step"])) for n in ORDER}, m,
        ),
        card(f"Memory of a {context_text(far['context'])} conversation", {n: bytes_text(far[n]["bytes"]) for n in ORDER}, m),
    ]  # fmt: skip
    photo = ""
    if photo_jpeg:
        data = base64.b64encode(photo_jpeg).decode()
        photo = (
            f'<figure><img alt="the photo of this run" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{escape(r['photo']['credit'])}</figcaption></figure>"
        )
    dirty = " with local changes" if e["dirty"] else ""
    body = f"""<div class="top"><div>
<h1>A photo, two models of one size, this machine</h1>
<p class="lead">{escape(m["cobra"]["label"])} next to a {escape(m["llava"]["label"])} of the same parameter count
({m["cobra"]["parameters"]["total"] / 1e6:.0f} M and {m["llava"]["parameters"]["total"] / 1e6:.0f} M), both with random weights:
a comparison of speed and memory, not of answers.</p>
<p class="soft">{escape(e["device"])}, {e["threads"]} threads, {escape(e["cpu_level"])} · torch {escape(e["torch"])} ·
commit {escape(str(e["commit"]))}{dirty} · {escape(e["date"].replace("T", " ").replace("Z", " UTC"))}</p>
</div>{photo}</div>
{f'<p class="warn">{escape(warning)}</p>' if (warning := disturbance(r)) else ""}
<div class="cards">{"".join(cards)}</div>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in findings(r))}</ul>

<h2>Time to the first token</h2>
<p class="soft">Photo to first answer token, split into vision towers, projector and language-model prefill. The second question
starts from the kept image: no vision, no projector, no image prefill.</p>
{plots["ttft"]}
{tables["first"]}

<h2>Decoding against context length</h2>
<p class="soft">Tokens per second, batch 1. The band is p20 .. p80.</p>
{plots["decode"]}
<h2>Memory of a conversation</h2>
<p class="soft">What must stay in memory besides the weights: a state of one size, or a cache that grows with every token.</p>
{plots["memory"]}
{tables["decode"]}
<p class="soft">Of roof: the time that reading the language model's weights and the state or cache once would take, at the
read bandwidth measured in the same rounds, divided by the time of a step.</p>

<h2>What this does and does not show</h2>
<ul>{"".join(f"<li>{escape(line)}</li>" for line in caveats(r))}</ul>

<h2>The two models</h2>
{tables["size"]}

<h2>What ran where</h2>
<p class="soft">Calls counted inside the implementations of cobra_kernels during the first question and eight decoded tokens.</p>
{tables["backends"]}

<h2>The machine</h2>
{tables["roofs"]}
{environment_table(e)}
<p class="soft">Again: <code>{escape(e["command"])}</code>. All samples: results.json beside this page.</p>"""
    return page("Cobra demo", body)


def demo_pngs(r: dict, folder: Path) -> list[Path]:
    """The three pictures with matplotlib, for slides and READMEs. [] when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    colours = {"s0": "#0b7a70", "s1": "#b4530a"}
    marks = {"s0": "o", "s1": "s"}
    style = {
        "font.size": 12, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#9aa0a6", "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 14,
        "grid.color": "#e3e6e9", "axes.axisbelow": True, "figure.dpi": 150,
    }  # fmt: skip
    e = r["environment"]
    foot = (
        f"{e['device']}, {e['threads']} threads, {r['settings']['dtype']}, batch 1, random weights, "
        f"torch {e['torch']}, commit {e['commit']}{' + local changes' if e['dirty'] else ''}"
    )
    paths = []

    def save(figure, name: str) -> None:
        figure.text(0.01, 0.01, foot, fontsize=8.5, color="#5d636b")
        figure.tight_layout(rect=(0, 0.035, 1, 1))
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
        plt.close(figure)

    def lines(series: Sequence[Series], title: str, y_label: str, name: str, log_y: bool = False) -> None:
        figure, axes = plt.subplots(figsize=(8.6, 4.8))
        for s in series:
            xs, ys = [p[0] for p in s.points], [p[1] for p in s.points]
            axes.plot(xs, ys, color=colours[s.style], marker=marks[s.style], lw=2.2, label=s.label)
            if s.bands:
                axes.fill_between(xs, [b[0] for b in s.bands], [b[1] for b in s.bands], color=colours[s.style], alpha=0.18, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [context_text(x) for x in xs])
        axes.xaxis.set_minor_locator(NullLocator())
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: bytes_text(v).replace(".00", "").replace(".0", "")))
        else:
            axes.set_ylim(0, max(b for s in series for band in s.bands for b in band) * 1.15)
        axes.set(title=title, xlabel="tokens of context", ylabel=y_label)
        axes.grid(axis="y")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.01, 1.0), ncols=len(series))
        save(figure, name)

    with plt.rc_context(style):
        lines(decode_series(r), "Decode speed against context length", "tokens per second", "decode")
        lines(memory_series(r), "Memory of a conversation", "state or KV cache", "memory", log_y=True)
        bars = ttft_bars(r)
        figure, axes = plt.subplots(figsize=(8.6, 4.4))
        longest = max(sum(v for _, v, _ in bar.segments) for bar in bars)
        for row, bar in enumerate(reversed(bars)):
            x = 0.0
            for label, value, cls in bar.segments:
                series, part = cls.split()
                axes.barh(row, value, left=x, height=0.62, color=colours[series], alpha={"a": 1.0, "b": 0.58, "c": 0.8}[part])
                if value / longest > 0.02 + 0.0175 * len(label):  # it fits
                    axes.text(x + 0.012 * longest, row, label, va="center", color="white", fontsize=10.5, fontweight="bold")
                x += value
            axes.text(x + 0.012 * longest, row, bar.end, va="center", fontweight="bold")
        axes.set_yticks(range(len(bars)), [bar.label.replace(", ", ",\n", 1) for bar in reversed(bars)])
        axes.set_xlim(0, longest * 1.16)
        axes.set(title="Time to the first token", xlabel="seconds")
        axes.grid(axis="x")
        save(figure, "ttft")
    return paths


# --- records ----------------------------------------------------------------------------------------------------------

RECORD_HEADS = ["mode", "dtype", "shape", "provider", "median", "p20 .. p80", "GB/s", "of roof", "cache", "date", "commit"]


def record_row(r: store.Record) -> list[str]:
    e = r.environment
    return [
        r.mode, r.dtype, r.title, r.provider, seconds_text(r.median),
        f"{seconds_text(r.p20)} .. {seconds_text(r.p80)}", figures(r.gbps) if r.bytes else "-",
        f"{r.fraction:.0%} {r.roof}" if r.fraction is not None else "-", r.cache, e["date"][:10],
        f"{e['commit']}{'+' if e['dirty'] else ''}",
    ]  # fmt: skip


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables of the last record of every case.")
    p.add_argument("--results", type=Path, default=store.RESULTS, help="folder of <device>/<op>.jsonl")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="folder of report.html (default: out/bench)")
    args = p.parse_args(argv)
    sections = []
    for device in sorted(path for path in args.results.glob("*") if path.is_dir()):
        for path in sorted(device.glob("*.jsonl")):
            last = list(store.latest(store.load(path)).values())
            rows = [record_row(r) for r in last]
            print(f"\n### {path.stem}, {device.name}\n\n{markdown(RECORD_HEADS, rows)}")
            sections.append(f"<h2>{escape(path.stem)}</h2><p class=soft>{escape(device.name)}</p>{table(RECORD_HEADS, rows)}")
    if not sections:
        print("no records yet: make bench")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "report.html"
    file.write_text(page("Benchmark records", "<h1>Benchmark records</h1>" + "\n".join(sections)))
    print(f"\npage: {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
