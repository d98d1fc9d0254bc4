"""From results to things people read: the demo's page and pictures, and tables and bars of the records.

    python -m benchmarks.report            Markdown tables of the last records of every device, and out/bench/report.html

A page is one file: style, pictures and photo are inside, there is no script and no link to anywhere."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.harness import records as store
from benchmarks.harness.environment import ROOT
from benchmarks.harness.table import bytes_text, figures, seconds_text
from benchmarks.svg import Bar, Series, line_chart, stacked_bars

WIDE, NARROW = 860, 340  # drawing widths; the page picks one
ORDER = ("cobra", "llava")
STYLE = {"cobra": "s0", "llava": "s1"}
STAGES = ("vision", "projector", "prefill")

CSS = """
:root { color-scheme: light dark; --bg: #fbfbfa; --fg: #1c1e21; --soft: #5d636b; --line: #dfe2e6; --card: #ffffff;
  --s0: #0b7a70; --s1: #b4530a; --ink: #ffffff; --a2: .58; --a3: .8; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e8eaed; --soft: #a0a8b1; --line: #2e343b; --card: #1b1f24;
  --s0: #2cc4b3; --s1: #f0964a; --ink: #101315; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; }
p { margin: .4rem 0 .8rem; } .soft, figcaption, small { color: var(--soft); } .lead { font-size: 1.05rem; }
.top { display: grid; grid-template-columns: 1fr 220px; gap: 24px; align-items: start; }
.top img { width: 100%; border-radius: 10px; display: block; } .top figure { margin: 0; }
.top figcaption { font-size: .8rem; margin-top: 6px; }
.cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 12px; margin: 24px 0 8px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 14px 12px; }
.card h3 { margin: 0 0 8px; font-size: .82rem; font-weight: 600; color: var(--soft); line-height: 1.3; min-height: 2.6em; }
.card div { display: flex; align-items: baseline; gap: 8px; font-variant-numeric: tabular-nums; }
.card b { font-size: 1.3rem; font-weight: 650; white-space: nowrap; } .card span { font-size: .8rem; color: var(--soft); }
.card i { width: 10px; height: 10px; border-radius: 50%; flex: none; } .card i.s1 { border-radius: 2px; }
i.s0 { background: var(--s0); } i.s1 { background: var(--s1); }
figure.plot { margin: 14px 0 6px; } svg { width: 100%; height: auto; display: block; overflow: visible; } svg.narrow { display: none; }
svg text { font-size: 13px; fill: var(--fg); font-family: inherit; } svg .tick { font-size: 12px; fill: var(--soft); }
svg .axis { font-size: 12.5px; fill: var(--soft); } svg .name, svg .value { font-weight: 600; } svg .value { font-size: 14px; }
svg .name.s0 { fill: var(--s0); } svg .name.s1 { fill: var(--s1); } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2.5; } svg .line.s0 { stroke: var(--s0); } svg .line.s1 { stroke: var(--s1); }
svg .mark.s0, svg .bar.s0 { fill: var(--s0); } svg .mark.s1, svg .bar.s1 { fill: var(--s1); }
svg .band.s0 { fill: var(--s0); opacity: .18; } svg .band.s1 { fill: var(--s1); opacity: .18; }
svg .bar.b { opacity: var(--a2); } svg .bar.c { opacity: var(--a3); } svg .inbar { font-size: 12px; fill: var(--ink); font-weight: 600; }
.warn { border-left: 3px solid var(--s1); padding: 6px 12px; background: var(--card); margin-top: 16px; } .scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { font-size: .86em; } .groups th { text-align: center; border-bottom: 0; color: var(--fg); padding-bottom: 0; }
td.wrap { white-space: normal; text-align: left; overflow-wrap: anywhere; } ul { padding-left: 1.15rem; } li { margin: .35rem 0; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88em; }
@media (max-width: 640px) { main { padding: 20px 16px 40px; } h1 { font-size: 1.4rem; } .top { grid-template-columns: 1fr; gap: 14px; }
  .top figure { order: -1; } .top img { max-height: 230px; object-fit: cover; object-position: 50% 12%; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; } .card { padding: 10px 11px; } .card b { font-size: 1.05rem; }
  .card div { gap: 5px; } .card span { font-size: .68rem; } td small { display: block; white-space: nowrap; }
  svg.narrow { display: block; } svg.wide { display: none; } th, td { padding: 6px 3px; white-space: normal; } table { font-size: .8rem; } }
"""


def page(title: str, body: str) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def cell(text: str) -> str:
    """Escaped, with a spread in brackets set small so that a phone can break the line before it."""
    value, bracket, rest = escape(text).partition(" (")
    return f"{value} <small>({rest}</small>" if bracket and rest[:1].isdigit() else escape(text)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], groups: Sequence[tuple[str, int]] = ()) -> str:
    """groups: (text, columns) of a row above the heads."""
    above = "".join(f'<th colspan="{columns}">{escape(text)}</th>' for text, columns in groups)
    above = f'<tr class="groups">{above}</tr>' if groups else ""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    lines = "\n".join("<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead>{above}<tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def responsive(draw) -> str:
    """draw(width, class) at both widths; the style sheet shows one of them."""
    return f'<figure class="plot">{draw(WIDE, "wide")}\n{draw(NARROW, "narrow")}</figure>'


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


def environment_table(environment: dict) -> str:
    rows = []
    for key, value in environment.items():
        if value in (None, "", {}, []):
            continue
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        rows.append(f"<tr><td>{escape(key.replace('_', ' '))}</td><td class=wrap>{escape(text)}</td></tr>")
    return '<div class="scroll"><table><tbody>' + "\n".join(rows) + "</tbody></table></div>"


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
