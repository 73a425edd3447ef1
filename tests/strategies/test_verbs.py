# SPDX-License-Identifier: Apache-2.0
"""Strategies that users have written for Lightning: what they override is called where Lightning calls it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.runtime import collective
from leyden.strategies import DDPStrategy, FSDPStrategy, ParallelStrategy, SingleDeviceStrategy, Strategy

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    collective.part()  # as at the end of the process


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> Any:
    return DataLoader(TensorDataset(torch.arange(12.0).reshape(4, 3) / 10), batch_size=2)


class Told:
    """Overrides, as people do, in the signatures of Lightning."""

    said: list[str]

    def setup_environment(self) -> None:
        self.said = ["setup_environment"]
        super().setup_environment()  # type: ignore[misc]

    def setup(self, trainer: Any) -> None:
        assert isinstance(trainer, L.Trainer)
        self.said.append("setup")
        super().setup(trainer)  # type: ignore[misc]

    def model_to_device(self) -> None:
        self.said.append("model_to_device")
        super().model_to_device()  # type: ignore[misc]

    def model_sharded_context(self) -> Any:
        self.said.append("model_sharded_context")
        return nullcontext()

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)  # type: ignore[misc]
        self.optimizers = [torch.optim.SGD(trainer.lightning_module.parameters(), lr=0.05)]

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        self.said.append("optimizer_step")
        assert callable(closure)
        return super().optimizer_step(optimizer, closure, model, **kwargs)  # type: ignore[misc]

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.said.append("backward")
        super().backward(closure_loss, optimizer, *args, **kwargs)  # type: ignore[misc]

    def post_training_step(self) -> None:
        self.said.append("post_training_step")

    def pre_backward(self, closure_loss: Any) -> None:
        self.said.append("pre_backward")

    def post_backward(self, closure_loss: Any) -> None:
        self.said.append(f"post_backward {closure_loss.ndim}")

    def batch_to_device(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        self.said.append("batch_to_device")
        return super().batch_to_device(batch, device, dataloader_idx)  # type: ignore[misc]

    def process_dataloader(self, dataloader: Any) -> Any:
        self.said.append("process_dataloader")
        return dataloader

    def lightning_module_state_dict(self) -> Any:
        return {**super().lightning_module_state_dict(), "more": torch.ones(1)}  # type: ignore[misc]

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        self.said.append("load_model_state_dict")
        del checkpoint["state_dict"]["more"]
        super().load_model_state_dict(checkpoint, strict)  # type: ignore[misc]

    def on_train_start(self) -> None:
        self.said.append("on_train_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.said.append(f"on_train_batch_start {batch_idx}")

    def on_train_end(self) -> None:
        self.said.append("on_train_end")

    def on_validation_end(self) -> None:
        self.said.append("on_validation_end")

    def on_exception(self, exception: BaseException) -> None:
        self.said.append(f"on_exception {exception}")


class Single(Told, SingleDeviceStrategy): ...


class Several(Told, DDPStrategy):
    def setup_distributed(self) -> None:
        self.said.append("setup_distributed")
        super().setup_distributed()

    def configure_ddp(self) -> None:
        self.said.append("configure_ddp")
        super().configure_ddp()
        assert type(self.model).__name__ == "DistributedDataParallel"


@pytest.mark.parametrize("strategy", [Single(), Several()], ids=["single", "ddp"])
def test_what_a_user_overrides_is_called(strategy: Any, tmp_path: Any) -> None:
    class Heavy(Net):
        moved = 0

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def configure_model(self) -> None: ...

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.moved += 1
            return batch

    trainer = L.Trainer(
        strategy=strategy, devices=1, max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path, **QUIET
    )
    module = Heavy()
    trainer.fit(module, loader(), loader())
    ddp = ["setup_distributed"] if isinstance(strategy, Several) else []
    step = ["backward", "post_backward 0", "optimizer_step"]
    batches = [
        ["batch_to_device", f"on_train_batch_start {i}", "post_training_step", "pre_backward", *step] for i in range(2)
    ]
    said = [text for text in strategy.said if text not in ("process_dataloader", "batch_to_device")]
    assert said == [
        "setup_environment", *ddp, "model_sharded_context", "setup", "model_to_device",
        *(["configure_ddp"] if ddp else []), "on_train_start",
        *[text for batch in batches for text in batch if text != "batch_to_device"],
        "on_validation_end", "on_train_end",
    ]  # fmt: skip
    assert strategy.said.count("batch_to_device") == module.moved == 4
    assert strategy.said.count("process_dataloader") == 2
    assert "training_step" not in vars(strategy)  # what has called it is gone
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.05
    path = trainer.checkpoint_callback.best_model_path
    assert "more" in torch.load(path, weights_only=True)["state_dict"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    assert "load_model_state_dict" in strategy.said


def test_the_numbers_are_those_without_overrides(tmp_path: Any) -> None:
    class Same(SingleDeviceStrategy):
        def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().backward(closure_loss, optimizer, *args, **kwargs)

        def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    weights = []
    for strategy in (Same(), "auto"):
        L.seed_everything(0)
        module = Net()
        L.Trainer(strategy=strategy, max_epochs=2, accumulate_grad_batches=2, enable_checkpointing=False, **QUIET).fit(
            module, loader()
        )
        weights.append(module.layer.weight.detach())
    assert torch.equal(*weights)


def test_an_exception_reaches_the_strategy() -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("no")

    strategy = Single()
    with pytest.raises(RuntimeError, match="no"):
        L.Trainer(strategy=strategy, max_epochs=1, enable_checkpointing=False, **QUIET).fit(Fails(), loader())
    assert strategy.said[-1] == "on_exception no"


def test_what_lightnings_strategies_have_is_there() -> None:
    trainer = L.Trainer(devices=1, strategy=DDPStrategy(), **QUIET)
    strategy = trainer.strategy
    assert strategy.precision_plugin is strategy.precision is trainer.precision_plugin
    assert strategy.is_distributed
    assert strategy.accelerator.name() == "cpu"
    strategy.connect(module := Net())
    assert strategy.model is module
    assert set(strategy.lightning_module_state_dict()) == {"layer.weight", "layer.bias"}
    assert strategy.batch_to_device({"x": torch.ones(1)})["x"].device.type == "cpu"
    with strategy.tensor_init_context(empty_init=True):
        assert torch.ones(1).device.type == "cpu"


def test_strategies_are_made_with_lightnings_arguments() -> None:
    precision = L.Trainer(precision="bf16-mixed", **QUIET).precision_plugin
    assert Strategy(accelerator=None, checkpoint_io=None, precision_plugin=precision).precision is precision
    assert SingleDeviceStrategy("cpu", accelerator=None, precision_plugin=precision).precision is precision
    assert ParallelStrategy(accelerator=None, precision_plugin=precision).precision is precision
    given = DDPStrategy(None, None, None, None, precision, None, None, None, None, "gloo", None, "spawn")
    assert (given.process_group_backend, given.start_method, given.model_averaging_period) == ("gloo", "spawn", None)
    assert given.timeout.total_seconds() == 1800
    assert FSDPStrategy(timeout=None).timeout.total_seconds() == 1800
