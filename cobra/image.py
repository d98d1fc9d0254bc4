"""From any picture to the pixels of each tower, in bounded time and memory.

    path | bytes | PIL image | numpy array -> load_image -> RGB -> ImageTransform -> {"dino": (3, px, px), ...} fp32

One pipeline, whatever the source: check size and format from the header, decode, apply the EXIF orientation, composite
transparency over a stated colour, RGB. Two readers that disagree on any of these see two different pictures.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import warnings
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .config import RESIZE_STRATEGIES, TowerConfig, VisionConfig
from .errors import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | np.ndarray"

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow opens some forty; the rare decoders are the risk
MAX_BYTES = 32 << 20
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535
WHITE = (255, 255, 255)

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_URL = re.compile(r"[a-z][a-z0-9+.-]*:(//|[a-z-]+/[a-z-]+[;,])", re.IGNORECASE)  # scheme://..., data:image/png;...


def load_image(
    source: ImageSource,
    *,
    background: tuple[int, int, int] = WHITE,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Read a picture as an RGB PIL image, upright.

    source: a path; the bytes of a file (JPEG, PNG, WebP, BMP, GIF, TIFF); a PIL image (its current frame; not changed);
        or an array (height, width), (height, width, 1 | 3 | 4) of uint8, uint16 or bool. URLs are not read.
    background: the colour under transparent pixels.
    max_bytes, max_pixels: limits on the file and on width * height, checked before any pixel is decoded.

    16-bit grey is scaled by 1/257 (16-bit colour keeps its high byte, all that the decoder gives). Of several frames the
    first is taken, with a UserWarning. Raises ImageError for everything that is not a picture.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, background, max_pixels)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, max_pixels), background, max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        size = memoryview(source).nbytes
        if not 0 < size <= max_bytes:
            raise ImageError(f"load_image: source has {size:,} bytes, expected 1 to {max_bytes:,}")
        data = bytes(source)
    elif isinstance(source, (str, os.PathLike)):
        data = _read_file(source, max_bytes)
    else:
        raise ImageError(
            f"load_image: source is {type(source).__name__}, expected a path, bytes, a PIL image or a numpy array"
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            _check_size(image.size, max_pixels)
            if image.format in ("GIF", "PNG", "TIFF", "WEBP") and getattr(image, "is_animated", False):
                warnings.warn("load_image: source has several frames; the first one is used", UserWarning, stacklevel=2)
            if image.format == "PNG" and data[24] == 16 and isinstance(image.info.get("transparency"), tuple):
                # the decoder keeps the high byte of 16-bit colours, but gives the transparent colour in 16 bits
                image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
            return _to_rgb(image, background, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"load_image: source is no readable picture, expected {', '.join(FORMATS)}") from None
    except MemoryError:
        raise ImageError("load_image: source does not fit in memory") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, ...
        raise ImageError(f"load_image: source is damaged: {type(error).__name__}: {error!s:.200}") from error


def _read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    if isinstance(path, str) and _URL.match(path):
        raise ImageError("load_image: source is a URL, expected a path; fetch it first, with your own limits")
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a FIFO must not block us
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"load_image: {os.fspath(path)!r:.200} is no regular file")
            if not 0 < status.st_size <= max_bytes:
                raise ImageError(f"load_image: file has {status.st_size:,} bytes, expected 1 to {max_bytes:,}")
            return file.read(max_bytes)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path; ImageError is one too
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"load_image: cannot read {os.fspath(path)!r:.200}: {error}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE and width * height <= max_pixels):
        raise ImageError(
            f"load_image: source has {width} x {height} pixels, expected sides of 1 to {MAX_SIDE:,} "
            f"and at most {max_pixels:,} pixels"
        )


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    shape = array.shape
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise ImageError(f"load_image: array has shape {shape}, expected (height, width) or (height, width, 1 | 3 | 4)")
    _check_size((shape[1], shape[0]), max_pixels)
    if array.dtype == np.uint16:
        array = _scale_16(array)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        raise ImageError(
            f"load_image: array has dtype {array.dtype}, expected uint8 (0..255), uint16 (0..65535) or bool"
        )
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _scale_16(array: np.ndarray) -> np.ndarray:
    """(any shape) uint16 -> uint8, value / 257 rounded to nearest: 65535 becomes 255."""
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 (upright) when there is none or it cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  SyntaxError, struct.error, ... on a damaged block
        return 1


def _to_rgb(image: Image.Image, background: tuple[int, int, int], max_pixels: int) -> Image.Image:
    if (
        not isinstance(background, tuple)
        or len(background) != 3
        or not all(type(v) is int and 0 <= v <= 255 for v in background)
    ):
        raise ImageError(
            f"load_image: background is {background!r:.80}, expected a tuple of three integers from 0 to 255"
        )
    _check_size(image.size, max_pixels)
    try:
        image.load()
        turn = _ORIENTATIONS.get(_orientation(image))  # after load: for TIFF the decoder has then turned it already
        if image.mode.startswith("I;16"):
            image = _grey_16(image)
        if image.mode in ("I", "F"):
            raise ImageError(
                f"load_image: source has mode {image.mode}, expected 8 or 16 bits a channel: white is not defined"
            )
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.new("RGB", rgba.size, background)
            image.paste(rgba, mask=rgba.getchannel("A"))
        elif image.mode != "RGB":
            image = image.convert("RGB")
        if turn is not None:
            image = image.transpose(turn)
        elif image.info:
            image = image.copy()  # not the caller's, whose info stays
        image.info = {}  # or else its orientation would be applied again by the next reader
        return image
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"load_image: source cannot be decoded: {type(error).__name__}: {error!s:.200}") from error


def _grey_16(image: Image.Image) -> Image.Image:
    """16-bit grey -> L, or LA when one grey value stands for transparency."""
    values = np.asarray(image)
    grey = Image.fromarray(_scale_16(values))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


# ------------------------------------------------------------------------------------------------ transform

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_NORMALISATION = {  # tower kind -> mean, std of each channel
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": _HALF,
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "in1k": _HALF,
}
MAX_INTERMEDIATE = MAX_PIXELS  # pixels of a picture between input and output; beyond it, the same result another way


class ImageTransform:
    """Resizes and normalises a picture for every tower, as Cobra was trained.

    strategy "resize-naive": both sides to px, the aspect is lost; "resize-crop": shorter side to px, centre kept;
    "letterbox": padded to a square with the tower's mean colour first. Resizing is Pillow's bicubic on 8 bits.
    """

    def __init__(self, vision: VisionConfig, strategy: str = "resize-naive"):
        if strategy not in RESIZE_STRATEGIES:
            raise ImageError(
                f"ImageTransform: strategy is {strategy!r}, expected one of {', '.join(RESIZE_STRATEGIES)}"
            )
        self.vision = vision
        self.strategy = strategy

    def __call__(self, source: ImageSource, **options) -> dict[str, torch.Tensor]:
        """source and options: as in `load_image`. Returns tower name -> (3, px, px) fp32."""
        image = load_image(source, **options)
        resized: dict[tuple, Image.Image] = {}  # towers of one size share the resize, unless they pad differently
        pixels = {}
        for tower in self.vision.towers:
            mean, std = _NORMALISATION[tower.kind]
            fill = tuple(int(value * 255) for value in mean)
            key = (tower.image_size, _shorter_side(tower), fill if self.strategy == "letterbox" else None)
            if key not in resized:
                resized[key] = self._resize(image, tower, fill)
            array = np.asarray(resized[key]).transpose(2, 0, 1)  # (3, px, px) uint8
            tensor = torch.from_numpy(np.ascontiguousarray(array)).float() / 255
            shape = (3, 1, 1)
            pixels[tower.name] = (tensor - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        return pixels

    def _resize(self, image: Image.Image, tower: TowerConfig, fill: tuple[int, ...]) -> Image.Image:
        px = tower.image_size
        if self.strategy == "resize-naive":
            return image.resize((px, px), Image.Resampling.BICUBIC)
        if self.strategy == "letterbox":
            return _letterbox(image, px, _shorter_side(tower), fill)
        return _resize_crop(image, px, _shorter_side(tower))


def _shorter_side(tower: TowerConfig) -> int:
    """What the shorter side becomes before the centre is cropped: px; CLIP B/16 alone keeps 90% of a larger one."""
    margin = 0.9 if tower.kind == "clip" and tower.patch_size == 16 else 1.0
    return math.floor(tower.image_size / margin)


def _resize_crop(image: Image.Image, px: int, side: int) -> Image.Image:
    """Shorter side to `side`, then the central (px, px)."""
    width, height = image.size
    if width <= height:
        full = (side, int(side * height / width))
    else:
        full = (int(side * width / height), side)
    left, top = round((full[0] - px) / 2), round((full[1] - px) / 2)
    if full[0] * full[1] > MAX_INTERMEDIATE:  # a thin strip: resample only the part that is kept, and what it reads
        x, y = width / full[0], height / full[1]
        reach_x, reach_y = 2 * max(x, 1) + 1, 2 * max(y, 1) + 1  # of the cubic
        first_x, first_y = max(0, math.floor(left * x - reach_x)), max(0, math.floor(top * y - reach_y))
        last_x = min(width, math.ceil((left + px) * x + reach_x))
        last_y = min(height, math.ceil((top + px) * y + reach_y))
        part = image.crop((first_x, first_y, last_x, last_y))
        box = (left * x - first_x, top * y - first_y, (left + px) * x - first_x, (top + px) * y - first_y)
        return part.resize((px, px), Image.Resampling.BICUBIC, box=box)
    return image.resize(full, Image.Resampling.BICUBIC).crop((left, top, left + px, top + px))


def _letterbox(image: Image.Image, px: int, side: int, fill: tuple[int, ...]) -> Image.Image:
    """Pad to a square, equally on both sides (one pixel short when the difference is odd), then as `_resize_crop`."""
    longest = max(image.size)
    right, down = ((longest - length) // 2 for length in image.size)
    padded = (image.width + 2 * right, image.height + 2 * down)
    if padded[0] * padded[1] <= MAX_INTERMEDIATE:
        return _resize_crop(ImageOps.expand(image, (right, down), fill=fill), px, side)
    # Too large to build. Resizing is separable: shrink along the strip, pad across it, shrink across.
    if image.height > image.width:
        return _letterbox(image.transpose(Image.Transpose.TRANSPOSE), px, side, fill).transpose(
            Image.Transpose.TRANSPOSE
        )
    column = Image.new("RGB", (side, padded[1]), fill)
    column.paste(image.resize((side, image.height), Image.Resampling.BICUBIC), (0, down))
    margin = round((side - px) / 2)
    return column.resize((side, side), Image.Resampling.BICUBIC).crop((margin, margin, margin + px, margin + px))
