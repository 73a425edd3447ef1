# SPDX-License-Identifier: Apache-2.0
"""Data in memory, read as a whole: weights, samples and generators are those of ``fast_data=False`` and of a loop by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import leyden as L

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total:UserWarning"),
]
N, EPOCHS, STEPS = 50, 2, (1, 4, 7, 9)


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(N, 6, generator=generator), torch.randint(3, (N,), generator=generator)


def data() -> TensorDataset:
    return TensorDataset(*tensors())


class Doubled(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return 2 * x, y


class Disagrees(TensorDataset):
    """Its ``__getitems__``, which torch takes, gives other samples than its ``__getitem__``."""

    def __getitems__(self, indices: list[int]) -> Any:
        return [(-self.tensors[0][i], self.tensors[1][i]) for i in indices]


class Drawn:
    """A batch sampler that draws from global generators each time."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(7):
            yield [*torch.randint(N, (3,)).tolist(), random.randrange(N), int(np.random.randint(N))]

    def __len__(self) -> int:
        return 7


def noisy(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return x + torch.randn_like(x), y


class Net(L.LightningModule):
    """Draws random numbers in its step, as dropout does; notes the samples that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3))
        self.seen: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        x, y = batch if isinstance(batch, (list, tuple)) else (batch, batch[:, 0] > 0)
        self.seen.append(x.clone())
        return nn.functional.cross_entropy(self.net(x), y.long())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Evaluated(Net):
    """Notes what it sees elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.validated: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch[0].clone())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0].clone())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[0].clone()


WORKERS: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"}
LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(data(), 8),
    "shuffled": lambda: DataLoader(data(), 8, shuffle=True),
    "drop last": lambda: DataLoader(data(), 8, shuffle=True, drop_last=True),
    "subset": lambda: DataLoader(Subset(data(), list(range(0, N, 2))), 8, shuffle=True),
    "split": lambda: DataLoader(random_split(data(), [30, 20], torch.Generator().manual_seed(2))[0], 8, shuffle=True),
    "subset of a subset": lambda: DataLoader(Subset(Subset(data(), range(40)), range(30, 2, -1)), 8),
    "stacked": lambda: DataLoader(StackDataset(*tensors()), 8, shuffle=True),
    "a tensor": lambda: DataLoader(tensors()[0], 8, shuffle=True),
    "numpy": lambda: DataLoader(tensors()[0].numpy(), 8, shuffle=True),
    "weighted": lambda: DataLoader(data(), 8, sampler=WeightedRandomSampler(range(1, N + 1), 45)),
    "replacement": lambda: DataLoader(data(), 8, sampler=RandomSampler(range(N), True, 70)),
    "some": lambda: DataLoader(data(), 8, sampler=SubsetRandomSampler(range(5, 40))),
    "own batch sampler": lambda: DataLoader(data(), batch_sampler=Drawn()),
    "own generator": lambda: DataLoader(data(), 8, shuffle=True, generator=torch.Generator().manual_seed(9)),
    "own collate": lambda: DataLoader(data(), 8, shuffle=True, collate_fn=noisy),
    "a subclass": lambda: DataLoader(Doubled(*tensors()), 8, shuffle=True),
    "getitems that disagree": lambda: DataLoader(Disagrees(*tensors()), 8, shuffle=True),
    "workers": lambda: DataLoader(data(), 8, shuffle=True, **WORKERS),
    "workers that are kept": lambda: DataLoader(data(), 8, shuffle=True, persistent_workers=True, **WORKERS),
}
WHOLE = [
    kind
    for kind in LOADERS
    if not kind.startswith("workers") and kind not in ("own collate", "a subclass", "getitems that disagree")
]


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def generators() -> Any:
    numpy = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), random.getstate(), numpy["state"]["key"].tolist(), numpy["state"]["pos"]


def trainer(**options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": EPOCHS, "accelerator": "cpu", **quiet, **options})


def fit(make: Callable[[], Any], **options: Any) -> tuple[Net, Any]:
    seed_all()
    model, loader = Net(), make()
    trainer(**options).fit(model, loader)
    return model, generators()


def by_hand(make: Callable[[], Any]) -> tuple[Net, Any]:
    seed_all()
    model, loader = Net(), make()
    optimizer = model.configure_optimizers()
    for _ in range(EPOCHS):
        for batch in loader:
            loss = model.loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, generators()


def assert_equal(one: tuple[Net, Any], other: tuple[Net, Any]) -> None:
    assert len(one[0].seen) == len(other[0].seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(one[0].seen, other[0].seen, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))
    assert one[1] == other[1]


class Saves(L.Callback):
    """Saves after STEPS: the first, one inside each epoch, and the last of the first where it has seven."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in STEPS:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("kind", LOADERS)
def test_final_weights_are_those_of_the_loop_by_hand(kind: str, fetched: list[Any]) -> None:
    wanted = by_hand(LOADERS[kind])
    fetched.clear()
    fast = fit(LOADERS[kind])
    assert len(fetched) == (1 if kind in WHOLE else 0 if kind.startswith("workers") else len(wanted[0].seen))
    fetched.clear()
    standard = fit(LOADERS[kind], fast_data=False)
    assert len(fetched) == (0 if kind.startswith("workers") else len(wanted[0].seen))
    assert_equal(fast, standard)
    assert_equal(fast, wanted)


@pytest.mark.parametrize("workers", [False, True])
def test_a_seed_for_each_sample_changes_nothing(workers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("PL_SEED_WORKERS", str(int(workers)))
    for kind in ("shuffled", "own batch sampler"):
        assert_equal(fit(LOADERS[kind]), fit(LOADERS[kind], fast_data=False))
        assert_equal(fit(LOADERS[kind]), by_hand(LOADERS[kind]))


@pytest.mark.parametrize("kind", ["shuffled", "weighted", "replacement", "own batch sampler", "own generator", "numpy"])
@pytest.mark.parametrize("later", [True, False], ids=["fast", "standard"])
def test_a_run_goes_on_in_the_middle_of_an_epoch(kind: str, later: bool, tmp_path: Path) -> None:
    """Whichever way either run reads."""
    whole = fit(LOADERS[kind])
    fit(LOADERS[kind], callbacks=[Saves(tmp_path)])
    assert len(list(tmp_path.iterdir())) == len(STEPS)
    for step in STEPS:
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        model = Net()
        trainer(fast_data=later).fit(model, LOADERS[kind](), ckpt_path=tmp_path / f"{step}.ckpt")
        model.seen = [*whole[0].seen[:step], *model.seen]
        assert_equal((model, generators()), whole)


@pytest.mark.parametrize("fast", [True, False])
def test_validation_test_and_predict_see_the_same(fast: bool, fetched: list[Any]) -> None:
    seed_all()
    model, run = Evaluated(), trainer(fast_data=fast, num_sanity_val_steps=1)
    run.fit(model, DataLoader(data(), 8, shuffle=True), DataLoader(Subset(data(), range(20)), 6, shuffle=True))
    model.seen.clear()
    run.test(model, DataLoader(data(), 8), verbose=False)
    predicted = run.predict(model, DataLoader(data(), 8))
    assert predicted is not None
    assert torch.equal(torch.cat(model.seen), tensors()[0])
    assert torch.equal(torch.cat(predicted), tensors()[0])
    assert len(fetched) == (4 if fast else 2 * 7 + 1 + 2 * 4 + 7 + 7)
    wanted = {tuple(row) for row in tensors()[0][:20].tolist()}
    assert {tuple(row) for row in torch.cat(model.validated[1:5]).tolist()} == wanted


def test_several_loaders_together() -> None:
    def make() -> Any:
        return {"a": DataLoader(data(), 8, shuffle=True), "b": DataLoader(data(), 5, shuffle=True)}

    class Both(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["a"]) + self.loss(batch["b"])

    def run(fast: bool) -> tuple[Net, Any]:
        seed_all()
        model = Both()
        trainer(fast_data=fast).fit(model, make())
        return model, generators()

    assert_equal(run(True), run(False))


def test_changes_between_epochs_are_seen() -> None:
    class Changing(L.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.train_dataloader.dataset.tensors[0].add_(1)

    runs = [fit(LOADERS["shuffled"], fast_data=fast, callbacks=[Changing()]) for fast in (True, False)]
    assert_equal(runs[0], runs[1])
    assert float(torch.cat(runs[0][0].seen[7:]).mean()) > 1.5
