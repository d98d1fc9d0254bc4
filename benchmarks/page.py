"""What every page of the benchmarks is made of: style, frame, tables, plots at two widths.

A page is one file that loads nothing: style, pictures and (where a table can be sorted) a small script are inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape

WIDE, NARROW = 860, 340  # drawing widths; the page picks one
Cell = str | tuple[str, float | None]  # text, or text with the number that it is sorted by

CSS = """
:root { color-scheme: light dark; --bg: #fbfbfa; --fg: #1c1e21; --soft: #5d636b; --line: #dfe2e6; --card: #ffffff;
  --s0: #0b7a70; --s1: #b4530a; --s2: #4f55c9; --s3: #a8326b; --s4: #4d6b10; --s5: #7a5a2f; --ink: #ffffff; --a2: .58; --a3: .8; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e8eaed; --soft: #a0a8b1; --line: #2e343b; --card: #1b1f24;
  --s0: #2cc4b3; --s1: #f0964a; --s2: #9aa0ff; --s3: #f07db2; --s4: #a8cf57; --s5: #d4ae7a; --ink: #101315; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 900px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; } h3.plot { font-size: .95rem; margin: 1.4rem 0 0; }
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
i.s0 { background: var(--s0); } i.s1 { background: var(--s1); } i.s2 { background: var(--s2); } i.s3 { background: var(--s3); }
i.s4 { background: var(--s4); } i.s5 { background: var(--s5); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .85rem; margin: 10px 0 -4px; }
.legend span { display: flex; align-items: center; gap: 6px; } .legend i { width: 18px; height: 3px; border-radius: 2px; flex: none; }
.legend i.dashed { background: repeating-linear-gradient(90deg, var(--soft) 0 5px, transparent 5px 8px); }
figure.plot { margin: 14px 0 6px; } svg { width: 100%; height: auto; display: block; overflow: visible; } svg.narrow { display: none; }
svg text { font-size: 13px; fill: var(--fg); font-family: inherit; } svg .tick { font-size: 12px; fill: var(--soft); }
svg .axis { font-size: 12.5px; fill: var(--soft); } svg .name, svg .value { font-weight: 600; } svg .value { font-size: 14px; }
svg .s0 { color: var(--s0); } svg .s1 { color: var(--s1); } svg .s2 { color: var(--s2); } svg .s3 { color: var(--s3); }
svg .s4 { color: var(--s4); } svg .s5 { color: var(--s5); }
svg .name[class*=" s"], svg .mark, svg .bar, svg .band { fill: currentColor; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke: currentColor; stroke-width: 2.5; } svg .band { opacity: .18; }
svg .line.soft { stroke-width: 1.4; opacity: .65; } svg .mark.soft { fill: var(--bg); stroke: currentColor; stroke-width: 1.6; } svg .limit { fill: none; stroke: currentColor; stroke-width: 2; stroke-dasharray: 6 4; } svg .bar ~ .limit { color: var(--fg); }
svg .bar.b { opacity: var(--a2); } svg .bar.c { opacity: var(--a3); } svg .inbar { font-size: 12px; fill: var(--ink); font-weight: 600; }
.warn { border-left: 3px solid var(--s1); padding: 6px 12px; background: var(--card); margin-top: 16px; }
.scroll { overflow-x: auto; margin: 10px 0; } table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
th[aria-sort="ascending"] button::after { content: " \\2191"; } th[aria-sort="descending"] button::after { content: " \\2193"; }
td small { font-size: .86em; } .groups th { text-align: center; border-bottom: 0; color: var(--fg); padding-bottom: 0; }
td.wrap { white-space: normal; text-align: left; overflow-wrap: anywhere; } ul { padding-left: 1.15rem; } li { margin: .35rem 0; }
li, p { overflow-wrap: anywhere; } details { margin: .6rem 0; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); } code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88em; }
@media (max-width: 640px) { main { padding: 20px 16px 40px; } h1 { font-size: 1.4rem; } .top { grid-template-columns: 1fr; gap: 14px; }
  .top figure { order: -1; } .top img { max-height: 230px; object-fit: cover; object-position: 50% 12%; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; } .card { padding: 10px 11px; } .card b { font-size: 1.05rem; }
  .card div { gap: 5px; } .card span { font-size: .68rem; } td small { display: block; white-space: nowrap; }
  svg.narrow { display: block; } svg.wide { display: none; } th, td { padding: 6px 3px; white-space: normal; } table { font-size: .8rem; }
  .sortable th, .sortable td { padding: 6px 8px 6px 0; white-space: nowrap; } }
"""

# A click on a heading sorts by its column, a second one the other way round; rows without a value stay last.
SORT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const th = button.closest("th"), body = th.closest("table").tBodies[0], column = th.cellIndex;
  const up = th.getAttribute("aria-sort") !== "ascending";
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
  body.append(...[...body.rows].sort((first, second) => {
    const a = key(first), b = key(second);
    return a === "" || b === "" ? (a === "") - (b === "") : (up ? 1 : -1) * order(a, b);
  }));
};
"""


def page(title: str, body: str, script: str = "") -> str:
    script = f"<script>{script}</script>\n" if script else ""
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
{script}</body>
</html>
"""


def cell(text: str) -> str:
    """Escaped, with a spread in brackets set small so that a phone can break the line before it."""
    value, bracket, rest = escape(text).partition(" (")
    return f"{value} <small>({rest}</small>" if bracket and rest[:1].isdigit() else escape(text)


def table(heads: Sequence[str], rows: Sequence[Sequence[Cell]], groups: Sequence[tuple[str, int]] = (), sortable: bool = False) -> str:
    """groups: (text, columns) of a row above the heads. A sortable table needs the script SORT on its page."""

    def data(item: Cell) -> str:
        if isinstance(item, str):
            return f"<td>{cell(item)}</td>"
        text, value = item
        return f'<td data-sort="{"" if value is None else f"{value:.9g}"}">{cell(text)}</td>'

    above = "".join(f'<th colspan="{columns}">{escape(text)}</th>' for text, columns in groups)
    above = f'<tr class="groups">{above}</tr>' if groups else ""
    button = ('<button type="button">', "</button>") if sortable else ("", "")
    head = "".join(f'<th scope="col">{button[0]}{escape(h)}{button[1]}</th>' for h in heads)
    lines = "\n".join("<tr>" + "".join(map(data, row)) + "</tr>" for row in rows)
    opened = '<table class="sortable">' if sortable else "<table>"
    return f'<div class="scroll">{opened}\n<thead>{above}<tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'


def responsive(draw: Callable[[float, str], str]) -> str:
    """draw(width, class) at both widths; the style sheet shows one of them."""
    return f'<figure class="plot">{draw(WIDE, "wide")}\n{draw(NARROW, "narrow")}</figure>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(label, class): a series' class s0 .. s5, "dashed", or "" for words alone."""
    keys = [(f'<i class="{cls}"></i>' if cls else "") + escape(label) for label, cls in entries]
    return '<div class="legend">' + "".join(f"<span>{key}</span>" for key in keys) + "</div>"


def environment_table(environment: dict) -> str:
    rows = []
    for key, value in environment.items():
        if value in (None, "", {}, []):
            continue
        text = json.dumps(value) if isinstance(value, (dict, list)) else str(value)
        rows.append(f"<tr><td>{escape(key.replace('_', ' '))}</td><td class=wrap>{escape(text)}</td></tr>")
    return '<div class="scroll"><table><tbody>' + "\n".join(rows) + "</tbody></table></div>"
