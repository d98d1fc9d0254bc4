"""The image pipeline against arithmetic written here, and every way a picture can be odd."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cobra.image as image_module
from cobra.config import RESIZE_STRATEGIES, VISION_BACKBONES, preset
from cobra.errors import CobraError, ImageError
from cobra.image import ImageTransform, load_image

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (13, 22, 3), dtype=np.uint8))  # 22 wide, 13 high
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"lossless": True} if format == "WEBP" else {}), **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(1).integers(0, 60, (height, width))
    return Image.fromarray(
        np.stack([x * 195 // width, y * 195 // height, (x + y) % 195], -1).astype(np.uint8)
        + noise[..., None].astype(np.uint8)
    )


# --- the arithmetic, written out -------------------------------------------------------------------------------------


def bicubic_matrix(size: int, target: int) -> np.ndarray:
    """(target, size): the cubic with a = -1/2, widened by the scale when shrinking, normalised inside the picture."""
    scale = size / target
    width = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    low = np.maximum((centre - 2 * width + 0.5).astype(int), 0)
    high = np.minimum((centre + 2 * width + 0.5).astype(int), size)
    columns = np.arange(size)
    x = np.abs((columns[None] - centre[:, None] + 0.5) / width)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights[(columns[None] < low[:, None]) | (columns[None] >= high[:, None])] = 0
    return weights / weights.sum(1, keepdims=True)


def resize(array: np.ndarray, width: int, height: int) -> np.ndarray:
    """(h, w, 3) uint8: along rows, rounded to 8 bits, then along columns, rounded."""

    def round8(values):
        return np.clip(np.floor(values + 0.5), 0, 255)

    across = array.astype(np.float64)
    if width != array.shape[1]:
        across = round8(bicubic_matrix(array.shape[1], width) @ across)
    if height != array.shape[0]:
        across = round8(np.tensordot(bicubic_matrix(array.shape[0], height), across, 1))
    return across


def expected_pixels(array: np.ndarray, strategy: str, px: int, mean, std) -> np.ndarray:
    height, width = array.shape[:2]
    if strategy == "letterbox":
        longest = max(height, width)
        down, right = int((longest - height) / 2), int((longest - width) / 2)
        square = np.empty((height + 2 * down, width + 2 * right, 3), np.uint8)
        square[:] = [int(m * 255) for m in mean]
        square[down : down + height, right : right + width] = array
        array, (height, width) = square, square.shape[:2]
    if strategy == "resize-naive":
        full = (px, px)
    else:
        full = (px, int(px * height / width)) if width <= height else (int(px * width / height), px)
    resized = resize(array, *full)
    left, top = round((full[0] - px) / 2), round((full[1] - px) / 2)
    resized = resized[top : top + px, left : left + px]
    return ((resized / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


CONSTANTS = {
    "dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@pytest.mark.parametrize("strategy", RESIZE_STRATEGIES)
@pytest.mark.parametrize("size", [(640, 480), (100, 301), (384, 384), (31, 20), (1, 7)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_transform_equals_the_arithmetic_written_out(strategy, size):
    picture = gradient(*size)
    got = ImageTransform(preset("cobra-3b").vision, strategy)(picture)
    assert list(got) == ["dino", "siglip"]
    for name, (mean, std) in CONSTANTS.items():
        assert got[name].shape == (3, 384, 384) and got[name].dtype == torch.float32
        want = expected_pixels(np.asarray(picture), strategy, 384, mean, std)
        steps = np.abs(got[name].numpy() - want) * np.array(std)[:, None, None] * 255
        assert steps.max() < 1.01, (
            "more than one level of 8 bits"
        )  # Pillow's weights have 22 bits: a tie may fall the other way
        assert (steps > 0.01).mean() < 1e-3


@pytest.mark.parametrize("strategy", RESIZE_STRATEGIES)
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 10000), (10000, 1), (2, 3), (65535, 1), (3, 30000)], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_extreme_shapes(strategy, size):
    colour = (10, 128, 250)
    got = ImageTransform(preset("cobra-3b").vision, strategy)(Image.new("RGB", size, colour))
    for name, (mean, std) in CONSTANTS.items():
        assert got[name].shape == (3, 384, 384)
        seen = got[name].mean((1, 2)) * torch.tensor(std) + torch.tensor(mean)
        if strategy != "letterbox" or size[0] == size[1]:  # one colour stays that colour
            assert torch.allclose(seen * 255, torch.tensor(colour).float(), atol=1e-3)


@pytest.mark.parametrize("size", [(900, 37), (37, 900), (701, 64), (64, 701)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("strategy", ["resize-crop", "letterbox"])
def test_a_strip_gives_the_same_without_the_large_intermediate(monkeypatch, strategy, size):
    transform = ImageTransform(preset("cobra-3b").vision, strategy)
    plain = transform(gradient(*size))
    monkeypatch.setattr(image_module, "MAX_INTERMEDIATE", 0)
    for name, tensor in transform(gradient(*size)).items():
        levels = (tensor - plain[name]).abs() * torch.tensor(CONSTANTS[name][1]).view(3, 1, 1) * 255
        # tall pictures are shrunk in the other order, and what overshoots 8 bits in between is cut elsewhere
        assert levels.max() < 6.01 and (levels > 0.01).float().mean() < 0.05


def test_sizes_and_margins_follow_the_tower():
    for id_, vision in VISION_BACKBONES.items():
        got = ImageTransform(vision, "resize-crop")(gradient(50, 40))
        assert {name: tuple(t.shape) for name, t in got.items()} == {
            t.name: (3, t.image_size, t.image_size) for t in vision.towers
        }, id_
    picture = gradient(500, 400)
    got = ImageTransform(VISION_BACKBONES["clip-vit-b"], "resize-crop")(picture)[
        "clip"
    ]  # 248 = floor(224 / 0.9), then 224
    want = (
        np.asarray(picture.resize((310, 248), Image.Resampling.BICUBIC).crop((43, 12, 267, 236))).transpose(2, 0, 1)
        / 255
    )
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(got.numpy(), (want - mean[:, None, None]) / std[:, None, None], atol=1e-5)
    with pytest.raises(ImageError, match="expected one of resize-naive, resize-crop, letterbox"):
        ImageTransform(VISION_BACKBONES["clip-vit-b"], "corner-pad")


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_formats_paths_and_bytes(format, tmp_path):
    data = encode(PICTURE, format)
    (tmp_path / "picture").write_bytes(data)  # the content decides, not the name
    reference = Image.open(io.BytesIO(data)).convert("RGB")
    for source in (data, bytearray(data), memoryview(data), tmp_path / "picture", str(tmp_path / "picture")):
        assert np.array_equal(pixels(load_image(source)), np.asarray(reference))


@pytest.mark.parametrize("format", ["PPM", "ICO", "TGA", "SGI", "PCX", "JPEG2000", "PDF", "EPS", "DDS"])
def test_other_formats_are_refused(format):
    with pytest.raises(ImageError, match="expected JPEG, PNG, WEBP, BMP, GIF, TIFF"):
        load_image(encode(PICTURE, format))


def test_what_is_no_picture(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    for source in (
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"x" * 1000,
        3,
        None,
        [1],
        tmp_path,
        tmp_path / "empty",
        tmp_path / "none",
    ):
        with pytest.raises(ImageError):
            load_image(source)
    for source in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ImageError, match="no regular file"):
            load_image(source)
    with pytest.raises(ImageError, match="cannot read"):
        load_image("a\0b")
    assert issubclass(ImageError, CobraError) and issubclass(ImageError, ValueError)


@pytest.mark.parametrize(
    "url", ["https://example.com/a.png", "HTTP://x", "file:///etc/passwd", "ftp://x/y", "data:image/png;base64,iVBO"]
)
def test_urls_are_not_read(url):
    with pytest.raises(ImageError, match="is a URL"):
        load_image(url)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated(format):
    data = encode(gradient(64, 48), format)
    for keep in (0.2, 0.5, 0.8):
        with pytest.raises(ImageError):
            load_image(data[: int(len(data) * keep)])


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int = 8, colour: int = 2, chunks: bytes = b"", rows: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_limits_are_checked_on_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for size in ((8001, 8000), (65_536, 1), (1, 65_536), (60_000, 60_000), (0, 5)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ImageError):
                load_image(png(*size))
    monkeypatch.undo()
    with pytest.raises(ImageError, match="at most 285 pixels"):
        load_image(encode(PICTURE, "PNG"), max_pixels=285)
    with pytest.raises(ImageError, match="at most 285 pixels"):
        load_image(np.asarray(PICTURE), max_pixels=285)
    with pytest.raises(ImageError, match="at most 285 pixels"):
        load_image(PICTURE, max_pixels=285)
    assert load_image(PICTURE, max_pixels=286).size == (22, 13)
    data = encode(PICTURE, "PNG")
    (tmp_path / "p").write_bytes(data)
    for source in (data, memoryview(data), tmp_path / "p"):
        with pytest.raises(ImageError, match=f"has {len(data):,} bytes, expected 1 to {len(data) - 1:,}"):
            load_image(source, max_bytes=len(data) - 1)
    assert load_image(tmp_path / "p", max_bytes=len(data)).size == (22, 13)


def test_the_demo_photo():
    path = Path(__file__).resolve().parents[2] / "assets" / "astronaut.jpg"
    assert load_image(path).size == (512, 512) and path.stat().st_size < 300_000


# --- one meaning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(format, orientation):
    upright = gradient(40, 24)
    stored = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }.get(orientation, lambda a: a)(np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    got = load_image(encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif, **options))
    assert load_image(got).tobytes() == got.tobytes() and not got.info and not got.getexif(), "turned once, not twice"
    difference = np.abs(pixels(got).astype(int) - np.asarray(upright))
    assert difference.max() <= (40 if format == "JPEG" else 0) and difference.mean() < 5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0" * 30]
)
def test_unreadable_exif_means_upright(exif):
    assert np.array_equal(pixels(load_image(encode(PICTURE, "PNG", exif=exif))), np.asarray(PICTURE))


def over(rgb, alpha, background):
    alpha = np.asarray(alpha, np.float64)[..., None] / 255
    return np.floor(np.asarray(rgb) * alpha + np.array(background) * (1 - alpha) + 0.5)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (12, 200, 99)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_alpha_over_a_stated_colour(mode, background):
    rgba = RNG.integers(0, 256, (9, 11, 4), dtype=np.uint8)
    rgba[..., :3] = rgba[..., :1] if mode in ("LA", "PA") else rgba[..., :3]
    image = Image.fromarray(rgba)
    if mode == "PA":
        image = image.convert("LA").convert("PA")
    elif mode != "RGBA":
        image = image.convert(mode)
    as_rgba = np.asarray(image.convert("RGBA"))
    got = pixels(load_image(image, background=background))
    assert np.abs(got - over(as_rgba[..., :3], as_rgba[..., 3], background)).max() <= 1
    assert image.mode == mode, "the caller's image changed"


def test_background_must_be_a_colour():
    for background in ((1, 2), (1, 2, 256), (1.0, 2, 3), "white", None, [1, 2, 3]):
        with pytest.raises(ImageError, match="expected a tuple of three integers"):
            load_image(PICTURE, background=background)


def test_transparent_colours_of_png_and_gif():
    red, green = [255, 0, 0], [0, 255, 0]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([*red, *green])
    assert pixels(load_image(encode(palette, "PNG", transparency=b"\0\xff"))).tolist() == [[[255] * 3, green]]
    assert pixels(load_image(encode(palette, "PNG", transparency=b"\x80\xff"))).tolist() == [[[255, 127, 127], green]]
    assert pixels(load_image(encode(palette, "GIF", transparency=0))).tolist() == [[[255] * 3, green]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert pixels(load_image(encode(grey, "PNG", transparency=7))).tolist() == [[[255] * 3, [8] * 3]]
    colour = Image.fromarray(np.array([[red, green]], np.uint8))
    assert pixels(load_image(encode(colour, "PNG", transparency=(255, 0, 0)))).tolist() == [[[255] * 3, green]]


def test_transparent_colour_of_16_bit_png():
    key = chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x0056, 0xFF78))
    rows = b"\0" + struct.pack(">HHHHHH", 0x1234, 0x0056, 0xFF78, 0x5634, 0x0056, 0xFF78)
    assert pixels(load_image(png(2, 1, 16, 2, key, rows))).tolist() == [[[255] * 3, [0x56, 0, 255]]]
    key, rows = chunk(b"tRNS", struct.pack(">H", 300)), b"\0" + struct.pack(">HH", 300, 301)
    assert pixels(load_image(png(2, 1, 16, 0, key, rows))).tolist() == [[[255] * 3, [1] * 3]]


@pytest.mark.parametrize("source", ["png", "tiff", "array"])
def test_16_bit_is_scaled_not_clipped(source):
    values = np.array([[0, 1, 128, 129, 255, 256, 257, 32768, 65407, 65535]], np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    given = {"png": lambda: encode(image, "PNG"), "tiff": lambda: encode(image, "TIFF"), "array": lambda: values}[
        source
    ]()
    got = pixels(load_image(given))
    assert got[0, :, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 128, 255, 255]
    assert np.array_equal(got[..., 0], got[..., 2])


def test_other_modes():
    cmyk = Image.fromarray(RNG.integers(0, 256, (5, 6, 4), dtype=np.uint8), "CMYK")
    for source in (cmyk, encode(cmyk, "TIFF")):
        c, k = np.asarray(cmyk)[..., :3].astype(int), np.asarray(cmyk)[..., 3:].astype(int)
        assert np.abs(pixels(load_image(source)).astype(int) - (255 - c) * (255 - k) / 255).max() <= 1
    assert load_image(encode(cmyk, "JPEG", quality=95)).size == (6, 5)
    one = Image.fromarray(np.eye(5, dtype=bool))
    assert np.array_equal(pixels(load_image(encode(one, "PNG")))[..., 1], np.eye(5) * 255)
    assert {load_image(PICTURE.convert(mode)).mode for mode in ("YCbCr", "HSV", "LAB", "RGBX")} == {"RGB"}
    for mode in ("F", "I"):
        for source in (PICTURE.convert(mode), encode(PICTURE.convert(mode), "TIFF")):
            with pytest.raises(ImageError, match="white is not defined"):
                load_image(source)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_with_a_warning(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="several frames; the first one"):
        got = load_image(data)
    assert pixels(got)[4, 4].tolist() == [255, 0, 0]
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(load_image(opened))[4, 4].tolist() == [0, 255, 0]  # a PIL image: its current frame
    assert opened.tell() == 1


def test_the_callers_image_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    given = Image.open(io.BytesIO(encode(PICTURE, "PNG", exif=exif)))
    info, size = dict(given.info), given.size
    assert load_image(given).size == size[::-1] and given.size == size and given.info == info
    given = PICTURE.copy()
    given.info["comment"] = "mine"
    load_image(given)
    assert given.info == {"comment": "mine"}


def test_arrays():
    array = np.asarray(PICTURE)
    assert np.array_equal(pixels(load_image(array)), array)
    assert np.array_equal(pixels(load_image(array[::-1, ::2])), array[::-1, ::2])
    assert np.array_equal(pixels(load_image(array[..., 0]))[..., 2], array[..., 0])
    assert np.array_equal(pixels(load_image(array[..., :1]))[..., 2], array[..., 0])
    assert pixels(load_image(np.zeros((2, 3, 4), np.uint8))).min() == 255  # transparent
    assert pixels(load_image(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]
    for bad in (
        np.zeros(5, np.uint8),
        np.uint8(3) * np.ones(()),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((0, 3), np.uint8),
        array / 255.0,
    ):
        with pytest.raises(ImageError, match="load_image: (array|source)"):
            load_image(bad)
