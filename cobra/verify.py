"""Say what is in a checkpoint, and what would be wrong with it: every tensor with its dtype, shape and sha256, then the differences.

A folder is compared with its own config.json, or with another one; a single file with the config that is named, if any. Understood
are our folders, official ones, Mamba language models of mamba_ssm and transformers, and the files of vision towers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cobra_kernels.errors import CobraKernelsError
from cobra_kernels.modules import pretrained

from . import checkpoint, convert
from .checkpoint import CONFIG, MANIFEST, OFFICIAL, TOKENIZER
from .config import MAX_CONFIG_BYTES, PRESETS, CobraConfig, parse_config, strict_json
from .errors import CheckpointError
from .source import Source, is_finite, open_source, sha256, tensor_sha256

Say = Callable[[str], None]
Begin = Callable[[int], Callable[[int], None]]


@dataclass
class Report:
    """What was found."""

    what: str
    tensors: int = 0
    problems: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)  # tensors with NaN or infinity

    @property
    def is_right(self) -> bool:
        return not self.problems and not self.unfit

    def summary(self) -> list[str]:
        """The last lines: what is wrong, or that nothing is."""
        unfit = [checkpoint.listed("with NaN or infinity", self.unfit)] if self.unfit else []
        verdict = "nothing is wrong" if self.is_right else "something is wrong"
        return [*(f"wrong: {problem}" for problem in self.problems + unfit), f"{self.what}: {self.tensors:,} tensors, {verdict}"]

    @contextlib.contextmanager
    def catch(self) -> Iterator[None]:
        """An error of a part is a problem of the whole."""
        try:
            yield
        except (CheckpointError, CobraKernelsError) as error:
            self.problems.append(str(error))


def verify(
    path: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, *, say: Say = print, begin: Begin | None = None
) -> Report:
    """Report on a folder or a file; `say` gets each line as it is known. Raises CheckpointError for what cannot be read at all.

    against: a config.json, a folder with one, or the name of a preset. begin: as in `convert`.
    """
    path = Path(path)
    begin = begin or (lambda total: lambda count: None)
    if not path.is_dir():
        return _file(path, None if against is None else _config(against), say, begin)
    document = strict_json(_bytes(path / CONFIG, MAX_CONFIG_BYTES), CONFIG) if against is None or (path / CONFIG).exists() else {}
    if against is None and isinstance(document, dict) and "format" not in document and "model" not in document:
        return _language_model(path, document, say, begin)
    config = _config(path if against is None else against)
    if (path / OFFICIAL).exists() and not (path / checkpoint.WEIGHTS).exists() and not (path / checkpoint.INDEX).exists():
        report = _file(path / OFFICIAL, config, say, begin)
        report.what = f"{path} as {config.model_id}"
        return report
    return _ours(path, config, say, begin)


def _bytes(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _config(against: str | os.PathLike[str]) -> CobraConfig:
    if str(against) in PRESETS and not os.path.exists(against):
        return PRESETS[str(against)]
    path = Path(against)
    return parse_config(_bytes(path / CONFIG if path.is_dir() else path, MAX_CONFIG_BYTES))


def _tell(report: Report, say: Say, name: str, dtype: str, tensor: Tensor) -> None:
    shape = "x".join(map(str, tensor.shape)) or "()"
    say(f"{dtype:5} {shape:16} {tensor_sha256(tensor)}  {name}")
    report.tensors += 1
    if not is_finite(tensor):
        report.unfit.append(name)


def _all(report: Report, source: Source, say: Say, advance: Callable[[int], None]) -> None:
    for entry in source.entries:
        tensor = source.read(entry)
        advance(tensor.nbytes)
        _tell(report, say, entry.name, entry.dtype, tensor)
    for other in source.others:
        say(f"not a tensor: {other}")


def _total(entries: Iterable) -> int:
    return sum(entry.nbytes for entry in entries)


def _ours(directory: Path, config: CobraConfig, say: Say, begin: Begin) -> Report:
    report = Report(f"{directory} as {config.model_id}")
    digests = {}
    with report.catch():
        digests = checkpoint.read_manifest(directory, False)
        if digests:
            checkpoint.compare_digest(digests, CONFIG, sha256(directory / CONFIG))
    with report.catch():
        if checkpoint.load_tokenizer(directory, config, digests) is None:
            say(f"no {TOKENIZER}: the model will take and return token ids only")
    if not digests:
        say(f"no {MANIFEST}: the bytes are compared with nothing")
    with contextlib.ExitStack() as stack:
        files = checkpoint.open_weights(stack, directory, digests)
        entries = [entry for weights in files for entry in weights.entries]
        report.problems += checkpoint.differences(entries, checkpoint.expected_shapes(checkpoint.meta_model(config)))
        advance = begin(sum(entry.end - entry.begin for entry in entries))
        for weights in files:
            say(f"{weights.name}:")
            with report.catch():
                for entry, tensor in checkpoint.read_weights(weights, digests):
                    advance(tensor.nbytes)
                    _tell(report, say, entry.name, entry.dtype, tensor)
    return report


def _file(path: Path, config: CobraConfig | None, say: Say, begin: Begin) -> Report:
    """One file: an official checkpoint, weights of ours, or a tower; its names decide."""
    report = Report(f"{path} as {config.model_id}" if config else str(path))
    with open_source(path) as source:
        advance = begin(path.stat().st_size + _total(source.entries))
        say(f"{path.name}: sha256 {sha256(path, advance)}")
        if config is not None:
            report.problems += _differences(source, config)
        _all(report, source, say, advance)
    return report


def _differences(source: Source, config: CobraConfig) -> list[str]:
    if any(entry.path[:2] == ("model", "llm_backbone") for entry in source.entries):
        plan = convert.plan_official(config, source, {}, towers_needed=False)
        return plan.problems
    shapes = checkpoint.expected_shapes(checkpoint.meta_model(config))
    if any(entry.name.split(".")[0] in ("llm", "projector", "vision") for entry in source.entries):
        return checkpoint.differences(source.entries, shapes)
    found = []
    for spec in config.vision.towers:  # whose tower it is, its names and shapes must tell
        problems: list[str] = []
        convert.plan_tower(spec, source, shapes, {}, problems)
        found.append(problems)
    return min(found, key=lambda problems: sum(map(len, problems)))


def _language_model(directory: Path, document: dict, say: Say, begin: Begin) -> Report:
    """A Mamba of mamba_ssm or transformers."""
    report = Report(f"{directory} as a Mamba language model")
    config = None
    with report.catch():
        config = pretrained.parse_config(document)
    paths = pretrained.weight_files(directory)
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(open_source(path)) for path in paths]
        if config is not None:
            stored = {entry.name: entry.shape for source in sources for entry in source.entries}
            report.problems += pretrained.differences(config, stored)
        advance = begin(sum(_total(source.entries) for source in sources))
        for path, source in zip(paths, sources):
            say(f"{path.name}:")
            _all(report, source, say, advance)
    return report
