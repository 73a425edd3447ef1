# SPDX-License-Identifier: Apache-2.0
"""The loggers of services against the real libraries, on this machine only; a run that is resumed stays one run."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = str(Path(__file__).with_name("service_script.py"))


def run(service: str, folder: Path, epochs: int, checkpoint: str = "") -> dict[str, Any]:
    told = {**os.environ, "WANDB_MODE": "offline", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    done = subprocess.run(
        [sys.executable, _SCRIPT, service, str(folder), str(epochs), checkpoint],
        env=told, cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def twice(service: str, folder: Path) -> list[dict[str, Any]]:
    first = run(service, folder, 1)
    return [first, run(service, folder, 2, first["checkpoint"])]


@pytest.mark.slow
def test_h4_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    first, second = twice("wandb", tmp_path)
    assert first["version"] == second["version"]
    from wandb.proto import wandb_internal_pb2

    rows: list[dict[str, float]] = []
    config: set[str] = set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        assert first["version"] in path.name
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if items:
                rows.append(items)
            config |= {item.key for item in (*record.config.update, *record.run.config.update)}
    assert [row["trainer/global_step"] for row in rows if "loss" in row] == list(range(8))
    assert "lr" in config


def records_of(log: bytes) -> Iterator[bytes]:
    """The records of a log in the format of LevelDB, which W&B writes after seven bytes of its own."""
    block, head = 32768, struct.Struct("<IHB")
    position, record = 7, b""
    while position + head.size <= len(log):
        if block - position % block < head.size:
            position += block - position % block  # a header is never cut in two
            continue
        _, length, kind = head.unpack_from(log, position)
        position += head.size
        record += log[position : position + length]
        position += length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield record
            record = b""


@pytest.mark.slow
def test_h4_comet_offline(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml")
    first, second = twice("comet", tmp_path)
    assert first["version"] == second["version"]
    archives = sorted(tmp_path.glob(f"{first['version']}*.zip"))
    assert len(archives) == 2
    steps = []
    for archive in archives:
        with zipfile.ZipFile(archive) as opened:
            for line in opened.read("messages.json").decode().splitlines():
                metric = json.loads(line)["payload"].get("metric") or {}
                if metric.get("metricName") == "loss":
                    steps.append(metric["step"])
    assert sorted(steps) == list(range(8))


@pytest.mark.slow
def test_h4_mlflow_without_a_server(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    check_mlflow(*twice("mlflow", tmp_path))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server with a data base in ``tmp_path``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "artifacts"),
    ]  # fmt: skip
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail((tmp_path / "server.log").read_text())
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_h4_mlflow_server(tmp_path: Path, server: str) -> None:
    pytest.importorskip("mlflow")
    check_mlflow(*twice(server, tmp_path))


def check_mlflow(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["version"] == second["version"]
    assert (first["steps"], second["steps"]) == (list(range(4)), list(range(8)))
    assert (second["status"], second["params"]) == ("FINISHED", {"lr": "0.1"})
    assert second["artifacts"] == ["epoch=0-step=4", "epoch=1-step=8"]
