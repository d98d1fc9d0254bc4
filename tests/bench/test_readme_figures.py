"""Every figure of speed in a page comes from a record, by `python -m benchmarks.readme`, or says what else it is."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import readme
from benchmarks.harness import records as store

PAGES = readme.pages()
NAME = {p: str(p.relative_to(readme.ROOT)) for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=NAME.values())
def test_page_is_up_to_date_and_every_figure_is_traced(page, capsys):
    assert readme.main(["--check", str(page)]) == 0, capsys.readouterr().out


def test_the_readme_and_every_room_have_tables():
    assert {m["name"] for m in readme.BLOCK.finditer((readme.ROOT / "README.md").read_text())} == {"cpu", "gpu"}
    for page in PAGES:
        text = page.read_text()
        begun, ended = (len(re.findall(f"^{mark}", text, re.MULTILINE)) for mark in ("<!-- figures:", readme.END))
        assert len(readme.BLOCK.findall(text)) == begun == ended, f"{NAME[page]}: a marker that nothing fills"


@pytest.fixture
def results(tmp_path):
    """A copy of one device's records of one op, to tamper with."""
    (source,) = {m["device"] for m in readme.BLOCK.finditer((readme.ROOT / "README.md").read_text()) if m["name"] == "cpu"}
    folder = tmp_path / "results" / source
    folder.mkdir(parents=True)
    (folder / "rms_norm.jsonl").write_text((store.RESULTS / source / "rms_norm.jsonl").read_text())
    return folder


def with_last(path, **changes):
    """Appends the last run again, later and changed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    run = [line for line in lines if line["environment"]["date"] == lines[-1]["environment"]["date"]]
    for line in run:
        line["environment"]["date"] = "2999-01-01T00:00:00Z"
        line.update(changes)
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *run]))


def row(text: str, what: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {what}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_follows_the_last_run(results):
    page = f"before\n<!-- figures: cpu {results.name} -->\nold\n<!-- end of figures -->\nafter 1\n"
    first = readme.rendered(page, results.parent)
    assert first.startswith("before\n") and first.endswith("after 1\n") and "\nold\n" not in first
    assert readme.rendered(first, results.parent) == first
    with_last(results / "rms_norm.jsonl", median=0.0123, fraction=0.5, note="")
    second = readme.rendered(first, results.parent)
    cells = row(second, "RMSNorm")
    assert cells[1:3] == ["12.3 ms", "50% of copy"] and "torch 12.3 ms" in cells[3] and "2999-01-01" in second
    assert row(second, "scan, D=5120")[1] == "not measured"


def test_peers_come_from_the_same_run(results):
    """A later run of ours alone does not stand next to the peers of an earlier one: the last run that has them all counts."""
    path = results / "rms_norm.jsonl"
    page = f"<!-- figures: cpu {results.name} -->\n<!-- end of figures -->\n"
    whole = row(readme.rendered(page, results.parent), "RMSNorm")
    mine = [json.loads(line) for line in path.read_text().splitlines() if '"provider": "cpu"' in line][-1]
    mine["environment"]["date"] = "2999-01-01T00:00:00Z"
    case = {"mode": "fwd", "dtype": "fp32", "shape": "cobra-3b-image"}
    path.write_text(path.read_text() + json.dumps({**mine, **case, "median": 1e-9, "note": ""}) + "\n")
    assert row(readme.rendered(page, results.parent), "RMSNorm") == whole
    path.write_text(json.dumps({**mine, **case, "median": 1e-9, "note": ""}) + "\n")
    assert row(readme.rendered(page, results.parent), "RMSNorm")[1:4:2] == ["1.00 ns", ""]


def test_a_room_gives_ratios_of_one_run(results):
    page = f"<!-- figures: room rms_norm {results.name} -->\n<!-- end of figures -->\n"
    with_last(results / "rms_norm.jsonl", median=0.002)
    lines = [line for line in readme.rendered(page, results.parent).splitlines() if line.startswith("| fwd")]
    ratios = [re.findall(r"[\d.]+x(?= )", line) for line in lines]
    assert len(lines) == 8 and all("2.00 ms" in line for line in lines)
    assert all(len(r) >= 3 and set(r) == {"1.00x"} for r in ratios), ratios


def test_a_device_without_records_has_no_figures(tmp_path):
    page = "<!-- figures: gpu nvidia-none -->\nx\n<!-- end of figures -->\n"
    assert "there is no record of one" in readme.rendered(page, tmp_path)
    assert "Not measured" in readme.rendered(page.replace("gpu", "room rms_norm"), tmp_path)


LOOSE = [
    ("It takes 5.4 ms.", "5.4 ms"),
    ("A copy runs at 33 GB/s here.", "33 GB/s"),
    ("The kernel is 3.1x faster.", "3.1x"),
    ("It is 2.0 times faster than torch.", "2.0 times"),
    ("It reaches 82% of the copy.", "82% of the copy"),
    ("| a | 12 us |\n|---|---|", "12 us"),
    ("Estimates follow.\n\nIt takes 5.4 ms.", "5.4 ms"),
    ("## Estimate\n\nIt would.\n\n## Measured\n\n- a: 20 tokens/s", "20 tokens/s"),
    ("<!-- figures: cpu x -->\n1 ms\n<!-- end of figures -->\nand 7 ms", "7 ms"),
]
SAID = [
    "An estimate: it takes 5.4 ms.",
    "## Floor and estimate\n\nIt takes 5.4 ms.\n\n| a | 12 us |\n|---|---|",
    "Notes of the development, not records:\n\n| a | 12 us |\n|---|---|\n- and 3 ms",
    "At most 15 us, under 60 s.",
    "Goal: 60 us.",
    "torch 2.x, 27 x 27 patches, m64n256k16, 27x27, sm_90a, 16 GB, 95% must be killed.",
    "```sh\nsleep 5 s  # 5 ms\n```",
    "`5 ms` is code.",
    "<!-- figures: cpu x -->\nIt takes 5 ms.\n<!-- end of figures -->",
]


@pytest.mark.parametrize("text, figure", LOOSE)
def test_a_figure_without_a_record_is_found(text, figure):
    assert [loose.figure for loose in readme.untraced(text)] == [figure]


@pytest.mark.parametrize("text", SAID)
def test_what_says_that_it_is_no_record_passes(text):
    assert readme.untraced(text) == []


def test_check_writes_nothing_and_says_what_to_do(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- figures: gpu nvidia-none -->\nold\n<!-- end of figures -->\nIt takes 5 ms.\n")
    before = page.read_text()
    assert readme.main(["--check", str(page)]) == 1 and page.read_text() == before
    out = capsys.readouterr().out
    assert "out of date: python -m benchmarks.readme" in out and re.search(r"page\.md:4: '5 ms' has no record", out)
    assert readme.main([str(page)]) == 1 and "there is no record of one" in page.read_text()
