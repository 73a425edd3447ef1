# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in shards: each rank writes and reads its own parts, and others go on with them (F3, R4, C1, C2)."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import leyden as L
from leyden import files, folders
from leyden.callbacks import ModelCheckpoint
from leyden.checkpoint_io import AsyncCheckpointIO
from leyden.cli import ckpt
from leyden.errors import CheckpointError
from leyden.strategies.fsdp import FSDPStrategy
from ranks import data, make_trainer, on_ranks


def strategy(kind: str) -> Any:
    return FSDPStrategy(state_dict_type="sharded") if kind == "sharded" else kind


class Net(L.LightningModule):
    """Two layers, tied weights, a batch norm; what is drawn and dropped differs between ranks."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(4, width), nn.Linear(width, 5), nn.Linear(4, width)])
        self.layers[2].weight = self.layers[0].weight
        self.norm = nn.BatchNorm1d(width)
        self.record: list[Any] = []

    def loss(self, batch: Any) -> Tensor:
        hidden = self.norm(self.layers[0](batch[0])) + self.layers[2](batch[0])
        return (
            (self.layers[1](torch.dropout(hidden.tanh(), 0.1, self.training)).sum(1) - batch[1][:, 0]).square().mean()
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.record.append((self.trainer.global_step, batch[2].tolist(), loss.item(), random.random()))
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]


def state_of(trainer: Any) -> Any:
    """The whole weights and optimizer state, as lists."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(item) for key, item in value.items()}
        if isinstance(value, DTensor):
            value = value.full_tensor()
        return value.tolist() if isinstance(value, Tensor) else value

    state = trainer.strategy.optimizers[0].state_dict()
    return whole(dict(trainer.lightning_module.state_dict())), whole(state["state"]), state["param_groups"]


class _Seen(L.Callback):
    """Notes the state with which a fit begins and ends, while it is spread; saves a checkpoint at the end."""

    def __init__(self, save: Any = None) -> None:
        self.save, self.begin, self.end = save, None, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.begin = state_of(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = state_of(trainer)
        if self.save is not None:
            trainer.save_checkpoint(self.save)


def _fit(folder: Path, size: int, kind: str = "sharded", ckpt_path: Any = None, save: Any = None, **more: Any) -> Any:
    warnings.simplefilter("ignore")  # that another number of processes goes on
    seen = _Seen(save)
    trainer = make_trainer(
        size, strategy=strategy(kind), max_epochs=1 + (ckpt_path is not None), callbacks=[seen], **more
    )
    trainer.fit(Net(), DataLoader(data(32), 32 // size // 2), ckpt_path=ckpt_path)
    return seen.begin, seen.end


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What four ranks have saved, and what they had."""
    path = tmp_path_factory.mktemp("four") / "a.ckpt"
    outcomes = on_ranks(4, _fit, path.parent, 4, "sharded", None, path)
    return path, outcomes[0][1]


@pytest.mark.parametrize(("kind", "size"), [("sharded", 1), ("sharded", 2), ("sharded", 8), ("ddp", 2), ("auto", 1)])
def test_f3_what_four_ranks_saved_is_what_others_go_on_with(saved: Any, kind: str, size: int) -> None:
    path, state = saved
    for begin, _ in on_ranks(size, _fit, path.parent, size, kind, path):
        assert begin == state


def test_f3_the_folder_holds_each_part_once(saved: Any) -> None:
    path, _ = saved
    assert sorted(file.name for file in path.iterdir()) == sorted(
        [".metadata", "meta.pt", folders.MANIFEST, *(f"__{rank}_0.distcp" for rank in range(4))]
    )
    content = files.load(path)
    assert content["state_dict"]["layers.0.weight"] is content["state_dict"]["layers.2.weight"]
    assert content["optimizer_states"][0]["param_groups"][0]["params"] == list(range(7))
    assert files.recorded_step(path) == content["global_step"] == 2


# ---------------------------------------------------------------------------------------------- nobody has the whole


class _Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.is_floating_point() and not made.is_meta:
                part = made.to_local() if isinstance(made, DTensor) else made
                self.elements = max(self.elements, part.numel())
        return result


class _Watched(FSDPStrategy):
    """Looks at all that loading and saving make."""

    def __init__(self) -> None:
        super().__init__(state_dict_type="sharded")
        self.seen = _Largest()

    def save_checkpoint(self, *args: Any) -> None:
        with self.seen:
            super().save_checkpoint(*args)

    def load_checkpoint(self, path: Any, *args: Any) -> Any:
        if not Path(path).is_dir():
            return super().load_checkpoint(path, *args)  # mapped into memory, and read where it is needed
        with self.seen:
            return super().load_checkpoint(path, *args)

    def weights_for(self, *args: Any) -> Any:
        with self.seen:
            return super().weights_for(*args)

    def optimizer_parts(self, *args: Any) -> Any:
        with self.seen:
            return super().optimizer_parts(*args)


class _Saves(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("a whole tensor was asked for")

        whole, DTensor.full_tensor = DTensor.full_tensor, never
        trainer.save_checkpoint(self.path)
        DTensor.full_tensor = whole


def _watched(path: Path, other: Path) -> Any:
    warnings.simplefilter("ignore")  # that another number of processes goes on
    found = []
    for ckpt_path, epochs in ((None, 1), (path, 2), (other, 2)):
        spread = _Watched()
        trainer = make_trainer(2, strategy=spread, max_epochs=epochs, callbacks=[_Saves(path)])
        trainer.fit(Net(width=64), DataLoader(data(16), 4), ckpt_path=ckpt_path)
        found.append(spread.seen.elements)
    return found


def _save_file(path: Path) -> None:
    trainer = make_trainer(1, max_epochs=1)
    trainer.fit(Net(width=64), DataLoader(data(16), 8))
    trainer.save_checkpoint(path)


def test_f3_no_rank_makes_a_whole_tensor_while_it_saves_or_loads(tmp_path: Path) -> None:
    on_ranks(1, _save_file, tmp_path / "file.ckpt")
    for saved_only, folder, file in on_ranks(2, _watched, tmp_path / "a.ckpt", tmp_path / "file.ckpt"):
        assert 0 < saved_only <= 64 * 3  # the largest weight has five rows, of which one rank has three
        assert 64 * 2 <= folder <= 64 * 3
        assert 64 * 2 <= file <= 64 * 3
    assert max(value.numel() for value in files.load(tmp_path / "a.ckpt")["state_dict"].values()) == 64 * 5


# ---------------------------------------------------------------------------------------------- other ways to load


def _from_file(path: Path) -> Any:
    seen = _Seen()
    warnings.simplefilter("ignore")  # that another number of processes goes on
    trainer = make_trainer(2, strategy=strategy("sharded"), max_epochs=2, callbacks=[seen])
    trainer.fit(Net(), DataLoader(data(32), 8), ckpt_path=path)
    return seen.begin


def test_f3_a_file_of_one_process_is_what_ranks_go_on_with(tmp_path: Path) -> None:
    _, state = on_ranks(1, _fit, tmp_path, 1, "auto", None, tmp_path / "a.ckpt")[0]
    assert on_ranks(2, _from_file, tmp_path / "a.ckpt") == [state] * 2


def _from_lightning(path: Path) -> Any:
    warnings.simplefilter("ignore")  # that the folder has no manifest
    seen = _Seen()
    trainer = make_trainer(2, strategy=strategy("sharded"), max_epochs=2, callbacks=[seen])
    trainer.fit(Net(), DataLoader(data(32), 8), ckpt_path=path)
    return seen.begin


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*has no manifest")
def test_f3_a_folder_of_lightning_is_what_ranks_go_on_with(saved: Any, tmp_path: Path) -> None:
    path, state = saved
    content = files.load(path)
    names = [name for name, _ in Net().named_parameters()]
    optimizer = content.pop("optimizer_states")[0]
    optimizer["state"] = {names[number]: each for number, each in optimizer["state"].items()}
    optimizer["param_groups"][0]["params"] = names
    del content["leyden"]
    folder = tmp_path / "theirs.ckpt"
    dcp.save({"model": content.pop("state_dict"), "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True)
    torch.save(content, folder / "meta.pt")
    assert on_ranks(2, _from_lightning, folder) == [state] * 2


class _Renamed(Net):
    """The same, with another name for a layer, and one more."""

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        self.body, self.extra = self.layers, nn.Linear(2, 2)
        del self.layers
        self.strict_loading = strict
        self.shown: dict[str, Any] = {}

    @property
    def layers(self) -> Any:
        return self.body

    @layers.deleter
    def layers(self) -> None:
        del self._modules["layers"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        self.shown = {name: (str(value.device), tuple(value.shape)) for name, value in state.items()}
        checkpoint["state_dict"] = {name.replace("layers.", "body."): value for name, value in state.items()}
        if self.strict_loading:
            checkpoint["state_dict"] |= {"extra.weight": torch.ones(2, 2), "extra.bias": torch.zeros(2)}


def _test_renamed(path: Path, strict: bool) -> Any:
    module = _Renamed(strict)
    trainer = make_trainer(2, strategy=strategy("sharded"))
    trainer.test(module, DataLoader(data(8), 2), ckpt_path=path, verbose=False)
    whole = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in module.state_dict().items()}
    return module.shown, {name: value.tolist() for name, value in whole.items()}


@pytest.mark.parametrize("strict", [True, False])
def test_f3_a_hook_renames_weights_that_are_not_read_yet(saved: Any, strict: bool) -> None:
    path, (weights, *_) = saved
    for shown, loaded in on_ranks(2, _test_renamed, path, strict):
        assert shown["layers.1.weight"] == ("meta", (5, 6))
        assert {name.replace("body.", "layers."): v for name, v in loaded.items() if "extra" not in name} == weights
        assert (loaded["extra.weight"] == [[1.0, 1.0], [1.0, 1.0]]) is strict


class _Computes(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["layers.1.weight"] = checkpoint["state_dict"]["layers.1.weight"] * 2


def _computed(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        make_trainer(2, strategy=strategy("sharded")).test(_Computes(), DataLoader(data(8), 2), ckpt_path=path)
    return str(caught.value)


def test_a_hook_that_computes_with_weights_that_are_not_read_yet_is_told_so(saved: Any) -> None:
    for message in on_ranks(2, _computed, saved[0]):
        assert message.startswith("on_load_checkpoint has computed layers.1.weight of weights that are not read yet")


def _misfit(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        make_trainer(2, strategy=strategy("sharded")).test(Net(width=7), DataLoader(data(8), 2), ckpt_path=path)
    return str(caught.value)


def test_weights_that_do_not_fit_are_named_on_every_rank(saved: Any) -> None:
    for message in on_ranks(2, _misfit, saved[0]):
        assert "layers.1.weight: (5, 6) in the file, (5, 7) in the model" in message


def test_one_process_takes_the_weights_of_a_folder(saved: Any) -> None:
    path, (weights, *_) = saved
    module = Net.load_from_checkpoint(path)
    assert {name: value.tolist() for name, value in module.state_dict().items()} == weights
    assert module.hparams["width"] == 6


def test_consolidated_it_is_the_file_of_one_process(saved: Any, tmp_path: Path, capsys: Any) -> None:
    path, (weights, *_) = saved
    target = tmp_path / "new" / "a.ckpt"
    written = ckpt.consolidate(str(path), str(target))
    assert [entry.name for entry in target.parent.iterdir()] == ["a.ckpt"]
    content = torch.load(target, weights_only=True)
    assert {name: value.tolist() for name, value in content["state_dict"].items()} == weights
    assert written["tensors"] == len({id(v) for v in content["state_dict"].values()}) + 3 * 7
    assert content["state_dict"]["layers.0.weight"].data_ptr() == content["state_dict"]["layers.2.weight"].data_ptr()
    assert ckpt.diff(str(path), str(target)) == []
    assert all(ckpt.verify(str(place))["good"] for place in (path, target))
    shown = [ckpt.describe(str(place)) for place in (path, target)]
    assert [one["weights"] for one in shown][0] == shown[1]["weights"]
    assert [one["kind"] for one in shown] == ["folder", "file"]
    with pytest.raises(CheckpointError, match="is one file already"):
        ckpt.consolidate(str(target), str(tmp_path / "b.ckpt"))


# ---------------------------------------------------------------------------------------------- going on exactly


class _Exact(Net):
    """Saves after every batch; draws more random numbers on one rank than on the other."""

    def __init__(self, folder: Path | None, hand: bool = False) -> None:
        super().__init__()
        self.folder, self.automatic_optimization = folder, not hand

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1:
            torch.rand(2)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.folder is not None:
            self.trainer.save_checkpoint(self.folder / f"{len(self.record)}.ckpt")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch))


def _run(folder: Path | None, ckpt_path: Any = None) -> Any:
    L.seed_everything(4 if folder else 9, verbose=False)
    module, seen = _Exact(folder), _Seen()
    trainer = make_trainer(
        2, strategy=strategy("sharded"), max_epochs=2, log_every_n_steps=1, accumulate_grad_batches=3,
        val_check_interval=2, gradient_clip_val=0.5, callbacks=[seen],
    )  # fmt: skip
    torch.manual_seed(torch.initial_seed() + trainer.global_rank)
    trainer.fit(
        module, DataLoader(data(16), 2, shuffle=True, drop_last=True), DataLoader(data(5), 2), ckpt_path=ckpt_path
    )
    return module.record, [dict(row) for row in trainer.history], seen.end


def _run_and_go_on(folder: Path, steps: list[int]) -> Any:
    return _run(folder), [(at, _run(None, folder / f"{at}.ckpt")) for at in steps]


@pytest.mark.parametrize("steps", [[1, 4, 6], pytest.param(list(range(1, 8)), marks=pytest.mark.slow)])
def test_r4_two_ranks_go_on_exactly_after_any_batch(tmp_path: Path, steps: list[int]) -> None:
    outcomes = on_ranks(2, _run_and_go_on, tmp_path, steps)
    assert outcomes[0][0][0][0][1] != outcomes[1][0][0][0][1]  # each has its own samples
    for (record, rows, end), resumed in outcomes:
        assert len(record) == 8
        for at, (their_record, their_rows, their_end) in resumed:
            assert their_record == record[at:]
            assert their_end == end
            assert their_rows == rows[len(rows) - len(their_rows) :]
            assert their_rows or at == 8


# ---------------------------------------------------------------------------------------------- callbacks that save


class _Judged(Net):
    """A metric that gets better and worse, so that the best are not the newest."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", float([3, 1, 2, 4][self.current_epoch]))


def _with_callback(folder: Path, behind: bool) -> Any:
    saving = ModelCheckpoint(
        folder, "{epoch}", monitor="val", save_top_k=2, save_last=True, async_save=behind, every_n_epochs=1
    )
    given: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [saving]}
    trainer = make_trainer(2, strategy=strategy("sharded"), max_epochs=3, **given)
    loaders = DataLoader(data(16), 4), DataLoader(data(4), 2)
    trainer.fit(_Judged(), *loaders)
    best, kept = saving.best_model_path, sorted(saving.best_k_models)
    trainer.test(None, loaders[1], ckpt_path="best", verbose=False)
    saving = ModelCheckpoint(
        folder, "{epoch}", monitor="val", save_top_k=2, save_last=True, async_save=behind, every_n_epochs=1
    )
    again = make_trainer(2, strategy=strategy("sharded"), max_epochs=4, enable_checkpointing=True, callbacks=[saving])
    again.fit(_Judged(), *loaders, ckpt_path="last")
    return best, kept, again.global_step, sorted(saving.best_k_models), saving.last_model_path


@pytest.mark.parametrize("behind", [False, True])
def test_best_last_and_deletion_work_with_folders(tmp_path: Path, behind: bool) -> None:
    zero, one = on_ranks(2, _with_callback, tmp_path, behind)
    assert zero == one
    best, kept, steps, kept_then, last = zero
    assert Path(best).name == "epoch=1.ckpt"
    assert kept == kept_then == [str(tmp_path / f"epoch={epoch}.ckpt") for epoch in (1, 2)]
    assert steps == 8
    assert last == str(tmp_path / "last.ckpt")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert files.newest(tmp_path) == tmp_path / "last.ckpt"
    assert all(folders.check(entry) for entry in tmp_path.iterdir())


def _in_turn(folder: Path, kind: str, epochs: int) -> Any:
    saving = ModelCheckpoint(folder, save_last=True)
    trainer = make_trainer(2, strategy=strategy(kind), max_epochs=epochs, enable_checkpointing=True, callbacks=[saving])
    trainer.fit(Net(), DataLoader(data(16), 4), ckpt_path="last" if epochs > 1 else None)
    return trainer.global_step


def test_a_run_that_changes_its_strategy_goes_on_in_its_folder(tmp_path: Path) -> None:
    for epochs, kind in enumerate(("ddp", "sharded", "ddp"), 1):
        assert on_ranks(2, _in_turn, tmp_path, kind, epochs) == [2 * epochs] * 2
        entries = list(tmp_path.iterdir())
        assert len(entries) == 2
        assert all(entry.is_dir() is (kind == "sharded") for entry in entries)


# ---------------------------------------------------------------------------------------------- what goes wrong


class _FullDisk(FSDPStrategy):
    """The disk of one rank fails while it writes its shards, or of rank 0 while it writes the rest."""

    fails = ""

    def _write_folder(self, path: Any, plan: Any, record: Any, group: Any, content: Any) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            if self.fails == f"shards of {self.global_rank}":
                patch.setattr("torch.distributed.checkpoint.filesystem._FileSystemWriter.write_data", full)
            elif self.fails == "rest" and self.global_rank == 0:
                patch.setattr(files, "write", full)
            elif self.fails == f"flush of {self.global_rank}":
                patch.setattr("leyden.atomic.sync_file", full)
            super()._write_folder(path, plan, record, group, content)


def _fails(path: Path, behind: bool) -> Any:
    spread = _FullDisk(state_dict_type="sharded", checkpoint_io=AsyncCheckpointIO() if behind else None)
    found: list[Any] = []

    class Saves(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            for fails in ("", "shards of 1", "shards of 0", "rest", "flush of 1", ""):
                spread.fails = fails
                try:
                    trainer.save_checkpoint(path)
                    spread.checkpoint_io.settle()
                except CheckpointError as error:
                    found.append((fails, str(error), folders.manifest(path)["record"]["global_step"]))
                if not fails:
                    trainer.progress.global_step += 1

    trainer = make_trainer(2, strategy=spread, max_epochs=1, callbacks=[Saves()])
    with pytest.raises(CheckpointError, match="No space") if behind else contextlib.nullcontext():
        trainer.fit(Net(), DataLoader(data(16), 4))  # the run ends with what a save behind it has failed with
    return found


@pytest.mark.parametrize("behind", [False, True])
def test_c2_a_write_that_fails_on_one_rank_raises_on_every_rank(tmp_path: Path, behind: bool) -> None:
    for found in on_ranks(2, _fails, tmp_path / "a.ckpt", behind):
        assert [fails for fails, *_ in found] == ["shards of 1", "shards of 0", "rest", "flush of 1"]
        assert all("No space left on device" in message and step == 2 for _, message, step in found)
    assert folders.check(tmp_path / "a.ckpt")["record"]["global_step"] == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


class _SlowDisk(FSDPStrategy):
    """Writes when it is told to."""

    def _write_folder(self, *given: Any) -> None:
        while not self.waits_for.exists():
            time.sleep(0.01)
        super()._write_folder(*given)


def _behind(folder: Path) -> Any:
    spread = _SlowDisk(state_dict_type="sharded", checkpoint_io=AsyncCheckpointIO())
    spread.waits_for = folder / "go"
    found: list[Any] = []

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                found.append(state_of(trainer))
                trainer.save_checkpoint(folder / "a.ckpt")
            found.append((folder / "a.ckpt").exists())
            if trainer.global_step == 4 and trainer.is_global_zero:
                spread.waits_for.touch()

    trainer = make_trainer(2, strategy=spread, max_epochs=1, callbacks=[Saves()])
    trainer.fit(Net(), DataLoader(data(32), 4))
    return found, (folder / "a.ckpt").exists(), trainer.strategy._group


def test_behind_the_training_the_values_are_those_of_the_step_and_the_end_waits(tmp_path: Path) -> None:
    for found, is_there, group in on_ranks(2, _behind, tmp_path):
        (weights, *_), *there = found
        assert there == [False] * 4
        assert is_there
        assert group is None
        content = files.load(tmp_path / "a.ckpt")
        assert content["global_step"] == 1
        assert {name: value.tolist() for name, value in content["state_dict"].items() if "norm.r" not in name} == {
            name: value for name, value in weights.items() if "norm.r" not in name
        }


def _killed(folder: Path, rank: int, moment: str) -> None:
    class Dies(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                if trainer.global_step == 2 and trainer.global_rank == rank:
                    patch.setattr(moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
                trainer.save_checkpoint(folder / "a.ckpt")

    trainer = make_trainer(2, strategy=strategy("sharded"), max_epochs=1, callbacks=[Dies()])
    trainer.fit(Net(), DataLoader(data(32), 4))


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        (1, "torch.distributed.checkpoint.filesystem._FileSystemWriter.write_data"),
        (0, "leyden.folders._put_in_place"),
        pytest.param(1, "leyden.folders.note", marks=pytest.mark.slow),
        pytest.param(0, "leyden.folders.note", marks=pytest.mark.slow),
        pytest.param(0, "leyden.folders._discard", marks=pytest.mark.slow),
        pytest.param(0, "leyden.files.write", marks=pytest.mark.slow),
    ],
)
def test_c1_a_rank_that_is_killed_while_all_write_leaves_the_one_before(tmp_path: Path, rank: int, moment: str) -> None:
    with pytest.raises(AssertionError, match="without a result|by peer"):
        on_ranks(2, _killed, tmp_path, rank, moment)
    newest = files.newest(tmp_path)
    assert newest == tmp_path / "a.ckpt"
    assert files.recorded_step(newest) == (2 if moment.endswith("discard") else 1)
    begin, _ = on_ranks(1, _fit, tmp_path, 1, "auto", newest)[0]
    assert begin is not None
    folders.sweep(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


# ---------------------------------------------------------------------------------------------- signals


class _Signalled(_Exact):
    def __init__(self, rank: int, batch: int) -> None:
        super().__init__(None)
        self.rank, self.batch = rank, batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_rank == self.rank and len(self.record) == self.batch:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.02)


def _preempted(folder: Path, rank: int | None) -> Any:
    L.seed_everything(4, verbose=False)
    module = _Signalled(-1 if rank is None else rank, 3)
    seen = _Seen()
    trainer = make_trainer(
        2, strategy=strategy("sharded"), max_epochs=6, accumulate_grad_batches=3, enable_checkpointing=True,
        callbacks=[ModelCheckpoint(folder, save_last=True), seen], log_every_n_steps=1,
    )  # fmt: skip
    torch.manual_seed(torch.initial_seed() + trainer.global_rank)
    stopped = None
    try:
        trainer.fit(module, DataLoader(data(16), 2, shuffle=True), DataLoader(data(5), 2), ckpt_path="last")
    except BaseException as error:
        stopped = type(error).__name__
    return stopped, module.record, seen.end


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_r4_a_signal_to_one_rank_saves_once_and_the_run_goes_on_exactly(tmp_path: Path, rank: int) -> None:
    warnings.simplefilter("ignore")
    whole = on_ranks(2, _preempted, tmp_path / "whole", None)
    first = on_ranks(2, _preempted, tmp_path / "cut", rank)
    second = on_ranks(2, _preempted, tmp_path / "cut", None)
    for (_, record, end), (stopped, before, _), (_, after, their_end) in zip(whole, first, second, strict=True):
        assert stopped is not None
        assert 3 < len(before) < len(record)
        assert before == record[: len(before)]
        assert after == record[len(record) - len(after) :]
        assert 0 <= len(before) + len(after) - len(record) < 3  # an open window may come once more
        assert their_end == end
