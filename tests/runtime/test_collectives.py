# SPDX-License-Identifier: Apache-2.0
"""Collective operations as objects, of one process and of several real ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from leyden.compat import table
from leyden.runtime.collectives import Collective, SingleDeviceCollective, TorchCollective

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from ranks import on_ranks


def test_one_process_gives_everything_back() -> None:
    single, x = SingleDeviceCollective(), torch.ones(1)
    assert single.setup() is single
    assert (single.rank, single.world_size) == (0, 1)
    for name in ("broadcast", "all_reduce", "reduce", "recv"):
        assert getattr(single, name)(x, 0) is x
    assert single.all_gather([], x) == single.gather(x, []) == [x]
    assert single.scatter(torch.zeros(1), [x]) is single.reduce_scatter(torch.zeros(1), [x], "sum") is x
    assert single.all_to_all([], [x]) == [x]
    single.send(x, 0)
    single.barrier()
    with pytest.raises(RuntimeError, match="owns no group; call create_group"):
        _ = single.group
    assert single.create_group() is single
    with pytest.raises(RuntimeError, match="owns a group already"):
        single.create_group()
    assert single.teardown() is single
    with pytest.raises(RuntimeError, match="no group that could be closed"):
        single.teardown()


def test_the_interface_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Collective()  # type: ignore[abstract]


def test_names_of_reductions() -> None:
    convert = TorchCollective._convert_to_native_op
    assert convert("sum") == convert("SUM") == convert(dist.ReduceOp.SUM) == dist.ReduceOp.SUM
    with pytest.raises(ValueError, match="op='summ' is not a member of ReduceOp.*Did you mean 'sum'"):
        convert("summ")
    with pytest.raises(ValueError, match="op=3 is not valid"):
        convert(3)


def _all() -> Any:
    rank, port = int(os.environ["RANK"]), os.environ.pop("MASTER_PORT")
    os.environ.pop("MASTER_ADDR")
    store = dist.TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
    one = TorchCollective().setup(backend="gloo", store=store, rank=rank, world_size=2)
    assert TorchCollective.manages_default_group
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(os.environ)
    x = torch.tensor([float(rank + 1)])
    found: dict[str, Any] = {"who": (one.rank, one.world_size)}
    found["all_reduce"] = one.all_reduce(x.clone()).item()
    found["max"] = one.all_reduce(x.clone(), op="max").item()
    found["reduce"] = one.reduce(x.clone(), 1).item() if rank == 1 else one.reduce(x.clone(), 1) is None
    found["broadcast"] = one.broadcast(x.clone(), 1).item()
    found["all_gather"] = torch.cat(one.all_gather([torch.zeros(1), torch.zeros(1)], x)).tolist()
    into: Any = [torch.zeros(1), torch.zeros(1)] if rank == 0 else None
    found["gather"] = one.gather(x, into)
    parts: Any = [torch.tensor([5.0]), torch.tensor([6.0])] if rank == 0 else None
    found["scatter"] = one.scatter(torch.zeros(1), parts).item()
    found["recv"] = one.recv(torch.zeros(1), 0).item() if rank else one.send(x, 1)
    found["objects"] = one.all_gather_object([None, None], {"rank": rank})
    found["object"] = one.broadcast_object_list([rank], 1)
    whole: Any = [None, None] if rank == 0 else None
    found["gathered"] = one.gather_object(rank, whole)
    found["scattered"] = one.scatter_object_list([None], ["a", "b"] if rank == 0 else None)
    one.barrier()
    one.monitored_barrier()
    pair = TorchCollective().create_group(ranks=[1])
    found["alone"] = pair.all_reduce(x.clone()).item() if rank == 1 else pair.barrier()
    pair.teardown()
    still = dist.is_initialized()
    one.teardown()
    return found, still, dist.is_initialized(), TorchCollective.manages_default_group


def test_processes_exchange_by_torch() -> None:
    zero, one = on_ranks(2, _all)
    # the group of rank 1 alone was the last but that of all, which is closed with it there
    assert zero[1:] == (True, False, False)
    assert one[1:] == (False, False, False)
    shared = {"all_reduce": 3.0, "max": 2.0, "broadcast": 2.0, "all_gather": [1.0, 2.0], "object": [1]}
    for rank, (found, *_) in enumerate((zero, one)):
        assert found.pop("who") == (rank, 2)
        assert {key: found.pop(key) for key in shared} == shared
        assert found.pop("objects") == [{"rank": 0}, {"rank": 1}]
    (first, *_), (second, *_) = zero, one
    assert torch.cat(first.pop("gather")).tolist() == [1.0, 2.0]
    assert second.pop("gather") is None
    assert first == {
        "reduce": False, "scatter": 5.0, "recv": None, "gathered": [0, 1], "scattered": ["a"], "alone": None,
    }  # fmt: skip
    assert second == {
        "reduce": 3.0, "scatter": 6.0, "recv": 1.0, "gathered": None, "scattered": ["b"], "alone": 2.0,
    }  # fmt: skip


def test_names_of_lightning_are_answered() -> None:
    answered = table.read()["lightning.fabric.plugins.collectives"]
    assert {name: target.module for name, target in answered.items()} == dict.fromkeys(
        ("Collective", "SingleDeviceCollective", "TorchCollective"), "leyden.runtime.collectives"
    )
