"""Checkpoints: what is saved comes back, and what is wrong is named before anything is allocated or changed."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import cobra
from cobra import checkpoint
from cobra.config import preset
from cobra.errors import CheckpointError
from cobra.model import CobraVLM
from cobra.tokenizer import byte_tokenizer

CONFIG = preset("cobra-tiny")


def make(dtype=None, seed=0):
    torch.manual_seed(seed)
    return CobraVLM(CONFIG, byte_tokenizer(), dtype=dtype)


def assert_same(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sharded and a whole checkpoint of the same model."""
    model, root = make(), tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(model, root / "one")
    checkpoint.save(model, root / "many", max_shard_bytes=150_000)
    return model, root


@pytest.fixture
def copy(saved, tmp_path):
    """A directory to damage: copy("one") or copy("many"), without its manifest."""

    def make_copy(kind):
        shutil.copytree(saved[1] / kind, tmp_path / kind)
        (tmp_path / kind / "manifest.json").unlink()
        return tmp_path / kind

    return make_copy


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [1 << 30, 100_000, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, dtype, shard):
    model = make(dtype)
    checkpoint.save(model, tmp_path, max_shard_bytes=shard)
    assert not list(tmp_path.glob("*.part")) and (tmp_path / "model.safetensors").exists() == (shard > 1 << 20)
    loaded = cobra.load(tmp_path)
    assert_same(loaded, model)
    assert loaded.config == model.config and loaded.tokenizer.to_json() == model.tokenizer.to_json()
    assert loaded.llm.lm_head.weight is loaded.llm.backbone.embedding.weight
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    other = make(dtype, seed=1)
    checkpoint.load_into(other, tmp_path)
    assert_same(other, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_in_another_dtype(saved, dtype):
    loaded = checkpoint.load(saved[1] / "many", dtype=dtype, device="cpu", require_manifest=True)
    want = make().to(dtype)
    assert_same(loaded, want)
    kept = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    if dtype != torch.float32:
        assert len(kept) == 3 * CONFIG.lm.n_layer and all(n.endswith((".A_log", ".D", ".dt_proj.bias")) for n in kept)
    with pytest.raises(CheckpointError, match="dtype is torch.float64"):
        checkpoint.load(saved[1] / "one", dtype=torch.float64)


def test_the_tied_head_is_stored_once(saved):
    names = set(load_file(saved[1] / "one" / "model.safetensors"))
    assert set(saved[0].state_dict()) - names == {"llm.lm_head.weight"}
    total = sum(t.nbytes for n, t in saved[0].state_dict().items() if n in names)
    assert (
        json.loads((saved[1] / "many" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total
    )


def test_saving_does_not_overwrite(saved, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has config\.json, expected a directory without"):
        checkpoint.save(saved[0], tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


def test_without_a_tokenizer(tmp_path):
    checkpoint.save(CobraVLM(CONFIG), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists() and checkpoint.load(tmp_path).tokenizer is None


# --- a failing load changes nothing ----------------------------------------------------------------------------------


def damage_key(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["llm.backbone.extra"] = tensors.pop("llm.backbone.norm_f.weight")
    save_file(tensors, directory / "model.safetensors")


def damage_shape(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["llm.backbone.norm_f.weight"] = torch.ones(65)
    save_file(tensors, directory / "model.safetensors")


def damage_dtype(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["llm.backbone.norm_f.weight"] = tensors["llm.backbone.norm_f.weight"].half()
    save_file(tensors, directory / "model.safetensors")


def damage_kept(directory):
    tensors = {n: t.bfloat16() for n, t in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")


def damage_int(directory):
    tensors = load_file(directory / "model.safetensors")
    tensors["llm.backbone.norm_f.weight"] = torch.ones(64, dtype=torch.int32)
    save_file(tensors, directory / "model.safetensors")


def cut(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-1])


def append(directory):
    with open(directory / "model.safetensors", "ab") as file:
        file.write(b"\0")


def wrong_digest(directory):
    names = ("config.json", "tokenizer.json", "model.safetensors")
    (directory / "manifest.json").write_text(json.dumps({"sha256": dict.fromkeys(names, "0" * 64)}))


def one_bit(directory):
    """The manifest is right for the old file: only the digest can tell."""
    import hashlib

    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
    (directory / "manifest.json").write_text(json.dumps({"sha256": digests}))
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)


def other_config(directory):
    (directory / "config.json").write_text(preset("cobra-laptop").to_json())


def other_tokenizer(directory):
    (directory / "tokenizer.json").write_text("{}")


def no_weights(directory):
    (directory / "model.safetensors").unlink()


def link(directory):
    (directory / "model.safetensors").rename(directory / "elsewhere")
    (directory / "model.safetensors").symlink_to("elsewhere")


def config_link(directory):
    (directory / "config.json").rename(directory / "elsewhere")
    (directory / "config.json").symlink_to("elsewhere")


def fifo(directory):
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")


def both(directory):
    (directory / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_key, r"1 missing: llm\.backbone\.norm_f\.weight; 1 unexpected: llm\.backbone\.extra"),
        (damage_shape, r"norm_f\.weight has shape \(65,\), expected \(64,\); the config decides"),
        (damage_dtype, "is F16, expected F32|is F32, expected F16"),
        (damage_kept, "is BF16, expected F32; the state decays by it"),
        (damage_int, "has dtype 'I32', expected one of F32, BF16, F16"),
        (cut, "the last tensor ends there"),
        (append, "the last tensor ends there"),
        (wrong_digest, "sha256 is .*, expected 0000"),
        (one_bit, r"model\.safetensors: sha256 is"),
        (other_config, "whose shape is not that of the model"),
        (other_tokenizer, r"tokenizer\.json: model has type None"),
        (no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
        (link, "is a symbolic link"),
        (config_link, "is a symbolic link"),
        (fifo, "is no regular file"),
        (both, "expected one of them"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failing_load_leaves_the_model_untouched(copy, damage, message):
    directory, model, before = copy("one"), make(seed=2), make(seed=2)
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_into(model, directory)
    assert_same(model, before)
    with pytest.raises(CheckpointError):
        cobra.load(directory)


def test_differences_are_listed_ten_of_each(copy):
    directory = copy("one")
    tensors = load_file(directory / "model.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        cobra.load(directory)
    assert f"{len(tensors)} missing: " in str(error.value) and f"{len(tensors)} unexpected: x." in str(error.value)
    assert len(str(error.value)) < 2000 and str(error.value).count(", ...") == 2


# --- shards ----------------------------------------------------------------------------------------------------------


def index_of(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        "../one.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        ".safetensors",
        "x.bin",
        "a\0.safetensors",
        3,
        None,
        ["x"],
    ],
)
def test_shard_names_are_base_names(copy, name):
    directory = copy("many")
    index = index_of(directory)
    index["weight_map"]["llm.backbone.norm_f.weight"] = name
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"expected a \*\.safetensors name without a folder"):
        cobra.load(directory)


def test_shards_hold_what_the_index_says(copy):
    directory = copy("many")
    index = index_of(directory)
    first, second = sorted(set(index["weight_map"].values()))[:2]
    path = directory / "model.safetensors.index.json"

    moved = next(name for name, file in index["weight_map"].items() if file == first)
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {moved: second}}))
    with pytest.raises(CheckpointError, match="its tensors are not those that"):
        cobra.load(directory)
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {moved: "model-none.safetensors"}}))
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        cobra.load(directory)
    for bad in ({}, [], {"weight_map": {}}, {"weight_map": 3}, {"weight_map": {"a": "b.safetensors"}, "x": 1}):
        path.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
            cobra.load(directory)

    path.write_text(json.dumps(index))
    assert_same(cobra.load(directory), make())
    twice = load_file(directory / second) | {moved: load_file(directory / first)[moved]}
    save_file(twice, directory / second)
    with pytest.raises(CheckpointError, match="its tensors are not those that"):
        cobra.load(directory)
    (directory / first).rename(directory / "elsewhere")
    (directory / first).symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        cobra.load(directory)


# --- headers ---------------------------------------------------------------------------------------------------------

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def entry(**changes):
    return {"a": GOOD["a"] | changes, "b": GOOD["b"]}


@pytest.mark.parametrize(
    "header, message",
    [
        (entry(dtype="I64"), "has dtype 'I64'"),
        (entry(dtype=None), "has dtype None"),
        (entry(dtype=["F32"]), "has dtype"),
        (entry(shape=[2, -3]), "expected at most 8 positive integers"),
        (entry(shape=[0]), "expected at most 8 positive integers"),
        (entry(shape=[True, 6]), "expected at most 8 positive integers"),
        (entry(shape=[2.0, 3]), "expected at most 8 positive integers"),
        (entry(shape=[1] * 9), "expected at most 8 positive integers"),
        (entry(shape=6), "expected at most 8 positive integers"),
        (entry(shape=[2**62, 2**62, 2**62]), "spans 24 bytes, expected"),
        (entry(shape=[2**32, 2**32, 2, 3]), "spans 24 bytes, expected"),
        (entry(shape=[2, 4]), "spans 24 bytes, expected 32"),
        (entry(data_offsets=[24, 0]), "spans -24 bytes"),
        (entry(data_offsets=[-8, 16]), "expected two integers"),
        (entry(data_offsets=[0]), "expected two integers"),
        (entry(data_offsets=[0, 24.0]), "expected two integers"),
        (entry(data_offsets=[0, 2**64]), "expected two integers"),
        (entry(data_offsets=[8, 32]), "begins at byte"),
        (entry(data_offsets=[32, 56]), "begins at byte"),
        (entry(extra=1), "is not described by"),
        ({"a": GOOD["a"]}, "the last tensor ends there"),
        ({"a": GOOD["a"], "b": 3}, "is not described by"),
        ({"a": GOOD["a"], "b": {}}, "is not described by"),
        (GOOD | {"__metadata__": {"x": 1}}, "__metadata__"),
        (GOOD | {"__metadata__": []}, "__metadata__"),
        ({}, "has 0 tensors"),
        ({"__metadata__": {}}, "has 0 tensors"),
        ([], "header is no JSON object"),
        (3, "header is no JSON object"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_headers_that_are_refused(header, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.parse_header(json.dumps(header).encode(), 32, "x")


def test_headers_that_are_read():
    text = json.dumps({"__metadata__": {"format": "pt"}} | dict(reversed(GOOD.items()))).encode() + b"   "
    start = 8 + len(text)
    assert [(e.name, e.shape, e.begin - start, e.end - start) for e in checkpoint.parse_header(text, 32, "x")] == [
        ("a", (2, 3), 0, 24),
        ("b", (4,), 24, 32),
    ]


@pytest.mark.parametrize(
    "header, message",
    [
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "'dtype' is given twice"),
        (b'{"a": 1, "a": 1}', "'a' is given twice"),
        (b'\xff{"a": 1}', "not valid JSON"),
        (b' {"a": 1}', "header is no JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a":' * 50_000, "not valid JSON"),
        (json.dumps({str(i): 0 for i in range(20_001)}).encode(), "has 20,001 tensors, expected 1 to 20,000"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_header_bytes_that_are_refused(header, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.parse_header(header, 32, "x")


@pytest.mark.parametrize("length", [0, 1, 10, 17 << 20, 1 << 40, (1 << 64) - 1])
def test_header_length_is_checked(copy, length):
    directory = copy("one")
    body = (directory / "model.safetensors").read_bytes()[8:]
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + body)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        cobra.load(directory)
    (directory / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(CheckpointError, match="header has"):
        cobra.load(directory)


def test_a_header_over_the_limit_is_not_read(copy, monkeypatch):
    directory = copy("one")
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", checkpoint.MAX_HEADER_BYTES + 1))
        file.truncate(checkpoint.MAX_HEADER_BYTES + 100)
    monkeypatch.setattr(checkpoint, "parse_header", lambda *args: pytest.fail("parsed"))
    with pytest.raises(CheckpointError, match="expected 2 to 16,777,216 and to fit"):
        cobra.load(directory)


def test_nothing_is_allocated_for_a_wrong_header(copy, monkeypatch):
    """A sparse file of 1 TB whose header is consistent in itself: the config refuses it before one tensor exists."""
    directory = copy("one")
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 40))
    monkeypatch.setattr(checkpoint, "fill", lambda *args: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="missing"):
        cobra.load(directory)


def test_a_file_that_shrinks_while_it_is_read(copy, monkeypatch):
    directory, check = copy("one"), checkpoint.check_entries

    def shrink(*args):
        check(*args)
        os.truncate(directory / "model.safetensors", 20_000)

    monkeypatch.setattr(checkpoint, "check_entries", shrink)
    model, before = make(seed=2), make(seed=2)
    with pytest.raises(CheckpointError, match="file ends early"):
        checkpoint.load_into(model, directory)
    assert_same(model, before)


# --- manifest, official directory ------------------------------------------------------------------------------------


def test_manifest(copy, saved):
    assert set(json.loads((saved[1] / "many" / "manifest.json").read_text())["sha256"]) == set(
        os.listdir(saved[1] / "many")
    ) - {"manifest.json"}
    checkpoint.load(saved[1] / "many", require_manifest=True)
    directory = copy("one")
    with pytest.raises(CheckpointError, match=r"has no manifest\.json, expected one"):
        checkpoint.load(directory, require_manifest=True)
    checkpoint.load(directory)
    for bad in ("[]", "{}", '{"sha256": []}', '{"sha256": {"a": "xyz"}}', '{"sha256": {}, "md5": {}}', "{"):
        (directory / "manifest.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"manifest\.json: "):
            checkpoint.load(directory)
    digests = json.loads((saved[1] / "one" / "manifest.json").read_text())["sha256"]
    del digests["config.json"]
    (directory / "manifest.json").write_text(json.dumps({"sha256": digests}))
    with pytest.raises(CheckpointError, match=r"config\.json: sha256 is .*, expected none"):
        checkpoint.load(directory)


def test_the_index_is_in_the_manifest_too(saved, tmp_path):
    shutil.copytree(saved[1] / "many", tmp_path / "many")
    with open(tmp_path / "many" / "model.safetensors.index.json", "a") as file:
        file.write(" ")
    with pytest.raises(CheckpointError, match=r"index\.json: sha256 is"):
        checkpoint.load(tmp_path / "many")


def test_the_official_directory_is_not_unpickled_but_explained(tmp_path):
    directory = tmp_path / "cobra 3b"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "checkpoints" / "latest-checkpoint.pt").write_bytes(b"\x80\x02c__builtin__\nexit\n.")
    model = {
        "model_id": "cobra+3b",
        "vision_backbone_id": "dinosiglip-vit-so-384px",
        "llm_backbone_id": "mamba-2.8b-zephyr",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "llm_max_length": 2048,
    }
    (directory / "config.json").write_text(json.dumps({"model": model}))
    with pytest.raises(CheckpointError) as error:
        cobra.load(directory)
    line = (
        f"cobra convert '{directory}' '{directory}-safetensors' --dino vit_large_patch14_reg4_dinov2.lvd142m.safetensors "
        "--siglip ViT-SO400M-14-SigLIP-384.safetensors --tokenizer tokenizer.json"
    )
    assert str(error.value).splitlines()[1] == f"    {line}"


@pytest.mark.parametrize("what", ["nowhere", "file", "empty"])
def test_what_is_no_directory(tmp_path, what):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no directory, expected one|cannot be read: No such file"):
        cobra.load(tmp_path / what)
