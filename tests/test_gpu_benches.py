"""The GPU side of the benches, rehearsed without one: its cases are built, its peers called, its builds planned.

`Pretend` is a device that torch takes for the CPU and the benches for a GPU; the peers' functions are played by our own ops.
"""

from __future__ import annotations

import argparse
import importlib
import tarfile
from dataclasses import replace

import pytest
import torch

import cobra_kernels
from benchmarks import peers
from benchmarks.harness.bench import AGREEMENT, disagreement
from benchmarks.shapes import PROJECTOR

SMALL = {
    "bench_rms_norm": {"cobra-3b-image": (5, 48)},
    "bench_causal_conv1d": {"cobra-3b-image": (2, 24, 9)},
    "bench_causal_conv1d_update": {"cobra-3b-decode-1": (3, 24)},
    "bench_selective_state_update": {"cobra-3b-decode-1": (3, 24, 16)},
    "bench_selective_scan": {"cobra-3b-image": (2, 24, 17, 16)},
}
PLAYED = {
    "selective_scan_fn": cobra_kernels.selective_scan,
    "causal_conv1d_fn": cobra_kernels.causal_conv1d,
    "causal_conv1d_update": cobra_kernels.causal_conv1d_update,
    "selective_state_update": cobra_kernels.selective_state_update,
    "rms_norm_fn": lambda x, weight, bias, residual=None, **kwargs: cobra_kernels.rms_norm(x, weight, bias, residual, **kwargs),
}


class Pretend(str):
    """"cpu" to torch, and unequal to it."""

    def __eq__(self, other):
        return False

    def __ne__(self, other):
        return True

    __hash__ = str.__hash__


ARGS = argparse.Namespace(device=Pretend("cpu"))


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(peers, "function", lambda package, module, name: PLAYED[name])


def compared(case) -> list[str]:
    """Runs the providers of a case that do not compile, and compares them as the harness does."""
    results = {p.name: p.call(*(p.make_inputs or case.make_inputs)(0)) for p in case.providers if not p.slow_start}
    first, *others = results
    for name in others:
        error = disagreement(results[name], results[first])
        assert error <= AGREEMENT[case.dtype], f"{case.title}: {name} differs from {first} by {error:.1e}"
    return list(results)


@pytest.mark.parametrize("name", SMALL)
def test_cases_and_peers_of_an_op(name, monkeypatch, played):
    bench = importlib.import_module(f"benchmarks.ops.{name}")
    assert all("cobra-3b" in shape for shape in bench.GPU_SHAPES)
    monkeypatch.setattr(bench, "GPU_SHAPES", SMALL[name])
    reference = {"bench_rms_norm": "ours", "bench_selective_scan": "ours"}
    for case in bench.cases(ARGS):
        assert case.dtype == "bf16" and case.cost.bytes > 0 and case.roof in ("copy", "exp")
        if not case.providers:  # no peer's backward is built, and ours need a GPU
            assert "bwd" in case.mode
            continue
        names = compared(case)
        assert names[0] in ("mamba-ssm", "causal-conv1d") or "bwd" in case.mode
        if name in reference:  # no torch provider to compare with: our own op
            inputs = (case.providers[0].make_inputs or case.make_inputs)(0)
            assert disagreement(case.providers[0].call(*inputs), bench.ours(*inputs)) <= AGREEMENT["bf16"]


def test_projector_cases(monkeypatch):
    from benchmarks.ops import bench_projector as bench

    assert [s.tokens for s in bench.GPU_SHAPES.values()] == [729, 8 * 729]
    small = replace(PROJECTOR["laptop"], vision_dims=(8, 16), hidden=32, d_model=16)
    monkeypatch.setattr(bench, "GPU_SHAPES", {"cobra-3b-1": small, "cobra-3b-2": replace(small, tokens=2 * 729)})
    for op, cases in bench.CASES.items():
        for case in cases(ARGS):
            epilogues = op == "mlp_projector" and case.mode == "fwd"
            assert compared(case) == (["torch", "cublasLt epilogues"] if epilogues else ["torch"])
            inputs, call = case.make_inputs(0), bench.mlp if op == "mlp_projector" else bench.ldp
            want = (call if case.mode == "fwd" else bench.training(call))(*inputs)
            assert disagreement(case.providers[0].call(*inputs), want) <= AGREEMENT["bf16"]


def test_costs_of_the_projector_scale_with_images():
    from benchmarks.ops import bench_projector as bench

    one, eight = bench.GPU_SHAPES.values()
    for cost in (bench.mlp_cost, bench.ldp_cost):
        assert cost(eight, torch.bfloat16).flops == 8 * cost(one, torch.bfloat16).flops


def test_time_to_first_token_over_the_peers_kernels(played):
    """The peer's prefill, with its kernels played by ours, gives the logits of our own."""
    from benchmarks.model import bench_ttft

    vlm = bench_ttft.model("cobra-tiny", "cpu")
    inputs = bench_ttft.make_inputs("cobra-tiny", "cpu", 0)
    (provider,) = bench_ttft.peer(vlm)
    assert disagreement(provider.call(*inputs), bench_ttft.ours(vlm, *inputs)) <= AGREEMENT["fp32"]
    (case,) = bench_ttft.cases(argparse.Namespace(device="cpu"))
    assert case.dims["text"] == 71 and case.cost.flops > 0 and case.goal is None


def test_a_bench_without_peers_says_so_once(monkeypatch, capsys):
    monkeypatch.delenv("COBRA_BENCH_PEERS", raising=False)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    peers.find.cache_clear()
    peers._say.cache_clear()
    assert peers.selective_state_update() == [] and peers.rms_norm(1e-5) == []
    assert capsys.readouterr().out == "left out: mamba_ssm: not installed, and COBRA_BENCH_PEERS names no folder of sdists\n"
    peers.find.cache_clear()


def sdist(folder, peer, sources):
    root = folder / "src" / f"{peer.package}-{peer.version}"
    for source in sources:
        (root / source).parent.mkdir(parents=True, exist_ok=True)
        (root / source).write_text("// a source\n")
    with tarfile.open(folder / f"{root.name}.tar.gz", "w:gz") as archive:
        archive.add(root, root.name)


def test_peers_are_built_from_their_sdists(tmp_path, monkeypatch):
    """Compilers are played: each source is compiled once for the architecture asked for, then linked; an absent sdist is said."""
    peer = peers.PEERS["causal_conv1d"]
    sdist(tmp_path, peer, peer.sources)
    commands = []

    def run(command):
        commands.append(command)
        if "-shared" in command:
            peer.library.write_text("")
        return ""

    monkeypatch.setattr(peers, "BUILD", tmp_path / "build")
    monkeypatch.setattr(peers, "run", run)
    import_build(monkeypatch)
    assert sorted(peers.build(tmp_path, "90")) == [
        "causal_conv1d 1.7.0: built for sm_90",
        f"left out: mamba_ssm 2.3.2.post1: no sdist in {tmp_path}",
    ]
    compiled = [c for c in commands if "-c" in c]
    assert len(compiled) == 3 and sum("-gencode=arch=compute_90,code=sm_90" in c for c in compiled) == 2 and len(commands) == 4
    assert {"-Wl,-z,lazy", "-Wl,--no-as-needed"} <= set(commands[-1])
    assert "causal_conv1d 1.7.0: built before" in peers.build(tmp_path, "90") and len(commands) == 4
    monkeypatch.setattr(peers, "run", lambda command: "error: no such header")
    assert "causal_conv1d 1.7.0: does not build: error: no such header" in peers.build(tmp_path, "100")


def import_build(monkeypatch):
    """csrc/build.py with an nvcc, whether this machine has one or not."""
    import sys

    monkeypatch.syspath_prepend(str(peers.ROOT / "csrc"))
    import build

    monkeypatch.setattr(build, "find_nvcc", lambda: "/toolkit/bin/nvcc")
    monkeypatch.setattr(build, "cuda_root", lambda nvcc: peers.Path("/toolkit"))
    assert sys.modules["build"] is build


def test_a_strange_sdist_is_refused(tmp_path, monkeypatch):
    peer = peers.PEERS["mamba_ssm"]
    sdist(tmp_path, peer, ["README.md"])
    monkeypatch.setattr(peers, "BUILD", tmp_path / "build")
    with pytest.raises(RuntimeError, match="does not hold csrc/selective_scan"):
        peers.unpack(peer, peer.sdist(tmp_path))


@pytest.mark.parametrize("op", ["rms_norm", "selective_scan", "ldp_projector"])
def test_one_case_for_a_profiler(op, capsys):
    from benchmarks import once

    shape = ["--shape", "laptop"] if op == "ldp_projector" else []
    assert once.main([op, *shape]) == 0 and "cpu: 8 calls" in capsys.readouterr().out
    if op == "rms_norm":
        assert once.main([op, "--backward"]) == 0 and "fwd+bwd" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            once.main(["causal_conv1d_update", "--backward"])
    with pytest.raises(SystemExit):
        once.main([op, "--shape", "none-such"])
