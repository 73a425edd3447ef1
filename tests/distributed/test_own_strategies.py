# SPDX-License-Identifier: Apache-2.0
"""Strategies that users have written on top of ddp, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as post
from torch.utils.data import DataLoader

from leyden.errors import MisconfigurationException
from leyden.strategies.ddp import DDPStrategy
from ranks import Net, data, make_trainer, on_ranks


class Own(DDPStrategy):
    """As people write it for Lightning."""

    def configure_ddp(self) -> None:
        self.model = self._setup_model(self.model)
        self.wrapped = type(self.model).__name__

    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(closure_loss, optimizer, *args, **kwargs)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        self.reduced = True
        return super().reduce(tensor, group, reduce_op)


def _weights(strategy: Any) -> Any:
    module, trainer = Net(), make_trainer(strategy=strategy, max_epochs=2)
    trainer.fit(module, DataLoader(data(24), 4))
    return strategy, torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()


def _own() -> Any:
    strategy, weights = _weights(Own())
    with strategy.block_backward_sync():
        pass
    return strategy.wrapped, weights, _weights(DDPStrategy())[1]


def test_f1_an_own_strategy_gives_the_numbers_of_ddp() -> None:
    for wrapped, weights, same in on_ranks(2, _own):
        assert wrapped == "DistributedDataParallel"
        assert weights == same


def _local(period: Any) -> Any:
    state = post.PostLocalSGDState(None, None, start_localSGD_iter=0, post_local_gradient_allreduce=False)
    strategy = DDPStrategy(ddp_comm_state=state, ddp_comm_hook=post.post_localSGD_hook, model_averaging_period=period)
    return _weights(strategy)[1]


def _periods() -> Any:
    with pytest.raises(MisconfigurationException, match="model_averaging_period"):
        _local(None)
    return _local(5), _local(4), _weights(DDPStrategy())[1]


def test_weights_are_averaged_after_as_many_updates_as_the_user_says() -> None:
    zero, one = on_ranks(2, _periods)
    assert zero[0] == one[0]  # after updates 1 and 6, the last
    assert zero[1] != one[1]  # after updates 1 and 5
    assert zero[0] != zero[2]  # gradients are not exchanged
