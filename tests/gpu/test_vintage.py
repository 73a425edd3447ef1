# SPDX-License-Identifier: Apache-2.0
"""The arguments of 2019 that are about GPUs, on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import leyden as ptl
from leyden.errors import MisconfigurationException


class Model(ptl.LightningModel):
    """A line; notes where its step ran, and in which type."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)
        self.seen: set[Any] = set()

    def training_step(self, data_batch: Any, batch_nb: int) -> Any:
        out = self.layer(data_batch[0])
        self.seen.add((out.device.type, out.dtype, self.on_gpu))
        return {"loss": out.float().pow(2).mean()}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.01)]

    def tng_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(40, 8)), batch_size=2)


def fit(tmp_path: Path, **arguments: Any) -> tuple[Model, ptl.Trainer]:
    net = Model()
    trainer = ptl.Trainer(
        max_nb_epochs=1, logger=False, checkpoint_callback=False, progress_bar=False, print_weights_summary=False,
        default_root_dir=tmp_path, **arguments,
    )  # fmt: skip
    assert trainer.fit(net) == 1
    return net, trainer


@pytest.mark.parametrize("gpus", [[0], "0", 1])
def test_gpus(gpus: Any, tmp_path: Path) -> None:
    net, trainer = fit(tmp_path, gpus=gpus)
    assert trainer.strategy.root_device == torch.device("cuda", 0)
    assert net.seen == {("cuda", torch.float32, True)}


def test_gpus_none_is_the_cpu(tmp_path: Path) -> None:
    assert fit(tmp_path, gpus=None)[0].seen == {("cpu", torch.float32, False)}


def test_gpus_that_are_not_here() -> None:
    with pytest.raises(MisconfigurationException, match=r"gpus=\[99\]: the GPUs here are \[0"):
        ptl.Trainer(gpus=[99])


def test_use_amp(tmp_path: Path) -> None:
    net, trainer = fit(tmp_path, gpus=[0], use_amp=True)
    assert trainer.precision == "16-mixed"
    assert net.seen == {("cuda", torch.float16, True)}


def test_log_gpu_usage(tmp_path: Path) -> None:
    _, trainer = fit(tmp_path, gpus=[0], add_log_row_interval=10, track_grad_norm=2)
    memory = trainer.history.column("gpu_0")
    assert [step for step, _ in memory] == [9, 19]
    assert all(megabytes > 1 for _, megabytes in memory)
    assert [step for step, _ in trainer.history.column("grad_2_norm_total")] == [9, 19]


def test_track_grad_norm_of_several_optimizers_is_free_of_the_scale_of_mixed_precision(tmp_path: Path) -> None:
    class Two(Model):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=1e-4) for p in self.layer.parameters()]

    def total(**arguments: Any) -> float:
        torch.manual_seed(1)
        net = Two()
        trainer = ptl.Trainer(
            max_nb_epochs=1, logger=False, checkpoint_callback=False, progress_bar=False, print_weights_summary=False,
            default_root_dir=tmp_path, gpus=[0], track_grad_norm=2, **arguments,
        )  # fmt: skip
        trainer.fit(net)
        (_, first), *_ = trainer.history.column("grad_2_norm_total")
        return float(first)

    assert total(use_amp=True) == pytest.approx(total(), rel=0.05)
