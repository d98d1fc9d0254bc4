"""Folders of mamba_ssm and transformers: the model that is loaded gives their logits, and a folder that does not fit is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from cobra_kernels import errors
from cobra_kernels.modules import MambaConfig, MambaLMHeadModel, pretrained
from tests.model.published import official_lm
from tests.modules.models import make_ids, randomise
from tests.tolerances import LOGITS

transformers = pytest.importorskip("transformers")


def hugging_face(**options):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=61, use_mambapy=False, **options)
    model = randomise(transformers.MambaForCausalLM(config)).eval().requires_grad_(False)
    model.backbone.embeddings.weight *= 5  # or the logits are small, and any error in them too
    return model


@torch.no_grad()
def assert_same_logits(model, other):
    ids = make_ids(2, 11)
    got, want = model(ids).logits, other(ids).logits
    assert want.std() > 1 and (got - want).abs().max() <= LOGITS


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False}, {"state_size": 8, "conv_kernel": 3, "time_step_rank": 5, "use_bias": True, "layer_norm_epsilon": 1e-2}],
    ids=str,
)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_folder_of_transformers(tmp_path, options, shard):
    theirs = hugging_face(**options)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = MambaLMHeadModel.from_pretrained(tmp_path)
    assert not ours.training and ours.config.padded_vocab_size == 61
    assert (ours.lm_head.weight is ours.backbone.embedding.weight) == theirs.config.tie_word_embeddings
    assert_same_logits(ours, theirs)


def mamba_ssm_folder(folder, write=torch.save, name="pytorch_model.bin"):
    """As mamba_ssm writes it: a vocabulary that is padded, and the head stored as a second copy."""
    (folder / "config.json").write_text(
        json.dumps({"d_model": 32, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
                    "fused_add_norm": True, "pad_vocab_size_multiple": 8})
    )  # fmt: skip
    model = randomise(MambaLMHeadModel(MambaConfig(d_model=32, n_layer=2, vocab_size=61))).eval()
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    write(weights, folder / name)
    return model, weights


@pytest.mark.parametrize(("write", "name"), [(torch.save, "pytorch_model.bin"), (save_file, "model.safetensors")], ids=["bin", "safetensors"])
def test_a_folder_of_mamba_ssm(tmp_path, write, name):
    model, _ = mamba_ssm_folder(tmp_path, write, name)
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    half = MambaLMHeadModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {key for key, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    assert len(kept) == 6 and all(key.endswith(("A_log", ".D", "dt_proj.bias")) for key in kept)
    assert half.lm_head.weight.dtype == torch.bfloat16 and half.lm_head.weight is half.backbone.embedding.weight


def test_stored_in_half_precision(tmp_path):
    """What the state decays by is widened: the values are the file's, the arithmetic is fp32, and no layer warns."""
    mamba_ssm_folder(tmp_path, lambda w, path: save_file({k: t.bfloat16() for k, t in w.items()}, path), "model.safetensors")
    loaded = MambaLMHeadModel.from_pretrained(tmp_path)
    assert loaded.backbone.layers[0].mixer.A_log.dtype == torch.float32 and loaded.lm_head.weight.dtype == torch.bfloat16


def test_the_published_models():
    """state-spaces/mamba-2.8b and its relatives: names and shapes."""
    config = pretrained.parse_config(
        {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
         "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    )  # fmt: skip
    stored = {name.removeprefix("llm."): shape for name, shape in official_lm(2560, 64, 50280).items()}
    assert pretrained.differences(config, stored) == []
    theirs = {name.replace("embedding.", "embeddings."): shape for name, shape in stored.items() if not name.startswith("lm_head")}
    hub = {"model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64, "vocab_size": 50280, "intermediate_size": 5120}
    assert pretrained.differences(pretrained.parse_config(hub), theirs) == []


def refused(folder):
    with pytest.raises(errors.ArgumentError) as error:
        MambaLMHeadModel.from_pretrained(folder)
    return str(error.value)


def test_weights_that_do_not_fit(tmp_path):
    _, weights = mamba_ssm_folder(tmp_path)
    names = list(weights)
    bad = {(f"{name}.other" if name in names[1:13] else name): tensor for name, tensor in weights.items()}
    bad["backbone.norm_f.weight"] = torch.ones(5)
    torch.save(bad, tmp_path / "pytorch_model.bin")
    message = refused(tmp_path)
    assert "12 missing: " in message and "12 unexpected: " in message and message.count(", ...") == 2 and message.count(".other") == 10
    assert "1 of a wrong shape: backbone.norm_f.weight has shape (5,), expected (32,)" in message
    torch.save(weights | {"lm_head.weight": torch.ones(64, 32)}, tmp_path / "pytorch_model.bin")
    assert "lm_head.weight is not backbone.embedding.weight" in refused(tmp_path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_damaged(tmp_path):
    _, weights = mamba_ssm_folder(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:1000])
    assert "pytorch_model.bin: damaged or unreadable" in refused(tmp_path)
    torch.save(weights | {"x": Attack(tmp_path / "ran")}, file)
    message = refused(tmp_path)
    assert "holds code (posix.mkdir), which was not run" in message and not (tmp_path / "ran").exists()
    torch.save([weights], file)
    assert "holds something else than tensors by name" in refused(tmp_path)
    file.unlink()
    assert "has none of model.safetensors, model.safetensors.index.json, pytorch_model.bin" in refused(tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    assert "model.safetensors: damaged or unreadable" in refused(tmp_path)


def test_shards_that_do_not_fit(tmp_path):
    hugging_face().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(iter(load_file(tmp_path / first)))
    save_file(load_file(tmp_path / second) | {name: load_file(tmp_path / first)[name]}, tmp_path / second)
    assert "1 given in two files" in refused(tmp_path)
    (tmp_path / second).unlink()
    assert "damaged or unreadable" in refused(tmp_path)
    for bad in ("../x.safetensors", "/etc/passwd", "x.bin", 3):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": bad}}))
        assert "expected a *.safetensors name" in refused(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "is no object with a weight_map" in refused(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba', expected 'mamba'"),
        ({"model_type": "mamba", "hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"model_type": "mamba", "intermediate_size": 100}, "intermediate_size is 100, expected 1536"),
        ({"model_type": "mamba", "hidden_size": "x"}, "d_model has 'x', expected an int"),
        ({"model_type": "mamba", "state_size": 0}, r"ssm_cfg\['d_state'\] has 0"),
        ({"d_model": 32, "auto_map": {}}, "has the keys auto_map"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "has 'Mamba2', expected 'Mamba1'"),
        ([], "is list, expected an object"),
    ],
)
def test_configs_that_are_refused(config, message):
    with pytest.raises(errors.ArgumentError, match=message):
        pretrained.parse_config(config)


def test_no_config(tmp_path):
    assert "config.json: cannot be read" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused(tmp_path)
