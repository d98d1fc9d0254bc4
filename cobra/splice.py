"""Splice: put image embeddings and text embeddings into one sequence per row.

    row with an image : [image tokens ; text tokens ; padding]
    row of text alone : [text tokens ; padding]

The image comes first and nothing stands before it, no BOS either: so what the model remembers after the image does not
depend on the question. Padding is at the end of a row only, `lengths` says where it starts, and `prefill` never reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cobra_kernels.errors import ArgumentError, ShapeError

IGNORE_INDEX = -100  # label that carries no loss


class Spliced(NamedTuple):
    """One sequence per row, left-aligned."""

    embeddings: Tensor  # (batch, seqlen, d_model), zeros from `lengths` on
    lengths: Tensor  # (batch,) int64, on the CPU: tokens of each row
    labels: Tensor | None  # (batch, seqlen) int64, IGNORE_INDEX on image tokens and padding


def splice(
    image: Tensor | None,
    text: Tensor,
    text_lengths: Sequence[int] | Tensor | None = None,
    *,
    image_rows: Sequence[int] | Tensor | None = None,
    labels: Tensor | None = None,
) -> Spliced:
    """Join image (num_images, patches, d_model) and text (batch, text_len, d_model) embeddings.

    text_lengths: (batch,) tokens of each row, the rest of `text` is padding; None: all of them.
    image_rows: (num_images,) the row that image i belongs to, each at most once; None: image i belongs to row i and every
        row has one. image None: text alone.
    labels: (batch, text_len) targets of the text tokens.
    """
    if text.dim() != 3:
        raise ShapeError(f"splice: text has shape {tuple(text.shape)}, expected (batch, text_len, d_model)")
    batch, text_len, d_model = text.shape
    lengths = _text_lengths(text_lengths, batch, text_len)
    if labels is not None and labels.shape != (batch, text_len):
        raise ShapeError(
            f"splice: labels has shape {tuple(labels.shape)}, expected (batch={batch}, text_len={text_len}); both come from text"
        )
    rows, patches = [], 0
    if image is not None:
        if image.dim() != 3 or image.shape[2] != d_model:
            raise ShapeError(
                f"splice: image has shape {tuple(image.shape)}, expected (num_images, patches, d_model={d_model}); d_model comes from text"
            )
        patches = image.shape[1]
        rows = _image_rows(image_rows, len(image), batch)
    elif image_rows is not None and len(image_rows):
        raise ArgumentError(f"splice: image_rows has {len(image_rows)} rows, expected none without an image")

    total = lengths.clone()
    total[rows] += patches
    seqlen = int(total.max()) if batch else 0
    has_image = [False] * batch
    for row in rows:
        has_image[row] = True
    embeddings = text.new_zeros(batch, seqlen, d_model)
    out_labels = None if labels is None else labels.new_full((batch, seqlen), IGNORE_INDEX)
    for i, row in enumerate(rows):
        embeddings[row, :patches] = image[i].to(text.dtype)
    for row, length in enumerate(lengths.tolist()):
        start = patches if has_image[row] else 0
        embeddings[row, start : start + length] = text[row, :length]
        if labels is not None:
            out_labels[row, start : start + length] = labels[row, :length]
    return Spliced(embeddings, total, out_labels)


def _text_lengths(text_lengths: Sequence[int] | Tensor | None, batch: int, text_len: int) -> Tensor:
    if text_lengths is None:
        return torch.full((batch,), text_len, dtype=torch.int64)
    lengths = torch.as_tensor(text_lengths).to("cpu", torch.int64)
    if lengths.shape != (batch,):
        raise ShapeError(f"splice: text_lengths has shape {tuple(lengths.shape)}, expected (batch={batch},); batch comes from text")
    if batch and not bool(((lengths >= 0) & (lengths <= text_len)).all()):
        raise ArgumentError(
            f"splice: text_lengths has {lengths.tolist()}, expected values in 0..text_len={text_len}; text_len comes from text"
        )
    return lengths.clone()


def _image_rows(image_rows: Sequence[int] | Tensor | None, num_images: int, batch: int) -> list[int]:
    if image_rows is None:
        if num_images != batch:
            raise ShapeError(
                f"splice: image has {num_images} images for {batch} rows of text, expected one for each row; say image_rows otherwise"
            )
        return list(range(batch))
    rows = [int(row) for row in image_rows]
    if len(rows) != num_images:
        raise ShapeError(f"splice: image_rows has {len(rows)} rows, expected num_images={num_images}; num_images comes from image")
    if len(set(rows)) != len(rows) or any(not 0 <= row < batch for row in rows):
        raise ArgumentError(f"splice: image_rows has {rows}, expected different rows in 0..{batch - 1}; batch comes from text")
    return rows
