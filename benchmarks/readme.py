"""Figures in Markdown come from records.

    python -m benchmarks.readme            write the tables of README.md, docs/ and the rooms anew from benchmarks/results/
    python -m benchmarks.readme --check    exit status 1 when a table is out of date, or a figure of speed has no record

A table stands between `<!-- figures: NAME DEVICE -->` and `<!-- end of figures -->`, DEVICE being a folder of benchmarks/results. NAME is
`cpu` or `gpu` (the README's rows below), or `room OP` (the fp32 cases of one op). A figure of speed anywhere else has to say in its own
paragraph, table, heading or introducing line that it is no record: an estimate, a floor, a goal, a limit, or a note of the development."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import records as store
from benchmarks.harness.environment import ROOT
from benchmarks.harness.records import Record
from benchmarks.harness.table import figures, seconds_text

BLOCK = re.compile(r"(<!-- figures: (?P<name>cpu|gpu|room \w+) (?P<device>[\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
BEGIN, END = re.compile(r"<!-- figures:"), "<!-- end of figures -->"
ROOFS = {"exp": "the exponentials", "copy": "copy", "matmul": "a matrix product", "read": "reading the weights"}


def pages(root: Path = ROOT) -> list[Path]:
    """Every page whose figures are traced."""
    single = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md", "csrc/simt/README.md")]
    return [p for p in (*single, *sorted(root.glob("docs/*.md")), *sorted(root.glob("cobra_kernels/ops/*/README.md"))) if p.exists()]


# --- tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the README: a case, our provider, and those that stand next to it, (provider, its name for the reader)."""

    what: str
    op: str
    case: tuple[str, str, str]  # mode, dtype, shape
    provider: str
    peers: tuple[tuple[str, str], ...] = ()


MAMBAPY, LOOP = ("mambapy", "mambapy"), ("materialised loop (transformers)", "transformers' loop")
LLAMA = ("llama.cpp", "llama.cpp")
ROWS = {
    "cpu": (
        Row("scan, D=5120 N=16 L=800, channels innermost", "selective_scan", ("fwd channel-last", "fp32", "cobra-3b-image"), "cpu", (MAMBAPY, LOOP)),
        Row("the same, time innermost", "selective_scan", ("fwd channel-first", "fp32", "cobra-3b-image"), "cpu"),
        Row(
            "scan, forward and gradients, 2 x D=1536 L=512", "selective_scan", ("fwd+bwd channel-last", "fp32", "130m-train"), "cpu",
            (MAMBAPY, LOOP),
        ),
        Row(
            "causal conv1d, D=5120 L=800, time innermost", "causal_conv1d", ("channel-first", "fp32", "cobra-3b-image"), "cpu",
            (("torch conv1d", "torch"), ("torch.compile", "torch.compile")),
        ),
        Row(
            "state update, batch 64, D=5120 N=16", "selective_state_update", ("update", "fp32", "cobra-3b-decode-64"), "cpu",
            (("torch", "torch"), ("torch.compile", "torch.compile")),
        ),
        Row(
            "RMSNorm + residual, 800 x 2560", "rms_norm", ("fwd", "fp32", "cobra-3b-image"), "cpu",
            (("torch", "torch"), ("torch.compile", "torch.compile")),
        ),
        Row(
            "prefill, 130M Mamba, 512 tokens", "lm", ("prefill", "fp32", "130m-prompt-512"), "cobra_kernels",
            (("gemms alone", "its matrix products alone"), ("transformers mamba", "transformers: Mamba"), LLAMA, ("transformers gpt-neox", "GPT-NeoX")),
        ),
        Row(
            "decode, 130M Mamba, one token", "lm", ("decode", "fp32", "130m"), "cobra_kernels",
            (("transformers mamba", "transformers: Mamba"), LLAMA),
        ),
        Row(
            "training step, one layer of the 130M Mamba, 2 x 512 tokens", "train", ("step", "fp32", "24th"), "cobra_kernels",
            (("gemms alone", "its matrix products alone"), ("transformers mamba", "transformers: Mamba"), MAMBAPY),
        ),
    ),
    "gpu": (
        *(
            Row(f"scan, D=5120 N=16, {what}", "selective_scan", ("fwd channel-last", "bf16", shape), "cuda", (("mamba-ssm", "mamba-ssm"),))
            for what, shape in (("L=800", "cobra-3b-image"), ("L=2048", "cobra-3b-2k"), ("batch 8, L=2048", "cobra-3b-2k-batch-8"))
        ),
        Row(
            "causal conv1d, D=5120 L=800, channels innermost", "causal_conv1d", ("channel-last", "bf16", "cobra-3b-image"), "cuda",
            (("causal-conv1d", "causal-conv1d"),),
        ),
        Row(
            "state update, batch 64, D=5120 N=16", "selective_state_update", ("update", "bf16", "cobra-3b-decode-64"), "cuda",
            (("mamba-ssm", "mamba-ssm"),),
        ),
        Row("RMSNorm + residual, 800 x 2560", "rms_norm", ("fwd", "bf16", "cobra-3b-image"), "cuda", (("mamba-ssm", "mamba-ssm"),)),
        Row("image to first token, Cobra-3B", "ttft", ("ttft", "bf16", "cobra-3b"), "cobra_kernels", (("over mamba-ssm", "over mamba-ssm"),)),
    ),
}  # fmt: skip
HEADS = ("what", "time", "of its roof", "next to it, same run", "commit", "command")


def run_of(record: Record) -> tuple:
    """Records of one process: its start and its commit."""
    return record.environment["date"], record.environment["commit"]


def case_of(record: Record) -> tuple:
    return record.mode, record.dtype, record.shape


def find(records: Sequence[Record], case: tuple[str, str, str], provider: str, peers: Sequence[str]) -> tuple[Record, dict[str, Record]] | None:
    """The last record of `provider`, of the last run that has every peer too if there is such a run, and the peers' of that run."""
    runs: dict[tuple, dict[str, Record]] = {}
    for record in records:
        if case_of(record) == case:
            runs.setdefault(run_of(record), {})[record.provider] = record
    ours = [run for run in runs.values() if provider in run]
    whole = [run for run in ours if all(p in run for p in peers)]
    if not ours:
        return None
    run = (whole or ours)[-1]
    return run[provider], {p: run[p] for p in peers if p in run}


def commit_text(record: Record) -> str:
    return record.environment["commit"][:7] + ("+" if record.environment["dirty"] else "")


def roof_text(record: Record) -> str:
    if record.roof == "goal":
        return f"goal: {seconds_text(record.roof_seconds)}"
    return "" if record.fraction is None else f"{record.fraction:.0%} of {ROOFS[record.roof]}"


def time_text(record: Record) -> str:
    return seconds_text(record.median) + ("\\*" if record.note else "")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *rows)]


def legend(used: Sequence[Record]) -> list[str]:
    noted = "\\* outliers or a wide spread, or above its roof: the record's note says which. " if any(r.note for r in used) else ""
    dirty = "+ with local changes. " if any(r.environment["dirty"] for r in used) else ""
    return ["", (noted + dirty).strip()] if noted or dirty else []


def where(records: Sequence[Record]) -> str:
    """The machine and the settings that the records share; what differs is listed."""

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(r.environment[key]) for r in records))

    dates = sorted(r.environment["date"][:10] for r in records)
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    if "driver" in records[0].environment:
        return f"{each('device')}, driver {each('driver')}, CUDA {each('cuda')}, torch {each('torch')}, bf16, {days}"
    return f"{each('device')}, {each('threads')} threads, {each('cpu_level')}, torch {each('torch')}, {days}"


def table_of_rows(name: str, folder: Path, device: str) -> list[str]:
    rows, used = [], []
    for row in ROWS[name]:
        found = find(store.load(folder / f"{row.op}.jsonl"), row.case, row.provider, [p for p, _ in row.peers])
        command = f"`python -m benchmarks --only {row.op}{' --device cuda' if name == 'gpu' else ''}`"
        if found is None:
            rows.append([row.what, "not measured", "", "", "", command])
            continue
        ours, peers = found
        used += [ours, *peers.values()]
        beside = ", ".join(f"{shown} {time_text(peers[p])}" for p, shown in row.peers if p in peers)
        rows.append([row.what, time_text(ours), roof_text(ours), beside, commit_text(ours), command])
    if not used:
        return [f"No figure of this device is given: there is no record of one ({device})."]
    intro = f"Medians on {where(used)}. The roof is measured in the same run; every run, spread and environment is in benchmarks/results/{device}."
    return [intro, "", *markdown(HEADS, rows), *legend(used)]


def table_of_room(op: str, folder: Path, device: str) -> list[str]:
    """Every fp32 case of the op: our time, its share of the roof, and how many times as long each peer of the same run takes."""
    records = [r for r in store.load(folder / f"{op}.jsonl") if r.dtype == "fp32"]
    rows, used, names = [], [], []
    for case in dict.fromkeys(map(case_of, sorted(records, key=run_of, reverse=True))):  # in the order of the last run
        providers = list(dict.fromkeys(r.provider for r in records if case_of(r) == case))
        mine = next((p for p in ("cpu", "cuda", "cobra_kernels", case[2]) if p in providers), None)  # of `overhead` the op itself
        if mine is None:
            continue
        peers = [p for p in providers if p != mine]
        ours, others = find(records, case, mine, []), find(records, case, mine, peers)
        ours, others = others if others[1] else ours
        used += [ours, *others.values()]
        names += [p for p in others if p not in names]
        rows.append((ours, others))
    if not rows:
        return [f"Not measured on this device yet ({device})."]
    lines = [
        [
            f"{ours.mode}, {ours.title}", time_text(ours), roof_text(ours),
            *(f"{figures(others[n].median / ours.median)}x" if n in others else "" for n in names), commit_text(ours),
        ]
        for ours, others in rows
    ]  # fmt: skip
    intro = f"fp32, medians on {where(used)}. A peer's column is its time over ours in the same run."
    return [intro, "", *markdown(["case", "time", "of its roof", *names, "commit"], lines), *legend(used)]


def rendered(text: str, results: Path = store.RESULTS) -> str:
    """The page with every table written anew."""

    def block(match: re.Match) -> str:
        name, device = match["name"], match["device"]
        make = table_of_room if name.startswith("room ") else table_of_rows
        lines = make(name.removeprefix("room "), results / device, device)
        return match[1] + "\n".join(lines) + "\n" + END

    return BLOCK.sub(block, text)


# --- figures without a record ---------------------------------------------------------------------------------------------

FIGURE = re.compile(
    r"(?<![\w.-])\d(?:[\d.,]*\d)?(?: (?:to|and|or) \d(?:[\d.]*\d)?)?(?:"
    r" ?(?:ns|us|µs|ms|s|[KMGT]B/s|[MGT]FLOP/s|GOP/s|tokens/s|tok/s)\b"
    r"|x(?!\w)| times(?= (?:faster|slower|sooner|as |the |that |ours))"
    r"| ?% of (?:[a-z]+ )?(?:roof|copy|peak|exponentials|exponential floor|read|bandwidth|matrix product|products))"
)  # fmt: skip
# A limit is said, not measured: "at most 60 ms".
LIMIT = re.compile(r"(?:at most|at least|within|under|up to|less than|below|above|beyond)\s+$", re.IGNORECASE)
SAYS_SO = re.compile(
    r"\bestimat|\bfloors?\b|\bgoals?\b|\bnothing is measured|\bnot (?:been )?measured|\bno(?:t a|t) records?\b|\bno record\b|\bcounted\b|\bat the peak rate\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Loose:
    """A figure of speed that stands in a page without a record."""

    line: int
    figure: str
    text: str


def paragraphs(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """(line number, heading, lines) of every paragraph, list item with its continuation, and table, outside tables of figures and code."""
    heading, lines, start, skip = "", [], 0, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if skip:
            skip = "" if line.startswith(skip) else skip
            continue
        if line.startswith("```") or BEGIN.match(line):
            skip = "```" if line.startswith("```") else END
        item = re.match(r"\s*(?:[-*]|\d+\.) ", line) and not (lines and lines[0].startswith("|"))
        if lines and (skip or not line.strip() or line.startswith("#") or item):
            yield start, heading, lines
            lines = []
        if skip or not line.strip():
            continue
        if line.startswith("#"):
            heading = line
            continue
        start = start if lines else number
        lines.append(line)


def untraced(text: str) -> list[Loose]:
    """Figures of speed outside the tables of figures, where neither the paragraph nor its heading, nor for a list or a table the
    paragraph that introduces it, says what else they are."""
    found, introduction, section = [], "", ""
    for start, heading, lines in paragraphs(text):
        whole = " ".join(lines)
        part = lines[0].startswith("|") or re.match(r"\s*(?:[-*]|\d+\.) ", lines[0]) is not None
        if heading != section:
            introduction, section = "", heading
        said = any(SAYS_SO.search(words) for words in (whole, heading, introduction if part else ""))
        introduction = introduction if part else whole
        if said:
            continue
        for offset, line in enumerate(lines):
            plain = re.sub(r"`[^`]*`", lambda m: " " * len(m[0]), line)
            found += [
                Loose(start + offset, match[0], line.strip())
                for match in FIGURE.finditer(plain)
                if not LIMIT.search(plain[: match.start()])
            ]
    return found


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, metavar="FILE", help="pages (default: all of them)")
    p.add_argument("--check", action="store_true", help="write nothing")
    p.add_argument("--results", type=Path, default=store.RESULTS, help="folder of the records (default: benchmarks/results)")
    args = p.parse_args(argv)
    red = False
    for page in args.files or pages():
        old = page.read_text()
        new = rendered(old, args.results)
        name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else str(page)
        if new != old and args.check:
            red = True
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, "records", n=0))
            print(f"{name} is out of date: python -m benchmarks.readme")
        elif new != old:
            page.write_text(new)
            print(f"{name} written")
        for loose in untraced(new):
            red = True
            print(f"{name}:{loose.line}: {loose.figure!r} has no record and does not say what it is: {loose.text}")
    return 1 if red else 0


if __name__ == "__main__":
    raise SystemExit(main())
