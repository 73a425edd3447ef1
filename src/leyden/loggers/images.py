# SPDX-License-Identifier: Apache-2.0
"""Write arrays as image files: which names of metrics stand for images, and what an array may look like."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.runtime.ranks import rank_zero_warn

_EXTENSIONS = ("jpeg", "jpg", "png")
_CHANNELS = (1, 3, 4)


def image_extension(name: str) -> str | None:
    """Return ``"png"``, ``"jpg"`` or ``"jpeg"`` if ``name`` contains it, in whatever case; else None."""
    lower = name.lower()
    return next((extension for extension in _EXTENSIONS if extension in lower), None)


def save_image(value: Any, folder: str, name: str, index: int) -> str:
    """Write ``value`` to a new file in ``folder`` and return its path.

    Args:
        value: a tensor or array of shape (H, W), (H, W, channels) or (channels, H, W): floats from 0 to 1, integers from
            0 to 255, or bools. There are 1, 3 or 4 channels, the fourth being opacity, which a jpeg leaves out. Values
            beyond the range are cut off, with a warning.
        folder: a directory that exists.
        name: contains the extension; the file is named after the rest, as in ``png_digits`` -> ``digits_<index>.png``.
        index: a number that tells it from other images of that name.

    Raises:
        MisconfigurationException: for an array of another shape or kind, and if Pillow is not installed.
    """
    extension = image_extension(name)
    assert extension is not None
    pixels = _pixels(value, name)
    try:
        from PIL import Image  # noqa: PLC0415  only a run that logs images pays for it
    except ImportError as error:
        raise MisconfigurationException(
            f"Writing the image {name!r} needs the package 'pillow', which is not installed: run `pip install pillow`."
        ) from error
    stem = re.sub(rf"^{extension}_+", "", re.sub(r"[^\w.-]+", "_", name), flags=re.IGNORECASE)
    path = os.path.join(folder, f"{stem}_{index}.{extension}")
    copies = 0
    while os.path.lexists(
        path
    ):  # two names that differ only in what a file name cannot hold, or a crash before this row
        copies += 1
        path = os.path.join(folder, f"{stem}_{index}-{copies}.{extension}")
    image = Image.fromarray(pixels)
    (image if extension == "png" or image.mode != "RGBA" else image.convert("RGB")).save(path)
    return path


def _pixels(value: Any, name: str) -> NDArray[np.uint8]:
    """Return ``value`` as uint8 of shape (H, W), (H, W, 3) or (H, W, 4)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()  # numpy lacks bfloat16
    array: NDArray[Any] = np.asarray(value)
    first, last = (array.shape[0], array.shape[2]) if array.ndim == 3 else (0, 0)
    # a width of 4 is likelier than an image of 1 or 3 rows
    if (first in (1, 3) and last not in (1, 3)) or (first == 4 and last not in _CHANNELS):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    shape_is_right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if not shape_is_right or array.size == 0 or array.dtype.kind not in "fiub":
        raise MisconfigurationException(
            f"The value of {name!r} is no image: an array of shape {tuple(np.shape(value))} and type {array.dtype}. "
            "An image is of shape (H, W), (H, W, channels) or (channels, H, W), with 1, 3 or 4 channels, and with floats "
            "from 0 to 1 or integers from 0 to 255."
        )
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * 255
    top = 1.0 if array.dtype.kind == "f" else 255
    inside = bool(((array >= 0) & (array <= top)).all())
    if not inside:
        rank_zero_warn(
            f"The image {name!r} has values beyond 0 and {top:g} (from {array.min()} to {array.max()}), which were cut "
            "off. Scale it before it is logged.",
            category=LeydenWarning,
        )
        array = np.nan_to_num(array.clip(0, top))
    if array.dtype.kind == "f":
        array = (array * 255).round()
    return np.ascontiguousarray(array.astype(np.uint8))
