# SPDX-License-Identifier: Apache-2.0
"""EarlyStopping and ModelCheckpoint, called as in 2019; and the walltime of a cluster."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.vintage.callbacks import Walltime
from leyden.vintage.tables import CALLBACK_ARGUMENTS


def test_EarlyStopping() -> None:
    stop = EarlyStopping()
    assert (stop.monitor, stop.min_delta, stop.patience, stop.verbose, stop.mode) == ("val_loss", 0.0, 0, False, "min")
    stop = EarlyStopping("val_acc", 0.1, 4, 1, "auto")
    assert (stop.monitor, stop.min_delta, stop.patience, stop.verbose, stop.mode) == ("val_acc", 0.1, 4, True, "max")
    assert EarlyStopping(monitor="fmeasure", mode="auto").mode == "max"
    assert EarlyStopping(patience=2).patience == 2
    assert EarlyStopping(mode="auto", strict=False).strict is False  # arguments of today may stand among them


def test_EarlyStopping_called_as_today_has_the_defaults_of_today() -> None:
    assert EarlyStopping("val_loss").patience == 3
    assert EarlyStopping(monitor="val_acc", mode="min").mode == "min"
    assert next(iter(inspect.signature(EarlyStopping).parameters.values())).default is inspect.Parameter.empty


def test_ModelCheckpoint(tmp_path: Path) -> None:
    every = ModelCheckpoint(filepath=tmp_path, period=2, prefix="run")
    assert (every.dirpath, every.save_top_k, every.monitor) == (str(tmp_path), -1, None)
    assert (every.every_n_epochs, every.filename) == (2, "run_{epoch}-{step}")
    best = ModelCheckpoint(tmp_path, "val_acc", 1, True, True, "auto")
    assert (best.save_top_k, best.monitor, best.mode) == (1, "val_acc", "max")
    assert (best.verbose, best.save_weights_only) == (True, True)
    assert ModelCheckpoint(tmp_path, save_best_only=True).monitor == "val_loss"
    assert ModelCheckpoint(tmp_path, save_best_only=True, save_top_k=3).save_top_k == 3


def test_ModelCheckpoint_called_as_today_has_the_defaults_of_today(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    assert (checkpoint.save_top_k, checkpoint.every_n_epochs, checkpoint.filename) == (1, 1, None)
    assert ModelCheckpoint("auto").filename is None


def test_ModelCheckpoint_keeps_the_best_only(model: Any, make_trainer: Any, tmp_path: Path) -> None:
    class Worsening(model):
        def validation_end(self, outputs: Any) -> Any:
            return {"val_loss": torch.tensor(float(self.current_epoch))}

    checkpoint = ModelCheckpoint(filepath=tmp_path / "best", save_best_only=True, prefix="net")
    make_trainer(checkpoint_callback=checkpoint, max_nb_epochs=3).fit(Worsening())
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["net_epoch=0-step=19.ckpt"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ModelCheckpoint(filpath="x"), TypeError, "no argument 'filpath'. Did you mean 'filepath'"),
        (lambda: ModelCheckpoint(save_best_only=True), TypeError, "needs 'filepath'"),
        (lambda: ModelCheckpoint("x", filepath="y"), TypeError, "'filepath' is given twice"),
        (lambda: EarlyStopping(monitr="x"), TypeError, "no argument 'monitr'. Did you mean 'monitor'"),
        (lambda: ModelCheckpoint(filepath="x", mode="best"), MisconfigurationException, "mode='best'.*'auto'"),
        (lambda: ModelCheckpoint(filepath="x", period=-1), MisconfigurationException, "every_n_epochs=-1"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_constructors_are_those_of_the_table() -> None:
    for name, cls in (("EarlyStopping", EarlyStopping), ("ModelCheckpoint", ModelCheckpoint)):
        today = inspect.signature(cls).parameters
        assert {row.modern for row in CALLBACK_ARGUMENTS[name]} <= set(today)


# --------------------------------------------------------------------------------------------- the walltime


class Cluster:
    """What a SlurmCluster does in a job: at its signal it calls the save function, and ends the job."""

    def __init__(self, ends: bool = True) -> None:
        self.save: Any = None
        self.load: Any = None
        self.ends = ends
        self.saved: list[str] = []

    def set_checkpoint_save_function(self, fn: Any, kwargs: Any) -> None:
        self.save = lambda: fn(**kwargs)

    def set_checkpoint_load_function(self, fn: Any, kwargs: Any) -> None:
        self.load = lambda: fn(**kwargs)

    def handle(self, number: int, frame: Any) -> None:
        self.saved.append(self.save())
        if self.ends:
            raise SystemExit(0)


@pytest.fixture
def handled() -> Any:
    """A function that installs the signal handler of a cluster, which is gone after the test."""
    former = signal.getsignal(signal.SIGUSR1)
    yield lambda cluster: signal.signal(signal.SIGUSR1, cluster.handle)
    signal.signal(signal.SIGUSR1, former)


@pytest.fixture
def noted(model: Any) -> Any:
    """A model that puts something into the checkpoint at the walltime, and shuffles."""

    class Noted(model):
        taken = None
        fails_at = None

        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            output = super().training_step(data_batch, batch_nb)
            if (self.current_epoch, batch_nb) == self.fails_at:
                os.kill(os.getpid(), signal.SIGUSR1)
                self.calls.append("the step went on")
            return output

        def tng_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(super().tng_dataloader().dataset, batch_size=2, shuffle=True)

        def on_hpc_save(self, checkpoint: Any) -> None:
            checkpoint["extra"] = 7

        def on_hpc_load(self, checkpoint: Any) -> None:
            self.taken = checkpoint["extra"]

    return Noted


@pytest.mark.parametrize("fails_at", [(0, 7), (1, 19)])
def test_cluster(fails_at: Any, noted: Any, make_trainer: Any, handled: Any, tmp_path: Path) -> None:
    """A job that is ended by its walltime, and one that goes on, have the weights of one that ran through."""
    import leyden as ptl

    def job(version: int, walltime: Any = None) -> Any:
        cluster, net = Cluster(), noted()
        handled(cluster)
        net.fails_at = walltime
        exp = ptl.Experiment(save_dir=tmp_path, name="job", version=version)
        trainer = make_trainer(cluster=cluster, experiment=exp, max_nb_epochs=3, add_log_row_interval=1)
        try:
            trainer.fit(net)
        except SystemExit:
            return cluster, net, trainer, True
        finally:
            exp.close()
        return cluster, net, trainer, False

    torch.manual_seed(3)
    _, whole, *_ = job(0)
    torch.manual_seed(3)
    cluster, net, _, ended = job(1, fails_at)
    assert ended
    assert net.calls == ["the step went on"]  # the signal is answered between two batches
    assert [Path(path).parent for path in cluster.saved] == [tmp_path / "job" / "version_1"]
    assert signal.getsignal(signal.SIGUSR1) == cluster.handle
    torch.manual_seed(99)
    _, net, trainer, ended = job(1)
    assert (ended, net.taken, trainer.current_epoch) == (False, 7, 3)
    for mine, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not list(tmp_path.rglob("hpc_ckpt_*"))  # nothing has to go on from the middle of a finished run


def test_on_hpc_save_and_on_hpc_load_are_not_called_for_other_checkpoints(
    noted: Any, make_trainer: Any, tmp_path: Path
) -> None:
    net = noted()
    trainer = make_trainer(cluster=Cluster())
    trainer.fit(net)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "extra" not in torch.load(tmp_path / "x.ckpt", weights_only=True)
    net = noted()
    make_trainer(cluster=Cluster(), max_nb_epochs=2).fit(net, ckpt_path=tmp_path / "x.ckpt")
    assert net.taken is None


def test_a_later_checkpoint_takes_the_place_of_an_earlier_one(
    noted: Any, make_trainer: Any, handled: Any, tmp_path: Path
) -> None:
    class Twice(noted):
        def on_batch_start(self, batch: Any) -> None:
            if self.global_step in (3, 5):
                os.kill(os.getpid(), signal.SIGUSR1)
            if self.global_step == 10:
                self.calls.extend(sorted(path.name for path in tmp_path.glob("hpc_ckpt_*")))

    cluster = Cluster(ends=False)
    handled(cluster)
    net = Twice()
    make_trainer(cluster=cluster).fit(net)
    assert net.calls == ["hpc_ckpt_6.ckpt"]


def test_no_signal_is_touched_outside_the_main_thread_or_without_a_handler(
    model: Any, make_trainer: Any, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    make_trainer(cluster=Cluster()).fit(model())
    thread = threading.Thread(target=lambda: make_trainer(cluster=Cluster()).fit(model()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_there_is_nothing_to_save_outside_a_run() -> None:
    with pytest.raises(MisconfigurationException, match=r"Trainer\.fit is not running"):
        Walltime(Cluster()).save()
