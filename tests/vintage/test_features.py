# SPDX-License-Identifier: Apache-2.0
"""What the trainer of 2019 did by itself, feature by feature; one test for each, named after it."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as ptl
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import CheckpointDamagedError, LeydenWarning, MisconfigurationException


def fitted(make_trainer: Any, net: Any, **arguments: Any) -> ptl.Trainer:
    trainer = make_trainer(**arguments)
    trainer.fit(net)
    return trainer


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def rows_on_disk(experiment: Any) -> list[dict[str, str]]:
    with open(Path(experiment.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------- checkpointing


def test_model_saving_and_model_loading(model: Any, make_trainer: Any, experiment: Any, tmp_path: Path) -> None:
    class Configured(model):
        def __init__(self, hparams: Any) -> None:
            super().__init__()
            self.hparams = hparams
            self.layer = torch.nn.Linear(4, hparams.classes)

    checkpoint = ModelCheckpoint(filepath=tmp_path / "kept")
    net = Configured(Namespace(classes=2))
    fitted(make_trainer, net, experiment=experiment, checkpoint_callback=checkpoint, val_check_interval=1.0)
    tags = Path(experiment.log_dir) / "meta_tags.csv"
    assert same(Configured.load_from_metrics(checkpoint.best_model_path, tags, on_gpu=False), net)
    assert same(Configured.load_from_checkpoint(checkpoint.best_model_path), net)


@pytest.mark.parametrize("own_folder", [True, False])
def test_restoring_a_session(own_folder: bool, model: Any, make_trainer: Any, tmp_path: Path) -> None:
    class Scheduled(model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

        def tng_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(super().tng_dataloader().dataset, batch_size=2, shuffle=True)

    def job(version: int, epochs: int) -> tuple[Any, ptl.Trainer]:
        exp = ptl.Experiment(save_dir=tmp_path / "logs", name="session", version=version)
        kept = ModelCheckpoint(filepath=tmp_path / f"kept_{version}") if own_folder else "default"
        net = Scheduled()
        trainer = fitted(
            make_trainer, net, experiment=exp, max_nb_epochs=epochs, checkpoint_callback=kept, val_check_interval=1.0
        )
        exp.close()
        return net, trainer

    torch.manual_seed(5)
    whole, _ = job(0, 4)
    torch.manual_seed(5)
    job(1, 2)
    torch.manual_seed(6)
    net, trainer = job(1, 4)
    assert (trainer.global_step, trainer.current_epoch) == (80, 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**4
    assert same(net, whole)
    _, fresh = job(2, 1)
    assert fresh.global_step == 20  # a version without a checkpoint starts anew
    assert job(1, 4)[1].global_step == 80  # there is nothing left to train


def test_restoring_a_session_asks_all_its_folders_before_it_gives_up(
    model: Any, make_trainer: Any, tmp_path: Path
) -> None:
    def job(epochs: int) -> ptl.Trainer:
        exp = ptl.Experiment(save_dir=tmp_path / "logs", name="session", version=0)
        kept = ModelCheckpoint(filepath=tmp_path / "kept")
        try:
            return fitted(make_trainer, model(), experiment=exp, max_nb_epochs=epochs, checkpoint_callback=kept)
        finally:
            exp.close()

    folder = Path(job(1).log_dir) / "checkpoints"
    folder.mkdir(exist_ok=True)
    (folder / "damaged.ckpt").write_bytes(b"PK\x03\x04 cut off")
    assert job(2).global_step == 40
    for path in (tmp_path / "kept").rglob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointDamagedError, match="no good checkpoint"):
        job(3)


def test_restoring_a_session_that_was_killed(tmp_path: Path, monkeypatch: Any) -> None:
    """The same script again, after kill -9 in the middle of an epoch; another version has left its files in the folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import killed_script

    whole, _ = killed_script.main(str(tmp_path), 0)
    command = [sys.executable, killed_script.__file__, str(tmp_path), "1", "25"]
    assert subprocess.run(command, timeout=60, check=False).returncode == -signal.SIGKILL
    net, trainer = killed_script.main(str(tmp_path), 1)
    assert net.steps == 20, "of the 40, two epochs were there"
    assert (trainer.global_step, trainer.current_epoch) == (40, 4)
    assert trainer.optimizers[0].param_groups[0]["lr"] == whole.trainer.optimizers[0].param_groups[0]["lr"]
    assert same(net, whole)


@pytest.mark.filterwarnings("ignore:The checkpoint folder .* of other runs:leyden.errors.LeydenWarning")
def test_restoring_a_session_needs_more_than_weights(model: Any, make_trainer: Any, tmp_path: Path) -> None:
    for _ in range(2):
        exp = ptl.Experiment(save_dir=tmp_path / "logs", name="session", version=0)
        kept = ModelCheckpoint(filepath=tmp_path / "kept", save_weights_only=True)
        trainer = fitted(make_trainer, model(), experiment=exp, checkpoint_callback=kept)
        exp.close()
        assert trainer.global_step == 20


# --------------------------------------------------------------------------------------------- SLURM


def test_walltime_resubmit(model: Any, make_trainer: Any, tmp_path: Path) -> None:
    """The cluster gets what it calls; test_callbacks.py ends a job by its signal, tests/slurm one by its walltime."""
    given: dict[str, Any] = {}

    class Cluster:
        checkpoint_file, ckpt_path, continues = tmp_path / "trial.ckpt", None, False
        signalled, postponed = False, False

        def set_checkpoint_save_function(self, fn: Any, kwargs: Any = None) -> None:
            given["save"] = fn, kwargs or {}

    class Saving(model):
        def on_epoch_end(self) -> None:
            fn, kwargs = given["save"]
            fn(**kwargs)

    fitted(make_trainer, Saving(), cluster=Cluster())
    assert torch.load(tmp_path / "trial.ckpt", weights_only=True)["global_step"] == 20


# --------------------------------------------------------------------------------------------- debugging


def test_inspect_gradient_norms(model: Any, make_trainer: Any) -> None:
    names = fitted(make_trainer, model(), track_grad_norm=1).history.names
    assert {"grad_1_norm_layer.weight", "grad_1_norm_layer.bias", "grad_1_norm_total"} <= set(names)


def test_log_gpu_usage(model: Any, make_trainer: Any, monkeypatch: Any) -> None:
    trainer = fitted(make_trainer, model())
    assert not any(name.startswith("gpu_") for name in trainer.history.names)
    # as it would be on a GPU: where a row is amended, the device of the run is asked
    from leyden.vintage import run

    class OnGPU:
        training = True

        class strategy:
            root_device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**20, 5 * 2**20))
    row = run._amend(OnGPU, run.Adapters(model(), ptl.LightningModule), {"loss": 1.0})
    assert row == {"loss": 1.0, "gpu_1": 3.0}


def test_overfit_a_subset(model: Any, make_trainer: Any) -> None:
    assert fitted(make_trainer, model(), overfit_pct=0.25).num_training_batches == 5


def test_parameter_count_by_layer(model: Any, make_trainer: Any, capsys: Any) -> None:
    fitted(make_trainer, model(), print_weights_summary=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if "Linear" in line)
    assert line.split()[-3] == "10"


def test_print_which_gradients_are_nan(model: Any, make_trainer: Any, capsys: Any) -> None:
    class Bad(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            return {"loss": self.loss(data_batch) * float("nan")}

    fitted(make_trainer, Bad(), print_nan_grads=True, train_percent_check=0.05)
    text = capsys.readouterr().out
    assert "layer.weight (8 of 8 values)" in text
    assert "layer.bias (2 of 2 values)" in text


def test_input_and_output_size_of_every_module(model: Any, make_trainer: Any, capsys: Any) -> None:
    net = model()
    net.example_input_array = torch.zeros(7, 4)
    fitted(make_trainer, net, print_weights_summary=True)
    assert "[7, 4]" in (text := capsys.readouterr().out)
    assert "[7, 2]" in text


# --------------------------------------------------------------------------------------------- devices


def test_mixed_precision(model: Any, make_trainer: Any) -> None:
    class Looking(model):
        def forward(self, x: Any) -> Any:
            out = super().forward(x)
            self.calls.append(out.dtype)
            return out

    net = Looking()
    with pytest.warns(LeydenWarning, match="bf16-mixed"):
        trainer = make_trainer(use_amp=True)
    trainer.fit(net)
    assert set(net.calls) == {torch.bfloat16}
    assert net.dtype is torch.float32


def test_several_machines_that_nobody_has_started_are_a_clear_error(make_trainer: Any) -> None:
    with pytest.raises(MisconfigurationException, match="no launcher has started this process"):
        make_trainer(nb_gpu_nodes=2, distributed_backend="ddp")


# --------------------------------------------------------------------------------------------- logging


def test_metrics_on_the_bar(model: Any, make_trainer: Any) -> None:
    class Shown(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            return {"loss": self.loss(data_batch), "prog": {"tng_acc": torch.tensor(0.5)}}

    assert set(fitted(make_trainer, Shown()).tng_tqdm_dic) == {"tng_loss", "tng_acc", "avg_val_loss"}


def test_a_row_every_k_batches(model: Any, make_trainer: Any) -> None:
    history = fitted(make_trainer, model(), add_log_row_interval=5).history
    assert [step for step, _ in history.column("tng_loss")] == [4, 9, 14, 19]


def test_tensorboard(model: Any, make_trainer: Any, experiment: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted(make_trainer, model(), experiment=experiment, add_log_row_interval=5)
    events = EventAccumulator(experiment.get_logdir())
    events.Reload()
    assert [event.step for event in events.Scalars("tng_loss")] == [4, 9, 14, 19]
    assert "avg_val_loss" in events.Tags()["scalars"]


def test_snapshot_of_hyperparameters(model: Any, make_trainer: Any, experiment: Any) -> None:
    class Configured(model):
        def __init__(self, lr: float = 0.5) -> None:
            super().__init__()

    fitted(make_trainer, Configured(lr=0.25), experiment=experiment)
    assert (Path(experiment.log_dir) / "meta_tags.csv").read_text().split() == ["key,value", "lr,0.25"]


def test_snapshot_of_the_code(model: Any, make_trainer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for key, value in (("GIT_AUTHOR_NAME", "x"), ("GIT_AUTHOR_EMAIL", "x@example.org")):
        monkeypatch.setenv(key, value)
        monkeypatch.setenv(key.replace("AUTHOR", "COMMITTER"), value)
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "code"]):
        subprocess.run(["git", *command], check=True)
    exp = ptl.Experiment(save_dir=tmp_path / "logs", name="snap", create_git_tag=True)
    fitted(make_trainer, model(), experiment=exp)
    tags = subprocess.run(["git", "tag"], check=True, capture_output=True, text=True).stdout.split()
    assert tags == ["tt_snap_v0"]


def test_csv_every_k_batches(model: Any, make_trainer: Any, experiment: Any) -> None:
    class Looking(model):
        def on_batch_end(self) -> None:
            self.calls.append(len([row for row in rows_on_disk(experiment) if row.get("tng_loss")]))

    net = Looking()
    fitted(make_trainer, net, experiment=experiment, log_save_interval=6, add_log_row_interval=1, val_percent_check=0.0)
    # at least what a flush before batches 6, 12 and 18 brings; the logger may bring more by itself
    assert net.calls[6] >= 6
    assert net.calls[12] >= 12
    assert net.calls[18] >= 18


# --------------------------------------------------------------------------------------------- training


def test_accumulate_gradients(model: Any, make_trainer: Any) -> None:
    assert fitted(make_trainer, model(), accumulate_grad_batches=5).global_step == 4


@pytest.mark.parametrize(("minimum", "maximum", "trained"), [(1, 3, 2), (3, 5, 3), (1, 1, 1)])
def test_min_and_max_epochs(minimum: int, maximum: int, trained: int, model: Any, make_trainer: Any) -> None:
    stop = EarlyStopping(monitor="avg_val_loss", min_delta=10.0, mode="auto")
    trainer = make_trainer(min_nb_epochs=minimum, max_nb_epochs=maximum, early_stop_callback=stop)
    trainer.fit(model())
    assert trainer.current_epoch == trained


def test_disable_early_stop(model: Any, make_trainer: Any) -> None:
    stop = EarlyStopping(monitor="avg_val_loss", min_delta=10.0, mode="auto")
    trainer = make_trainer(max_nb_epochs=4, early_stop_callback=stop, enable_early_stop=False)
    trainer.fit(model())
    assert trainer.current_epoch == 4


def test_gradient_clipping(model: Any, make_trainer: Any) -> None:
    net = model()
    fitted(make_trainer, net, gradient_clip=1e-3)
    norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_training_hooks(model: Any, make_trainer: Any) -> None:
    class Noting(model):
        def on_epoch_start(self) -> None:
            self.calls.append("epoch")

        def on_batch_start(self, batch: Any) -> None:
            self.calls.append("start")

        def on_batch_end(self) -> None:
            self.calls.append("end")

    net = Noting()
    fitted(make_trainer, net, train_percent_check=0.1)
    assert net.calls == ["epoch", "start", "end", "start", "end"]


def test_learning_rate_scheduling(model: Any, make_trainer: Any) -> None:
    class Scheduled(model):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    trainer = fitted(make_trainer, Scheduled(), max_nb_epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**3


def test_several_optimizers(model: Any, make_trainer: Any) -> None:
    class Several(model):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    torch.manual_seed(0)
    several = Several()
    torch.manual_seed(0)
    one = model()
    assert fitted(make_trainer, several).global_step == 20
    fitted(make_trainer, one)
    assert same(several, one)


def test_how_much_of_the_training_set(model: Any, make_trainer: Any) -> None:
    assert fitted(make_trainer, model(), train_percent_check=0.1).global_step == 2


# --------------------------------------------------------------------------------------------- validation


@pytest.fixture
def checked(model: Any) -> Any:
    """A model that notes when it is validated."""

    class Checked(model):
        def on_pre_performance_check(self) -> None:
            self.calls.append(("before", self.global_step))

        def on_post_performance_check(self) -> None:
            self.calls.append(("after", self.global_step))

    return Checked


def test_every_n_epochs(checked: Any, make_trainer: Any) -> None:
    net = checked()
    fitted(make_trainer, net, check_val_every_n_epoch=2, max_nb_epochs=3, nb_sanity_val_steps=0)
    assert net.calls == [("before", 39), ("after", 39)]


def test_validation_hooks(checked: Any, make_trainer: Any) -> None:
    net = checked()
    fitted(make_trainer, net)
    assert net.calls == [("before", 19), ("after", 19)]  # the sanity check was no performance check


def test_how_much_of_the_validation_and_test_sets(model: Any, make_trainer: Any, make_batches: Any) -> None:
    class Tested(model):
        def test_step(self, data_batch: Any, batch_nb: int) -> Any:
            return {}

        def test_dataloader(self) -> Any:
            return make_batches(8)

    trainer = fitted(make_trainer, Tested(), val_percent_check=0.25, test_percent_check=0.5)
    trainer.test(Tested(), verbose=False)
    assert (trainer.num_val_batches, trainer.num_test_batches) == ([1], [4])


def test_how_often_within_an_epoch(checked: Any, make_trainer: Any) -> None:
    net = checked()
    fitted(make_trainer, net, val_check_interval=0.25, nb_sanity_val_steps=0)
    assert [step for word, step in net.calls if word == "before"] == [5, 10, 15, 20]


def test_sanity_steps(model: Any, make_trainer: Any) -> None:
    class Checked(model):
        def validation_step(self, data_batch: Any, batch_nb: int) -> Any:
            self.calls.append((self.global_step, batch_nb))
            return super().validation_step(data_batch, batch_nb)

    net = Checked()
    trainer = fitted(make_trainer, net, nb_sanity_val_steps=2, val_percent_check=0.5, train_percent_check=0.1)
    assert net.calls[:3] == [(0, 0), (0, 1), (1, 0)]
    assert trainer.num_sanity_val_batches == [2]
