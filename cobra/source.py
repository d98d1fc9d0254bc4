"""Foreign weight files, read one tensor at a time: safetensors in this process, pickles by a locked-down one (unpickle.py).

    with open_source(path) as source:
        for entry in source.entries: tensor = source.read(entry)

Nothing is believed: names, dtypes and shapes are checked as they arrive, and a tensor is read to exactly its number of bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import unpickle
from .checkpoint import CHUNK, Entry, fill, read_header
from .config import strict_json
from .errors import CheckpointError

# Name in a safetensors header -> dtype: what a file of other people's may hold beside the weights that we read.
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
_MAX_LISTING = 16 << 20
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Stored:
    """One tensor of a source; `path` is its name, one part per dictionary around it."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    index: int  # its place in the source

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Source:
    """An open weight file."""

    what: str  # its path, for messages
    entries: list[Stored]
    others: list[str]  # what a pickle holds beside tensors
    read: Callable[[Stored], Tensor]  # on the CPU, in its own memory; raises CheckpointError


@contextlib.contextmanager
def open_source(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a .safetensors file, or a .pt or .bin written by `torch.save`; the content decides. Raises CheckpointError."""
    path = Path(path)
    try:
        with open(path, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path}: is no regular file")
            start = file.read(9)
            file.seek(0)
            if start.startswith(_ZIP):
                with _pickled(path) as source:
                    yield source
            elif start[8:] == b"{":
                yield _safetensors(file, path)
            else:
                raise CheckpointError(
                    f"{path}: is neither a safetensors file nor one that torch.save has written since torch 1.6 (a zip archive); "
                    "older pickles are not opened"
                )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _safetensors(file, path: Path) -> Source:
    _, tensors = read_header(file, str(path), DTYPES)

    def read(entry: Stored) -> Tensor:
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        place: Entry = tensors[entry.index]
        file.seek(place.begin)
        fill(file, memoryview(tensor.view(-1).view(torch.uint8).numpy()), None, f"{path}: {entry.name}")
        return tensor

    return Source(str(path), [Stored((e.name,), e.dtype, e.shape, i) for i, e in enumerate(tensors)], [], read)


@contextlib.contextmanager
def _pickled(path: Path) -> Iterator[Source]:
    libraries = str(Path(torch.__file__).parent.parent)
    command = [sys.executable, "-I", "-B", unpickle.__file__, libraries, str(path.resolve())]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=os.environ | {"OMP_NUM_THREADS": "1"}, bufsize=0
        )
        try:

            def broken(when: str) -> CheckpointError:
                process.kill()
                code = process.wait()
                errors.seek(0)
                last = errors.read()[-2000:].decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit status {code}"]
                return CheckpointError(f"{path}: the process that reads it ended {when}: {_printable(last[0])}")

            entries, others = _listing(path, _line(process.stdout), broken)

            def read(entry: Stored) -> Tensor:
                tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
                try:
                    process.stdin.write(b"%d\n" % entry.index)
                    fill(process.stdout, memoryview(tensor.view(-1).view(torch.uint8).numpy()), None, entry.name)
                except (OSError, CheckpointError):
                    raise broken(f"at {entry.name:.120}") from None
                return tensor

            yield Source(str(path), entries, others, read)
        finally:
            process.kill()
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _line(pipe) -> bytes:
    """The first line of a pipe, without its end; what comes before the end of the pipe if there is none, or before the limit."""
    parts, size = [], 0
    while size <= _MAX_LISTING and (part := pipe.read(65_536)):
        parts.append(part)
        size += len(part)
        if part.endswith(b"\n"):  # the process sends nothing more until it is asked
            break
    return b"".join(parts)[: _MAX_LISTING + 1]


def _listing(path: Path, line: bytes, broken) -> tuple[list[Stored], list[str]]:
    if not line.endswith(b"\n"):
        raise broken("before it listed the tensors")
    try:
        answer = strict_json(line, f"{path}: listing")
        if "error" in answer:
            raise _refused(path, str(answer["kind"]), str(answer["error"]))
        entries = [_stored(path, i, *described) for i, described in enumerate(answer["tensors"])]
        return entries, [_printable(other)[:200] for other in answer["others"]]
    except (KeyError, TypeError) as error:  # what the file has made of the process speaks
        raise CheckpointError(f"{path}: the process that reads it answers nonsense ({type(error).__name__})") from None


def _stored(path: Path, index: int, parts: list[str], dtype: str, shape: list[int]) -> Stored:
    name = _printable(".".join(parts))
    label = f"{path}: tensor {name!r:.120}"
    if dtype not in _NAMES:
        raise CheckpointError(f"{label} has dtype {_printable(dtype):.40}, expected one of {', '.join(_NAMES)}")
    if len(shape) > 8 or not all(type(n) is int and 0 < n < 1 << 63 for n in shape):
        raise CheckpointError(f"{label} has shape {shape!r:.80}, expected at most 8 positive integers")
    entry = Stored(tuple(parts), _NAMES[dtype], tuple(shape), index)
    if entry.nbytes > path.stat().st_size:  # a view that repeats its elements
        raise CheckpointError(f"{label} has {entry.nbytes:,} bytes, expected no more than the {path.stat().st_size:,} of the file")
    return entry


def _refused(path: Path, kind: str, message: str) -> CheckpointError:
    if kind == "Refused":
        return CheckpointError(f"{path}: not opened: {_printable(message)}")
    if kind == "UnpicklingError":  # torch's own message ends in advice to run the code after all: not repeated
        what = re.search(r"GLOBAL (\S+)|Unsupported [^\n]{1,100}", message)
        name = f" ({_printable(what[1] or what[0])[:120]})" if what else ""
        return CheckpointError(f"{path}: holds more than tensors in dictionaries{name}; nothing of it was run, no other way is tried")
    reason = _printable(message.splitlines()[0] if message else kind)[:300]
    return CheckpointError(f"{path}: damaged, or not written by torch.save: {reason}")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(text))


def sha256(path: str | os.PathLike[str], advance: Callable[[int], None] = lambda count: None) -> str:
    """Hex digest of a file; advance(bytes) tells how far it is."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Hex digest of the bytes of a contiguous CPU tensor."""
    return hashlib.sha256(memoryview(tensor.reshape(-1).view(torch.uint8).numpy())).hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity; true for integers."""
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
