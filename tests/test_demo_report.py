"""The demo's page from a small canned results.json: well-formed, self-contained, and its sentences follow its numbers."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import report, svg
from benchmarks.baselines.llava import Llava
from benchmarks.model import demo


def spread(median: float) -> dict:
    return {"median": median, "p20": 0.95 * median, "p80": 1.1 * median, "samples": [median] * 7}


CANNED = {
    "schema": 1,
    "environment": {
        "commit": "0123456789ab", "dirty": True, "date": "2026-01-02T03:04:05Z", "command": "python -m benchmarks.model.demo",
        "device": "Some <CPU> & more", "cpu": "Some <CPU>", "cores": 2, "threads": 2, "cpu_level": "avx2", "torch": "2.13.0",
        "load_average": [0.1, 0.1, 0.1], "virtual_machine": True, "governor": None,
    },
    "photo": {"file": "photo.jpg", "credit": "A photo, public domain", "size": [640, 480]},
    "settings": {"text_tokens": 32, "contexts": [1024, 4096], "decode_tokens": 8, "dtype": "fp32"},
    "roofs": {"read_gbps": 30.0, "matmul_gflops": 150.0},
    "models": {
        name: {
            "short": short, "label": label, "settings": "as shipped", "decode_mode": "eager", "image_tokens": tokens,
            "image_size": 384,
            "parameters": {"vision": 40e6, "projector": 5e6, "language": 130e6, "total": total},
        }
        for name, short, label, tokens, total in (
            ("cobra", "Cobra", "cobra-laptop", 729, 175e6), ("llava", "Transformer", "LLaVA-shaped Transformer", 576, 174e6),
        )
    },
    "backends": [{"op": "rms_norm", "backend": "cpu", "calls": 49}],
    "first": {
        name: {
            "preprocess": spread(0.02), "vision": spread(0.4), "projector": spread(0.01), "prefill": spread(prefill),
            "total": spread(0.41 + prefill), "first_call": 3.0,
        }
        for name, prefill in (("cobra", 0.9), ("llava", 0.7))
    },
    "encode": {"cobra": {"total": spread(1.2), "bytes": 3_000_000}, "llava": {"total": spread(1.0), "bytes": 45_000_000}},
    "second": {"cobra": {"total": spread(0.05)}, "llava": {"total": spread(0.06)}},
    "decode": [
        {
            "context": context,
            "cobra": {"step": spread(0.03), "bytes": 3_000_000, "read_fraction": 0.5},
            "llava": {"step": spread(0.03 + context * 1e-5), "bytes": context * 73_728, "read_fraction": 0.4},
        }
        for context in (1024, 4096)
    ],
}  # fmt: skip

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Checker(HTMLParser):
    """Balanced tags, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()


@pytest.fixture(scope="module")
def html() -> str:
    return report.demo_page(CANNED, photo_jpeg=b"\xff\xd8\xff jpeg bytes")


def test_page_is_well_formed(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert checker.tags.count("svg") == 6 and "script" not in checker.tags


def test_page_is_self_contained_and_good_on_a_phone(html):
    checker = Checker()
    checker.feed(html)
    assert checker.loads and all(v.startswith("data:image/jpeg;base64,") for v in checker.loads)
    assert "url(" not in html and "@import" not in html
    assert set(re.findall(r"https?://[^\s\"'<]*", html)) <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html and "max-width: 640px" in html


def test_page_escapes_what_it_shows(html):
    assert "Some &lt;CPU&gt; &amp; more" in html and "<CPU>" not in html
    assert "<td>&lt;b&gt; <small>(1)</small></td>" in report.table(["a"], [["<b> (1)"]])


def test_every_picture_is_valid_xml(html):
    for picture in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        root = ElementTree.fromstring(picture)
        _, _, width, height = map(float, root.get("viewBox").split())
        for node in root.iter():
            for key in ("x", "cx", "x1", "x2"):
                assert node.get(key) is None or -1 <= float(node.get(key)) <= width + 1
            for key in ("y", "cy", "y1", "y2"):
                assert node.get(key) is None or -1 <= float(node.get(key)) <= height + 1


def test_page_says_what_it_does_not_show(html):
    for words in ("random weights", "not quality", "same limit", "A Transformer can keep an image too", "175.0 M and 174.0 M"):
        assert words in html


def test_sentences_follow_the_numbers():
    first, second, decode, memory = report.findings(CANNED)
    assert "1.31 s for Cobra, 1.18x slower than the Transformer (1.11 s); 729 against 576 image tokens" in first
    assert "50.0 ms (26.2x sooner than its first) against 60.0 ms" in second and "3.00 MB" in second and "45.0 MB" in second
    assert "33.3 tokens/s, 1.34x faster than" in decode
    assert "302 MB and growing: 101x" in memory
    swapped = copy.deepcopy(CANNED)
    swapped["first"]["cobra"], swapped["first"]["llava"] = swapped["first"]["llava"], swapped["first"]["cobra"]
    assert "1.18x faster than" in report.findings(swapped)[0]
    swapped["first"]["llava"] = swapped["first"]["cobra"]
    assert "the same as the Transformer" in report.findings(swapped)[0]


def test_a_disturbed_run_says_so(html):
    assert report.disturbance(CANNED) is None and 'class="warn"' not in html
    noisy = copy.deepcopy(CANNED)
    noisy["decode"][1]["llava"]["step"]["p80"] *= 1.5
    assert "differ by up to" in report.disturbance(noisy) and 'class="warn"' in report.demo_page(noisy)


def test_canned_results_survive_json():
    again = json.loads(json.dumps(CANNED, allow_nan=False))
    assert report.demo_page(again) == report.demo_page(CANNED)


def test_pngs(tmp_path):
    pytest.importorskip("matplotlib")
    paths = report.demo_pngs(CANNED, tmp_path)
    assert sorted(p.name for p in paths) == ["decode.png", "memory.png", "ttft.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_write_report_says_where(tmp_path, capsys):
    demo.write_report(CANNED, None, tmp_path)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == CANNED
    assert (tmp_path / "report.html").exists() and "report.html" in printed and "results.json" in printed


def test_ticks():
    assert svg.nice_ticks(0, 10) == [0, 2.5, 5, 7.5, 10]
    assert svg.log_ticks(3e6, 1.2e9) == [1e6, 1e7, 1e8, 1e9, 1e10]
    assert svg.nice_ticks(1, 1) == [1]


def test_one_point_and_one_series_still_draw():
    picture = svg.line_chart(
        [svg.Series("only", [(10, 5.0)])], title="t", x_label="x", y_label="y", width=300, x_ticks=[(10, "10")], y_text=str
    )
    ElementTree.fromstring(picture)


def test_matched_sizes_are_within_two_percent():
    config = demo.llava_config(vision=43_500_000, language=129_135_360, d_model=768)
    with torch.device("meta"):
        parameters = Llava(config).parameters
    assert abs(parameters["vision"] / 43_500_000 - 1) < 0.02 and abs(parameters["language"] / 129_135_360 - 1) < 0.02


def test_interleaving_keeps_every_sample_and_shuffles_by_seed():
    seen = []
    jobs = {name: (lambda n=name: seen.append(n) or {"total": 1.0}) for name in "ab"}
    samples = demo.interleave(jobs, rounds=8, seed=3)
    assert {name: len(s["total"]) for name, s in samples.items()} == {"a": 8, "b": 8}
    assert len(demo.interleave(jobs, rounds=8, seed=3, budget=0)["a"]["total"]) == 3
    seen = seen[:16]
    assert all(set(seen[i : i + 2]) == {"a", "b"} for i in range(0, 16, 2)) and seen != ["a", "b"] * 8
