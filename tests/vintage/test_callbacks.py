# SPDX-License-Identifier: Apache-2.0
"""EarlyStopping and ModelCheckpoint, called as in 2019; and the walltime of a cluster."""

from __future__ import annotations

import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import MisconfigurationException
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
    assert ModelCheckpoint(tmp_path, "val_acc", 0, True, False, "min").monitor == "val_acc"
    best = ModelCheckpoint(tmp_path, "val_acc", 1, True, True, "auto")
    assert (best.save_top_k, best.monitor, best.mode) == (1, "val_acc", "max")
    assert (best.verbose, best.save_weights_only) == (True, True)
    assert ModelCheckpoint(tmp_path, save_best_only=True).monitor == "val_loss"
    assert ModelCheckpoint(tmp_path, save_best_only=True, save_top_k=3).save_top_k == 3


def test_ModelCheckpoint_called_as_today_has_the_defaults_of_today(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    assert (checkpoint.save_top_k, checkpoint.every_n_epochs, checkpoint.filename) == (1, 1, None)
    assert ModelCheckpoint("auto").filename is None


def test_a_trainer_of_2019_settles_the_year_of_a_call_that_could_be_of_either(
    make_trainer: Any, tmp_path: Path
) -> None:
    stop, kept = EarlyStopping("val_acc"), ModelCheckpoint(tmp_path, "val_loss", mode="max")
    assert (stop.patience, stop.mode, kept.filename, kept.save_top_k) == (3, "min", "val_loss", 1)
    make_trainer(early_stop_callback=stop, checkpoint_callback=kept)
    assert (stop.patience, stop.mode) == (0, "max")
    assert (kept.filename, kept.mode, kept.save_top_k) == (None, "max", -1)
    every = ModelCheckpoint(tmp_path)
    make_trainer(checkpoint_callback=every)
    assert every.save_top_k == -1
    every.save_top_k = 2  # a second Trainer changes nothing any more
    make_trainer(checkpoint_callback=every)
    assert every.save_top_k == 2


def test_a_trainer_of_2019_leaves_calls_of_today_alone(make_trainer: Any, tmp_path: Path) -> None:
    class Own(EarlyStopping):
        def __init__(self) -> None:
            super().__init__("val_loss")
            self.patience = 7

    own, today = Own(), ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3)
    make_trainer(early_stop_callback=own, checkpoint_callback=today)
    assert (own.patience, today.save_top_k) == (7, 3)
    among = ModelCheckpoint(tmp_path)
    make_trainer(callbacks=[among], checkpoint_callback="default")
    assert among.save_top_k == 1


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
    """What a SlurmCluster is in a job: it notes its signal, and when it is told to leave it saves and ends the job."""

    def __init__(self, file: Path | None, continues: bool = False) -> None:
        self.checkpoint_file = file
        self.continues, self.ckpt_path = continues, file if continues else None
        self.signalled = self.postponed = False
        self.save: Any = None

    def set_checkpoint_save_function(self, fn: Any, kwargs: Any = None) -> None:
        self.save = None if fn is None else lambda: fn(**(kwargs or {}))

    def leave(self) -> None:
        assert self.postponed
        self.save()
        raise SystemExit(0)


@pytest.fixture
def noted(model: Any) -> Any:
    """A model that puts something into the checkpoint at the walltime, and shuffles."""

    class Noted(model):
        taken = None
        fails_at: Any = None
        cluster: Any = None

        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            output = super().training_step(data_batch, batch_nb)
            if (self.current_epoch, batch_nb) == self.fails_at:
                self.cluster.signalled = True
                self.calls.append("the step went on")
            return output

        def validation_step(self, data_batch: Any, batch_nb: int) -> Any:
            if (self.current_epoch, "validation") == self.fails_at and not self.trainer.sanity_checking:
                self.cluster.signalled = True
            return super().validation_step(data_batch, batch_nb)

        def tng_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(super().tng_dataloader().dataset, batch_size=2, shuffle=True)

        def on_hpc_save(self, checkpoint: Any) -> None:
            checkpoint["extra"] = 7

        def on_hpc_load(self, checkpoint: Any) -> None:
            self.taken = checkpoint["extra"]

    return Noted


@pytest.mark.parametrize("fails_at", [(0, 7), (1, 19), (1, "validation")])
def test_cluster(fails_at: Any, noted: Any, make_trainer: Any, tmp_path: Path) -> None:
    """A job that is ended by its walltime, and the one that goes on, make the weights of one that ran through."""
    file = tmp_path / "trial_1.ckpt"

    def job(seed: int, cluster: Cluster, fails_at: Any = None) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        net = noted()
        net.fails_at, net.cluster = fails_at, cluster
        trainer = make_trainer(cluster=cluster, max_nb_epochs=3)
        try:
            trainer.fit(net)
        finally:
            assert not cluster.postponed
        return net, trainer

    whole, _ = job(3, Cluster(tmp_path / "trial_0.ckpt"))
    assert not list(tmp_path.glob("*.ckpt"))
    with pytest.raises(SystemExit):
        job(3, Cluster(file), fails_at)
    assert torch.load(file, weights_only=True)["extra"] == 7
    net, trainer = job(99, Cluster(file, continues=True))
    assert (net.taken, trainer.current_epoch) == (7, 3)
    for mine, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_on_hpc_save_and_on_hpc_load_are_not_called_for_other_checkpoints(
    noted: Any, make_trainer: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(cluster=Cluster(tmp_path / "trial.ckpt"))
    trainer.fit(noted())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert "extra" not in torch.load(tmp_path / "x.ckpt", weights_only=True)
    net = noted()
    make_trainer(cluster=Cluster(tmp_path / "trial.ckpt"), max_nb_epochs=2).fit(net, ckpt_path=tmp_path / "x.ckpt")
    assert net.taken is None


def test_a_run_outside_of_a_job_is_not_touched(model: Any, make_trainer: Any) -> None:
    cluster = Cluster(None)
    cluster.signalled = True
    assert make_trainer(cluster=cluster).fit(model()) == 1
    assert cluster.save is None


def test_a_path_given_to_fit_wins_over_that_of_the_cluster(noted: Any, make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.fit(noted())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    trainer = make_trainer(cluster=Cluster(tmp_path / "missing.ckpt", continues=True), max_nb_epochs=2)
    trainer.fit(noted(), ckpt_path=tmp_path / "x.ckpt")
    assert trainer.global_step == 40


def test_E1_a_cluster_does_not_keep_a_run_alive(noted: Any, make_trainer: Any, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "trial.ckpt")

    def run() -> list[Any]:
        net, trainer = noted(), make_trainer(cluster=cluster)
        trainer.fit(net)
        return [weakref.ref(net), weakref.ref(trainer)]

    run()  # what torch imports at its first use keeps frames alive
    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in run()] == [None, None]
    finally:
        gc.enable()
