"""The journal of a run: one line of JSON per finished step, appended, so that a run that is killed goes on where it stopped.

Every line carries a hash over the lines before it and its own entry: what was edited, moved or removed afterwards is refused
by name instead of being reported. The hash guards against accidents and quiet edits, not against someone who recomputes it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

SCHEMA = 1


class JournalError(Exception):
    """A journal that must not be continued or reported. The message names the file, the line, what is there, what was expected."""


def _digest(previous: str, entry: dict) -> str:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def read(path: Path) -> tuple[list[dict], str, int]:
    """(entries, hash of the last one, bytes they fill). A last line that a killed run left half-written does not count."""
    entries, chain, size = [], "", 0
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines[:-1], 1):  # the last piece has no newline behind it
        try:
            row = json.loads(line)
            entry, written = row["entry"], row["sha256"]
        except (ValueError, KeyError, TypeError):
            raise JournalError(f"{path}:{number}: no journal line: {line[:60]!r}") from None
        if written != (chain := _digest(chain, entry)):
            raise JournalError(
                f"{path}:{number}: sha256 has {str(written)[:12]}, expected {chain[:12]} from this line and those before it: the journal "
                "was changed after it was written; start another run with --run"
            )
        entries.append(entry)
        size += len(line) + 1
    if entries and entries[0].get("kind") != "run":
        raise JournalError(f"{path}:1: kind has {entries[0].get('kind')!r}, expected 'run'")
    if entries and entries[0].get("schema") != SCHEMA:
        raise JournalError(f"{path}:1: schema has {entries[0].get('schema')!r}, expected {SCHEMA}")
    return entries, chain, size


class Journal:
    """Open for writing, by one process at a time. `identity` says what all results of a run have in common: its machine, its
    source, its settings; `about`: what each scenario is. Raises JournalError when the journal belongs to another run, was
    changed, or is being written."""

    def __init__(self, path: Path, identity: dict, environment: dict, about: dict[str, str]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise JournalError(f"{path}: another `cobra bench` is writing this run") from None
        try:
            self.entries, self.chain, size = read(path)
            self.file.truncate(size)
            if self.entries:
                self._check(identity)
            else:
                self.append({"kind": "run", "schema": SCHEMA, "identity": identity, "environment": environment, "about": about})
        except BaseException:
            self.file.close()
            raise

    def _check(self, identity: dict) -> None:
        written = self.entries[0]["identity"]
        for key in [*identity, *(k for k in written if k not in identity)]:
            if written.get(key) != identity.get(key):
                raise JournalError(
                    f"{self.path}:1: {key} has {written.get(key)!r}, expected {identity.get(key)!r}, as here and now: results of two "
                    "do not mix; start another run with --run"
                )

    def append(self, entry: dict) -> None:
        entry = json.loads(json.dumps(entry, allow_nan=False))  # as it will be read: keys are text
        chain = _digest(self.chain, entry)
        self.file.write(json.dumps({"entry": entry, "sha256": chain}, allow_nan=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.entries.append(entry)
        self.chain = chain

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
