# SPDX-License-Identifier: Apache-2.0
"""Processes that start by themselves, by torchrun or as SLURM starts them; and what happens when one of them breaks."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from leyden import files
from leyden.callbacks import EarlyStopping, ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.runtime import collective
from leyden.runtime.world import World
from ranks import Judged, Net, data, make_trainer, on_ranks

SCRIPT = Path(__file__).with_name("rank_script.py")
OURS = [sys.executable, str(SCRIPT)]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _torchrun() -> list[str]:
    where = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *where, str(SCRIPT)]


def _environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def _run(command: list[str], folder: Path, mode: str, **extra: str) -> tuple[int, str]:
    done = subprocess.run(
        [*command, str(folder), mode], env=_environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=100, check=False, cwd=folder,
    )  # fmt: skip
    return done.returncode, done.stdout


def _left(folder: Path) -> list[int]:
    """The processes of a run that are still there."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(folder) in (process.info["cmdline"] or ()) and process.pid != os.getpid():
            found.append(process.pid)
    return found


def _whole(folder: Path, output: str) -> list[dict[str, Any]]:
    """What both ranks have written, compared as far as it must be the same."""
    ranks: list[dict[str, Any]] = []
    for rank in (0, 1):
        path = folder / f"{rank}.json"
        assert path.exists(), output
        ranks.append(json.loads(path.read_text()))
    for rank in ranks:
        assert rank["lines"] == ["above", "fit", "predict"]
        assert rank["steps"] == [10, 15]
        assert rank["world"] == 2
        assert rank["test"][0]["count"] == 9
        assert rank["alone"][0]["count"] == 9
    assert ranks[0]["weight"] == ranks[1]["weight"]
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert sorted(ranks[0]["predicted"] + ranks[1]["predicted"]) == list(range(9))
    assert ranks[0]["pid"] != ranks[1]["pid"]
    assert [rank["local_rank"] for rank in ranks] == [0, 1]
    return ranks


def test_t1_fit_fit_test_and_predict_in_one_script_run_each_line_once_for_each_rank(tmp_path: Path) -> None:
    code, output = _run(OURS, tmp_path, "whole")
    assert code == 0, output
    _whole(tmp_path, output)
    assert _left(tmp_path) == []


def test_torchrun_is_joined(tmp_path: Path) -> None:
    code, output = _run(_torchrun(), tmp_path, "whole")
    assert code == 0, output
    _whole(tmp_path, output)


def _as_task(port: int) -> Any:
    """Be a task as ``srun`` starts it: nothing but its variables says that there is another one."""
    rank = os.environ["RANK"]
    for name in [*World().environment(0)]:
        del os.environ[name]
    os.environ.update(
        SLURM_JOB_ID="4711", SLURM_JOB_NAME="train", SLURM_NTASKS="2", SLURM_STEP_NUM_TASKS="2", SLURM_NODEID="0",
        SLURM_STEP_NODELIST="localhost", MASTER_PORT=str(port), SLURM_PROCID=rank, SLURM_LOCALID=rank,
    )  # fmt: skip
    module = Net()
    trainer = make_trainer("auto", max_epochs=1)
    trainer.fit(module, DataLoader(data(24), 3))
    return trainer.world_size, trainer.global_rank, trainer.global_step, module.layer[0].weight.tolist()


def test_slurm_is_joined() -> None:
    ranks = on_ranks(2, _as_task, _free_port())
    assert [rank[:3] for rank in ranks] == [(2, 0, 4), (2, 1, 4)]
    assert ranks[0][3] == ranks[1][3]


def _first_error(output: str) -> str:
    found = re.findall(r"^(?:\[rank\d\]: )?(\w*(?:Error|Exception)\b.*)$", output, re.M)
    assert found, output
    return str(found[0])


def _breaks(command: list[str], folder: Path, mode: str) -> float:
    began = time.monotonic()
    code, output = _run(command, folder, mode)
    assert code not in (0, None), output
    assert not list(folder.glob("*.json"))
    assert _left(folder) == []
    if not mode.startswith(_SAYS_NOTHING):
        assert "broken on rank" in _first_error(output) or mode.startswith("worker")  # torch's line comes above it
        assert f"broken on rank {mode[-1]}" in output
    took = time.monotonic() - began
    assert took < 95  # it came to an end by itself
    return took


_SAYS_NOTHING = ("kill", "exit", "leave")
_PLACES = [
    "early1", "step0", "hook0", "hook1", "validation1", "dataset0", "dataset1", "worker1", "kill1", "kill0", "exit1",
    "exit0", "leave1", "memory1", "prepare0", "setup1", "optimizers1", "optimizers0", "save0", "callback1",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["step1"])
def test_d1_a_rank_that_raises_ends_all_with_its_traceback_first(tmp_path: Path, mode: str) -> None:
    _breaks(OURS, tmp_path, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", _PLACES)
def test_d1_wherever_a_rank_raises_all_end(tmp_path: Path, mode: str) -> None:
    _breaks(OURS, tmp_path, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["step1", *_PLACES])
def test_d1_under_torchrun(tmp_path: Path, mode: str) -> None:
    _breaks(_torchrun(), tmp_path, mode)


_HOOKS = [
    "prepare_data", "setup", "configure_model", "configure_callbacks", "configure_optimizers", "train_dataloader",
    "val_dataloader", "on_fit_start", "on_train_start", "on_train_epoch_start",
    "on_train_batch_start", "on_before_batch_transfer", "training_step", "on_before_zero_grad", "on_before_backward",
    "on_after_backward", "on_before_optimizer_step", "optimizer_step", "on_train_batch_end", "on_validation_start",
    "on_validation_epoch_start", "on_validation_batch_start", "validation_step", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown",
    "on_save_checkpoint", "state_dict",
]  # fmt: skip
_QUICK = ["setup", "configure_optimizers", "on_before_optimizer_step", "on_validation_epoch_end", "on_save_checkpoint"]


def _in_hook(hook: str, who: int, folder: Path) -> Any:
    former = getattr(Judged, hook, None)

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = make.trainer
        if trainer.global_rank == who and (hook.endswith("_dataloader") or not trainer.sanity_checking):
            raise ValueError(f"broken on rank {who}")
        return former(self, *args, **kwargs) if former is not None else None

    class make:
        trainer: Any = None

    module = type("Broken", (Judged,), {hook: broken})()
    saving = ModelCheckpoint(folder, save_last=True)
    make.trainer = make_trainer(max_epochs=2, callbacks=[saving], enable_checkpointing=True)
    error: BaseException | None = None
    try:
        given = () if hook.endswith("_dataloader") else (DataLoader(data(24), 2), DataLoader(data(8), 2))
        if not given:
            other = "val_dataloader" if hook.startswith("train") else "train_dataloader"
            setattr(module, other, lambda: DataLoader(data(24), 2))
        make.trainer.fit(module, *given)
    except BaseException as caught:
        error = caught
    moment = time.monotonic()
    collective.part()  # as at the end of the process
    return type(error).__name__, str(error), moment


def _hook_breaks(hook: str, who: int, folder: Path) -> None:
    found = on_ranks(2, _in_hook, hook, who, folder, timeout=40)
    name, said, first = found[who]
    assert (name, said) == ("ValueError", f"broken on rank {who}")
    name, _, second = found[1 - who]
    assert name not in ("NoneType", "ValueError")
    assert second - first < 10  # D1 of PAINS: the one time that is promised


@pytest.mark.parametrize("hook", _QUICK)
def test_d1_whatever_hook_a_rank_raises_in_the_others_end(tmp_path: Path, hook: str) -> None:
    _hook_breaks(hook, 1 - (hook == "on_save_checkpoint"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("hook", _HOOKS)
def test_d1_every_hook_on_every_rank(tmp_path: Path, hook: str, who: int) -> None:
    if who and hook in ("prepare_data", "on_save_checkpoint"):
        who = 0  # these run on rank 0 only
    _hook_breaks(hook, who, tmp_path)


def test_no_process_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*OURS, str(tmp_path), "wait"], env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "pid1").exists() and time.monotonic() < until:
            time.sleep(0.05)
        other = psutil.Process(int((tmp_path / "pid1").read_text()))
        assert other.pid != process.pid
        process.kill()
        process.wait()
        other.wait(30)
    finally:
        process.kill()
    assert _left(tmp_path) == []


def test_p2_a_signal_to_one_rank_saves_once_after_the_same_step_of_all(tmp_path: Path) -> None:
    code, output = _run(OURS, tmp_path, "term1")
    assert code == 143, output
    assert "SIGTERM: the fit stops at step" in output
    (saved,) = tmp_path.rglob("interrupted.ckpt")
    checkpoint = files.load(saved)
    assert f"stops at step {checkpoint['global_step']} " in output
    assert len(checkpoint["leyden"]["ranks"]) == 2
    assert _left(tmp_path) == []


# ---------------------------------------------------------------------------------------------- in other processes


def _fitted(strategy: str, folder: Path) -> None:
    torch.manual_seed(0)
    saving, stopping = ModelCheckpoint(folder, monitor="val", save_last=True), EarlyStopping("val", patience=50)
    module = Judged()
    before = module.layer[0].weight.detach().clone()
    trainer = make_trainer(
        strategy=strategy,
        max_epochs=2,
        callbacks=[saving, stopping],
        enable_checkpointing=True,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data(24), 3, shuffle=True), DataLoader(data(7), 2))
    assert not torch.equal(module.layer[0].weight, before)
    assert trainer.state.finished
    assert (trainer.global_step, trainer.current_epoch) == (8, 2)
    assert set(trainer.callback_metrics) == {"loss", "loss_step", "loss_epoch", "val", "count"}
    assert trainer.callback_metrics["count"] == 7
    assert Path(saving.best_model_path).exists()
    assert trainer.checkpoint_callback is saving
    assert stopping.best_score == saving.best_model_score
    assert len(trainer.history) > 0
    (tested,) = trainer.test(module, DataLoader(data(7), 2), verbose=False)
    (alone,) = make_trainer(1).test(module, DataLoader(data(7), 2), verbose=False)
    assert tested == pytest.approx(alone, abs=1e-6)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ddp_fork_brings_weights_metrics_and_callbacks_back(tmp_path: Path) -> None:
    _fitted("ddp_notebook", tmp_path)


@pytest.mark.slow
def test_ddp_spawn_brings_weights_metrics_and_callbacks_back(tmp_path: Path) -> None:
    _fitted("ddp_spawn", tmp_path)


class _Broken(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == 2:
            raise ValueError("broken on rank 1")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_d1_in_processes_of_one_call_the_traceback_comes_with_the_error() -> None:
    with pytest.raises(Exception, match="broken on rank 1"):
        make_trainer(strategy="ddp_fork", max_epochs=1).fit(_Broken(), DataLoader(data(24), 3))


# ---------------------------------------------------------------------------------------------- bad input


def _wrong_count() -> str:
    with pytest.raises(MisconfigurationException) as caught:
        make_trainer(3, strategy="ddp")
    return str(caught.value)


def test_a_number_of_devices_that_was_not_started_is_an_error() -> None:
    for message in on_ranks(2, _wrong_count):
        assert "Trainer(devices=3, num_nodes=1) asks for 3 processes" in message
        assert "has started 2" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "xla"}, r"Trainer\(strategy='xla'\) is not there: TPUs .*'ddp'"),
        ({"strategy": "ddpp"}, r"strategy='ddpp'.*Did you mean 'ddp'"),
        ({"strategy": "single_device"}, r"Trainer\(devices=2, num_nodes=1\) asks for 2 devices"),
        ({"num_nodes": 2}, r"Trainer\(num_nodes=2\): no launcher .*MASTER_ADDR, MASTER_PORT, NODE_RANK not set"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_what_can(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(2, **arguments)
