# SPDX-License-Identifier: Apache-2.0
"""What ``ckpt_path="last"`` and ``"best"`` mean in a fresh process, and the look into a checkpoint without its tensors."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden import atomic, files
from leyden.callbacks import ModelCheckpoint
from leyden.errors import CheckpointError, MisconfigurationException, PossibleUserWarning
from leyden.loggers import CSVLogger
from leyden.loggers.cells import read_rows
from leyden.loops.resume import skim

DATA = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(root: Any, steps: int, logger: Any = False, **kwargs: Any) -> L.Trainer:
    kwargs.setdefault("callbacks", [ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)])
    return L.Trainer(
        max_steps=steps, default_root_dir=root, logger=logger, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **kwargs,
    )  # fmt: skip


def fit(root: Any, steps: int, logger: Any = False, ckpt_path: Any = None, **kwargs: Any) -> L.Trainer:
    run = trainer(root, steps, logger, **kwargs)
    run.fit(Net(), DATA, ckpt_path=ckpt_path)
    return run


def test_C5_last_without_a_logger(tmp_path: Path) -> None:
    with pytest.warns(PossibleUserWarning, match="there is no checkpoint in .*checkpoints.*the fit starts anew"):
        fit(tmp_path, 3, ckpt_path="last")
    run = fit(tmp_path, 7, ckpt_path="last")
    assert Path(run.ckpt_path) == tmp_path / "checkpoints" / "epoch=0-step=2.ckpt"
    assert Path(fit(tmp_path, 7, ckpt_path="last").ckpt_path).name == "epoch=1-step=6.ckpt"


def test_C5_a_complete_run_ends_at_once_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, 6, CSVLogger(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = Net()
    run = trainer(tmp_path, 6, CSVLogger(tmp_path))
    with caplog.at_level("INFO", "leyden"):
        run.fit(again, DATA, ckpt_path="last")
    assert "max_steps=6 reached" in caplog.text
    assert run.global_step == 6
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_C5_the_run_that_wrote_last_is_taken_not_the_highest_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, 9, CSVLogger(tmp_path))  # version 0, the most steps
    fit(tmp_path, 5, CSVLogger(tmp_path))
    fit(tmp_path, 7, CSVLogger(tmp_path))
    for number, written in enumerate((100.0, 300.0, 200.0)):
        for path in (tmp_path / "leyden_logs" / f"version_{number}" / "checkpoints").iterdir():
            os.utime(path, (written, written))
    fit(tmp_path, 0, CSVLogger(tmp_path))  # version 3: no checkpoint yet
    with caplog.at_level("INFO", "leyden"):
        run = fit(tmp_path, 5, CSVLogger(tmp_path), "last")
    assert Path(run.ckpt_path) == tmp_path / "leyden_logs" / "version_1" / "checkpoints" / "epoch=0-step=4.ckpt"
    assert run.logger.version == 1
    assert "of 3 runs with checkpoints, it is of the one that wrote its newest checkpoint last" in caplog.text


def test_C5_within_a_run_the_recorded_step_decides(tmp_path: Path) -> None:
    run = fit(tmp_path, 7, CSVLogger(tmp_path))
    folder = Path(run.checkpoint_callback.dirpath)
    os.utime(folder / "epoch=0-step=2.ckpt", (2e9, 2e9))
    assert Path(fit(tmp_path, 7, CSVLogger(tmp_path), "last").ckpt_path).name == "epoch=1-step=6.ckpt"


def test_C5_the_folder_of_a_callback_comes_before_other_runs(tmp_path: Path) -> None:
    fit(tmp_path, 9, CSVLogger(tmp_path))
    callbacks = [ModelCheckpoint(tmp_path / "mine", every_n_train_steps=2)]
    fit(tmp_path, 3, CSVLogger(tmp_path), callbacks=callbacks)
    run = trainer(
        tmp_path, 3, CSVLogger(tmp_path), callbacks=[ModelCheckpoint(tmp_path / "mine", every_n_train_steps=2)]
    )
    run.fit(Net(), DATA, ckpt_path="last")
    assert Path(run.ckpt_path) == tmp_path / "mine" / "epoch=0-step=2.ckpt"
    assert run.logger.version == 1


def test_C5_two_callbacks_of_one_run_the_step_decides(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [
            ModelCheckpoint(tmp_path / "often", every_n_train_steps=1),
            ModelCheckpoint(tmp_path / "seldom", every_n_train_steps=4, save_top_k=-1),
        ]

    fit(tmp_path, 7, callbacks=callbacks())
    for path in (tmp_path / "seldom").iterdir():
        os.utime(path, (2e9, 2e9))
    assert "often" in str(fit(tmp_path, 7, ckpt_path="last", callbacks=callbacks()).ckpt_path)


def test_C5_a_named_version_looks_nowhere_else(tmp_path: Path) -> None:
    fit(tmp_path, 5, CSVLogger(tmp_path))
    with pytest.warns(PossibleUserWarning, match=r"no checkpoint in \['.*leyden_logs/other/checkpoints'\]"):
        fit(tmp_path, 5, CSVLogger(tmp_path, version="other"), "last")


def test_C5_looking_makes_no_version(tmp_path: Path) -> None:
    run = trainer(tmp_path, 3, CSVLogger(tmp_path))
    with pytest.warns(PossibleUserWarning, match=r"no checkpoint in \['.*version_\*/checkpoints'\].*weights stay"):
        run.validate(Val(), DATA, ckpt_path="last", verbose=False)
    assert [path.name for path in (tmp_path / "leyden_logs").iterdir()] == ["version_0"]


@pytest.mark.filterwarnings("ignore:The checkpoint folder has changed")  # the validation settled it
def test_C5_a_validation_ahead_of_the_fit_does_not_hide_the_run(tmp_path: Path) -> None:
    fit(tmp_path, 5, CSVLogger(tmp_path))
    run, model = trainer(tmp_path, 7, CSVLogger(tmp_path)), Val()
    run.validate(model, DATA, verbose=False)
    assert run.logger.version == 1
    run.fit(model, DATA, DATA, ckpt_path="last")
    assert run.logger.version == 0
    rows = read_rows(tmp_path / "leyden_logs" / "version_0" / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3, 4, 5, 6]
    assert "val" in (tmp_path / "leyden_logs" / "version_1" / "metrics.csv").read_text()


def test_C5_a_trainer_that_has_trained_means_its_own_run(tmp_path: Path) -> None:
    fit(tmp_path, 5, CSVLogger(tmp_path))
    run = fit(tmp_path, 1, CSVLogger(tmp_path))  # no checkpoint yet
    with pytest.warns(PossibleUserWarning, match="version_1/checkpoints"):
        run.fit(run.lightning_module, DATA, ckpt_path="last")


class Val(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch[0]).mean())


def test_C5_checkpoints_of_another_ending_are_found_and_looked_at(tmp_path: Path) -> None:
    class Saver(ModelCheckpoint):
        FILE_EXTENSION = ".pt"

    def savers() -> dict[str, Any]:
        return {"callbacks": [Saver(every_n_train_steps=2, save_top_k=-1)]}

    fit(tmp_path, 5, CSVLogger(tmp_path), **savers())
    run = fit(tmp_path, 7, CSVLogger(tmp_path), "last", **savers())
    assert Path(run.ckpt_path).name == "epoch=0-step=4.pt"
    assert run.loggers[0].version == 0
    for path in tmp_path.rglob("*.pt"):
        path.write_bytes(path.read_bytes()[:-99])
    with pytest.raises(CheckpointError, match="There is no good checkpoint"):
        fit(tmp_path, 9, CSVLogger(tmp_path), "last", **savers())


def test_C5_a_folder_whose_process_died_before_it_got_its_name_is_found(tmp_path: Path) -> None:
    path = Path(fit(tmp_path, 3, CSVLogger(tmp_path)).checkpoint_callback.best_model_path)
    content = files.load(path)
    path.unlink()
    files.save_folder(path, lambda folder: torch.save(content, folder / "meta.pt"), {"global_step": 2})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    waiting = atomic.temporary_name(path.name).replace(f".{os.getpid()}-", f".{dead.pid}-")
    path.rename(path.parent / waiting)
    run = fit(tmp_path, 4, CSVLogger(tmp_path), "last")
    assert (run.loggers[0].version, Path(run.ckpt_path).name) == (0, waiting)
    assert run.global_step == 4


def test_C5_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="There is no good checkpoint in .* Remove what is damaged"):
        fit(tmp_path, 5, ckpt_path="last")


def test_ckpt_path_of_the_trainer_may_be_last_each_time(tmp_path: Path) -> None:
    run = trainer(tmp_path, 5)
    run.ckpt_path = "last"
    model = Net()
    with pytest.warns(PossibleUserWarning, match="starts anew"):
        run.fit(model, DATA)
    assert run.ckpt_path is None
    run.fit(model, DATA)
    assert Path(run.ckpt_path).name == "epoch=0-step=4.ckpt"


@pytest.mark.filterwarnings("ignore:The checkpoint folder has changed")  # the test is a run of its own
@pytest.mark.parametrize("moved", [False, True])
def test_best_in_a_fresh_process(tmp_path: Path, moved: bool) -> None:
    def callbacks() -> list[Any]:
        return [ModelCheckpoint(monitor="loss", every_n_train_steps=2, save_top_k=1, save_last=True)]

    best = fit(
        tmp_path / "run", 7, CSVLogger(tmp_path / "run"), callbacks=callbacks()
    ).checkpoint_callback.best_model_path
    root = tmp_path / "run"
    if moved:
        root = (tmp_path / "run").rename(tmp_path / "moved")
    run = trainer(root, 7, CSVLogger(root), callbacks=callbacks())
    run.test(Judged(), DATA, ckpt_path="best", verbose=False)
    assert Path(run.ckpt_path).name == Path(best).name
    assert Path(run.ckpt_path).is_relative_to(root)


class Judged(Net):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.net(batch[0]).mean())


def test_best_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="no best checkpoint is known"):
        trainer(tmp_path, 1, CSVLogger(tmp_path)).test(Judged(), DATA, ckpt_path="best")


def test_C5_last_in_a_remote_folder(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"

    def options() -> dict[str, Any]:
        return {
            "logger": CSVLogger(root),
            "callbacks": [ModelCheckpoint(f"{root}/c", every_n_train_steps=2, save_top_k=-1)],
        }

    fit(tmp_path, 5, **options())
    run = fit(tmp_path, 7, ckpt_path="last", **options())
    assert str(run.ckpt_path).endswith("epoch=0-step=4.ckpt")
    assert run.logger.version == 0
    import fsspec

    with fsspec.open(f"{root}/leyden_logs/version_0/metrics.csv", "r") as file:
        assert [line.rpartition(",")[2].strip() for line in file] == ["step", *map(str, range(7))]


def test_C5_last_in_a_remote_log_folder(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    fit(tmp_path, 5, CSVLogger(root))
    run = fit(tmp_path, 7, CSVLogger(root), "last")
    assert str(run.ckpt_path).endswith("version_0/checkpoints/epoch=0-step=4.ckpt")


# ---------------------------------------------------------------------------------------------- skim


class Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


def test_skimming_reads_what_is_plain_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"global_step": 7, "weights": torch.ones(3), "nested": {"list": [1, (2.5, "x")]}}
    torch.save(content, "x.ckpt")
    found = skim("x.ckpt")
    assert found["global_step"] == 7
    assert found["nested"] == content["nested"]
    torch.save({**content, "evil": Exploit()}, "x.ckpt")
    skim("x.ckpt")
    assert not Path("exploited").exists()


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": 1})])
def test_skimming_what_is_no_checkpoint_finds_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert skim(tmp_path / "x") == skim(tmp_path / "none") == skim(tmp_path) == {}
