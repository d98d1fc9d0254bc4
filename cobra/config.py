"""What a Cobra is made of: closed dataclasses, the presets, and a strict reader of `config.json`.

A config decides the shape of every tensor (`checkpoint.py` compares files against the model it implies), so nothing in
it is free-form: unknown keys are refused by name, every number has a range, and no value names code to import.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import CheckpointError

FORMAT = "cobra"  # first key of our own config.json; an upstream run config has a "model" object instead
FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 1 << 20
MAX_LAYERS = 1024
MAX_WIDTH = 65_536
MAX_VOCAB = 1 << 22
MAX_TOWERS = 4
MAX_IMAGE_SIZE = 4096
MAX_PARAMETERS = 64_000_000_000
LDP_GRID = (14, 14)  # what the LDP projectors pool the patch grid to

TOWER_KINDS = ("dinov2", "siglip", "clip", "in1k")
PROJECTORS = ("linear", "gelu-mlp", "fused-gelu-mlp", "ldpnet", "fused-ldpnet")
RESIZE_STRATEGIES = ("resize-naive", "resize-crop", "letterbox")
PROMPTS = ("zephyr", "base")


def _choice(where: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise CheckpointError(f"config: {where} is {value!r:.80}, expected one of {', '.join(allowed)}")


def _integer(where: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:  # type(): True is no number of layers
        raise CheckpointError(f"config: {where} is {value!r:.80}, expected an integer from {low} to {high}")


def _number(where: str, value: Any, low: float, high: float) -> None:
    if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
        raise CheckpointError(f"config: {where} is {value!r:.80}, expected a number from {low} to {high}")


def _boolean(where: str, value: Any) -> None:
    if type(value) is not bool:
        raise CheckpointError(f"config: {where} is {value!r:.80}, expected true or false")


def _name(where: str, value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isprintable():
        raise CheckpointError(f"config: {where} is {value!r:.80}, expected 1 to 128 printable characters")


@dataclass(frozen=True)
class TowerConfig:
    """One vision transformer. `name` is the key of its pixels in the image dict ("dino", "siglip", ...)."""

    name: str
    kind: str  # decides prefix tokens, LayerScale, activation, position embedding and normalisation constants
    width: int
    depth: int  # blocks of the published tower; the last one is neither built nor run
    heads: int
    mlp_width: int
    image_size: int = 384
    patch_size: int = 14
    registers: int = 0  # dinov2 only

    def __post_init__(self) -> None:
        where = "vision.towers"
        _name(f"{where}.name", self.name)
        if not self.name.isascii() or not self.name.isidentifier():  # it becomes part of parameter names
            raise CheckpointError(f"config: {where}.name is {self.name!r:.80}, expected an identifier")
        where = f"{where}[{self.name}]"
        _choice(f"{where}.kind", self.kind, TOWER_KINDS)
        _integer(f"{where}.width", self.width, 1, MAX_WIDTH)
        _integer(f"{where}.depth", self.depth, 2, MAX_LAYERS)  # the features are the output of block depth - 2
        _integer(f"{where}.heads", self.heads, 1, self.width)
        _integer(f"{where}.mlp_width", self.mlp_width, 1, 4 * MAX_WIDTH)
        _integer(f"{where}.image_size", self.image_size, 1, MAX_IMAGE_SIZE)
        _integer(f"{where}.patch_size", self.patch_size, 1, self.image_size)
        _integer(f"{where}.registers", self.registers, 0, 1024)
        if self.width % self.heads:
            raise CheckpointError(f"config: {where}.heads is {self.heads}, expected a divisor of width={self.width}")
        if self.registers and self.kind != "dinov2":
            raise CheckpointError(f"config: {where}.registers is {self.registers}, expected 0 for kind {self.kind!r}")

    @property
    def blocks_run(self) -> int:
        """Blocks that are built and run: the features are the output of the second-to-last block."""
        return self.depth - 1

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that do not fill a patch are ignored (384 = 27 * 14 + 6)."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid * self.grid

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches (class token, registers), dropped from the features."""
        return {"dinov2": 1 + self.registers, "siglip": 0, "clip": 1, "in1k": 1}[self.kind]


@dataclass(frozen=True)
class VisionConfig:
    """One or more towers that see the same image on the same patch grid; features are concatenated in this order."""

    id: str
    towers: tuple[TowerConfig, ...]

    def __post_init__(self) -> None:
        _name("vision.id", self.id)
        if not 1 <= len(self.towers) <= MAX_TOWERS:
            raise CheckpointError(f"config: vision.towers has {len(self.towers)} entries, expected 1 to {MAX_TOWERS}")
        names = [tower.name for tower in self.towers]
        if len(set(names)) != len(names):
            raise CheckpointError(f"config: vision.towers has names {names}, expected different names")
        patches = {tower.name: tower.num_patches for tower in self.towers}
        if len(set(patches.values())) != 1:
            raise CheckpointError(f"config: vision.towers make {patches} patches, expected the same number")

    @property
    def width(self) -> int:
        """Features per patch, summed over the towers."""
        return sum(tower.width for tower in self.towers)

    @property
    def grid(self) -> int:
        return self.towers[0].grid

    @property
    def num_patches(self) -> int:
        return self.towers[0].num_patches


@dataclass(frozen=True)
class ProjectorConfig:
    """The layers between the towers and the LM, derived from the config: never stored."""

    kind: str
    in_width: int  # V
    out_width: int  # E
    grid: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each nn.Linear, GELU between."""
        v, e = self.in_width, self.out_width
        return {
            "linear": ((v, e),),
            "gelu-mlp": ((v, e), (e, e)),
            "fused-gelu-mlp": ((v, 4 * v), (4 * v, e), (e, e)),
            "ldpnet": ((v, e), (e, e)),
            "fused-ldpnet": ((v, 4 * v), (4 * v, e)),
        }[self.kind]

    @property
    def is_ldp(self) -> bool:
        return self.kind.endswith("ldpnet")

    @property
    def num_tokens(self) -> int:
        """Tokens that one image becomes."""
        return LDP_GRID[0] * LDP_GRID[1] if self.is_ldp else self.grid * self.grid

    @property
    def num_parameters(self) -> int:
        peg = self.out_width * (3 * 3 + 1) if self.is_ldp else 0  # depthwise 3x3 and its bias
        return sum(i * o + o for i, o in self.linears) + peg


@dataclass(frozen=True)
class LMConfig:
    """The Mamba-1 language model."""

    d_model: int
    n_layer: int
    vocab_size: int = 50_277
    pad_vocab_size_multiple: int = 8
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # None: ceil(d_model / 16)
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _integer("lm.d_model", self.d_model, 1, MAX_WIDTH)
        _integer("lm.n_layer", self.n_layer, 1, MAX_LAYERS)
        _integer("lm.vocab_size", self.vocab_size, 2, MAX_VOCAB)
        _integer("lm.pad_vocab_size_multiple", self.pad_vocab_size_multiple, 1, 4096)
        _integer("lm.d_state", self.d_state, 1, 256)
        _integer("lm.d_conv", self.d_conv, 1, 256)
        _integer("lm.expand", self.expand, 1, 16)
        if self.dt_rank is None:
            object.__setattr__(self, "dt_rank", math.ceil(self.d_model / 16))
        _integer("lm.dt_rank", self.dt_rank, 1, MAX_WIDTH)
        _number("lm.norm_epsilon", self.norm_epsilon, 0.0, 0.5)
        _boolean("lm.residual_in_fp32", self.residual_in_fp32)
        _boolean("lm.tie_embeddings", self.tie_embeddings)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the LM head."""
        m = self.pad_vocab_size_multiple
        return (self.vocab_size + m - 1) // m * m

    @property
    def ssm_cfg(self) -> dict[str, int]:
        """Keyword arguments of the Mamba mixer."""
        return {"d_state": self.d_state, "d_conv": self.d_conv, "expand": self.expand, "dt_rank": self.dt_rank}

    @property
    def num_parameters(self) -> int:
        e, d, n, r, w = self.d_model, self.d_inner, self.d_state, self.dt_rank, self.d_conv
        mixer = (
            2 * d * e  # in_proj (2D, E)
            + d * w + d  # conv1d (D, 1, W) and bias
            + (r + 2 * n) * d  # x_proj (R + 2N, D)
            + d * r + d  # dt_proj (D, R) and bias
            + d * n + d  # A_log (D, N), D (D,)
            + e * d  # out_proj (E, D)
        )  # fmt: skip
        tables = self.padded_vocab_size * e * (1 if self.tie_embeddings else 2)
        return self.n_layer * (mixer + e) + e + tables  # one norm weight per block, one at the end


@dataclass(frozen=True)
class CobraConfig:
    """Everything that `cobra` needs to build a model, its image transform and its prompts."""

    model_id: str
    vision: VisionConfig
    projector_kind: str
    lm: LMConfig
    image_resize_strategy: str = "resize-naive"
    llm_max_length: int = 2048  # longest prompt in text tokens
    prompt: str = "zephyr"
    note: str = ""  # what a reader of the config must know, e.g. that a shape is assumed

    def __post_init__(self) -> None:
        _name("model_id", self.model_id)
        _choice("projector_kind", self.projector_kind, PROJECTORS)
        _choice("image_resize_strategy", self.image_resize_strategy, RESIZE_STRATEGIES)
        _integer("llm_max_length", self.llm_max_length, 1, 1 << 24)
        _choice("prompt", self.prompt, PROMPTS)
        if not isinstance(self.note, str) or len(self.note) > 1000:
            raise CheckpointError(f"config: note is {self.note!r:.80}, expected at most 1000 characters")
        for tower in self.vision.towers:
            if tower.kind == "dinov2" and tower.mlp_width % tower.width:
                raise CheckpointError(
                    f"config: vision.towers[{tower.name}].mlp_width is {tower.mlp_width}, expected a multiple of "
                    f"width={tower.width}; the dinov2 architecture has no other"
                )
        if self.num_parameters > MAX_PARAMETERS:
            raise CheckpointError(
                f"config: the model has {self.num_parameters:,} parameters, expected at most {MAX_PARAMETERS:,}"
            )

    @property
    def projector(self) -> ProjectorConfig:
        return ProjectorConfig(self.projector_kind, self.vision.width, self.lm.d_model, self.vision.grid)

    @property
    def num_image_tokens(self) -> int:
        return self.projector.num_tokens

    @property
    def num_parameters(self) -> int:
        """LM, projector, and the blocks and embeddings of the towers (without their norms and biases)."""
        towers = sum(
            t.blocks_run * (4 * t.width**2 + 2 * t.width * t.mlp_width)
            + t.width * (3 * t.patch_size**2 + t.num_patches)
            for t in self.vision.towers
        )
        return self.lm.num_parameters + self.projector.num_parameters + towers

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


# ------------------------------------------------------------------------------------------------ known parts


def _dinov2_l(px: int) -> TowerConfig:
    return TowerConfig("dino", "dinov2", 1024, 24, 16, 4096, px, 14, registers=4)


def _siglip_b16(px: int) -> TowerConfig:
    return TowerConfig("siglip", "siglip", 768, 12, 12, 3072, px, 16)


def _siglip_so400m(px: int) -> TowerConfig:
    return TowerConfig("siglip", "siglip", 1152, 27, 16, 4304, px, 14)


def _clip_l14(px: int) -> TowerConfig:
    return TowerConfig("clip", "clip", 1024, 24, 16, 4096, px, 14)


# Upstream's vision_backbone_id -> towers, in the order in which the projector reads their features.
VISION_BACKBONES: dict[str, VisionConfig] = {
    id_: VisionConfig(id_, towers)
    for id_, towers in {
        "clip-vit-b": (TowerConfig("clip", "clip", 768, 12, 12, 3072, 224, 16),),
        "clip-vit-l": (_clip_l14(224),),
        "clip-vit-l-336px": (_clip_l14(336),),
        "siglip-vit-b16-224px": (_siglip_b16(224),),
        "siglip-vit-b16-256px": (_siglip_b16(256),),
        "siglip-vit-b16-384px": (_siglip_b16(384),),
        "siglip-vit-so400m": (_siglip_so400m(224),),
        "siglip-vit-so400m-384px": (_siglip_so400m(384),),
        "dinov2-vit-l": (_dinov2_l(224),),
        "in1k-vit-l": (TowerConfig("in1k", "in1k", 1024, 24, 16, 4096, 224, 16),),
        "dinoclip-vit-l-336px": (_dinov2_l(336), _clip_l14(336)),
        "dinosiglip-vit-so-384px": (_dinov2_l(384), _siglip_so400m(384)),
    }.items()
}

# Upstream's llm_backbone_id -> language model.
LM_BACKBONES: dict[str, LMConfig] = {
    "mamba-2.8b-zephyr": LMConfig(2560, 64),
    "mamba-2.8b-slimpj": LMConfig(2560, 64),
    "mamba-2.8b": LMConfig(2560, 64),
    "mamba-1.4b": LMConfig(2048, 48),
}


_COBRA_3B = CobraConfig(
    "cobra-3b", VISION_BACKBONES["dinosiglip-vit-so-384px"], "fused-gelu-mlp", LM_BACKBONES["mamba-2.8b-zephyr"]
)
_COBRA_SIGLIP = replace(
    _COBRA_3B, model_id="cobra-siglip", vision=VISION_BACKBONES["siglip-vit-so400m-384px"], projector_kind="gelu-mlp"
)
_COBRA_LDP = replace(_COBRA_3B, model_id="cobra-ldp", projector_kind="fused-ldpnet")
_COBRA_8B = replace(
    _COBRA_3B,
    model_id="cobra-8b",
    lm=LMConfig(4096, 64, vocab_size=50_280),
    note="No checkpoint of this size has been published: the shape is assumed.",
)
_COBRA_LAPTOP = CobraConfig(
    "cobra-laptop",
    VisionConfig(
        "dinosiglip-laptop-384px",
        (
            TowerConfig("dino", "dinov2", 384, 12, 6, 1536, registers=4),
            TowerConfig("siglip", "siglip", 384, 12, 6, 1536),
        ),
    ),
    "fused-gelu-mlp",
    LMConfig(768, 24),
    note="Random weights: for benchmarks on a laptop, not for answers.",
)
_COBRA_TINY = CobraConfig(
    "cobra-tiny",
    VisionConfig(
        "dinosiglip-tiny-112px",
        (
            TowerConfig("dino", "dinov2", 32, 3, 2, 64, 112, registers=4),
            TowerConfig("siglip", "siglip", 48, 3, 2, 96, 112),
        ),
    ),
    "fused-gelu-mlp",
    LMConfig(64, 2, vocab_size=512),
    note="Random weights: for tests.",
)
PRESETS: dict[str, CobraConfig] = {
    config.model_id: config for config in (_COBRA_3B, _COBRA_SIGLIP, _COBRA_LDP, _COBRA_8B, _COBRA_LAPTOP, _COBRA_TINY)
}


def preset(name: str) -> CobraConfig:
    """The config of a preset, e.g. preset("cobra-3b")."""
    if name not in PRESETS:
        raise CheckpointError(f"config: preset is {name!r:.80}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ------------------------------------------------------------------------------------------------ config.json

# Training settings that an upstream run config carries beside the six keys that shape the model; read past, never used.
_STAGE_KEYS = (
    "epochs", "max_steps", "global_batch_size", "per_device_batch_size", "learning_rate", "weight_decay",
    "max_grad_norm", "lr_scheduler_type", "warmup_ratio", "train_strategy",
)  # fmt: skip
_UPSTREAM_IGNORED = frozenset(
    {"type", "enable_gradient_checkpointing", "enable_mixed_precision_training", "reduce_in_full_precision"}
    | {f"{stage}_{key}" for stage in ("align", "finetune") for key in _STAGE_KEYS}
)
_UPSTREAM_TOP = frozenset(
    ("model", "dataset", "stage", "pretrained_checkpoint", "run_id", "run_root_dir", "seed", "hf_token", "trackers",
     "wandb_project", "wandb_entity")
)  # fmt: skip
_UPSTREAM_SUFFIXES = ("fused-gelu-mlp", "gelu-mlp", "fused-ldpnet")  # tried in this order


def _keys(where: str, value: Any, known: frozenset[str], required: frozenset[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config: {where} is {type(value).__name__}, expected an object")
    for word, keys in (("unknown", set(value) - known), ("missing", required - set(value))):
        if keys:
            listed = ", ".join(repr(key)[:80] for key in sorted(keys, key=str)[:10])
            raise CheckpointError(f"config: {where} has {word} keys {listed}, expected {', '.join(sorted(known))}")
    return value


def _fill(cls: type, where: str, value: Any) -> Any:
    """Build a flat dataclass from an object with exactly its keys; those with a default may be left out."""
    known = frozenset(f.name for f in fields(cls))
    required = frozenset(f.name for f in fields(cls) if f.default is f.default_factory)  # both MISSING
    return cls(**_keys(where, value, known, required))


def _parse_own(document: Mapping[str, Any]) -> CobraConfig:
    known = frozenset({"format", "version"} | {f.name for f in fields(CobraConfig)})
    _keys("config.json", document, known, known - {"note"})
    _integer("version", document["version"], FORMAT_VERSION, FORMAT_VERSION)
    body = {key: value for key, value in document.items() if key not in ("format", "version")}
    vision = _keys("vision", body["vision"], frozenset({"id", "towers"}), frozenset({"id", "towers"}))
    if not isinstance(vision["towers"], list) or len(vision["towers"]) > MAX_TOWERS:
        raise CheckpointError(f"config: vision.towers is no list, or has more than {MAX_TOWERS} entries")
    towers = tuple(_fill(TowerConfig, f"vision.towers[{i}]", tower) for i, tower in enumerate(vision["towers"]))
    body["vision"] = VisionConfig(vision["id"], towers)
    body["lm"] = _fill(LMConfig, "lm", body["lm"])
    return CobraConfig(**body)


def _parse_upstream(document: Mapping[str, Any]) -> CobraConfig:
    _keys("config.json", document, _UPSTREAM_TOP, frozenset({"model"}))
    shape = {"model_id", "vision_backbone_id", "llm_backbone_id", "arch_specifier", "image_resize_strategy"}
    model = _keys("model", document["model"], _UPSTREAM_IGNORED | shape | {"llm_max_length"}, frozenset(shape))
    _choice("model.vision_backbone_id", model["vision_backbone_id"], tuple(VISION_BACKBONES))
    _choice("model.llm_backbone_id", model["llm_backbone_id"], tuple(LM_BACKBONES))
    arch = model["arch_specifier"]
    _name("model.arch_specifier", arch)
    kind = "linear" if arch == "linear" else next((s for s in _UPSTREAM_SUFFIXES if arch.endswith(s)), None)
    if kind is None:
        raise CheckpointError(
            f"config: model.arch_specifier is {arch!r}, expected 'linear' or an ending of {', '.join(_UPSTREAM_SUFFIXES)}"
        )
    return CobraConfig(
        model_id=model["model_id"],
        vision=VISION_BACKBONES[model["vision_backbone_id"]],
        projector_kind=kind,
        lm=LM_BACKBONES[model["llm_backbone_id"]],
        image_resize_strategy=model["image_resize_strategy"],
        llm_max_length=model.get("llm_max_length", 2048),
        prompt="zephyr" if model["llm_backbone_id"].endswith("zephyr") else "base",
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise CheckpointError(f"json: key {twice!r:.80} is given twice")
    return document


def _no_constant(text: str) -> float:
    raise CheckpointError(f"json: {text} is no number")


def strict_json(data: bytes | str, what: str) -> Any:
    """JSON without what two readers may read differently: duplicate keys, NaN, Infinity; any failure is one error."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, digits over Python's limit, nested too deep
        raise CheckpointError(f"{what}: not valid JSON: {error}") from None


def parse_config(data: bytes | str) -> CobraConfig:
    """Read a config.json: our own format, or an upstream run config (its `model` object).

    Raises CheckpointError for anything else; reads nothing but `data`.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"config.json: {len(data):,} bytes, expected at most {MAX_CONFIG_BYTES:,}")
    document = strict_json(data, "config.json")
    if not isinstance(document, dict):
        raise CheckpointError(f"config.json: top level is {type(document).__name__}, expected an object")
    if document.get("format") == FORMAT:
        return _parse_own(document)
    if "model" in document:
        return _parse_upstream(document)
    raise CheckpointError(
        f'config.json: neither our format ("format": "{FORMAT}") nor an upstream run config (a "model" object); '
        f"its keys are {', '.join(repr(key)[:40] for key in list(document)[:10]) or 'none'}"
    )
