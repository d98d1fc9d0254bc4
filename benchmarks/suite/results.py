"""From a journal to results.json and results.csv: what was measured, what was not and why, on which machine. results.schema.json
beside this file describes every field of the JSON; a test validates what is written against it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.suite import journal

SCHEMA = 1
CSV_FIELDS = (
    "case", "scenario", "mode", "parameters", "entry", "model", "setting", "device", "dtype", "status", "reason", "unit", "units",
    "median", "p20", "p80", "blocks", "calls_per_block", "first_call", "timer", "rate", "bytes", "flops", "exps", "limit_seconds",
    "limit_by", "limit_rate", "fraction", "joules", "drift", "notes",
)  # fmt: skip


def collect(name: str, entries: Sequence[dict]) -> dict:
    """The results of a run from the entries of its journal; a case that was measured again counts once, by its last entry."""
    head = entries[0]
    cases = {e["id"]: {k: v for k, v in e.items() if k != "kind"} for e in entries if e["kind"] == "case"}
    order = sorted(cases, key=lambda id: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", id)])
    return {
        "schema": SCHEMA, "run": name, "identity": head["identity"], "environment": head["environment"], "about": head["about"],
        "roofs": [{k: v for k, v in e.items() if k != "kind"} for e in entries if e["kind"] == "roofs"],
        "planned": head["identity"]["cases"], "cases": [cases[id] for id in order],
    }  # fmt: skip


def complete(run: dict) -> bool:
    return len(run["cases"]) == run["planned"]


def load(where: Path) -> dict:
    """The results of a run from its folder. Raises JournalError when there is none or its journal was changed."""
    path = where / "journal.jsonl"
    entries, _, _ = journal.read(path)
    if not entries:
        raise journal.JournalError(f"{path}: no run is there")
    return collect(where.name, entries)


def results_of(run: dict) -> list[dict]:
    return [result for case in run["cases"] for result in case["results"]]


def write_json(run: dict, path: Path) -> None:
    path.write_text(json.dumps(run, indent=1, allow_nan=False) + "\n")


def write_csv(run: dict, path: Path) -> None:
    """One line per entry of a case; seconds and bytes throughout."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, CSV_FIELDS, restval="", extrasaction="ignore")
        writer.writeheader()
        for result in results_of(run):
            parameters = " ".join(f"{k}={v}" for k, v in result["parameters"].items())
            flat = {k: "" if v is None else v for k, v in {**(result["record"] or {}), **result}.items()}
            writer.writerow({**flat, "parameters": parameters, "notes": "; ".join(result["notes"])})
