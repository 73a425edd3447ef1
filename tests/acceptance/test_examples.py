# SPDX-License-Identifier: Apache-2.0
"""The examples do what the README says, run as a user runs them."""

from __future__ import annotations

import csv
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    """Run an example in an empty folder and return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def figure(output: str, name: str) -> float:
    """Return the figure that the table of results gives for a metric."""
    found = re.search(rf"{name}\D+([01]\.\d+)", output)
    assert found, output
    return float(found.group(1))


def test_digits_reaches_97_percent_and_says_where_everything_is(tmp_path: Path) -> None:
    output = run("digits.py", cwd=tmp_path)
    assert figure(output, "test/accuracy") >= 0.97
    *_, best, figures, curves = output.rstrip().splitlines()
    checkpoint = tmp_path / best.split()[2]
    table = tmp_path / figures.split()[2]
    assert torch.load(checkpoint, weights_only=True)["epoch"] <= 9
    with table.open(newline="") as file:
        assert any(row["test/accuracy"] for row in csv.DictReader(file))
    assert list(table.parent.glob("events.out.tfevents.*"))
    assert (tmp_path / curves.split()[3]).is_dir()


def test_a_loop_of_ones_own_gives_the_same_figures_on_one_process_and_on_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LT_ACCELERATOR", "cpu")
    found = []
    for devices in ("1", "2"):
        monkeypatch.setenv("LT_DEVICES", devices)
        found.append(run("fabric.py", cwd=tmp_path).splitlines())
        assert torch.load(tmp_path / "digits.ckpt", weights_only=True)["epoch"] == 7
    assert len(found[0]) == len(found[1]) == 8
    assert figure(found[0][-1], "accuracy") >= 0.95
    assert abs(figure(found[0][-1], "accuracy") - figure(found[1][-1], "accuracy")) < 0.01
    assert " of 359 right" in found[1][-1]


@pytest.mark.parametrize("gzipped", [False, True])
def test_mnist_trains_from_raw_idx_files(tmp_path: Path, gzipped: bool) -> None:
    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images).reshape(-1, 1, 8, 8) / 16 * 255
    pixels = torch.nn.functional.interpolate(pixels, size=28).squeeze(1).to(torch.uint8)
    for split, rows in {"train": slice(0, 1500), "t10k": slice(1500, None)}.items():
        write_idx(tmp_path / f"{split}-images-idx3-ubyte", pixels[rows], gzipped)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte", torch.tensor(labels[rows], dtype=torch.uint8), gzipped)
    output = run("mnist.py", "--data", str(tmp_path), cwd=tmp_path)
    assert figure(output, "test_accuracy") > 0.8


def test_the_command_line_trains_and_keeps_its_config(tmp_path: Path) -> None:
    output = run("cli.py", "fit", "--model.hidden=48", cwd=tmp_path)
    assert figure(output, "test_accuracy") >= 0.95
    (config,) = tmp_path.rglob("config.yaml")
    assert "  hidden: 48\n" in config.read_text()


def test_mnist_says_which_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="has neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"):
        run("mnist.py", "--data", str(tmp_path), cwd=tmp_path)


def write_idx(path: Path, values: torch.Tensor, gzipped: bool) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    raw = header + values.numpy().tobytes()
    if gzipped:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(raw))
    else:
        path.write_bytes(raw)


@pytest.mark.slow
def test_an_average_of_weights_is_better_where_labels_are_noisy(tmp_path: Path) -> None:
    output = run("averages.py", cwd=tmp_path)
    assert figure(output, "average accuracy") > figure(output, "plain accuracy") > 0.8


@pytest.mark.slow
def test_a_new_head_and_then_the_backbone_learn_other_digits(tmp_path: Path) -> None:
    output = run("finetuning.py", cwd=tmp_path)
    assert figure(output, "accuracy") > 0.75
    assert output.rstrip().endswith("learning rates of head and backbone: 0.0100 0.0100")


@pytest.mark.slow
def test_a_generator_learns_a_ring(tmp_path: Path) -> None:
    assert 0.8 < figure(run("gan.py", cwd=tmp_path), "radius of drawn points") < 1.2


@pytest.mark.slow
def test_five_folds_are_told_apart(tmp_path: Path) -> None:
    output = run("kfold.py", cwd=tmp_path)
    assert output.count("fold ") == 5
    assert figure(output, "\naccuracy") > 0.93


@pytest.mark.slow
def test_three_schedules_end_at_their_rates(tmp_path: Path) -> None:
    output = run("schedulers.py", cwd=tmp_path)
    for schedule in ("step", "epoch", "plateau"):
        assert figure(output, f"{schedule}: accuracy") > 0.85
