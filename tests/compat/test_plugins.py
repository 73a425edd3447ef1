# SPDX-License-Identifier: Apache-2.0
"""Plug-ins, loggers and TPUs under Lightning's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leyden import Trainer
from leyden.checkpoint_io import TorchCheckpointIO
from leyden.checkpoint_io.wrapping import WrappingCheckpointIO
from leyden.compat import fabric_loggers, tpu
from leyden.config import set_default_semantics
from leyden.errors import MisconfigurationException
from leyden.loggers import CSVLogger
from leyden.strategies.layer_sync import LayerSync, TorchSyncBatchNorm

_TPUS = [tpu.XLAAccelerator, tpu.XLAStrategy, tpu.SingleDeviceXLAStrategy, tpu.XLAEnvironment, tpu.XLACheckpointIO]


@pytest.mark.parametrize("kind", _TPUS)
def test_tpus_say_that_they_are_not_built(kind: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"{kind.__name__} is not there: TPUs are out of scope"):
        kind()


def test_tpus_can_be_asked_for() -> None:
    assert not tpu.XLAAccelerator.is_available()
    assert not tpu.XLAEnvironment.detect()
    for name in ("xla", "xla_debug", "single_xla", "single_tpu"):
        with pytest.raises(MisconfigurationException, match="TPUs are out of scope"):
            Trainer(strategy=name)


@pytest.mark.parametrize("kind", [fabric_loggers.CSVLogger, fabric_loggers.TensorBoardLogger])
def test_fabrics_loggers_have_its_arguments(kind: Any, tmp_path: Path) -> None:
    logger = kind(root_dir=str(tmp_path), prefix="p", version=3)
    assert logger.log_dir == str(tmp_path / "leyden_logs" / "version_3")


def test_the_default_name_is_lightnings_where_its_names_are_imported(tmp_path: Path) -> None:
    before = set_default_semantics("lightning")
    try:
        assert CSVLogger(tmp_path).name == "lightning_logs"
        assert CSVLogger(tmp_path, name="leyden_logs").name == "leyden_logs"
        assert CSVLogger(tmp_path, name=None).name == ""
    finally:
        set_default_semantics(before)
    assert CSVLogger(tmp_path).name == "leyden_logs"


def test_a_wrapping_io_hands_on_and_takes_one_base(tmp_path: Path) -> None:
    class Mine(WrappingCheckpointIO):
        saved = 0

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.saved += 1
            super().save_checkpoint(*args, **kwargs)

    base = TorchCheckpointIO()
    outer = Mine(inner := Mine())
    outer.checkpoint_io = base
    assert inner.checkpoint_io is base
    outer.checkpoint_io = TorchCheckpointIO()
    assert inner.checkpoint_io is base
    path = tmp_path / "a.ckpt"
    outer.save_checkpoint({"a": 1}, path)
    assert (outer.saved, inner.saved) == (1, 1)
    assert outer.load_checkpoint(path)["a"] == 1
    outer.remove_checkpoint(path)
    assert not path.exists()
    assert isinstance(Mine().checkpoint_io, TorchCheckpointIO)


def test_batch_norms_come_back() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
    module[1][0].running_mean.fill_(3.0)
    sync = TorchSyncBatchNorm()
    shared = sync.apply(module)
    assert isinstance(shared[1][0], torch.nn.SyncBatchNorm)
    alone = sync.revert(shared)
    assert not isinstance(alone[1][0], torch.nn.SyncBatchNorm)
    assert alone[1][0].running_mean.tolist() == [3.0, 3.0]
    assert alone.eval()(torch.ones(4, 2)).shape == (4, 2)


class OtherSync(LayerSync):
    def apply(self, model: Any) -> Any:
        return model

    def revert(self, model: Any) -> Any:
        return model


def test_layer_sync_is_a_plugin() -> None:
    strategy: Any = Trainer(plugins=[TorchSyncBatchNorm()], accelerator="cpu", devices=2, strategy="ddp_spawn").strategy
    assert (strategy.sync_batchnorm, strategy.layer_sync) == (True, None)
    strategy = Trainer(plugins=OtherSync(), accelerator="cpu", devices=2, strategy="ddp_spawn").strategy
    assert strategy.sync_batchnorm is False
    assert isinstance(strategy.layer_sync, OtherSync)
    with pytest.raises(MisconfigurationException, match="give one LayerSync"):
        Trainer(plugins=[OtherSync(), OtherSync()])
    with pytest.raises(MisconfigurationException, match="both say how layers are shared"):
        Trainer(plugins=[OtherSync()], sync_batchnorm=True)
    with pytest.raises(ValueError, match="both say how numbers are stored"):
        from leyden.precision import DoublePrecision

        Trainer(plugins=[DoublePrecision()], precision="64-true")
