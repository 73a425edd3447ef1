# SPDX-License-Identifier: Apache-2.0
"""The import hook: every style of import, what it says of names that Leyden lacks, and what stays behind: nothing."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader

import leyden
import leyden.callbacks
import leyden.compat
from leyden.compat.table import VERSIONS, read
from leyden.config import default_semantics
from leyden.errors import MisconfigurationException
from leyden.plain import AttributeDict


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    for root in VERSIONS:
        assert root not in sys.modules, "another test left a foreign module behind"
    with leyden.compat.installed():
        yield


@pytest.mark.parametrize("module", read())
def test_every_module_imports_and_has_its_names(module: str) -> None:
    found = importlib.import_module(module)
    assert found.__name__ == module
    assert sys.modules[module] is found
    for name in found.__all__:
        value = getattr(found, name)
        if isinstance(value, type) and value.__module__ != "typing":  # Any is a class
            # torch's own, and jsonargparse's, where Lightning passes them on; words of annotations
            assert value.__module__.split(".")[0] in ("leyden", "torch", "jsonargparse", "builtins"), name
        assert name in dir(found)


def test_all_styles_of_import_give_the_classes_of_leyden() -> None:
    import lightning
    import lightning as L
    import lightning.pytorch.callbacks as c
    import pytorch_lightning as ptl
    from lightning import pytorch as pl
    from lightning.pytorch.callbacks.early_stopping import EarlyStopping as third
    from pytorch_lightning import callbacks
    from pytorch_lightning.callbacks import EarlyStopping as second

    expected = leyden.callbacks.EarlyStopping
    assert c.EarlyStopping is second is third is callbacks.EarlyStopping is expected
    assert lightning.pytorch.callbacks.EarlyStopping is pl.callbacks.EarlyStopping is expected
    assert L.LightningModule is pl.LightningModule is ptl.LightningModule is leyden.LightningModule
    assert importlib.import_module("lightning.pytorch").Trainer is leyden.Trainer
    assert importlib.import_module(".callbacks", "lightning.pytorch").EarlyStopping is expected
    assert pkgutil.resolve_name("lightning.pytorch.callbacks:EarlyStopping") is expected
    assert __import__("lightning.pytorch.callbacks").pytorch.callbacks.EarlyStopping is expected
    assert leyden.LightningModule.__module__ == "leyden.module"
    assert isinstance(ptl.Trainer(logger=False, enable_checkpointing=False), leyden.Trainer)


def test_star_imports_give_the_names_of_the_module() -> None:
    scope: dict[str, object] = {}
    exec("from pytorch_lightning import *\nfrom lightning.pytorch.callbacks import *", scope)
    assert scope["Trainer"] is leyden.Trainer
    assert scope["data_loader"] is leyden.data_loader
    assert scope["ModelCheckpoint"] is leyden.callbacks.ModelCheckpoint


def test_old_import_lines_of_2019() -> None:
    import pytorch_lightning as ptl
    import test_tube
    from pytorch_lightning.callbacks.pt_callbacks import ModelCheckpoint
    from pytorch_lightning.models.trainer import Trainer
    from pytorch_lightning.root_module.root_module import LightningModule
    from test_tube import Experiment, HyperOptArgumentParser
    from test_tube.hpc import SlurmCluster

    assert (ptl.data_loader, ptl.Trainer) == (leyden.data_loader, Trainer)
    assert LightningModule is leyden.LightningModule
    assert ModelCheckpoint is leyden.callbacks.ModelCheckpoint
    assert Experiment is test_tube.log.Experiment is leyden.Experiment
    assert (HyperOptArgumentParser, SlurmCluster) == (leyden.HyperOptArgumentParser, leyden.SlurmCluster)


def test_the_versions_are_those_that_libraries_look_for() -> None:
    import importlib.metadata

    import lightning
    import lightning.pytorch
    import pytorch_lightning

    assert lightning.__version__ == lightning.pytorch.__version__ == pytorch_lightning.__version__ == "2.6.6"
    for package in ("lightning", "pytorch-lightning", "pytorch_lightning", "Lightning.Fabric"):
        assert importlib.metadata.version(package) == "2.6.6"
    assert importlib.metadata.metadata("test-tube")["Name"] == "test-tube"
    assert importlib.metadata.version("pytest") == pytest.__version__
    assert not {"lightning", "test-tube"} & {found.metadata["Name"] for found in importlib.metadata.distributions()}
    assert importlib.metadata.files("lightning") is None
    assert list(importlib.metadata.distribution("lightning").entry_points) == []


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "from lightning.pytorch.callbacks import EarlyStoping",
            "callbacks.EarlyStoping. Did you mean 'EarlyStopping'?",
        ),
        ("from lightning.pytorch import EarlyStopping", "pytorch.EarlyStopping. It is in lightning.pytorch.callbacks."),
        ("from lightning.pytorch import callback", "lightning.pytorch.callback. Did you mean 'callbacks'?"),
        ("import lightning.pytorch.callback", "lightning.pytorch.callback. Did you mean 'callbacks'?"),
        ("import lightning.pytorch.callback.timer", "lightning.pytorch.callback. Did you mean 'callbacks'?"),
        ("import lightning.app", "no lightning.app."),
        ("from lightning.app import LightningApp", "no lightning.app."),
        ("from test_tube import Experimnt", "test_tube.Experimnt. Did you mean 'Experiment'?"),
        ("from lightning.pytorch.trainer import _thing", "trainer._thing. It is private there"),
        (
            "from lightning.pytorch.loops import _Loop",
            "private there; Leyden answers the public names only. The public way:",
        ),
        ("importlib.import_module('lightning.pytorch.nothing')", "no lightning.pytorch.nothing."),
    ],
)
def test_an_import_of_what_leyden_lacks_says_so(statement: str, said: str) -> None:
    with pytest.raises(ImportError) as caught:
        exec(statement, {"importlib": importlib})
    assert said in str(caught.value)
    assert isinstance(caught.value, ModuleNotFoundError) == ("from" not in statement or ".app" in statement)


def test_an_attribute_that_leyden_lacks_says_so() -> None:
    import lightning.pytorch as pl

    with pytest.raises(AttributeError, match=r"no lightning\.pytorch\.Trainr\. Did you mean 'Trainer'\?"):
        pl.Trainr
    assert not hasattr(pl, "Trainr")
    assert getattr(pl.callbacks, "nothing", 3) == 3
    assert not hasattr(pl, "__file__")


def test_find_spec_answers_without_an_error() -> None:
    assert importlib.util.find_spec("lightning.pytorch.callbacks") is not None
    assert importlib.util.find_spec("lightning.pytorch.nothing") is None
    assert importlib.util.find_spec("pytorch_lightning") is not None
    with pytest.raises(ModuleNotFoundError):
        importlib.util.find_spec("lightning.nothing.deeper")


def test_other_imports_are_left_alone() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'lightning_nothing'"):
        importlib.import_module("lightning_nothing")
    import lightning_utilities  # another package, which torchmetrics brings

    assert lightning_utilities.__file__


def test_a_pickle_with_the_old_paths_opens() -> None:
    def of(module: str, name: str) -> bytes:
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."

    assert pickle.loads(of("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")) is (
        leyden.callbacks.ModelCheckpoint
    )
    assert pickle.loads(of("lightning.fabric.utilities.data", "AttributeDict")).__module__ == "leyden.plain"
    assert pickle.loads(of("test_tube.argparse_hopt", "TTNamespace")).__module__ == "leyden.search.parser"
    with pytest.raises(ModuleNotFoundError, match=r"Leyden has no pytorch_lightning\.old\."):
        pickle.loads(of("pytorch_lightning.old", "Thing"))


def test_a_checkpoint_that_names_old_classes_opens(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    written = {"hparams": AttributeDict(width=3)}
    with mock.patch.object(type(written["hparams"]), "__module__", "pytorch_lightning.utilities.parsing"):
        torch.save(written, path)
    read_back = torch.load(path, weights_only=False)
    assert type(read_back["hparams"]) is type(written["hparams"])
    assert read_back["hparams"].width == 3


def test_a_function_that_uses_a_module_travels() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    scope: dict[str, object] = {}
    exec("import lightning.pytorch as pl\ndef make():\n    return pl.Trainer", scope)
    assert cloudpickle.loads(cloudpickle.dumps(scope["make"]))() is leyden.Trainer
    assert copy.copy(scope["pl"]) is copy.deepcopy(scope["pl"]) is scope["pl"]


def test_a_function_brings_the_names_to_another_process() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    scope: dict[str, object] = {}
    exec("import lightning.pytorch as pl\ndef make():\n    return pl.__version__", scope)
    script = f"import cloudpickle; print(cloudpickle.loads({cloudpickle.dumps(scope['make'])!r})())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2.6.6\n"


def test_threads_that_import_at_once_get_the_same() -> None:
    found: list[object] = []

    def look() -> None:
        from lightning.pytorch.callbacks import Timer

        found.append(Timer)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [leyden.callbacks.Timer] * 8


def test_mock_reaches_the_classes() -> None:
    with mock.patch("pytorch_lightning.Trainer.fit", return_value="patched"):
        assert leyden.Trainer.fit(None, None) == "patched"
    assert leyden.Trainer.fit.__qualname__ == "Trainer.fit"


# --------------------------------------------------------------------------------------------- semantics


def semantics(**arguments: object) -> str:
    return leyden.Trainer(logger=False, enable_checkpointing=False, **arguments).config.semantics


def test_taking_the_trainer_of_lightning_takes_its_semantics() -> None:
    assert semantics() == "leyden"
    import lightning.pytorch as pl
    from test_tube import Experiment  # noqa: F401

    pl.LightningModule
    assert semantics() == "leyden"  # a library that only looks changes nothing
    assert pl.Trainer is leyden.Trainer
    assert semantics() == "lightning"
    assert semantics(semantics="leyden") == "leyden"


@pytest.mark.parametrize(
    "root", ["lightning", "lightning.pytorch", "pytorch_lightning", "pytorch_lightning.trainer.trainer"]
)
def test_every_place_of_the_trainer_counts(root: str) -> None:
    importlib.import_module(root).Trainer
    assert semantics() == "lightning"


def test_a_trainer_of_2019_keeps_what_2019_did() -> None:
    from pytorch_lightning import Trainer  # noqa: F401

    assert semantics(max_nb_epochs=1) == "leyden"
    assert semantics(max_nb_epochs=1, semantics="lightning") == "lightning"


class Dated(leyden.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))

    def training_step(self, batch: torch.Tensor, batch_nb: int) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(batch).sum()}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.layers]

    def tng_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(torch.ones(1, 2))


def test_a_module_of_2019_keeps_what_2019_did() -> None:
    from pytorch_lightning import Trainer

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, **quiet)
    assert trainer.config.semantics == "lightning"
    trainer.fit(Dated())  # two optimizers on one loss, which Lightning refuses today
    assert trainer.global_step == 1
    with pytest.raises(MisconfigurationException, match="takes manual"):
        Trainer(max_epochs=1, semantics="lightning", **quiet).fit(Dated())


# --------------------------------------------------------------------------------------------- install, uninstall


def test_uninstalling_leaves_nothing() -> None:
    import pytorch_lightning

    assert pytorch_lightning.Trainer is leyden.Trainer
    before = list(sys.meta_path)
    leyden.compat.uninstall()
    assert len(sys.meta_path) == len(before) - 1
    assert not [name for name in sys.modules if name.partition(".")[0] in VERSIONS]
    assert default_semantics() == "leyden"
    with pytest.raises(ModuleNotFoundError, match="No module named 'test_tube'"):
        importlib.import_module("test_tube")
    leyden.compat.uninstall()  # twice is once
    leyden.compat.install()
    assert importlib.import_module("test_tube").Experiment is leyden.Experiment


def test_installing_again_changes_nothing() -> None:
    import pytorch_lightning

    before = list(sys.meta_path)
    leyden.compat.install()
    with leyden.compat.installed():
        pass
    assert sys.meta_path == before
    assert sys.modules["pytorch_lightning"] is pytorch_lightning


def test_the_real_package_must_not_be_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    leyden.compat.uninstall()
    real = ModuleType("pytorch_lightning")
    real.__version__, real.__file__ = "2.6.6", "/elsewhere/pytorch_lightning/__init__.py"
    monkeypatch.setitem(sys.modules, "pytorch_lightning", real)
    with pytest.raises(
        MisconfigurationException, match=r"pytorch_lightning 2\.6\.6 is already imported, from /elsewhere.*leyden run"
    ):
        leyden.compat.install()
    assert not [finder for finder in sys.meta_path if type(finder).__module__ == "leyden.compat.hook"]
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    leyden.compat.install()


def test_nothing_is_loaded_before_it_is_used() -> None:
    script = (
        "import sys, leyden.compat; leyden.compat.install(); import lightning.pytorch, test_tube\n"
        "ours = sorted(name for name in sys.modules if name.startswith('leyden'))\n"
        "print(lightning.__version__, ours, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    light = ["leyden", "leyden.compat", "leyden.compat.hook", "leyden.compat.private", "leyden.compat.table"]
    light += [f"leyden.compat.table.{name}" for name in ("both", "fabric", "former", "pytorch", "words")]
    light += ["leyden.errors", "leyden.version"]
    assert done.stdout.strip() == f"2.6.6 {light} False"
