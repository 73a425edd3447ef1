# SPDX-License-Identifier: Apache-2.0
"""Images of metrics: which names stand for one, which arrays are one, and that no file replaces another."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.loggers.images import image_extension, save_image


def pixels(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


@pytest.mark.parametrize(
    ("name", "extension"),
    [("png_a", "png"), ("a.JPG", "jpg"), ("gen/jpeg", "jpeg"), ("my_png", "png"), ("loss", None), ("jp_g", None)],
)
def test_names(name, extension):
    assert image_extension(name) == extension


RAMP = np.linspace(0, 1, 12).reshape(3, 4)


@pytest.mark.parametrize(
    "image",
    [
        RAMP,
        RAMP.astype(np.float16),
        torch.from_numpy(RAMP).requires_grad_(),
        torch.from_numpy(RAMP)[None].bfloat16(),
        (RAMP[..., None] * 255).round().astype(np.uint8),
        torch.from_numpy(RAMP * 255).round().int(),
    ],
    ids=["float64", "float16", "tensor with a gradient", "1xHxW bfloat16", "HxWx1 uint8", "int32"],
)
def test_grey(tmp_path, image):
    mode, read = pixels(save_image(image, str(tmp_path), "png_a", 0))
    assert mode == "L"
    assert np.abs(read - RAMP * 255).max() <= 1


@pytest.mark.parametrize("form", ["3xHxW uint8", "HxWx3 uint8", "3xHxW float", "HxWx3 float", "not contiguous"])
def test_colour(tmp_path, form):
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    image[0, 1, 2], image[2, 3, 4] = 255, 128
    given = image / 255.0 if "float" in form else image
    given = given.permute(1, 2, 0) if "HxWx3" in form else given
    given = given.flip(2).numpy()[:, :, ::-1] if form == "not contiguous" else given
    mode, read = pixels(save_image(given, str(tmp_path), "png_a", 0))
    assert mode == "RGB"
    assert np.array_equal(read, image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("form", ["HxWx4 uint8", "4xHxW float"])
def test_opacity(tmp_path, form):
    image = np.zeros((6, 5, 4), np.uint8)  # as the canvas of a figure of matplotlib gives it
    image[1, 2] = (255, 0, 0, 128)
    given = image if "uint8" in form else np.moveaxis(image, 2, 0) / 255
    mode, read = pixels(save_image(given, str(tmp_path), "png_a", 0))
    assert (mode, read.tolist()) == ("RGBA", image.tolist())
    assert pixels(save_image(given, str(tmp_path), "jpg_a", 0))[0] == "RGB"


def test_a_mask(tmp_path):
    _, read = pixels(save_image(torch.eye(3, dtype=torch.bool), str(tmp_path), "png_a", 0))
    assert np.array_equal(read, np.eye(3) * 255)


@pytest.mark.parametrize(
    ("name", "file", "kind"),
    [("png_a", "a_7.png", "PNG"), ("jpg_a", "a_7.jpg", "JPEG"), ("g/../JPEG a", "g_.._JPEG_a_7.jpeg", "JPEG")],
)
def test_files(tmp_path, name, file, kind):
    path = save_image(RAMP, str(tmp_path), name, 7)
    assert path == str(tmp_path / file)
    with Image.open(path) as image:
        assert image.format == kind


def test_no_image_replaces_another(tmp_path):
    paths = [save_image(RAMP, str(tmp_path), name, 0) for name in ("png_a b", "png_a:b", "png_a_b")]
    assert [os.path.basename(path) for path in paths] == ["a_b_0.png", "a_b_0-1.png", "a_b_0-2.png"]


@pytest.mark.parametrize(
    ("image", "expected", "match"),
    [
        ([[-1.0, 0.0, 1.0, 2.0]], [[0, 0, 255, 255]], r"'png_a' has values beyond 0 and 1 \(from -1.0 to 2.0\)"),
        ([[0.5, float("nan")]], [[128, 0]], "beyond 0 and 1"),
        ([[-1, 300]], [[0, 255]], r"beyond 0 and 255 \(from -1 to 300\)"),
    ],
)
def test_what_is_beyond_the_range_is_cut_off_with_a_warning(tmp_path, image, expected, match):
    with pytest.warns(LeydenWarning, match=match):
        path = save_image(np.array(image), str(tmp_path), "png_a", 0)
    assert pixels(path)[1].tolist() == expected


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 3, 4, 3)), np.zeros((2, 2, 2)), np.zeros((2, 2), complex), np.array([["a", "b"]]), np.zeros((0, 3))],
)
def test_what_is_no_image_is_refused(tmp_path, image):
    with pytest.raises(MisconfigurationException, match=r"'png_a' is no image: an array of shape .* An image is of"):
        save_image(image, str(tmp_path), "png_a", 0)
    assert os.listdir(tmp_path) == []


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MisconfigurationException, match="'png_a' needs the package 'pillow'.*pip install pillow"):
        save_image(RAMP, str(tmp_path), "png_a", 0)
