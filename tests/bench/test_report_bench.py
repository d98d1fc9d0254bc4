"""The report of `cobra bench` from results made by hand: schema, CSV, PNG, the page's structure, and the page in a browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html import escape, unescape
from xml.etree import ElementTree

import fastjsonschema
import pytest

from benchmarks import page, svg
from benchmarks.harness.environment import ROOT
from benchmarks.suite import compare, report, results
from tests.bench.runs import a_run
from tests.test_demo_report import Checker

SCHEMA = json.loads((ROOT / "benchmarks/suite/results.schema.json").read_text())
validate = fastjsonschema.compile(SCHEMA)


@pytest.fixture(scope="module")
def html() -> str:
    new, old = a_run("after", slower=1.1), a_run("before")
    return report.html(new, old, compare.pairs(new, old))


def pictures(html: str, title: str) -> list[ElementTree.Element]:
    """The wide and the narrow drawing of a plot."""
    part = html.split(f'<h3 class="plot">{title}</h3>')[1].split("</figure>")[0]
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", part, re.DOTALL)]


def classes(root: ElementTree.Element, tag: str) -> list[str]:
    return [node.get("class") for node in root.iter(f"{{http://www.w3.org/2000/svg}}{tag}")]


# --- files --------------------------------------------------------------------------------------------------------------


def test_what_is_written_follows_the_schema(tmp_path):
    paths = report.write(a_run(), tmp_path)
    assert [p.name for p in paths[:3]] == ["report.html", "results.json", "results.csv"]
    found = json.loads((tmp_path / "results.json").read_text())
    validate(found)
    assert found == a_run()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r["cases"][0]["results"][0].pop("limit_seconds"),
        lambda r: r["cases"][0]["results"][0].update(status="measured"),
        lambda r: r["cases"][0].update(extra=1),
        lambda r: r["cases"][-1]["results"][0]["record"].update(median=0),
        lambda r: r["identity"].pop("source"),
    ],
)
def test_the_schema_refuses_what_is_none(spoil):
    run = a_run()
    spoil(run)
    with pytest.raises(fastjsonschema.JsonSchemaValueException):
        validate(run)


def test_every_field_of_the_json_is_in_the_documentation():
    text = (ROOT / "docs/benchmarks.md").read_text()
    for name in ("case", "result"):
        for key in SCHEMA["definitions"][name]["properties"]:
            assert f"`{key}`" in text, f"docs/benchmarks.md does not name {name}.{key}"


def test_csv_has_a_line_per_entry(tmp_path):
    results.write_csv(a_run(), tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(rows) == len(results.results_of(a_run())) == 13
    first = next(r for r in rows if r["parameters"] == "batch=1 context=256" and r["entry"] == "ours")
    assert float(first["median"]) == pytest.approx(0.004) and float(first["limit_seconds"]) == pytest.approx(0.001)
    assert float(first["rate"]) == pytest.approx(250) and first["joules"] == "" and float(first["fraction"]) == pytest.approx(0.25)
    assert next(r for r in rows if r["status"] == "not run")["median"] == ""


def test_png_of_every_plot(tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.pngs(a_run(), tmp_path)
    assert [p.name for p in paths] == ["step-call.png", "wide-call.png"] and all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


# --- the page -----------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_loads_nothing(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == [] and checker.loads == [] and checker.tags.count("script") == 1
    assert "url(" not in html and "@import" not in html and "fetch(" not in html
    assert set(re.findall(r"https?://[^\s\"'<]*", html)) <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html and "prefers-color-scheme: dark" in html
    assert "Some &lt;CPU&gt; &amp; more" in html and "<CPU>" not in html and "peer <1>" not in html


def test_each_side_has_its_limit_drawn_as_a_line(html):
    for root in pictures(html, "step: call"):
        lines = classes(root, "polyline")
        assert lines.count("limit s0") == lines.count("limit s1") == 1
        assert lines.count("line s0") == lines.count("line s1") == lines.count("line s1 soft") == 1
        assert classes(root, "rect") == ["mark s1"] * 2 + ["mark soft s1"] * 2
        _, _, width, height = map(float, root.get("viewBox").split())
        for node in root.iter():
            for x, y in (p.split(",") for p in (node.get("points") or "").split()):
                assert 0 <= float(x) <= width and 0 <= float(y) <= height
    for root in pictures(html, "wide: call"):
        assert classes(root, "line").count("limit") == 3


def test_a_limit_reaches_where_nothing_ran():
    [plot] = report.plots_of(a_run(), "step")
    rows, limits = next((rows, limits) for _, entry, rows, limits in plot.lines() if entry == "peer <1>")
    assert [r["parameters"]["context"] for r in rows] == [256, 2048] and len(limits) == 3


def test_bars_of_tokens_are_rates_and_others_seconds():
    run = a_run()
    run["cases"] = [case for case in run["cases"] if case["id"] in ("step/call/batch=1,context=256", "wide/call/batch=1")]
    [step], [wide] = report.plots_of(run, "step"), report.plots_of(run, "wide")
    assert step.x is None and step.rate and "250 tokens/s, 25% of limit" in report.svg(step)
    assert "longer bars are better" in report.svg(step)
    assert not wide.rate and "10.0 ms, 10% of limit" in report.svg(wide)
    assert report.numbers_text({"state_bytes": 3_000_000, "sequences": 1300}) == "state 3.00 MB, sequences 1300"


def test_page_says_what_did_not_run_and_what_is_doubtful(html):
    text = unescape(re.sub(r"<[^>]*>", "", html))
    assert "4 of 5 cases" not in text and "crash/call/batch=1: crashed (ended by SIGSEGV)" in text
    assert "as users run it: not run: needs 40.0 GB of memory, 8.00 GB are free" in text
    assert "1 of 12 blocks far above the median" in text and "Random weights everywhere" in text
    assert "1.10x (1.06–1.14)" in text and "too few rounds" in text


def test_a_run_that_has_just_begun_has_a_page():
    run = {**a_run(), "cases": []}
    assert "0 of 5 cases of the preset so far" in report.html(run)


def test_sortable_cells_carry_numbers():
    html = page.table(["a", "b"], [["x", ("1.5 ms", 0.0015)], ["y", ("-", None)]], sortable=True)
    assert '<td data-sort="0.0015">1.5 ms</td>' in html and '<td data-sort="">-</td>' in html and html.count('<button type="button">') == 2


def test_drawings_of_one_point_and_of_a_power_of_ten():
    one = [svg.Series("only", [(10, 10.0)]), svg.Series("limit", [(10, 10.0)], style="s1", limit=True)]
    chart = {"title": "t", "x_label": "x", "y_label": "y", "width": 300, "x_ticks": [(10, "10")], "y_text": str, "log_y": True}
    root = ElementTree.fromstring(svg.line_chart(one, **chart, names=False))
    points = next(n.get("points") for n in root.iter() if n.get("class") == "limit s1").split()
    assert len(points) == 2 and points[0] != points[1]
    assert svg.log_ticks(10, 10) == [10, 100]
    bar = svg.stacked_bars([svg.Bar("b", [("", 1.0, "s0")], "1 s", limit=2.0)], title="t", width=300)
    line = next(n for n in ElementTree.fromstring(bar).iter() if n.get("class") == "limit")
    assert float(line.get("x1")) <= 300


# --- in a browser -------------------------------------------------------------------------------------------------------

# The report in a frame as wide as a phone, then as a desktop; what is seen there is left in <pre>. A frame of its own text is of
# the same origin, so it may be looked into.
PROBE = """<!doctype html><iframe id="frame" style="width:360px;height:800px;border:0" srcdoc="{report}"></iframe><pre></pre><script>
const frame = document.getElementById("frame"), seen = {{}};
const settle = () => new Promise(done => setTimeout(done, 100));
frame.onload = async () => {{
  const inner = frame.contentDocument, view = frame.contentWindow;
  for (const width of [360, 1000]) {{
    frame.style.width = width + "px";
    await settle();
    const root = inner.documentElement, shown = s => [...inner.querySelectorAll(s)].filter(n => n.getClientRects().length > 0);
    seen[width] = {{
      page: root.scrollWidth, window: root.clientWidth, narrow: shown("svg.narrow").length, wide: shown("svg.wide").length,
      limits: shown("svg .limit").filter(n => view.getComputedStyle(n).strokeDasharray !== "none").length,
    }};
  }}
  seen.background = view.getComputedStyle(inner.body).backgroundColor;
  const table = [...inner.querySelectorAll("table.sortable")].find(t => t.tBodies[0].rows.length === 9);
  const column = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === "median");
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  const order = () => [...table.tBodies[0].rows].map(r => r.cells[column].dataset.sort);
  button.click();
  seen.up = order();
  seen.aria = table.tHead.rows[0].cells[column].getAttribute("aria-sort");
  button.click();
  seen.down = order();
  document.querySelector("pre").textContent = JSON.stringify(seen);
}};
</script>"""


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    return found or pytest.skip("no chromium or chrome on this machine; the structural tests above stand alone")


def look(path, *flags: str) -> dict:
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--virtual-time-budget=5000", *flags]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    text = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert text and text[1], done.stderr[-2000:]
    return json.loads(unescape(text[1]))


def test_in_a_browser_on_a_phone_and_a_desktop_light_and_dark(tmp_path, html):
    path = tmp_path / "probe.html"
    path.write_text(PROBE.format(report=escape(html, quote=True)))
    seen, dark = look(path), look(path, "--blink-settings=preferredColorScheme=0")
    for width, shown, hidden in (("360", "narrow", "wide"), ("1000", "wide", "narrow")):
        assert seen[width]["page"] <= seen[width]["window"], f"the page is wider than a window of {width} pixels"
        assert seen[width][shown] == 2 and seen[width][hidden] == 0 and seen[width]["limits"] == 5
    assert seen["background"] == "rgb(251, 251, 250)" and dark["background"] == "rgb(20, 23, 26)"
    known = [float(v) for v in seen["up"] if v]
    assert known == sorted(known) and len(known) == 7 and seen["up"][7:] == ["", ""] and seen["aria"] == "ascending"
    assert [float(v) for v in seen["down"] if v] == known[::-1] and seen["down"][7:] == ["", ""]
