"""Names: which tensor of a published file becomes which tensor of our model, and what has to be done to it on the way.

    official checkpoint   model/llm_backbone/llm.backbone.*   -> llm.backbone.*             the same names
                          model/llm_backbone/llm.lm_head.*    -> nothing, if tied: a copy of the embedding
                          model/projector/projector.*         -> projector.projector.*
                          model/vision_backbone/*featurizer.* -> the towers, timm names (only runs that trained them have it)
    tower file            timm, open_clip, Hugging Face names -> vision.towers.<name>.*

A tower's map is written from ours to theirs, so that it is complete when it is without error: every tensor of ours has exactly one
origin. Sources: timm 0.9.10 `models/vision_transformer.py` (what the official models were trained with), open_clip's CLIP, and
transformers' `conversion_mapping.py`, which relates the names on the hub to those in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import listed
from .config import CobraConfig, TowerConfig
from .errors import CheckpointError

EMBEDDING, HEAD = "llm.backbone.embedding.weight", "llm.lm_head.weight"


@dataclass(frozen=True)
class Take:
    """The origin of one tensor: `key` in the source, and the form it has there.

    same: as it is. bare: as it is, but for dimensions of size 1. 0, 1, 2: that third of the rows (query, key, value in one matrix).
    positions: the learned positions of a square grid, perhaps of another size, after `prefix` rows for the class token.
    """

    key: str
    form: str = "same"
    resample: bool = False
    prefix: int = 0


# ------------------------------------------------------------------------------------------------ official checkpoint


def official(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[tuple[str, str, str], Take]]:
    """Our name -> (path in a latest-checkpoint.pt, how to take it), for the language model and the projector."""
    takes = {}
    for name in shapes:
        part, _, rest = name.partition(".")
        if part == "llm":
            takes[name] = (("model", "llm_backbone", name), Take(name))
        elif part == "projector":
            takes[name] = (("model", "projector", rest), Take(rest))
    return takes


# ------------------------------------------------------------------------------------------------ towers


@dataclass(frozen=True)
class _Names:
    """One way to name the tensors of one kind of tower. `top`, `block`: ours -> theirs; "#n" is a third of their rows."""

    top: Mapping[str, str]
    block: Mapping[str, str]
    blocks: str  # what a block's names start with; {} is its number
    mark: str  # a name by which the file is known
    rest: str  # pattern of names that are there and not used


_OUR_BLOCKS = {"dinov2": "encoder.layer.{}.", "siglip": "encoder.layers.{}.", "clip": "encoder.layers.{}.", "in1k": "layers.{}."}
_QKV = ("q_proj", "k_proj", "v_proj")
_TIMM_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_TIMM_SELF = {f"self_attn.{name}": f"attn.qkv#{i}" for i, name in enumerate(_QKV)}
_TIMM_OWN = {f"attention.{name}": f"attn.qkv#{i}" for i, name in enumerate(_QKV)} | {"attention.o_proj": "attn.proj"}
_TIMM_SIGLIP = _TIMM_SELF | _TIMM_MLP | {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
_HUB_QKV = {f"attention.{name}": f"attention.attention.{full}" for name, full in zip(_QKV, ("query", "key", "value"))}
_PATCHES = {f"embeddings.patch_embeddings.projection.{p}": f"patch_embed.proj.{p}" for p in ("weight", "bias")}
_TIMM_REST = r"norm\.\w+|fc_norm\.\w+|head\.\w+|mask_token|attn_pool\..+"

_TIMM = {
    "dinov2": _Names(
        _PATCHES | {
            "embeddings.cls_token": "cls_token", "embeddings.register_tokens": "reg_token", "embeddings.position_embeddings": "pos_embed",
        },
        _TIMM_OWN | _TIMM_MLP
        | {"norm1": "norm1", "norm2": "norm2", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"},
        "blocks.{}.", "patch_embed.proj.weight", _TIMM_REST,
    ),
    "siglip": _Names(
        {f"embeddings.patch_embedding.{p}": f"patch_embed.proj.{p}" for p in ("weight", "bias")}
        | {"embeddings.position_embedding.weight": "pos_embed"},
        _TIMM_SIGLIP, "blocks.{}.", "patch_embed.proj.weight", _TIMM_REST,
    ),
    "clip": _Names(
        {
            "embeddings.patch_embedding.weight": "patch_embed.proj.weight", "embeddings.class_embedding": "cls_token",
            "embeddings.position_embedding.weight": "pos_embed",
            "pre_layrnorm.weight": "norm_pre.weight", "pre_layrnorm.bias": "norm_pre.bias",
        },
        _TIMM_SIGLIP, "blocks.{}.", "patch_embed.proj.weight", _TIMM_REST,
    ),
    "in1k": _Names(
        _PATCHES | {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"},
        _TIMM_OWN | _TIMM_MLP | {"layernorm_before": "norm1", "layernorm_after": "norm2"},
        "blocks.{}.", "patch_embed.proj.weight", _TIMM_REST,
    ),
}  # fmt: skip

_OPEN_CLIP = {
    "clip": _Names(
        {
            "embeddings.patch_embedding.weight": "conv1.weight", "embeddings.class_embedding": "class_embedding",
            "embeddings.position_embedding.weight": "positional_embedding",
            "pre_layrnorm.weight": "ln_pre.weight", "pre_layrnorm.bias": "ln_pre.bias",
        },
        {f"self_attn.{name}": f"attn.in_proj_#{i}" for i, name in enumerate(_QKV)}
        | {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
        | {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
        "transformer.resblocks.{}.", "conv1.weight", r"ln_post\.\w+|proj",
    ),
}  # fmt: skip

# Hugging Face: our names (transformers 5 in memory), and those on the hub where they differ.
_HF_REST = r"(post_)?layernorm\.\w+|head\..+|pooler\..+|classifier\..+|embeddings\.(mask_token|position_ids)"
_HF = {kind: _Names({}, {}, blocks, "embeddings.", _HF_REST) for kind, blocks in _OUR_BLOCKS.items()}
_HUB = {
    "dinov2": _Names({}, _HUB_QKV | {"attention.o_proj": "attention.output.dense"}, "encoder.layer.{}.", "embeddings.", _HF_REST),
    "in1k": _Names(
        {}, _HUB_QKV | {"attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
        "encoder.layer.{}.", "embeddings.", _HF_REST,
    ),
}  # fmt: skip

# What may stand before all names of a tower, with a pattern of what the same file holds beside it.
_PREFIXES = (
    ("visual.trunk.", r"text\..+|logit_(scale|bias)|visual\.head\..+"),
    ("visual.", r"text\..+|(transformer|ln_final|token_embedding)\..+|positional_embedding|text_projection|logit_(scale|bias)|attn_mask"),
    ("vision_model.", r"text_model\..+|logit_(scale|bias)|(text|visual)_projection\.weight|classifier\..+"),
    ("dinov2_with_registers.", r"classifier\..+"),
    ("vit.", r"classifier\..+|pooler\..+"),
    ("", r"(?!)"),
)


def tower(spec: TowerConfig, targets: Collection[str], keys: Collection[str]) -> tuple[dict[str, Take], list[str]]:
    """How to make a tower of a file: ({our name: how to take it}, [names of the file that have no place in the tower]).

    targets: our names within the tower. keys: the names in the file. Names that the file lacks are not looked at here. Raises
    CheckpointError if the file is of no known kind.
    """
    keys = set(keys)
    for prefix, _ in _PREFIXES:
        inside = {key[len(prefix) :] for key in keys if key.startswith(prefix)}
        names = _scheme(spec.kind, inside)
        if names is not None:
            break
    else:
        raise CheckpointError(
            f"tower {spec.name}: the file is no {spec.kind} vision transformer with timm, open_clip or Hugging Face names; "
            f"it has {listed('tensors', keys)}"
        )
    renamed = {"reg_token": "register_tokens"} if "register_tokens" in inside else {}  # as DINOv2's own release has it
    takes, ours = {}, re.compile(_OUR_BLOCKS[spec.kind].replace(".", r"\.").format(r"(\d+)") + r"(.+)")
    for target in targets:
        block = ours.fullmatch(target)
        takes[target] = _take(spec, names, target, block, prefix, renamed)
    used = {take.key for take in takes.values()}
    last = names.blocks.format(spec.blocks_run)  # the block that the features come before
    rest = re.compile(f"{names.rest}|{re.escape(last)}.+")
    beside = dict(_PREFIXES)[prefix]
    extra = [k for k in keys - used if not (rest.fullmatch(k[len(prefix) :]) if k.startswith(prefix) else re.fullmatch(beside, k))]
    return takes, extra


def _scheme(kind: str, keys: set[str]) -> _Names | None:
    for schemes in (_TIMM, _OPEN_CLIP):
        if kind in schemes and schemes[kind].mark in keys:
            return schemes[kind]
    if any(key.startswith("embeddings.patch_embedding") for key in keys):
        on_hub = kind in _HUB and any(".attention.attention." in key for key in keys)
        return (_HUB if on_hub else _HF)[kind]
    return None


def _take(spec: TowerConfig, names: _Names, target: str, block: re.Match | None, prefix: str, renamed: Mapping[str, str]) -> Take:
    form = "same"
    if block is None:
        key = names.top.get(target, target)
        key = renamed.get(key, key)
        if "position_embedding" in target:
            # Upstream runs DINOv2 at a smaller size than it was trained at, every other tower at its own.
            return Take(prefix + key, "positions", resample=spec.kind == "dinov2", prefix=int(spec.prefix_tokens > 0))
        form = "bare" if target.endswith(("cls_token", "class_embedding", "register_tokens")) else "same"
        return Take(prefix + key, form)
    number, rest = block.groups()
    layer, _, parameter = rest.rpartition(".")
    if rest in names.block:  # one that is no weight or bias
        layer, theirs = rest, names.block[rest]
    else:
        theirs = names.block.get(layer, layer)
        theirs = f"{theirs}{parameter}" if theirs.startswith("attn.in_proj_") else f"{theirs}.{parameter}"
    third = re.search(r"#(\d)", theirs)
    if third:
        form, theirs = third[1], theirs.replace(third[0], "")
    return Take(prefix + names.blocks.format(number) + theirs, form)


# ------------------------------------------------------------------------------------------------ shapes and values


def _grid(count: int, prefix: int) -> tuple[int, int] | None:
    """(rows before the grid, side of the grid) of that many positions; DINOv2 in timm has none before it."""
    for before in (prefix, 0):
        side = math.isqrt(max(count - before, 0))
        if side and side * side == count - before:
            return before, side
    return None


def fits(take: Take, stored: Sequence[int], shape: Sequence[int]) -> str:
    """What shape was expected of a stored tensor, if not the one it has; else nothing."""
    stored, shape = tuple(stored), tuple(shape)
    if take.form == "same":
        return "" if stored == shape else str(shape)
    if take.form == "bare":
        return "" if [n for n in stored if n != 1] == [n for n in shape if n != 1] else str(shape)
    if take.form in "012":
        want = (3 * shape[0], *shape[1:])
        return "" if stored == want else str(want)
    rows, width = shape[-2:]
    if take.resample:
        right = len(stored) in (2, 3) and stored[-1] == width and math.prod(stored[:-2]) == 1 and _grid(stored[-2], take.prefix)
        return "" if right else f"(1, n * n, {width}), perhaps with one more for the class token"
    return "" if stored in ((rows, width), (1, rows, width)) else str((1, rows, width))


def make(take: Take, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor of ours, contiguous, in the dtype of the stored one; `fits` has been asked before."""
    if take.form in "012":
        return tensor.chunk(3)[int(take.form)].contiguous()
    if take.form == "positions" and take.resample:
        from .vision import resample_position_embedding

        rows, width = shape[-2:]
        before, _ = _grid(tensor.shape[-2], take.prefix)
        tensor = tensor.reshape(-1, width)
        grid = resample_position_embedding(tensor[None, before:], math.isqrt(rows - take.prefix))
        first = tensor[:before] if before else tensor.new_zeros(take.prefix, width)  # timm: the class token has none of its own
        return torch.cat([first, grid[0]]).reshape(tuple(shape))
    return tensor.reshape(tuple(shape)).contiguous()


def towers_in(config: CobraConfig, names: Collection[str]) -> dict[str, str]:
    """Tower -> prefix of its tensors in a checkpoint's vision_backbone, which names them as upstream's classes do."""
    single = len(config.vision.towers) == 1
    found = {}
    for spec in config.vision.towers:
        prefix = "featurizer." if single else f"{spec.name}_featurizer."
        if any(name.startswith(prefix) for name in names):
            found[spec.name] = prefix
    return found
