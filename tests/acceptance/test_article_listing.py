# SPDX-License-Identifier: Apache-2.0
"""The listing of the article trains as printed, in three ways, to the weights of a hand-written loop, bit for bit."""

from __future__ import annotations

import csv
import gzip
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden.compat
import listing_data
from listing_data import FILES

HERE = Path(__file__).resolve().parent
LISTING = HERE / "article_listing.py"
OUR_LINES = "import leyden as ptl\nfrom leyden import Experiment, Trainer\n"
OLD_LINES = "import pytorch_lightning as ptl\nfrom pytorch_lightning import Trainer\nfrom test_tube import Experiment\n"
SEEDS = (0, 1, 2)
BATCHES = 187  # a tenth of 1,875

pytestmark = pytest.mark.timeout(600)  # 60,000 images are decoded one by one, on a machine that others share
no_files = pytest.mark.skipif(not FILES.is_dir(), reason=f"The files of MNIST are not in {FILES}.")
no_torchvision = pytest.mark.skipif(
    not listing_data.has_torchvision(), reason="torchvision is not installed: run `make`."
)


def cases(daily: int) -> list[Any]:
    """All seeds on both sets; on the real one, whose images take their time to decode, one seed unless ``-m slow``."""
    marks = {seed: [no_files, no_torchvision] + ([] if seed == daily else [pytest.mark.slow]) for seed in SEEDS}
    real = [pytest.param("mnist", seed, marks=marks[seed], id=f"mnist-{seed}") for seed in SEEDS]
    return [*[pytest.param("synthetic", seed, id=f"synthetic-{seed}") for seed in SEEDS], *real]


@pytest.fixture(scope="module")
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The name of the data, and a folder in which the listing finds them; torchvision is imported, or what stands in."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "mnist":
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for path in FILES.glob("*.gz"):
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        modules = listing_data.stand_in() if request.param == "synthetic" else listing_data.torchvision()
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield request.param, folder


@pytest.fixture(scope="module")
def by_hand(data: tuple[str, Path]) -> dict[int, torch.nn.Linear]:
    """For each seed, the same training as a loop: the first tenth of the batches."""
    torchvision = sys.modules["torchvision"]
    images = torchvision.datasets.MNIST(
        str(data[1]), train=True, download=False, transform=torchvision.transforms.ToTensor()
    )
    first = [batch for batch, _ in zip(DataLoader(images, batch_size=32), range(BATCHES), strict=False)]
    layers = {}
    for seed in SEEDS:
        torch.manual_seed(seed)
        layer = layers[seed] = torch.nn.Linear(28 * 28, 10)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        for x, y in first:
            loss = torch.nn.functional.cross_entropy(torch.relu(layer(x.view(x.size(0), -1))), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"{data[0]}, seed {seed}: {accuracy(layer, images):.1%} right")
    return layers


def accuracy(layer: torch.nn.Linear, images: Any) -> float:
    with torch.no_grad():
        scores = torch.relu(layer(images.data.float().div(255).flatten(1)))
    return (scores.argmax(1) == images.targets).float().mean().item()


@pytest.fixture
def folder(data: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a run, with the files that the listing looks for."""
    if (data[1] / "MNIST").is_dir():
        (tmp_path / "MNIST").symlink_to(data[1] / "MNIST")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the loop to compare with runs on the CPU
    return tmp_path


def with_the_old_lines(folder: Path) -> Path:
    """Write the listing with the article's own import lines, and nothing else changed."""
    text = LISTING.read_text(encoding="utf-8")
    assert text.count(OUR_LINES) == 1
    path = folder / "listing.py"
    path.write_text(text.replace(OUR_LINES, OLD_LINES), encoding="utf-8")
    return path


def same(found: dict[str, torch.Tensor], layer: torch.nn.Linear) -> bool:
    return all(torch.equal(found[name], value) for name, value in layer.state_dict().items())


def check_files(folder: Path) -> None:
    """TensorBoard's file, the tags and the rows are there: one for every tenth batch, and one of the validation."""
    version = folder / "default" / "version_0"
    assert (version / "meta_tags.csv").is_file()
    with (version / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["tng_loss"]]) == 18
    assert len([row for row in rows if row["avg_val_loss"]]) == 1
    assert list((version / "tf").glob("events.out.tfevents.*"))
    assert not list(folder.glob("lightning_logs"))


def in_this_process(script: Path, seed: int, layer: torch.nn.Linear, folder: Path) -> None:
    torch.manual_seed(seed)
    found = runpy.run_path(str(script))
    assert found["trainer"].global_step == BATCHES
    assert same(found["model"].l1.state_dict(), layer)
    found["exp"].close()
    check_files(folder)


@pytest.mark.parametrize(("data", "seed"), cases(0), indirect=["data"])
def test_the_article_listing_trains_to_the_weights_of_a_hand_written_loop(
    seed: int, by_hand: dict[int, torch.nn.Linear], folder: Path
) -> None:
    in_this_process(LISTING, seed, by_hand[seed], folder)


@pytest.mark.parametrize(("data", "seed"), cases(1), indirect=["data"])
def test_the_article_listing_with_its_own_import_lines_trains_to_the_same_weights(
    seed: int, by_hand: dict[int, torch.nn.Linear], folder: Path
) -> None:
    with leyden.compat.installed():
        in_this_process(with_the_old_lines(folder), seed, by_hand[seed], folder)


@pytest.mark.parametrize(("data", "seed"), cases(2), indirect=["data"])
def test_the_article_listing_under_leyden_run_trains_to_the_same_weights(
    data: tuple[str, Path], seed: int, by_hand: dict[int, torch.nn.Linear], folder: Path
) -> None:
    path = os.pathsep.join([str(HERE / "listing_startup"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ, "PYTHONPATH": path, "LISTING_DATA": data[0], "LISTING_SEED": str(seed), "CUDA_VISIBLE_DEVICES": "",
        "LISTING_WEIGHTS": str(folder / "weights.pt"), "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "leyden", "run", with_the_old_lines(folder).name],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(torch.load(folder / "weights.pt", weights_only=True), by_hand[seed])
    check_files(folder)
