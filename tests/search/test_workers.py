# SPDX-License-Identifier: Apache-2.0
"""Trials in processes: order, failures, GPUs, output, and that nothing is left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import trial_functions as functions

from leyden.errors import MisconfigurationException
from leyden.search import HyperOptArgumentParser, HyperOptNamespace
from leyden.search.workers import TrialResult

HERE = Path(__file__).parent


def search(count: int = 3) -> HyperOptNamespace:
    parser = HyperOptArgumentParser()
    parser.opt_list("--x", type=int, default=-1, options=list(range(count)), tunable=True)
    return parser.parse_args([])  # type: ignore[no-any-return]


def values(results: list[TrialResult]) -> list[Any]:
    return [result.value for result in results]


def processes_of_trials() -> list[psutil.Process]:
    """Our children, but for multiprocessing's own tracker of resources, which python ends when it ends."""
    return [p for p in psutil.Process().children(recursive=True) if "resource_tracker" not in " ".join(p.cmdline())]


# ---------------------------------------------------------------------- the ways to run


def test_optimize_parallel() -> None:
    results = search(2).optimize_parallel(functions.environment, nb_trials=2, nb_parallel=2)
    assert sorted(result.value["args"] for result in results) == [(0,), (1,)]


def test_optimize_parallel_cpu_keeps_the_order_of_the_trials() -> None:
    results = search(3).optimize_parallel_cpu(functions.slow_first, nb_trials=None, nb_workers=2)
    assert [(hparams.x, value) for hparams, value in results] == [(0, 0), (1, 1), (2, 2)]
    assert [result.hparams.x for result in results] == values(results)
    assert processes_of_trials() == []


def test_optimize_parallel_gpu_sets_cuda_visible_devices_per_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    results = search(2).optimize_parallel_gpu(functions.environment, ["1", "0, 2"])
    assert [result.value["visible"] for result in results] == ["1", "0,2"]
    assert [result.value["args"] for result in results] == [("1",), ("0,2",)]
    # before the user's module was imported: a library may look when it is
    assert [result.value["at_import"] for result in results] == ["1", "0,2"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"


def test_optimize_parallel_gpu_runs_one_trial_at_a_time_on_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    results = search(3).optimize_parallel_gpu(functions.environment, [0], nb_trials=2)
    assert [result.value["visible"] for result in results] == ["0", "0"]


def test_optimize_trials_parallel_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    trials = [HyperOptNamespace(x=x) for x in (5, 4, 3)]
    results = search().optimize_trials_parallel_gpu(functions.square, 2, trials, ["0"])
    assert values(results) == [25.0, 16.0]
    with pytest.raises(MisconfigurationException, match="nb_trials=0"):
        search().optimize_trials_parallel_gpu(functions.square, 0, trials, ["0"])


def test_each_trial_has_a_process_of_its_own() -> None:
    found = values(search(2).optimize_parallel_cpu(functions.process_of_its_own, None, 1))
    assert len({pid for pid, _ in found}) == 2
    assert {parent for _, parent in found} == {os.getpid()}


def test_the_cores_are_shared_between_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert search(1).optimize_parallel_cpu(functions.environment, None, 4)[0].value["threads"] == "2"
    assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert search(1).optimize_parallel_cpu(functions.environment, None, 4)[0].value["threads"] == "5"


def test_a_trial_may_use_a_data_loader_with_workers() -> None:
    assert values(search(1).optimize_parallel_cpu(functions.uses_a_data_loader, None, 1)) == [28.0]


def test_tensors_come_back_without_their_graph() -> None:
    (_, first), (_, second) = search(2).optimize_parallel_cpu(functions.trained_tensor, None, 2)
    assert torch.equal(first["loss"], torch.zeros(2))
    assert torch.equal(second["loss"], torch.ones(2))
    assert not second["loss"].requires_grad


# ---------------------------------------------------------------------- failures


def test_a_crashed_trial_is_reported_with_its_traceback_and_the_others_go_on(capfd: Any) -> None:
    results = search(3).optimize_parallel_cpu(functions.raises, None, 2)
    assert values(results) == [0, None, 2]
    assert results[0].error is None
    error = results[1].error
    assert error is not None
    assert "KeyError: 'deep inside'" in error
    assert 'raise KeyError("deep inside")' in error
    assert error.count("File ") == 1, "only the user's own frames"
    assert "KeyError: 'deep inside'" in capfd.readouterr().err


def test_a_killed_trial_is_reported_and_the_others_go_on() -> None:
    results = search(5).optimize_parallel_cpu(functions.is_killed, None, 2)
    assert values(results) == [0, None, None, None, 4]
    assert [result.error is None for result in results] == [True, False, False, False, True]
    assert "killed by SIGKILL" in str(results[1].error)
    assert "memory" in str(results[1].error)
    assert "exit code 7" in str(results[2].error)
    assert "SystemExit: enough" in str(results[3].error)


def test_a_result_that_cannot_be_sent_is_a_failure_of_its_trial() -> None:
    (result,) = search(1).optimize_parallel_cpu(functions.returns_what_cannot_be_sent, None, 1)
    assert result.value is None
    assert "pickle" in str(result.error)
    assert "returned a function that cannot be sent back" in str(result.error)


def test_a_trial_that_exits_with_0_is_done() -> None:
    (result,) = search(1).optimize_parallel_cpu(functions.exits_with_0, None, 1)
    assert (result.value, result.error) == (None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_a_trial_forked_does_not_hold_up_the_search() -> None:
    (result,) = search(1).optimize_parallel_cpu(functions.leaves_a_fork_of_itself, None, 1)
    assert result.value == 0
    assert result.seconds < functions.FORK_SLEEPS, "it waited for the fork"


def test_names_that_arguments_had_in_2019(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    hparams = search(3)
    results = hparams.optimize_parallel_gpu(
        train_function=functions.environment, gpu_ids=["1", "0"], max_nb_trials=2, nb_workers=1
    )
    assert [result.value["visible"] for result in results] == ["1", "1"], "nb_workers=1 uses the first set only"
    assert values(hparams.optimize_parallel_cpu(train_function=functions.square, nb_trials=1, nb_workers=1)) == [0.0]
    with pytest.raises(TypeError, match="two names of one argument"):
        hparams.optimize_parallel_gpu(functions.square, ["0"], nb_trials=1, max_nb_trials=1)
    with pytest.raises(MisconfigurationException, match="nb_workers=0"):
        hparams.optimize_parallel_gpu(functions.square, ["0"], nb_workers=0)


def run_script(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)


UNGUARDED = """\
from leyden import HyperOptArgumentParser
print("once in each process")
def f(hparams): return hparams.x + 1
p = HyperOptArgumentParser()
p.opt_list('--x', options=[1, 2], tunable=True)
results = p.parse_args([]).optimize_parallel_cpu(f, None, 2)
print([result.value for result in results], [result.error for result in results])
"""


def test_optimize_parallel_cpu_runs_from_a_script_without_a_main_guard(tmp_path: Path) -> None:
    # in 2019 processes were forked, and many a script has no guard
    done = run_script(tmp_path, UNGUARDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["once in each process", "[2, 3] [None, None]"]
    assert "trial 1 | once in each process" in done.stderr


def test_a_function_that_a_process_does_not_find_is_a_failure_that_says_what_to_do(tmp_path: Path) -> None:
    # a second search of an unguarded script: the processes of its trials import the script up to the first
    later = UNGUARDED + "def g(hparams): pass\nprint(p.parse_args([]).optimize_parallel_cpu(g, 1, 1)[0].error)\n"
    done = run_script(tmp_path, later)
    assert "[2, 3]" in done.stdout
    assert "Can't get attribute 'g'" in done.stdout
    assert "at the top level of the script and ahead of the search" in done.stdout


def test_functions_of_a_script_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from leyden import HyperOptArgumentParser\n"
        "def f(hparams): return hparams.x + 1\n"
        "if __name__ == '__main__':\n"
        "    p = HyperOptArgumentParser()\n"
        "    p.opt_list('--x', options=[1], tunable=True)\n"
        "    print(p.parse_args([]).optimize_parallel_cpu(f, 1, 1)[0].value)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2\n", done.stderr


# ---------------------------------------------------------------------- nothing is left behind


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def run_until_trials_wait(folder: Path, wait: str) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        [sys.executable, HERE / "search_script.py", folder, wait], stderr=subprocess.PIPE, text=True,
        # whoever started the tests in the background has had SIGINT ignored, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    wait_for(lambda: len(list(folder.glob("*.pids"))) == 2)
    pids = [int(pid) for path in folder.glob("*.pids") for pid in path.read_text().split()]
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    return process, [*pids, *children]


@pytest.mark.parametrize(("wait", "times"), [("wait", 1), ("deaf", 2)])
def test_ctrl_c_stops_all_workers_and_leaves_no_process_behind(tmp_path: Path, wait: str, times: int) -> None:
    process, pids = run_until_trials_wait(tmp_path, wait)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert len(pids) >= 6
    wait_for(lambda: gone(pids))
    assert len(list(tmp_path.glob("*.pids"))) == 2, "no further trial was started"


def test_a_killed_search_takes_its_trials_with_it(tmp_path: Path) -> None:
    process, pids = run_until_trials_wait(tmp_path, "wait")
    process.kill()
    process.communicate()
    wait_for(lambda: gone(pids))


def test_what_a_trial_started_ends_with_it(tmp_path: Path) -> None:
    parser = HyperOptArgumentParser()
    parser.opt_list("--x", type=int, default=0, options=[0], tunable=True)
    parser.add_argument("--folder", default=str(tmp_path))
    parser.add_argument("--wait", default="")
    parser.parse_args([]).optimize_parallel_cpu(functions.leaves_a_process_and_waits, None, 1)
    (path,) = tmp_path.glob("*.pids")
    wait_for(lambda: gone([int(pid) for pid in path.read_text().split()]))


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize("fn", [lambda hparams: 1, functions, "square"])
def test_a_function_that_no_process_could_import_is_refused(fn: Any) -> None:
    with pytest.raises(MisconfigurationException, match="is a lambda.*top level|is not a function"):
        search().optimize_parallel_cpu(fn, 1)


def test_a_function_inside_a_function_is_refused() -> None:
    def inner(hparams: Any) -> int:
        return 1

    with pytest.raises(MisconfigurationException, match="inner is defined inside a function.*top level"):
        search().optimize_parallel_cpu(inner, 1)


def test_a_function_of_an_interactive_session_is_refused() -> None:
    code = (
        "from leyden import HyperOptArgumentParser\n"
        "def f(hparams): return 1\n"
        "HyperOptArgumentParser().parse_args([]).replaced({})\n"
        "from leyden.search.workers import run_trials, places\n"
        "run_trials(f, [], places(1, 'n', False))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "interactive session" in done.stderr


def test_an_option_that_cannot_be_sent_is_refused() -> None:
    trial = HyperOptNamespace(x=lambda: 1)
    with pytest.raises(MisconfigurationException, match="Trial 0 cannot be sent"):
        search().optimize_trials_parallel_gpu(functions.square, None, [trial], ["0"])


@pytest.mark.parametrize("gpu_ids", ["0", [], None, ["zero"], ["0,0"], ["0;1"], [""], [-1], [True]])
def test_gpu_ids_that_name_no_gpus_are_refused(gpu_ids: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"gpu_ids=.*such as \[\"0\", \"1\"\]"):
        search().optimize_parallel_gpu(functions.square, gpu_ids)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(MisconfigurationException, match="no GPU 7; this machine has 2 GPUs. Allowed: 0, 1"):
        search().optimize_parallel_gpu(functions.square, ["0", "7"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(MisconfigurationException, match="no GPU 0; CUDA_VISIBLE_DEVICES='3' is set. Allowed: 3"):
        search().optimize_parallel_gpu(functions.square, ["0"])


@pytest.mark.parametrize(
    ("name", "argument"), [("optimize_parallel", "nb_parallel"), ("optimize_parallel_cpu", "nb_workers")]
)
def test_no_workers_is_refused(name: str, argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{argument}=0"):
        getattr(search(), name)(functions.square, 1, 0)
    with pytest.raises(MisconfigurationException, match="mode='best'"):
        getattr(search(), name)(functions.square, 1, 1, mode="best")


def test_a_result_is_a_pair_that_survives_pickling() -> None:
    result = TrialResult(1, None, "broken", 2.5)
    copy = pickle.loads(pickle.dumps(result))
    assert copy == result == (1, None)
    assert (copy.error, copy.seconds) == ("broken", 2.5)
