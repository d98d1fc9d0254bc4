"""`cobra convert`: the model that comes out computes what the one that went in did, and nothing bad comes through or is left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import cobra
from cobra import checkpoint, cli, convert, keymaps, source, unpickle
from cobra.config import TowerConfig, VisionConfig, parse_config, preset
from cobra.errors import CheckpointError
from cobra.source import Source, Stored, open_source
from cobra.tokenizer import byte_tokenizer
from cobra.vision import VisionBackbone
from tests.model.published import (
    TEXT_TOWER,
    fill,
    official_lm,
    official_projector,
    open_clip_names,
    run_timm_vit,
    timm_vit,
)
from tests.tolerances import GEMM, LOGITS, assert_close

transformers = pytest.importorskip("transformers")

TINY = preset("cobra-tiny")  # dino: width 32, 3 blocks; siglip: width 48, 3 blocks; 8 x 8 patches; Mamba: d_model 64, 2 layers
PREFIX = "visual.trunk."


@pytest.fixture(scope="module")
def weights():
    """A small official model: {"model": ..} of a latest-checkpoint.pt, and its towers as timm names them; DINOv2 on a larger grid."""
    return {
        "model": {
            "projector": fill(official_projector(80, 64), 1),
            "llm_backbone": fill(official_lm(64, 2, 512), 2),
        },
        "dino": fill(timm_vit(32, 3, 64, 14, 100, registers=4, kind="dinov2"), 3),
        "siglip": fill(timm_vit(48, 3, 96, 14, 64), 4),
    }


@pytest.fixture
def official(weights, tmp_path):
    """The folder, and the files of its towers: (folder, {"dino": .., "siglip": ..})."""
    folder = tmp_path / "cobra+tiny"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(TINY.to_json())
    torch.save({"model": weights["model"]}, folder / "checkpoints" / "latest-checkpoint.pt")
    save_file(weights["dino"], tmp_path / "dino.safetensors")
    prefixed = {PREFIX + name: tensor for name, tensor in weights["siglip"].items()}
    save_file(prefixed | {name: torch.ones(shape) for name, shape in TEXT_TOWER.items()}, tmp_path / "siglip.safetensors")
    return folder, {name: tmp_path / f"{name}.safetensors" for name in ("dino", "siglip")}


def left_behind(folder):
    return sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(".") or path.name == "out")


# --- values ----------------------------------------------------------------------------------------------------------


def source_logits(weights, pixels, ids):
    """The source model in plain torch, its language model in transformers."""
    features = [run_timm_vit(weights[name], pixels[name], 2, 2, 8) for name in ("dino", "siglip")]
    x = torch.cat(features, -1)
    p = weights["model"]["projector"]
    for i in (0, 2, 4):
        x = F.linear(F.gelu(x) if i else x, p[f"projector.{i}.weight"], p[f"projector.{i}.bias"])
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=512, use_mambapy=False, pad_token_id=None)
    lm = transformers.MambaForCausalLM(config).eval()
    renamed = {n[4:].replace("embedding.", "embeddings."): t for n, t in weights["model"]["llm_backbone"].items()}
    lm.load_state_dict(renamed, strict=True)
    return lm(inputs_embeds=torch.cat([x, lm.backbone.embeddings(ids)], 1)).logits[:, -ids.shape[1] :]


@torch.no_grad()
def test_the_converted_model_gives_the_logits_of_the_source(weights, official, tmp_path):
    folder, towers = official
    torch.save({"state_dict": weights["dino"]}, tmp_path / "dino.pt")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().to_json())
    seen = []
    config = convert.convert(
        folder, tmp_path / "out", towers=towers | {"dino": tmp_path / "dino.pt"}, tokenizer=tmp_path / "tokenizer.json",
        dtype=torch.float32, begin=lambda total: seen.append(-total) or seen.append,
    )  # fmt: skip
    assert config == TINY and sum(seen) == 0  # every byte that was announced has been read, once
    vlm = checkpoint.load(tmp_path / "out", require_manifest=True)
    g = torch.Generator().manual_seed(5)
    pixels = {name: torch.randn(2, 3, 112, 112, generator=g) for name in ("dino", "siglip")}
    ids = torch.randint(512, (2, 9), generator=g)
    want = source_logits(weights, pixels, ids)
    got = vlm(ids, pixel_values=pixels).logits[:, -9:]
    assert want.std() > 1
    assert (got - want).abs().max() <= LOGITS
    assert vlm.tokenizer.encode("hi") == byte_tokenizer().encode("hi")


def test_dtypes_and_one_head(weights, official, tmp_path, capsys):
    """bf16, through the command line: rounded once, but for what the state decays by; the head is stored once."""
    folder, towers = official
    (tmp_path / "out").mkdir()  # an empty folder will do
    line = [str(folder), str(tmp_path / "out"), "--dino", str(towers["dino"]), "--siglip", str(towers["siglip"])]
    assert cli.main(["convert", *line]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "token ids only" in err
    assert left_behind(folder) == ["out"] and os.stat(tmp_path / "out").st_mode & 0o777 == 0o777 & ~current_umask()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    lm = weights["model"]["llm_backbone"]
    assert {name for name in stored if name.startswith("llm.")} == lm.keys() - {"llm.lm_head.weight"}
    kept = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in lm if name.endswith((".A_log", ".D", ".dt_proj.bias"))}
    for name, tensor in lm.items():
        if name in stored:
            assert torch.equal(stored[name], tensor if name in kept else tensor.bfloat16()), name
    vlm = cobra.load(tmp_path / "out")
    assert vlm.dtype == torch.bfloat16 and vlm.llm.lm_head.weight is vlm.llm.backbone.embedding.weight


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- towers ----------------------------------------------------------------------------------------------------------

SPECS = {  # image_size is no multiple of patch_size: the last pixels are ignored, as 384 = 27 * 14 + 6
    "dinov2": TowerConfig("dino", "dinov2", 32, 4, 4, 128, 45, 8, registers=4),
    "siglip": TowerConfig("siglip", "siglip", 32, 4, 4, 84, 45, 8),
    "clip": TowerConfig("clip", "clip", 32, 4, 4, 128, 45, 8),
    "in1k": TowerConfig("in1k", "in1k", 32, 4, 4, 128, 40, 8),
}


def take_tower(spec, path):
    """Our tower with the weights of a file; raises what the converter would."""
    backbone = VisionBackbone(VisionConfig("one", (spec,)))
    shapes = {f"vision.{name}": tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    with open_source(path) as opened:
        origins, problems = {}, []
        convert.plan_tower(spec, opened, shapes, origins, problems)
        if problems:
            raise CheckpointError("\n".join(problems))
        plan = convert.Plan(TINY, shapes, origins, None, [])
        read = convert.Reader(plan, torch.float32, lambda count: None)
        backbone.load_state_dict({name.removeprefix("vision."): read(name) for name in plan.order})
    return backbone.eval()


def timm_weights(kind):
    spec = SPECS[kind]
    positions = {"dinov2": 36, "siglip": 25, "clip": 26, "in1k": 26}[kind]
    return fill(timm_vit(32, 4, spec.mlp_width, 8, positions, registers=spec.registers, kind=kind), 6)


@pytest.mark.parametrize(
    ("kind", "names"), [*((kind, "timm") for kind in SPECS), ("siglip", PREFIX), ("clip", "open_clip"), ("dinov2", "dinov2 release")]
)
@torch.no_grad()
def test_towers_with_timm_and_open_clip_names(kind, names, tmp_path):
    spec, w = SPECS[kind], timm_weights(kind)
    stored = dict(w)
    if names == PREFIX:
        stored = {PREFIX + name: tensor for name, tensor in w.items()}
    if names == "open_clip":
        stored = open_clip_names(w)
    if names == "dinov2 release":  # the class token's position is apart; timm adds it once
        place = torch.full((1, 1, 32), 0.25)
        stored["pos_embed"], stored["cls_token"] = torch.cat([place, w["pos_embed"]], 1), w["cls_token"] - place
        stored["register_tokens"], stored["mask_token"] = stored.pop("reg_token"), torch.ones(1, 32)
    save_file(stored, tmp_path / "tower.safetensors")
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(7))
    (got,) = take_tower(spec, tmp_path / "tower.safetensors")(pixels)
    assert_close(got, run_timm_vit(w, pixels, 4, 3, 5), GEMM)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_towers_with_hugging_face_names(kind, whole, tmp_path):
    """Files as transformers writes them: with the names of the hub, alone and within a larger model."""
    spec = SPECS[kind]
    names = {"dinov2": "Dinov2WithRegisters", "siglip": "SiglipVision", "clip": "CLIPVision", "in1k": "ViT"}
    common = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8, "image_size": spec.image_size}
    common |= {"mlp_ratio": 4, "num_register_tokens": 4} if kind == "dinov2" else {"intermediate_size": spec.mlp_width}
    common |= {"hidden_act": "quick_gelu" if kind == "clip" else "gelu", "layer_norm_eps": 1e-5 if kind == "clip" else 1e-6}
    if whole and kind in ("siglip", "clip"):
        text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}
        family = {"siglip": "Siglip", "clip": "CLIP"}[kind]
        outer = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(vision_config=common, text_config=text))
        model = outer.vision_model
    else:
        config = getattr(transformers, f"{names[kind]}Config")(**common)
        suffix = "ForImageClassification" if whole else "Model"
        outer = getattr(transformers, names[kind] + suffix)(config)
        model = getattr(outer, outer.base_model_prefix) if whole else outer
    g = torch.Generator().manual_seed(8)
    for name, p in outer.named_parameters():
        p.copy_(torch.randn(p.shape, generator=g) * (1.0 if "embed" in name or "token" in name else 0.3))
    outer.eval().save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size, generator=g)
    want = model(pixels, output_hidden_states=True).hidden_states[3][:, spec.prefix_tokens :]
    (got,) = take_tower(spec, tmp_path / "model.safetensors")(pixels)
    assert_close(got, want, GEMM)


def test_a_tower_that_does_not_fit(tmp_path):
    path, w = tmp_path / "t.safetensors", timm_weights("siglip")

    def refused(stored, spec=SPECS["siglip"]):
        save_file(stored, path)
        with pytest.raises(CheckpointError) as error:
            take_tower(spec, path)
        return str(error.value)

    message = refused({n.replace("blocks", "block"): t for n, t in w.items()})
    assert "36 missing: blocks.0.attn.proj.bias" in message
    assert "48 unexpected: block.0.attn.proj.bias" in message and message.count(", ...") == 2 and len(message) < 1500
    assert "pos_embed has shape (1, 36, 32), expected (1, 25, 32)" in refused(w | {"pos_embed": torch.ones(1, 36, 32)})
    assert "attn.qkv.weight has shape (64, 32), expected (96, 32)" in refused(w | {"blocks.1.attn.qkv.weight": torch.ones(64, 32)})
    assert "blocks.0.norm1.bias is I64" in refused(w | {"blocks.0.norm1.bias": torch.ones(32, dtype=torch.int64)})
    assert "is no siglip vision transformer" in refused({"x": torch.ones(2)})
    assert "1 unexpected: blocks.4.norm1.bias" in refused(w | {"blocks.4.norm1.bias": torch.ones(32)})
    message = refused(timm_weights("siglip"), SPECS["dinov2"])
    assert "cls_token" in message and "reg_token" in message and "ls1.gamma" in message
    save_file(w | {"blocks.0.norm1.bias": torch.full((32,), float("nan"))}, path)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm1\.bias has NaN"):
        take_tower(SPECS["siglip"], path)


# --- published names and shapes --------------------------------------------------------------------------------------

PUBLISHED = {
    "model_id": "cobra+3b",
    "vision_backbone_id": "dinosiglip-vit-so-384px",
    "llm_backbone_id": "mamba-2.8b-zephyr",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "image_resize_strategy": "resize-naive",
    "llm_max_length": 2048,
}


def listing(what, shapes, *path):
    """A source of which only names, shapes and dtypes exist."""
    return Source(what, [Stored((*path, name), "F32", shape, i) for i, (name, shape) in enumerate(shapes.items())], [], None)


def test_the_published_model():
    config = parse_config(json.dumps({"model": PUBLISHED}))
    lm, projector = official_lm(2560, 64, 50280), official_projector(2176, 2560)
    count = sum(torch.Size(shape).numel() for shape in (*lm.values(), *projector.values()))
    assert count * 4 == 11_779_407_872  # what the published file holds besides 241 kB of names
    official = listing("official", lm, "model", "llm_backbone")
    official.entries.extend(
        Stored(("model", "projector", name), "F32", shape, len(lm) + i) for i, (name, shape) in enumerate(projector.items())
    )
    towers = {
        "dino": listing("dino", timm_vit(1024, 24, 4096, 14, 37 * 37, registers=4, kind="dinov2")),
        "siglip": listing("siglip", timm_vit(1152, 27, 4304, 14, 27 * 27, prefix=PREFIX) | TEXT_TOWER),
    }
    plan = convert.plan_official(config, official, towers)
    assert plan.problems == [] and plan.head.shape == (50280, 2560)
    assert set(plan.order) == set(plan.shapes) == set(plan.origins)
    used = {(o.source.what, o.entry.index) for o in plan.origins.values()}
    unused = {entry.name for s in (official, *towers.values()) for entry in s.entries if (s.what, entry.index) not in used}
    blocks = ("blocks.23.", "norm.", PREFIX + "blocks.26.", PREFIX + "norm.", PREFIX + "attn_pool.", "text.", "logit_")
    assert unused - {"model.llm_backbone.llm.lm_head.weight"} == {name for name in unused if name.startswith(blocks)}

    without = convert.plan_official(config, official, {})
    assert len(without.problems) == 2 and "tower dino: no file is given" in without.problems[0] and "--dino FILE" in without.problems[0]
    smaller = replace(config, vision=preset("cobra-siglip").vision)
    assert any("projector.0.weight has shape" in p for p in convert.plan_official(smaller, official, {"siglip": towers["siglip"]}).problems)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["projector.weight", "projector.bias"]),
        ("gelu-mlp", ["projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias"]),
        (
            "fused-ldpnet",
            ["projector.0.weight", "projector.0.bias", "projector.2.weight", "projector.2.bias"]
            + ["projector.4.peg.0.weight", "projector.4.peg.0.bias"],
        ),
    ],
)
def test_the_other_projectors(kind, names):
    shapes = checkpoint.expected_shapes(checkpoint.meta_model(replace(TINY, projector_kind=kind)))
    assert {path[2] for path, _ in keymaps.official(shapes).values() if path[:2] == ("model", "projector")} == set(names)


def test_towers_within_a_checkpoint():
    """A run that trained its towers has them in the checkpoint, and no file is needed."""
    trained = timm_vit(32, 3, 64, 14, 64, registers=4, kind="dinov2", prefix="dino_featurizer.")
    trained |= timm_vit(48, 3, 96, 14, 64, prefix="siglip_featurizer.")
    official = listing("official", official_lm(64, 2, 512), "model", "llm_backbone")
    for part, shapes in (("projector", official_projector(80, 64)), ("vision_backbone", trained)):
        start = len(official.entries)
        official.entries.extend(Stored(("model", part, n), "F32", s, start + i) for i, (n, s) in enumerate(shapes.items()))
    plan = convert.plan_official(TINY, official, {})
    assert plan.problems == []
    assert plan.origins["vision.towers.dino.embeddings.cls_token"].entry.path[2] == "dino_featurizer.cls_token"


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(folder, towers, **options):
    """The message of a conversion that fails; nothing of it is left."""
    with pytest.raises(CheckpointError) as error:
        convert.convert(folder, folder.parent / "out", towers=towers, **options)
    assert left_behind(folder) == []
    return str(error.value)


def test_differences_are_listed_ten_of_each(weights, official):
    folder, towers = official
    lm = dict(weights["model"]["llm_backbone"])
    names = [name for name in lm if "layers" in name]
    for name in names[:11]:
        lm[f"{name}.extra"] = lm.pop(name)
    lm[names[12]] = torch.ones(3)
    torch.save({"model": {"projector": weights["model"]["projector"], "llm_backbone": lm}}, folder / "checkpoints" / "latest-checkpoint.pt")
    message = refused(folder, towers | {"siglip": towers["dino"]})
    assert "11 missing: model.llm_backbone.llm.backbone.layers.0" in message and "11 unexpected: model.llm_backbone." in message
    assert "1 of a wrong shape or dtype: " in message and "has shape (3,), expected (" in message
    assert message.count(".extra") == 10 and message.count("dino.safetensors") == 1  # the other file's fault is told in the same go
    for changed, text in (({"clip": towers["dino"]}, "towers has clip, expected dino, siglip"), ({"dino": folder}, "Is a directory")):
        assert text in refused(folder, towers | changed)


def test_a_head_that_is_not_the_embedding(weights, official):
    """Found while the output is being written: it is removed."""
    folder, towers = official
    lm = weights["model"]["llm_backbone"]
    lm = lm | {"llm.lm_head.weight": lm["llm.lm_head.weight"].clone().index_fill_(0, torch.tensor([511]), 0)}
    torch.save({"model": weights["model"] | {"llm_backbone": lm}}, folder / "checkpoints" / "latest-checkpoint.pt")
    assert "llm.lm_head.weight is not llm.backbone.embedding.weight, expected the same values" in refused(folder, towers)


class Attack:
    """What a pickle can be made to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_in_it(weights, official, tmp_path):
    folder, towers = official
    marker, file = tmp_path / "ran", folder / "checkpoints" / "latest-checkpoint.pt"
    torch.save({"model": weights["model"] | {"x": Attack(marker)}}, file)
    message = refused(folder, towers)
    assert "holds more than tensors in dictionaries (posix.mkdir)" in message and "nothing of it was run" in message
    assert "weights_only" not in message and not marker.exists()
    torch.load(file, weights_only=False)  # the attack is a real one
    assert marker.is_dir()
    file.write_bytes(pickle.dumps({"model": {}}))
    assert "older pickles are not opened" in refused(folder, towers)


def test_truncated_and_damaged(official):
    folder, towers = official
    file = folder / "checkpoints" / "latest-checkpoint.pt"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "damaged, or not written by torch.save" in refused(folder, towers)
    file.write_bytes(b"")
    assert "is neither a safetensors file nor" in refused(folder, towers)
    tower = towers["siglip"].read_bytes()
    towers["siglip"].write_bytes(tower[:-1])
    assert "the last tensor ends there" in refused(folder, towers)
    file.unlink()
    towers["siglip"].write_bytes(tower)
    assert "cannot be read: No such file" in refused(folder, towers)
    (folder / "config.json").write_text("{}")
    assert "neither our format" in refused(folder, towers)


def test_the_target_must_be_new(official, tmp_path):
    folder, towers = official
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("mine")
    with pytest.raises(CheckpointError, match="exists, expected a new or empty folder"):
        convert.convert(folder, tmp_path / "there", towers=towers)
    assert os.listdir(tmp_path / "there") == ["x"]
    with pytest.raises(CheckpointError, match="dtype is torch.float64"):
        convert.convert(folder, tmp_path / "out", towers=towers, dtype=torch.float64)


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(CheckpointError, match=r"has 0\.0 GB free, expected 4\.0 GB for out"):
        convert._write(tmp_path / "out", TINY, None, {"x": (torch.float32, (1_000_000_000,))}, None)
    assert os.listdir(tmp_path) == []


# --- the process that opens pickles ----------------------------------------------------------------------------------

LOCKED = """
import ctypes, os, signal, socket, subprocess, sys, threading, mmap
sys.path.append({here!r})
import unpickle
unpickle.lock_down(1 << 20)
open({file!r}).read()                      # reading is what is left
attempts = dict(
    socket=lambda: socket.socket(),
    unix_socket=lambda: socket.socketpair(),
    program=lambda: subprocess.run(["true"]),
    execve=lambda: os.execv("/bin/true", ["true"]),
    fork=lambda: os.fork(),
    thread=lambda: threading.Thread(target=print).start(),
    write=lambda: open({file!r}, "a"),
    create=lambda: open({file!r} + "2", "x"),
    remove=lambda: os.remove({file!r}),
    rename=lambda: os.rename({file!r}, {file!r} + "3"),
    mkdir=lambda: os.mkdir({file!r} + "4"),
    chmod=lambda: os.chmod({file!r}, 0),
    truncate=lambda: os.truncate({file!r}, 0),
    kill=lambda: os.kill(os.getppid(), 0),
    code=lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    memory=lambda: bytearray(3 << 30),
    again=lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_AS, (1 << 40, 1 << 40)),
)
for name, attempt in attempts.items():
    try:
        attempt()
        print(name)
    except (OSError, RuntimeError, MemoryError, ValueError):
        pass
print("end")
"""


@pytest.mark.skipif(platform.machine() not in unpickle._ARCHITECTURES or sys.platform != "linux", reason="seccomp is Linux's")
def test_what_a_locked_process_cannot_do(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    program = LOCKED.format(here=str(Path(unpickle.__file__).parent), file=str(file))
    done = subprocess.run([sys.executable, "-I", "-B", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["end"], done.stdout + done.stderr  # a name before the end is an attempt that succeeded
    assert os.listdir(tmp_path) == ["file"] and file.read_text() == "x"


def test_no_lock_no_reading(official, monkeypatch):
    """Where a process cannot be locked down nothing is opened, and there is no second way."""
    monkeypatch.setattr(unpickle.platform, "machine", lambda: "riscv64")
    with pytest.raises(unpickle.Refused, match="cannot be locked down on linux riscv64, expected linux on x86_64 or aarch64"):
        unpickle.lock_down(0)
    error = source._refused(Path("x.pt"), "Refused", "a process cannot be locked down")
    assert str(error) == "x.pt: not opened: a process cannot be locked down"


def test_the_filters_of_both_machines():
    for machine, last in (("x86_64", 334), ("aarch64", 293)):
        code = unpickle._filter(machine)
        assert len(code) % 8 == 0 and 100 < len(code) // 8 < 200
        column = list(unpickle._ARCHITECTURES).index(machine)
        numbers = [n[column] for n in unpickle._CALLS.values() if n[column] is not None]
        assert len(set(numbers)) == len(numbers) and max(numbers) <= last


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], "answers nonsense"),
        ({}, "answers nonsense"),
        ({"tensors": [[1, "float32", [2]]], "others": []}, "answers nonsense"),
        ({"tensors": [[["a"], "float32"]], "others": []}, "answers nonsense"),
        ({"tensors": [[["a"], ["float32"], [2]]], "others": []}, "answers nonsense"),
        ({"tensors": [[["a"], "complex64", [2]]], "others": []}, "has dtype complex64, expected one of float32"),
        ({"tensors": [[["a"], "float32", [-2]]], "others": []}, "expected at most 8 positive integers"),
        ({"tensors": [[["a"], "float32", [1 << 40]]], "others": []}, "bytes, expected no more than the 100 of the file"),
    ],
)
def test_answers_of_the_process_are_not_believed(answer, message, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=message):
        source._listing(tmp_path / "x.pt", json.dumps(answer).encode() + b"\n", None)


def test_what_is_no_tensor_is_told(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(2), "n": torch.tensor(5)}, "x": [torch.ones(1)]}, tmp_path / "x.pt")
    assert zipfile.is_zipfile(tmp_path / "x.pt")
    with open_source(tmp_path / "x.pt") as opened:
        assert [(e.name, e.dtype, e.shape) for e in opened.entries] == [("state_dict.a", "F32", (2,)), ("state_dict.n", "I64", ())]
        assert opened.others == ["epoch (int)", "x (list)"]
        assert opened.read(opened.entries[1]) == 5 and torch.equal(opened.read(opened.entries[0]), torch.ones(2))


def test_the_progress_bar(monkeypatch):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(cli, "_console", lambda: console)
    with cli._progress("converting x", False) as begin:
        advance = begin(3000)
        advance(1000)
        advance(2000)
    assert "converting x" in console.file.getvalue() and "3.0/3.0 kB" in console.file.getvalue()
