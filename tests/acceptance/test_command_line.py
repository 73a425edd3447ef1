# SPDX-License-Identifier: Apache-2.0
"""LightningCLI: errors that say where, precedence, no hidden files, configs that make the run again (Y5 to Y8)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import leyden as L


class Small(L.LightningModule):
    def __init__(self, lr: float = 0.1, width: int = 2, depth: int = 1, encoder: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, width)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(8, 4), batch_size=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


QUIET = {
    "accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False,
    "log_every_n_steps": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # put back when the test is over
        monkeypatch.setenv(name, "0")


def cli(*words: str, **kwargs: Any) -> L.LightningCLI:
    return L.LightningCLI(Small, args=list(words), trainer_defaults=dict(QUIET), **kwargs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  lr: 0.1\n  widht: 3\n", ["model.widht is written in run.yaml:3.", "Did you mean 'width'?"]),
        ("modle:\n  lr: 0.1\n", ["run.yaml:2", "Did you mean 'model'?"]),
        ("trainer:\n  max_epochs: many\n", ["trainer.max_epochs is written in run.yaml:2.", "<class 'int'>", "many"]),
        ("model:\n  lr: fast\n", ["model.lr is written in run.yaml:2.", "Expected a <class 'float'>", "fast"]),
        ("trainer:\n  callbacks:\n  - class_path: EarlyStoping\n", ["run.yaml:3", "Did you mean 'EarlyStopping'?"]),
        (
            "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args:\n      moniter: loss\n",
            ["trainer.callbacks.moniter is written in run.yaml:5.", "Did you mean 'monitor'?"],
        ),
        ("model:\n  encoder:\n    class_path: torch.nn.Relu\n", ["run.yaml:3", "Did you mean 'ReLU'?"]),
        ("trainer:\n  callbacks: [\n", ["It is run.yaml:3: "]),
    ],
)
def test_y5_an_error_in_a_config_says_file_line_key_type_and_the_closest_name(
    text: str, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        cli("fit", "--config", "run.yaml")
    message = capsys.readouterr().err
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--model.widht=3"], "Did you mean '--model.width'?"),
        (["fit", "--model.lr=fast"], "model.lr is from the command line (--model.lr)."),
        (["fitt"], "Did you mean 'fit'?"),
        (["fit", "--optimizer=Adm"], "Did you mean 'Adam'?"),
    ],
)
def test_y5_an_error_on_the_command_line_says_the_closest_name(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli(*words)
    assert said in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::leyden.errors.LeydenWarning")  # another folder, another fit: not the matter here
def test_y6_the_command_line_goes_ahead_of_files_these_of_the_checkpoint_and_that_of_defaults(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("first.yaml").write_text("model:\n  lr: 0.2\n  width: 3\n  depth: 5\ntrainer:\n  default_root_dir: first\n")
    cli("fit", "--config", "first.yaml")
    (checkpoint,) = Path("first").rglob("*.ckpt")
    Path("run.yaml").write_text("model:\n  lr: 0.3\n")
    words = ["fit", "--config=run.yaml", "--model.depth=1", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=2"]
    with pytest.raises(SystemExit) as end:
        cli(*words, "--print_config=origins")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    lines = {line.split(":")[0].strip(): line for line in printed.splitlines() if "#" in line}
    assert lines["depth"].split("#")[0].split() == ["depth:", "1"]  # its default, but said on the command line
    assert lines["depth"].endswith("# command line (--model.depth)")
    assert lines["lr"].endswith("# run.yaml:2")
    assert lines["lr"].split()[1] == "0.3"
    assert lines["width"].endswith(f"# checkpoint {checkpoint}")
    assert lines["width"].split()[1] == "3"
    assert lines["max_steps"].endswith("# default")
    assert yaml.safe_load(printed)["model"] == {"lr": 0.3, "width": 3, "depth": 1, "encoder": None}
    made = cli(*words)
    assert dict(made.model.hparams, _instantiator=0) == {
        "lr": 0.3, "width": 3, "depth": 1, "encoder": None, "_instantiator": 0,
    }  # fmt: skip
    theirs = cli(*words, "--trainer.semantics=lightning")  # there the checkpoint wins over all
    assert (theirs.model.hparams.lr, theirs.model.hparams.depth) == (0.2, 5)


def test_y7_nothing_is_read_that_nobody_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cli(run=False).config
    for place in (tmp_path, tmp_path / ".config", tmp_path / ".leyden", tmp_path / ".config" / "leyden"):
        place.mkdir(exist_ok=True)
        for name in ("config.yaml", "default_config.yaml", "leyden.yaml", "lightning.yaml", ".leyden.yaml"):
            (place / name).write_text("model:\n  lr: 99\ntrainer:\n  max_epochs: 99\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    monkeypatch.setenv("PL_MODEL__LR", "99")  # read only where the program says default_env=True
    assert cli(run=False).config == before


def test_y8_the_saved_config_makes_the_same_run_again_and_a_file_that_is_there_is_never_in_the_way() -> None:
    words = [
        "fit",
        "--model.lr=0.3",
        "--model.encoder=torch.nn.ReLU",
        "--seed_everything=5",
        "--trainer.callbacks=EarlyStopping",
    ]
    words += ["--trainer.callbacks.monitor=loss", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    words += ["--trainer.default_root_dir=runs"]
    first = cli(*words)
    saved = Path("runs/config.yaml").read_text()
    again = L.LightningCLI(Small, args=["fit", "--config=runs/config.yaml"])
    assert again.config.fit.as_dict() | {"config": 0} == first.config.fit.as_dict() | {"config": 0}
    assert torch.equal(first.model.layer.weight, again.model.layer.weight)
    assert list(first.trainer.history) == list(again.trainer.history) != []
    assert sorted(path.name for path in Path("runs").glob("*.yaml")) == ["config.yaml"]  # it is the same: no second one
    other = cli(*words, "--model.lr=0.4")
    assert other.trainer.state.finished
    assert Path("runs/config.yaml").read_text() == saved
    assert yaml.safe_load(Path("runs/config-v1.yaml").read_text())["model"]["lr"] == 0.4
    with pytest.raises(RuntimeError, match="Aborting to avoid overwriting"):
        cli(*words, "--trainer.semantics=lightning")
