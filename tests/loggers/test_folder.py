# SPDX-License-Identifier: Apache-2.0
"""Where a run's files go, and that no two runs share a version."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading

import pytest
import yaml

from leyden.loggers import CSVLogger, TensorBoardLogger
from leyden.loggers.folder import append_file, filesystem_of, replace_file
from leyden.runtime.ranks import rank_zero_only

KINDS = [CSVLogger, TensorBoardLogger]


@pytest.mark.parametrize("kind", KINDS)
def test_layout(kind, tmp_path):
    logger = kind(tmp_path, name="exp", version=4)
    assert logger.save_dir == str(tmp_path)
    assert logger.root_dir == str(tmp_path / "exp")
    assert logger.log_dir == str(tmp_path / "exp" / "version_4")
    assert (logger.name, logger.version) == ("exp", 4)
    assert kind(tmp_path).name == "leyden_logs"
    assert kind(tmp_path, version="night-run").log_dir == str(tmp_path / "leyden_logs" / "night-run")
    assert list(tmp_path.iterdir()) == [], "nothing is made before it is needed"


@pytest.mark.parametrize("name", ["", None])
def test_without_name(name, tmp_path):
    logger = CSVLogger(tmp_path, name=name, version=0)
    assert logger.name == ""
    assert logger.root_dir == str(tmp_path)
    assert logger.log_dir == str(tmp_path / "version_0")


@pytest.mark.parametrize("kind", KINDS)
def test_next_version(kind, tmp_path):
    root = tmp_path / "exp"
    for folder in ("version_0", "version_7", "version_x", "other", "version_"):
        (root / folder).mkdir(parents=True)
    logger = kind(tmp_path, name="exp")
    assert logger.version == 8
    assert (root / "version_8").is_dir()
    assert kind(tmp_path, name="exp").version == 9
    assert logger.version == 8, "a version does not change once it was asked for"


def test_user_and_variables_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "runs")
    logger = CSVLogger("~/$RUNS", version=1)
    assert logger.log_dir == str(tmp_path / "runs" / "leyden_logs" / "version_1")


def test_versions_of_loggers_that_start_together_differ(tmp_path):
    loggers = [CSVLogger(tmp_path) for _ in range(16)]
    start = threading.Barrier(len(loggers))

    def ask(logger):
        start.wait()
        logger.version

    threads = [threading.Thread(target=ask, args=(logger,)) for logger in loggers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(logger.version for logger in loggers) == list(range(16))


def test_a_claim_that_comes_too_late_takes_the_next(tmp_path, monkeypatch):
    (tmp_path / "version_0").mkdir()
    filesystem = filesystem_of(str(tmp_path))
    stale = iter([[], ["version_0"]])
    monkeypatch.setattr(type(filesystem), "ls", lambda *args, **kwargs: next(stale))
    assert CSVLogger(tmp_path, name=None).version == 1


def test_other_ranks_make_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    logger = CSVLogger(tmp_path)
    assert logger.version == 0
    logger.log_metrics({"a": 1.0}, 0)
    logger.log_hyperparams({"a": 1})
    logger.save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_hyperparams_file_is_plain_yaml(kind, tmp_path):
    from leyden.errors import LeydenError

    logger = kind(tmp_path)
    logger.log_hyperparams({"lr": 1e-5, "net": {"sizes": (1, 2), "act": LeydenError}, "note": "Läufer: #1\n"})
    logger.log_hyperparams({"lr": 0.5, "more": None})
    logger.finalize("success")
    text = (tmp_path / "leyden_logs" / "version_0" / "hparams.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {
        "lr": 0.5,
        "net": {"sizes": [1, 2], "act": "leyden.errors.LeydenError"},
        "note": "Läufer: #1\n",
        "more": None,
    }
    assert "Läufer" in text
    assert logger.hparams["net"]["sizes"] == (1, 2), "what is kept in memory is what was given"


def test_replace_file_keeps_the_old_one_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def blocks():
        yield b"new"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(filesystem_of(str(path)), str(path), blocks())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_append_file_writes_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    filesystem = filesystem_of(str(path))
    append_file(filesystem, str(path), b"x" * 600)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as if the disk were full after 1000 bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            append_file(filesystem, str(path), b"y" * 600)
        assert path.read_bytes() == b"x" * 600
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_file(filesystem, str(path), b"y" * 600)
    assert path.stat().st_size == 1200


def test_address_of_another_file_system():
    logger = CSVLogger("memory://bucket/runs", name="exp")
    assert logger.log_dir == "memory://bucket/runs/exp/version_0"
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    logger.log_metrics({"a": 2.0, "b": 3.0}, 1)
    logger.log_hyperparams({"lr": 0.5})
    logger.save()
    assert CSVLogger("memory://bucket/runs", name="exp").version == 1
    filesystem = filesystem_of(logger.log_dir)
    assert filesystem.cat(logger.log_dir + "/metrics.csv").decode().split() == ["a,b,step", "1.0,,0", "2.0,3.0,1"]
    assert yaml.safe_load(filesystem.cat(logger.log_dir + "/hparams.yaml")) == {"lr": 0.5}


def test_two_processes_claim_different_versions(tmp_path):
    script = (
        "import sys; from leyden.loggers import CSVLogger\n"
        "sys.stdin.readline(); print([CSVLogger(sys.argv[1]).version for _ in range(20)])"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    versions = [version for child in children for version in yaml.safe_load(child.communicate()[0])]
    assert sorted(versions) == list(range(40))
