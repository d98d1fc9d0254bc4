"""The presets, and a reader of config.json that takes nothing on trust."""

from __future__ import annotations

import json

import pytest

from cobra.checkpoint import meta_model
from cobra.config import LM_BACKBONES, PRESETS, VISION_BACKBONES, LMConfig, TowerConfig, parse_config, preset
from cobra.errors import CheckpointError, CobraError

TINY = preset("cobra-tiny").to_dict()

# What the official run directory carries: the six keys that shape the model among training settings.
OFFICIAL = {
    "model": {
        "type": "cobra+3b",
        "model_id": "cobra+3b",
        "vision_backbone_id": "dinosiglip-vit-so-384px",
        "llm_backbone_id": "mamba-2.8b-zephyr",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 2048,
        "align_epochs": 1,
        "align_max_steps": None,
        "finetune_learning_rate": 2e-5,
        "finetune_train_strategy": "fsdp-full-shard",
        "enable_gradient_checkpointing": True,
        "enable_mixed_precision_training": True,
        "reduce_in_full_precision": False,
    },
    "dataset": {"type": "llava-lvis4v-lrv", "anything": [1, 2]},
    "stage": "finetune",
    "pretrained_checkpoint": None,
    "run_id": "cobra+3b",
    "run_root_dir": "runs",
    "seed": 7,
    "hf_token": ".hf_token",
    "trackers": ["jsonl"],
    "wandb_project": "cobra",
    "wandb_entity": None,
}


def changed(document: dict, path: str, value) -> str:
    """JSON of the document with one place changed; path is dotted, a number is a list index; ... removes it."""
    document = json.loads(json.dumps(document))
    *parents, last = path.split(".")
    at = document
    for key in parents:
        at = at[int(key) if key.isdigit() else key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(document)


PARAMETERS = {  # language model, projector
    "cobra-3b": (2_768_345_600, 47_789_568),
    "cobra-siglip": (2_768_345_600, 9_507_840),
    "cobra-ldp": (2_768_345_600, 41_259_008),
    "cobra-8b": (6_945_935_360, 71_385_600),
    "cobra-laptop": (129_135_360, 5_313_024),
    "cobra-tiny": (98_240, 50_624),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_those_of_the_modules(name):
    config = preset(name)
    assert (config.lm.num_parameters, config.projector.num_parameters) == PARAMETERS[name]
    model = meta_model(config)
    counted = [sum(p.numel() for p in part.parameters()) for part in (model.llm, model.projector, model.vision)]
    assert tuple(counted[:2]) == PARAMETERS[name]
    estimate = config.num_parameters - sum(PARAMETERS[name])
    assert 0.97 * counted[2] <= estimate <= counted[2], "the towers without norms and biases"
    assert all(p.is_meta for p in model.parameters())


def test_shapes_of_the_presets():
    tokens = {name: config.num_image_tokens for name, config in PRESETS.items()}
    assert tokens == dict.fromkeys(PRESETS, 729) | {"cobra-ldp": 196, "cobra-tiny": 64}
    three = preset("cobra-3b")
    assert (three.lm.dt_rank, three.lm.d_inner, three.lm.padded_vocab_size) == (160, 5120, 50280)
    assert three.projector.linears == ((2176, 8704), (8704, 2560), (2560, 2560))
    assert [(t.name, t.blocks_run, t.prefix_tokens) for t in three.vision.towers] == [
        ("dino", 23, 5),
        ("siglip", 26, 0),
    ]
    assert (preset("cobra-8b").lm.dt_rank, preset("cobra-8b").lm.padded_vocab_size) == (256, 50280)
    assert "assumed" in preset("cobra-8b").note
    laptop = preset("cobra-laptop")
    assert [(t.width, t.depth, t.blocks_run, t.image_size) for t in laptop.vision.towers] == [(384, 12, 11, 384)] * 2
    with pytest.raises(CheckpointError, match="expected one of cobra-3b, cobra-siglip"):
        preset("cobra-4b")


@pytest.mark.parametrize("name", PRESETS)
def test_json_and_back(name):
    config = preset(name)
    assert parse_config(config.to_json()) == parse_config(config.to_json().encode()) == config


def test_the_official_run_config():
    config = parse_config(json.dumps(OFFICIAL))
    assert (config.vision, config.lm, config.projector, config.prompt) == (
        preset("cobra-3b").vision,
        preset("cobra-3b").lm,
        preset("cobra-3b").projector,
        "zephyr",
    )
    assert config.model_id == "cobra+3b" and config.llm_max_length == 2048
    assert parse_config(changed(OFFICIAL, "model.llm_max_length", ...)).llm_max_length == 2048
    base = parse_config(changed(OFFICIAL, "model.llm_backbone_id", "mamba-2.8b-slimpj"))
    assert base.prompt == "base"


@pytest.mark.parametrize(
    "arch, kind",
    [
        ("linear", "linear"),
        ("no-align+gelu-mlp", "gelu-mlp"),
        ("fused-gelu-mlp", "fused-gelu-mlp"),
        ("no-align+fused-ldpnet", "fused-ldpnet"),
        ("no-align+linear", None),
        ("ldpnet", None),
        ("gelu-mlp+", None),
    ],
)
def test_arch_specifier_is_matched_as_upstream_does(arch, kind):
    text = changed(OFFICIAL, "model.arch_specifier", arch)
    if kind:
        assert parse_config(text).projector_kind == kind
    else:
        with pytest.raises(CheckpointError, match="arch_specifier"):
            parse_config(text)


def test_every_upstream_part_is_known():
    for vision in VISION_BACKBONES:
        for lm in LM_BACKBONES:
            text = changed(OFFICIAL, "model.vision_backbone_id", vision)
            assert parse_config(changed(json.loads(text), "model.llm_backbone_id", lm)).vision.id == vision


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("auto_map", {"AutoModel": "evil.py"}, "unknown keys 'auto_map'"),
        ("lm._attn_implementation_internal", "someone/kernel", "unknown keys '_attn_implementation_internal'"),
        ("vision.towers.0.model_type", "custom", "unknown keys 'model_type'"),
        ("vision.extra", 1, "vision has unknown keys 'extra'"),
        ("lm", ..., "missing keys 'lm'"),
        ("lm.d_model", ..., "missing keys 'd_model'"),
        ("vision.towers.1.heads", ..., r"vision.towers\[1\] has missing keys 'heads'"),
        ("version", 2, "version is 2, expected an integer from 1 to 1"),
        ("version", True, "version is True"),
        ("lm", [], "lm is list, expected an object"),
        ("vision", None, "vision is NoneType, expected an object"),
        ("vision.towers", {}, "vision.towers is no list"),
        ("vision.towers", [], "has 0 entries, expected 1 to 4"),
        ("vision.towers", [TINY["vision"]["towers"][0]] * 5, "more than 4"),
        ("vision.towers", [TINY["vision"]["towers"][0]] * 2, "expected different names"),
        ("vision.towers.0.name", "a.b", "expected an identifier"),
        ("vision.towers.0.name", "", "expected 1 to 128 printable characters"),
        ("vision.towers.0.kind", "eva", "expected one of dinov2, siglip, clip, in1k"),
        ("vision.towers.0.kind", [], "expected one of dinov2"),
        ("vision.towers.0.kind", "siglip", "registers is 4, expected 0"),
        ("vision.towers.0.heads", 3, "expected a divisor of width=32"),
        ("vision.towers.0.depth", 1, "expected an integer from 2 to 1024"),
        ("vision.towers.0.patch_size", 113, "expected an integer from 1 to 112"),
        ("vision.towers.0.image_size", 126, "expected the same number"),
        ("vision.towers.0.mlp_width", 65, "expected a multiple of width=32"),
        ("lm.d_model", 65537, "expected an integer from 1 to 65536"),
        ("lm.d_model", 0, "expected an integer"),
        ("lm.d_model", True, "expected an integer"),
        ("lm.d_model", 64.0, "expected an integer"),
        ("lm.d_model", "64", "expected an integer"),
        ("lm.d_model", 10**30, "expected an integer"),
        ("lm.n_layer", 1025, "expected an integer from 1 to 1024"),
        ("lm.norm_epsilon", -1.0, "expected a number"),
        ("lm.tie_embeddings", 1, "expected true or false"),
        ("projector_kind", "mlp", "expected one of linear, gelu-mlp"),
        ("projector_kind", {}, "expected one of linear, gelu-mlp"),
        ("image_resize_strategy", "corner-pad", "expected one of resize-naive"),
        ("llm_max_length", 0, "expected an integer"),
        ("prompt", "vicuna", "expected one of zephyr, base"),
        ("model_id", "a\nb", "expected 1 to 128 printable characters"),
        ("note", "x" * 1001, "at most 1000 characters"),
        ("note", None, "at most 1000 characters"),
    ],
)
def test_our_format_is_closed(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(changed(TINY, path, value))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("model.auto_map", {}, "model has unknown keys 'auto_map'"),
        ("trust_remote_code", True, "unknown keys 'trust_remote_code'"),
        ("model.vision_backbone_id", "resnet", "expected one of clip-vit-b"),
        ("model.vision_backbone_id", ["x"], "expected one of clip-vit-b"),
        ("model.llm_backbone_id", "../../x", "expected one of mamba-2.8b-zephyr"),
        ("model.image_resize_strategy", ..., "missing keys 'image_resize_strategy'"),
        ("model", 3, "model is int, expected an object"),
    ],
)
def test_the_upstream_format_is_closed(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(changed(OFFICIAL, path, value))


def test_a_huge_patch_grid_counts_too():
    text = changed(json.loads(changed(TINY, "vision.towers.0.image_size", 4096)), "vision.towers.1.image_size", 4096)
    text = changed(
        json.loads(changed(json.loads(text), "vision.towers.0.patch_size", 1)), "vision.towers.1.patch_size", 1
    )
    text = changed(
        json.loads(changed(json.loads(text), "vision.towers.0.width", 4096)), "vision.towers.0.mlp_width", 4096
    )
    with pytest.raises(CheckpointError, match="expected at most 64,000,000,000"):
        parse_config(text)


def test_a_model_larger_than_the_limit_is_refused_before_it_exists():
    text = changed(json.loads(changed(TINY, "lm.d_model", 65536)), "lm.n_layer", 1024)
    with pytest.raises(CheckpointError, match="expected at most 64,000,000,000"):
        parse_config(text)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "top level is list"),
        (b"null", "top level is NoneType"),
        (b"{}", "neither our format .* its keys are none"),
        (b'{"format": "other", "x": 1}', "its keys are 'format', 'x'"),
        (b'{"format": "cobra", "format": "cobra"}', "'format' is given twice"),
        (b'{"format": NaN}', "NaN is no number"),
        (b'{"format": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b" " * (1 << 20) + b"{}", "expected at most 1,048,576"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_config(data, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(data)


def test_configs_are_values():
    assert LMConfig(64, 2) == LMConfig(64, 2, dt_rank=4) and hash(preset("cobra-3b")) == hash(preset("cobra-3b"))
    with pytest.raises(AttributeError):
        preset("cobra-3b").lm.d_model = 1
    with pytest.raises(CobraError):
        TowerConfig("t", "siglip", 10, 3, 3, 10)
