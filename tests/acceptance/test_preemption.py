# SPDX-License-Identifier: Apache-2.0
"""Signals that end a run: the batch ends, one complete checkpoint is written, the process ends by 143, nothing is lost."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden import files
from leyden.errors import CheckpointError, LeydenWarning, SIGTERMException
from leyden.signals import STOPS

TERMINATING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
SOAK = Path(__file__).with_name("preemption_script.py")


def send(number: int) -> None:
    os.kill(os.getpid(), number)


class Net(L.LightningModule):
    """Dropout, a validation that draws random numbers, a metric of the epoch; records all that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) ** 2).mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", (self.net(batch[0] + torch.rand(1)) ** 2).mean(), on_step=True, on_epoch=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class At(L.Callback):
    """Sends a signal in a hook, the ``nth`` time that it is called."""

    def __init__(self, hook: str, nth: int, action: Callable[[], None], sanity: bool = False) -> None:
        self.left = nth

        def act(trainer: Any, *args: Any) -> None:
            if trainer.sanity_checking != sanity:
                return
            self.left -= 1
            if self.left == 0:
                action()

        setattr(self, hook, act)


def loader(workers: int = 0) -> Any:
    return DataLoader(
        TensorDataset(torch.arange(48.0).view(16, 3) / 48), batch_size=2, shuffle=True, num_workers=workers
    )


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> L.Trainer:
    given: dict[str, Any] = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "default_root_dir": folder, "val_check_interval": 0.5, **options,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **given)


def fit(folder: Path, *callbacks: Any, ckpt_path: Any = None, model: Any = None, **options: Any) -> Any:
    L.seed_everything(3, verbose=False)
    model = model or Net()
    trainer = trainer_of(folder, *callbacks, **options)
    trainer.fit(model, loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def rows(trainer: Any) -> list[tuple[int, dict[str, float]]]:
    return [(row.step, dict(row.metrics)) for row in trainer.history.rows] if hasattr(trainer.history, "rows") else []


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def assert_same_weights(one: Any, other: Any) -> None:
    first, second = one.lightning_module.state_dict(), other.lightning_module.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------------------------------------- P1


@pytest.mark.parametrize("number", TERMINATING, ids=lambda number: number.name)
def test_P1_the_handler_only_notes_and_the_run_is_saved_after_the_batch(number: int, tmp_path: Path) -> None:
    events: list[str] = []

    class Told(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            events.append(f"end of step {trainer.global_step}")

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            assert type(exception) is SIGTERMException
            assert trainer.received_sigterm
            events.append("told")

    class Asked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 2:
                send(number)
                assert not list(tmp_path.rglob("*.ckpt"))
                events.append("the step goes on")
            return super().training_step(batch, batch_idx)

    with pytest.raises(SIGTERMException) as caught:
        fit(tmp_path, Told(), model=Asked())
    assert caught.value.code == 143
    assert events == ["end of step 1", "end of step 2", "the step goes on", "end of step 3", "told"]
    assert checkpoints(tmp_path) == ["interrupted.ckpt"]
    assert files.recorded_step(tmp_path / "checkpoints" / "interrupted.ckpt") == 3
    files.load(tmp_path / "checkpoints" / "interrupted.ckpt", verify=True)


def test_P1_ctrl_c_saves_too_and_returns(tmp_path: Path) -> None:
    trainer = fit(tmp_path, At("on_train_batch_start", 3, lambda: send(signal.SIGINT)))
    assert trainer.interrupted
    assert not trainer.received_sigterm
    assert checkpoints(tmp_path) == ["interrupted.ckpt"]
    assert files.recorded_step(tmp_path / "checkpoints" / "interrupted.ckpt") == 3


MOMENTS: list[tuple[str, int, bool]] = [
    ("setup", 1, False), ("on_fit_start", 1, False), ("on_sanity_check_start", 1, True),
    ("on_validation_batch_end", 1, True), ("on_train_start", 1, False), ("on_train_epoch_start", 2, False),
    ("on_train_batch_start", 1, False), ("on_train_batch_end", 4, False), ("on_train_batch_end", 8, False),
    ("on_validation_batch_start", 3, False), ("on_validation_batch_end", 8, False), ("on_validation_end", 1, False),
    ("on_validation_batch_end", 11, False), ("on_train_epoch_end", 1, False), ("on_train_epoch_end", 2, False),
    ("on_save_checkpoint", 1, False), ("on_train_end", 1, False), ("on_fit_end", 1, False), ("teardown", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "nth", "sanity"), MOMENTS, ids=lambda value: str(value))
def test_P1_whenever_it_comes_the_resumed_run_is_the_unbroken_one(
    hook: str, nth: int, sanity: bool, tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole")
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "cut", At(hook, nth, lambda: send(signal.SIGTERM), sanity))
    found = [path for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.suffix == ".ckpt"]
    steps = [files.recorded_step(path) for path in found]
    assert steps.count(max(steps)) == 1
    assert len(found) <= 2
    resumed = fit(tmp_path / "cut", ckpt_path="last")
    assert resumed.global_step == whole.global_step
    assert resumed.progress == whole.progress
    assert_same_weights(resumed, whole)
    assert resumed.callback_metrics.keys() == whole.callback_metrics.keys()
    for name, value in whole.callback_metrics.items():
        assert torch.equal(resumed.callback_metrics[name], value), name


def test_P1_a_validation_that_a_signal_cuts_is_run_again_as_a_whole(tmp_path: Path) -> None:
    seen: list[int] = []

    class Counts(L.Callback):
        def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
            if not trainer.sanity_checking:
                seen.append(trainer.global_step)

    with pytest.raises(SIGTERMException):
        fit(tmp_path, Counts(), At("on_validation_batch_start", 3, lambda: send(signal.SIGTERM)))
    assert seen == [4] * 3
    seen.clear()
    fit(tmp_path, Counts(), ckpt_path="last", max_epochs=1)
    assert seen == [4] * 8 + [8] * 8


def test_P1_weights_that_are_exchanged_for_a_validation_are_not_saved(tmp_path: Path) -> None:
    class Exchanges(L.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            self.kept = {name: value.clone() for name, value in module.state_dict().items()}
            for parameter in module.parameters():
                parameter.data.zero_()

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            module.load_state_dict(self.kept)

    whole = fit(tmp_path / "whole", Exchanges())
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "cut", Exchanges(), At("on_validation_batch_start", 3, lambda: send(signal.SIGTERM)))
    assert_same_weights(fit(tmp_path / "cut", Exchanges(), ckpt_path="last"), whole)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_P1_outside_of_fit_the_batch_ends_and_nothing_is_saved(entry: str, tmp_path: Path) -> None:
    told: list[BaseException] = []
    callback = L.Callback()
    callback.on_exception = lambda trainer, module, error: told.append(error)  # type: ignore[method-assign]
    hook = {"validate": "validation"}.get(entry, entry)
    trainer = trainer_of(tmp_path, callback, At(f"on_{hook}_batch_start", 2, lambda: send(signal.SIGTERM)))
    with pytest.raises(SIGTERMException):
        getattr(trainer, entry)(Net(), loader())
    assert [type(error) for error in told] == [SIGTERMException]
    assert not list(tmp_path.rglob("*.ckpt"))


def test_P1_what_the_user_switched_off_stays_off(tmp_path: Path) -> None:
    for options in ({"enable_checkpointing": False}, {"fast_dev_run": 3}):
        with pytest.raises(SIGTERMException):
            fit(tmp_path, At("on_train_batch_start", 1, lambda: send(signal.SIGTERM)), **options)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_P1_one_file_whatever_else_saves_at_the_end(tmp_path: Path) -> None:
    for index, options in enumerate(({"save_last": True}, {"save_on_exception": True}, {"every_n_train_steps": 3})):
        folder = tmp_path / str(index)
        saver = L.callbacks.ModelCheckpoint(folder, **options)
        with pytest.raises(SIGTERMException):
            fit(folder, saver, At("on_train_batch_start", 3, lambda: send(signal.SIGTERM)))
        (found,) = folder.glob("*.ckpt")
        assert files.recorded_step(found) == 3
        assert found.name != "interrupted.ckpt"


def test_P1_weights_only_are_not_enough_to_go_on(tmp_path: Path) -> None:
    saver = L.callbacks.ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(SIGTERMException):
        fit(tmp_path, saver, At("on_train_batch_start", 3, lambda: send(signal.SIGTERM)))
    assert "optimizer_states" in files.load(tmp_path / "interrupted.ckpt")


def test_P1_the_file_goes_when_a_newer_one_is_written_and_a_strangers_stays(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    stranger = folder / "interrupted.ckpt"
    files.save({"of": "somebody else"}, stranger)
    trainer = trainer_of(tmp_path, At("on_train_batch_start", 3, lambda: send(signal.SIGINT)))
    model = Net()
    for left in (["interrupted-v1.ckpt", "interrupted.ckpt"], ["epoch=1-step=19.ckpt", "interrupted.ckpt"]):
        with pytest.warns(LeydenWarning, match="holds 1 checkpoint"):
            trainer.fit(model, loader(), loader())
        assert checkpoints(tmp_path) == left
    assert files.load(stranger) == {"of": "somebody else"}


def test_P1_a_run_that_is_interrupted_again_and_again_leaves_one_file(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", limit_val_batches=0)
    for stop, start in ((2, None), (2, "last"), (1, "last")):
        with pytest.raises(SIGTERMException):
            fit(
                tmp_path,
                At("on_train_batch_end", stop, lambda: send(signal.SIGTERM)),
                ckpt_path=start,
                limit_val_batches=0,
            )
        assert checkpoints(tmp_path) == ["interrupted.ckpt"]
    assert files.recorded_step(tmp_path / "checkpoints" / "interrupted.ckpt") == 5
    assert_same_weights(fit(tmp_path, ckpt_path="last", limit_val_batches=0), whole)


def test_P1_a_checkpoint_that_cannot_be_written_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(files, "save", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        fit(tmp_path, At("on_train_batch_start", 3, lambda: send(signal.SIGTERM)))
    assert not list(tmp_path.rglob("*.ckpt"))


# ---------------------------------------------------------------------------------------------- P2


def soak(folder: Path, trials: int, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, SOAK, folder, str(trials), str(seed)], capture_output=True, text=True, timeout=900, check=False
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == trials, done.stderr[-3000:]
    for outcome in outcomes:
        wanted = {"code": 143, "gone": True, "newest": 1, "others": [], "resumed": 0, "exact": True}
        assert {name: outcome[name] for name in wanted} == wanted, (outcome, done.stderr[-3000:])
        assert outcome["step"] == outcome["stopped"], outcome


def test_P2_a_signal_at_any_moment_leaves_one_complete_checkpoint(tmp_path: Path) -> None:
    soak(tmp_path, 10, 1)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_P2_two_hundred_signals_at_random_moments(tmp_path: Path) -> None:
    soak(tmp_path, 200, 7)


# ---------------------------------------------------------------------------------------------- P3


def test_P3_an_ordinary_batch_reads_one_attribute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    own = Path(L.__file__).parent

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and Path(frame.f_code.co_filename) == own / "signals.py":
            calls.append(frame.f_code.co_name)

    class Watched(Net):
        def on_train_start(self) -> None:
            sys.setprofile(count)

        def on_train_end(self) -> None:
            sys.setprofile(None)

    fit(tmp_path, model=Watched(), limit_val_batches=0)
    assert calls == []


# ---------------------------------------------------------------------------------------------- P4


def test_P4_a_forked_process_has_the_handlers_that_were_there_before(tmp_path: Path) -> None:
    codes: list[int] = []
    former: list[int] = []

    class Forks(Net):
        def on_train_batch_start(self, *args: Any) -> None:
            for number in (signal.SIGTERM, signal.SIGUSR2):
                child = os.fork()
                if child == 0:
                    send(number)
                    os._exit(17 if former == [number] else 18)
                codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    before = signal.signal(signal.SIGUSR2, lambda number, frame: former.append(number))
    try:
        trainer = fit(tmp_path, model=Forks(), max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert codes == [-signal.SIGTERM, 17]
    assert not trainer.interrupted


# ---------------------------------------------------------------------------------------------- P5, P6 in processes

SCRIPT = """
import os, signal, sys, threading, time
import torch
from torch.utils.data import DataLoader, TensorDataset
import leyden as L
{before}

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        {step}
        return self.net(batch[0]).mean()

    def on_save_checkpoint(self, checkpoint):
        {save}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = L.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
    default_root_dir=sys.argv[1], callbacks=[L.callbacks.ModelCheckpoint(sys.argv[1], every_n_train_steps=2)]
)
trainer.fit(Net(), DataLoader(TensorDataset(torch.ones(8, 2)), num_workers={workers}))
print("returned", trainer.interrupted, trainer.global_step, trainer.received_sigterm)
"""


Script = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Script]:
    """Run SCRIPT, with code in its places, in a process of its own; return its exit code and what it printed."""
    errors = tmp_path_factory.mktemp("scripts") / "errors"
    with (
        errors.open("w") as stream,
        subprocess.Popen(
            [sys.executable, SOAK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
        ) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None

        def run(
            folder: Path, step: str = "pass", save: str = "pass", before: str = "", workers: int = 0
        ) -> tuple[int, str]:
            text = SCRIPT.format(step=step, save=save, before=before, workers=workers)
            server.stdin.write(json.dumps([text, str(folder)]) + "\n")  # type: ignore[union-attr]
            server.stdin.flush()  # type: ignore[union-attr]
            answer = server.stdout.readline()  # type: ignore[union-attr]
            assert answer, errors.read_text()
            code, printed = json.loads(answer)
            return code, printed

        yield run


AT_3 = "trainer.global_step == 3 and "


@pytest.mark.parametrize("number", TERMINATING, ids=lambda number: number.name)
def test_P4_workers_go_on_when_the_whole_group_is_told_to_end(script: Script, number: int, tmp_path: Path) -> None:
    # once they wait for something to do, and once as soon as they are started
    for step in (f"{AT_3}os.killpg(0, {int(number)})", f"trainer.global_step or os.killpg(0, {int(number)})"):
        folder = tmp_path / str(len(step))
        assert script(folder, step=step, workers=2) == (143, "")
        newest = files.newest(folder)
        assert newest is not None
        assert files.recorded_step(newest) == (4 if step.startswith(AT_3) else 1)


@pytest.mark.parametrize("number", TERMINATING, ids=lambda number: number.name)
def test_P5_a_second_signal_leaves_at_once(script: Script, number: int, tmp_path: Path) -> None:
    twice = f"[os.kill(os.getpid(), {int(number)}) for _ in range(2)]; print('after')"
    assert script(tmp_path, step=f'{AT_3}exec("{twice}")') == (-number, "")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=2.ckpt"]
    files.load(tmp_path / "epoch=0-step=2.ckpt", verify=True)


def test_P5_a_warning_and_the_signal_that_it_announces_are_one_request(script: Script, tmp_path: Path) -> None:
    both = "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM)"
    assert script(tmp_path, step=f'{AT_3}exec("{both}")') == (143, "")
    assert files.recorded_step(str(files.newest(tmp_path))) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_P5_a_second_signal_while_the_checkpoint_is_written_leaves_the_former(
    script: Script, number: int, tmp_path: Path
) -> None:
    # the first signal comes in step 3; then the checkpoint is saved, and asks the module for what it has to add
    kill = f"os.kill(os.getpid(), {int(number)})"
    step, save = f"trainer.global_step == 2 and {kill}", f"trainer.interrupted and {kill}"
    assert script(tmp_path, step=step, save=save) == (-number, "")
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=2.ckpt"]
    files.load(tmp_path / "epoch=0-step=2.ckpt", verify=True)


def test_P6_a_users_handler_that_exits_has_its_way(script: Script, tmp_path: Path) -> None:
    own = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))"
    assert script(tmp_path, step=f"{AT_3}os.kill(os.getpid(), signal.SIGTERM)", before=own) == (5, "")


def test_P6_what_is_ignored_stays_ignored(script: Script, tmp_path: Path) -> None:
    own = "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGUSR1)]"
    both = "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM)"
    assert script(tmp_path, step=f'{AT_3}exec("{both}")', before=own) == (0, "returned False 8 False")


# ---------------------------------------------------------------------------------------------- P6


@pytest.fixture
def handlers() -> Iterator[dict[int, Any]]:
    before = {number: signal.getsignal(number) for number in STOPS}
    yield before
    after = {number: signal.getsignal(number) for number in STOPS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", [*TERMINATING, signal.SIGINT], ids=lambda number: number.name)
def test_P6_a_users_handler_is_called_as_well_and_is_back_afterwards(
    number: int, handlers: dict[int, Any], tmp_path: Path
) -> None:
    caught: list[int] = []

    def own(received: int, frame: Any) -> None:
        assert frame is not None
        caught.append(received)

    signal.signal(number, own)
    trainer = trainer_of(tmp_path, At("on_train_batch_start", 2, lambda: send(number)))
    try:
        trainer.fit(Net(), loader(), loader())
    except SIGTERMException:
        assert number != signal.SIGINT
    assert caught == [number]
    assert trainer.interrupted
    assert trainer.global_step == 2
    assert signal.getsignal(number) is own
    signal.signal(number, handlers[number])


def test_P6_handlers_are_back_after_an_exception(handlers: dict[int, Any], tmp_path: Path) -> None:
    def fails() -> None:
        assert signal.getsignal(signal.SIGTERM) != handlers[signal.SIGTERM]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, At("on_train_batch_start", 2, fails))


def test_P6_a_handler_that_is_installed_during_the_run_stays(tmp_path: Path) -> None:
    def own(*args: Any) -> None:
        pass

    before = signal.getsignal(signal.SIGUSR2)
    try:
        fit(tmp_path, At("on_train_start", 1, lambda: signal.signal(signal.SIGUSR2, own)), max_epochs=1)
        assert signal.getsignal(signal.SIGUSR2) is own
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("when", ["before", "during"])
def test_P6_faulthandler_keeps_its_signal(when: str, tmp_path: Path) -> None:
    with (tmp_path / "traces").open("w+") as traces:

        def register() -> None:
            faulthandler.register(signal.SIGUSR1, file=traces)

        late = At("on_train_start", 1, register if when == "during" else lambda: None)
        try:
            if when == "before":
                register()
            trainer = fit(tmp_path, late, At("on_train_batch_start", 2, lambda: send(signal.SIGUSR1)), max_epochs=1)
            assert not trainer.interrupted
            send(signal.SIGUSR1)
            traces.seek(0)
            assert traces.read().count("Current thread") == 2
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_P6_a_run_inside_a_run_returns_and_the_outer_one_answers(handlers: dict[int, Any], tmp_path: Path) -> None:
    inner: list[Any] = []

    def nested() -> None:
        stop = At("on_train_batch_start", 2, lambda: send(signal.SIGTERM))
        inner.append(fit(tmp_path / "inner", stop, model=Net()))
        inner.append(fit(tmp_path / "second"))  # begins when the process is to end already

    with pytest.raises(SIGTERMException):
        fit(tmp_path / "outer", At("on_train_batch_start", 3, nested))
    first, second = inner
    assert first.interrupted
    assert first.received_sigterm
    assert first.global_step == 2
    assert second.interrupted
    assert second.global_step == 0
    for name, step in (("outer", 3), ("inner", 2)):
        assert files.recorded_step(tmp_path / name / "checkpoints" / "interrupted.ckpt") == step


def test_P6_runs_one_after_the_other(handlers: dict[int, Any], tmp_path: Path) -> None:
    for index in range(2):
        with pytest.raises(SIGTERMException):
            fit(tmp_path / str(index), At("on_train_batch_start", 2, lambda: send(signal.SIGTERM)))
    trainer = fit(tmp_path / "third")
    assert not trainer.interrupted
    assert not trainer.received_sigterm


def test_P6_a_run_in_a_thread_installs_nothing(handlers: dict[int, Any], tmp_path: Path) -> None:
    seen: list[Any] = []
    watch = At("on_train_batch_start", 1, lambda: seen.append({n: signal.getsignal(n) for n in STOPS}))
    thread = threading.Thread(target=fit, args=(tmp_path, watch))
    thread.start()
    thread.join()
    assert seen == [handlers]


# ---------------------------------------------------------------------------------------------- an error from elsewhere


def test_an_error_in_another_thread_ends_the_run_after_the_batch(tmp_path: Path) -> None:
    error = OSError("the disk is full")
    told: list[BaseException] = []

    class Fails(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                interrupt = trainer._session.interrupt
                threads = [threading.Thread(target=interrupt.fail, args=(each,)) for each in (error, ValueError())]
                for thread in threads:
                    thread.start()
                    thread.join()

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            assert trainer.global_step == 3
            told.append(exception)

    with pytest.raises(OSError, match="the disk is full") as caught:
        fit(tmp_path, Fails())
    assert caught.value is error
    assert told == [error]


def test_an_error_and_a_signal_save_and_raise_the_error(tmp_path: Path) -> None:
    class Both(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                trainer._session.interrupt.fail(OSError("a disk"))
                send(signal.SIGTERM)

    with pytest.raises(OSError, match="a disk"):
        fit(tmp_path, Both())
    assert checkpoints(tmp_path) == ["interrupted.ckpt"]
