"""What is kept of a measurement: one line of JSON, complete by itself, appended and never rewritten."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.harness.environment import ROOT, device_slug
from benchmarks.harness.timing import Timing

SCHEMA = 1
RESULTS = ROOT / "benchmarks" / "results"


@dataclass
class Record:
    """One provider on one shape. Seconds and bytes throughout; `roof_seconds` is what the roof of the same run would need."""

    op: str
    mode: str  # "fwd", "fwd+bwd", "update", "call", ...
    provider: str  # a backend ("reference", "cpu", "triton", "cuda") or a peer ("torch", "torch.compile", ...)
    dtype: str
    shape: str
    dims: dict[str, int]
    timer: str
    cache: str
    first_call: float
    median: float
    p20: float
    p80: float
    blocks: int
    calls_per_block: int
    buffers: int
    preemptions: int
    bytes: int
    flops: int
    exps: int
    roof: str  # "copy", "read", "matmul", "exp", "goal" (a promised time), or "" when none applies
    roof_seconds: float | None
    fraction: float | None  # roof_seconds / median, from the rounds both ran in
    note: str
    environment: dict = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def key(self) -> tuple:
        """What must agree before two records may be compared."""
        return self.op, self.mode, self.provider, self.dtype, self.shape, tuple(sorted(self.dims.items())), self.cache

    @property
    def title(self) -> str:
        """The shape with its sizes: "cobra-3b-image (rows 800, dim 2560)"."""
        sizes = ", ".join(f"{k} {v}" for k, v in self.dims.items())
        return f"{self.shape} ({sizes})" if sizes else self.shape

    @property
    def gbps(self) -> float:
        return self.bytes / self.median * 1e-9

    @classmethod
    def of(cls, timing: Timing, **rest) -> Record:
        return cls(
            provider=timing.provider, timer=timing.timer, cache=timing.cache, first_call=timing.first_call,
            median=timing.median, p20=timing.p20, p80=timing.p80, blocks=len(timing.samples),
            calls_per_block=timing.calls, buffers=timing.buffers, preemptions=timing.preemptions, note=timing.note, **rest,
        )  # fmt: skip


def path_for(name: str, device: str = "cpu", folder: Path = RESULTS) -> Path:
    return folder / device_slug(device) / f"{name}.jsonl"


def append(records: list[Record], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(r), allow_nan=False) + "\n" for r in records)
    with path.open("a") as file:  # one write: a killed run leaves whole lines
        file.write(lines)


def load(path: Path) -> list[Record]:
    """Every record of a file that this schema can read; a line of a later schema is an error, not a guess."""
    records = []
    if not path.exists():
        return records
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = json.loads(line)
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"{path.name}:{number}: schema is {fields.get('schema')!r}, this tree reads {SCHEMA}")
        records.append(Record(**fields))
    return records


def latest(records: list[Record]) -> dict[tuple, Record]:
    """The last record of every key: the file is in the order of measurement."""
    return {r.key: r for r in records}
