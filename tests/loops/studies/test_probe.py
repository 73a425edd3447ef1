# SPDX-License-Identifier: Apache-2.0
"""What verify_resume sees of a batch: all that tells two apart, and nothing that is of the process."""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
import sys
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from leyden.loops.studies.probe import Probe, Task
from leyden.loops.studies.verify import compare


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Any
    y: int = 0


class Node:
    def __init__(self, value: Any) -> None:
        self.value, self.me = value, self


class Colour(Enum):
    RED = 1
    BLUE = 2


def seen(tmp_path: Path, batch: Any) -> dict[str, Any]:
    """What a record holds of ``batch``, after it was written and read back."""
    probe = Probe(Task(str(tmp_path), "a", 1, 2))
    torch.save(probe._flat(batch), tmp_path / "flat.pt")
    found: dict[str, Any] = torch.load(tmp_path / "flat.pt", weights_only=True)
    return found


PAIRS = [
    (Slotted(torch.ones(2)), Slotted(torch.zeros(2))),
    (Node(torch.ones(1)), Node(torch.zeros(1))),
    ({"a", "b"}, {"a", "c"}),
    (datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)),
    (Decimal("1.0"), Decimal("1.1")),
    (Path("a"), Path("b")),
    (Colour.RED, Colour.BLUE),
    (b"a", b"b"),
    (1j, 2j),
    (numpy.datetime64("2020-01-01"), numpy.datetime64("2020-01-02")),
    (numpy.complex128(1j), numpy.complex128(2j)),
    (numpy.longdouble(1), numpy.longdouble(2)),
    (numpy.array(["a", None], dtype=object), numpy.array(["b", None], dtype=object)),
    (numpy.zeros((2, 3)), numpy.zeros((3, 2))),
    (torch.complex(torch.ones(2), torch.ones(2)).conj(), torch.complex(torch.ones(2), torch.zeros(2)).conj()),
    (torch.complex(torch.ones(2), torch.ones(2)).conj().imag, torch.complex(torch.ones(2), torch.zeros(2)).conj().imag),
    (torch.eye(2).to_sparse(), torch.zeros(2, 2).to_sparse()),
    (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2).to(torch.float8_e4m3fn)),
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda value: type(value).__name__)
def test_two_that_differ_are_told_apart_and_two_that_are_equal_are_not(tmp_path: Path, one: Any, other: Any) -> None:
    first, again, second = (seen(tmp_path, [batch]) for batch in (one, one, other))
    assert first

    def record(flat: dict[str, Any]) -> dict[str, Any]:
        part = {"batch": 1, "epoch": 0, "batch_idx": 0, "seen": {"batch": flat}, "aside": {}}
        return {"records": [part], "batches": 1, "stateless": False}

    assert compare(record(first), record(again)).exact
    report = compare(record(first), record(second))
    assert not report.exact
    assert "the batch" in str(report)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(tmp_path: Path) -> None:
    def nested(value: float, layout: Any) -> Any:
        return torch.nested.nested_tensor([torch.ones(2), torch.full((3,), value)], layout=layout)

    for layout in (torch.jagged, torch.strided):
        first, second = (seen(tmp_path, [nested(value, layout)]) for value in (1.0, 2.0))
        assert first["[0]"][1] != second["[0]"][1]


def test_another_process_sees_the_same(tmp_path: Path) -> None:
    """No address and no order of a set: two interpreters agree on what is equal."""
    code = (
        "import numpy, pathlib; from leyden.loops.studies.probe import _leaves\n"
        "class Plain: __slots__ = ()\n"
        "print(list(_leaves([{'a', 'b', 'c', 'd'}, numpy.array(['a', None, 'c'], dtype=object), pathlib.Path('a'), Plain()])))"
    )
    said = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
        for _ in range(2)
    }
    assert len(said) == 1
    assert "Plain" in said.pop()
