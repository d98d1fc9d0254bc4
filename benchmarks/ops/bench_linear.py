"""Products of a few rows, as a decoding step has them, against reading the weight. `python -m benchmarks.ops.bench_linear --help`.

A CPU's alone: a GPU has the library's. The weights are those of a 130M block, its first product and its last."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from benchmarks.harness.bench import DTYPES, Case, Cost, run_bench
from benchmarks.harness.timing import Provider
from benchmarks.shapes import LM
from cobra_kernels import extension, linear

WEIGHTS = {"in": (2 * LM["130m"].d_inner, LM["130m"].d_model), "out": (LM["130m"].d_model, LM["130m"].d_inner)}
ROWS = (1, 2, 4, 8)


def onednn(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def providers() -> list[Provider]:
    found = [] if extension.absence() else [Provider("few_rows_linear", lambda x, weight: torch.ops.cobra_kernels.few_rows_linear(x, weight, None))]
    return [*found, Provider("torch", F.linear), *([Provider("oneDNN", onednn)] if linear._onednn is not None else [])]


def cases(args: argparse.Namespace) -> Iterator[Case]:
    for name in ("fp32", "bf16") if args.device == "cpu" else ():
        for title, (out, into) in WEIGHTS.items():
            for rows in ROWS:
                dtype = DTYPES[name]

                def inputs(index: int, rows=rows, out=out, into=into, dtype=dtype) -> tuple:
                    g = torch.Generator().manual_seed(index)
                    return torch.randn(rows, into, generator=g).to(dtype), torch.randn(out, into, generator=g).to(dtype)

                cost = Cost(bytes=(out * into + rows * (out + into)) * dtype.itemsize, flops=2 * rows * out * into)
                dims = {"rows": rows, "in": into, "out": out}
                yield Case("linear", name, f"130m-{title}-{rows}", dims, cost, "read", inputs, providers(), quick=rows == 1 and title == "in")


def main(argv: Sequence[str] | None = None) -> int:
    with torch.no_grad():
        return run_bench("linear", cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
