# SPDX-License-Identifier: Apache-2.0
"""Runs a program in several processes, of one machine or of many: torchrun starts them, watches them, starts them anew.

It does so in this process, which ends as the program does: with the exit status of the process that failed first. What asks
this process to stop (Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2, SIGHUP) is handed on to all, so that a fit is saved; no process
outlives it.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Mapping

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from leyden.errors import MisconfigurationException
from leyden.runtime.devices import make_accelerator, parse_devices
from leyden.strategies.launch.script import FIRST

PORT = 29400
"""Where the machines of a run meet, unless somebody says otherwise: as with Lightning's ``fabric run``."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_LIMITS = {"node_rank": 0, "main_port": 1, "max_restarts": 0}


def launch(wishes: Mapping[str, str], command: list[str], environment: Mapping[str, str]) -> int:
    """Run ``command`` in several processes; return the exit status.

    Args:
        wishes: What was asked for, by the names of ``cli.run.OPTIONS``.
        command: The python, its options, the program and its arguments.
        environment: The variables of the processes.

    Raises:
        MisconfigurationException: for a value that cannot be, or where a machine is not told where the others are.
    """
    count = _count(wishes)
    words = [*_where(wishes), "--nproc-per-node", str(count), "--max-restarts", wishes.get("max_restarts", "0")]
    # in front of the program, so that the system ends it when this process is gone, however it went
    guarded = [sys.executable, "-c", FIRST, str(os.getpid()), *command]
    before = dict(os.environ)
    os.environ.update({**environment, **_variables(wishes, count, environment)})
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        arguments = torchrun.parse_args([*words, "--no-python", *guarded])  # type: ignore[no-untyped-call]
        config, entry, rest = torchrun.config_from_args(arguments)
        if hasattr(config, "signals_to_handle"):  # newer versions of torch
            config.signals_to_handle = ",".join(name for name in SIGNALS.split(",") if hasattr(signal, name))
        elastic_launch(config=config, entrypoint=entry)(*rest)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        print(f"leyden run: rank {rank} (process {failure.pid}) ended first, with {how}.", file=sys.stderr)
        return 128 - code if code < 0 else code
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0


def _count(wishes: Mapping[str, str]) -> int:
    """How many processes this machine has."""
    devices = wishes.get("devices", "1")
    backend = make_accelerator(wishes.get("accelerator", "auto"))
    if devices.isdigit() and int(devices) < 1:
        raise MisconfigurationException(f"--devices {devices}: it must be 1 or more, 'auto', or devices.")
    return len(parse_devices(backend, int(devices) if devices.lstrip("-").isdigit() else devices))


def _where(wishes: Mapping[str, str]) -> list[str]:
    """The words that tell torchrun how many machines there are, and where they meet."""
    for name, least in _LIMITS.items():
        value = wishes.get(name, str(least))
        if not value.isdigit() or int(value) < least:
            option = "--" + name.replace("_", "-")
            raise MisconfigurationException(f"leyden run {option} {value}: it must be a whole number >= {least}.")
    nodes = wishes.get("nodes", "1")
    fewest, colon, most = nodes.partition(":")
    if not fewest.isdigit() or (colon and not most.isdigit()) or not 1 <= int(fewest) <= int(most or fewest):
        raise MisconfigurationException(f"--nodes {nodes}: it must be a number of machines, or MIN:MAX such as 1:4.")
    address, port, rank = wishes.get("main_address"), wishes.get("main_port"), wishes.get("node_rank")
    if int(most or fewest) == 1:
        meets = [
            "--rdzv-endpoint",
            f"127.0.0.1:{port or 0}",
            "--rdzv-id",
            uuid.uuid4().hex,
            "--local-addr",
            "127.0.0.1",
        ]
        return ["--nnodes", "1", "--rdzv-backend", "c10d", *meets]
    changes = bool(colon) or int(wishes.get("max_restarts", "0")) > 0
    missing = ["--main-address"] * (address is None) + ["--node-rank"] * (rank is None and not changes)
    if missing:
        raise MisconfigurationException(
            f"--nodes {nodes}: {' and '.join(missing)} missing. Start it once on each machine, with the same"
            " --main-address (of the first) and, but for --nodes MIN:MAX, with --node-rank 0, 1, ..."
        )
    if rank is not None and int(rank) >= int(most or fewest):
        raise MisconfigurationException(
            f"--nodes {nodes} --node-rank {rank}: ranks go from 0 to {int(most or fewest) - 1}."
        )
    place = f"{address}:{port or PORT}"
    if not changes:
        assert rank is not None
        return [
            "--nnodes",
            nodes,
            "--node-rank",
            rank,
            "--master-addr",
            str(address),
            "--master-port",
            port or str(PORT),
        ]
    # who comes and goes is agreed on at the first machine; it knows itself by its address, unless it is told
    host = [] if rank is None else ["--rdzv-conf", f"is_host={int(rank == '0')}"]
    return [
        "--nnodes",
        nodes,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        place,
        "--rdzv-id",
        f"leyden-{place}",
        *host,
    ]


def _variables(wishes: Mapping[str, str], count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What a Fabric and a Trainer of the program are told: they read it where the program does not say so itself."""
    found = {"LT_CLI_USED": "1", "LT_DEVICES": wishes.get("devices", "1")}
    found["LT_NUM_NODES"] = wishes.get("nodes", "1").rpartition(":")[2]
    for name in ("accelerator", "strategy", "precision"):
        if name in wishes:
            found[f"LT_{name.upper()}"] = found[f"PL_TRAINER_{name.upper()}"] = wishes[name]
    if "," in wishes.get("devices", ""):
        found["PL_TRAINER_DEVICES"] = wishes["devices"]  # which; how many a Trainer sees by itself
    if ":" in wishes.get("nodes", ""):
        # torchrun remembers where the machines met first, so that one that joins later would wait in vain
        found["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if "OMP_NUM_THREADS" not in environment:
        found["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // count, 1))
    return found


__all__ = ["launch"]
