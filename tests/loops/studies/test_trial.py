# SPDX-License-Identifier: Apache-2.0
"""A timed fit of copies: it takes what it is to take, begins each time the same, and leaves the originals alone."""

from __future__ import annotations

import logging
import random
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import leyden as L
from leyden.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.loggers import CSVLogger
from leyden.loops.studies import trial
from leyden.loops.studies.trial import Change, Originals, Trial, like, run, typical
from leyden.runtime.seed import rng_state


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads of tiny kernels wait for each other where others compute, too."""
    torch.set_num_threads(1)


class Net(L.LightningModule):
    """A line with dropout; the class counts its steps."""

    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        Net.steps += 1
        loss: Tensor = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


def loader(size: int = 64, **more: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(size, 4, generator=generator), torch.randn(size, 1, generator=generator))
    return DataLoader(data, batch_size=4, **more)


def trainer(**settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 50, "accelerator": "cpu", **quiet, **settings})


def timed(folder: Path, module: Any = None, data: Any = None, change: Change | None = None, **settings: Any) -> Trial:
    made = trainer(**settings)
    originals = Originals(module or Net(), None, data or loader(), made.callbacks, rng_state())
    return run(made, originals, change or Change(), 0.01, str(folder))


# ------------------------------------------------------------------ what is measured


def test_a_trial_has_all_that_is_compared(tmp_path: Path) -> None:
    found = timed(tmp_path)
    assert found.step > 0
    assert found.startup > 0
    assert 0 <= found.wait <= 1
    assert found.memory is None
    assert len(found.losses) >= trial.FEWEST
    assert found.workers == 0


def test_the_time_of_an_update_is_that_of_a_block() -> None:
    assert typical([1.0]) == 1.0
    assert typical([0.0, 2.0] * 20) == 1.0, "workers deliver in bursts"
    assert typical([1.0] * 40 + [100.0]) == 1.0, "an epoch begins slowly"


def test_each_trial_begins_in_the_same_state(tmp_path: Path) -> None:
    made, module = trainer(), Net()
    data = loader(shuffle=True, generator=torch.Generator().manual_seed(3))
    originals = Originals(module, None, data, [], rng_state())
    first, second = (run(made, originals, Change(), 0.0, str(tmp_path)) for _ in range(2))
    count = min(len(first.losses), len(second.losses))
    assert count >= trial.FEWEST
    assert first.losses[:count] == second.losses[:count]
    assert len(set(first.losses)) > 1


def test_updates_are_timed_and_not_batches(tmp_path: Path) -> None:
    Net.steps = 0
    found = timed(tmp_path, accumulate_grad_batches=8)
    assert Net.steps >= 8 * (trial.WARM + trial.FEWEST)
    assert len(found.losses) == trial.LOSSES


def test_a_fit_with_near_bounds_is_begun_again(tmp_path: Path) -> None:
    class Planned(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            total = int(self.trainer.estimated_stepping_batches)
            assert total == 6
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total)]

    assert timed(tmp_path, Planned(), max_steps=6).step > 0  # OneCycleLR raises where it is asked for more


def test_a_fit_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="ends after 1 updates, which is too short"):
        timed(tmp_path, max_steps=1)


def test_schedules_do_without_a_validation(tmp_path: Path) -> None:
    class Waiting(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.01)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError("no validation runs")

        def val_dataloader(self) -> Any:
            return loader()

    assert timed(tmp_path, Waiting(), loader(16)).step > 0


@pytest.mark.parametrize("semantics", ["leyden", "lightning"])
def test_a_step_that_is_interrupted_interrupts_the_trial(tmp_path: Path, semantics: str) -> None:
    class Stopping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    with pytest.raises(KeyboardInterrupt):
        timed(tmp_path, Stopping(), semantics=semantics)


def test_an_exit_of_the_users_own_stays_one(tmp_path: Path) -> None:
    class Leaving(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise SystemExit(7)

    with pytest.raises(SystemExit, match="7"):
        timed(tmp_path, Leaving())


def test_what_is_said_is_kept_from_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Talking(Net):
        def on_fit_start(self) -> None:
            warnings.warn("mind the step", UserWarning, stacklevel=1)
            warnings.warn("renamed in the next version", DeprecationWarning, stacklevel=1)
            logging.getLogger("leyden").info("one of ours")

    caplog.set_level(logging.INFO, "leyden")
    found = timed(tmp_path, Talking())
    assert {"mind the step", "one of ours"} <= set(found.said)
    assert not any("renamed" in line for line in found.said)
    assert not caplog.records


def test_channels_last_reaches_weights_and_images(tmp_path: Path) -> None:
    class Images(Net):
        seen: ClassVar[set[tuple[bool, bool]]] = set()

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            last = [x.is_contiguous(memory_format=torch.channels_last) for x in (self.conv.weight, batch[0])]
            self.seen.add((last[0], last[1]))
            assert batch[0].max() == 2, "the hook of the user's own runs too"
            return self.conv(batch[0]).square().mean()

    module, data = Images(), DataLoader(TensorDataset(torch.ones(64, 3, 8, 8)), batch_size=4)
    timed(tmp_path, module, data, Change(channels_last=True))
    assert Images.seen == {(True, True)}
    assert module.conv.weight.is_contiguous()
    assert "on_after_batch_transfer" not in vars(module)


def test_tf32_is_on_in_the_trial_only(tmp_path: Path) -> None:
    class Precise(Net):
        seen: ClassVar[set[str]] = set()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.add(torch.get_float32_matmul_precision())
            return super().training_step(batch, batch_idx)

    before = torch.get_float32_matmul_precision()
    timed(tmp_path, Precise(), change=Change(tf32=True))
    assert Precise.seen == {"high"}
    assert torch.get_float32_matmul_precision() == before


# ------------------------------------------------------------------ copies


class Wandering(Dataset[Any]):
    """Changes as it is read."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.random, self.generator = random.Random(1), torch.Generator().manual_seed(2)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        noise = self.random.random() + torch.rand(4, generator=self.generator)
        return noise, noise[:1]


def test_the_originals_stay_as_they_are(tmp_path: Path) -> None:
    data, order = Wandering(), torch.Generator().manual_seed(3)
    given = DataLoader(data, batch_size=4, shuffle=True, generator=order)
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    states = data.random.getstate(), data.generator.get_state(), order.get_state()
    timed(tmp_path, module, given)
    assert data.read == []
    assert data.random.getstate() == states[0]
    assert torch.equal(data.generator.get_state(), states[1])
    assert torch.equal(order.get_state(), states[2])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.attached
    assert all(parameter.grad is None for parameter in module.parameters())
    assert "configure_callbacks" not in vars(module)


def test_copies_belong_together() -> None:
    module, data = Net(), loader()
    module.data = data.dataset
    copied, _, copied_data, _ = Originals(module, None, data, [], rng_state()).copies()
    assert copied.data is copied_data.dataset is not data.dataset


def test_large_data_sets_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    data = loader()
    data.dataset.paths = [f"a path to some file {number}" for number in range(100)]
    small = Originals(Net(), None, data, [], rng_state()).copies()[2]
    assert small.dataset.tensors[0] is not data.dataset.tensors[0]
    assert small.dataset.paths is not data.dataset.paths
    monkeypatch.setattr(trial, "LARGE", 2000)
    large = Originals(Net(), None, data, [], rng_state()).copies()[2]
    assert large is not data
    assert large.dataset is not data.dataset
    assert large.dataset.tensors[0] is data.dataset.tensors[0]
    assert large.dataset.paths is data.dataset.paths
    batches = [torch.zeros(100, 100)]
    assert Originals(Net(), None, batches, [], rng_state()).copies()[2][0] is batches[0]


def test_workers_that_are_kept_stay_with_their_loader(tmp_path: Path) -> None:
    data = loader(num_workers=1, persistent_workers=True)
    next(iter(data))
    running = data._iterator
    found = timed(tmp_path, Net(), data)
    assert found.workers == 1
    assert data._iterator is running
    assert len(list(data)) == 16
    running._shutdown_workers()


def test_what_cannot_be_copied_is_named() -> None:
    module = Net()
    module.file = open(__file__, encoding="utf-8")  # noqa: SIM115
    with module.file, pytest.raises(MisconfigurationException, match=r"cannot be copied \(copy.deepcopy\): TypeError"):
        Originals(module, None, None, [], rng_state()).copies()


def test_only_callbacks_that_belong_to_the_training_come_along() -> None:
    class Changing(L.Callback):
        pass

    class Configured(Net):
        def configure_callbacks(self) -> Any:
            return [Changing(), GradientAccumulationScheduler({0: 2})]

    made = trainer(callbacks=[Changing(), GradientAccumulationScheduler({0: 3})])
    module, _, _, callbacks = Originals(Configured(), None, None, made.callbacks, rng_state()).copies()
    assert [callback.scheduling for callback in callbacks] == [{0: 3}]
    assert [type(callback).__name__ for callback in module.configure_callbacks()] == ["GradientAccumulationScheduler"]


def test_a_data_module_is_set_up_once(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        calls: ClassVar[list[str]] = []

        def prepare_data(self) -> None:
            self.calls.append("prepare")

        def setup(self, stage: str) -> None:
            self.calls.append(f"setup {stage} {self.trainer.max_epochs}")
            self.data = loader()

        def teardown(self, stage: str) -> None:
            raise AssertionError("it is used again")

        def train_dataloader(self) -> Any:
            assert self.trainer is not None
            return self.data

    made, data = trainer(), Data()
    originals = Originals(Net(), data, None, [], rng_state())
    originals.set_up(made)
    for _ in range(2):
        assert run(made, originals, Change(), 0.0, str(tmp_path)).step > 0
    assert Data.calls == ["prepare", "setup fit 50"]
    assert not hasattr(data, "data")
    assert vars(data).keys() == vars(Data()).keys()


# ------------------------------------------------------------------ the Trainer of a trial


class Special(L.Trainer):
    """Has a constructor and attributes of its own."""

    def __init__(self, project: str) -> None:
        super().__init__(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, precision="64-true")
        self.project = project


def test_a_trainer_like_another(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    first = trainer(
        logger=logger, callbacks=[ModelCheckpoint()], enable_checkpointing=True, gradient_clip_val=0.5, max_time="00:00:01:00",
        min_epochs=2,
    )  # fmt: skip
    second = like(first, Change({"fused_optimizers": True}), str(tmp_path / "root"))
    assert second.config == first.config.replace(
        fused_optimizers=True, limit_val_batches=0, num_sanity_val_steps=0, max_time=None, min_epochs=None
    )
    assert [type(each).__name__ for each in second.loggers] == ["DummyLogger"]
    assert second.callbacks == []
    assert second.strategy is not first.strategy
    assert second.progress is not first.progress
    assert first.loggers == [logger]
    assert not list(tmp_path.iterdir())


def test_a_trainer_like_one_of_a_class_of_the_users(tmp_path: Path) -> None:
    first = Special("moon")
    second = like(first, Change({"precision": "bf16-mixed"}), str(tmp_path))
    assert type(second) is Special
    assert second.project == "moon"
    assert (first.precision, second.precision) == ("64-true", "bf16-mixed")
    assert like(first, Change(), str(tmp_path)).precision == "64-true"


def test_in_a_job_of_a_cluster_nothing_is_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    first = trainer()
    assert first._cluster is not None
    assert like(first, Change(), str(tmp_path))._cluster is None


def test_changes_add_up_and_say_what_to_write() -> None:
    both = Change({"compile": True}) | Change({"precision": "bf16-mixed"}, tf32=True) | Change(channels_last=True)
    assert both.lines()[0] == "Trainer(compile=True, precision='bf16-mixed')"
    assert len(both.lines()) == 3
    assert Change().lines() == []
