# SPDX-License-Identifier: Apache-2.0
"""Two machines: two network namespaces, each with its own address on a virtual pair of cables, which a test cuts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

SCRIPT = Path(__file__).with_name("two_hosts_script.py")
NETNS = Path("/etc/netns")
ADDRESSES = ("10.213.77.1", "10.213.77.2")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Two namespaces, a pair of cables between them, and what was started in them."""

    def __init__(self) -> None:
        tag = f"{os.getpid() % 100000}"
        self.names, self.links = (f"leyden-a-{tag}", f"leyden-b-{tag}"), (f"lya{tag}", f"lyb{tag}")
        self.processes: list[subprocess.Popen[bytes]] = []
        self.made: list[str] = []

    def make(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            self.made.append(name)
            # what stands here is what programs in the namespace see in /etc: no name server is asked for these addresses
            own = NETNS / name
            own.mkdir(parents=True)
            lines = ["127.0.0.1 localhost\n", *(f"{address} host{i}\n" for i, address in enumerate(ADDRESSES))]
            (own / "hosts").write_text("".join(lines))
            (own / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        _ip("link", "add", self.links[0], "netns", self.names[0], "type", "veth", "peer", "name", self.links[1],
            "netns", self.names[1])  # fmt: skip
        for name, link, address in zip(self.names, self.links, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/30", "dev", link)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", link, "up")

    def cable(self, state: str) -> None:
        """``"up"`` or ``"down"``."""
        _ip("-n", self.names[1], "link", "set", self.links[1], state)

    def run(self, folder: Path, name: str, pause: float, torchrun: bool) -> list[subprocess.Popen[bytes]]:
        """Start the script on both; return their processes."""
        path = os.pathsep.join([str(SCRIPT.parent), *(entry for entry in sys.path if entry)])
        started = []
        for node, host in enumerate(self.names):
            where = {"NODE_RANK": str(node), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511"}
            command = [sys.executable, str(SCRIPT)]
            if torchrun:
                where = {}
                command = [
                    sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank",
                    str(node), "--master-addr", ADDRESSES[0], "--master-port", "29512", str(SCRIPT),
                ]  # fmt: skip
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **where}
            words = ["ip", "netns", "exec", host, *command, str(folder), name, str(pause)]
            with (folder / f"{name}-{node}.log").open("w") as log:
                started.append(subprocess.Popen(words, env=environment, cwd=folder, stdout=log, stderr=log))
        self.processes += started
        return started

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()
        for name in self.made:
            _ip("netns", "del", name)  # the cables go with it
            shutil.rmtree(NETNS / name, ignore_errors=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("no command ip: apt-get install iproute2")
    made = Hosts()
    try:
        try:
            made.make()
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here ({error})")
        yield made
    finally:
        made.close()


def _ended(processes: list[subprocess.Popen[bytes]], folder: Path, name: str) -> list[tuple[int, str]]:
    """Wait for them; return their exit codes and what they printed."""
    logs = [folder / f"{name}-{node}.log" for node in (0, 1)]
    try:
        codes = [process.wait(timeout=60) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(log.read_text() for log in logs))
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def _left(folder: Path) -> list[int]:
    return [one.pid for one in psutil.process_iter(["cmdline"]) if str(folder) in (one.info["cmdline"] or ())]


_ERRORS = ("has not answered", "have not answered", "cannot be reached", "time was up", "Timed out", "hangs", "closed")


def _weights(folder: Path, name: str) -> list[torch.Tensor]:
    return [torch.cat([v.reshape(-1) for v in torch.load(folder / f"{name}-{r}.pt").values()]) for r in (0, 1)]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("torchrun", [False, True], ids=["by hand", "torchrun"])
def test_r4_a_cable_that_is_cut_ends_both_and_the_run_goes_on_exactly(
    hosts: Hosts, tmp_path: Path, torchrun: bool
) -> None:
    for code, output in _ended(hosts.run(tmp_path, "whole", 0.0, torchrun), tmp_path, "whole"):
        assert code == 0, output
    processes = hosts.run(tmp_path, "cut", 0.15, torchrun)
    until = time.monotonic() + 60
    while not (tmp_path / "cut" / "step=15.ckpt").exists():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), _ended(processes, tmp_path, "cut")
        time.sleep(0.02)
    hosts.cable("down")
    for code, output in _ended(processes, tmp_path, "cut"):
        assert code not in (0, None), output
        assert any(part in output for part in _ERRORS), output
    assert not list(tmp_path.glob("cut-*.pt"))  # nobody took it for finished
    assert _left(tmp_path) == []
    (tmp_path / "cut-0.log").rename(tmp_path / "first-0.log")
    (tmp_path / "cut-1.log").rename(tmp_path / "first-1.log")
    hosts.cable("up")
    for code, output in _ended(hosts.run(tmp_path, "cut", 0.0, torchrun), tmp_path, "cut"):
        assert code == 0, output
    whole, cut = _weights(tmp_path, "whole"), _weights(tmp_path, "cut")
    assert torch.equal(whole[0], whole[1])
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])
    assert _left(tmp_path) == []
