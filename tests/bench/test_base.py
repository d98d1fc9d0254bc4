"""`python -m benchmarks --base REF` on a toy repository: real worktrees, builds, tests and processes, around one op in Python.

The toy op burns a known time of its own thread and its bench reads that clock, so that a busy machine decides nothing."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from benchmarks.harness import base
from benchmarks.harness.environment import ROOT
from benchmarks.harness.timing import Ratio

BENCH = '''
import sys
import time

from benchmarks.harness.bench import Case, Cost
from benchmarks.harness.timing import Provider
import cobra_kernels

class ThreadTimer:
    name = "thread_time"

    def __call__(self, work):
        start = time.thread_time()
        work()
        return time.thread_time() - start

sys.modules["__main__"].timer_for = lambda device: ThreadTimer()

def cases(args):
    for name in ("changed", "same"):
        call = getattr(cobra_kernels, name)
        yield Case("fwd", "fp32", name, {}, Cost(0), "", lambda index: (), [Provider("other", None), Provider("cpu", call)], cache="warm", quick=name == "same")
'''
OP = '''
import time

def burn(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass

def changed():
    burn({changed})

def same():
    burn(5e-4)
'''
BUILD = "import pathlib, sys\nassert sys.argv[1:] == ['ext']\npathlib.Path('cobra_kernels/built.so').write_text('')\n"
TEST = "import pathlib\nimport cobra_kernels\n\ndef test_op():\n    assert pathlib.Path('cobra_kernels/built.so').exists() and {good}\n"


def git(root, *arguments) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def write(root, *, changed=5e-4, good="True"):
    (root / "cobra_kernels/__init__.py").write_text(OP.format(changed=changed))
    (root / "tests/ops/test_toy.py").write_text(TEST.format(good=good))


@pytest.fixture
def repo(tmp_path):
    root = tmp_path / "repo"
    for folder in ("cobra_kernels/ops/toy", "cobra_kernels/ops/toy_update", "csrc/toy", "cobra", "tests/ops", "benchmarks/ops"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "benchmarks/harness", root / "benchmarks/harness", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "benchmarks/__init__.py").write_text("")
    (root / "benchmarks/ops/bench_toy.py").write_text(BENCH)
    (root / "csrc/build.py").write_text(BUILD)
    (root / "csrc/toy/toy.h").write_text("")
    (root / ".gitignore").write_text("/build/\n/out/\n__pycache__/\n*.so\n")
    (root / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers = threads\naddopts = -p no:cacheprovider\n")
    write(root)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "base")
    return root


def verdicts(root) -> dict[str, dict]:
    lines = (root / "out/bench/base.jsonl").read_text().splitlines()
    return {line["case"]["title"].split()[-1]: line for line in map(json.loads, lines)}


def test_a_planted_slowdown_is_seen_an_unchanged_case_is_not(repo, capfd):
    write(repo, changed=7.5e-4)
    (repo / "csrc/toy/new.h").write_text("")  # not known to git, part of the working tree all the same
    before = git(repo, "status", "--porcelain"), git(repo, "branch", "-a"), git(repo, "rev-parse", "HEAD")
    assert base.run("HEAD", ["toy"], launches=1, root=repo) == 0, capfd.readouterr().out
    found = verdicts(repo)
    assert found["changed"]["verdict"] == "slower" and 1.3 < found["changed"]["ratio"]["median"] < 1.7, found
    assert found["same"]["verdict"] == "same", found
    assert (git(repo, "status", "--porcelain"), git(repo, "branch", "-a"), git(repo, "rev-parse", "HEAD")) == before
    assert (repo / "build/base/head/csrc/toy/new.h").exists() and not (repo / "build/base/base/csrc/toy/new.h").exists()
    assert found["changed"]["head"] != found["changed"]["base"] == before[2] and found["changed"]["environment"]["device"]
    assert "slower" in capfd.readouterr().out


def test_red_tests_are_not_compared(repo, capsys, monkeypatch):
    monkeypatch.setattr(base, "measure_bench", lambda *a: pytest.fail("measured on red tests"))
    write(repo, changed=1e-5, good="False")
    assert base.run("HEAD", ["toy"], root=repo) == 1
    out = capsys.readouterr().out
    assert "toy was not compared, its tests are red" in out and "faster" not in out and not (repo / "out").exists()


def test_what_cannot_be_compared_is_refused(repo, capsys):
    assert base.run("no-such-ref", ["toy"], root=repo) == 1
    assert "--base no-such-ref: git rev-parse" in capsys.readouterr().out
    (repo / "notes.md").write_text("nothing that runs\n")
    assert base.run("HEAD", [], root=repo) == 1
    assert "none of the 1 files that differ belongs to a room" in capsys.readouterr().out
    (repo / "csrc/build.py").write_text("raise SystemExit('error: no such header')\n")
    assert base.run("HEAD", ["toy"], root=repo) == 1
    assert "does not build" in capsys.readouterr().out


def test_rooms_that_a_change_reaches(repo):
    benches = ["toy", "toy_update", "overhead", "lm"]
    for path, reached in {
        "csrc/toy/toy.h": ["toy"],
        "cobra_kernels/ops/toy_update/op.py": ["toy_update", "overhead"],
        "csrc/common/vec.h": ["toy", "toy_update", "overhead"],
        "cobra_kernels/dispatch.py": ["toy", "toy_update", "overhead"],
        "cobra_kernels/modules/mamba.py": ["lm"],
        "docs/model.md": [],
    }.items():
        assert base.touched([path], benches) == reached, path
    (repo / "tests/ops/test_toy_update.py").write_text("")
    (repo / "tests/ops/test_toy_triton.py").write_text("")
    assert base.tests_of("toy", repo) == ["tests/ops/test_toy.py", "tests/ops/test_toy_triton.py"]
    for bench, files in {"scan": [], "lm": ["tests/modules"]}.items():
        assert base.tests_of(bench, repo) == files
    assert "has no tests" in base.red("scan", repo)


def test_a_difference_needs_every_pair_of_processes():
    c = base.Compared("toy", "fwd", "cpu")
    slow, even = [1.1 + 0.001 * i for i in range(12)], [1.0 + 0.001 * i for i in range(12)]
    c.head, c.base = [slow, slow], [even, even]
    assert c.ratio.verdict == "slower" and c.ratio.rounds == 24
    c.head = [slow, even]  # one pair saw nothing: where the process lay in memory
    assert c.ratio.verdict == "same" and c.ratio.low <= 1 < c.ratio.high
    assert isinstance(c.ratio, Ratio) and c.seconds("base") == pytest.approx(1.0055)


def test_every_bench_here_has_cases_and_a_provider_of_ours():
    import importlib

    from benchmarks.__main__ import benches
    from benchmarks.harness import side

    for name in ("rms_norm", "projector", "overhead"):
        cases = side.cases_in(importlib.import_module(benches()[name]))
        ours = {side.chosen(case, None).name for _, case in cases}
        assert cases and (ours == {"cpu"} or name == "overhead"), name
        assert base.tests_of(name, ROOT) and all(side.chosen(case, "none such") is None for _, case in cases)
