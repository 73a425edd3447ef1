# SPDX-License-Identifier: Apache-2.0
"""Names that a program adds to Lightning's registries are those that a Trainer takes."""

from __future__ import annotations

from typing import Any

import pytest

import leyden as L
from leyden.compat import pieces
from leyden.compat.registries import AcceleratorRegistry, StrategyRegistry
from leyden.errors import MisconfigurationException
from leyden.runtime.devices import CPUAccelerator
from leyden.strategies import DDPStrategy

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


def test_a_registered_strategy_is_a_name_of_the_trainers() -> None:
    StrategyRegistry.register("mine", DDPStrategy, description="my own", find_unused_parameters=True)
    try:
        assert "mine" in StrategyRegistry.available_strategies()
        assert StrategyRegistry["mine"]["description"] == "my own"
        assert isinstance(StrategyRegistry.get("mine"), DDPStrategy)
        assert L.Trainer(strategy="mine", devices=1, **QUIET).strategy.ddp_kwargs == {"find_unused_parameters": True}
        with pytest.raises(MisconfigurationException, match="override=True"):
            StrategyRegistry.register("mine", DDPStrategy)
    finally:
        StrategyRegistry.remove("mine")
    with pytest.raises(KeyError, match="'mine' is not registered as a strategy"):
        StrategyRegistry.get("mine")
    assert {"ddp", "ddp_spawn", "fsdp", "single_device"} <= set(StrategyRegistry)
    assert isinstance(StrategyRegistry.get("ddp_find_unused_parameters_true"), DDPStrategy)


def test_a_registered_accelerator_is_a_name_of_the_trainers() -> None:
    @AcceleratorRegistry.register("own_cpu")
    class Own(CPUAccelerator): ...

    try:
        assert "own_cpu" in AcceleratorRegistry.available_accelerators()
        trainer = L.Trainer(**{**QUIET, "accelerator": "own_cpu"})
        assert type(trainer.accelerator) is Own
    finally:
        AcceleratorRegistry.remove("own_cpu")


def test_a_free_port_is_one_that_can_be_used() -> None:
    assert 1024 <= pieces.find_free_network_port() < 65536
    assert pieces.is_cuda_available() is (pieces.num_cuda_devices() > 0)
