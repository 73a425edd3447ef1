# SPDX-License-Identifier: Apache-2.0
"""Workers persist over epochs and validation (I3), change no result, and end with the run; the Trainer chooses how many."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

import leyden as L
import resume_parts as parts
from leyden.data import measure as measuring
from leyden.errors import MisconfigurationException

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
]


def workers() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.name() == "pt_data_worker"}


def collate(samples: list[Any]) -> Any:
    index, x = default_collate(samples)
    return index, x + torch.rand(len(x), 1)


class Alive(L.Callback):
    """Notes which workers there are at the end of each epoch and validation."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(workers())

    on_train_epoch_end = on_validation_end


def fit(
    train: Any, validation: Any = None, module: Any = None, callbacks: Any = (), path: Any = None, **options: Any
) -> Any:
    module = parts.Recording() if module is None else module
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{"max_epochs": 3, "accelerator": "cpu", **quiet, **options}, callbacks=list(callbacks))
    trainer.fit(module, train, validation, ckpt_path=path)
    return module, trainer


def seed() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def kind(name: str, tmp_path: Path, workers: int = 2) -> DataLoader:
    data: Any = parts.Noting(15, tmp_path / "notes")
    more: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    if name == "subset":
        return DataLoader(Subset(data, range(1, 14)), batch_size=4, shuffle=True, **more)
    if name == "collate":
        return DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate, **more)
    if name == "ordered":
        return DataLoader(data, batch_size=4, **more)
    return DataLoader(data, batch_size=2, sampler=parts.Lazy(15), **more)


@pytest.mark.parametrize("name", ["subset", "collate", "ordered", "lazy"])
def test_I3_kept_workers_give_the_very_same_run(name: str, tmp_path: Path) -> None:
    runs, started = [], []
    for fast in (True, False):
        seed()
        notes = tmp_path / "notes"
        notes.unlink(missing_ok=True)
        train, validation = kind(name, tmp_path), kind("subset", tmp_path, 1)
        # a validation inside the epoch, and one that does not use all of its batches
        module, _ = fit(
            train, validation, val_check_interval=3, limit_val_batches=2, log_every_n_steps=1, fast_data=fast,
            callbacks=[parts.Drawing()], max_epochs=2,
        )  # fmt: skip
        runs.append(
            (module.events, torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        )
        runs.append({key: value.tolist() for key, value in module.state_dict().items()})
        started.append(len(set(notes.read_text().split())))
        assert workers() == set()
        assert not train.persistent_workers
        assert train._iterator is None
    assert runs[:2] == runs[2:]
    assert started[0] == 3
    assert started[1] > 6


def test_I3_workers_live_from_the_first_epoch_to_the_end_of_the_fit(tmp_path: Path) -> None:
    alive = Alive()
    fit(kind("ordered", tmp_path), kind("subset", tmp_path, 1), callbacks=[alive])
    # with as many cores as this machine has, those of both loaders
    assert len(alive.seen) == 6
    assert all(seen == alive.seen[0] for seen in alive.seen)
    assert len(alive.seen[0]) == 3
    assert workers() == set()


def test_I3_loaders_that_are_asked_for_anew_end_the_workers_of_the_former(tmp_path: Path) -> None:
    class Asks(parts.Recording):
        def train_dataloader(self) -> Any:
            return kind("ordered", tmp_path)

    alive = Alive()
    fit(None, None, Asks(), [alive], reload_dataloaders_every_n_epochs=1)
    assert [len(seen) for seen in alive.seen] == [2, 2, 2]
    assert len(set.union(*alive.seen)) == 6
    assert workers() == set()


def test_I3_a_data_set_that_is_told_the_epoch_is_loaded_by_workers_that_know_it(tmp_path: Path) -> None:
    class Curriculum(parts.Noting):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __getitem__(self, index: int) -> tuple[int, Tensor]:
            return super().__getitem__(index)[0] + 100 * self.epoch, torch.zeros(4)

    data = Curriculum(4, tmp_path / "notes")
    module, _ = fit(DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="fork"))
    assert [event[3] for event in module.events] == [[0, 1], [2, 3], [100, 101], [102, 103], [200, 201], [202, 203]]


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_I3_a_single_pass_keeps_no_worker(entry: str, tmp_path: Path) -> None:
    class All(parts.Recording):
        def predict_step(self, batch: Any) -> Any:
            return parts.indices(batch)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.events.append(parts.indices(batch))

    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    getattr(trainer, entry)(All(), kind("ordered", tmp_path))
    assert workers() == set()


def test_I3_an_error_ends_the_workers_of_all_loaders(tmp_path: Path) -> None:
    class Fails(parts.Recording):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1:
                raise ValueError("by the user")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="by the user"):
        fit(kind("ordered", tmp_path), kind("subset", tmp_path, 1), Fails())
    assert workers() == set()


def test_E1_nothing_is_left_of_a_fit_whose_workers_were_kept(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        loader = kind("ordered", tmp_path)
        module, trainer = fit(loader, kind("subset", tmp_path, 1))
        left = [weakref.ref(part) for part in (trainer, module, loader, loader.dataset)]
        del loader, module, trainer
        assert [part() for part in left] == [None] * 4
    finally:
        gc.enable()


SCRIPT = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
import leyden as L

class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()
    def validation_step(self, batch, batch_idx):
        pass
    def on_train_epoch_end(self):
        if self.current_epoch == 1:
            import psutil
            print(*(child.pid for child in psutil.Process().children()), flush=True)
            if sys.argv[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGTERM)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    data = TensorDataset(torch.zeros(8, 2))
    train, val = (DataLoader(data, batch_size=2, num_workers=1) for _ in range(2))
    L.Trainer(max_epochs=9, logger=False, enable_checkpointing=False, enable_progress_bar=False,
              enable_model_summary=False).fit(Model(), train, val)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize(
    ("how", "code"), [pytest.param("kill", -signal.SIGKILL, marks=pytest.mark.slow), ("term", 143)]
)
def test_I3_no_kept_worker_outlives_the_process(tmp_path: Path, how: str, code: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), how], capture_output=True, text=True, timeout=100, check=False,
        env=environment, stdin=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == code, run.stderr
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, pids))


# --- how many ---------------------------------------------------------------------------------------------------------


class Slow(Dataset):
    """Sleeps for each sample; a sample is told by its index and by the process that loads it."""

    def __init__(self, size: int = 60, seconds: float = 0.005) -> None:
        self.size, self.seconds = size, seconds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        time.sleep(self.seconds)
        return index, torch.full((4,), float(torch.utils.data.get_worker_info() is not None))


class Where(parts.Recording):
    """Notes whether batches come from workers."""

    def __init__(self) -> None:
        super().__init__()
        self.train_from: list[bool] = []
        self.val_from: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.train_from.append(bool(batch[1][0, 0]))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_from.append(bool(batch[1][0, 0]))
        super().validation_step(batch, batch_idx)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that is said."""
    found: list[str] = []
    from leyden.data import wait
    from leyden.loops import workers as choosing

    for module in (wait, choosing):
        monkeypatch.setattr(module, "rank_zero_info", found.append)
    monkeypatch.setattr(choosing, "cores", lambda: 2)
    return found


def test_an_int_is_the_number_of_workers_of_all_loaders_and_theirs_stay(lines: list[str]) -> None:
    train, val = DataLoader(Slow(8, 0.0), batch_size=4), DataLoader(Slow(8, 0.0), batch_size=4, num_workers=1)
    before = dict(vars(train)), dict(vars(val))
    module, trainer = fit(train, val, Where(), num_workers=2, max_epochs=2)
    assert set(module.train_from) == {True}
    assert trainer.train_dataloader is train
    module, _ = fit(train, val, Where(), num_workers=0, max_epochs=2)
    assert set(module.train_from) == set(module.val_from) == {False}
    assert (dict(vars(train)), dict(vars(val))) == before
    assert lines == []
    assert workers() == set()


def test_a_number_of_workers_reaches_evaluation_and_prediction(lines: list[str]) -> None:
    class All(Where):
        test_step = Where.validation_step

        def predict_step(self, batch: Any) -> bool:
            return bool(batch[1][0, 0])

    loader = DataLoader(Slow(8, 0.0), batch_size=4)
    trainer = L.Trainer(num_workers=1, logger=False, enable_progress_bar=False, accelerator="cpu")
    model = All()
    trainer.validate(model, loader, verbose=False)
    trainer.test(model, loader, verbose=False)
    assert model.val_from == [True] * 4
    assert trainer.predict(model, loader) == [True, True]
    assert workers() == set()


def test_loaders_whose_workers_are_their_owners_affair_stay_as_they_are(lines: list[str]) -> None:
    module, _ = fit(parts.loader("stream"), parts.loader("moves", size=4), num_workers=2, max_epochs=1)
    assert len(module.events) > 7
    assert sorted(lines) == [
        "Trainer(num_workers=2): the train loader stays as it is: the data set Stream is iterable: how its workers share it"
        " is its own affair.",
        "Trainer(num_workers=2): the val loader stays as it is: the Moves iterates in a way of its own.",
    ]
    lines.clear()
    fit(parts.in_order(4, 2), parts.loader("batches", 4), num_workers=1, max_epochs=1)
    assert lines == ["Trainer(num_workers=1): the val loader stays as it is: the Batches is no DataLoader."]


@pytest.mark.parametrize("wrong", [-1, 1.5, "many", True])
def test_another_value_is_an_error_that_says_what_is_allowed(wrong: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"num_workers=.*an int >= 0, 'auto' or None"):
        L.Trainer(num_workers=wrong)


def test_auto_measures_says_so_and_is_remembered_by_a_resumed_run(
    lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(loader: Any, most: int, _: float) -> measuring.Measured:
        # what a busy machine measures is not known; tests/data/test_measure.py does measure
        slow = isinstance(loader.dataset, Slow)
        return measuring.Measured(2, {0: 0.02, 1: 0.02, 2: 0.01}) if slow else measuring.Measured(0, {0: 1e-5})

    monkeypatch.setattr(measuring, "measure", measured)
    train, val = DataLoader(Slow(40, 0.0), batch_size=4, shuffle=True), DataLoader(parts.Quiet(40), batch_size=4)
    saver = parts.SaveEverywhere(tmp_path)
    seed()
    whole, trainer = fit(train, val, Where(), [saver], num_workers="auto", max_epochs=2, val_check_interval=0.5)
    assert len(lines) == 2
    assert lines[0].startswith(
        "Trainer(num_workers='auto'): 2 workers for the train loader of 10 batches: a batch takes "
    )
    assert lines[1].startswith(
        "Trainer(num_workers='auto'): no workers for the val loader of 10 batches: a batch takes "
    )
    assert lines[0].endswith(" with 2; 2 cores to use.")
    assert set(whole.train_from) == {True}
    assert train.num_workers == 0
    assert workers() == set()
    generators = torch.get_rng_state()
    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("measured again"))
    for path, (events, _) in list(saver.saved.items())[3::11]:
        lines.clear()
        again, _ = fit(train, val, Where(), path=path, num_workers="auto", max_epochs=2, val_check_interval=0.5)
        assert again.events == whole.events[events:]
        assert torch.equal(torch.get_rng_state(), generators)
        assert set(again.train_from) <= {True}
        told = ["Trainer(num_workers='auto'): as many workers as the checkpoint was written with: train [2], val [0]."]
        assert lines == told


def test_auto_changes_nothing_but_the_number_of_workers(lines: list[str]) -> None:
    """The order of the samples, and what the steps draw, are those of a run with the same number said by hand."""
    runs = []
    number: Any = "auto"
    for _ in range(2):
        seed()
        module, _ = fit(DataLoader(Slow(), batch_size=4, shuffle=True), None, Where(), num_workers=number, max_epochs=1)
        runs.append((module.events, torch.get_rng_state().tolist(), random.getstate()))
        chosen = lines[0].removeprefix("Trainer(num_workers='auto'): ").partition(" ")[0]
        number = 0 if chosen == "no" else int(chosen)
    assert runs[0] == runs[1]


def test_auto_does_not_measure_data_that_are_read_a_batch_at_a_time(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("measured"))
    data = TensorDataset(torch.arange(40), torch.randn(40, 4))
    for given in (0, 2):
        loader = DataLoader(data, batch_size=4, num_workers=given)
        module, _ = fit(loader, None, num_workers="auto", max_epochs=1)
        assert module.events[3][3] == [12, 13, 14, 15]
    said = (
        "Trainer(num_workers='auto'): no workers for the train loader: its data lie in memory and are read a batch at a"
    )
    assert lines == [f"{said} time."] * 2


def test_auto_does_not_measure_where_one_batch_runs(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "measure", lambda *_: pytest.fail("measured"))
    fit(DataLoader(Slow(), batch_size=4), None, num_workers="auto", fast_dev_run=True)
    assert lines == []


def test_data_that_cannot_be_measured_stay_as_they_are(lines: list[str]) -> None:
    class ByName(Slow):
        def __getitem__(self, index: Any) -> tuple[int, Tensor]:
            return super().__getitem__(int(index.removeprefix("n")))

    loader = DataLoader(ByName(8, 0.0), batch_sampler=[["n0", "n1"], ["n2", "n3"]])
    module, _ = fit(loader, None, num_workers="auto", max_epochs=1)
    assert [event[3] for event in module.events] == [[0, 1], [2, 3]]
    assert len(lines) == 1
    assert lines[0].startswith(
        "Trainer(num_workers='auto'): the train loader stays as it is, with 0 workers: it could not be measured: Attr"
    )


# --- the line -------------------------------------------------------------------------------------------------------


class Plain(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[1]).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("size", [300, 30])
def test_waiting_for_data_is_said_once_with_the_number_and_the_remedy(lines: list[str], size: int) -> None:
    fit(DataLoader(Slow(size, 0.008), batch_size=1), None, Plain(), max_epochs=3, max_steps=70)
    assert len(lines) == 1
    assert lines[0].startswith("Trainer.fit: ")
    assert "% of 50 steps was waiting for data (" in lines[0]
    assert "num_workers" in lines[0] or "only 1 core" in lines[0]


@pytest.mark.parametrize("options", [{"barebones": True}, {"fast_dev_run": 60}])
def test_nothing_is_said_where_nobody_wants_it(lines: list[str], options: dict[str, Any]) -> None:
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", **options)
    trainer.fit(Plain(), DataLoader(Slow(60, 0.008), batch_size=1))
    assert lines == []


def test_nothing_is_said_of_data_in_memory(lines: list[str]) -> None:
    data = [(i, torch.zeros(4)) for i in range(200)]
    fit(DataLoader(data, batch_size=2), None, Plain())
    assert lines == []
