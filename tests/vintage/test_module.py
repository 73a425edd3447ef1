# SPDX-License-Identifier: Apache-2.0
"""Each member that a module had in 2019 does what it did; one test for each, named after it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import leyden
import leyden as ptl
import leyden.errors
from leyden.errors import CheckpointError, LeydenWarning, MisconfigurationException
from leyden.vintage import LoaderHandle


def test_training_step(model: Any, make_trainer: Any) -> None:
    class Both(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            loss = self.loss(data_batch)
            self.calls.append(loss.item())
            return {"loss": loss, "prog": {"tng_acc": torch.tensor(0.25)}}

    net = Both()
    trainer = make_trainer(add_log_row_interval=1)
    trainer.fit(net)
    assert [value for _, value in trainer.history.column("tng_loss")] == pytest.approx(net.calls)
    assert trainer.progress_bar_metrics["tng_acc"] == 0.25
    assert trainer.history.column("tng_acc")[0] == (0, 0.25)

    class Plain(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            return self.loss(data_batch)

    trainer = make_trainer()
    trainer.fit(Plain())
    assert "tng_loss" in trainer.progress_bar_metrics


def test_training_step_with_a_prog_that_is_no_dict(model: Any, make_trainer: Any) -> None:
    class Wrong(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            return {"loss": self.loss(data_batch), "prog": 3}

    with pytest.raises(MisconfigurationException, match="'prog' as int"):
        make_trainer().fit(Wrong())


def test_training_step_without_a_loss(model: Any, make_trainer: Any) -> None:
    class Wrong(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            return {"prog": {}}

    with pytest.raises(MisconfigurationException, match="'loss'"):
        make_trainer().fit(Wrong())


def test_validation_step(model: Any, make_trainer: Any) -> None:
    class Counting(model):
        def validation_step(self, data_batch: Any, batch_nb: int) -> Any:
            self.calls.append(batch_nb)
            return super().validation_step(data_batch, batch_nb)

    net = Counting()
    make_trainer(nb_sanity_val_steps=0).fit(net)
    assert net.calls == [0, 1, 2, 3]


def test_validation_step_may_be_left_out(make_trainer: Any, make_batches: Any) -> None:
    class Without(ptl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            return {"loss": self.layer(data_batch[0]).sum()}

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.01)]

        def tng_dataloader(self) -> Any:
            return make_batches(3)

    assert make_trainer().fit(Without()) == 1


def test_validation_end(model: Any, make_trainer: Any) -> None:
    class Keeping(model):
        def validation_end(self, outputs: Any) -> Any:
            self.calls.append([output["val_loss"].item() for output in outputs])
            return super().validation_end(outputs)

    net = Keeping()
    trainer = make_trainer(nb_sanity_val_steps=0)
    trainer.fit(net)
    (losses,) = net.calls
    assert len(losses) == 4
    mean = pytest.approx(sum(losses) / 4)
    assert trainer.progress_bar_metrics["avg_val_loss"] == mean  # shown
    assert trainer.history.column("avg_val_loss")[0][1] == mean  # logged
    assert trainer.callback_metrics["avg_val_loss"] == mean  # monitored


def test_validation_end_without_a_validation_step_is_not_called(model: Any, make_trainer: Any) -> None:
    class OnlyEnd(ptl.LightningModule):
        training_step, configure_optimizers = model.training_step, model.configure_optimizers
        loss, forward, tng_dataloader = model.loss, model.forward, model.tng_dataloader

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def validation_end(self, outputs: Any) -> Any:
            raise AssertionError

    assert make_trainer().fit(OnlyEnd()) == 1  # and no warning that there are no data for its validation_step


def test_validation_end_gets_a_list_for_each_of_several_loaders(
    model: Any, make_trainer: Any, make_batches: Any
) -> None:
    class Several(model):
        def val_dataloader(self) -> Any:
            return [make_batches(2), make_batches(3)]

        def validation_step(self, data_batch: Any, batch_nb: int, dataloader_i: int) -> Any:
            return {"val_loss": self.loss(data_batch), "i": dataloader_i}

        def validation_end(self, outputs: Any) -> Any:
            self.calls = [[output["i"] for output in each] for each in outputs]

    net = Several()
    make_trainer().fit(net)
    assert net.calls == [[0, 0], [1, 1, 1]]


def test_validation_end_that_returns_no_dict(model: Any, make_trainer: Any) -> None:
    class Wrong(model):
        def validation_end(self, outputs: Any) -> Any:
            return outputs

    with pytest.raises(MisconfigurationException, match="validation_end.* returned list; it must return a dict"):
        make_trainer().fit(Wrong())


def test_validation_end_is_called_by_validate_too(model: Any, make_trainer: Any) -> None:
    (result,) = make_trainer().validate(model(), verbose=False)
    assert set(result) == {"avg_val_loss"}


@pytest.fixture
def tested(model: Any, make_batches: Any) -> Any:
    class Tested(model):
        def test_step(self, data_batch: Any, batch_nb: int) -> Any:
            self.calls.append(batch_nb)
            return {"test_loss": self.loss(data_batch)}

        def test_end(self, outputs: Any) -> Any:
            return {"avg_test_loss": torch.stack([x["test_loss"] for x in outputs]).mean(), "n": len(outputs)}

        @ptl.data_loader
        def test_dataloader(self) -> Any:
            return make_batches(3)

    return Tested


def test_test_step(tested: Any, make_trainer: Any) -> None:
    net = tested()
    make_trainer().test(net, verbose=False)
    assert net.calls == [0, 1, 2]


def test_test_end(tested: Any, make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.fit(tested())
    (result,) = trainer.test(verbose=False)
    assert result["n"] == 3
    assert trainer.callback_metrics["avg_test_loss"] == pytest.approx(result["avg_test_loss"])


def test_configure_optimizers(model: Any, make_trainer: Any) -> None:
    class Several(model):
        def configure_optimizers(self) -> Any:
            one = torch.optim.SGD([self.layer.weight], lr=0.1)
            two = torch.optim.SGD([self.layer.bias], lr=0.1)
            return [one, two], [torch.optim.lr_scheduler.OneCycleLR(one, max_lr=1.0, total_steps=10)]

    net = Several()
    before = {name: p.clone() for name, p in net.named_parameters()}
    trainer = make_trainer(max_nb_epochs=2)
    with pytest.warns(RuntimeWarning, match="OneCycleLR plans 10 steps but is stepped once per epoch"):
        trainer.fit(net)
    # all optimizers step on the one loss, and a scheduler steps once an epoch, whatever it is
    assert all(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


def test_tng_dataloader(model: Any, make_trainer: Any, make_batches: Any) -> None:
    class Plain(model):
        def tng_dataloader(self) -> Any:
            return make_batches(7)

    for kind, count in ((Plain, 7), (model, 20)):
        trainer = make_trainer()
        trainer.fit(kind())
        assert trainer.num_training_batches == count


def test_val_dataloader(model: Any, make_trainer: Any, make_batches: Any) -> None:
    class Plain(model):
        def val_dataloader(self) -> Any:
            return make_batches(6)

    for kind, count in ((Plain, 6), (model, 4)):
        trainer = make_trainer()
        trainer.fit(kind())
        assert trainer.num_val_batches == [count]


def test_test_dataloader(tested: Any, make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.test(tested(), verbose=False)
    assert trainer.num_test_batches == [3]


def test_data_loader(model: Any, make_trainer: Any, make_batches: Any) -> None:
    made = []

    class Once(model):
        @ptl.data_loader
        def tng_dataloader(self) -> Any:
            """The batches."""
            made.append(1)
            return make_batches(5)

    net = Once()
    assert not made
    trainer = make_trainer(max_nb_epochs=2)
    trainer.fit(net)
    make_trainer().fit(net)
    assert len(made) == 1
    assert len(net.tng_dataloader) == 5
    assert net.tng_dataloader.batch_size == 2
    assert len(list(net.tng_dataloader)) == 5
    assert net.tng_dataloader() is trainer.train_dataloader
    assert Once.tng_dataloader.__doc__ == "The batches."
    assert isinstance(net.tng_dataloader, LoaderHandle)
    assert Once().tng_dataloader() is not net.tng_dataloader()


def test_data_loader_does_not_hide_an_error_in_the_method(model: Any, make_trainer: Any) -> None:
    class Wrong(model):
        @ptl.data_loader
        def tng_dataloader(self) -> Any:
            return self.no_such_thing

    with pytest.raises(AttributeError, match="no_such_thing"):
        make_trainer().fit(Wrong())


def test_update_tng_log_metrics(model: Any, make_trainer: Any) -> None:
    class Amending(model):
        def update_tng_log_metrics(self, logs: Any) -> Any:
            return {**logs, "twice": 2 * logs["tng_loss"]} if "tng_loss" in logs else logs

    trainer = make_trainer()
    trainer.fit(Amending())
    (step, value), *_ = trainer.history.column("twice")
    assert value == pytest.approx(2 * dict(trainer.history.column("tng_loss"))[step])
    assert not any("twice" in row for row in trainer.history if "avg_val_loss" in row)  # no row of training


def test_update_tng_log_metrics_that_returns_nothing(model: Any, make_trainer: Any) -> None:
    class Wrong(model):
        def update_tng_log_metrics(self, logs: Any) -> Any:
            logs["more"] = 1

    with pytest.raises(MisconfigurationException, match="update_tng_log_metrics.* returned NoneType"):
        make_trainer().fit(Wrong())


def test_on_tng_metrics(model: Any, make_trainer: Any) -> None:
    class Amending(model):
        def on_tng_metrics(self, metrics: Any) -> None:
            metrics["lr"] = torch.tensor(0.5)

    trainer = make_trainer()
    trainer.fit(Amending())
    assert [value for _, value in trainer.history.column("lr")] == [0.5, 0.5]


def test_add_model_specific_args(model: Any) -> None:
    class Configured(model):
        @staticmethod
        def add_model_specific_args(parent_parser: Any, root_dir: Any) -> Any:
            parser = ArgumentParser(parents=[parent_parser], add_help=False)
            parser.add_argument("--data", default=f"{root_dir}/mnist")
            return parser

    parser = ArgumentParser(add_help=False)
    assert Configured.add_model_specific_args(parser, "/here").parse_args([]).data == "/here/mnist"
    assert ptl.LightningModule.add_model_specific_args(parser, "/here") is parser


def test_on_save_checkpoint_and_on_load_checkpoint(model: Any, make_trainer: Any, tmp_path: Path) -> None:
    class Keeping(model):
        extra = 0

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["extra"] = 7

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            self.extra = checkpoint["extra"]

    trainer = make_trainer()
    trainer.fit(Keeping())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert Keeping.load_from_checkpoint(tmp_path / "x.ckpt").extra == 7


def test_hooks_run_at_their_places(model: Any, make_trainer: Any) -> None:
    names = (
        "on_epoch_start", "on_epoch_end", "on_batch_end", "on_pre_performance_check", "on_post_performance_check",
        "on_after_backward",
    )  # fmt: skip

    class Noting(model):
        def on_batch_start(self, batch: Any) -> None:
            self.calls.append(("on_batch_start", len(batch)))

        def on_before_zero_grad(self, optimizer: Any) -> None:
            self.calls.append(("on_before_zero_grad", type(optimizer).__name__))

        def validation_end(self, outputs: Any) -> Any:
            self.calls.append("validation_end")

    for name in names:
        setattr(Noting, name, lambda self, name=name: self.calls.append(name))
    net = Noting()
    make_trainer(train_percent_check=0.1, nb_sanity_val_steps=0, val_check_interval=1.0).fit(net)
    batch = [
        ("on_batch_start", 2), ("on_before_zero_grad", "SGD"), "on_after_backward", "on_batch_end",
    ]  # fmt: skip
    check = ["on_pre_performance_check", "validation_end", "on_post_performance_check"]
    assert net.calls == ["on_epoch_start", *batch, *batch, *check, "on_epoch_end"]


def test_on_epoch_start(model: Any, make_trainer: Any) -> None:
    class Both(model):
        def on_epoch_start(self) -> None:
            self.calls.append("then")

        def on_train_epoch_start(self) -> None:
            self.calls.append("today")

    net = Both()
    make_trainer(max_nb_epochs=2).fit(net)
    assert net.calls == ["then", "today"] * 2


def count_calls(model: Any, make_trainer: Any, name: str, **arguments: Any) -> int:
    kind = type("Counting", (model,), {name: lambda self, *args: self.calls.append(args)})
    net = kind()
    make_trainer(nb_sanity_val_steps=0, **arguments).fit(net)
    return len(net.calls)


def test_on_epoch_end(model: Any, make_trainer: Any) -> None:
    assert count_calls(model, make_trainer, "on_epoch_end", max_nb_epochs=3) == 3


def test_on_batch_start(model: Any, make_trainer: Any) -> None:
    class Ending(model):
        def on_batch_start(self, batch: Any) -> Any:
            self.calls.append(self.current_epoch)
            return -1 if len(self.calls) == 3 else None

    net = Ending()
    trainer = make_trainer(max_nb_epochs=2)
    trainer.fit(net)
    assert net.calls == [0] * 3 + [1] * 20  # the first epoch ends before its third batch
    assert trainer.global_step == 22


def test_on_batch_end(model: Any, make_trainer: Any) -> None:
    assert count_calls(model, make_trainer, "on_batch_end") == 20


def test_on_pre_performance_check(model: Any, make_trainer: Any) -> None:
    assert count_calls(model, make_trainer, "on_pre_performance_check", val_check_interval=0.5) == 2


def test_on_pre_performance_check_and_on_post_performance_check_leave_the_sanity_check_out(
    model: Any, make_trainer: Any
) -> None:
    class Noting(model):
        def on_pre_performance_check(self) -> None:
            self.calls.append("pre")

        def on_post_performance_check(self) -> None:
            self.calls.append("post")

        def on_validation_start(self) -> None:
            self.calls.append("today's")

    net = Noting()
    make_trainer(nb_sanity_val_steps=2, val_check_interval=1.0).fit(net)
    assert net.calls == ["today's", "pre", "today's", "post"]


def test_on_post_performance_check(model: Any, make_trainer: Any) -> None:
    assert count_calls(model, make_trainer, "on_post_performance_check", val_check_interval=0.5) == 2


def test_on_before_zero_grad(model: Any, make_trainer: Any) -> None:
    assert count_calls(model, make_trainer, "on_before_zero_grad") == 20


def test_on_after_backward(model: Any, make_trainer: Any) -> None:
    assert count_calls(model, make_trainer, "on_after_backward", accumulate_grad_batches=2) == 20


def test_current_epoch_and_global_step(model: Any, make_trainer: Any) -> None:
    net = model()
    assert (net.current_epoch, net.global_step) == (0, 0)
    trainer = make_trainer(max_nb_epochs=2)
    trainer.fit(net)
    assert (net.current_epoch, net.global_step) == (2, 40)


def test_dtype(model: Any) -> None:
    assert model().dtype is torch.float32
    assert model().double().dtype is torch.float64


def test_experiment_of_a_module(model: Any, make_trainer: Any, experiment: Any) -> None:
    net = model()
    assert net.experiment is None
    trainer = make_trainer(experiment=experiment)
    trainer.fit(net)
    assert net.experiment is experiment


def test_gradient_clip_of_a_module(model: Any, make_trainer: Any) -> None:
    net = model()
    assert net.gradient_clip == 0
    trainer = make_trainer(gradient_clip=0.5)
    trainer.fit(net)
    assert net.gradient_clip == 0.5


def test_on_gpu(model: Any) -> None:
    assert model().on_gpu is False


def test_trainer(model: Any, make_trainer: Any) -> None:
    net = model()
    trainer = make_trainer()
    trainer.fit(net)
    assert net.trainer is trainer


def test_example_input_array(model: Any, make_trainer: Any, capsys: Any) -> None:
    class Shown(model):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.zeros(3, 4)

    make_trainer(print_weights_summary=True).fit(Shown())
    text = capsys.readouterr().out
    assert "[3, 4]" in text
    assert "[3, 2]" in text


def test_hparams(make_trainer: Any, experiment: Any, model: Any) -> None:
    class Wide(model):
        def __init__(self, width: int, net: Any = None, depth: int = 2) -> None:
            super().__init__()

    assert Wide(3, net=torch.nn.Linear(1, 1)).hparams == {"width": 3, "depth": 2}  # a layer is no hyperparameter

    class Bundled(model):
        def __init__(self, hparams: Any) -> None:
            super().__init__()
            self.hparams = hparams

    net = Bundled(Namespace(lr=0.1, layers=[1, 2]))
    assert (net.hparams.lr, net.hparams.layers) == (0.1, [1, 2])
    make_trainer(experiment=experiment).fit(net)
    assert experiment.tags == {"lr": 0.1, "layers": [1, 2]}

    class Modern(ptl.LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()

    assert Modern(3).hparams == {}


def test_freeze_and_unfreeze(model: Any) -> None:
    net = model()
    net.freeze()
    assert not any(p.requires_grad for p in net.parameters())
    net.unfreeze()
    assert all(p.requires_grad for p in net.parameters())


def test_summarize(model: Any, capsys: Any) -> None:
    summary = model().summarize()
    assert summary.total_parameters == 10
    assert "layer" in capsys.readouterr().out


def test_grad_norm(model: Any, make_batches: Any) -> None:
    net = model()
    assert net.grad_norm(2) == {}
    net.loss(next(iter(make_batches(1)))).backward()
    norms = net.grad_norm(1)
    assert norms["grad_1_norm_layer.bias"] == pytest.approx(net.layer.bias.grad.abs().sum().item())
    assert norms["grad_1_norm_total"] == pytest.approx(sum(p.grad.abs().sum().item() for p in net.parameters()))


class Configured(ptl.LightningModule):
    """At the level of the file, since it is built from what a file says."""

    def __init__(self, width: int, name: str = "x") -> None:
        super().__init__()
        self.layer, self.name = torch.nn.Linear(4, width), name


class Bundled(ptl.LightningModule):
    """Takes its hyperparameters as one object."""

    def __init__(self, hparams: Any) -> None:
        super().__init__()
        self.layer, self.on_card = torch.nn.Linear(4, hparams.width), hparams.on_gpu


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and its tags."""
    torch.save({"state_dict": Configured(3).state_dict()}, tmp_path / "weights.ckpt")
    (tmp_path / "meta_tags.csv").write_text("key,value\nwidth,3\nname,deep\nunknown,1\n")
    return tmp_path / "weights.ckpt", tmp_path / "meta_tags.csv"


def test_load_from_metrics(saved: tuple[Path, Path]) -> None:
    weights, tags = saved
    net = Configured.load_from_metrics(weights_path=weights, tags_csv=tags, on_gpu=False)
    assert (net.layer.out_features, net.name) == (3, "deep")
    assert torch.equal(net.layer.weight, torch.load(weights)["state_dict"]["layer.weight"])
    assert Bundled.load_from_metrics(weights, tags, on_gpu=False, map_location="cpu").on_card is False


def test_load_from_metrics_says_what_is_missing(saved: tuple[Path, Path]) -> None:
    weights, tags = saved
    tags.write_text("key,value\nname,deep\n")
    with pytest.raises(MisconfigurationException, match=r"'width'.*meta_tags\.csv"):
        Configured.load_from_metrics(weights, tags, on_gpu=False)
    with pytest.raises(AttributeError, match="'width'.*Add a line 'width,<value>'"):
        Bundled.load_from_metrics(weights, tags, on_gpu=False)
    tags.write_text("key,value\nwidth,5\n")
    with pytest.raises(CheckpointError, match="do not fit Configured"):
        Configured.load_from_metrics(weights, tags, on_gpu=False)


def test_LightningModel_is_an_alias() -> None:
    assert ptl.LightningModel is ptl.LightningModule


# --------------------------------------------------------------------------------------------- how it is done


def test_a_run_leaves_nothing_on_the_module(model: Any, make_trainer: Any) -> None:
    net = model()
    before = set(vars(net))
    trainer = make_trainer()
    trainer.fit(net)
    assert set(vars(net)) - before <= {"_loader_of_tng_dataloader", "_loader_of_val_dataloader", "training"}

    class Failing(model):
        def training_step(self, data_batch: Any, batch_nb: int) -> Any:
            raise ZeroDivisionError

    net = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer.fit(net)
    assert "training_step" not in vars(net)
    assert not net._adapted


def test_what_was_on_the_instance_comes_back(model: Any, make_trainer: Any) -> None:
    net = model()
    own = net.training_step
    net.training_step = own
    make_trainer().fit(net)
    assert net.training_step is own


def test_E1_a_run_of_2019_is_freed_without_the_garbage_collector(model: Any, make_trainer: Any) -> None:
    def run() -> list[Any]:
        net, trainer = model(), make_trainer(track_grad_norm=2, log_save_interval=3, print_nan_grads=True)
        trainer.fit(net)
        return [weakref.ref(net), weakref.ref(trainer)]

    run()  # what torch imports at its first use keeps frames alive
    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in run()] == [None, None]
    finally:
        gc.enable()


def test_a_module_can_be_copied_and_pickled_within_a_run(make_trainer: Any) -> None:
    copies = []

    class Copying(Pickled):
        def on_epoch_end(self) -> None:
            copies.append(copy.deepcopy(self))

    make_trainer().fit(Copying())
    assert "training_step" not in vars(copies[0])
    assert pickle.load(io.BytesIO(pickle.dumps(Pickled()))).layer.out_features == 2


class Pickled(ptl.LightningModule):
    """At the level of the file, so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, data_batch: Any, batch_nb: int) -> Any:
        return {"loss": self.layer(data_batch).sum()}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.01)]

    def tng_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 4), batch_size=2)


def test_names_of_2019_give_way_to_those_of_a_module() -> None:
    class Modern(ptl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gradient_clip = 3.0
            self.summarize = torch.nn.Linear(1, 1)
            self.experiment = "mine"

    net = Modern()
    assert (net.gradient_clip, net.experiment) == (3.0, "mine")
    assert isinstance(net.summarize, torch.nn.Linear)
    assert net.summarize is net.get_submodule("summarize")


def test_hooks_of_2019_are_not_taken_for_misspelt_ones(model: Any, make_trainer: Any) -> None:
    class Writing(model):
        def on_batch_end(self) -> None:
            pass

    with warnings.catch_warnings():
        warnings.simplefilter("error", LeydenWarning)
        make_trainer().fit(Writing())


def test_a_module_of_today_with_a_hook_that_was_dropped_is_warned_and_left_alone() -> None:
    called = []

    class Today(leyden.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_epoch_end(self) -> None:
            called.append(1)

    trainer = leyden.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    with pytest.warns(leyden.errors.LeydenWarning, match=r"on_epoch_end\(\) is no hook any more.*on_train_epoch_end"):
        trainer.fit(Today(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    assert not called
    assert "tng_loss" not in trainer.callback_metrics
