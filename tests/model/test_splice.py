"""Splice: image first, text after, ragged rows, rows without an image."""

import pytest
import torch

from cobra.splice import IGNORE_INDEX, splice
from cobra_kernels.errors import ArgumentError, ShapeError

PATCHES, D = 3, 4


@pytest.fixture
def image():
    return torch.randn(2, PATCHES, D)


@pytest.fixture
def text():
    return torch.randn(2, 5, D)


def test_patches_first_then_text(image, text):
    embeddings, lengths, labels = splice(image, text)
    assert torch.equal(embeddings, torch.cat([image, text], 1))
    assert lengths.tolist() == [8, 8] and labels is None


def test_ragged_rows_are_left_aligned_and_padded_with_zeros(image, text):
    text[0, 2:] = float("nan")  # padding is never read
    embeddings, lengths, _ = splice(image, text, [2, 5])
    assert lengths.tolist() == [5, 8]
    assert torch.equal(embeddings[0], torch.cat([image[0], text[0, :2], torch.zeros(3, D)]))
    assert torch.equal(embeddings[1], torch.cat([image[1], text[1]]))


@pytest.mark.parametrize("row", [0, 1])
def test_rows_of_text_alone_keep_their_place(image, text, row):
    embeddings, lengths, _ = splice(image[:1], text, [4, 4], image_rows=[row])
    other = 1 - row
    assert lengths.tolist() == ([7, 4] if row == 0 else [4, 7])
    assert torch.equal(embeddings[row], torch.cat([image[0], text[row, :4]]))
    assert torch.equal(embeddings[other], torch.cat([text[other, :4], torch.zeros(3, D)]))


def test_image_rows_may_be_in_any_order(image, text):
    embeddings, _, _ = splice(image, text, image_rows=torch.tensor([1, 0]))
    assert torch.equal(embeddings, torch.cat([image.flip(0), text], 1))


def test_no_image(text):
    embeddings, lengths, _ = splice(None, text, [5, 1])
    assert lengths.tolist() == [5, 1]
    assert torch.equal(embeddings[0], text[0]) and not embeddings[1, 1:].any()
    assert torch.equal(splice(text.new_zeros(0, PATCHES, D), text, image_rows=[]).embeddings, text)


def test_labels_ignore_patches_and_padding(image, text):
    labels = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    out = splice(image[:1], text, [3, 5], image_rows=[0], labels=labels).labels
    ignore = IGNORE_INDEX
    assert out.tolist() == [[ignore] * 3 + [1, 2, 3], [6, 7, 8, 9, 10, ignore]]


def test_gradients_reach_image_and_text(image, text):
    image.requires_grad_(), text.requires_grad_()
    splice(image, text, [2, 5]).embeddings.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))
    assert text.grad[0, :2].eq(1).all() and not text.grad[0, 2:].any() and text.grad[1].eq(1).all()


def test_dtype_is_that_of_the_text(image, text):
    assert splice(image.bfloat16(), text).embeddings.dtype == torch.float32


def test_empty_batch():
    embeddings, lengths, _ = splice(None, torch.zeros(0, 5, D))
    assert embeddings.shape == (0, 0, D) and lengths.shape == (0,)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"text": torch.zeros(2, 5)}, ShapeError, r"text has shape \(2, 5\), expected \(batch, text_len, d_model\)"),
        ({"image": torch.zeros(2, 3, 5)}, ShapeError, r"d_model=4\); d_model comes from text"),
        ({"image": torch.zeros(1, 3, 4)}, ShapeError, "1 images for 2 rows of text"),
        ({"image_rows": [0]}, ShapeError, "image_rows has 1 rows, expected num_images=2"),
        ({"image_rows": [0, 0]}, ArgumentError, r"image_rows has \[0, 0\], expected different rows in 0..1"),
        ({"image_rows": [0, 2]}, ArgumentError, "different rows in 0..1; batch comes from text"),
        ({"image": None, "image_rows": [0]}, ArgumentError, "expected none without an image"),
        ({"text_lengths": [5]}, ShapeError, r"text_lengths has shape \(1,\), expected \(batch=2,\)"),
        ({"text_lengths": [5, 6]}, ArgumentError, "values in 0..text_len=5"),
        ({"labels": torch.zeros(2, 4, dtype=torch.long)}, ShapeError, r"labels has shape \(2, 4\), expected \(batch=2, text_len=5\)"),
    ],
)
def test_errors(image, text, change, error, message):
    with pytest.raises(error, match=message):
        splice(**{"image": image, "text": text, **change})
