# SPDX-License-Identifier: Apache-2.0
"""verify_resume: exact where it is, and otherwise the first thing that differs, with its likely cause."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import leyden as L
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.loggers import CSVLogger
from leyden.loops.studies.probe import Task, watch
from leyden.loops.studies.verify import INSIDE, CouldNotRun, Report, compare, verify
from verified_model import Net, loaders

SCRIPTS = Path(__file__).parents[2] / "acceptance"


def both(folder: Path, make: Any, steps: int = 8, data: Any = loaders, **options: Any) -> Report:
    """Two processes, as far as one can play them: everything is made anew for each."""
    found = []
    for resume in (False, True):
        L.seed_everything(11 if resume else 3, verbose=False)  # whatever a resumed process draws when it starts
        trainer = L.Trainer(
            max_epochs=4, default_root_dir=folder / "root", log_every_n_steps=1, accelerator="cpu", enable_progress_bar=False,
            enable_model_summary=False, **options,
        )  # fmt: skip
        task = Task(str(folder), str(resume), steps // 2, steps, resume)
        train, val = data()
        watch(trainer, trainer.fit, task, make(), train_dataloaders=train, val_dataloaders=val)
        found.append(torch.load(task.record, weights_only=True))
    assert not (folder / "root").exists()
    return compare(*found)


@pytest.mark.parametrize("steps", [2, 5, 8])
def test_exact(tmp_path: Path, steps: int) -> None:
    report = both(
        tmp_path, Net, steps, callbacks=[EarlyStopping("val", patience=9), ModelCheckpoint(every_n_train_steps=1)]
    )
    assert report
    assert report.batches == steps - steps // 2
    assert str(report).startswith(
        f"exact: in the {report.batches} batches after the checkpoint, everything is the same"
    )


def test_exact_up_to_the_end_of_a_fit_that_is_shorter(tmp_path: Path) -> None:
    assert both(tmp_path, Net, 18).batches == 7  # 16 in all, 9 before the checkpoint


@pytest.mark.parametrize(
    ("generator", "draw", "kind"),
    [
        (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(1, generator=g).item(), "torch"),
        (lambda: random.Random(1), lambda g: g.random(), "random"),
        (lambda: numpy.random.default_rng(1), lambda g: g.random(), "numpy"),
        (lambda: numpy.random.RandomState(1), lambda g: g.rand(), "numpy"),
    ],
)
def test_a_generator_of_ones_own_that_is_not_saved(tmp_path: Path, generator: Any, draw: Any, kind: str) -> None:
    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.noise = generator()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step([batch[0] + draw(self.noise)], batch_idx)

    report = both(tmp_path, Noisy)
    assert not report
    assert "at batch 5 (epoch 1, batch_idx 0), the first after the checkpoint, the loss" in report.difference
    assert "self.noise is a random generator that is in no checkpoint" in report.hint


def test_a_counter_on_the_module(tmp_path: Path) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()
            self.part.seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.part.seen += 1
            self.log("seen", float(self.part.seen))
            return super().training_step(batch, batch_idx)

    report = both(tmp_path, Counting)
    assert report.difference == "after batch 5, the logged value 'row 1.seen': 5.0 without a break, 1.0 resumed."
    assert report.hint.startswith("self.part.seen is 5 without a break, 1 resumed. That is in no checkpoint")


def test_a_counter_in_a_callback(tmp_path: Path) -> None:
    class Decay(L.Callback):
        def __init__(self) -> None:
            self.rate = 1.0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.rate *= 0.9
            trainer.optimizers[0].param_groups[0]["lr"] = self.rate

    found = []
    for resume in (False, True):
        torch.manual_seed(1)
        trainer = L.Trainer(
            max_epochs=4, callbacks=[Decay()], logger=False, enable_progress_bar=False, accelerator="cpu"
        )
        task = Task(str(tmp_path), str(resume), 4, 8, resume)
        watch(trainer, trainer.fit, task, Net(), train_dataloaders=loaders()[0], val_dataloaders=loaders()[1])
        found.append(torch.load(task.record, weights_only=True))
    report = compare(*found)
    assert "the learning rate '[0][0]': 0.59" in report.difference
    assert "Decay.rate is 0.59" in report.hint


class Numbers(IterableDataset):
    """Counts on from pass to pass, and does not know where it was."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Any:
        for _ in range(12):
            self.position += 1
            yield (torch.full((3,), float(self.position)),)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_stream_without_state(tmp_path: Path) -> None:
    report = both(tmp_path, Net, data=lambda: (DataLoader(Numbers(), batch_size=4), loaders()[1]))
    assert (
        "the first after the checkpoint, the batch '[0]': shape (4, 3), 12 values differ, by 12 at most"
        in report.difference
    )
    assert report.hint.startswith("the data set is an IterableDataset and its loader keeps no state")


def test_a_tensor_that_is_changed_on_the_way(tmp_path: Path) -> None:
    class Forgets(Net):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"]["net.0.bias"][1] += 0.25

    report = both(tmp_path, Forgets)
    assert (
        "right after the checkpoint was restored, the tensor 'net.0.bias': shape (4,), 1 values differ, by 0.25 at most; it"
        in report.difference
    )


def test_data_that_are_made_without_a_seed_are_not_called_state(tmp_path: Path) -> None:
    seeds = iter((1, 2))

    def fresh() -> Any:
        data = torch.randn(16, 3, generator=torch.Generator().manual_seed(next(seeds)))
        return DataLoader(TensorDataset(data), batch_size=4), loaders()[1]

    report = both(tmp_path, Net, data=fresh)
    assert "the batch" in report.difference
    assert report.hint == ""  # `verify` finds the cause by a third process


def test_a_generator_of_all(tmp_path: Path) -> None:
    class Draws(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if os.environ.get("DRAWS"):
                random.random()

    found = []
    for resume in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        os.environ["DRAWS"] = "yes" * (not resume)
        trainer = L.Trainer(max_epochs=4, logger=False, enable_progress_bar=False, accelerator="cpu")
        task = Task(str(tmp_path), str(resume), 4, 8, resume)
        watch(trainer, trainer.fit, task, Draws(), train_dataloaders=loaders()[0], val_dataloaders=loaders()[1])
        found.append(torch.load(task.record, weights_only=True))
    del os.environ["DRAWS"]
    report = compare(*found)
    assert "the random generator of python is in another state" in report.difference


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("steps", [1, 0, 2.5, "3"])
def test_steps_that_cannot_be(steps: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"verify_resume\(steps=.*must be a whole number, 2 or more"):
        L.Trainer(logger=False).verify_resume(Net(), *loaders(), steps=steps)


def test_not_inside_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INSIDE, "whole")
    with pytest.raises(MisconfigurationException, match="if __name__ == '__main__'"):
        verify(lambda task: [], 4)


def test_what_cannot_be_pickled_names_the_script_form() -> None:
    model = Net()
    model.stream = itertools.tee([1])[0] if sys.version_info >= (3, 14) else (number for number in [1])
    trainer = L.Trainer(logger=False)
    with pytest.raises(CouldNotRun, match="cannot be pickled.*leyden verify-resume script.py"):
        trainer.verify_resume(model, *loaders())
    assert trainer.callbacks


def test_fast_dev_run_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="fast_dev_run"):
        both(tmp_path, Net, fast_dev_run=True, logger=False)


def test_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    torch.manual_seed(5)
    model = Net()
    trainer = L.Trainer(max_epochs=3, logger=CSVLogger(tmp_path / "logs"), enable_progress_bar=False, accelerator="cpu")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    report = trainer.verify_resume(model, *loaders(), steps=4)
    assert report.exact
    assert capsys.readouterr().out == f"{report}\n"
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    assert trainer.progress.batches == 0
    assert trainer.loggers[0].save_dir == str(tmp_path / "logs")


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", "leyden", "verify-resume", *arguments], cwd=folder, env=environment, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def test_the_command_on_a_script_that_is_exact(tmp_path: Path) -> None:
    done = command(tmp_path, "--steps", "5", str(SCRIPTS / "verified_script.py"), "exact", "--epochs", "2")
    assert (done.returncode, done.stdout[:41]) == (0, "exact: in the 3 batches after the checkpo"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_on_a_script_that_does_not_fit(tmp_path: Path) -> None:
    assert command(tmp_path, "none.py").returncode == 2
    (tmp_path / "empty.py").write_text("print('hello')\n")
    done = command(tmp_path, "empty.py")
    assert done.returncode == 2
    assert "it ended without calling Trainer.fit" in done.stderr
    assert "hello" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "difference", "hint"),
    [
        ("generator", "the loss", "self.noise is a random generator that is in no checkpoint"),
        ("global", "the loss", "COUNT is 5 without a break, 0 resumed"),
        ("hidden", "the loss", "state that is in no checkpoint: two resumed processes agree with each other"),
        ("time", "the loss", "something that changes from process to process"),
        ("hash", "the loss", "the order of a set, or hash()"),
        ("unseeded", "the batch", "data or generators that are made without a seed"),
        ("stream", "the batch", "the data set is an IterableDataset"),
    ],
)
def test_the_command_on_scripts_that_are_not_exact(tmp_path: Path, case: str, difference: str, hint: str) -> None:
    done = command(tmp_path, str(SCRIPTS / "verified_script.py"), case)
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    assert said[0].startswith("different: at batch 6")
    assert difference in said[0]
    assert hint in said[1]
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_data_set_is_left_alone() -> None:
    assert isinstance(loaders()[0].dataset, TensorDataset)
