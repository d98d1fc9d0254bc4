"""The official directory (config.json, checkpoints/latest-checkpoint.pt) to ours, once.

    convert("cobra+3b", "cobra-3b", towers={"dino": "dino.safetensors", "siglip": "siglip.bin"}, tokenizer="tokenizer.json")

The pickle is opened by another process that can do nothing but read (unpickle.py). Every name and shape of every file is compared
with the model before the first byte is written; then tensors pass through one at a time, and the folder appears when it is whole.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, keymaps
from .checkpoint import CONFIG, OFFICIAL, expected_shapes, keeps_fp32, listed, meta_model
from .config import MAX_CONFIG_BYTES, CobraConfig, TowerConfig, parse_config
from .errors import CheckpointError
from .keymaps import EMBEDDING, HEAD, Take
from .source import Source, Stored, is_finite, open_source
from .tokenizer import MAX_BYTES as MAX_TOKENIZER_BYTES
from .tokenizer import Tokenizer

FLOATS = ("F32", "BF16", "F16", "F64")

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Origin:
    """Where one tensor of ours comes from."""

    source: Source
    entry: Stored
    take: Take


@dataclass(frozen=True)
class Plan:
    """What a conversion will do; made from headers alone."""

    config: CobraConfig
    shapes: dict[str, tuple[int, ...]]  # of our tensors
    origins: dict[str, Origin]
    head: Stored | None  # a second copy of the embedding, if there is one
    problems: list[str]

    @property
    def stored_bytes(self) -> int:
        """Bytes that will be read, for a progress bar."""
        read = {(o.source.what, o.entry.index): o.entry.nbytes for o in self.origins.values()}
        return sum(read.values()) + (self.head.nbytes if self.head else 0)

    @property
    def order(self) -> list[str]:
        """Our names as they are written: what comes of one tensor (query, key and value of one matrix) side by side."""
        first: dict[tuple[str, int], list[str]] = {}
        for name in self.shapes:
            first.setdefault((self.origins[name].source.what, self.origins[name].entry.index), []).append(name)
        return [name for names in first.values() for name in names]


def read_source_config(directory: Path) -> CobraConfig:
    """The config.json of an official directory, links followed: a download cache is full of them."""
    path = directory / CONFIG
    try:
        with open(path, "rb") as file:
            return parse_config(file.read(MAX_CONFIG_BYTES + 1))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def plan_official(config: CobraConfig, official: Source, towers: Mapping[str, Source], *, towers_needed: bool = True) -> Plan:
    """Compare an official checkpoint and its towers' files with the model; differences end up in `problems`, ten of each."""
    shapes = expected_shapes(meta_model(config))
    by_path = {entry.path: entry for entry in official.entries}
    origins: dict[str, Origin] = {}
    problems: list[str] = []

    takes = keymaps.official(shapes)
    head = None if HEAD in shapes else by_path.get(("model", "llm_backbone", HEAD))
    allowed = {path for path, _ in takes.values()} | {("model", "llm_backbone", HEAD)}
    extra = [entry.name for entry in official.entries if entry.path not in allowed and entry.path[:2] != ("model", "vision_backbone")]
    missing = [".".join(path) for path, _ in takes.values() if path not in by_path]
    found = {name: (by_path.get(path), take) for name, (path, take) in takes.items()}
    _take_all(official, found, shapes, origins, missing, extra, problems)
    if head is not None and head.shape != shapes[EMBEDDING]:
        problems.append(f"{official.what}: {head.name} has shape {head.shape}, expected {shapes[EMBEDDING]}; it is tied to the embedding")

    trained = {path[2]: entry for path, entry in by_path.items() if path[:2] == ("model", "vision_backbone") and len(path) == 3}
    within = keymaps.towers_in(config, trained)
    for spec in config.vision.towers:
        if spec.name in towers:
            plan_tower(spec, towers[spec.name], shapes, origins, problems)
        elif spec.name in within:
            prefix = within[spec.name]
            entries = {name[len(prefix) :]: entry for name, entry in trained.items() if name.startswith(prefix)}
            plan_tower(spec, official, shapes, origins, problems, entries)
        elif towers_needed:
            problems.append(f"tower {spec.name}: no file is given, and {official.what} does not hold it; give --{spec.name} FILE")
    return Plan(config, shapes, origins, head, problems)


def plan_tower(
    spec: TowerConfig,
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    origins: dict[str, Origin],
    problems: list[str],
    entries: Mapping[str, Stored] | None = None,
) -> None:
    """Add the tensors of one tower to `origins`, and what is wrong with its file to `problems`. entries: its part of the file, by name."""
    if entries is None:
        entries = {entry.name: entry for entry in _unwrapped(source)}
    prefix = f"vision.towers.{spec.name}."
    targets = [name[len(prefix) :] for name in shapes if name.startswith(prefix)]
    try:
        takes, extra = keymaps.tower(spec, targets, entries)
    except CheckpointError as error:
        problems.append(f"{source.what}: {error}")
        return
    missing = {take.key for take in takes.values() if take.key not in entries}
    found = {prefix + target: (entries.get(take.key), take) for target, take in takes.items()}
    _take_all(source, found, shapes, origins, missing, extra, problems)


def _take_all(source: Source, found: Mapping[str, tuple[Stored | None, Take]], shapes, origins, missing, extra, problems) -> None:
    wrong = set()
    for name, (entry, take) in found.items():
        if entry is None:
            continue
        want = keymaps.fits(take, entry.shape, shapes[name])
        if want:
            wrong.add(f"{entry.name} has shape {entry.shape}, expected {want}")
        elif entry.dtype not in FLOATS:
            wrong.add(f"{entry.name} is {entry.dtype}, expected one of {', '.join(FLOATS)}")
        origins[name] = Origin(source, entry, take)
    kinds = (("missing", missing), ("unexpected", extra), ("of a wrong shape or dtype", wrong))
    parts = [listed(word, names) for word, names in kinds if names]
    if parts:
        problems.append(f"{source.what}: {'; '.join(parts)}")


def _unwrapped(source: Source) -> list[Stored]:
    """The tensors of a tower's file, without one dictionary around all of them ("state_dict", "model")."""
    heads = {entry.path[0] for entry in source.entries if len(entry.path) > 1}
    if len(heads) == 1 and all(len(entry.path) > 1 for entry in source.entries):
        return [Stored(e.path[1:], e.dtype, e.shape, e.index) for e in source.entries]
    return source.entries


# ------------------------------------------------------------------------------------------------ values


class Reader:
    """Makes our tensors, one at a time; keeps the last one read, of which three may be made (query, key, value)."""

    def __init__(self, plan: Plan, dtype: torch.dtype, advance: Callable[[int], None]):
        self.plan, self.dtype, self.advance = plan, dtype, advance
        self._last: tuple[Source | None, int, Tensor | None] = (None, 0, None)

    def __call__(self, name: str) -> Tensor:
        origin = self.plan.origins[name]
        stored = self._read(origin.source, origin.entry)
        if name == EMBEDDING and self.plan.head is not None:
            head = origin.source.read(self.plan.head)
            self.advance(head.nbytes)
            if head.dtype != stored.dtype or not torch.equal(head, stored):
                raise CheckpointError(f"{origin.source.what}: {HEAD} is not {EMBEDDING}, expected the same values; the config ties them")
        tensor = keymaps.make(origin.take, stored, self.plan.shapes[name]).to(target_dtype(name, self.dtype))
        if not is_finite(tensor):
            raise CheckpointError(f"{origin.source.what}: {origin.entry.name} has NaN, infinity, or values beyond {tensor.dtype}")
        return tensor

    def _read(self, source: Source, entry: Stored) -> Tensor:
        if self._last[0] is not source or self._last[1] != entry.index:
            self._last = (None, 0, None)  # free it before the next one is there
            self._last = (source, entry.index, source.read(entry))
            self.advance(entry.nbytes)
        return self._last[2]


def target_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but fp32 for what the state decays by."""
    return torch.float32 if keeps_fp32(name) else dtype


# ------------------------------------------------------------------------------------------------ the whole


def convert(
    source: PathLike,
    target: PathLike,
    *,
    towers: Mapping[str, PathLike] | None = None,
    tokenizer: PathLike | None = None,
    dtype: torch.dtype = torch.bfloat16,
    begin: Callable[[int], Callable[[int], None]] | None = None,
) -> CobraConfig:
    """Convert an official directory; returns the config. Raises CheckpointError, and then there is no `target`.

    source: has config.json and checkpoints/latest-checkpoint.pt. target: a folder that does not exist, or is empty.
    towers: tower name ("dino", "siglip", ..) -> .safetensors, .pt or .bin file with timm, open_clip or Hugging Face names; may lack
    those that the checkpoint holds. tokenizer: a tokenizer.json; without one the model takes and returns ids only.
    dtype: of the weights beside `A_log`, `D` and `dt_proj.bias`, which are fp32.
    begin(total bytes) is called when reading starts and returns what is called with each number of bytes read.
    """
    source, target, towers = Path(source), Path(target), dict(towers or {})
    if dtype not in checkpoint.DTYPES.values():
        raise CheckpointError(f"convert: dtype is {dtype}, expected float32, bfloat16 or float16")
    config = read_source_config(source)
    unknown = towers.keys() - {spec.name for spec in config.vision.towers}
    if unknown:
        raise CheckpointError(
            f"convert: towers has {', '.join(sorted(unknown))}, expected {', '.join(spec.name for spec in config.vision.towers)}; "
            f"{source / CONFIG} decides"
        )
    text = _tokenizer(tokenizer, config)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"convert: {target} exists, expected a new or empty folder")
    with contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(open_source(path)) for name, path in towers.items()}
        plan = plan_official(config, stack.enter_context(open_source(source / OFFICIAL)), opened)
        if plan.problems:
            raise CheckpointError("convert: the files are not the model's:\n  " + "\n  ".join(plan.problems))
        outputs = {name: (target_dtype(name, dtype), plan.shapes[name]) for name in plan.order}
        try:
            _write(target, config, text, outputs, Reader(plan, dtype, begin(plan.stored_bytes) if begin else lambda count: None))
        except OSError as error:
            raise CheckpointError(f"convert: {target}: cannot be written: {error.strerror}") from error
    return config


def _tokenizer(path: PathLike | None, config: CobraConfig) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    Tokenizer.from_json(data).check(config.lm)
    return data


def _write(target: Path, config: CobraConfig, tokenizer: bytes | None, outputs, reader: Reader) -> None:
    """Into a folder beside the target, which takes its name when it is whole and is removed when anything fails."""
    need = sum(math.prod(shape) * dtype.itemsize for dtype, shape in outputs.values())
    parent = Path(os.path.abspath(target)).parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise CheckpointError(f"convert: {parent} has {free / 1e9:.1f} GB free, expected {need / 1e9:.1f} GB for {target.name}")
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=parent))
    try:
        checkpoint.write(part, config, tokenizer, outputs, reader)
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)  # mkdtemp's is 0700
        os.rename(part, target)  # replaces an empty folder, and no other
    finally:
        shutil.rmtree(part, ignore_errors=True)
