# SPDX-License-Identifier: Apache-2.0
"""Where the article's listing finds MNIST: torchvision on the real files, or a stand-in for it with images of ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist"
BESIDE = Path(sys.prefix) / "beside"
_loaded: dict[str, types.ModuleType] = {}
OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # it takes them back when it is collected


def synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    """60,000 images of 28 by 28 bytes in ten classes: a few bright pixels for each class, and some noise."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(10, (60_000,), generator=generator)
    centres = (torch.rand(10, 28, 28, generator=generator) < 0.1).to(torch.uint8) * 200
    noise = torch.randint(20, (60_000, 28, 28), generator=generator, dtype=torch.uint8)
    return centres[labels] + noise, labels


def stand_in() -> dict[str, types.ModuleType]:
    """Return modules in the place of torchvision, whose MNIST has the synthetic images."""
    images, labels = synthetic()
    labels_as_ints = labels.tolist()

    class MNIST(Dataset[Any]):
        def __init__(self, root: str, train: bool, download: bool, transform: Callable[[Any], Any]) -> None:
            self.transform, self.data, self.targets = transform, images, labels

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(images[index]), labels_as_ints[index]

    parts = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.datasets", "torchvision.transforms")}
    vars(parts["torchvision.datasets"])["MNIST"] = MNIST
    vars(parts["torchvision.transforms"])["ToTensor"] = lambda: lambda image: image.float().div(255).unsqueeze(0)
    vars(parts["torchvision"]).update(
        datasets=parts["torchvision.datasets"], transforms=parts["torchvision.transforms"]
    )
    return parts


def has_torchvision() -> bool:
    """Whether it is installed, as ``make`` does it or as usual."""
    return (BESIDE / "torchvision").is_dir() or importlib.util.find_spec("torchvision") is not None


def torchvision() -> dict[str, types.ModuleType]:
    """Return the modules of the real torchvision, imported once; they are not left in ``sys.modules``.

    Beside a torch of another build, the two operators that it then misses are defined.
    """
    if not _loaded:
        sys.path.append(str(BESIDE))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own parts that it does without
            try:
                importlib.import_module("torchvision")
            except RuntimeError as error:
                if "torchvision::nms" not in str(error):
                    raise
                _take()
                for name in ("nms", "qnms"):
                    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision.datasets")
            importlib.import_module("torchvision.transforms")
        sys.path.remove(str(BESIDE))
        _loaded.update(_take())
    return _loaded


def _take() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
    return {name: sys.modules.pop(name) for name in names}
