# SPDX-License-Identifier: Apache-2.0
"""LightningCLI where no recorded command line goes: checkpoints that make objects again, moments, what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.data import DataLoader

import leyden as L
from leyden.cli import main
from leyden.cli.instantiate import instantiate_class, require_safe
from leyden.cli.origins import Origins, annotated, plain
from leyden.cli.parser import LightningArgumentParser, ReduceLROnPlateau
from leyden.cli.save_config import SaveConfigCallback
from leyden.errors import MisconfigurationException

QUIET = {
    "accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False,
    "logger": False,
}  # fmt: skip


class Encoding(torch.nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, width)


class Nesting(L.LightningModule):
    def __init__(self, encoder: torch.nn.Module, rate: float = 0.1, anything=None, label: str = "x") -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.save_hyperparameters()
        self.encoder, self.rate = encoder, rate

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.encoder.layer(batch).sum()

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 4), batch_size=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # put back when the test is over
        monkeypatch.setenv(name, "0")


def cli(model: Any, *words: str, **kwargs: Any) -> L.LightningCLI:
    return L.LightningCLI(model, args=list(words), trainer_defaults=dict(QUIET), **kwargs)


@pytest.mark.parametrize("by_class", [False, True])
def test_a_checkpoint_makes_the_objects_among_the_arguments_again(by_class: bool) -> None:
    chosen = ["--model=Nesting"] if by_class else []
    made = cli(
        None if by_class else Nesting,
        "fit",
        *chosen,
        "--model.encoder=Encoding",
        "--model.encoder.width=6",
    )
    path = made.trainer.checkpoint_callback.best_model_path
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    assert hparams["encoder"] == {"class_path": f"{__name__}.Encoding", "init_args": {"width": 6}}
    assert hparams["_instantiator"] == "lightning.pytorch.cli.instantiate_module"
    assert ("_class_path" in hparams) == by_class
    again = (L.LightningModule if by_class else Nesting).load_from_checkpoint(path, rate=0.5)
    assert isinstance(again, Nesting)
    assert (again.encoder.layer.out_features, again.rate) == (6, 0.5)
    assert dict(again.hparams) == hparams | {"rate": 0.5}
    assert torch.equal(again.encoder.layer.weight, made.model.encoder.layer.weight)
    with pytest.warns(UserWarning, match="'encoder' is a module"):  # now it is one, and no class path
        own = Nesting.load_from_checkpoint(path, encoder=Encoding(6))
    assert torch.equal(own.encoder.layer.weight, made.model.encoder.layer.weight)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("encoder", {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}, "part of python itself"),
        ("anything", {"class_path": "torch.multiprocessing.Process"}, "part of python itself"),
        ("anything", [{"class_path": "not_imported_anywhere.Thing"}], "not imported"),
        ("anything", {"deep": {"class_path": "torch.nn.NoSuchLayer"}}, "not imported"),
        ("anything", "this.s", "not imported"),
        ("_instantiator", "os.system", "allowlist"),
        ("_class_path", "not_imported_anywhere.Model", "not an already imported subclass of Nesting"),
    ],
)
def test_a_strange_checkpoint_neither_imports_nor_makes_what_it_likes(name: str, value: Any, why: str) -> None:
    made = cli(Nesting, "fit", "--model.encoder=Encoding")
    path = made.trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"][name] = value
    torch.save(checkpoint, "strange.ckpt")
    with pytest.raises(MisconfigurationException, match=why):
        Nesting.load_from_checkpoint("strange.ckpt")
    assert "this" not in sys.modules


def test_a_text_is_only_a_text_where_a_text_is_wanted() -> None:
    require_safe(Nesting, {"label": "this.s", "rate": 0.1, "encoder": {"class_path": "torch.nn.ReLU"}}, "x.ckpt")


@pytest.mark.filterwarnings("ignore::leyden.errors.LeydenWarning")
def test_a_checkpoint_fills_gaps_only_for_its_own_class() -> None:
    class Other(Nesting):
        pass

    with mock.patch.dict(sys.modules[__name__].__dict__, Other=Other):
        Other.__qualname__ = "Other"
        made = cli(None, "fit", "--model=Nesting", "--model.encoder=Encoding", "--model.rate=0.7")
        path = made.trainer.checkpoint_callback.best_model_path
        same = cli(None, "fit", "--model=Nesting", "--model.encoder=Encoding", f"--ckpt_path={path}")
        other = cli(None, "fit", f"--model={__name__}.Other", "--model.encoder=Encoding", f"--ckpt_path={path}")
    assert (same.model.rate, other.model.rate) == (0.7, 0.1)


def test_who_overrides_configure_optimizers_is_told(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.warns(
        UserWarning,
        match=r"`Nesting.configure_optimizers` will be overridden by `LightningCLI.configure_optimizers`",
    ):
        made = cli(Nesting, "--model.encoder=Encoding", "--optimizer=Adam", "--optimizer.lr=0.2", run=False)
    assert isinstance(made.model.configure_optimizers(), torch.optim.Adam)


def test_two_optimizers_cannot_both_be_automatic() -> None:
    class Two(L.LightningCLI):
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_optimizer_args(torch.optim.SGD, "first")
            parser.add_optimizer_args(torch.optim.Adam, "second")

    with pytest.raises(MisconfigurationException, match="at most one optimizer and one lr_scheduler to be 'AUTOMATIC'"):
        Two(
            Nesting,
            args=["--model.encoder=Encoding", "--first.lr=0.1"],
            trainer_defaults=QUIET,
            run=False,
        )


def test_a_trainer_without_callbacks_gets_none() -> None:
    class Plain(L.Trainer):
        def __init__(self) -> None:
            super().__init__(logger=False, enable_checkpointing=False, accelerator="cpu")

    with pytest.warns(UserWarning, match="Plain` class does not expose the `callbacks"):
        made = L.LightningCLI(Nesting, args=["--model.encoder=Encoding"], run=False, trainer_class=Plain)
    assert not any(isinstance(callback, SaveConfigCallback) for callback in made.trainer.callbacks)


def test_args_and_a_command_line_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "fit"])
    with pytest.warns(UserWarning, match="sys.argv"):
        cli(Nesting, "--model.encoder=Encoding", run=False)


@pytest.mark.parametrize("kind", ["dict", "namespace"])
def test_settings_may_be_given_by_name(kind: str) -> None:
    from jsonargparse import Namespace

    settings: Any = {"model": {"encoder": {"class_path": f"{__name__}.Encoding"}, "rate": 0.25}}
    made = L.LightningCLI(
        Nesting,
        args=Namespace(settings) if kind == "namespace" else settings,
        trainer_defaults=QUIET,
        run=False,
    )
    assert made.model.rate == 0.25


def test_another_trainer_of_the_same_settings() -> None:
    made = cli(Nesting, "--model.encoder=Encoding", "--trainer.max_epochs=4", run=False)
    assert made.instantiate_trainer(max_epochs=7).max_epochs == 7
    assert made.trainer.max_epochs == 4


def test_the_help_names_every_argument_of_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    import inspect

    with pytest.raises(SystemExit):
        cli(Nesting, "fit", "--help")
    said = capsys.readouterr().out
    names = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
    assert [name for name in names if f"--trainer.{name}" not in said] == []
    assert "--model.encoder.help" in said
    assert "--print_config" in said


def test_a_subclass_of_save_config_has_to_save_somewhere() -> None:
    with pytest.raises(ValueError, match="`save_to_log_dir=False` only makes sense when subclassing"):
        SaveConfigCallback(LightningArgumentParser(), {}, save_to_log_dir=False)

    class Elsewhere(SaveConfigCallback):
        saved: list[str] = []

        def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.saved.append(stage)

    cli(
        Nesting,
        "fit",
        "--model.encoder=Encoding",
        save_config_callback=Elsewhere,
        save_config_kwargs={"save_to_log_dir": False},
    )
    assert Elsewhere.saved == ["fit"]
    assert not list(Path().rglob("*.yaml"))


def test_leyden_fit_needs_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run.yaml").write_text(
        f"model:\n  class_path: {__name__}.Nesting\n  init_args:\n    encoder: {__name__}.Encoding\n"
        "trainer:\n  accelerator: cpu\n  fast_dev_run: true\n  enable_progress_bar: false\n  enable_model_summary: false\n"
    )
    monkeypatch.setattr("sys.path", list(sys.path))
    assert main(["fit", "--config", "run.yaml"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "run.yaml", "--model.rat=1"])


def test_without_jsonargparse_the_names_are_there_and_say_what_to_install() -> None:
    code = (
        "import sys; sys.modules['jsonargparse'] = None\n"
        "import leyden as L\n"
        "from leyden.cli.parser import ArgsType, OptimizerCallable\n"
        "try: L.LightningCLI(args=[])\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'leyden[cli]'" in done.stdout


# ------------------------------------------------------------------ small things


def test_short_forms_of_keys() -> None:
    assert plain("model.init_args.encoder.class_path") == "model.encoder"
    assert plain("trainer.callbacks+") == "trainer.callbacks"
    assert plain("class_path") == "class_path"


def test_origins_of_lists_and_files() -> None:
    Path("run.yaml").write_text("trainer:\n  callbacks:\n  - class_path: Timer\n    init_args:\n      interval: step\n")
    words = ["--config=run.yaml", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "loss"]
    origins = Origins(LightningArgumentParser(), words)
    assert origins.of("trainer.callbacks.0.class_path") == "run.yaml:3"
    assert origins.of("trainer.callbacks.0.init_args.interval") == "run.yaml:5"
    assert origins.of("trainer.callbacks.1.class_path") == "command line (--trainer.callbacks+)"
    assert origins.of("trainer.callbacks.1.init_args.monitor") == "command line (--trainer.callbacks.monitor)"
    assert origins.of("trainer.callbacks.1.init_args.patience") == "default"
    assert origins.where("trainer.callbacks.interval") == "run.yaml:5"
    replaced = Origins(LightningArgumentParser(), [*words, '--trainer.callbacks=[{"class_path": "Timer"}]'])
    assert replaced.of("trainer.callbacks.0.init_args.interval") == "default"
    assert "a: 1   # default\n" in annotated("a: 1\nb: []\n", replaced, "")


def test_instantiate_class_and_the_plateau() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = instantiate_class([weight], {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}})
    assert optimizer.param_groups[0]["lr"] == 0.5
    scheduler = ReduceLROnPlateau(optimizer, "loss", patience=3)
    assert (scheduler.monitor, scheduler.patience) == ("loss", 3)
    with pytest.raises(MisconfigurationException, match="Cannot add arguments from"):
        LightningArgumentParser().add_lightning_class_args(int, "x")
    with pytest.raises(AssertionError, match="must be a subclass of"):
        LightningArgumentParser().add_optimizer_args(int)  # type: ignore[arg-type]
