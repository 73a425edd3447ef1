# SPDX-License-Identifier: Apache-2.0
"""Which runs keep small data on their device, and that they let go of it; the host stands in for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

import leyden as L
from leyden.data import resident
from leyden.data.resident import Shelf
from leyden.loops.session import Session
from leyden.precision import DoublePrecision, Precision
from leyden.precision.mixed import MixedPrecision


def shelf(device: str = "cuda", draws: bool = False, precision: Any = None, fast: bool = True, **parts: Any) -> Any:
    strategy = SimpleNamespace(root_device=torch.device(device), precision=precision or Precision())
    parts = {"module": L.LightningModule(), "datamodule": None, **parts}
    session: Any = SimpleNamespace(strategy=strategy, config=SimpleNamespace(fast_data=fast), _shelf=None, **parts)
    found = Session.shelf(session, draws)
    assert Session.shelf(session, draws) is found
    return found


def test_small_data_is_kept_on_a_device() -> None:
    assert shelf().device == torch.device("cuda")
    assert shelf(precision=MixedPrecision("bf16-mixed", "cpu")) is not None
    assert shelf(datamodule=L.LightningDataModule()) is not None
    for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        for part, base in (("module", L.LightningModule), ("datamodule", L.LightningDataModule)):
            written = type("Written", (base,), {hook: lambda self, batch, *args: batch})
            assert shelf(**{part: written()}) is None
    assert shelf("cpu") is None
    assert shelf(draws=True) is None
    assert shelf(precision=DoublePrecision()) is None
    assert shelf(fast=False) is None


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).sub(batch[1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_moves_each_tensor_once_and_gives_all_back(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shelves: list[Shelf] = []
    moved: list[resident.Copy] = []

    class Counted(resident.Copy):
        def __init__(self, source: Tensor, device: torch.device) -> None:
            super().__init__(source, device)
            moved.append(self)

    def of_host(session: Any, draws: bool = False) -> Shelf:
        if session._shelf is None:
            session._shelf = Shelf(torch.device("cpu"), lambda: 10**9)
            shelves.append(session._shelf)
        return session._shelf

    class Fails(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if fails and trainer.current_epoch == 1:
                raise KeyError("mine")

    def fit(**options: Any) -> Net:
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.rand(60, 3, generator=generator), torch.rand(60, 1, generator=generator))
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer, net = L.Trainer(max_epochs=3, accelerator="cpu", **quiet, **options), Net()
        train = DataLoader(Subset(data, range(40)), 8, shuffle=True, generator=generator)
        try:
            trainer.fit(net, train, DataLoader(Subset(data, range(40, 60)), 8))
        except KeyError:
            assert fails
        return net

    wanted = fit(fast_data=False, callbacks=[Fails()])
    monkeypatch.setattr(resident, "Copy", Counted)
    monkeypatch.setattr(Session, "shelf", of_host)
    net = fit(callbacks=[Fails()])
    assert len(shelves) == 1
    assert len(moved) == 2
    assert all(copy.there is None for copy in moved)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), wanted.parameters(), strict=True))
