# SPDX-License-Identifier: Apache-2.0
"""``leyden ckpt``: a look into checkpoints, without running their code; what is damaged, what differs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import leyden as L
from leyden import cli, files
from leyden.callbacks import ModelCheckpoint


class Settings:
    """No plain data."""


class Model(L.LightningModule):
    def __init__(self, rate: float = 0.1, settings: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.rate)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 2), batch_size=2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    trainer = L.Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", max_epochs=2,
        callbacks=ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"),
    )  # fmt: skip
    trainer.fit(Model(settings=Settings()))
    return tmp_path


def test_show_tells_what_is_in_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(run / "epoch=1.ckpt")
    assert cli.main(["ckpt", "show", path]) == 0
    text = capsys.readouterr().out
    for part in ("written by Leyden", "format 1", "epoch 1", "global_step 4", "rate: 0.1", "settings: <pickled, not opened>",
                 "ModelCheckpoint{", "net  4 tensors  float32  52 B"):  # fmt: skip
        assert part in text
    assert cli.main(["ckpt", "show", "--json", "--depth", "2", path]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["epoch"], shown["global_step"], shown["kind"]) == (1, 4, "file")
    assert shown["weights"][0] == {
        "prefix": "net.0", "tensors": 2, "elements": 9, "bytes": 36, "dtypes": ["float32"],
        "shapes": {"net.0.weight": [3, 2], "net.0.bias": [3]},
    }  # fmt: skip
    assert shown["contents"]["state_dict"] == [4, 52]
    assert shown["not_read"] == []


class Evil:
    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({self.place!r})",)


def test_B1_show_opens_what_load_refuses_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "x": Evil(tmp_path / "owned"), "y": Settings()}, tmp_path / "a.ckpt"
    )
    assert cli.main(["ckpt", "show", str(tmp_path / "a.ckpt")]) == 0
    text = capsys.readouterr().out
    assert "not read, for they are no plain data: <builtins.eval>, <" in text
    assert "w  (2,)  float32  8 B" in text
    torch.save({"x": type("Evil", (), {"__reduce__": lambda self: (os.mkdir, ("owned",))})()}, tmp_path / "b.ckpt")
    assert cli.main(["ckpt", "show", str(tmp_path / "b.ckpt")]) == 1
    assert "mkdir', which is code" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_verify_tells_good_from_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = run / "epoch=0.ckpt", run / "epoch=1.ckpt"
    assert cli.main(["ckpt", "verify", str(good), str(bad)]) == 0
    assert capsys.readouterr().out == f"{good}: good\n{bad}: good\n"
    content = bytearray(bad.read_bytes())
    content[content.index(torch.load(bad, weights_only=True)["state_dict"]["net.0.weight"].numpy().tobytes())] ^= 1
    bad.write_bytes(content)
    assert cli.main(["ckpt", "verify", "--json", str(good), str(bad), str(run / "none.ckpt")]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["verdict"] for one in found] == ["good", "damaged", "missing"]
    assert [one["good"] for one in found] == [True, False, False]
    changed = torch.load(good, weights_only=True)
    del changed["lr_schedulers"]
    torch.save(changed, run / "changed.ckpt")
    torch.save(changed, run / "old.ckpt", _use_new_zipfile_serialization=False)
    assert cli.main(["ckpt", "verify", str(run / "changed.ckpt")]) == 1
    assert "changed since it was written ('lr_schedulers' is missing)" in capsys.readouterr().out


def test_verify_says_where_there_is_nothing_to_compare_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert cli.main(["ckpt", "verify", str(tmp_path / "old.ckpt")]) == 0
    assert "readable (it has no checksums to compare with)" in capsys.readouterr().out


def test_diff_names_what_differs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = str(run / "epoch=0.ckpt"), str(run / "epoch=1.ckpt")
    assert cli.main(["ckpt", "diff", one, one]) == 0
    assert capsys.readouterr().out == "They are the same.\n"
    assert cli.main(["ckpt", "diff", "--json", one, other]) == 1
    found = {each["what"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["epoch"]["difference"] == "0 in the first, 1 in the second"
    assert found["global_step"]["difference"] == "2 in the first, 4 in the second"
    weights = [torch.load(path, weights_only=True)["state_dict"]["net.0.weight"] for path in (one, other)]
    entry = found["state_dict['net.0.weight']"]
    assert entry["max_abs_difference"] == pytest.approx((weights[0] - weights[1]).abs().max().item())
    assert entry["elements"] == 6
    assert cli.main(["ckpt", "diff", "--tolerance", "1000", one, other]) == 1
    assert "net.0.weight" not in capsys.readouterr().out


def test_diff_of_values_of_all_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nan = float("nan")
    one = {"a": torch.tensor([1.0, nan]), "b": torch.ones(2), "c": [1, (2, nan)], "d": 1, "h": {"x": "same"}, "i": True}
    other = {"a": torch.tensor([1.0, nan]), "b": torch.ones(3), "c": [1, (3, nan)], "e": 1, "h": {"x": "same"}, "i": 1}
    for name, value in (("one", one), ("other", other)):
        files.save(value, tmp_path / f"{name}.ckpt")
    assert cli.main(["ckpt", "diff", str(tmp_path / "one.ckpt"), str(tmp_path / "other.ckpt")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "b: (2,) float32 in the first, (3,) float32 in the second",
        "c[1][0]: 2 in the first, 3 in the second",
        "d: only in the first",
        "i: True in the first, 1 in the second",
        "e: only in the second",
    ]


def test_export_takes_the_weights_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    source, target = run / "epoch=1.ckpt", run / "weights.safetensors"
    assert cli.main(["ckpt", "export", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: 4 tensors.\n"
    model = Model()
    L.load_weights(target, model)
    assert torch.equal(model.net[0].weight, torch.load(source, weights_only=True)["state_dict"]["net.0.weight"])


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(folder: Path) -> None:
        torch.save({"state_dict": {"w": torch.ones(2)}, "leyden": {"format": 1, "version": "x"}}, folder / "meta.pt")

    files.save_folder(tmp_path / "a.ckpt", write, {"global_step": 7, "epoch": 2})
    assert cli.main(["ckpt", "show", str(tmp_path / "a.ckpt")]) == 0
    assert "folder, written by Leyden x, format 1, epoch 2, global_step 7" in capsys.readouterr().out
    assert cli.main(["ckpt", "verify", str(tmp_path / "a.ckpt")]) == 0


def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ckpt", "show", str(tmp_path / "none.ckpt")]) == 1
    assert capsys.readouterr().err.startswith("leyden ckpt: There is no checkpoint")
    torch.save([1], tmp_path / "list.ckpt")
    assert cli.main(["ckpt", "show", str(tmp_path / "list.ckpt")]) == 1
    assert "holds a list, which is no checkpoint" in capsys.readouterr().err
