# SPDX-License-Identifier: Apache-2.0
"""The listing of the article trains as printed, to the weights of a hand-written loop, bit for bit."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

HERE = Path(__file__).resolve().parent
LISTING = HERE / "article_listing.py"
FILES = HERE.parents[2] / "shared" / "data" / "mnist"
SEEDS = (0, 1, 2)
no_files = pytest.mark.skipif(not FILES.is_dir(), reason=f"The files of MNIST are not in {FILES}.")


def synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    """60,000 images of 28 by 28 bytes in ten classes: a few bright pixels for each class, and some noise."""
    generator = torch.Generator().manual_seed(7)
    labels = torch.randint(10, (60_000,), generator=generator)
    centres = (torch.rand(10, 28, 28, generator=generator) < 0.1).to(torch.uint8) * 200
    noise = torch.randint(20, (60_000, 28, 28), generator=generator, dtype=torch.uint8)
    return centres[labels] + noise, labels


def real() -> tuple[torch.Tensor, torch.Tensor]:
    """The training images and labels of MNIST."""

    def read(name: str, header: int) -> torch.Tensor:
        raw = gzip.decompress((FILES / f"{name}.gz").read_bytes())[header:]
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)

    images, labels = read("train-images-idx3-ubyte", 16), read("train-labels-idx1-ubyte", 8)
    return images.reshape(-1, 28, 28), labels.long()


def stand_in(monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, labels: torch.Tensor) -> type[Dataset[Any]]:
    """Put a module in the place of torchvision, whose MNIST has these images; return that class."""
    labels_as_ints = labels.tolist()

    class MNIST(Dataset[Any]):
        def __init__(self, root: str, train: bool, download: bool, transform: Callable[[Any], Any]) -> None:
            self.transform = transform

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
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    return MNIST


def by_hand(seed: int, loader: DataLoader[Any]) -> torch.nn.Linear:
    """The same training as a loop: the first tenth of the batches."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(28 * 28, 10)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    last = int(0.1 * len(loader)) - 1
    for number, (x, y) in enumerate(loader):
        loss = torch.nn.functional.cross_entropy(torch.relu(layer(x.view(x.size(0), -1))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == last:
            break
    return layer


def accuracy(layer: torch.nn.Linear, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        scores = torch.relu(layer(images.float().div(255).flatten(1)))
    return (scores.argmax(1) == labels).float().mean().item()


@pytest.fixture(scope="module", params=["synthetic", pytest.param("real", marks=no_files)])
def data(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels."""
    return synthetic() if request.param == "synthetic" else real()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_article_listing_trains_to_the_weights_of_a_hand_written_loop(
    seed: int, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist = stand_in(monkeypatch, *data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the loop to compare with runs on the CPU
    torch.manual_seed(seed)
    found = runpy.run_path(str(LISTING))
    images: Any = DataLoader(mnist("", True, False, sys.modules["torchvision.transforms"].ToTensor()), batch_size=32)
    layer = by_hand(seed, images)
    assert found["trainer"].global_step == 187
    assert torch.equal(found["model"].l1.weight, layer.weight)
    assert torch.equal(found["model"].l1.bias, layer.bias)
    score = accuracy(layer, *data)
    print(f"seed {seed}: {score:.1%} right")
    assert score >= 0.1  # a ReLU on the scores switches whole classes off: all of them, with bad luck

    folder = tmp_path / "default" / "version_0"
    assert (folder / "meta_tags.csv").is_file()
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["tng_loss"]]) == 18
    assert len([row for row in rows if row["avg_val_loss"]]) == 1
    assert list((folder / "tf").glob("events.out.tfevents.*"))
    found["exp"].close()


_RUN = """
import runpy, sys, torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name, arguments in (("nms", "Tensor dets, Tensor scores, float iou_threshold"),
                        ("qnms", "Tensor dets, Tensor scores, float iou_threshold")):
    if not hasattr(torch.ops.torchvision, name):
        library.define(f"{name}({arguments}) -> Tensor")
torch.manual_seed(0)
found = runpy.run_path(sys.argv[1])
torch.save(found["model"].l1.state_dict(), "weights.pt")
"""


@no_files
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed.")
def test_the_article_listing_runs_on_the_data_set_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in FILES.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(LISTING)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = real()
    mnist = stand_in(monkeypatch, *data)
    layer = by_hand(0, DataLoader(mnist("", True, False, lambda image: image.float().div(255).unsqueeze(0)), 32))
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in layer.state_dict().items())
