# SPDX-License-Identifier: Apache-2.0
"""A SLURM of our own: munged, slurmctld and slurmd on 127.0.0.1, in a folder of their own, for as long as the tests last.

Needs the packages slurm-wlm and munge, installed but not configured and not running. Nothing outside of the folder is
read or written, no system service is touched, and the daemons are stopped by their process ids.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "squeue", "sinfo")

_CONFIG = """\
ClusterName=leyden
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,builtin_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=8 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def find(program: str) -> str | None:
    """Return the path of a program; daemons are in sbin, which an ordinary user's PATH may lack."""
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin:/sbin")


def wait_for(condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, what()
        time.sleep(0.1)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Slurm:
    """The daemons, and questions to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        config = folder / "slurm.conf"
        config.write_text(
            _CONFIG.format(
                folder=folder,
                user=pwd.getpwuid(os.getuid()).pw_name,
                controller_port=_free_port(),
                node_port=_free_port(),
            )
        )
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.environment = {**os.environ, "SLURM_CONF": str(config)}

    def start(self) -> None:
        at = self.folder
        self._start(
            "munged", "--foreground", f"--socket={at}/munge.sock", f"--key-file={at}/munge.key",
            f"--pid-file={at}/munged.pid", f"--log-file={at}/munged.log", f"--seed-file={at}/munge.seed",
        )  # fmt: skip
        wait_for((at / "munge.sock").exists, 20, self.logs)
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", "localhost")
        wait_for(lambda: self.ask("sinfo", "--noheader", "--format=%T", check=False) == "idle", 30, self.logs)

    def _start(self, program: str, *arguments: str) -> None:
        with (self.folder / f"{program}.out").open("wb") as log:
            command = [str(find(program)), *arguments]
            self.daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def stop(self) -> None:
        """End the jobs, then the daemons, last one first, each by its process id."""
        self.ask(
            "scancel", "--signal=KILL", "--full", *self.ask("squeue", "--noheader", "--format=%i").split(), check=False
        )
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def ask(self, program: str, *arguments: str, check: bool = True) -> str:
        done = subprocess.run([program, *arguments], env=self.environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0 or not check, f"{program} {arguments}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def wait_until_idle(self, seconds: float, logs: Path) -> None:
        """Wait until there are no jobs any more."""
        self.wait_for(lambda: not self.ask("squeue", "--noheader"), seconds, logs)

    def wait_for(self, condition: Callable[[], Any], seconds: float, logs: Path) -> None:
        """Wait until ``condition()`` is true; fail with all logs below ``logs`` otherwise."""

        def what() -> str:
            paths = [path for path in sorted(logs.rglob("*.*")) if path.suffix in (".err", ".out")]
            texts = [f"--- {path}\n{path.read_text()}\n" for path in paths]
            return f"it did not happen; jobs:\n{self.ask('squeue')}\n{''.join(texts)}{self.logs()}"

        wait_for(condition, seconds, what)

    def logs(self) -> str:
        """Return the tails of the daemons' logs."""
        return "".join(f"\n--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.out")))


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    missing = [program for program in _PROGRAMS if find(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    # not pytest's folder: the path of a socket is short, and munged wants each folder above it to be safe
    with tempfile.TemporaryDirectory(prefix="leyden-slurm-") as name:
        folder = Path(name).resolve()
        folder.chmod(0o711)
        running = Slurm(folder)
        try:
            running.start()
            yield running
        finally:
            running.stop()
