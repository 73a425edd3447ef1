# SPDX-License-Identifier: Apache-2.0
"""The parts of a compiled run: what is known of batches beforehand, and what torch says, in a line.

The runs themselves are in ``tests/acceptance/test_compile.py``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

import leyden as L
from leyden.data.combined import CombinedLoader
from leyden.errors import LeydenWarning
from leyden.loops.speed.compiled import _guard, _mark, _ragged, _reads, _reason, _records
from leyden.loops.speed.graphable import obstacle


def loader(samples: int, batch_size: int | None = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(samples, 1)), batch_size=batch_size, **options)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("loaders", "ragged"),
    [
        (loader(8), False),
        (loader(9), True),
        (loader(9, drop_last=True), False),
        (loader(3), False),
        (loader(9, batch_size=None), False),
        (DataLoader(Stream(), batch_size=4), False),
        (DataLoader(TensorDataset(torch.zeros(9, 1)), batch_sampler=BatchSampler(range(9), 4, False)), True),
        ([loader(8), loader(8)], False),
        ([loader(8), loader(8, 2)], True),
        ([loader(8), loader(9)], True),
        ([torch.zeros(4, 1)], False),
    ],
)
def test_batches_that_are_known_to_differ_in_size(loaders: Any, ragged: bool) -> None:
    assert _ragged(CombinedLoader(loaders, "sequential")) is ragged
    # together, batches of several sizes are those of every step
    if isinstance(loaders, list) and len(loaders) > 1 and loaders[1].dataset.tensors[0].shape[0] == 8:
        assert _ragged(CombinedLoader(loaders, "max_size_cycle")) is False


def test_a_batch_of_one_sample_is_left_alone() -> None:
    batch = {"inputs": torch.zeros(1, 3), "weight": torch.tensor(1.0)}
    assert not _mark(batch)
    assert _mark({"inputs": torch.zeros(2, 3), "weight": torch.tensor(1.0)})
    assert _mark("no tensor at all")
    assert not any("dynamic" in name for name in vars(batch["inputs"]))


def test_counters_that_a_class_mentions_are_found() -> None:
    class Base(L.LightningModule):
        @property
        def warmth(self) -> float:
            return min(1.0, self.global_step / 100)

    class Child(Base):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def helper(self) -> int:
            return (lambda: self.trainer.current_epoch)()  # type: ignore[no-any-return]

    assert _reads(L.LightningModule()) == []
    assert _reads(Base()) == ["global_step"]
    assert _reads(Child()) == ["epoch", "global_step"]


@pytest.mark.parametrize(
    ("device", "given", "records"),
    [
        ("cuda", {"mode": "reduce-overhead"}, True),
        ("cuda", {"options": {"triton.cudagraphs": True}}, True),
        ("cuda", {"mode": "default"}, False),
        ("cuda", True, False),
        ("cpu", {"mode": "reduce-overhead"}, False),
    ],
)
def test_where_torch_records_cuda_graphs(device: str, given: Any, records: bool) -> None:
    session: Any = SimpleNamespace(
        config=SimpleNamespace(compile=given), strategy=SimpleNamespace(root_device=torch.device(device))
    )
    assert _records(session) is records


SHAPE = "tensor 'batch[0]' size mismatch at index 1. expected 8, actual 5"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0/1: s == 'a'      # def f(x): return x  # file.py:3\nUser stack trace:", "s == 'a' does not hold any more."),
        (f"0/0: {SHAPE}", SHAPE),
        (
            "0/0: tensor 'batch_idx' size mismatch at index 0. expected 2, actual 9",
            "it computes something else where batch_idx is 7 than where it is 0.",
        ),
        (
            "0/0: tensor 'counters['epoch']' size mismatch at index 0. expected 4, actual 5",
            "it computes something else where epoch is 3 than where it is 2.",
        ),
    ],
)
def test_the_guard_that_failed_in_a_line(text: str, line: str) -> None:
    assert _guard(text) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "backend='x' raised:\nRuntimeError: no compiler\nmore\n\nSet TORCHDYNAMO_VERBOSE=1 ...",
            "RuntimeError: no compiler",
        ),
        (
            "Failed to trace builtin operator\n  Explanation: Cannot trace `print`\n  Hint: do not\n\nfrom user code:\n"
            '   File "a.py", line 1, in f\n    g()\n   File "b.py", line 2, in g\n    print()',
            'Cannot trace `print` (File "b.py", line 2, in g)',
        ),
        ("x" * 300, "x" * 239 + "…"),
        ("", ""),
    ],
)
def test_the_reason_of_a_failure_in_a_line(text: str, line: str) -> None:
    assert _reason(text) == line


def test_a_compiled_run_is_not_captured_as_a_cuda_graph_as_well() -> None:
    class Net(L.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

        def configure_optimizers(self) -> None:
            return None

    class Ask(L.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            found.append(obstacle(trainer._session))

    found: list[str | None] = []
    for compile in ({"backend": "eager"}, False):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, compile=compile, callbacks=[Ask()], enable_model_summary=False, **quiet
        )
        with pytest.warns(LeydenWarning, match="with no optimizer"):
            trainer.fit(Net(), loader(4))
    assert found[0] is not None
    assert "the run is compiled" in found[0]
    assert found[1] is None
