# SPDX-License-Identifier: Apache-2.0
"""A Precision of the user's own that says things by the hooks that Lightning's has."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import pytest
import torch

from leyden import LightningModule, Trainer
from leyden.errors import MisconfigurationException
from leyden.precision import HalfPrecision, MixedPrecision, Precision


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any) -> Any:
        return self.layer(batch).mean()

    def validation_step(self, batch: Any) -> None:
        self.layer(batch)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(2, 2), batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def _told(base: type[Any]) -> type[Any]:
    """A class that notes each hook and does what ``base`` does."""

    class Told(base):  # type: ignore[misc]
        calls: list[str]

        def convert_module(self, module: Any) -> Any:
            self.calls.append("convert_module")
            return super().convert_module(module)

        def connect(self, model: Any, optimizers: Any, lr_schedulers: Any) -> Any:
            self.calls.append("connect")
            return super().connect(model, optimizers, lr_schedulers)

        @contextlib.contextmanager
        def train_step_context(self) -> Any:
            self.calls.append("train_step_context")
            with super().train_step_context():
                yield

        @contextlib.contextmanager
        def val_step_context(self) -> Any:
            self.calls.append("val_step_context")
            with super().val_step_context():
                yield

        @contextlib.contextmanager
        def test_step_context(self) -> Any:
            self.calls.append("test_step_context")
            yield

        @contextlib.contextmanager
        def predict_step_context(self) -> Any:
            self.calls.append("predict_step_context")
            yield

        def pre_backward(self, tensor: Any, module: Any) -> Any:
            assert isinstance(module, Model)
            self.calls.append("pre_backward")
            return super().pre_backward(tensor, module)

        def backward(self, tensor: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            assert isinstance(model, Model)
            assert isinstance(optimizer, torch.optim.SGD)
            self.calls.append("backward")
            super().backward(tensor, model, optimizer, *args, **kwargs)

        def post_backward(self, tensor: Any, module: Any) -> Any:
            self.calls.append("post_backward")
            return super().post_backward(tensor, module)

        def clip_gradients(self, optimizer: Any, clip_val: Any = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
            assert (clip_val, gradient_clip_algorithm) == (1e-3, "norm")
            self.calls.append("clip_gradients")
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

        def clip_grad_by_norm(self, optimizer: Any, clip_val: Any) -> None:
            self.calls.append("clip_grad_by_norm")
            super().clip_grad_by_norm(optimizer, clip_val)

        def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
            assert isinstance(model, Model)
            self.calls.append("optimizer_step")
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)

        def state_dict(self) -> dict[str, Any]:
            self.calls.append("state_dict")
            return super().state_dict()

    return Told


def trainer(precision: Any) -> Trainer:
    return Trainer(
        max_epochs=1, plugins=[precision], gradient_clip_val=1e-3, num_sanity_val_steps=0, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [(Precision,), (MixedPrecision, "bf16-mixed", "cpu")])
def test_each_hook_of_a_subclass_is_called(arguments: tuple[Any, ...], tmp_path: Any) -> None:
    base, *given = arguments
    precision, module = _told(base)(*given), Model()
    precision.calls = []
    before = module.layer.weight.detach().clone()
    run = trainer(precision)
    run.fit(module)
    moved = float((module.layer.weight.detach() - before).norm())
    assert 0 < moved <= 0.1 * 1e-3 * 1.01, "gradients were clipped to 1e-3"
    assert precision.calls == [
        "convert_module", "connect", "train_step_context", "pre_backward", "backward", "post_backward", "clip_gradients",
        "clip_grad_by_norm", "optimizer_step", "val_step_context",
    ]  # fmt: skip
    precision.calls.clear()
    run.save_checkpoint(tmp_path / "a.ckpt")
    run.test(module, verbose=False)
    run.predict(module)
    assert [name for name in precision.calls if name != "convert_module"] == [
        "state_dict", "test_step_context", "predict_step_context",
    ]  # fmt: skip
    assert precision.attached_module is None
    pickle.dumps(Precision())


def test_a_forward_context_is_that_of_all_steps_unless_one_is_written() -> None:
    class Mine(Precision):
        def forward_context(self) -> Any:
            return contextlib.nullcontext("all")

    class Other(Mine):
        def val_step_context(self) -> Any:
            return contextlib.nullcontext("val")

    class Last(Other):
        def forward_context(self) -> Any:
            return contextlib.nullcontext("last")

    entered = [getattr(Last(), f"{name}_step_context")().enter_result for name in ("train", "val", "test")]
    assert entered == ["last", "val", "last"]
    assert Mine().predict_step_context().enter_result == "all"


def test_tensors_and_modules_have_contexts_of_their_own() -> None:
    class Mine(HalfPrecision):
        def module_init_context(self) -> Any:
            return contextlib.nullcontext("module")

    precision = Mine("bf16-true")
    assert precision.init_context().enter_result == "module"
    with precision.tensor_init_context():
        assert torch.ones(1).dtype == torch.bfloat16


def test_connect_may_not_swap_the_module() -> None:
    class Mine(Precision):
        def connect(self, model: Any, optimizers: Any, lr_schedulers: Any) -> Any:
            return Model(), optimizers, lr_schedulers

    with pytest.raises(MisconfigurationException, match=r"Mine\.connect\(\) returned another module"):
        trainer(Mine()).fit(Model())
