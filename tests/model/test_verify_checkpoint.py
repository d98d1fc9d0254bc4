"""`cobra verify-checkpoint`: every tensor is named with its hash, and what is wrong is said, with an exit status."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cobra import checkpoint, cli
from cobra.config import preset
from cobra.model import CobraVLM
from cobra.tokenizer import byte_tokenizer
from tests.model.published import fill, official_lm, official_projector, timm_vit

TINY = preset("cobra-tiny")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    torch.manual_seed(0)
    checkpoint.save(CobraVLM(TINY, byte_tokenizer()), root / "one")
    checkpoint.save(CobraVLM(TINY, byte_tokenizer()), root / "many", max_shard_bytes=200_000)
    return root


@pytest.fixture
def directory(saved, tmp_path):
    """A copy to damage, without its manifest."""
    shutil.copytree(saved / "one", tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    return tmp_path / "copy"


@pytest.fixture
def verify(capsys):
    def run(path, *options):
        """(exit status, lines of stdout)"""
        status = cli.main(["verify-checkpoint", str(path), "--quiet", *map(str, options)])
        out, err = capsys.readouterr()
        return status, out.splitlines() + err.splitlines()

    return run


def sha256(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def wrong(lines):
    return [line.removeprefix("wrong: ") for line in lines if line.startswith("wrong: ")]


@pytest.mark.parametrize("kind", ["one", "many"])
def test_a_right_folder(verify, saved, kind):
    status, lines = verify(saved / kind)
    tensors = {name: t for file in (saved / kind).glob("*.safetensors") for name, t in load_file(file).items()}
    assert status == 0 and lines[-1].endswith(f"as cobra-tiny: {len(tensors)} tensors, nothing is wrong") and not wrong(lines)
    for name, tensor in tensors.items():
        shape = "x".join(map(str, tensor.shape))
        assert f"F32   {shape:16} {sha256(tensor)}  {name}" in lines


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_what_is_wrong_with_a_folder(verify, directory):
    def change(tensors):
        tensors["llm.backbone.extra"] = tensors.pop("llm.backbone.norm_f.weight")
        tensors["projector.projector.0.bias"] = torch.full((3,), float("nan"))
        tensors["llm.backbone.layers.0.mixer.D"] = tensors["llm.backbone.layers.0.mixer.D"].bfloat16()
        tensors["llm.backbone.layers.1.norm.weight"] = tensors["llm.backbone.layers.1.norm.weight"].half()

    rewrite(directory, change)
    status, lines = verify(directory)
    found = "\n".join(wrong(lines))
    assert status == 1 and lines[-1].endswith("something is wrong")
    for text in (
        "1 missing: llm.backbone.norm_f.weight",
        "1 unexpected: llm.backbone.extra",
        "projector.projector.0.bias has shape (3,), expected (320,)",
        "layers.0.mixer.D is BF16, expected F32",
        "layers.1.norm.weight is F16, expected F32",
        "1 with NaN or infinity: projector.projector.0.bias",
    ):
        assert text in found
    assert any("no manifest.json" in line for line in lines)


def test_one_bit(verify, saved, tmp_path):
    shutil.copytree(saved / "one", tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)
    status, lines = verify(tmp_path / "copy")
    assert status == 1 and len(wrong(lines)) == 1 and wrong(lines)[0].startswith("model.safetensors: sha256 is ")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    (tmp_path / "copy" / "config.json").write_text(TINY.to_json() + " ")
    assert sorted(line.split(":")[0] for line in wrong(verify(tmp_path / "copy")[1])) == ["config.json", "model.safetensors", "tokenizer.json"]
    file.write_bytes(data[:-1])
    status, lines = verify(tmp_path / "copy")
    assert status == 1 and "the last tensor ends there" in lines[-1]


def test_another_config(verify, saved, tmp_path):
    status, lines = verify(saved / "one", "--against", "cobra-laptop")
    assert status == 1 and "missing: " in wrong(lines)[0] and "unexpected" not in wrong(lines)[0]
    (tmp_path / "config.json").write_text(TINY.to_json())
    file = saved / "one" / "model.safetensors"
    for against in (tmp_path, tmp_path / "config.json", "cobra-tiny"):
        status, lines = verify(file, "--against", against)
        assert status == 0 and lines[0] == f"model.safetensors: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert verify(file)[0] == 0  # with nothing to compare: a list
    status, lines = verify(file, "--against", tmp_path / "nothing")
    assert status == 1 and "cannot be read" in lines[-1]


def test_an_official_folder(verify, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(TINY.to_json())
    lm, projector = fill(official_lm(64, 2, 512), 0), fill(official_projector(80, 64), 1)
    file = tmp_path / "checkpoints" / "latest-checkpoint.pt"
    torch.save({"model": {"projector": projector, "llm_backbone": lm}, "epoch": 2}, file)
    status, lines = verify(tmp_path)
    assert status == 0 and lines[0] == f"latest-checkpoint.pt: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}"
    name = "llm.backbone.norm_f.weight"
    assert f"F32   64               {sha256(lm[name])}  model.llm_backbone.{name}" in lines and "not a tensor: epoch (int)" in lines
    del lm[name], projector["projector.4.bias"]
    torch.save({"model": {"projector": projector, "llm_backbone": lm}}, file)
    status, lines = verify(tmp_path)
    assert status == 1 and "2 missing: model.llm_backbone.llm.backbone.norm_f.weight, model.projector.projector.4.bias" in lines[-2]


def test_a_tower(verify, tmp_path):
    tower = {name: torch.ones(shape) for name, shape in timm_vit(48, 3, 96, 14, 64).items()}
    save_file(tower, tmp_path / "t.safetensors")
    assert verify(tmp_path / "t.safetensors", "--against", "cobra-tiny")[0] == 0
    del tower["blocks.1.norm1.bias"]
    save_file(tower, tmp_path / "t.safetensors")
    status, lines = verify(tmp_path / "t.safetensors", "--against", "cobra-tiny")
    assert status == 1 and wrong(lines)[0].endswith("1 missing: blocks.1.norm1.bias")


def test_a_mamba_language_model(verify, tmp_path):
    shapes = {name.removeprefix("llm."): shape for name, shape in official_lm(32, 1, 64).items()}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 32, "n_layer": 1, "vocab_size": 61}))
    status, lines = verify(tmp_path)
    assert status == 0 and lines[-1].endswith(f"as a Mamba language model: {len(shapes)} tensors, nothing is wrong")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 32, "n_layer": 2, "vocab_size": 61}))
    status, lines = verify(tmp_path)
    assert status == 1 and wrong(lines)[0].startswith("10 missing: backbone.layers.1.mixer.A_log")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    assert "model_type is 'mamba2', expected 'mamba'" in wrong(verify(tmp_path)[1])[0]
