"""Hostile inputs, each made from one integer: pictures, safetensors files, configs, indexes, tokenizers, prompts.

    python -m tests.fuzz.inputs SEED        run one case again and print what it was

Every case must end in a result that satisfies its invariants, or in a `CobraError`.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import random
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from cobra import checkpoint
from cobra.config import MAX_PARAMETERS, PRESETS, parse_config, preset
from cobra.errors import CobraError
from cobra.image import MAX_PIXELS, ImageTransform, load_image
from cobra.prompt import get_prompt_builder
from cobra.tokenizer import Tokenizer, byte_tokenizer

INTERESTING = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    32767,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)

# ------------------------------------------------------------------------------------------------ bytes


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to six small wounds: flipped bits, replaced numbers, cut, copied, inserted or missing pieces."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 200)))
        kind = rng.randrange(8)
        if kind <= 1 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at : at + length] = rng.randbytes(length)
        elif kind == 3:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            out[at : at + width] = (rng.choice(INTERESTING) % (1 << 8 * width)).to_bytes(width, order)
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            source = rng.randrange(len(out) + 1)
            out[at:at] = out[source : source + length]
        elif kind == 6:
            del out[at:]
        else:
            out += rng.randbytes(length)
    return bytes(out)


# ------------------------------------------------------------------------------------------------ pictures


def _encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@functools.cache
def pictures() -> list[tuple[str, bytes]]:
    """Small valid files of every format, in the modes and with the extras that readers treat differently."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (9, 14, 4), dtype=np.uint8))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    deep = Image.fromarray(rng.integers(0, 65536, (9, 14), dtype=np.uint16))
    palette = rgb.quantize(8)
    modes = {"1": rgb.convert("1"), "L": grey, "LA": rgba.convert("LA"), "P": palette, "RGB": rgb, "RGBA": rgba}
    other = {
        "CMYK": rgb.convert("CMYK"),
        "I16": deep,
        "F": rgb.convert("F"),
        "I": rgb.convert("I"),
        "YCbCr": rgb.convert("YCbCr"),
    }
    files = [(f"png-{mode}", _encode(image, "PNG")) for mode, image in modes.items()]
    files += [
        ("png-I16", _encode(deep, "PNG")),
        ("png-P-tRNS", _encode(palette, "PNG", transparency=bytes(range(0, 256, 32)))),
        ("png-L-tRNS", _encode(grey, "PNG", transparency=7)),
        ("png-RGB-tRNS", _encode(rgb, "PNG", transparency=(1, 2, 3))),
        ("png-I16-tRNS", _encode(deep, "PNG", transparency=300)),
        ("png-animated", _encode(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90), rgb])),
    ]
    files += [
        (f"jpeg-{mode}", _encode(image, "JPEG")) for mode, image in (("L", grey), ("RGB", rgb), ("CMYK", other["CMYK"]))
    ]
    files.append(("jpeg-progressive", _encode(rgb, "JPEG", progressive=True, subsampling=2)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        format = ("JPEG", "PNG", "WEBP", "TIFF")[orientation % 4]
        files.append((f"{format.lower()}-exif{orientation}", _encode(rgb, format, exif=exif)))
    files += [
        ("webp-lossy", _encode(rgb, "WEBP")),
        ("webp-lossless", _encode(rgba, "WEBP", lossless=True)),
        ("webp-animated", _encode(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)])),
    ]
    files += [(f"bmp-{mode}", _encode(modes[mode], "BMP")) for mode in ("1", "L", "P", "RGB", "RGBA")]
    files += [
        ("gif", _encode(palette, "GIF")),
        ("gif-transparent", _encode(palette, "GIF", transparency=0)),
        ("gif-animated", _encode(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90), grey], disposal=2)),
    ]
    files += [(f"tiff-{mode}", _encode(image, "TIFF")) for mode, image in (modes | other).items()]
    files += [(f"tiff-{c}", _encode(rgb, "TIFF", compression=f"tiff_{c}")) for c in ("lzw", "adobe_deflate")]
    files += [
        ("tiff-jpeg", _encode(rgb, "TIFF", compression="jpeg")),
        ("tiff-packbits", _encode(rgb, "TIFF", compression="packbits")),
        ("tiff-group4", _encode(modes["1"], "TIFF", compression="group4")),
        ("tiff-pages", _encode(rgb, "TIFF", save_all=True, append_images=[grey, deep])),
    ]
    return files


def _repair_png(data: bytes) -> bytes:
    """Right checksums for whatever the chunks now hold: without this a mutated PNG seldom gets past its first chunk."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def _false_size(rng: random.Random, name: str, data: bytes) -> bytes:
    """The same file with other sides in its header: a bomb, an empty picture, or something in between."""
    sides = [
        rng.choice((0, 1, 15, 255, 5000, 7999, 8001, 20_000, 65_535, 65_536, 2**31 - 1, 2**32 - 1)) for _ in range(2)
    ]
    out = bytearray(data)
    if name.startswith("png"):
        out[16:24] = struct.pack(">II", *sides)
        return _repair_png(bytes(out))
    if name.startswith("bmp"):
        out[18:26] = struct.pack("<II", *sides)
    elif name.startswith("gif"):
        out[6:10] = struct.pack("<HH", *(side & 0xFFFF for side in sides))
    elif name.startswith("jpeg"):
        frame = next((i for i in range(len(out) - 9) if out[i] == 0xFF and out[i + 1] in (0xC0, 0xC2)), None)
        if frame is not None:
            out[frame + 5 : frame + 9] = struct.pack(">HH", *(side & 0xFFFF for side in sides))
    elif name.startswith("tiff"):
        directory = int.from_bytes(out[4:8], "little")
        for i in range(int.from_bytes(out[directory : directory + 2], "little")):
            entry = directory + 2 + 12 * i
            tag = int.from_bytes(out[entry : entry + 2], "little")
            if tag in (256, 257):
                out[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, sides[tag - 256])
    elif name.startswith("webp"):
        out[rng.randrange(20, 32)] = rng.randrange(256)
    return bytes(out)


@functools.cache
def _transforms() -> list[ImageTransform]:
    return [ImageTransform(preset("cobra-tiny").vision, s) for s in ("resize-naive", "resize-crop", "letterbox")]


def picture_case(rng: random.Random) -> tuple[str, Callable[[], Any]]:
    name, data = rng.choice(pictures())
    if rng.random() < 0.25:
        data = _false_size(rng, name, data)
    if rng.random() < 0.8:
        data = mutate_bytes(rng, data)
    if name.startswith("png") and rng.random() < 0.8:
        data = _repair_png(data)
    transform = rng.choice(_transforms()) if rng.random() < 0.1 else None

    def run() -> str:
        image = load_image(data)
        assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS
        if transform:
            for tensor in transform(image).values():
                assert tensor.shape == (3, 112, 112) and torch.isfinite(tensor).all()
        return f"{image.size}"

    return f"{name}, {len(data)} bytes", run


# ------------------------------------------------------------------------------------------------ JSON

VALUES = (None, True, False, 0, 1, -1, 3, 2**31, 2**53, 2**63, 2**64, 10**40, 0.5, -0.0, 1e308, "", "a", "\0", "../x", "\ud800",
          "x" * 300, [], {}, [0], [[]], {"a": 1}, [1, 2, 3], "F32", "BF16", "float32", "NaN")  # fmt: skip


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    found, todo = [], [document]
    while todo:
        at = todo.pop()
        items = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
        for key, value in items:
            found.append((at, key))
            todo.append(value)
    return found


def mutate_json(rng: random.Random, document: Any) -> bytes:
    """Values replaced, removed, renamed, copied elsewhere; sometimes a key twice, a constant that is no JSON, or wounds."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        places = _places(document)
        if not places:
            break
        container, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("", "x", "a", "__metadata__", "auto_map", "type", "\udc00", "k" * 1000))] = (
                container.pop(key)
            )
        elif kind == 2:
            other, name = rng.choice(places)
            value = json.loads(json.dumps(other[name])) if _has(other, name) else 0
            container[key] = value
        elif kind == 3 and type(container[key]) is int:
            container[key] += rng.choice((-8, -1, 1, 8, 2**32, 2**64))
        else:
            container[key] = copy.deepcopy(
                rng.choice(VALUES)
            )  # shared, a later case would see what this one does to it
    text = json.dumps(document)
    kind = rng.random()
    if kind < 0.05 and text.startswith("{") and len(text) > 2:
        text = '{"a": 1, "a": 2, ' + text[1:]
    elif kind < 0.10:
        text = text.replace(str(rng.randrange(10)), rng.choice(("NaN", "Infinity", "1e999", "0x1", "9" * 5000)), 1)
    elif kind < 0.12:
        depth = rng.choice((10, 1000, 100_000))
        text = "[" * depth + text + "]" * depth
    data = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.25 else data


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


# ------------------------------------------------------------------------------------------------ checkpoints

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.mixer.D": torch.ones(4),
    "c.bias": torch.zeros(5),
    "d": torch.ones(1, 1, 2),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@functools.cache
def safetensors_file() -> tuple[dict, bytes]:
    """Header and data of a valid file."""
    data = save(TENSORS, metadata={"format": "pt"})
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def header_case(rng: random.Random) -> tuple[str, Callable[[], Any]]:
    document, body = safetensors_file()
    header, size = mutate_json(rng, document), rng.choice((len(body), len(body), len(body), 0, 2**40))

    def run() -> str:
        entries = checkpoint.parse_header(header, size, "file")
        position = 8 + len(header)
        for entry in entries:
            assert entry.begin == position
            assert (
                entry.end - entry.begin
                == int(np.prod(entry.shape, dtype=object)) * checkpoint.DTYPES[entry.dtype].itemsize
            )
            position = entry.end
        assert position == 8 + len(header) + size
        checkpoint.check_entries(entries, SHAPES)
        return f"{len(entries)} tensors"

    return f"header of {len(header)} bytes", run


def file_case(rng: random.Random) -> tuple[str, Callable[[], Any]]:
    document, body = safetensors_file()
    header = mutate_json(rng, document) if rng.random() < 0.5 else json.dumps(document).encode()
    data = struct.pack("<Q", len(header)) + header + body
    if rng.random() < 0.7:
        data = mutate_bytes(rng, data)
    index = None
    if rng.random() < 0.3:
        index = mutate_json(
            rng, {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(TENSORS, "part.safetensors")}
        )

    def run() -> str:
        with tempfile.TemporaryDirectory() as folder:
            name = checkpoint.WEIGHTS if index is None else "part.safetensors"
            Path(folder, name).write_bytes(data)
            if index is not None:
                Path(folder, checkpoint.INDEX).write_bytes(index)
            weights = checkpoint._read_tensors(Path(folder), SHAPES, {}, None)
        assert {n: tuple(t.shape) for n, t in weights.items()} == SHAPES
        return "read"

    return f"file of {len(data)} bytes, index {index is not None}", run


def config_case(rng: random.Random) -> tuple[str, Callable[[], Any]]:
    upstream = {
        "model": {
            "model_id": "cobra+3b",
            "vision_backbone_id": "dinosiglip-vit-so-384px",
            "llm_backbone_id": "mamba-2.8b-zephyr",
            "arch_specifier": "no-align+fused-gelu-mlp",
            "image_resize_strategy": "resize-naive",
            "llm_max_length": 2048,
            "finetune_epochs": 2,
        },
        "stage": "finetune",
        "seed": 7,
    }
    document = upstream if rng.random() < 0.3 else PRESETS[rng.choice(list(PRESETS))].to_dict()
    data = mutate_json(rng, document)

    def run() -> str:
        config = parse_config(data)
        assert parse_config(config.to_json()) == config and hash(config) is not None
        assert 0 < config.num_parameters <= MAX_PARAMETERS and config.num_image_tokens > 0
        return config.model_id

    return f"config of {len(data)} bytes", run


# ------------------------------------------------------------------------------------------------ text


@functools.cache
def _tokenizer() -> tuple[Tokenizer, dict]:
    tokenizer = byte_tokenizer(300)
    return tokenizer, json.loads(tokenizer.to_json())


def tokenizer_case(rng: random.Random) -> tuple[str, Callable[[], Any]]:
    data = mutate_json(rng, _tokenizer()[1])

    def run() -> str:
        tokenizer = Tokenizer.from_json(data)
        tokenizer.check(preset("cobra-3b").lm)
        ids = tokenizer.encode("What is it? é")
        assert all(0 <= i < len(tokenizer) for i in ids)
        tokenizer.decode(ids)
        return f"{len(tokenizer)} ids"

    return f"tokenizer of {len(data)} bytes", run


def prompt_case(rng: random.Random) -> tuple[str, Callable[[], Any]]:
    words = (
        "<|endoftext|>",
        "<|padding|>",
        "<|user|>",
        "<image>",
        "\n",
        " ",
        "\0",
        "é",
        "\ud800",
        "漢",
        "True",
        "a" * 50,
        "<|",
        "|>",
    )
    messages = ["".join(rng.choice(words) for _ in range(rng.randrange(4))) for _ in range(rng.randrange(1, 6))]
    kind = rng.choice(("zephyr", "base"))

    def run() -> str:
        builder = get_prompt_builder(kind)
        for i, message in enumerate(messages):
            builder.add_turn("gpt" if i % 2 else "human", message)
        ids = _tokenizer()[0].encode(builder.get_prompt())
        turns = len(messages) if kind == "zephyr" else len(messages) // 2
        assert ids.count(0) == turns and 1 not in ids, "a special token that the format did not put there"
        return f"{len(ids)} tokens"

    return f"{kind} {messages}", run


# ------------------------------------------------------------------------------------------------ one seed

KINDS = (
    (0.30, picture_case),
    (0.66, header_case),
    (0.72, file_case),
    (0.90, config_case),
    (0.95, tokenizer_case),
    (1.00, prompt_case),
)


def case(seed: int) -> tuple[str, Callable[[], Any]]:
    """What seed stands for, and the call that must end in a result or a CobraError."""
    rng = random.Random(seed)
    at = rng.random()
    make = next(make for limit, make in KINDS if at < limit)
    name, run = make(rng)
    return f"{make.__name__}: {name}", run


def execute(seed: int) -> str:
    """The outcome of one case; anything but a result or a CobraError propagates."""
    run = case(seed)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return f"result: {run()}"
        except CobraError as error:
            assert str(error), "an error without a message"
            return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(case(int(sys.argv[1]))[0])
    print(execute(int(sys.argv[1])))
