"""Checkpoints: a directory of safetensors, checked against the model that its config implies before anything is allocated.

    config.json      model.safetensors | model-00001-of-0000N.safetensors + model.safetensors.index.json
    tokenizer.json   manifest.json (optional): {"sha256": {file name: hex digest}}

Weights are fp32, bf16 or fp16, all alike, except `A_log`, `D` and `dt_proj.bias`, which are fp32: the state decays by them.
The tied LM head is stored once, as the embedding. Nothing here unpickles: an official `latest-checkpoint.pt` is converted once,
by `cobra convert`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from .config import MAX_CONFIG_BYTES, CobraConfig, parse_config, strict_json
from .errors import CheckpointError
from .tokenizer import MAX_BYTES as MAX_TOKENIZER_BYTES
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .model import CobraVLM

CONFIG, TOKENIZER, MANIFEST = "config.json", "tokenizer.json", "manifest.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OFFICIAL = Path("checkpoints", "latest-checkpoint.pt")

LISTED = 10  # names in a message, of each kind of difference
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 20_000
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 1024
SHARD_BYTES = 4 << 30
CHUNK = 16 << 20

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_KEPT_FP32 = (".mixer.A_log", ".mixer.D", ".mixer.dt_proj.bias")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")

# Where the towers of the official models come from: they are not part of a latest-checkpoint.pt.
_TOWER_FILES = {
    ("dinov2", 1024): "vit_large_patch14_reg4_dinov2.lvd142m",
    ("siglip", 1152): "ViT-SO400M-14-SigLIP{-px}",
    ("siglip", 768): "ViT-B-16-SigLIP{-px}",
    ("clip", 1024): "vit_large_patch14_clip_{px}.openai",
    ("clip", 768): "vit_base_patch16_clip_{px}.openai",
    ("in1k", 1024): "vit_large_patch16_224.augreg_in21k_ft_in1k",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file; begin and end count from the first byte of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def listed(word: str, names: Iterable[str]) -> str:
    """'3 missing: a, b, c': at most ten of them."""
    names = sorted(names)
    return f"{len(names)} {word}: {', '.join(name[:160] for name in names[:LISTED])}{', ...' if len(names) > LISTED else ''}"


# ------------------------------------------------------------------------------------------------ headers


def keeps_fp32(name: str) -> bool:
    """Whether a tensor is fp32 in every checkpoint: the state decays by it."""
    return name.endswith(_KEPT_FP32)


def _is_index(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def parse_header(header: bytes, data_bytes: int, what: str, dtypes: Mapping[str, torch.dtype] = DTYPES) -> list[Entry]:
    """The tensors of a safetensors header, in file order; everything that two readers could read differently is refused.

    header: the JSON text. data_bytes: bytes after it, which the tensors must fill exactly: ascending, without holes or
    overlap. what: the file's name, for messages. dtypes: those accepted. Raises CheckpointError; allocates nothing of the sizes
    it reads.
    """
    document = strict_json(header, what)
    if not header.startswith(b"{") or not isinstance(document, dict):
        raise CheckpointError(f"{what}: header is no JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{what}: __metadata__ is no object of strings")
    if not 1 <= len(document) <= MAX_TENSORS:
        raise CheckpointError(f"{what}: has {len(document):,} tensors, expected 1 to {MAX_TENSORS:,}")
    entries = []
    for name, value in document.items():
        label = f"{what}: tensor {name!r:.120}"
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{label} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in dtypes:
            raise CheckpointError(f"{label} has dtype {dtype!r:.40}, expected one of {', '.join(dtypes)}")
        if not isinstance(shape, list) or len(shape) > 8 or not all(_is_index(n) and n > 0 for n in shape):
            raise CheckpointError(f"{label} has shape {shape!r:.80}, expected at most 8 positive integers")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_index(n) for n in offsets):
            raise CheckpointError(f"{label} has data_offsets {offsets!r:.80}, expected two integers")
        nbytes = math.prod(shape) * dtypes[dtype].itemsize  # Python integers do not overflow
        if offsets[1] - offsets[0] != nbytes:
            raise CheckpointError(
                f"{label} spans {offsets[1] - offsets[0]:,} bytes, expected {nbytes:,}; shape {shape} and {dtype} decide"
            )
        start = 8 + len(header)
        entries.append(Entry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1]))
    entries.sort(key=lambda entry: entry.begin)
    position = 8 + len(header)
    for entry in entries:
        if entry.begin != position:
            raise CheckpointError(
                f"{what}: tensor {entry.name!r:.120} begins at byte {entry.begin:,}, expected {position:,}"
            )
        position = entry.end
    if position != 8 + len(header) + data_bytes:
        raise CheckpointError(
            f"{what}: file has {8 + len(header) + data_bytes:,} bytes, expected {position:,}; the last tensor ends there"
        )
    return entries


def read_header(file: BinaryIO, what: str, dtypes: Mapping[str, torch.dtype] = DTYPES) -> tuple[bytes, list[Entry]]:
    """First bytes (length and header) and tensors of an open safetensors file; leaves it at the first tensor."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) != 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{what}: header has {length:,} bytes in a file of {size:,}, expected 2 to {MAX_HEADER_BYTES:,} and to fit"
        )
    header = file.read(length)
    if len(header) != length:
        raise CheckpointError(f"{what}: ends within its header")
    return prefix + header, parse_header(header, size - 8 - length, what, dtypes)


# ------------------------------------------------------------------------------------------------ directories


@contextlib.contextmanager
def _open(directory: Path, name: str) -> Iterator[BinaryIO]:
    """A regular file of the directory, not reached through a link, unbuffered; any OSError becomes a CheckpointError."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        with open(os.open(directory / name, flags), "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{directory / name}: is no regular file")
            yield file
    except OSError as error:
        link = error.errno == errno.ELOOP
        reason = "is a symbolic link, expected a regular file" if link else f"cannot be read: {error.strerror}"
        raise CheckpointError(f"{directory / name}: {reason}") from error


def _read(directory: Path, name: str, limit: int) -> bytes:
    with _open(directory, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{directory / name}: has {size:,} bytes, expected at most {limit:,}")
        return file.read(limit)


def _exists(directory: Path, name: str) -> bool:
    return os.path.lexists(directory / name)


def _convert_line(directory: Path, config: CobraConfig) -> str:
    towers = ""
    for tower in config.vision.towers:
        file, px = _TOWER_FILES.get((tower.kind, tower.width), tower.kind), tower.image_size
        file = file.replace("{px}", str(px)).replace("{-px}", f"-{px}" if px != 224 else "")
        towers += f" --{tower.name} {file}.safetensors"
    source, target = shlex.quote(str(directory)), shlex.quote(f"{directory}-safetensors")
    return f"cobra convert {source} {target}{towers} --tokenizer tokenizer.json"


def read_config(directory: str | os.PathLike[str]) -> CobraConfig:
    """The config of a checkpoint directory; raises CheckpointError, for an official one with the way to convert it."""
    return _read_config(Path(directory))[0]


def _read_config(directory: Path) -> tuple[CobraConfig, str]:
    """The config and the sha256 of its file."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is no directory, expected one with {CONFIG} and {WEIGHTS}")
    data = _read(directory, CONFIG, MAX_CONFIG_BYTES)
    config = parse_config(data)
    if not _exists(directory, WEIGHTS) and not _exists(directory, INDEX):
        if (directory / OFFICIAL).exists():
            raise CheckpointError(
                f"{directory}: {OFFICIAL} is a pickle, which can run code when it is loaded, and has no vision towers. "
                f"Convert it once, with the towers' weights and the tokenizer of the language model:\n"
                f"    {_convert_line(directory, config)}"
            )
        raise CheckpointError(f"{directory}: has neither {WEIGHTS} nor {INDEX}")
    return config, hashlib.sha256(data).hexdigest()


def _read_index(directory: Path, digests: Mapping[str, str]) -> dict[str, set[str]]:
    """Shard file name -> names of its tensors."""
    data = _read(directory, INDEX, MAX_INDEX_BYTES)
    compare_digest(digests, INDEX, hashlib.sha256(data).hexdigest())
    index = strict_json(data, INDEX)
    if not isinstance(index, dict) or not {"weight_map"} <= set(index) <= {"metadata", "weight_map"}:
        raise CheckpointError(f"{INDEX}: is no object of weight_map and metadata")
    weight_map = index["weight_map"]
    if not isinstance(weight_map, dict) or not 1 <= len(weight_map) <= MAX_TENSORS:
        raise CheckpointError(f"{INDEX}: weight_map is no object of 1 to {MAX_TENSORS:,} tensors")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{INDEX}: file is {file!r:.120}, expected a *.safetensors name without a folder")
        shards.setdefault(file, set()).add(name)
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(f"{INDEX}: names {len(shards):,} files, expected at most {MAX_SHARDS:,}")
    return shards


def read_manifest(directory: Path, required: bool) -> dict[str, str]:
    """File name -> sha256; empty without a manifest."""
    if not _exists(directory, MANIFEST):
        if required:
            raise CheckpointError(f"{directory}: has no {MANIFEST}, expected one; require_manifest decides")
        return {}
    manifest = strict_json(_read(directory, MANIFEST, MAX_CONFIG_BYTES), MANIFEST)
    digests = manifest.get("sha256") if isinstance(manifest, dict) and len(manifest) == 1 else None
    if not isinstance(digests, dict) or not all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in digests.values()):
        raise CheckpointError(f'{MANIFEST}: is no {{"sha256": {{file name: digest}}}}')
    return digests


def compare_digest(digests: Mapping[str, str], name: str, digest: str) -> None:
    if digests and digests.get(name) != digest:
        raise CheckpointError(f"{name}: sha256 is {digest}, expected {digests.get(name, 'none')}; {MANIFEST} decides")


# ------------------------------------------------------------------------------------------------ model against files


def meta_model(config: CobraConfig) -> CobraVLM:
    """The model that a config implies, without memory for its weights."""
    from .model import CobraVLM

    return CobraVLM(config, device="meta")


def expected_shapes(model: CobraVLM) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model's checkpoint: its state_dict, tied weights once."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    kept = set(first.values())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - kept
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def differences(entries: list[Entry], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with all tensors of all files, next to the model's; one line a kind, its first ten names.

    Right are the same names and shapes, and one dtype (the first that comes) beside the tensors kept in fp32.
    """
    names = {entry.name for entry in entries}
    problems = []
    for word, difference in (("missing", shapes.keys() - names), ("unexpected", names - shapes.keys())):
        if difference:
            problems.append(listed(word, difference))
    if len(names) != len(entries):
        problems.append(f"{len(entries) - len(names)} given in two files")
    known = [entry for entry in entries if entry.name in shapes]
    shape = [f"{e.name} has shape {e.shape}, expected {shapes[e.name]}" for e in known if e.shape != shapes[e.name]]
    if shape:
        problems.append(f"{listed('of a wrong shape', shape)}; the config decides")
    stored = next((entry.dtype for entry in known if not keeps_fp32(entry.name)), None)
    low = [f"{e.name} is {e.dtype}, expected F32" for e in known if keeps_fp32(e.name) and e.dtype != "F32"]
    if low:
        problems.append(f"{listed('too coarse', low)}; the state decays by it")
    mixed = [f"{e.name} is {e.dtype}, expected {stored}" for e in known if not keeps_fp32(e.name) and e.dtype != stored]
    if mixed:
        problems.append(f"{listed('of another dtype', mixed)} as the tensors before it")
    return problems


def check_entries(entries: list[Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError if there are differences."""
    problems = differences(entries, shapes)
    if problems:
        raise CheckpointError(f"checkpoint: tensors differ from the config's: {'; '.join(problems)}")


@dataclass(frozen=True)
class WeightFile:
    """An open safetensors file of a checkpoint; nothing after its header has been read."""

    name: str
    file: BinaryIO
    head: bytes
    entries: list[Entry]


def open_weights(stack: contextlib.ExitStack, directory: Path, digests: Mapping[str, str]) -> list[WeightFile]:
    """The weight files of a directory, until the stack closes; each holds what the index says, if there is one."""
    single, sharded = _exists(directory, WEIGHTS), _exists(directory, INDEX)
    if single and sharded:
        raise CheckpointError(f"{directory}: has {WEIGHTS} and {INDEX}, expected one of them")
    opened = []
    for name, names in (_read_index(directory, digests) if sharded else {WEIGHTS: None}).items():
        file = stack.enter_context(_open(directory, name))
        head, entries = read_header(file, name)
        if names is not None and names != {entry.name for entry in entries}:
            raise CheckpointError(f"{name}: its tensors are not those that {INDEX} gives to it")
        opened.append(WeightFile(name, file, head, entries))
    return opened


def read_weights(weights: WeightFile, digests: Mapping[str, str]) -> Iterator[tuple[Entry, Tensor]]:
    """The tensors of a file, on the CPU, in file order and without holes: one pass reads, and hashes, all of it."""
    digest = hashlib.sha256(weights.head) if digests else None
    for entry in weights.entries:
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        fill(weights.file, memoryview(tensor.view(-1).view(torch.uint8).numpy()), digest, f"{weights.name}: {entry.name}")
        yield entry, tensor
    if digest is not None:
        compare_digest(digests, weights.name, digest.hexdigest())


def _read_tensors(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], digests: Mapping[str, str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """All weights, on the CPU. Every header is checked before the first tensor is allocated."""
    with contextlib.ExitStack() as stack:
        opened = open_weights(stack, directory, digests)
        check_entries([entry for weights in opened for entry in weights.entries], shapes)
        tensors = {}
        for weights in opened:
            for entry, tensor in read_weights(weights, digests):
                tensors[entry.name] = tensor if dtype is None or keeps_fp32(entry.name) else tensor.to(dtype)
    return tensors


def fill(file: BinaryIO, buffer: memoryview, digest: hashlib._Hash | None, what: str) -> None:
    while len(buffer):
        count = file.readinto(buffer[:CHUNK])
        if not count:
            raise CheckpointError(f"{what}: file ends early")
        if digest is not None:
            digest.update(buffer[:count])
        buffer = buffer[count:]


def load(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    require_manifest: bool = False,
) -> CobraVLM:
    """The model of a checkpoint directory, frozen and in eval mode.

    device: where it goes. dtype: of its weights, as stored if None; `A_log`, `D` and `dt_proj.bias` stay fp32.
    require_manifest: refuse a directory without manifest.json; one that is there is always checked.
    Raises CheckpointError. Nothing of a tensor's size is allocated before every header has been compared with the config.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise CheckpointError(f"load: dtype is {dtype}, expected float32, bfloat16, float16 or None")
    directory = Path(directory)
    config, config_digest = _read_config(directory)
    digests = read_manifest(directory, require_manifest)
    compare_digest(digests, CONFIG, config_digest)
    tokenizer = load_tokenizer(directory, config, digests)
    model = meta_model(config)
    weights = _read_tensors(directory, expected_shapes(model), digests, dtype)
    model.load_state_dict(weights, strict=False, assign=True)  # strict by expected_shapes; only tied names are left out
    model.llm.tie_weights()
    model.tokenizer = tokenizer
    return model.to(device).eval().requires_grad_(False)


def load_into(model: CobraVLM, directory: str | os.PathLike[str], *, require_manifest: bool = False) -> None:
    """Copy the weights of a directory into a model of the same config, keeping its dtypes and device.

    Everything is read and checked first: on CheckpointError the model is as it was.
    """
    directory = Path(directory)
    config, config_digest = _read_config(directory)
    if (config.vision, config.projector_kind, config.lm) != (
        model.config.vision,
        model.config.projector_kind,
        model.config.lm,
    ):
        raise CheckpointError(
            f"load_into: {directory} is {config.model_id!r}, whose shape is not that of the model, {model.config.model_id!r}"
        )
    digests = read_manifest(directory, require_manifest)
    compare_digest(digests, CONFIG, config_digest)
    load_tokenizer(directory, config, digests)
    weights = _read_tensors(directory, expected_shapes(model), digests, None)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            state[name].copy_(tensor)


def load_tokenizer(directory: Path, config: CobraConfig, digests: Mapping[str, str]) -> Tokenizer | None:
    """The tokenizer, if there is one."""
    if not _exists(directory, TOKENIZER):
        return None
    data = _read(directory, TOKENIZER, MAX_TOKENIZER_BYTES)
    compare_digest(digests, TOKENIZER, hashlib.sha256(data).hexdigest())
    tokenizer = Tokenizer.from_json(data)
    tokenizer.check(config.lm)
    return tokenizer


# ------------------------------------------------------------------------------------------------ saving


def save(model: CobraVLM, directory: str | os.PathLike[str], *, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model, its tokenizer and a manifest into a directory that has no checkpoint yet.

    Every file appears under its name only when it is complete, the manifest last. Weights keep their dtypes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    there = [name for name in (CONFIG, WEIGHTS, INDEX, TOKENIZER, MANIFEST) if _exists(directory, name)]
    if there:
        raise CheckpointError(f"save: {directory} has {', '.join(there)}, expected a directory without a checkpoint")
    state = model.state_dict()
    plan = {name: (state[name].dtype, tuple(state[name].shape)) for name in expected_shapes(model)}
    tokenizer = None if model.tokenizer is None else model.tokenizer.to_json()
    write(directory, model.config, tokenizer, plan, lambda name: state[name].detach().cpu(), max_shard_bytes=max_shard_bytes)


def write(
    directory: Path,
    config: CobraConfig,
    tokenizer: bytes | None,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], Tensor],
    *,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint one tensor at a time.

    plan: name -> (dtype, shape), in the order of the files. tensor(name): the tensor, on the CPU; asked once each, in that order,
    and let go before the next one.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in plan.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        digests[file] = _publish(directory, file, _safetensors({name: plan[name] for name in names}, tensor))
        weight_map |= dict.fromkeys(names, file)
    texts = {CONFIG: config.to_json().encode()}
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in plan.values())
        texts[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer
    for file, data in texts.items():
        digests[file] = _publish(directory, file, [data])
    _publish(directory, MANIFEST, [json.dumps({"sha256": digests}, indent=2).encode()])


def _safetensors(
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensor: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header padded to 8 bytes, tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in plan.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, (dtype, shape) in plan.items():
        value = tensor(name)
        if value.dtype != dtype or tuple(value.shape) != shape:
            raise CheckpointError(f"write: {name} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}; the plan decides")
        yield memoryview(value.contiguous().view(-1).view(torch.uint8).numpy())


def _publish(directory: Path, name: str, parts: Iterable[bytes | memoryview]) -> str:
    """Write a file, which gets its name when it is complete; returns its sha256."""
    digest, part = hashlib.sha256(), directory / f"{name}.part"
    with open(part, "wb") as file:
        for data in parts:
            file.write(data)
            digest.update(data)
    os.replace(part, directory / name)
    return digest.hexdigest()
