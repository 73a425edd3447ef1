# SPDX-License-Identifier: Apache-2.0
"""SlurmCluster, row by row: what its scripts say, and what a job does. tests/slurm runs them on a real SLURM."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import leyden
from leyden.errors import LeydenError, MisconfigurationException
from leyden.search import HyperOptArgumentParser, SlurmCluster
from leyden.search.slurm import _claim_number


def parse() -> Any:
    parser = HyperOptArgumentParser()
    parser.opt_list("--lr", type=float, default=0.5, options=[0.1, 0.2], tunable=True)
    parser.add_argument("--epochs", type=int, default=3)
    return parser.parse_args([])


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets the path of every script that is given to sbatch; the job number is how many there are."""
    found = tmp_path / "submitted"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/bash\necho "$2" >> "{found}"\nwc -l < "{found}"\nenv > "{found}.env"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return found


@pytest.fixture
def cluster(tmp_path: Path, submitted: Path) -> SlurmCluster:
    return SlurmCluster(parse(), log_path=tmp_path / "logs")


def train(hparams: Any, cluster: Any, results: Any) -> str:
    return "not in this process"


def scripts(submitted: Path) -> list[str]:
    return [Path(line).read_text() for line in submitted.read_text().splitlines()]


def script(cluster: SlurmCluster, submitted: Path, on: str = "gpu", **kwargs: Any) -> list[str]:
    getattr(cluster, f"optimize_parallel_cluster_{on}")(train, 1, "job", **kwargs)
    return [line for line in scripts(submitted)[-1].splitlines() if line]


# ---------------------------------------------------------------------- constructor and attributes


def test_slurmcluster_is_a_top_level_name() -> None:
    assert leyden.SlurmCluster is SlurmCluster


def test_defaults_of_the_attributes(cluster: SlurmCluster) -> None:
    assert (cluster.per_experiment_nb_gpus, cluster.per_experiment_nb_cpus, cluster.per_experiment_nb_nodes) == (
        1,
        1,
        1,
    )
    assert cluster.memory_mb_per_node == 2000
    assert cluster.job_time == "15:00"
    assert cluster.minutes_to_checkpoint_before_walltime == 5
    assert cluster.gpu_type is None
    assert cluster.hpc_exp_number is None


def test_hyperparam_optimizer_must_be_what_the_parser_returned(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"got a Namespace.*parse_args\(\)"):
        SlurmCluster(argparse.Namespace(), tmp_path)  # type: ignore[arg-type]


def test_log_path_holds_one_script_and_one_log_of_each_kind_per_trial(
    cluster: SlurmCluster, submitted: Path, tmp_path: Path
) -> None:
    assert cluster.optimize_parallel_cluster_cpu(train, 2, "job") == ["1", "2"]
    folder = tmp_path / "logs" / "job"
    assert len(list((folder / "slurm_scripts").glob("trial_?_*.sh"))) == 2
    for trial, text in enumerate(scripts(submitted)):
        assert f"#SBATCH --output={folder}/slurm_out_logs/trial_{trial}_" in text
        assert f"#SBATCH --error={folder}/slurm_err_logs/trial_{trial}_" in text
        assert "#SBATCH --open-mode=append" in text


def test_two_searches_that_are_submitted_together_never_share_a_trial(tmp_path: Path) -> None:
    first, second = (_claim_number(tmp_path) for _ in range(2))  # neither has written anything yet
    assert (first[0], second[0]) == (0, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"trial_0.json", "trial_1.json"}


def test_a_second_search_overwrites_nothing(cluster: SlurmCluster, submitted: Path) -> None:
    cluster.optimize_parallel_cluster_cpu(train, 2, "job")
    cluster.optimize_parallel_cluster_cpu(train, 1, "job")
    assert [record["trial"] for record in cluster.results("job")] == [0, 1, 2]


def test_python_cmd_runs_the_same_script_with_the_same_arguments(
    cluster: SlurmCluster, submitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--epochs", "3", "a b; rm"])
    cluster.python_cmd = "nice python3"
    line = script(cluster, submitted)[-1]
    assert line.startswith("srun nice python3 ")
    assert line.endswith(" --epochs 3 'a b; rm'")


def test_enable_log_err_and_enable_log_out(tmp_path: Path, submitted: Path) -> None:
    cluster = SlurmCluster(parse(), tmp_path / "logs", enable_log_err=False, enable_log_out=False)
    lines = script(cluster, submitted)
    assert {"#SBATCH --output=/dev/null", "#SBATCH --error=/dev/null"} <= set(lines)
    assert not list(tmp_path.rglob("slurm_*_logs"))


def test_test_tube_exp_name_names_the_folder(tmp_path: Path, submitted: Path) -> None:
    SlurmCluster(parse(), tmp_path, test_tube_exp_name="exp").optimize_parallel_cluster_cpu(train, 1, "job")
    assert (tmp_path / "exp" / "slurm_scripts").is_dir()
    assert "#SBATCH --job-name=jobv0" in scripts(submitted)[0]


def test_per_experiment_nb_gpus_and_gpu_type(cluster: SlurmCluster, submitted: Path) -> None:
    cluster.per_experiment_nb_gpus = 4
    assert "#SBATCH --gres=gpu:4" in script(cluster, submitted)
    cluster.gpu_type = "a100"
    assert "#SBATCH --gres=gpu:a100:4" in script(cluster, submitted)
    assert not any("gres" in line for line in script(cluster, submitted, "cpu"))


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("per_experiment_nb_cpus", 6, "#SBATCH --cpus-per-task=6"),
        ("per_experiment_nb_nodes", 3, "#SBATCH --nodes=3"),
        ("memory_mb_per_node", 64000, "#SBATCH --mem=64000"),
        ("memory_mb_per_node", 0, "#SBATCH --mem=0"),
        ("memory_mb_per_node", "24g", "#SBATCH --mem=24g"),
        ("job_time", "1-00:00:00", "#SBATCH --time=1-00:00:00"),
        ("minutes_to_checkpoint_before_walltime", 7.5, "#SBATCH --signal=USR1@450"),
    ],
)
def test_attributes_go_into_the_script(
    cluster: SlurmCluster, submitted: Path, name: str, value: Any, line: str
) -> None:
    assert line not in script(cluster, submitted)
    setattr(cluster, name, value)
    assert line in script(cluster, submitted)
    assert 'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"' in script(cluster, submitted)


# ---------------------------------------------------------------------- methods


def test_add_slurm_cmd_comes_after_the_lines_that_it_may_override(cluster: SlurmCluster, submitted: Path) -> None:
    cluster.add_slurm_cmd("partition", "long", "a comment")
    cluster.add_slurm_cmd("exclusive")
    cluster.add_slurm_cmd("mem", 0, "")
    lines = script(cluster, submitted)
    assert lines[lines.index("#SBATCH --partition=long") - 1] == "# a comment"
    assert "#SBATCH --exclusive" in lines
    assert lines.index("#SBATCH --mem=0") > lines.index("#SBATCH --mem=2000")


def test_load_modules_and_add_command_run_before_the_trial_in_this_order(
    cluster: SlurmCluster, submitted: Path
) -> None:
    cluster.add_command("source activate env")
    cluster.load_modules(["cuda/12", "nccl"])
    assert script(cluster, submitted)[-4:-1] == ["module load cuda/12", "module load nccl", "source activate env"]
    with pytest.raises(MisconfigurationException, match=r"must be a list of names, \['cuda'\]"):
        cluster.load_modules("cuda")


@pytest.mark.parametrize(
    ("done", "fail", "events"),
    [(True, False, "END"), (False, True, "FAIL"), (True, True, "END,FAIL"), (False, False, None)],
)
def test_notify_job_status(cluster: SlurmCluster, submitted: Path, done: bool, fail: bool, events: str | None) -> None:
    cluster.notify_job_status("a@b.c", on_done=done, on_fail=fail)
    lines = script(cluster, submitted)
    assert ("#SBATCH --mail-user=a@b.c" in lines) == (events is not None)
    assert [line for line in lines if "mail-type" in line] == ([f"#SBATCH --mail-type={events}"] if events else [])


def test_optimize_parallel_cluster_gpu_and_optimize_parallel_cluster_cpu_write_the_values_of_each_trial(
    cluster: SlurmCluster, submitted: Path
) -> None:
    cluster.optimize_parallel_cluster_gpu(train, None, "job")
    cluster.optimize_parallel_cluster_cpu(train, nb_trials=1, job_name="job")
    assert [record["values"] for record in cluster.results("job")] == [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.1}]
    assert {record["state"] for record in cluster.results("job")} == {"submitted"}
    assert '{"lr": 0.2}' in scripts(submitted)[1].splitlines()[1]


def test_job_display_name(cluster: SlurmCluster, submitted: Path) -> None:
    assert '#SBATCH --job-name="my jobv0"' in script(cluster, submitted, job_display_name="my job")
    assert "#SBATCH --job-name=jobv1" in script(cluster, submitted)


def test_enable_auto_resubmit_false_asks_for_no_signal(cluster: SlurmCluster, submitted: Path) -> None:
    assert not any("signal" in line for line in script(cluster, submitted, enable_auto_resubmit=False))


# ---------------------------------------------------------------------- what cannot be


def test_no_sbatch_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MisconfigurationException, match="no `sbatch` on the path"):
        SlurmCluster(parse(), tmp_path / "logs").optimize_parallel_cluster_gpu(train, 1, "job")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("per_experiment_nb_gpus", -1, "per_experiment_nb_gpus=-1.*at least 1"),
        ("per_experiment_nb_cpus", 0, "per_experiment_nb_cpus=0"),
        ("per_experiment_nb_nodes", 1.5, "per_experiment_nb_nodes=1.5"),
        ("memory_mb_per_node", "two", "memory_mb_per_node='two'.*'24G'"),
        ("memory_mb_per_node", -1, "memory_mb_per_node=-1"),
        ("memory_mb_per_node", True, "memory_mb_per_node=True"),
        ("job_time", "an hour", "job_time='an hour'"),
        ("job_time", "5:00", "less than the walltime of 5 minutes.*enable_auto_resubmit=False"),
        ("minutes_to_checkpoint_before_walltime", -1, "at least 0"),
        ("test_tube_exp_name", "a/b", "test_tube_exp_name='a/b'"),
    ],
)
def test_an_attribute_that_cannot_be(cluster: SlurmCluster, tmp_path: Path, name: str, value: Any, words: str) -> None:
    setattr(cluster, name, value)
    with pytest.raises(MisconfigurationException, match=words):
        cluster.optimize_parallel_cluster_gpu(train, 1, "job")
    assert not (tmp_path / "logs").exists()


def test_more_that_cannot_be(cluster: SlurmCluster, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="job_name='my job'"):
        cluster.optimize_parallel_cluster_gpu(train, 1, "my job")
    with pytest.raises(MisconfigurationException, match="nb_trials=0"):
        cluster.optimize_parallel_cluster_gpu(train, 0, "job")
    cluster.notify_job_status("", True, True)
    with pytest.raises(MisconfigurationException, match="needs an address"):
        cluster.optimize_parallel_cluster_gpu(train, 1, "job")


def test_a_value_that_a_job_cannot_be_told(tmp_path: Path, submitted: Path) -> None:
    parser = HyperOptArgumentParser()
    parser.opt_list("--size", default=1, options=[(1, 2)], tunable=True)
    with pytest.raises(MisconfigurationException, match=r"'size' has the value \(1, 2\).*JSON"):
        SlurmCluster(parser.parse_args([]), tmp_path).optimize_parallel_cluster_cpu(train, 1, "job")


def test_a_refusal_of_sbatch_is_an_error(cluster: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho no such partition >&2; exit 1\n")
    with pytest.raises(LeydenError, match="no such partition"):
        cluster.optimize_parallel_cluster_cpu(train, 1, "job")


# ---------------------------------------------------------------------- inside a job


@pytest.fixture
def job(cluster: SlurmCluster, submitted: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], SlurmCluster]:
    """Submit a trial, then make clusters as its jobs would."""
    cluster.optimize_parallel_cluster_cpu(train, 1, "job")
    monkeypatch.setenv("LEYDEN_SLURM_TRIAL", str(next((cluster.log_path / "job" / "slurm_trials").iterdir())))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "9")
    return lambda: SlurmCluster(parse(), cluster.log_path)


def run(cluster: SlurmCluster, fn: Callable[..., Any], **kwargs: Any) -> Any:
    return cluster.optimize_parallel_cluster_cpu(fn, 1, "job", **kwargs)


def signal_me(number: int = signal.SIGUSR1) -> None:
    os.kill(os.getpid(), number)


def test_train_fn_gets_hparams_cluster_and_results_dict(job: Callable[[], SlurmCluster]) -> None:
    def fn(hparams: Any, cluster: Any, results_dict: Any) -> int:
        assert (hparams.lr, hparams.epochs, hparams.hpc_exp_number, cluster.hpc_exp_number) == (0.1, 3, 0, 0)
        assert "hpc_exp_number" in vars(hparams)
        results_dict["loss"] = torch.tensor(0.25)
        results_dict["curve"] = torch.ones(2)
        return 5

    cluster = job()
    assert run(cluster, fn) == 5
    (record,) = cluster.results("job")
    assert (record["state"], record["jobs"]) == ("done", ["77"])
    assert record["results"] == {"loss": 0.25, "curve": [1.0, 1.0]}


def test_train_fn_may_take_fewer_arguments(job: Callable[[], SlurmCluster]) -> None:
    assert run(job(), lambda hparams: hparams.lr) == 0.1
    assert run(job(), lambda hparams, cluster: cluster.hpc_exp_number) == 0


def test_a_trial_that_fails_says_so(job: Callable[[], SlurmCluster]) -> None:
    def fn(hparams: Any) -> None:
        raise KeyError("x")

    cluster = job()
    with pytest.raises(KeyError):
        run(cluster, fn)
    assert cluster.results("job")[0]["state"] == "failed"


def test_set_checkpoint_save_function_and_set_checkpoint_load_function(
    job: Callable[[], SlurmCluster], submitted: Path
) -> None:
    events: list[str] = []

    def fn(hparams: Any, cluster: Any, results: Any) -> None:
        cluster.set_checkpoint_save_function(events.append, {})  # the last one counts
        cluster.set_checkpoint_save_function(lambda word: events.append(word), {"word": "save"})
        cluster.set_checkpoint_load_function(lambda: events.append("load"))
        if not cluster.continues:
            signal_me()
        events.append("done")

    former = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run(job(), fn)
    assert ended.value.code == 0
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == former
    assert events == ["save"]
    first, second = submitted.read_text().splitlines()
    assert first == second, "the continuation is the same script"
    assert "SLURM_" not in Path(f"{submitted}.env").read_text().replace("LEYDEN_SLURM_TRIAL", "")
    cluster = job()
    run(cluster, fn)
    assert events == ["save", "load", "done"]
    (record,) = cluster.results("job")
    assert (record["state"], record["checkpoints"], record["jobs"]) == ("done", 1, ["77", "77"])


def test_without_a_load_function_it_saves_and_goes_on(
    job: Callable[[], SlurmCluster], submitted: Path, capsys: Any
) -> None:
    events: list[str] = []

    def fn(hparams: Any, cluster: Any) -> str:
        cluster.set_checkpoint_save_function(lambda: events.append("save"))
        signal_me()
        signal_me()
        return "went on"

    assert run(job(), fn) == "went on"
    assert events == ["save", "save"]
    assert len(submitted.read_text().splitlines()) == 1
    assert "set_checkpoint_load_function was not called" in capsys.readouterr().err


def test_without_a_save_function_it_goes_on_until_the_end(job: Callable[[], SlurmCluster], capsys: Any) -> None:
    def fn(hparams: Any, cluster: Any) -> str:
        signal_me()
        return "went on"

    assert run(job(), fn) == "went on"
    assert "set_checkpoint_save_function was not called" in capsys.readouterr().err


def test_a_checkpoint_that_fails_is_not_continued(job: Callable[[], SlurmCluster], submitted: Path) -> None:
    def fn(hparams: Any, cluster: Any) -> None:
        cluster.set_checkpoint_save_function(lambda: 1 / 0)
        cluster.set_checkpoint_load_function(lambda: None)
        signal_me()

    cluster = job()
    with pytest.raises(ZeroDivisionError):
        run(cluster, fn)
    assert len(submitted.read_text().splitlines()) == 1
    (record,) = cluster.results("job")
    assert (record["state"], record["checkpoints"]) == ("failed", 0)


@pytest.mark.parametrize("saves", [True, False])
def test_sigterm_saves_and_submits_nothing(job: Callable[[], SlurmCluster], submitted: Path, saves: bool) -> None:
    events: list[str] = []

    def fn(hparams: Any, cluster: Any) -> None:
        if saves:
            cluster.set_checkpoint_save_function(lambda: events.append("save"))
            cluster.set_checkpoint_load_function(lambda: None)
        signal_me(signal.SIGTERM)

    cluster = job()
    with pytest.raises(SystemExit) as ended:
        run(cluster, fn)
    assert ended.value.code == 143
    assert len(submitted.read_text().splitlines()) == 1
    assert events == (["save"] if saves else [])
    assert cluster.results("job")[0]["checkpoints"] == int(saves)


def test_a_forked_process_leaves_the_checkpoint_to_its_parent(job: Callable[[], SlurmCluster]) -> None:
    def fn(hparams: Any, cluster: Any) -> int:
        cluster.set_checkpoint_save_function(lambda: os._exit(9))
        pid = os.fork()
        if pid == 0:
            signal_me()
            os._exit(5)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert run(job(), fn) == 5


def test_only_the_first_process_of_a_job_submits_and_writes(
    job: Callable[[], SlurmCluster], submitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    events: list[str] = []

    def fn(hparams: Any, cluster: Any) -> None:
        cluster.set_checkpoint_save_function(lambda: events.append("save"))
        cluster.set_checkpoint_load_function(lambda: None)
        signal_me()

    cluster = job()
    with pytest.raises(SystemExit):
        run(cluster, fn)
    assert events == ["save"]
    assert len(submitted.read_text().splitlines()) == 1
    assert cluster.results("job")[0]["state"] == "submitted"


def test_names_that_arguments_had_in_2019(
    job: Callable[[], SlurmCluster], cluster: SlurmCluster, tmp_path: Path
) -> None:
    calls = []

    def trial(hparams: Any, cluster: SlurmCluster, results: Any) -> None:
        cluster.set_checkpoint_save_function(fx=calls.append, kwargs={})
        cluster.set_checkpoint_load_function(fx=calls.append, kwargs={})
        calls.append(hparams.lr)

    job().optimize_parallel_cluster_gpu(train_function=trial, nb_trials=1, job_name="job")
    job().optimize_parallel_cluster_cpu(train_function=trial, nb_trials=1, job_name="job")
    assert len(calls) == 2


def test_enable_auto_resubmit_false_installs_no_handlers(job: Callable[[], SlurmCluster]) -> None:
    former = signal.getsignal(signal.SIGUSR1)
    assert run(job(), lambda hparams: signal.getsignal(signal.SIGUSR1), enable_auto_resubmit=False) is former


def test_a_trial_whose_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEYDEN_SLURM_TRIAL", str(tmp_path / "gone.json"))
    with pytest.raises(MisconfigurationException, match="gone.json cannot be read.*unset LEYDEN_SLURM_TRIAL"):
        SlurmCluster(parse(), tmp_path)


def test_the_file_of_a_trial_is_plain_json(cluster: SlurmCluster, submitted: Path) -> None:
    cluster.optimize_parallel_cluster_cpu(train, 1, "job")
    (path,) = (cluster.log_path / "job" / "slurm_trials").iterdir()
    assert json.loads(path.read_text())["trial"] == 0
