"""Mamba-1 language models in folders, as mamba_ssm and transformers write them.

    config.json   mamba_ssm: d_model, n_layer, ssm_cfg, ..; transformers: "model_type": "mamba", hidden_size, state_size, ..
    weights       model.safetensors | model.safetensors.index.json with its shards | pytorch_model.bin

The two differ in two names: transformers has `backbone.embeddings` for `backbone.embedding`, and leaves a tied `lm_head.weight` out.
A pytorch_model.bin is read by `torch.load(weights_only=True)` and in no other way. Everything is compared before a model exists.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cobra_kernels import errors

from .lm import MambaConfig, MambaLMHeadModel

CONFIG, SAFE, INDEX, PICKLED = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
LISTED = 10
_KEPT = (".A_log", ".D", ".dt_proj.bias")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")

# transformers' name and default -> ours; the defaults are MambaConfig's of transformers
_TOP = {
    "hidden_size": ("d_model", 768),
    "num_hidden_layers": ("n_layer", 32),
    "vocab_size": ("vocab_size", 50280),
    "layer_norm_epsilon": ("norm_epsilon", 1e-5),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_word_embeddings": ("tie_embeddings", True),
}
_SSM = {
    "state_size": ("d_state", 16),
    "conv_kernel": ("d_conv", 4),
    "expand": ("expand", 2),
    "time_step_rank": ("dt_rank", "auto"),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
}


def parse_config(values: Mapping[str, Any], cls: type[MambaConfig] = MambaConfig) -> MambaConfig:
    """The config of either library, as a `cls`; raises ArgumentError for what is no Mamba-1 language model."""
    if not isinstance(values, Mapping):
        raise errors.ArgumentError(f"{CONFIG}: is {type(values).__name__}, expected an object")
    if "model_type" not in values:
        return cls.from_dict(values)
    if values["model_type"] != "mamba":
        raise errors.ArgumentError(f"{CONFIG}: model_type is {values['model_type']!r:.80}, expected 'mamba'")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise errors.ArgumentError(f"{CONFIG}: hidden_act is {values['hidden_act']!r:.80}, expected 'silu'")
    config = cls(
        **{ours: values.get(theirs, default) for theirs, (ours, default) in _TOP.items()},
        ssm_cfg={ours: values.get(theirs, default) for theirs, (ours, default) in _SSM.items()},
        pad_vocab_size_multiple=1,
    )
    inner = int(config.ssm_cfg["expand"]) * config.d_model
    if values.get("intermediate_size", inner) != inner:
        raise errors.ArgumentError(
            f"{CONFIG}: intermediate_size is {values['intermediate_size']!r:.80}, expected {inner} = expand * hidden_size"
        )
    return config


def read_config(folder: Path, cls: type[MambaConfig] = MambaConfig) -> MambaConfig:
    """The config.json of a folder."""
    path = folder / CONFIG
    try:
        return parse_config(json.loads(path.read_text()), cls)
    except OSError as error:
        raise errors.ArgumentError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, errors.ArgumentError):
            raise
        raise errors.ArgumentError(f"{path}: not valid JSON: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The files with a folder's weights; safetensors are preferred."""
    folder = Path(folder)
    if (folder / SAFE).is_file():
        return [folder / SAFE]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise errors.ArgumentError(f"{folder / INDEX}: is no object with a weight_map of file names") from None
        bad = [name for name in names if not isinstance(name, str) or not _FILE_NAME.fullmatch(name)]
        if bad:
            raise errors.ArgumentError(f"{folder / INDEX}: file is {bad[0]!r:.120}, expected a *.safetensors name without a folder")
        return [folder / name for name in names]
    if (folder / PICKLED).is_file():
        return [folder / PICKLED]
    raise errors.ArgumentError(f"{folder}: has none of {SAFE}, {INDEX}, {PICKLED}, expected one of them")


def our_name(name: str) -> str:
    return name.replace("backbone.embeddings.", "backbone.embedding.", 1)


def differences(config: MambaConfig, stored: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the names and shapes of files, next to the model of a config; a line a kind, its first ten."""
    shapes = {name: tuple(t.shape) for name, t in MambaLMHeadModel(config, device="meta").state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    twice = []
    for name, shape in stored.items():
        if our_name(name) in found:
            twice.append(name)
        found[our_name(name)] = tuple(shape)
    optional = {HEAD} if config.tie_embeddings else set()
    shape = [f"{n} has shape {s}, expected {shapes[n]}" for n, s in found.items() if n in shapes and s != shapes[n]]
    kinds = {
        "missing": shapes.keys() - found.keys() - optional,
        "unexpected": found.keys() - shapes.keys(),
        "given twice": twice,
        "of a wrong shape": shape,
    }
    return [_listed(word, names) for word, names in kinds.items() if names]


def _listed(word: str, names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} {word}: {', '.join(name[:160] for name in names[:LISTED])}{', ...' if len(names) > LISTED else ''}"


@contextlib.contextmanager
def _tensors(path: Path) -> Iterator[dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]]:
    """Name -> (shape, how to read it) of a file; values are read when they are asked for."""
    if path.name.endswith(".safetensors"):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise errors.ArgumentError(f"{path}: reading it needs the package safetensors, which is not installed") from None
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                yield {name: (shape, lambda name=name: file.get_tensor(name)) for name, shape in shapes.items()}
        except (SafetensorError, OSError) as error:
            raise errors.ArgumentError(f"{path}: damaged or unreadable: {error}") from None
        return
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds, and its text advises to run the file's code
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds code ({code[1]:.120}), which was not run" if code else f"damaged or unreadable ({type(error).__name__})"
        raise errors.ArgumentError(f"{path}: {reason}, expected tensors alone, written by torch.save") from None
    if not isinstance(values, Mapping) or not all(isinstance(v, Tensor) for v in values.values()):
        raise errors.ArgumentError(f"{path}: holds something else than tensors by name")
    yield {name: (tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in values.items()}


def read_weights(folder: Path, config: MambaConfig, device=None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights by our names, tied ones once; raises ArgumentError with the first ten differences of each kind.

    device: where they go, the CPU if None. dtype: as stored if None; `A_log`, `D` and `dt_proj.bias` are fp32 or finer anyway.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_tensors(path)) for path in weight_files(folder)]
        stored: dict[str, tuple] = {}
        for file in files:
            again = stored.keys() & file.keys()
            if again:
                raise errors.ArgumentError(f"{folder}: {_listed('given in two files', again)}")
            stored |= file
        problems = differences(config, {name: shape for name, (shape, _) in stored.items()})
        if problems:
            raise errors.ArgumentError(f"{folder}: does not fit its config: {'; '.join(problems)}")
        weights = {}
        for name, (_, read) in stored.items():
            name = our_name(name)
            if name == HEAD and config.tie_embeddings:
                continue
            tensor, goal = read(), dtype
            if name.endswith(_KEPT) and config.ssm_cfg.get("keep_fp32", True):
                goal = torch.promote_types(tensor.dtype, torch.float32)
            weights[name] = tensor.to(device=device, dtype=goal)
        if config.tie_embeddings and HEAD in stored:
            embedding = next(read for name, (_, read) in stored.items() if our_name(name) == EMBEDDING)
            if not torch.equal(embedding(), stored[HEAD][1]()):
                raise errors.ArgumentError(f"{folder}: {HEAD} is not {EMBEDDING}, expected the same values; the config ties them")
        return weights
