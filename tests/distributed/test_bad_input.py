# SPDX-License-Identifier: Apache-2.0
"""Runs that cannot be: an error that says what to do, in time, and no process that is left behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from leyden.errors import MisconfigurationException
from leyden.runtime import collective
from leyden.runtime.world import World
from leyden.strategies import DDPStrategy
from ranks import Net, data, make_trainer, on_ranks

SCRIPT = Path(__file__).with_name("bad_input_script.py")


def _run(case: str, port: int, ranks: tuple[int, ...] = (0, 1), address: str = "127.0.0.1") -> list[str]:
    """Start these ranks of two; return what they printed. All must fail by themselves."""
    path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
    processes = []
    for rank in ranks:
        where = {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank),
            "MASTER_ADDR": address, "MASTER_PORT": str(port), "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(SCRIPT), case], env={**os.environ, **where}, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        outputs = [process.communicate(timeout=80)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode not in (0, -9) for process in processes), outputs
    return outputs


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody else listens, who is no store."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield int(other.getsockname()[1])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_port_in_use_is_an_error_that_names_it(taken: int) -> None:
    (output,) = _run("port", taken, (0,))
    assert (
        f"Rank 0 of 2 could not meet the others at 127.0.0.1:{taken}: port {taken} of this machine is in use" in output
    )
    assert "Set MASTER_PORT to a free port" in output


@pytest.mark.slow
def test_a_port_of_somebody_else_is_an_error_of_those_who_come(taken: int) -> None:
    (output,) = _run("port", taken, (1,))
    assert f"Rank 1 of 2 could not meet the others at 127.0.0.1:{taken} within 3 s" in output


@pytest.mark.slow
def test_an_address_that_cannot_be_reached_is_an_error_in_time() -> None:
    (output,) = _run("address", _free_port(), (1,), "127.0.0.77")
    assert "Rank 1 of 2 could not meet the others at 127.0.0.77:" in output
    assert "within 3 s" in output
    assert "Check that MASTER_ADDR and MASTER_PORT are those of the machine of rank 0" in output


def test_a_rank_that_does_not_come_is_named_on_rank_0(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(collective, "NOTICE", 0.3)

    def meets() -> str:
        with pytest.raises(MisconfigurationException) as caught:
            if os.environ["RANK"] != "0":
                time.sleep(2)
                raise MisconfigurationException("too late")
            world = World(rank=0, size=2, local_size=2, port=int(os.environ["MASTER_PORT"]))
            collective.meet(world, "gloo", torch.distributed.default_pg_timeout / 1800)
        return str(caught.value)

    message, _ = on_ranks(2, meets)
    assert "Rank 0 of 2 could not meet the others at 127.0.0.1:" in message
    assert "these ranks have not come: 1" in message
    assert "leyden: rank 0 of 2 waits for the ranks 1 to start, for 0 s so far." in capfd.readouterr().err


def _differs(what: str) -> str:
    module, loaders = Net(), [DataLoader(data(24), 2)]
    rank = int(os.environ["RANK"])
    arguments: dict[str, Any] = {}
    if rank == 1 and what == "layers":
        module.layer[2] = torch.nn.Linear(5, 2)
    if rank == 1 and what == "settings":
        arguments["accumulate_grad_batches"] = 2
    if rank == 1 and what == "frozen":
        module.layer[0].bias.requires_grad_(False)
    trainer = make_trainer(3, max_epochs=1, **arguments)
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(module, *loaders)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "first"),
    [
        ("layers", "parameter 'layer.2.weight' of Net: (1, 5), torch.float32, trained; rank 1 has parameter 'layer.2.weight'"
            " of Net: (2, 5)"),
        ("settings", "Trainer(accumulate_grad_batches=...): 1; rank 1 has Trainer(accumulate_grad_batches=...): 2"),
        ("frozen", "parameter 'layer.0.bias' of Net: (5,), torch.float32, trained; rank 1 has"),
    ],
)  # fmt: skip
def test_ranks_with_other_code_are_told_what_differs_first(what: str, first: str) -> None:
    for message in on_ranks(3, _differs, what):
        assert message.startswith(
            "The processes of this run do not run the same program. The first difference: ranks 0, 2"
        )
        assert first in message


class _Once:
    """A batch sampler that nobody can count, and that can be gone through only once."""

    def __init__(self) -> None:
        self.batches = iter([[i, i + 1] for i in range(0, 24, 2)])

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def _once(epochs: int) -> Any:
    module = Net()
    trainer = make_trainer(strategy=DDPStrategy(), max_epochs=epochs)
    try:
        trainer.fit(module, DataLoader(data(24), batch_sampler=_Once()))
    except MisconfigurationException as error:
        return str(error)
    return module.samples


def test_a_batch_sampler_without_a_length_is_shared_out_and_one_that_ends_for_good_is_an_error() -> None:
    zero, one = on_ranks(2, _once, 1)
    assert zero == [[i, i + 1] for i in range(0, 24, 4)]
    assert one == [[i, i + 1] for i in range(2, 24, 4)]
    for message in on_ranks(2, _once, 2):
        assert "gave no batch in epoch 1" in message
        assert "begins anew each time" in message
