# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of strategies whose parameters are spread: what is refused. What works needs ranks: tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leyden.errors import CheckpointError
from leyden.strategies.spread import ShardedCheckpoints


def strategy() -> ShardedCheckpoints:
    made = ShardedCheckpoints([torch.device("cpu")])
    made.saves_shards = True
    made.assign([torch.device("cpu")], 1)
    return made


def test_a_folder_takes_no_storage_options(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="storage_options="):
        strategy().save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt", {"key": 1})


def test_a_folder_is_on_a_file_system_that_is_shared() -> None:
    with pytest.raises(CheckpointError, match="must be on a local or shared"):
        strategy().save_checkpoint({"global_step": 1}, "memory://a.ckpt")


def test_a_rank_on_its_way_out_does_not_wait_for_the_others(tmp_path: Path) -> None:
    made = strategy()
    made._alone = True
    with pytest.raises(CheckpointError, match="rank 0 is on its way out of the run by itself"):
        made.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")


def test_one_process_writes_and_removes_a_folder(tmp_path: Path) -> None:
    made = strategy()
    made.save_checkpoint({"global_step": 1, "state_dict": {"w": torch.ones(2)}, "leyden": {}}, tmp_path / "a.ckpt")
    content = made.load_checkpoint(tmp_path / "a.ckpt")
    assert content["state_dict"]["w"].is_meta
    assert made.parts(content["state_dict"], {})["w"].tolist() == [1, 1]
    made.remove_checkpoint(tmp_path / "a.ckpt")
    made.remove_checkpoint(tmp_path / "not there.ckpt")
    assert list(tmp_path.iterdir()) == []
