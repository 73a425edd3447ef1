# SPDX-License-Identifier: Apache-2.0
"""Each argument that the Trainer took in 2019 does what it did; one test for each, named after it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden as ptl
from leyden.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from leyden.errors import LeydenWarning, MisconfigurationException


def rows(experiment: Any) -> list[dict[str, str]]:
    with open(Path(experiment.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_experiment(model: Any, make_trainer: Any, experiment: Any) -> None:
    trainer = make_trainer(experiment=experiment)
    trainer.fit(model())
    assert trainer.logger is experiment
    assert [row["tng_loss"] != "" for row in rows(experiment)].count(True) == 2
    assert any(row["avg_val_loss"] for row in rows(experiment))


def test_early_stop_callback(model: Any, make_trainer: Any) -> None:
    stop = EarlyStopping(monitor="avg_val_loss", min_delta=10.0, mode="auto")
    trainer = make_trainer(early_stop_callback=stop, max_nb_epochs=5)
    trainer.fit(model())
    assert trainer.early_stopping_callback is stop
    assert trainer.current_epoch == 2  # the second check brings no improvement, and patience is 0


def test_checkpoint_callback(model: Any, make_trainer: Any, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(filepath=tmp_path / "kept")
    make_trainer(checkpoint_callback=checkpoint, max_nb_epochs=2).fit(model())
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 2
    assert make_trainer(checkpoint_callback=False).checkpoint_callback is None
    assert make_trainer(checkpoint_callback=None).checkpoint_callback is not None


@pytest.mark.parametrize(("value", "clipped"), [(0, None), (0.5, 0.5), (-1, None)])
def test_gradient_clip(value: float, clipped: float | None, make_trainer: Any, model: Any) -> None:
    trainer = make_trainer(gradient_clip=value)
    assert trainer.gradient_clip_val == clipped


def test_process_position(make_trainer: Any) -> None:
    bar = make_trainer(process_position=2, progress_bar=True).progress_bar_callback
    assert isinstance(bar, TQDMProgressBar)
    assert bar.process_position == 2
    assert make_trainer(process_position=2).progress_bar_callback is None
    assert not isinstance(make_trainer(process_position=0, progress_bar=True).progress_bar_callback, TQDMProgressBar)


def test_current_gpu_name(make_trainer: Any) -> None:
    assert make_trainer(current_gpu_name=3).strategy.root_device == torch.device("cpu")


def test_nb_gpu_nodes(make_trainer: Any, caplog: Any) -> None:
    assert make_trainer(nb_gpu_nodes=1).num_nodes == 1
    with caplog.at_level(logging.INFO), pytest.raises(MisconfigurationException, match="num_nodes=2"):
        make_trainer(nb_gpu_nodes=2)
    assert "using 'ddp'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO), pytest.raises(MisconfigurationException, match="num_nodes=2"):
        make_trainer(nb_gpu_nodes=2, distributed_backend="ddp")
    assert "using 'ddp'" not in caplog.text


@pytest.mark.parametrize("none", [None, [], "", 0])
def test_gpus(none: Any, make_trainer: Any) -> None:
    assert make_trainer(gpus=none).strategy.root_device == torch.device("cpu")


@pytest.mark.parametrize("given", [[0, 1], "0,1", "0, 1", "-1", -1, 2])
def test_gpus_of_several_reach_the_choice_of_devices(given: Any, make_trainer: Any, monkeypatch: Any) -> None:
    from leyden.vintage import translate

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments: dict[str, Any] = {"accelerator": "auto", "devices": "auto", "strategy": "auto", "num_nodes": 1}
    translate._devices({"gpus": given}, arguments)
    assert arguments == {"accelerator": "gpu", "devices": [0, 1], "strategy": "dp", "num_nodes": 1}
    arguments["strategy"] = "auto"
    translate._devices({"gpus": [1]}, arguments)
    assert (arguments["devices"], arguments["strategy"]) == ([1], "auto")


def test_progress_bar(make_trainer: Any) -> None:
    assert make_trainer(progress_bar=True).progress_bar_callback is not None
    assert make_trainer(progress_bar=False).progress_bar_callback is None


def test_overfit_pct(model: Any, make_trainer: Any) -> None:
    trainer = make_trainer(overfit_pct=0.25)
    trainer.fit(model())
    assert trainer.num_training_batches == 5
    assert trainer.num_val_batches == [1]
    assert trainer.limit_test_batches == 0.25


def test_track_grad_norm(model: Any, make_trainer: Any) -> None:
    net = model()
    trainer = make_trainer(track_grad_norm=2, add_log_row_interval=20)
    trainer.fit(net)
    (row,) = [row for row in trainer.history if "grad_2_norm_total" in row]
    # the gradients of the last batch are still there
    for name in ("layer.weight", "layer.bias"):
        assert row[f"grad_2_norm_{name}"] == pytest.approx(net.get_parameter(name).grad.norm().item())
    every = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert row["grad_2_norm_total"] == pytest.approx(every.norm().item())
    assert "grad_2_norm_total" not in make_and_fit(make_trainer, model()).callback_metrics
    assert "grad_inf_norm_total" in make_and_fit(make_trainer, model(), track_grad_norm="inf").callback_metrics


def test_track_grad_norm_is_of_whole_windows_before_clipping_and_of_all_optimizers(
    model: Any, make_trainer: Any
) -> None:
    class Two(model):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, float] = {}

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=0.1) for p in self.layer.parameters()]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            (parameter,) = optimizer.param_groups[0]["params"]
            name = next(name for name, p in self.named_parameters() if p is parameter)
            self.seen[f"grad_2_norm_{name}"] = parameter.grad.norm().item()

    net = Two()
    trainer = make_and_fit(
        make_trainer, net, track_grad_norm=2, add_log_row_interval=5, accumulate_grad_batches=4, gradient_clip=1e-3
    )
    (row,) = [row for row in trainer.history if "grad_2_norm_total" in row]
    assert set(net.seen) == {"grad_2_norm_layer.weight", "grad_2_norm_layer.bias"}
    assert {name: row[name] for name in net.seen} == pytest.approx(net.seen)
    assert row["grad_2_norm_total"] == pytest.approx(sum(norm**2 for norm in net.seen.values()) ** 0.5)
    assert row["grad_2_norm_total"] > 1e-2, "not clipped yet"


def make_and_fit(make_trainer: Any, net: Any, **arguments: Any) -> ptl.Trainer:
    trainer = make_trainer(**arguments)
    trainer.fit(net)
    return trainer


def test_check_val_every_n_epoch(model: Any, make_trainer: Any) -> None:
    class Counting(model):
        def on_pre_performance_check(self) -> None:
            self.calls.append(self.current_epoch)

    net = Counting()
    make_and_fit(make_trainer, net, check_val_every_n_epoch=2, max_nb_epochs=4, nb_sanity_val_steps=0)
    assert net.calls == [1, 3]


def test_fast_dev_run(model: Any, make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_and_fit(make_trainer, model(), fast_dev_run=True, checkpoint_callback="default")
    assert trainer.global_step == 1
    assert not list(tmp_path.rglob("*.ckpt"))


def test_accumulate_grad_batches(model: Any, make_trainer: Any) -> None:
    assert make_and_fit(make_trainer, model(), accumulate_grad_batches=4).global_step == 5


def test_max_nb_epochs(model: Any, make_trainer: Any) -> None:
    assert make_and_fit(make_trainer, model(), max_nb_epochs=3).current_epoch == 3
    assert ptl.Trainer(gpus=None, logger=False).max_epochs == 1000


def test_min_nb_epochs(model: Any, make_trainer: Any) -> None:
    stop = EarlyStopping(monitor="avg_val_loss", min_delta=10.0, mode="auto")
    trainer = make_and_fit(make_trainer, model(), early_stop_callback=stop, max_nb_epochs=5, min_nb_epochs=4)
    assert trainer.current_epoch == 4
    assert make_trainer().min_epochs == 1


def test_train_percent_check(model: Any, make_trainer: Any) -> None:
    assert make_and_fit(make_trainer, model(), train_percent_check=0.5).global_step == 10
    assert make_trainer(train_percent_check=1).limit_train_batches == 1.0  # all of it, not one batch
    assert isinstance(make_trainer(train_percent_check=1).limit_train_batches, float)


def test_val_percent_check(model: Any, make_trainer: Any) -> None:
    assert make_and_fit(make_trainer, model(), val_percent_check=0.5).num_val_batches == [2]


def test_test_percent_check(model: Any, make_trainer: Any, make_batches: Any) -> None:
    class Tested(model):
        def test_step(self, data_batch: Any, batch_nb: int) -> Any:
            return {"test_loss": self.loss(data_batch)}

        def test_dataloader(self) -> Any:
            return make_batches(10)

    trainer = make_trainer(test_percent_check=0.5)
    trainer.test(Tested())
    assert trainer.num_test_batches == [5]


def test_val_check_interval(model: Any, make_trainer: Any) -> None:
    class Counting(model):
        def on_pre_performance_check(self) -> None:
            self.calls.append(self.global_step)

    net = Counting()
    trainer = make_and_fit(make_trainer, net, nb_sanity_val_steps=0)
    assert trainer.val_check_interval == 0.95  # the default of then
    assert net.calls == [19]
    assert make_trainer(val_check_interval=0.5).val_check_interval == 0.5
    assert ptl.Trainer(logger=False, accelerator="cpu").val_check_interval == 1.0


def test_log_save_interval(model: Any, make_trainer: Any, experiment: Any) -> None:
    seen = []

    class Looking(model):
        def on_batch_end(self) -> None:
            if self.trainer.fit_loop.last:
                seen.extend(rows(experiment))

    make_and_fit(make_trainer, Looking(), experiment=experiment, log_save_interval=15, add_log_row_interval=5)
    assert [row["step"] for row in seen if row["tng_loss"]] == ["4", "9", "14"]


def test_add_log_row_interval(model: Any, make_trainer: Any) -> None:
    trainer = make_and_fit(make_trainer, model(), add_log_row_interval=4)
    assert [step for step, _ in trainer.history.column("tng_loss")] == [3, 7, 11, 15, 19]
    assert make_trainer().log_every_n_steps == 10  # the default of then
    assert ptl.Trainer(logger=False, accelerator="cpu").log_every_n_steps == 50


def test_distributed_backend(make_trainer: Any) -> None:
    for backend in ("dp", "ddp", "ddp2", "ddp_cpu", None):
        assert make_trainer(distributed_backend=backend).strategy.root_device == torch.device("cpu")
    with pytest.raises(
        MisconfigurationException, match="distributed_backend='tpu'.*'dp', 'ddp', 'ddp2', 'ddp_cpu' or None"
    ):
        make_trainer(distributed_backend="tpu")


def test_use_amp(model: Any, make_trainer: Any) -> None:
    with pytest.warns(LeydenWarning, match="using 'bf16-mixed'"):
        trainer = make_trainer(use_amp=True)
    trainer.fit(model())
    assert trainer.precision == "bf16-mixed"
    assert make_trainer(use_amp=False).precision == "32-true"


def test_amp_level(make_trainer: Any) -> None:
    assert make_trainer(amp_level="O2").precision == "32-true"  # says nothing without use_amp
    assert make_trainer(use_amp=True, amp_level="O0").precision == "32-true"
    assert make_trainer(use_amp=True, amp_level="O3").precision == "16-true"
    with pytest.raises(MisconfigurationException, match="amp_level='O4'.*'O0'"):
        make_trainer(amp_level="O4")


def test_print_nan_grads(model: Any, make_trainer: Any, capsys: Any) -> None:
    class Bad(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            factor = float("nan") if batch_nb == 3 else 1.0
            self.layer.bias.register_hook(lambda grad: grad * factor)
            return {"loss": self.loss(data_batch)}

    make_and_fit(make_trainer, Bad(), print_nan_grads=True, train_percent_check=0.2)
    assert capsys.readouterr().out.splitlines() == [
        "NaN gradient in epoch 0, step 3: layer.bias (2 of 2 values)",
    ]


def test_print_weights_summary(model: Any, make_trainer: Any, capsys: Any) -> None:
    make_and_fit(make_trainer, model(), print_weights_summary=True)
    assert "layer" in capsys.readouterr().out
    make_and_fit(make_trainer, model(), print_weights_summary=False)
    assert not capsys.readouterr().out


def test_nb_sanity_val_steps(model: Any, make_trainer: Any) -> None:
    class Counting(model):
        def validation_step(self, data_batch: Any, batch_nb: int) -> Any:
            self.calls.append(self.trainer.sanity_checking)
            return super().validation_step(data_batch, batch_nb)

    for given, expected in (({"nb_sanity_val_steps": 2}, 2), ({"nb_sanity_val_steps": 0}, 0), ({}, 4)):
        net = Counting()
        trainer = make_and_fit(make_trainer, net, **given)
        assert net.calls.count(True) == expected
    assert trainer.num_sanity_val_steps == 5  # the default of then; there are only 4 batches


def test_enable_early_stop(model: Any, make_trainer: Any) -> None:
    stop = EarlyStopping(monitor="avg_val_loss", min_delta=10.0, mode="auto")
    trainer = make_trainer(early_stop_callback=stop, enable_early_stop=False, max_nb_epochs=3)
    trainer.fit(model())
    assert trainer.early_stopping_callback is None
    assert trainer.current_epoch == 3
    assert make_trainer(early_stop_callback=stop, enable_early_stop=True).early_stopping_callback is stop


def test_fit_returns_1_for_a_run_of_2019(model: Any, make_trainer: Any, make_batches: Any, tmp_path: Path) -> None:
    assert make_trainer().fit(model()) == 1
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 1, "default_root_dir": tmp_path,
    }  # fmt: skip
    assert ptl.Trainer(**quiet).fit(model()) == 1  # the module is one of 2019

    class Modern(ptl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch[0]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = ptl.Trainer(**quiet)
    assert trainer.fit(Modern(), make_batches(2)) is None
    assert "tng_loss" not in trainer.callback_metrics


def test_tng_tqdm_dic(model: Any, make_trainer: Any) -> None:
    trainer = make_and_fit(make_trainer, model())
    assert set(trainer.tng_tqdm_dic) == {"tng_loss", "avg_val_loss"}
    assert trainer.tng_tqdm_dic == trainer.progress_bar_metrics


def test_cluster_must_be_one(make_trainer: Any) -> None:
    with pytest.raises(MisconfigurationException, match="cluster=7.*SlurmCluster"):
        make_trainer(cluster=7)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_nb_epoch": 3}, TypeError, "Did you mean 'max_nb_epochs'"),
        ({"max_epoch": 3}, TypeError, "Did you mean 'max_epochs'"),
        ({"max_epochs": 3}, MisconfigurationException, "max_nb_epochs=1, max_epochs=3.*Give max_epochs only"),
        ({"gpus": [7]}, MisconfigurationException, r"gpus=\[7\].*no GPU here"),
        ({"gpus": 2}, MisconfigurationException, "gpus=2.*no GPU here.*'ddp_cpu' with num_processes=2"),
        ({"gpus": 2, "num_processes": 2}, MisconfigurationException, "num_processes=2, gpus=2.*processes on the CPU"),
        ({"num_processes": 0}, MisconfigurationException, "num_processes=0"),
        ({"gpus": "a,b"}, MisconfigurationException, "gpus='a,b'.*list of ids"),
        ({"gpus": "-1"}, MisconfigurationException, "gpus='-1'.*no GPU here"),
        ({"train_percent_check": 10}, MisconfigurationException, "train_percent_check=10.*from 0.0 to 1.0"),
        ({"val_percent_check": "all"}, MisconfigurationException, "val_percent_check='all'"),
        ({"nb_gpu_nodes": 0}, MisconfigurationException, "nb_gpu_nodes=0"),
        ({"track_grad_norm": -2}, MisconfigurationException, "track_grad_norm=-2"),
        ({"track_grad_norm": "two"}, MisconfigurationException, "track_grad_norm='two'"),
        ({"log_save_interval": -1}, MisconfigurationException, "log_save_interval=-1"),
        ({"process_position": "top"}, MisconfigurationException, "process_position='top'"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(
    arguments: dict[str, Any], error: type[Exception], message: str, make_trainer: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(error, match=message):
        make_trainer(**arguments)
