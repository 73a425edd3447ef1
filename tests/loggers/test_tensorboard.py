# SPDX-License-Identifier: Apache-2.0
"""TensorBoardLogger: what TensorBoard itself reads back from the event files."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.loggers import TensorBoardLogger
from leyden.loggers import tensorboard as tensorboard_module


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events


def scalars(folder):
    events = read(folder)
    # in the order of writing: tensorboard reads files of the same second by their names, in which 10 comes before 9
    return {
        tag: [(event.step, event.value) for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)]
        for tag in events.Tags()["scalars"]
    }


def hparams_of(folder):
    metadata = read(folder).summary_metadata["_hparams_/session_start_info"]
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    started = parse_session_start_info_plugin_data(metadata.plugin_data.content)
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in started.hparams.items()}


@pytest.fixture
def threads():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before, "finalize ends the writer's thread"


def test_metrics(tmp_path, threads):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "acc": torch.tensor(0.25), "one": torch.tensor([2.0]), "int": 3}, 1)
    logger.log_metrics({"train/loss": 0.125}, 2)
    logger.finalize("success")
    assert scalars(tmp_path / "leyden_logs" / "version_0") == {
        "train/loss": [(1, 0.5), (2, 0.125)],
        "acc": [(1, 0.25)],
        "one": [(1, 2.0)],
        "int": [(1, 3.0)],
    }


def test_a_dict_becomes_several_curves(tmp_path, threads):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": {"train": 1.0, "val": 2.0}, "lr": 0.5}, 4)
    logger.finalize("success")
    folder = tmp_path / "leyden_logs" / "version_0"
    assert scalars(folder) == {"lr": [(4, 0.5)]}
    assert scalars(folder / "loss_train") == {"loss": [(4, 1.0)]}
    assert scalars(folder / "loss_val") == {"loss": [(4, 2.0)]}


@pytest.mark.parametrize("value", ["a word", [1, 2], torch.zeros(2), None])
def test_what_is_no_number_is_refused(tmp_path, value):
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(MisconfigurationException, match="cannot log bad=.*a metric is a number"):
        logger.log_metrics({"bad": value}, 0)
    logger.finalize("failed")


def test_prefix_and_sub_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("PART", "left")
    logger = TensorBoardLogger(tmp_path, name="exp", version="v", prefix="p", sub_dir="$PART")
    assert logger.sub_dir == "$PART"
    assert logger.log_dir == str(tmp_path / "exp" / "v" / "left")
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert scalars(tmp_path / "exp" / "v" / "left") == {"p-a": [(0, 1.0)]}


def test_writer_arguments_are_handed_on(tmp_path):
    logger = TensorBoardLogger(tmp_path, filename_suffix=".mine", max_queue=3)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert [path.suffix for path in (tmp_path / "leyden_logs" / "version_0").glob("events*")] == [".mine"]


def test_hyperparams(tmp_path, threads):
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"net": {"width": 8, "act": torch.nn.ReLU}, "lr": 0.5, "none": None, "flag": True})
    logger.finalize("success")
    folder = tmp_path / "leyden_logs" / "version_0"
    assert scalars(folder) == {"hp_metric": [(0, -1.0)]}
    assert hparams_of(folder) == {
        "net/width": 8.0,
        "net/act": "torch.nn.modules.activation.ReLU",
        "lr": 0.5,
        "none": "None",
        "flag": 1.0,
    }
    saved = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert saved["net"] == {"width": 8, "act": "torch.nn.modules.activation.ReLU"}


@pytest.mark.parametrize(
    ("arguments", "logged"),
    [
        ({"metrics": {"best": 0.5}, "step": 3}, {"best": [(3, 0.5)]}),
        ({"metrics": 0.75}, {"hp_metric": [(0, 0.75)]}),
        ({"metrics": {}}, {}),
    ],
)
def test_hyperparams_with_metrics(tmp_path, arguments, logged):
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.5}, **arguments)
    logger.finalize("success")
    folder = tmp_path / "leyden_logs" / "version_0"
    assert (scalars(folder) if list(folder.glob("events*")) else {}) == logged
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == {"lr": 0.5}


def test_hyperparams_without_the_default_metric(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    logger.log_hyperparams({"lr": 0.5})
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    folder = tmp_path / "leyden_logs" / "version_0"
    assert list(scalars(folder)) == ["a"]
    assert "_hparams_/session_start_info" not in read(folder).summary_metadata


def test_save_writes_an_hparams_file_but_never_over_one(tmp_path):
    file = tmp_path / "leyden_logs" / "version_0" / "hparams.yaml"
    logger = TensorBoardLogger(tmp_path, version=0)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert yaml.safe_load(file.read_text()) == {}
    file.write_text("lr: 0.5\n")
    resumed = TensorBoardLogger(tmp_path, version=0)
    resumed.log_metrics({"a": 2.0}, 1)
    resumed.finalize("success")
    assert file.read_text() == "lr: 0.5\n"
    assert scalars(file.parent) == {"a": [(0, 1.0), (1, 2.0)]}


def test_save_brings_events_to_disk(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert scalars(tmp_path / "leyden_logs" / "version_0") == {"a": [(0, 1.0)]}
    logger.finalize("success")


def test_logging_goes_on_after_finalize(tmp_path, threads):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"a": 2.0}, 1)
    logger.experiment.close()  # users do this
    logger.log_metrics({"a": 3.0}, 2)
    logger.finalize("success")
    assert scalars(tmp_path / "leyden_logs" / "version_0") == {"a": [(0, 1.0), (1, 2.0), (2, 3.0)]}


def test_nothing_is_made_when_nothing_is_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_a_run_has_its_folder_at_once_and_its_events_with_the_first_row(tmp_path):
    logger, folder = TensorBoardLogger(tmp_path), tmp_path / "leyden_logs" / "version_0"
    logger.begin()
    assert list(folder.iterdir()) == []
    logger.log_hyperparams({"lr": 0.1})
    logger.save()
    assert [path.name for path in folder.iterdir()] == ["hparams.yaml"]
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    assert scalars(folder) == {"hp_metric": [(0, -1.0)], "a": [(0, 1.0)]}


@pytest.mark.parametrize("end", [TensorBoardLogger.state_dict, lambda logger: logger.finalize("success")])
def test_hyperparameters_of_a_run_without_a_row_are_not_lost(tmp_path, end):
    logger = TensorBoardLogger(tmp_path)
    logger.begin()
    logger.log_hyperparams({"lr": 0.1})
    end(logger)
    assert scalars(tmp_path / "leyden_logs" / "version_0") == {"hp_metric": [(0, -1.0)]}


def test_a_run_that_logs_nothing_is_a_run_too(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.begin()
    logger.finalize("success")
    names = sorted(path.name for path in (tmp_path / "leyden_logs" / "version_0").iterdir())
    assert names[1:] == ["hparams.yaml"]
    assert names[0].startswith("events.out.tfevents")


def test_tensorboard_is_imported_by_the_first_row_in_the_thread_that_trains(tmp_path):
    code = """
import sys, threading
import torch, leyden as L
from torch.utils.data import DataLoader
class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            print("first", "tensorboard" in sys.modules)
        loss = self.net(batch).mean()
        self.log("loss", loss)
        return loss
    def on_train_batch_end(self, *args):
        print("after", "tensorboard" in sys.modules)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
L.Trainer(max_epochs=1, accelerator="cpu", log_every_n_steps=2, enable_progress_bar=False).fit(
    Module(), DataLoader(torch.ones(4, 2), batch_size=1))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line[:5] in ("first", "after")] == [
        "first False", "after False", "after False", "after True", "after True",
    ]  # fmt: skip


def test_pickle_and_copy_leave_the_writer_behind(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    for twin in (pickle.loads(pickle.dumps(logger)), copy.deepcopy(logger)):
        assert twin.log_dir == logger.log_dir
        twin.finalize("success")
    logger.finalize("success")


class Net(torch.nn.Module):
    def __init__(self, example=None):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.drop = torch.nn.Dropout()
        self.example_input_array = example

    def forward(self, x):
        return self.drop(self.layer(x))


# torch's tracer is deprecated in favour of torch.export, which TensorBoard's graph writer does not use yet
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("example", [torch.zeros(1, 3), (torch.zeros(1, 3),)])
def test_graph(tmp_path, example):
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    model = Net(example)
    state = torch.get_rng_state()
    logger.log_graph(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    logger.finalize("success")
    nodes = [node.name for node in read(tmp_path / "leyden_logs" / "version_0").Graph().node]
    assert any("layer" in name for name in nodes)


def test_graph_only_when_asked(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_graph(Net(torch.zeros(1, 3)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("example", "said"), [(None, "it is not set"), ({"x": 1}, "it is of type dict")])
def test_graph_without_usable_input_warns(tmp_path, example, said):
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.warns(LeydenWarning, match=f"recorded no graph.*{said}"):
        logger.log_graph(Net(example))


def test_missing_tensorboard_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_module, "find_spec", lambda name: None)
    with pytest.raises(MisconfigurationException, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
def test_the_events_are_those_of_lightning(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger as Theirs

    for logger in (TensorBoardLogger(tmp_path, name="ours"), Theirs(str(tmp_path), name="theirs")):
        logger.log_hyperparams({"lr": 0.5, "net": {"width": 8}})
        logger.log_metrics({"loss": 0.3, "group/acc": torch.tensor(0.7), "epoch": 1}, 7)
        logger.finalize("success")
    ours, theirs = tmp_path / "ours" / "version_0", tmp_path / "theirs" / "version_0"
    assert scalars(ours) == scalars(theirs)
    assert hparams_of(ours) == hparams_of(theirs)
    assert yaml.safe_load((ours / "hparams.yaml").read_text()) == yaml.safe_load((theirs / "hparams.yaml").read_text())
