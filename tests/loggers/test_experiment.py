# SPDX-License-Identifier: Apache-2.0
"""Experiment: each behaviour that SEED-2019.md lists, under its own name, and that it is a logger for the Trainer of today."""

from __future__ import annotations

import copy
import csv
import gc
import inspect
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import leyden
from leyden import Experiment
from leyden.callbacks import ModelCheckpoint
from leyden.errors import MisconfigurationException
from leyden.loggers import Logger
from leyden.loggers import csv as csv_module
from leyden.loggers.cells import read_pairs
from leyden.runtime.ranks import rank_zero_only

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def nothing_left_open():
    before = set(threading.enumerate())
    yield
    if not set(threading.enumerate()) <= before:
        gc.collect()
    assert set(threading.enumerate()) <= before, "an experiment that is closed or dropped ends its writer's thread"


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def rows(exp):
    with open(os.path.join(exp.log_dir, "metrics.csv"), newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v and k != "created_at"} for row in csv.DictReader(file)]


def events(exp):
    found = EventAccumulator(exp.get_tensorboardx_path(), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(exp):
    found = events(exp)
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def texts(exp):
    found = events(exp)
    if "hparams/text_summary" not in found.Tags()["tensors"]:
        return []
    return [e.tensor_proto.string_val[0].decode() for e in found.Tensors("hparams/text_summary")]


def files_under(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def run(code, cwd, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# ---------------------------------------------------------------------- the class


def test_signature():
    names = list(inspect.signature(Experiment).parameters.values())
    assert [(p.name, p.default) for p in names[:-1]] == [
        ("save_dir", None), ("name", "default"), ("debug", False), ("version", None), ("autosave", False),
        ("description", None), ("create_git_tag", False), ("rank", 0),
    ]  # fmt: skip
    assert names[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_a_strict_subclass_of_summary_writer(tmp_path):
    assert issubclass(Experiment, SummaryWriter)
    assert Experiment is not SummaryWriter
    assert issubclass(Experiment, Logger)
    with Experiment(tmp_path) as exp:
        exp.add_scalar("by_hand", 1.5, 3)
        exp.add_scalars("both", {"a": 1.0, "b": 2.0}, 3)
        exp.add_histogram("weights", torch.arange(5.0), 3)
        exp.add_text("note", "hello", 3)
    assert scalars(exp) == {"by_hand": [(3, 1.5)]}
    assert events(exp).Tags()["histograms"] == ["weights"]
    assert {"tf/both_a", "tf/both_b"} <= set(files_under(exp.log_dir))


def test_it_is_loaded_only_when_it_is_asked_for():
    code = (
        "import sys, leyden, leyden.loggers; assert 'tensorboard' not in sys.modules; "
        "assert leyden.Experiment is leyden.loggers.Experiment; assert 'tensorboard' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")})


def test_arguments_for_summary_writer(tmp_path):
    with Experiment(tmp_path, filename_suffix=".mine") as exp:
        pass
    assert [name for name in os.listdir(exp.get_logdir()) if name.endswith(".mine")]
    with Experiment(tmp_path, version=0) as exp:
        for step in range(4):
            exp.log({"loss": step}, step)
    with Experiment(tmp_path, version=0, purge_step=2) as exp:
        exp.log({"loss": 20.0}, 2)
    assert [(step, value) for step, value in scalars(exp)["loss"]] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    with pytest.raises(TypeError, match="flush_sec"):
        Experiment(tmp_path, flush_sec=3)


# ---------------------------------------------------------------------- layout and versions


def test_layout(tmp_path):
    exp = Experiment(tmp_path / "logs", name="digits", description="what it is")
    exp.tag({"lr": 0.02})
    exp.log({"loss": 0.5, "png_digit": np.zeros((2, 2))})
    exp.close()
    folder = tmp_path / "logs" / "digits" / "version_0"
    (event_file,) = os.listdir(folder / "tf")
    assert files_under(folder) == sorted(
        ["media", "media/digit_0.png", "meta.experiment", "meta_tags.csv", "metrics.csv", "tf", f"tf/{event_file}"]
    )
    assert event_file.startswith("events.out.tfevents.")


def test_meta_experiment(tmp_path):
    exp = Experiment(tmp_path, name="digits", version=4, description="ünï")
    exp.close()
    folder = tmp_path / "digits" / "version_4"
    meta = json.loads((folder / "meta.experiment").read_text(encoding="utf-8"))
    assert meta.pop("created_at") == exp.created_at
    assert meta == {
        "name": "digits", "version": 4, "description": "ünï", "exp_hash": "digits_v4", "autosave": False,
        "tags_path": str(folder / "meta_tags.csv"), "metrics_path": str(folder / "metrics.csv"),
        "media_path": str(folder / "media"), "tensorboard_path": str(folder / "tf"),
    }  # fmt: skip
    assert exp.exp_hash == "digits_v4"


def test_save_dir_none_is_a_folder_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exp = Experiment()
    monkeypatch.chdir("/")
    exp.close()
    assert exp.log_dir == str(tmp_path / "test_tube_data" / "default" / "version_0")
    assert os.path.isfile(os.path.join(exp.log_dir, "meta.experiment"))


def test_get_data_path_and_get_media_path_and_get_tensorboardx_path(tmp_path):
    with Experiment(tmp_path, name="a") as exp:
        assert exp.get_data_path("b", 3) == str(tmp_path / "b" / "version_3")
        assert exp.get_media_path("b", 3) == str(tmp_path / "b" / "version_3" / "media")
        assert exp.get_tensorboardx_path("b", 3) == str(tmp_path / "b" / "version_3" / "tf")
        assert exp.get_data_path(exp.name, exp.version) == exp.get_data_path() == exp.log_dir
        assert exp.get_logdir() == exp.get_tensorboardx_path()
        assert repr(exp) == f"Experiment({exp.log_dir!r})"


def test_no_version_takes_the_next_free_one(tmp_path):
    for expected in (0, 1):
        with Experiment(tmp_path) as exp:
            assert exp.version == expected
    os.makedirs(tmp_path / "default" / "version_7")
    with Experiment(tmp_path) as exp:
        assert exp.version == 8


def test_two_that_start_together_never_share_a_version(tmp_path):
    code = (
        "import sys; from leyden import Experiment; sys.stdin.readline(); "
        "exps = [Experiment('.') for _ in range(5)]; print(*[e.version for e in exps]); [e.close() for e in exps]"
    )
    processes = [run(code, tmp_path) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    taken = [int(word) for process in processes for word in process.communicate(timeout=60)[0].split()]
    assert sorted(taken) == list(range(10))


def test_an_existing_version_is_loaded_and_its_history_extended(tmp_path):
    first = Experiment(tmp_path, version=3, description="the first")
    first.tag({"lr": 0.5, "name": "1", "layers": [1, 2], "flag": True, "none": None, "nothing": ""})
    first.log({"loss": 1.5, "n": 3}, 10)
    first.close()
    second = Experiment(tmp_path, version=3)
    assert second.description == "the first"
    assert second.created_at == first.created_at
    assert second.tags == {"lr": 0.5, "name": "1", "layers": [1, 2], "flag": True, "none": None, "nothing": ""}
    assert second.metrics == first.metrics
    assert second.metrics[0]["loss"] == 1.5
    assert second.metrics[0]["step"] == 10
    second.tag({"lr": 0.25})
    second.log({"loss": 1.0, "acc": 0.5}, 11)
    second.close()
    assert rows(second) == [{"loss": "1.5", "n": "3", "step": "10"}, {"loss": "1.0", "acc": "0.5", "step": "11"}]
    assert read_pairs(tmp_path / "default" / "version_3" / "meta_tags.csv")["lr"] == 0.25
    assert scalars(second)["loss"] == [(10, 1.5), (11, 1.0)]


def test_a_new_description_replaces_the_old_one(tmp_path):
    Experiment(tmp_path, version=0, description="old").close()
    Experiment(tmp_path, version=0, description="new").close()
    with Experiment(tmp_path, version=0) as exp:
        assert exp.description == "new"


def test_what_the_tool_of_2019_wrote_is_read(tmp_path):
    folder = tmp_path / "default" / "version_0"
    folder.mkdir(parents=True)
    (folder / "meta.experiment").write_text(
        '{"name": "default", "version": 0, "tags_path": "/x", "metrics_path": "/y", "autosave": false, '
        '"description": null, "created_at": "2019-08-01 10:00:00.1", "exp_hash": "default_v0"}'
    )
    (folder / "meta_tags.csv").write_text("key,value\nlr,0.02\nhidden,\nbn,True\n")
    (folder / "metrics.csv").write_text("tng_loss,created_at,epoch\n2.5,2019-08-01 10:00:01.1,0\n,2019-08-01,1\n")
    with Experiment(tmp_path, version=0) as exp:
        assert exp.created_at == "2019-08-01 10:00:00.1"
        assert exp.tags == {"lr": 0.02, "hidden": "", "bn": True}
        assert exp.metrics[0] == {"tng_loss": 2.5, "created_at": "2019-08-01 10:00:01.1", "epoch": 0}
        assert exp.metrics[1] == {"created_at": "2019-08-01", "epoch": 1}
        exp.log({"tng_loss": 2.0}, 5)
    assert table(folder / "metrics.csv")[3][1:] == ["", "5", "2.0"]


def test_a_version_that_was_never_saved_is_no_obstacle(tmp_path):
    folder = tmp_path / "default" / "version_0"
    folder.mkdir(parents=True)
    (folder / "meta.experiment").touch()  # how 2019's tool started a version
    with Experiment(tmp_path, version=0) as exp:
        exp.log({"loss": 1.0})
    assert json.loads((folder / "meta.experiment").read_text())["name"] == "default"


def test_a_row_that_a_crash_left_half_written_is_cut_off(tmp_path):
    with Experiment(tmp_path, version=0) as exp:
        exp.log({"loss": 1.0})
    with open(os.path.join(exp.log_dir, "metrics.csv"), "a") as file:
        file.write("2026-01-01,0.")
    with Experiment(tmp_path, version=0) as exp:
        assert [row["loss"] for row in exp.metrics] == [1.0]
        exp.log({"loss": 2.0})
    assert [row["loss"] for row in rows(exp)] == ["1.0", "2.0"]


# ---------------------------------------------------------------------- log


def test_log_writes_scalars_to_tensorboard_and_a_csv_row(tmp_path):
    exp = Experiment(tmp_path)
    metrics = {"loss": torch.tensor(0.5), "acc": np.float32(0.25), "n": 3, "one": torch.tensor([[2.0]]), "b": True}
    exp.log(metrics, global_step=7)
    assert set(metrics) == {"loss", "acc", "n", "one", "b"}, "the caller's dict is left alone"
    exp.log({"loss": {"val": 1.0}}, 8)
    exp.close()
    assert rows(exp) == [
        {"loss": "0.5", "acc": "0.25", "n": "3", "one": "2.0", "b": "1", "step": "7"},
        {"loss/val": "1.0", "step": "8"},
    ]
    assert scalars(exp) == {
        "loss": [(7, 0.5)], "acc": [(7, 0.25)], "n": [(7, 3.0)], "one": [(7, 2.0)], "b": [(7, 1.0)],
        "loss/val": [(8, 1.0)],
    }  # fmt: skip


def test_each_row_has_created_at(tmp_path):
    with Experiment(tmp_path) as exp:
        exp.log({"loss": 1.0})
        exp.log({"loss": 1.0, "created_at": "long ago"})
    first, second = (row[0] for row in table(os.path.join(exp.log_dir, "metrics.csv"))[1:])
    assert first.startswith("20")
    assert second == "long ago"
    assert [row["created_at"] for row in exp.metrics] == [first, second]


def test_without_a_step_rows_are_counted(tmp_path):
    with Experiment(tmp_path) as exp:
        exp.log({"loss": 1.0})
        exp.log({"loss": 2.0, "step": 40})
        exp.log({"loss": 3.0})
    assert scalars(exp)["loss"] == [(0, 1.0), (40, 2.0), (2, 3.0)]
    assert [row["step"] for row in rows(exp)] == ["0", "40", "2"]


def test_columns_grow(tmp_path):
    with Experiment(tmp_path) as exp:
        exp.log({"loss": 1.0})
        exp.save()
        exp.log({"acc": 2.0})
        exp.save()
    first, second = exp.metrics
    assert table(os.path.join(exp.log_dir, "metrics.csv")) == [
        ["acc", "created_at", "loss", "step"],
        ["", first["created_at"], "1.0", "0"],
        ["2.0", second["created_at"], "", "1"],
    ]


def test_rows_are_appended(tmp_path, monkeypatch):
    rewrites = []
    real = csv_module.replace_file
    monkeypatch.setattr(
        csv_module, "replace_file", lambda fs, path, data: (rewrites.append(path), real(fs, path, data))
    )
    with Experiment(tmp_path) as exp:
        for step in range(20):
            exp.log({"loss": step}, step)
            exp.save()
    assert len(rewrites) == 1, "for the first column, not for each row"
    assert len(rows(exp)) == 20


@pytest.mark.parametrize("value", ["a word", [1, 2], torch.zeros(3), None, np.zeros((2, 2))])
def test_what_is_no_number_is_refused(tmp_path, value):
    with Experiment(tmp_path) as exp, pytest.raises(MisconfigurationException, match="cannot log bad=.*png, jpg"):
        exp.log({"bad": value})
    assert exp.metrics == []


# ---------------------------------------------------------------------- images


def test_keys_with_png_and_jpg_and_jpeg(tmp_path):
    image = np.full((4, 4), 0.5)
    with Experiment(tmp_path) as exp:
        exp.log({"png_a": image, "jpg_b": image, "gen/JPEG_c": image, "loss": 1.0}, 3)
        exp.log({"png_a": image}, 4)
        exp.log({"png_score": 0.5}, 5)
        assert sorted(os.listdir(exp.get_media_path())) == ["a_0.png", "a_1.png", "b_0.jpg", "gen_JPEG_c_0.jpeg"]
    first, second, third = rows(exp)
    media = exp.get_media_path()
    assert first == {
        "png_a": f"{media}/a_0.png", "jpg_b": f"{media}/b_0.jpg", "gen/JPEG_c": f"{media}/gen_JPEG_c_0.jpeg",
        "loss": "1.0", "step": "3",
    }  # fmt: skip
    assert second["png_a"] == f"{media}/a_1.png"
    assert third == {"png_score": "0.5", "step": "5"}, "a number is a number, whatever its name"
    assert set(scalars(exp)) == {"loss", "png_score"}
    formats = {"a_0.png": "PNG", "b_0.jpg": "JPEG", "gen_JPEG_c_0.jpeg": "JPEG"}
    for name, kind in formats.items():
        with Image.open(f"{media}/{name}") as read:
            assert read.format == kind


# ---------------------------------------------------------------------- tags


def test_tag(tmp_path):
    with Experiment(tmp_path) as exp:
        exp.tag({"lr": 0.02, "model": "conv, deep", "path": Path("/x"), "kind": dict})
        exp.tag({"lr": 0.01})
    assert table(os.path.join(exp.log_dir, "meta_tags.csv")) == [
        ["key", "value"], ["lr", "0.01"], ["model", "conv, deep"], ["path", "/x"], ["kind", "builtins.dict"],
    ]  # fmt: skip


def test_tags_keep_their_type(tmp_path):
    tags = {"int": 1, "float": 1e-20, "text": "1", "word": "a, b", "flag": True, "none": None, "list": [1, "2"]}
    with Experiment(tmp_path, version=0) as exp:
        exp.tag(tags)
    with Experiment(tmp_path, version=0) as exp:
        assert repr(exp.tags) == repr(tags)


def test_argparse_tags_every_option_that_cannot_be_called(tmp_path):
    with Experiment(tmp_path) as exp:
        exp.argparse(Namespace(lr=0.02, layers=3, trials=lambda n: n, build=dict, none=None))
        exp.argparse({"depth": 2, "run": print})
        assert exp.tags == {"lr": 0.02, "layers": 3, "none": None, "depth": 2}


def test_add_meta_from_hyperopt(tmp_path):
    class Trial:
        def get_current_trial_meta(self):
            return [{"lr": 0.02}, {"layers": 3}]

    with Experiment(tmp_path) as exp:
        exp.add_meta_from_hyperopt(Trial())
        exp.add_meta_from_hyperopt(Namespace(width=8, trials=print))
        assert exp.tags == {"lr": 0.02, "layers": 3, "width": 8}


def test_a_table_of_tags_without_its_columns_is_a_clear_error(tmp_path):
    with Experiment(tmp_path, version=0) as exp:
        pass
    Path(exp.log_dir, "meta_tags.csv").write_text("name,number\nlr,1\n")
    with pytest.raises(MisconfigurationException, match=r"meta_tags.csv' has the columns \['name', 'number'\].*'key'"):
        Experiment(tmp_path, version=0)


# ---------------------------------------------------------------------- save


def test_save_writes_both_csv_files_and_once_the_hyperparameters_as_text(tmp_path):
    exp = Experiment(tmp_path, name="digits", description="a|b")
    exp.tag({"lr": 0.02, "path": "a|b"})
    exp.log({"loss": 1.0})
    assert rows(exp) == []
    for _ in range(3):
        exp.save()
    assert rows(exp) == [{"loss": "1.0", "step": "0"}]
    assert read_pairs(os.path.join(exp.log_dir, "meta_tags.csv")) == {"lr": 0.02, "path": "a|b"}
    assert scalars(exp) == {"loss": [(0, 1.0)]}, "events are on disk, too"
    (text,) = texts(exp)
    assert text.splitlines() == [
        "###### digits, version 0", "", "*a\\|b*", "", "parameter | value", "--- | ---", "lr | 0.02", "path | a\\|b",
    ]  # fmt: skip
    exp.close()
    with Experiment(tmp_path, name="digits", version=0) as exp:
        exp.save()
    assert len(texts(exp)) == 1, "not again when the version is continued"
    with Experiment(tmp_path, name="digits", version=0) as exp:
        exp.tag({"lr": 0.01})
    # in any order: tensorboard reads files of the same second by their names
    assert sorted("lr | 0.01" in text for text in texts(exp)) == [False, True], "but when they have changed"


def test_without_tags_there_is_no_table(tmp_path):
    with Experiment(tmp_path) as exp:
        exp.save()
    assert texts(exp) == []
    assert table(os.path.join(exp.log_dir, "meta_tags.csv")) == [["key", "value"]]
    assert table(os.path.join(exp.log_dir, "metrics.csv")) == [["created_at", "step"]]


def test_autosave(tmp_path):
    exp = Experiment(tmp_path, autosave=True)
    exp.log({"loss": 1.0})
    assert rows(exp) == [{"loss": "1.0", "step": "0"}]
    exp.tag({"lr": 1})
    assert read_pairs(os.path.join(exp.log_dir, "meta_tags.csv")) == {"lr": 1}
    exp.close()


def test_the_next_verb_after_close_opens_it_again(tmp_path):
    exp = Experiment(tmp_path)
    exp.log({"loss": 1.0}, 0)
    exp.close()
    assert not exp.is_open
    exp.close()
    exp.save()
    exp.flush()
    assert not exp.is_open, "saving nothing does not"
    exp.add_scalar("by_hand", 1.0, 0)
    exp.log({"loss": 2.0}, 1)
    exp.close()
    assert scalars(exp) == {"loss": [(0, 1.0), (1, 2.0)], "by_hand": [(0, 1.0)]}
    assert [row["loss"] for row in exp.metrics] == [1.0, 2.0]
    assert len(rows(exp)) == 2


def test_nothing_is_lost_when_it_is_dropped_without_close(tmp_path):
    exp = Experiment(tmp_path)
    exp.tag({"lr": 1})
    exp.log({"loss": 1.0})
    seen = weakref.ref(exp)
    del exp
    assert seen() is None, "nothing keeps it alive"
    with Experiment(tmp_path, version=0) as exp:
        assert exp.tags == {"lr": 1}
        assert [row["loss"] for row in exp.metrics] == [1.0]
    assert scalars(exp) == {"loss": [(0, 1.0)]}


def test_nothing_is_lost_when_the_program_ends_without_save(tmp_path):
    code = "from leyden import Experiment; exp = Experiment('.'); exp.tag({'lr': 1}); exp.log({'loss': 1.0})"
    process = run(code, tmp_path)
    assert process.communicate(timeout=60)[1] == ""
    assert not (tmp_path / "default" / "version_0" / ".lock").exists()
    with Experiment(tmp_path, version=0) as exp:
        assert exp.tags == {"lr": 1}
        assert [row["loss"] for row in exp.metrics] == [1.0]
    assert scalars(exp) == {"loss": [(0, 1.0)]}


# ---------------------------------------------------------------------- debug and ranks


def use_every_verb(exp):
    exp.log({"loss": 1.0, "png_a": np.zeros((2, 2))}, 1)
    exp.log_metrics({"loss": 1.0}, 1)
    exp.tag({"lr": 1})
    exp.argparse(Namespace(lr=1))
    exp.log_hyperparams({"lr": 1})
    exp.add_meta_from_hyperopt({"lr": 1})
    exp.add_scalar("a", 1.0, 0)
    exp.add_scalars("b", {"a": 1.0}, 0)
    exp.add_hparams({"lr": 1}, {"m": 1.0})
    exp.add_text("c", "text")
    exp.add_embedding(torch.zeros(2, 2))
    exp.add_graph(torch.nn.Linear(1, 1), torch.zeros(1, 1))
    exp.save()
    exp.flush()
    exp.finalize("success")
    exp.close()


def test_debug_writes_nothing(tmp_path):
    exp = Experiment(tmp_path / "logs", debug=True, create_git_tag=True, autosave=True)
    use_every_verb(exp)
    assert files_under(tmp_path) == []
    assert exp.metrics == []
    assert exp.version == 0
    assert exp.get_meta_copy().get_non_ddp_exp().debug


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_only_rank_zero_writes(tmp_path, monkeypatch, how):
    with Experiment(tmp_path, version=0) as exp:
        exp.tag({"lr": 0.5})
        exp.log({"loss": 1.0})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    if how == "environment":
        monkeypatch.setattr(rank_zero_only, "rank", 1)
    other = Experiment(tmp_path, version=0, rank=int(how == "argument"), autosave=True)
    assert other.tags == {"lr": 0.5}, "all ranks know the history"
    assert len(other.metrics) == 1
    use_every_verb(other)
    use_every_verb(Experiment(tmp_path / "elsewhere", rank=int(how == "argument")))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---------------------------------------------------------------------- git


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "A")
        monkeypatch.setenv(f"{name}_EMAIL", "a@b.c")
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.chdir(folder)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    return folder


def git_tags():
    return subprocess.run(["git", "tag", "-n1"], check=True, capture_output=True, text=True).stdout.split("\n")[:-1]


def test_create_git_tag(repository, tmp_path):
    Experiment(tmp_path, name="digits", create_git_tag=True).close()
    Experiment(tmp_path, name="digits", create_git_tag=True, description="why").close()
    assert [line.split(maxsplit=1) for line in git_tags()] == [
        ["tt_digits_v0", "The code of digits_v0."],
        ["tt_digits_v1", "why"],
    ]
    subprocess.run(["git", "commit", "-q", "--allow-empty", "-m", "two"], check=True)
    Experiment(tmp_path, name="digits", version=0, create_git_tag=True).close()
    assert len(git_tags()) == 2, "a version that is continued keeps the tag of the code that started it"


def test_a_git_tag_that_exists_is_a_clear_error(repository, tmp_path):
    subprocess.run(["git", "tag", "tt_default_v0"], check=True)
    with pytest.raises(MisconfigurationException, match="already exists.*no such tag yet, or set create_git_tag=False"):
        Experiment(tmp_path / "logs", create_git_tag=True)
    assert not (tmp_path / "logs" / "default" / "version_0").exists()


def test_a_git_tag_outside_a_repository_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(MisconfigurationException, match="not a git repository.*Start the program inside a git repos"):
        Experiment(tmp_path / "logs", create_git_tag=True)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MisconfigurationException, match="needs git, which is not on the path"):
        Experiment(tmp_path / "logs", create_git_tag=True)
    assert files_under(tmp_path) == []


# ---------------------------------------------------------------------- several processes


def test_get_meta_copy_survives_pickling_into_another_process(tmp_path):
    exp = Experiment(tmp_path, name="digits", description="d", autosave=True)
    exp.tag({"lr": 0.5})
    exp.log({"loss": 1.0}, 0)
    (tmp_path / "copy.pkl").write_bytes(pickle.dumps(exp.get_meta_copy()))
    code = (
        "import pickle; meta = pickle.load(open('copy.pkl', 'rb')); print(meta.exp_hash, meta.tags, len(meta.metrics));"
        "exp = meta.get_non_ddp_exp(); exp.log({'loss': 2.0}, 1); print(exp.autosave, exp.description); exp.close()"
    )
    out, error = run(code, tmp_path).communicate(timeout=60)
    assert error == ""
    assert out.split("\n")[:2] == ["digits_v0 {'lr': 0.5} 1", "True d"]
    exp.log({"loss": 3.0}, 2)
    exp.close()
    assert [row["loss"] for row in rows(exp)] == ["1.0", "2.0", "3.0"]
    assert [row["loss"] for row in exp.metrics] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda exp: pickle.loads(pickle.dumps(exp))])
def test_it_can_be_copied_and_pickled(tmp_path, clone):
    exp = Experiment(tmp_path)
    exp.log({"loss": 1.0}, 0)
    other = clone(exp)
    other.log({"loss": 2.0}, 1)
    assert not exp.is_open
    exp.log({"loss": 3.0, "new": 1.0}, 2)
    other.log({"loss": 4.0}, 3)
    other.close()
    assert [row["loss"] for row in rows(exp)] == ["1.0", "2.0", "3.0", "4.0"]
    assert [row["loss"] for row in other.metrics] == [1.0, 2.0, 3.0, 4.0]


def test_in_one_process_the_newest_takes_over(tmp_path):
    first = Experiment(tmp_path)
    first.log({"loss": 1.0}, 0)
    second = Experiment(tmp_path, version=first.version)
    assert not first.is_open
    assert [row["loss"] for row in second.metrics] == [1.0]
    second.close()


HOLD = (
    "import sys; from leyden import Experiment; exp = Experiment('.', version=0); exp.log({'loss': 1.0}); exp.save(); "
    "print('ready', flush=True); sys.stdin.readline(); exp.close()"
)


def test_a_version_that_another_process_is_writing_is_a_clear_error(tmp_path):
    holder = run(HOLD, tmp_path)
    assert holder.stdout.readline() == "ready\n"
    with pytest.raises(
        MisconfigurationException,
        match=rf"version_0' is being written by another process \({holder.pid} on .*\). Wait .* or choose another version",
    ):
        Experiment(tmp_path, version=0)
    with Experiment(tmp_path) as exp:
        assert exp.version == 1
    holder.communicate("go\n", timeout=60)
    with Experiment(tmp_path, version=0) as exp:
        assert len(exp.metrics) == 1


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path):
    holder = run(HOLD, tmp_path)
    assert holder.stdout.readline() == "ready\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    assert (tmp_path / "default" / "version_0" / ".lock").exists()
    with Experiment(tmp_path, version=0) as exp:
        assert len(exp.metrics) == 1
    assert not (tmp_path / "default" / "version_0" / ".lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_rewind_takes_back_what_came_after_a_checkpoint(tmp_path):
    """A run is killed after its checkpoint; the one that goes on logs those steps again, and the curve is one line."""
    first = Experiment(tmp_path, version=0)
    first.tag({"lr": 0.1})
    for step in range(3):
        first.log({"loss": 1.0 - step / 10}, step)
    state = json.loads(json.dumps(first.state_dict()))  # plain data: it goes into a checkpoint
    for step in range(3, 6):
        first.log({"loss": 9.0, "later": 1.0}, step)
    first.close()

    second = Experiment(tmp_path, version=0)
    assert len(second.metrics) == 6
    second.log({"of_this_process": 1.0}, 2)
    second.tag({"units": 8})
    second.save()
    second.load_state_dict(state)
    second.rewind()
    assert [row["step"] for row in second.metrics] == [0, 1, 2, 2]
    for step in range(3, 5):
        second.log({"loss": 1.0 - step / 10}, step)
    second.close()
    assert [(row["step"], row.get("loss")) for row in rows(second)] == [
        ("0", "1.0"), ("1", "0.9"), ("2", "0.8"), ("2", None), ("3", "0.7"), ("4", "0.6"),
    ]  # fmt: skip
    assert scalars(second) == {
        "loss": [(step, pytest.approx(1.0 - step / 10)) for step in range(5)], "of_this_process": [(2, 1.0)],
    }  # fmt: skip
    assert "units | 8" in texts(second)[-1]


def test_rewind_leaves_another_version_alone(tmp_path):
    other = Experiment(tmp_path, version=0)
    state = other.state_dict()
    other.close()
    exp = Experiment(tmp_path, version=1)
    exp.log({"loss": 1.0})
    exp.load_state_dict(state)
    exp.rewind()
    exp.rewind()
    exp.close()
    assert len(rows(exp)) == 1


def test_a_forked_process_cannot_write_by_accident(tmp_path):
    code = (
        "import os, sys; from leyden import Experiment; exp = Experiment('.'); exp.log({'loss': 1.0})\n"
        "if os.fork() == 0:\n"
        "    try: exp.log({'loss': 2.0})\n"
        "    except ValueError as error: print(type(error).__name__, flush=True)\n"
        "    sys.exit()\n"  # unlike os._exit, this runs what is left to do at the end
        "os.wait(); exp.log({'loss': 3.0}); exp.close()"
    )
    out, error = run(code, tmp_path, PYTHONWARNINGS="ignore").communicate(timeout=60)  # newer Pythons warn of fork
    assert (out, error) == ("MisconfigurationException\n", "")
    with Experiment(tmp_path, version=0) as exp:
        assert [row["loss"] for row in exp.metrics] == [1.0, 3.0]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"save_dir": "s3://bucket/logs"}, r"save_dir='s3://bucket/logs'\): an Experiment is kept in local files"),
        ({"name": ""}, r"name=''\): the name must be"),
        ({"name": ".."}, r"name='..'\): the name must be"),
        ({"name": None}, r"name=None\): the name must be"),
        ({"version": -1}, r"version=-1\): a version is a whole number from 0"),
        ({"version": "best"}, r"version='best'\): a version is"),
        ({"version": True}, r"version=True\): a version is"),
        ({"version": 1.5}, r"version=1.5\): a version is"),
    ],
)
def test_bad_arguments(tmp_path, arguments, match):
    with pytest.raises(MisconfigurationException, match=match):
        Experiment(**{"save_dir": tmp_path, **arguments})
    assert files_under(tmp_path) == []


def test_a_version_may_be_a_text_of_digits(tmp_path):
    with Experiment(tmp_path, version="4") as exp:
        assert exp.version == 4


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_a_damaged_meta_experiment_is_a_clear_error(tmp_path, text):
    with Experiment(tmp_path, version=0) as exp:
        pass
    path = Path(exp.log_dir, "meta.experiment")
    path.write_text(text)
    with pytest.raises(MisconfigurationException, match=r"meta.experiment' is damaged.*Remove this file"):
        Experiment(tmp_path, version=0)
    path.unlink()
    Experiment(tmp_path, version=0).close()


# ---------------------------------------------------------------------- a logger of today


class Model(leyden.LightningModule):
    def __init__(self, lr=0.1, hidden=4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


def fit(exp, model=None, **kwargs):
    loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
    trainer = leyden.Trainer(
        logger=exp, max_epochs=2, log_every_n_steps=2, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **kwargs,
    )  # fmt: skip
    trainer.fit(model or Model(), loader, loader)
    return trainer


def test_it_is_a_logger_for_the_trainer(tmp_path):
    exp = Experiment(tmp_path, name="digits")
    trainer = fit(exp)
    assert trainer.logger is exp
    assert exp.experiment is exp
    assert not exp.is_open, "finalize lets other processes write"
    assert read_pairs(os.path.join(exp.log_dir, "meta_tags.csv")) == {"lr": 0.1, "hidden": 4}
    assert "lr | 0.1" in texts(exp)[0]
    assert [(int(row["step"]), set(row) - {"step"}) for row in rows(exp)] == [
        (1, {"train_loss", "epoch"}), (3, {"train_loss", "epoch"}), (3, {"val_loss", "epoch"}),
        (5, {"train_loss", "epoch"}), (7, {"train_loss", "epoch"}), (7, {"val_loss", "epoch"}),
    ]  # fmt: skip
    history = [row["train_loss"] for row in trainer.history if "train_loss" in row]
    assert [row["train_loss"] for row in exp.metrics if "train_loss" in row] == history
    assert [step for step, _ in scalars(exp)["train_loss"]] == [1, 3, 5, 7]
    assert trainer.log_dir == exp.log_dir


def test_checkpoints_are_in_the_folder_of_the_version(tmp_path):
    exp = Experiment(tmp_path, name="digits")
    fit(exp, callbacks=[ModelCheckpoint()])
    assert os.listdir(tmp_path / "digits" / "version_0" / "checkpoints") == ["epoch=1-step=8.ckpt"]


def test_a_second_fit_goes_on_with_the_same_files(tmp_path):
    exp = Experiment(tmp_path)
    fit(exp, enable_checkpointing=False)
    fit(exp, enable_checkpointing=False)
    assert len(rows(exp)) == len(exp.metrics) == 12


def test_a_model_logs_images_while_the_trainer_logs_metrics(tmp_path):
    class Painter(Model):
        def on_train_epoch_end(self):
            self.logger.log({"png_weights": torch.sigmoid(self.layer.weight)}, self.global_step)
            self.logger.experiment.add_histogram("weights", self.layer.weight, self.global_step)

    exp = Experiment(tmp_path)
    fit(exp, Painter(), enable_checkpointing=False)
    assert len(rows(exp)) == 6 + 2
    assert len(os.listdir(exp.get_media_path())) == 2
    assert events(exp).Tags()["histograms"] == ["weights"]


def test_debug_in_the_trainer_writes_nothing(tmp_path):
    fit(Experiment(tmp_path / "logs", debug=True), enable_checkpointing=False, default_root_dir=tmp_path)
    assert files_under(tmp_path) == []


def test_nothing_keeps_the_model_alive(tmp_path):
    exp = Experiment(tmp_path)
    gc.collect()
    gc.disable()
    try:
        trainer = fit(exp, enable_checkpointing=False)
        seen = weakref.ref(trainer), weakref.ref(trainer.model)
        del trainer
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_rewind_leaves_another_run_of_the_same_name_and_version_alone(tmp_path):
    """A checkpoint of a colleague's says how far the files of their version 0 reached, not ours."""
    theirs = Experiment(tmp_path / "theirs", name="x", version=0)
    state = theirs.state_dict()
    theirs.close()
    ours = Experiment(tmp_path / "ours", name="x", version=0)
    for step in range(3):
        ours.log({"loss": float(step)})
    ours.close()
    folder = Path(ours.log_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = Experiment(tmp_path / "ours", name="x", version=0)
    again.load_state_dict(state)
    again.rewind()
    again.close()
    assert (folder / "metrics.csv").read_bytes() == before[folder / "metrics.csv"]
    assert all(path.read_bytes() == content for path, content in before.items() if "tfevents" in path.name)
    assert any("tfevents" in path.name for path in before)
