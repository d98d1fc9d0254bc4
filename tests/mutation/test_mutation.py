"""The table of faults fits the sources, and the runner tells killed, survived, hanging and invalid faults apart on a small project."""

from __future__ import annotations

import collections
import re

import pytest

from tests.conftest import ROOT
from tests.mutation import run
from tests.mutation.faults import FAULTS, Fault, Killer

PAGE = ROOT / run.PAGE


def test_every_fault_fits_its_source():
    wrong = []
    for fault in FAULTS:
        try:
            run.faulty_text((ROOT / fault.file).read_text(), fault)
        except run.Invalid as error:
            wrong.append(f"{fault.id}: {error}")
    assert not wrong, "\n".join(wrong)


def test_ids_are_unique_and_killers_exist():
    ids = collections.Counter(fault.id for fault in FAULTS)
    assert len(ids) >= 60 and max(ids.values()) == 1, [name for name, count in ids.items() if count > 1]
    assert all((ROOT / fault.killer.path).is_file() for fault in FAULTS)


def test_enough_of_the_faults_on_the_page_are_killed_and_survivors_are_explained():
    """The committed record: `make mutate RECORD=1` writes it."""
    rows = re.findall(r"^\| ([^|]+) \| `[^`]+` \| (\w+) \|", PAGE.read_text().split(run.HEADING)[1], re.MULTILINE)
    notes = {fault.id: fault.note for fault in FAULTS}
    assert len(rows) >= 60 and {name for name, _ in rows} <= set(notes)
    assert sum(outcome in run.KILLED for _, outcome in rows) >= run.REQUIRED * len(rows)
    assert all(notes[name] for name, outcome in rows if outcome == "survived")


TEST = Killer("test_total.py")
FAULTS_OF_A_SMALL_PROJECT = {
    "killed": Fault("small", "a term lost", "total.py", "range(n)", "range(n - 1)", TEST),
    "survived": Fault("small", "no one asks for a negative n", "total.py", "if n < 0:", "if n < -1:", TEST, note="a test with n = -1"),
    "hang": Fault("small", "an endless loop", "total.py", "sum(range(n))", "sum(iter(int, 1))", TEST),
    "crash": Fault("small", "the process dies", "total.py", "sum(range(n))", "__import__('os').abort()", TEST),
    "stale": Fault("small", "not in the source", "total.py", "range(m)", "range(n)", TEST),
    "syntax": Fault("small", "does not compile", "total.py", "range(n)", "range(n", TEST),
}


@pytest.fixture
def small_project(tmp_path):
    (tmp_path / "total.py").write_text("def total(n):\n    if n < 0:\n        raise ValueError(n)\n    return sum(range(n))\n")
    (tmp_path / "test_total.py").write_text("from total import total\n\n\ndef test_total():\n    assert total(4) == 6\n")
    return tmp_path


def test_the_runner_tells_faults_apart(small_project, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(run, "SHORTEST_LIMIT", 3.0)
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    faults, folder = list(FAULTS_OF_A_SMALL_PROJECT.values()), tmp_path_factory.mktemp("copies")
    before = {path: path.read_text() for path in small_project.iterdir()}
    outcomes = run.Run(small_project, faults, 2, folder)()
    assert [outcome.outcome for outcome in outcomes] == ["killed", "survived", "hang", "crash", "invalid", "invalid"]
    assert outcomes[0].by == "test_total" and outcomes[3].by == "SIGABRT" and "update the fault" in outcomes[4].by
    assert before == {path: path.read_text() for path in small_project.iterdir()}, "the working tree was touched"
    assert all((folder / f"worker{i}" / "total.py").read_text() == before[small_project / "total.py"] for i in range(2))
    said = run.summary(outcomes, faults)
    assert "6 faults, 50.0% killed" in said and "a test with n = -1" in said and said.count("invalid: ") == 2

    # The same sources again: what is known is not run; a fault that was not tried is.
    monkeypatch.setattr(run, "run_killer", lambda *arguments: ("passed", ""))
    assert run.Run(small_project, faults[:4], 1, folder)() == outcomes[:4]
    # Other sources: nothing is known, but what is kept.
    (small_project / "total.py").write_text(before[small_project / "total.py"] + "\n")
    assert run.Run(small_project, faults[:4], 1, folder, keep=True)() == outcomes[:4]
    assert [outcome.outcome for outcome in run.Run(small_project, faults[:1], 1, folder)()] == ["survived"]


def test_a_killer_that_fails_without_a_fault_ends_the_run(small_project, tmp_path_factory):
    (small_project / "test_total.py").write_text("def test_total():\n    assert False\n")
    with pytest.raises(SystemExit, match="fail without a fault"):
        run.Run(small_project, [FAULTS_OF_A_SMALL_PROJECT["killed"]], 1, tmp_path_factory.mktemp("copies"))()


def test_an_exit_status_for_each_end(monkeypatch, capsys):
    for outcome, status in (("killed", 0), ("survived", 1), ("invalid", 1)):
        all_alike = lambda self, outcome=outcome: [run.Outcome(fault.id, outcome, "", 0.0, "") for fault in self.faults]
        monkeypatch.setattr(run.Run, "__call__", all_alike)
        assert run.main(["--only", "eps dropped"]) == status
    with pytest.raises(SystemExit):
        run.main(["--only", "no such fault"])
