"""Failures that users reported, kept from coming back: Cobra's own code, images, checkpoints. docs/catalogue.md maps rows to tests."""

from __future__ import annotations

import inspect
import io
import json
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import cobra
from cobra import checkpoint
from cobra.config import parse_config, preset
from cobra.errors import CheckpointError, ImageError, PromptError
from cobra.image import FORMATS, MAX_PIXELS, ImageTransform, load_image
from cobra.model import CobraVLM
from cobra.prompt import get_prompt_builder
from cobra.tokenizer import byte_tokenizer

WHITE = [255, 255, 255]


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(0)
    model = CobraVLM(preset("cobra-tiny"), byte_tokenizer()).eval().requires_grad_(False)
    model.llm.backbone.embedding.weight *= 10  # as initialised, all answers are alike
    for layer in model.llm.backbone.layers:
        layer.mixer.in_proj.weight *= 2
        layer.mixer.x_proj.weight *= 4
        layer.mixer.out_proj.weight *= 10
    for parameter in model.projector.parameters():
        parameter *= 2
    return model


@pytest.fixture(scope="module")
def directory(vlm, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(vlm, path)
    return path


# --- A9: Cobra's own code --------------------------------------------------------------------------------------------


def test_row_076_a_batch_answers_as_its_rows_alone(vlm):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8) for i in range(3)]
    texts = []
    for question in ("What?", "Which of these is the dog?", "Is it? Yes or no."):
        builder = get_prompt_builder("zephyr")
        builder.add_turn("human", question)
        texts.append(builder.get_prompt())
    together = vlm.generate_batch(images, texts, max_new_tokens=8)
    assert together == [vlm.generate(image, text, max_new_tokens=8) for image, text in zip(images, texts)]
    assert len(set(together)) > 1, "the answers are alike whatever the picture: the case tests nothing"


def test_row_077_key_differences_are_a_typed_error_with_names(directory, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["llm.backbone.norm.weight"] = weights.pop("llm.backbone.norm_f.weight")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"missing: llm\.backbone\.norm_f\.weight; 1 unexpected: llm\.backbone\.norm\.weight"
    ):
        cobra.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_078_a_cpu_model_asks_nothing_of_cuda(vlm, dtype, monkeypatch):
    for name in ("is_bf16_supported", "current_device", "synchronize", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: pytest.fail("asked a GPU"))
    prompt = vlm.get_prompt_builder().get_potential_prompt("What?")
    model = vlm if dtype == torch.float32 else CobraVLM(preset("cobra-tiny"), byte_tokenizer(), dtype=dtype).eval()
    assert isinstance(model.generate(np.zeros((9, 9, 3), np.uint8), prompt, max_new_tokens=3), str)


def test_row_079_loading_wants_no_token_and_no_network(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no .hf_token
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cobra.load(directory).config == preset("cobra-tiny")
    assert "token" not in " ".join(inspect.signature(cobra.load).parameters)


def test_row_080_long_prompts_are_not_cut_silently(vlm):
    tokenizer, text = vlm.tokenizer, "word " * 5000
    with pytest.raises(PromptError, match="tokens, expected at most 2,048; truncate=True"):
        tokenizer.encode(text, max_length=2048)
    assert len(tokenizer.encode(text, max_length=2048, truncate=True)) == 2048
    assert len(tokenizer.encode(text)) > 5000
    with pytest.raises(PromptError, match="expected at most 2048"):
        vlm.generate(None, text, max_new_tokens=1)


def test_row_081_urls_are_not_fetched(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("opened a socket"))
    for url in ("http://127.0.0.1/x.png", "https://example.com/x.png", "file:///etc/hostname"):
        with pytest.raises(ImageError, match="is a URL"):
            load_image(url)


def test_row_082_padding_on_either_side(vlm):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    pixels = vlm.preprocess(np.full((9, 9, 3), 77, np.uint8))
    want = vlm(ids, pixel_values=pixels, num_last_tokens=1).logits
    for padded, mask in (
        ([[0, 0, 5, 6, 7, 8, 9]], [[0, 0, 1, 1, 1, 1, 1]]),
        ([[5, 6, 7, 8, 9, 0, 0]], [[1, 1, 1, 1, 1, 0, 0]]),
    ):
        out = vlm(torch.tensor(padded), torch.tensor(mask), pixels).logits
        last = vlm.config.num_image_tokens + 4  # the tokens stand left, whatever the side of the padding
        torch.testing.assert_close(out[:, last], want[:, 0], rtol=1e-5, atol=1e-5)


# --- A10: images -----------------------------------------------------------------------------------------------------


def test_row_083_one_pipeline_turns_first_then_composites():
    """A PNG whose hidden colour and orientation a second reader could take otherwise: transparent red, turned by EXIF."""
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0] = 255  # red, transparent
    pixels[0, 0] = (0, 0, 255, 255)  # blue, opaque, in the corner that orientation 6 puts top right
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(pixels), "PNG", exif=exif)
    seen = np.asarray(load_image(data))
    assert seen.shape == (3, 2, 3) and seen[0, 1].tolist() == [0, 0, 255]
    assert (seen.reshape(-1, 3) == WHITE).all(1).sum() == 5
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(load_image(opened)), seen), "a PIL image takes the same way"


def test_row_084_rgba_composited():
    red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(red.convert("RGB"))[0, 0].tolist() == [255, 0, 0], "what a plain conversion does"
    assert np.asarray(load_image(red))[0, 0].tolist() == WHITE
    assert np.asarray(load_image(red, background=(1, 2, 3)))[0, 0].tolist() == [1, 2, 3]


def test_row_085_16_bit_is_scaled():
    deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16))
    assert np.asarray(load_image(encode(deep, "PNG")))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_row_086_first_frame_with_a_warning():
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="several frames; the first one is used"):
        assert np.asarray(load_image(data))[0, 0].tolist() == [10] * 3


@pytest.mark.parametrize("format", FORMATS)
def test_row_087_truncated_is_one_typed_error(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = encode(noise, format)
    with pytest.raises(ImageError):
        load_image(data[: len(data) // 2])


def test_row_088_bombs_are_refused_on_their_header(monkeypatch):
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS, "Pillow warns only above its own limit"
    bomb = encode(Image.new("1", (8, 8)), "BMP")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    bomb = bomb[:18] + struct.pack("<ii", 9000, 9000) + bomb[26:]
    with pytest.raises(ImageError, match="at most 64,000,000 pixels"):
        load_image(bomb)


def test_row_089_only_common_formats_are_opened():
    assert FORMATS == ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
    assert tuple(map(int, PIL.__version__.split(".")[:2])) >= (12, 3)
    fits = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b"END".ljust(80)
    for data in (
        encode(Image.new("RGB", (3, 3)), "EPS"),
        encode(Image.new("RGB", (3, 3)), "JPEG2000"),
        fits.ljust(5760),
    ):
        with pytest.raises(ImageError, match="expected JPEG, PNG, WEBP, BMP, GIF, TIFF"):
            load_image(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1), (3, 2)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_row_090_every_mode_and_aspect(mode, size):
    picture = Image.new(mode, size)
    for strategy in ("resize-naive", "resize-crop", "letterbox"):
        for pixels in ImageTransform(preset("cobra-tiny").vision, strategy)(picture).values():
            assert pixels.shape == (3, 112, 112) and pixels.dtype == torch.float32 and torch.isfinite(pixels).all()


# --- A11: checkpoints ------------------------------------------------------------------------------------------------


def test_row_091_a_pickle_is_never_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest-checkpoint.pt").write_bytes(b"\x80\x02.")
    (tmp_path / "config.json").write_text(preset("cobra-3b").to_json())
    with pytest.raises(
        CheckpointError, match=r"is a pickle, which can run code(.|\n)*cobra convert .* --dino .* --siglip "
    ):
        cobra.load(tmp_path)


def test_row_092_no_second_way_after_the_safe_one_failed(directory, tmp_path, monkeypatch):
    """A broken safetensors file beside a pickle: the pickle stays closed."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest-checkpoint.pt").write_bytes(b"\x80\x02.")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args: opened.append(Path(path).name) or real(path, *args))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("unpickled"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not valid JSON"):
        cobra.load(tmp_path)
    assert opened == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "key", ["auto_map", "_attn_implementation_internal", "trust_remote_code", "vision_config", "architectures"]
)
def test_row_093_a_config_names_no_code(key):
    for place in ([], ["lm"], ["vision"], ["vision", "towers", 0]):
        document = at = json.loads(preset("cobra-tiny").to_json())
        for step in place:
            at = at[step]
        at[key] = "someone/repository"
        with pytest.raises(CheckpointError, match=f"has unknown keys '{key}'"):
            parse_config(json.dumps(document))


def safetensors_bytes(header: dict | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data, message",
    [
        (struct.pack("<Q", 100 << 20) + b"{}", "header has 104,857,600 bytes"),
        (safetensors_bytes({"a": F32, "b": F32}, b"\0" * 8), "begins at byte"),
        (safetensors_bytes({"a": F32 | {"shape": [0], "data_offsets": [4, 4]}}, b"\0" * 8), "positive integers"),
        (safetensors_bytes({"a": F32}, b"\0" * 9), "the last tensor ends there"),
        (safetensors_bytes({"a": F32 | {"shape": [2**33, 2**31 + 1, 2**30]}}, b"\0" * 8), "spans 8 bytes, expected"),
        (safetensors_bytes({str(i): 0 for i in range(100_000)}, b"\0" * 8), "has 100,000 tensors"),
        (
            safetensors_bytes(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', b"\0" * 8),
            "given twice",
        ),
    ],
    ids=["header-100MB", "overlap", "zero-size", "appended", "shape-overflow", "100k-tensors", "duplicate-key"],
)
def test_row_094_headers_are_checked_before_any_allocation(directory, tmp_path, monkeypatch, data, message):
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(data)
    monkeypatch.setattr(checkpoint, "fill", lambda *args: pytest.fail("read a tensor"))
    with pytest.raises(CheckpointError, match=message):
        cobra.load(tmp_path)


def test_row_095_loading_is_strict_without_a_switch(directory, tmp_path):
    from safetensors.torch import load_file, save_file

    assert not {"strict", "ignore_mismatched_sizes"} & set(inspect.signature(checkpoint.load).parameters)
    weights = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    names = sorted(weights)
    save_file({name: weights[name] for name in names[20:]}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError) as error:
            cobra.load(tmp_path)
    assert f"20 missing: {', '.join(names[:10])}, ..." in str(error.value)
