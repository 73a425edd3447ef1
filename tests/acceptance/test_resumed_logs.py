# SPDX-License-Identifier: Apache-2.0
"""H4: a run that is resumed goes on in the logs that it had, and what a killed process wrote beyond is superseded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.callbacks import ModelCheckpoint
from leyden.errors import CheckpointError, LeydenWarning, PossibleUserWarning
from leyden.loggers import CSVLogger, Logger, TensorBoardLogger
from test_killed_runs import scalars

DATA = TensorDataset(torch.randn(12, 2))


class Net(L.LightningModule):
    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        if self.global_step > 8:
            self.log("late", loss)  # a column that the checkpoint does not know
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Bare(Net):
    """Without hyperparameters."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.net = torch.nn.Linear(2, 1)


def fit(root: Path, logger: Any, steps: int, ckpt_path: Any = None, model: Any = None, **kwargs: Any) -> L.Trainer:
    """A fit as a fresh process would do it."""
    kwargs.setdefault("callbacks", [ModelCheckpoint(every_n_train_steps=4, save_top_k=-1)])
    kwargs.setdefault("log_every_n_steps", 1)
    torch.manual_seed(1)
    trainer = L.Trainer(
        max_steps=steps, default_root_dir=root, logger=logger, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **kwargs,
    )  # fmt: skip
    trainer.fit(model or Net(), DataLoader(DATA, batch_size=2), ckpt_path=ckpt_path)
    return trainer


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".ckpt")


def test_H4_the_default_logger_goes_on_with_its_version(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    fit(whole, True, 12)
    fit(tmp_path / "run", True, 7)
    trainer = fit(tmp_path / "run", True, 12, "last")
    assert trainer.logger.version == 0
    assert [path.name for path in (tmp_path / "run" / "leyden_logs").iterdir()] == ["version_0"]
    folder = Path(trainer.log_dir)
    assert scalars(folder) == scalars(whole / "leyden_logs" / "version_0")
    assert [step for step, _ in scalars(folder)["loss"]] == list(range(12))
    assert len(scalars(folder)["hp_metric"]) == 1  # the hyperparameters are not logged again


def test_H4_the_file_of_csv_is_the_one_of_a_run_without_a_break(tmp_path: Path) -> None:
    fit(tmp_path / "whole", CSVLogger(tmp_path / "whole"), 14)
    run = tmp_path / "run"
    fit(run, CSVLogger(run), 11)  # the rows at 9 and 10 have a column that the checkpoint at 8 does not know
    assert "late" in (run / "leyden_logs" / "version_0" / "metrics.csv").read_text()
    fit(run, CSVLogger(run), 9, "last")
    rows = (run / "leyden_logs" / "version_0" / "metrics.csv").read_text()
    assert rows.splitlines()[0] == "epoch,loss,step"
    assert len(rows.splitlines()) == 10
    fit(run, CSVLogger(run), 14, "last")
    assert files(run) == files(tmp_path / "whole")
    name = "leyden_logs/version_0/metrics.csv"
    assert (run / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_H4_by_path_too_and_an_older_checkpoint_supersedes_more(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path), 8)
    path = tmp_path / "leyden_logs" / "version_0" / "checkpoints" / "epoch=0-step=4.ckpt"
    trainer = fit(tmp_path, CSVLogger(tmp_path), 6, path)
    rows = (tmp_path / "leyden_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert trainer.logger.version == 0
    assert [row.rpartition(",")[2] for row in rows] == ["step", "0", "1", "2", "3", "4", "5"]
    assert [row["step"] for row in trainer.history] == [3, 4, 5]  # the rows of this process


def test_H4_two_loggers_of_one_kind_each_go_on_with_their_own(tmp_path: Path) -> None:
    def loggers() -> list[Any]:
        return [CSVLogger(tmp_path, "a"), CSVLogger(tmp_path, "b"), TensorBoardLogger(tmp_path, "a")]

    fit(tmp_path, loggers(), 5)
    trainer = fit(tmp_path, loggers(), 8, "last")
    assert [logger.version for logger in trainer.loggers] == [0, 0, 1]
    assert len((tmp_path / "a" / "version_0" / "metrics.csv").read_text().splitlines()) == 9
    assert len((tmp_path / "b" / "version_0" / "metrics.csv").read_text().splitlines()) == 9


@pytest.mark.filterwarnings("ignore:The checkpoint folder has changed")
def test_H4_a_version_of_ones_own(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path), 5)
    path = tmp_path / "leyden_logs" / "version_0" / "checkpoints" / "epoch=0-step=4.ckpt"
    before = (tmp_path / "leyden_logs" / "version_0" / "metrics.csv").read_text()
    assert fit(tmp_path, CSVLogger(tmp_path, version=7), 6, path).logger.version == 7
    assert fit(tmp_path, CSVLogger(tmp_path, resume=False), 6, path).logger.version == 8
    assert fit(tmp_path, CSVLogger(tmp_path, name="other"), 6, path).logger.version == 0
    assert (tmp_path / "leyden_logs" / "version_0" / "metrics.csv").read_text() == before
    rows = (tmp_path / "leyden_logs" / "version_8" / "metrics.csv").read_text().splitlines()
    assert [row.rpartition(",")[2] for row in rows] == ["step", "3", "4", "5"]


def test_H4_with_the_semantics_of_lightning_a_resumed_fit_logs_into_a_new_version(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path), 7)
    (saved,) = tmp_path.rglob("*step=4.ckpt")
    with pytest.warns(LeydenWarning, match="checkpoint folder has changed"):
        trainer = fit(tmp_path, CSVLogger(tmp_path), 12, saved, semantics="lightning")
    assert trainer.logger.version == 1
    assert len((tmp_path / "leyden_logs" / "version_0" / "metrics.csv").read_text().splitlines()) == 1 + 7


def test_H4_a_version_that_was_asked_for_before_the_fit_makes_way(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path), 5)
    logger = CSVLogger(tmp_path)
    assert logger.version == 1  # its folder is made
    folder = Path(logger.log_dir)
    assert fit(tmp_path, logger, 6, "last").logger.version == 0
    assert not folder.exists()


def test_H4_checkpoints_in_a_folder_named_after_the_version_are_found(tmp_path: Path) -> None:
    for expected, steps in ((0, 5), (4, 9), (8, 9)):
        logger = CSVLogger(tmp_path)
        callback = ModelCheckpoint(dirpath=Path(logger.log_dir) / "mine", every_n_train_steps=4, save_top_k=-1)
        with pytest.warns(PossibleUserWarning) if not expected else _nothing(), _folder_changes(expected):
            trainer = fit(tmp_path, logger, steps, "last", callbacks=[callback])
        assert trainer.logger.version == 0
        assert (trainer.ckpt_path is None) == (expected == 0)
        assert trainer.ckpt_path is None or f"step={expected}" in str(trainer.ckpt_path)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


def _folder_changes(expected: int) -> Any:
    return pytest.warns(match="The checkpoint folder has changed") if expected else _nothing()


def test_H4_a_tree_that_was_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    fit(tmp_path / "old", [CSVLogger(tmp_path / "old"), TensorBoardLogger(tmp_path / "old")], 6)
    shutil.move(tmp_path / "old", tmp_path / "new")
    with pytest.warns(match="The checkpoint folder has changed"):
        trainer = fit(tmp_path / "new", [CSVLogger(tmp_path / "new"), TensorBoardLogger(tmp_path / "new")], 8, "last")
    assert [logger.version for logger in trainer.loggers] == [0, 1]
    assert [step for step, _ in scalars(tmp_path / "new" / "leyden_logs" / "version_1")["loss"]] == list(range(8))
    assert not (tmp_path / "old").exists()


def test_H4_the_log_of_another_run_is_left_alone(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path), 5, callbacks=[ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=4)])
    shutil.rmtree(tmp_path / "leyden_logs")
    fit(tmp_path, CSVLogger(tmp_path), 6, model=Net(2.0), enable_checkpointing=False, callbacks=[], max_epochs=-1,
        gradient_clip_val=1e-3)  # fmt: skip
    path = tmp_path / "leyden_logs" / "version_0" / "metrics.csv"
    before = path.read_text()
    path.write_text(before.replace("0,", "0,1"))
    before = path.read_text()
    callbacks = [ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=4)]
    with pytest.warns(match="is not the log of that run"):
        trainer = fit(tmp_path, CSVLogger(tmp_path), 6, "last", callbacks=callbacks)
    assert trainer.logger.version == 1
    assert path.read_text() == before


def test_H4_logs_that_are_gone_begin_again_under_the_same_version(tmp_path: Path) -> None:
    def loggers() -> list[Any]:
        return [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, "tb")]

    def callbacks() -> list[Any]:
        return [ModelCheckpoint(dirpath=tmp_path / "c", every_n_train_steps=4)]

    fit(tmp_path, loggers(), 5, callbacks=callbacks())
    fit(tmp_path, loggers(), 5, callbacks=[], enable_checkpointing=False)
    shutil.rmtree(tmp_path / "leyden_logs" / "version_0")
    shutil.rmtree(tmp_path / "tb" / "version_0")
    trainer = fit(tmp_path, loggers(), 6, "last", callbacks=callbacks())
    assert [logger.version for logger in trainer.loggers] == [0, 0]
    assert [step for step, _ in scalars(tmp_path / "tb" / "version_0")["loss"]] == [3, 4, 5]


def test_H4_new_hyperparameters_are_logged(tmp_path: Path) -> None:
    fit(tmp_path, True, 5)
    fit(tmp_path, True, 6, "last", Net(0.5))
    assert (tmp_path / "leyden_logs" / "version_0" / "hparams.yaml").read_text() == "rate: 0.5\n"


def test_H4_a_checkpoint_that_does_not_fit_changes_no_log(tmp_path: Path) -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 3)

    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    fit(tmp_path, loggers, 7)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(CheckpointError):
        fit(tmp_path, [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)], 12, "last", Wide())
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_H4_a_second_fit_of_the_same_trainer(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = fit(tmp_path, logger, 7)
    trainer.fit(trainer.lightning_module, DataLoader(DATA, batch_size=2), ckpt_path="last")
    rows = (tmp_path / "leyden_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert [row.rpartition(",")[2] for row in rows[1:]] == ["0", "1", "2", "3", "4", "5", "6"]


def test_H4_a_fit_from_a_checkpoint_without_logs_takes_nothing_back(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path), 5)
    trainer = fit(tmp_path, CSVLogger(tmp_path), 7, "last")
    path = Path(trainer.checkpoint_callback.best_model_path)
    content = torch.load(path, weights_only=True)
    del content["leyden"]["loggers"]
    torch.save(content, tmp_path / "foreign.ckpt")
    rows = (tmp_path / "leyden_logs" / "version_0" / "metrics.csv").read_text()
    trainer.fit(trainer.lightning_module, DataLoader(DATA, batch_size=2), ckpt_path=tmp_path / "foreign.ckpt")
    assert (tmp_path / "leyden_logs" / "version_0" / "metrics.csv").read_text().startswith(rows)


def test_H4_last_without_a_checkpoint_puts_the_rows_of_a_named_version_aside(tmp_path: Path) -> None:
    def loggers() -> list[Any]:
        return [CSVLogger(tmp_path, version="mine"), TensorBoardLogger(tmp_path, version="mine")]

    fit(tmp_path, loggers(), 3)  # ends before its first checkpoint
    folder = tmp_path / "leyden_logs" / "mine"
    before = (folder / "metrics.csv").read_text()
    with pytest.warns(PossibleUserWarning, match="starts anew"):
        fit(tmp_path, loggers(), 5, "last")
    assert [step for step, _ in scalars(folder)["loss"]] == list(range(5))
    assert len((folder / "metrics.csv").read_text().splitlines()) == 6
    assert (folder / "metrics.superseded.csv").read_text() == before
    assert len(list(folder.glob("superseded.*"))) == 1


def test_H4_the_rows_of_two_runs_that_left_no_checkpoint_are_both_kept(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path, version="mine"), 2)
    for steps in (3, 3):
        with pytest.warns(PossibleUserWarning, match="starts anew"):
            fit(tmp_path, CSVLogger(tmp_path, version="mine"), steps, "last")
    folder = tmp_path / "leyden_logs" / "mine"
    kept = {path.name: len(path.read_text().splitlines()) - 1 for path in folder.glob("metrics*.csv")}
    assert kept == {"metrics.csv": 3, "metrics.superseded.csv": 2, "metrics.superseded-1.csv": 3}


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_H4_a_checkpoint_that_knows_of_no_row_takes_none_of_another_run(kind: Any, tmp_path: Path) -> None:
    """A colleague's, say, written before the first row: any log at all begins with nothing."""
    state = kind(tmp_path / "theirs")
    fit(tmp_path / "theirs", state, 4, log_every_n_steps=50, model=Bare())
    [checkpoint] = (tmp_path / "theirs").rglob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    log = content["leyden"]["loggers"][0]["log"]
    assert log.get("rows", 0) == 0
    if kind is TensorBoardLogger:
        log["files"] = {}
        torch.save(content, checkpoint)
    fit(tmp_path / "mine", kind(tmp_path / "mine"), 6)
    folder = tmp_path / "mine" / "leyden_logs" / "version_0"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    moved = pytest.warns(LeydenWarning, match="checkpoint folder has changed")
    with moved, pytest.warns(LeydenWarning, match="not the log of that run"):
        trainer = fit(tmp_path / "mine", kind(tmp_path / "mine"), 8, checkpoint, model=Bare())
    assert trainer.logger.version == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_H4_a_moved_run_goes_on_where_it_is_though_its_checkpoint_knows_of_no_row(tmp_path: Path) -> None:
    options = {"log_every_n_steps": 5, "model": Bare()}
    fit(
        tmp_path / "here", CSVLogger(tmp_path / "here"), 7, **options
    )  # the checkpoint is of step 4, before the first row
    (tmp_path / "here").rename(tmp_path / "there")
    moved = pytest.warns(LeydenWarning, match="checkpoint folder has changed")
    with moved:
        trainer = fit(tmp_path / "there", CSVLogger(tmp_path / "there"), 9, "last", **{**options, "model": Bare()})
    assert trainer.logger.version == 0
    rows = (tmp_path / "there" / "leyden_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2  # that of step 4 is there once


@pytest.mark.parametrize("version", ["../../victim", "/victim", ".."])
def test_H4_a_checkpoint_names_no_folder_outside(version: str, tmp_path: Path) -> None:
    version = version.replace("/victim", f"{tmp_path}/victim") if version.startswith("/") else version
    victim = tmp_path / "victim"
    victim.mkdir()
    logger = CSVLogger(tmp_path)
    state = {**logger.state_dict(), "version": version, "save_dir": str(tmp_path)}
    fresh = CSVLogger(tmp_path)
    fresh.load_state_dict(state)
    assert Path(fresh.log_dir).parent == tmp_path / "leyden_logs"


def test_H4_a_fit_without_ckpt_path_has_a_version_of_its_own(tmp_path: Path) -> None:
    fit(tmp_path, True, 5)
    assert fit(tmp_path, True, 5).logger.version == 1


class Slate(Logger):
    """A logger of somebody else's that can be resumed: the protocol, nothing more."""

    rows: dict[str, list[int]] = {}

    def __init__(self) -> None:
        self.id, self.calls = "fresh", list[str]()
        self.state: Any = None

    @property
    def name(self) -> str:
        return "slate"

    @property
    def version(self) -> str:
        return self.id

    @property
    def experiment(self) -> Any:
        self.calls.append("experiment")
        return None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.setdefault(self.id, []).append(step or 0)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": len(self.rows.get(self.id, []))}

    def load_state_dict(self, state: Any) -> None:
        self.calls.append("load_state_dict")
        self.state, self.id = state, state["version"]

    def rewind(self) -> None:
        self.calls.append("rewind")
        del self.rows[self.id][self.state["count"] :]


class Plain:
    """A logger that knows nothing of it, as people have written them."""

    name, version, save_dir, log_dir = "plain", 3, None, None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("state_dict", "load_state_dict", "rewind", "set_aside", "folders"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def test_H4_loggers_of_others(tmp_path: Path) -> None:
    first = Slate()
    first.id = "run-1"
    fit(tmp_path, [first, Plain()], 7)
    assert Slate.rows == {"run-1": list(range(7))}
    second = Slate()
    trainer = fit(tmp_path, [second, Plain()], 9, "last")
    assert second.version == "run-1"
    assert Slate.rows == {"run-1": list(range(9))}
    assert second.calls[:3] == ["load_state_dict", "experiment", "rewind"]
    states = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["leyden"]["loggers"]
    assert states == [
        {"class": "Slate", "name": "slate", "version": "run-1", "save_dir": None, "count": 7},
        {"class": "Plain", "name": "plain", "version": 3, "save_dir": None},
    ]


def test_H4_a_logger_that_fails_is_no_reason_to_lose_a_checkpoint(tmp_path: Path) -> None:
    class Broken(Slate):
        def state_dict(self) -> dict[str, Any]:
            raise OSError("no room")

    with pytest.warns(match="Broken.state_dict.. failed while a checkpoint was written.*no room"):
        fit(tmp_path, [Broken()], 4)
    assert list(tmp_path.rglob("*.ckpt"))


def test_H4_a_validation_ahead_of_a_resumed_fit_leaves_the_run_and_its_top_k(tmp_path: Path) -> None:
    """Warnings are errors here: none says that the folder has changed, and that the top k start anew."""

    class Validated(Bare):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.net(batch[0]).square().mean())

    def trainer(steps: int) -> L.Trainer:
        best = ModelCheckpoint(monitor="val", save_top_k=2, every_n_epochs=1)
        return L.Trainer(
            max_steps=steps, default_root_dir=tmp_path, logger=CSVLogger(tmp_path), callbacks=[best], accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        )  # fmt: skip

    loader = DataLoader(DATA, batch_size=2)
    first = trainer(12)
    first.fit(Validated(), loader, loader)
    second, model = trainer(18), Validated()
    second.validate(model, loader, verbose=False)
    provisional = second.checkpoint_callback.dirpath
    assert provisional.endswith("version_1/checkpoints")
    second.fit(model, loader, loader, ckpt_path="last")
    callback = second.checkpoint_callback
    assert callback.dirpath == first.checkpoint_callback.dirpath
    assert len(callback.best_k_models) == 2
    assert callback.best_model_score <= first.checkpoint_callback.best_model_score
    second.validate(model, loader, verbose=False)
    assert callback.dirpath == first.checkpoint_callback.dirpath  # a fit has used it
