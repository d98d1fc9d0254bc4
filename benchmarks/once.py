"""python -m benchmarks.once <op> [--device cuda] [--backend cuda] [--shape NAME] [--backward]: a few calls of one bench case, for a profiler."""

from __future__ import annotations

import argparse
import importlib

import torch

from benchmarks.__main__ import benches

CALLS = 8  # ncu skips the first three


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.once", description=__doc__)
    p.add_argument("op")
    p.add_argument("--device", default="cpu")
    p.add_argument("--backend", help="cpu, cuda or triton (default: the device's own)")
    p.add_argument("--shape", help="a shape of the bench (default: its first)")
    p.add_argument("--backward", action="store_true", help="a case of forward and backward")
    args = p.parse_args(argv)
    args.backend = args.backend or torch.device(args.device).type
    names = benches()
    name = args.op if args.op in names else "projector" if args.op.endswith("_projector") else None
    if name is None:
        p.error(f"op: {args.op!r} has no bench; there are {', '.join(names)}")
    module = importlib.import_module(names[name])
    cases = list(getattr(module, "CASES", {}).get(args.op, module.cases if hasattr(module, "cases") else None)(args))
    cases = [case for case in cases if ("fwd+bwd" in case.mode) == args.backward]
    if not cases:
        p.error(f"op: {args.op!r} has no case of forward and backward")
    shapes = list(dict.fromkeys(case.shape for case in cases))
    if args.shape and args.shape not in shapes:
        p.error(f"--shape: {args.shape!r} is none of {', '.join(shapes)}")
    case = next(case for case in cases if case.shape == (args.shape or shapes[0]))
    provider = next((p for p in case.providers if p.name == args.backend), None)
    if provider is None:
        p.error(f"--backend: {args.backend!r} is not there; there are {', '.join(p.name for p in case.providers)}")
    inputs = (provider.make_inputs or case.make_inputs)(0)
    for _ in range(CALLS):
        provider.call(*inputs)
    if torch.device(args.device).type == "cuda":
        torch.cuda.synchronize()
    print(f"{args.op} {case.title} {provider.name}: {CALLS} calls")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
