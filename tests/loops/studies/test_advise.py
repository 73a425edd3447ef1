# SPDX-License-Identifier: Apache-2.0
"""The advisor: which changes it tries, how it judges them, what it says. Times are played; one test measures really."""

from __future__ import annotations

import gc
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import leyden as L
from leyden.errors import MisconfigurationException
from leyden.loops.studies import advise as advisor
from leyden.loops.studies.advise import candidates, more_workers
from leyden.loops.studies.trial import Change, Trial
from leyden.precision.base import Precision


class Net(L.LightningModule):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def trainer(**settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"max_epochs": 50, "accelerator": "cpu", **quiet, **settings})


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=4)


def trial(step: float, **more: Any) -> Trial:
    """Return the trial of a fit whose update takes so many hundredths of a second."""
    usual = {"startup": 0.1, "wait": 0.0, "memory": None, "losses": [2.0, 1.5], "workers": 0, "said": []}
    return Trial(step=step / 100, **{**usual, **more})


class Played:
    """In the place of ``run``: the trial that ``times`` has for a change, by the name of its only argument or kind."""

    def __init__(self, **times: Any) -> None:
        self.times, self.runs = times, list[str]()

    def __call__(self, trainer: Any, originals: Any, change: Change, seconds: float, folder: str) -> Trial:
        name = "+".join([*change.arguments, *(["tf32"] * change.tf32), *(["last"] * change.channels_last)]) or "own"
        self.runs.append(f"{name} {seconds:g}")
        found = self.times.get(name, 1.0)
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if isinstance(found, BaseException):
            raise found
        return found if isinstance(found, Trial) else trial(found)


def played(monkeypatch: pytest.MonkeyPatch, **times: Any) -> tuple[Any, Played]:
    script = Played(**times)
    monkeypatch.setattr(advisor, "run", script)
    return trainer().advise(Net(), data()), script


def verdicts(advice: Any) -> dict[str, str]:
    return {row["candidate"]: row["verdict"] for row in advice.rows}


# ------------------------------------------------------------------ what is tried


def reasons(settings: dict[str, Any], module: nn.Module | None = None) -> dict[str, str]:
    return {each.name: each.reason for each in candidates(trainer(**settings), module or Net())}


def test_all_are_listed_and_those_that_do_not_apply_say_why() -> None:
    assert reasons({}) == {
        "compile": "",
        "fused optimizers": "",
        "bf16-mixed": "",
        "channels_last": "no 2-D convolution",
        "TF32": "needs CUDA",
        "CUDA graphs": "needs CUDA",
    }


def test_what_is_on_already() -> None:
    found = reasons(
        {"compile": {"mode": "default"}, "fused_optimizers": True, "precision": "bf16-mixed"},
        nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last),
    )
    on = ("compile", "fused optimizers", "bf16-mixed", "channels_last")
    assert [found[name] for name in on] == ["on already"] * 4
    assert reasons({}, nn.Conv2d(2, 2, 3))["channels_last"] == ""
    assert reasons({"precision": "64-true"})["bf16-mixed"] == "precision is 64-true"
    assert reasons({"fast_data": False})["fast data"] == ""

    class Own(Precision):
        pass

    assert reasons({"plugins": Own()})["bf16-mixed"] == "a Precision of your own"


@pytest.mark.parametrize(
    ("capability", "matmul", "expected"),
    [((8, 0), "highest", ""), ((7, 5), "highest", "this GPU has no TF32"), ((9, 0), "high", "on already")],
)
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: Any, matmul: str, expected: str) -> None:
    made = trainer()
    stand_in = SimpleNamespace(
        config=made.config,
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0), precision=made.strategy.precision),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: capability >= (8, 0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    found = {each.name: each.reason for each in candidates(stand_in, Net())}
    assert found["TF32"] == expected
    assert found["CUDA graphs"] == ""
    assert found["bf16-mixed"] == ("" if capability >= (8, 0) else "this GPU has no bf16")


@pytest.mark.parametrize(
    ("workers", "wait", "cores", "names", "reason"),
    [
        (0, 0.5, 4, ["num_workers=2", "num_workers=4"], ""),
        (0, 0.5, 64, ["num_workers=2", "num_workers=8"], ""),
        (0, 0.5, 1, ["num_workers=1"], ""),
        (2, 0.5, 4, ["num_workers=4"], ""),
        (4, 0.5, 4, ["num_workers"], "4 on 4 cores already"),
        (0, 0.19, 4, ["num_workers"], "no wait for data (19%)"),
        (None, 0.5, 4, ["num_workers"], "no DataLoader"),
    ],
)
def test_workers_are_tried_where_data_is_waited_for(
    workers: int | None, wait: float, cores: int, names: list[str], reason: str
) -> None:
    found = more_workers(trial(1.0, workers=workers, wait=wait), cores)
    assert [each.name for each in found] == names
    assert found[0].reason == reason


# ------------------------------------------------------------------ how it is judged


def test_what_gains_is_measured_together_and_the_fastest_is_written_down(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advice, script = played(
        monkeypatch, compile=0.8, fused_optimizers=0.9, precision=1.5, **{"compile+fused_optimizers": 0.7}
    )
    assert verdicts(advice) == {
        "as it is": "baseline", "compile": "faster", "fused optimizers": "faster", "bf16-mixed": "slower",
        "channels_last": "not applicable", "num_workers": "not applicable", "TF32": "not applicable",
        "CUDA graphs": "not applicable", "together": "faster",
    }  # fmt: skip
    assert advice.arguments == {"compile": True, "fused_optimizers": True}
    assert advice.lines == ["Trainer(compile=True, fused_optimizers=True)"]
    assert [row["ratio"] for row in advice.rows if row["candidate"] == "together"] == [0.7]
    assert script.runs[:4] == ["own 0", "own 0.5", "compile 1.5", "own 0.5"], "compiling is measured once, and longer"
    assert script.runs.count("fused_optimizers 0.5") == 3
    assert "\nThe fastest:\n    Trainer(compile=True, fused_optimizers=True)\n" in capsys.readouterr().out


def test_together_is_not_advised_where_one_alone_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    advice, _ = played(monkeypatch, compile=0.8, precision=0.9, **{"compile+precision": RuntimeError("no")})
    assert verdicts(advice)["together"] == "failed"
    assert advice.arguments == {"compile": True}


def test_one_gain_needs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    advice, _ = played(monkeypatch, fused_optimizers=0.5)
    assert "together" not in verdicts(advice)
    assert advice.lines == ["Trainer(fused_optimizers=True)"]


def test_of_several_numbers_of_workers_the_fastest_goes_together_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advisor, "cores", lambda: 8)
    advice, script = played(
        monkeypatch, own=trial(1.0, wait=0.9), fused_optimizers=0.9, num_workers=[0.8, 0.6, 0.8, 0.6, 0.8, 0.6]
    )
    assert advice.rows[-1]["candidate"] == "together"
    assert advice.rows[-1]["write"] == "Trainer(fused_optimizers=True, num_workers=8)"
    assert "fused_optimizers+num_workers 0.5" in script.runs


def test_nothing_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    advice, _ = played(monkeypatch, fused_optimizers=0.985)
    assert verdicts(advice)["fused optimizers"] == "within noise", "whatever the machine, 2 percent are noise"
    assert advice.arguments == {}
    assert str(advice).endswith("Nothing of this makes this fit faster, beyond what is noise here.")


def test_a_noisy_machine_proves_little(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [1.0, 1.0, *[1.3, 1.0] * 20]
    advice, _ = played(monkeypatch, own=own, fused_optimizers=0.9, precision=0.3)
    assert advice.noise > 0.2
    assert verdicts(advice)["fused optimizers"] == "within noise"
    assert verdicts(advice)["bf16-mixed"] == "faster"


def test_one_turn_out_of_three_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    advice, _ = played(monkeypatch, fused_optimizers=[0.9, 0.9, 1.2])
    assert verdicts(advice)["fused optimizers"] == "within noise"
    row = advice.rows[2]
    assert (row["ratio"], row["least"], row["most"]) == pytest.approx((0.9, 0.9, 1.2))


@pytest.mark.parametrize(
    ("ratio", "after", "verdict"),
    [(0.8, 1.0, "faster"), (0.9, 0.75, "within noise"), (1.02, 0.95, "within noise"), (1.6, 1.2, "slower")],
)
def test_one_turn_proves_less_where_the_machine_changes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, ratio: float, after: float, verdict: str
) -> None:
    advice, _ = played(monkeypatch, own=[1.0, 1.0, after, *[1.0] * 99], compile=ratio)
    assert verdicts(advice)["compile"] == verdict


def test_slow_updates_have_one_turn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, script = played(monkeypatch, own=1000.0, fused_optimizers=500.0)
    assert sum(name.startswith("fused_optimizers ") for name in script.runs) == 1
    assert "An update takes 10 s" in capsys.readouterr().out


def test_what_takes_longer_than_announced_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(advisor.time, "perf_counter", lambda: float(next(clock)))
    played(monkeypatch)
    text = "An update takes 10 ms, and 30 s until enough of them are timed: about 540 s in all."
    assert text in capsys.readouterr().out


def test_what_starts_slowly_has_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    advice, script = played(monkeypatch, fused_optimizers=trial(0.5, startup=9.0))
    assert script.runs.count("fused_optimizers 0.5") == 1
    assert advice.rows[2]["startup"] == pytest.approx(8.9)
    assert "+8.9 s" in str(advice)


# ------------------------------------------------------------------ what fails


def test_what_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    advice, _ = played(monkeypatch, compile=RuntimeError("\nno compiler\nat all"), fused_optimizers=[0.9, ValueError()])
    rows = {row["candidate"]: row for row in advice.rows}
    assert (rows["compile"]["verdict"], rows["compile"]["reason"]) == ("failed", "RuntimeError: no compiler")
    assert rows["compile"]["ratio"] is None
    assert "RuntimeError: no compiler  failed" in str(advice)
    assert rows["bf16-mixed"]["verdict"] == "within noise", "the others have their turns"


def test_a_fit_that_fails_as_it_is_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="mine"):
        played(monkeypatch, own=ValueError("mine"))
    assert "failed as it is; no validation ran in it" in capsys.readouterr().out


def test_ctrl_c_ends_with_the_table_so_far(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    advice, _ = played(monkeypatch, fused_optimizers=0.5, precision=KeyboardInterrupt())
    assert advice.interrupted
    found = verdicts(advice)
    assert (found["compile"], found["fused optimizers"], found["bf16-mixed"]) == (
        "within noise",
        "faster",
        "not measured",
    )
    assert "Interrupted: the rest was not measured.\nThe fastest:\n    Trainer(fused_opt" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        played(monkeypatch, own=KeyboardInterrupt())


@pytest.mark.parametrize("seconds", [0, -1, True, "3", float("nan"), float("inf"), None])
def test_seconds_that_are_none(seconds: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"advise\(seconds=.*more than 0"):
        trainer().advise(Net(), data(), seconds=seconds)


def test_what_cannot_be_advised_on() -> None:
    with pytest.raises(MisconfigurationException, match="fast_dev_run"):
        trainer(fast_dev_run=True).advise(Net(), data())
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        trainer().advise(nn.Linear(1, 1), data())
    with pytest.raises(MisconfigurationException, match="no data"):
        trainer().advise(Net())

    class Asking(Net):
        def on_fit_start(self) -> None:
            with pytest.raises(MisconfigurationException, match="inside a run"):
                self.trainer.advise(self, data())

    trainer(max_steps=1).fit(Asking(), data())


def test_several_processes_are_refused() -> None:
    class Many(L.Trainer):
        @property
        def world_size(self) -> int:
            return 4

    made = Many(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(MisconfigurationException, match="uses 4 processes"):
        made.advise(Net(), data())


# ------------------------------------------------------------------ what is said


def test_memory_losses_and_messages_are_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    own = [trial(1.0, memory=2_000_000, said=["usual"], losses=[2.0, 1.5, 1.25])] * 3
    again = trial(1.0, memory=2_000_000, losses=[2.0, 1.5, 1.26])
    other = trial(0.5, memory=3_000_000, said=["usual", "told", "told"], losses=[2.0, 1.0])
    advice, _ = played(monkeypatch, own=[*own, again], fused_optimizers=other)
    row = advice.rows[2]
    assert (row["memory"], row["said"]) == (3_000_000, ["told"])
    assert (row["batches"], row["loss"], row["loss_difference"]) == (2, 1.0, -0.5)
    text = str(advice)
    assert "Loss of batch 3: 1.25; from the same seed once more: +0.01." in text
    assert "3 MB" in text
    assert "-0.5" in text
    assert "fused optimizers: told" in text.splitlines()
    json.dumps(advice.rows)


def test_steps_without_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    advice, _ = played(monkeypatch, own=trial(1.0, losses=[]))
    assert all(row["loss"] is None for row in advice.rows)
    assert repr(advice) == str(advice)


def test_times_are_readable() -> None:
    assert [advisor._time(seconds) for seconds in (12.0, 0.0123, 0.0000456)] == ["12 s", "12.3 ms", "45.6 microseconds"]


# ------------------------------------------------------------------ it leaves things alone


def test_the_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes long, and is tested elsewhere
    torch.set_num_threads(1)
    monkeypatch.setenv("LEYDEN_TEST", "before")

    class Careless(Net):
        def on_fit_start(self) -> None:
            os.environ["LEYDEN_TEST"] = "after"
            os.environ["LEYDEN_TEST_MORE"] = "more"
            L.seed_everything(7)

    state, frozen, threads = torch.get_rng_state(), gc.get_freeze_count(), torch.get_num_threads()
    trainer().advise(Careless(), data(), seconds=0.01)
    assert os.environ["LEYDEN_TEST"] == "before"
    assert "LEYDEN_TEST_MORE" not in os.environ
    assert torch.equal(torch.get_rng_state(), state)
    assert (gc.get_freeze_count(), torch.get_num_threads()) == (frozen, threads)
