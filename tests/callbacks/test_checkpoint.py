# SPDX-License-Identifier: Apache-2.0
"""Tests of ModelCheckpoint: Lightning's results where they are good, and the promises K1 to K5, C3 and C4."""

from __future__ import annotations

import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.callbacks import Callback, Checkpoint, ModelCheckpoint
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.types import TrainerFn

RECORDED = json.loads(Path(__file__).with_name("recorded_with_lightning_2_6_6.json").read_text())
LOSSES = [0.9, 0.5, 0.7, 0.3, 0.6, 0.2, 0.8, 0.1, 0.4, 0.35]
NANS = [math.nan, 0.5, math.nan, 0.3]


def metrics_of_the_recording():
    counts = {"batch": 0, "validation": 0, "epoch": 0}

    def metrics(when: str, trainer: Any) -> dict[str, float]:
        n = counts[when]
        counts[when] += 1
        if when == "validation":
            return {"val": LOSSES[n % 10], "nan": NANS[n % 4], "val/acc": 1 - LOSSES[n % 10]}
        return {"loss": LOSSES[n % 10]} if when == "batch" else {}

    return metrics


def metrics_by_step(when: str, trainer: Any) -> dict[str, float]:
    """The same values for the same step, whether or not the run was killed in between."""
    if when == "validation":
        return {"val": LOSSES[(7 * trainer.global_step) % 10]}
    return {"loss": LOSSES[(3 * trainer.global_step) % 10]} if when == "batch" else {}


def steps_in(folder: Path | str) -> dict[str, int]:
    """From the name of each checkpoint in ``folder`` to the step that it holds."""
    found = sorted(path for path in Path(folder).rglob("*.ckpt"))
    return {
        path.relative_to(folder).as_posix(): torch.load(path, weights_only=True)["global_step"]
        for path in found
        if path.exists()
    }


def number(value: Any) -> float | None:
    return None if value is None else round(float(value), 5)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("case", RECORDED)
def test_same_files_and_attributes_as_lightning(case, async_save, make_trainer, tmp_path):
    recorded = RECORDED[case]
    callback = ModelCheckpoint(**recorded["callback"], async_save=async_save)
    make_trainer([callback], metrics=metrics_of_the_recording(), **recorded["trainer"]).fit()
    expected = dict(recorded["result"])
    if case == "epochs2_last":  # K1: the last checkpoint is that of the last step
        expected["files"]["last.ckpt"] = [20, False]
    if case == "steps_val_halves":  # K2: step 6 validates, and is ranked by that validation
        expected |= {"score": 0.7, "cur": 0.7, "k": {**expected["k"], "epoch=1-step=6.ckpt": 0.7}}

    def relative(path):
        return os.path.relpath(path, callback.dirpath) if path else path

    links = {name: os.path.islink(Path(callback.dirpath, name)) for name in steps_in(callback.dirpath)}
    actual = {
        "dir": os.path.relpath(callback.dirpath, tmp_path),
        "files": {name: [step, links[name]] for name, step in steps_in(callback.dirpath).items()},
        "best": relative(callback.best_model_path),
        "score": number(callback.best_model_score),
        "k": {relative(path): number(score) for path, score in callback.best_k_models.items()},
        "kth": relative(callback.kth_best_model_path),
        "last": relative(callback.last_model_path),
        "cur": number(callback.current_score),
        "key": callback.state_key,
    }
    assert actual == {name: expected[name] for name in actual}


def test_defaults_and_marks():
    callback = ModelCheckpoint()
    assert isinstance(callback, Checkpoint)
    assert isinstance(callback, Callback)
    assert (callback.order, callback.monitors) == (100, True)
    assert (callback.every_n_epochs, callback.save_top_k, callback.mode) == (1, 1, "min")
    assert list(callback.state_dict())[:9] == [
        "monitor",
        "best_model_score",
        "best_model_path",
        "current_score",
        "dirpath",
        "best_k_models",
        "kth_best_model_path",
        "kth_value",
        "last_model_path",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "maximum"}, r"mode='maximum'"),
        ({"save_top_k": -2}, r"save_top_k=-2"),
        ({"save_top_k": 3}, r"monitor=None"),
        ({"save_last": "links"}, r"Did you mean 'link'\?"),
        ({"every_n_train_steps": -1}, r"every_n_train_steps=-1"),
        ({"every_n_epochs": -1}, r"every_n_epochs=-1"),
        ({"every_n_epochs": 1, "every_n_train_steps": 2}, r"should be mutually exclusive"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(0)}, r"should be mutually exclusive"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(MisconfigurationException, match=says):
        ModelCheckpoint(**arguments)


def test_folder(make_trainer, make_logger, tmp_path):
    trainer = make_trainer([callback := ModelCheckpoint()])
    trainer.loggers = [make_logger("logs"), make_logger("other")]
    callback.setup(trainer, None, "validate")
    assert callback.dirpath == os.path.join("logs", "run", "version_3", "checkpoints")
    trainer.loggers = [make_logger(None)]
    trainer.loggers[0].version = "night"
    callback = ModelCheckpoint()
    callback.setup(trainer, None, "fit")
    assert callback.dirpath == str(tmp_path / "run" / "night" / "checkpoints")
    assert ModelCheckpoint("~/x").dirpath == os.path.realpath(os.path.expanduser("~/x"))
    assert ModelCheckpoint("s3://bucket/x").dirpath == "s3://bucket/x"
    with pytest.raises(ValueError, match="local folder"):
        ModelCheckpoint("s3://bucket/x", save_last="link").setup(trainer, None, "fit")


def test_format_checkpoint_name(tmp_path):
    callback = ModelCheckpoint(tmp_path, "{epoch:03d}-{val/loss:.2f}-{a.b}")
    name = callback.format_checkpoint_name({"epoch": torch.tensor(3), "val/loss": torch.tensor(0.128), "a.b": 1})
    assert name == str(tmp_path / "epoch=003-val/loss=0.13-a.b=1.ckpt")
    callback = ModelCheckpoint(filename="{epoch}")
    assert (
        callback.format_checkpoint_name({"epoch": 1}, filename="{missing:d}", ver=2, prefix="p")
        == "p-missing=0-v2.ckpt"
    )
    assert (
        callback.format_checkpoint_name({"epoch": 1, "epoch_test": 2}, "{epoch}{epoch_test}")
        == "epoch=1epoch_test=2.ckpt"
    )
    callback.CHECKPOINT_JOIN_CHAR, callback.CHECKPOINT_EQUALS_CHAR, callback.FILE_EXTENSION = "+", ":", ".pt"
    callback.filename = None
    assert callback.format_checkpoint_name({"epoch": 1, "step": 2}, ver=1) == "epoch:1+step:2+v1.pt"


def test_nothing_is_saved_outside_of_training(make_trainer):
    callback = ModelCheckpoint(save_last=True, every_n_train_steps=1, save_on_exception=True)
    trainer = make_trainer([callback], sanity=True)
    trainer.fast_dev_run = True
    trainer.fit()
    assert trainer.events == [f"batch {n}" for n in range(8)]
    trainer = make_trainer([ModelCheckpoint()])
    trainer.state.fn = TrainerFn.VALIDATING
    trainer.call("on_validation_end")
    assert trainer.events == []
    trainer = make_trainer([ModelCheckpoint()], sanity=True, epochs=0)
    trainer.fit()
    assert trainer.events == []


def test_time_interval(make_trainer, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def metrics(when, trainer):
        now[0] += when == "batch"
        return {}

    callback = ModelCheckpoint(train_time_interval=timedelta(seconds=3), save_top_k=-1)
    trainer = make_trainer([callback], metrics=metrics, batches=4, epochs=2)
    trainer.fit()
    assert steps_in(callback.dirpath) == {"epoch=0-step=3.ckpt": 3, "epoch=1-step=6.ckpt": 6}


def test_several_updates_in_one_batch_do_not_step_over_the_interval(make_trainer):
    callback = ModelCheckpoint(every_n_train_steps=5, save_top_k=-1)

    def metrics(when, trainer):
        trainer.global_step += when == "batch"  # two updates a batch
        return {}

    make_trainer([callback], metrics=metrics, batches=8, epochs=1).fit()
    assert sorted(steps_in(callback.dirpath).values()) == [6, 10, 16]


def test_hooks_that_are_not_needed(make_trainer):
    class Mine(ModelCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None: ...

    trainer = make_trainer()
    assert ModelCheckpoint().unused_hooks(trainer) == {"on_train_batch_end"}
    assert ModelCheckpoint(every_n_train_steps=1).unused_hooks(trainer) == frozenset()
    assert ModelCheckpoint(train_time_interval=timedelta(0)).unused_hooks(trainer) == frozenset()
    assert Mine().unused_hooks(trainer) == frozenset()
    patched = ModelCheckpoint()
    patched.on_train_batch_end = print  # type: ignore[method-assign,assignment]
    assert patched.unused_hooks(trainer) == frozenset()
    trainer.state.fn = TrainerFn.TESTING
    assert "on_validation_end" in ModelCheckpoint().unused_hooks(trainer)


def test_loggers_hear_of_each_file(make_trainer, make_logger):
    callback = ModelCheckpoint(save_last=True)
    trainer = make_trainer([callback])
    trainer.loggers = [make_logger(str(trainer.default_root_dir)), make_logger(None)]
    trainer.fit()
    assert [len(logger.told) for logger in trainer.loggers] == [4, 4]
    assert trainer.loggers[0].told[0] is callback


def test_verbose(make_trainer, capsys, caplog):
    callback = ModelCheckpoint(monitor="val", verbose=True)
    with caplog.at_level("INFO", logger="leyden"):
        make_trainer([callback], epochs=3, metrics=metrics_of_the_recording()).fit()
    text = caplog.text + capsys.readouterr().err
    assert "Epoch 1, global step 8: 'val' reached 0.50000 (best 0.50000)" in text
    assert "Epoch 2, global step 12: 'val' was not in top 1" in text


def test_to_yaml(make_trainer, tmp_path):
    yaml = pytest.importorskip("yaml")
    callback = ModelCheckpoint(monitor="val", save_top_k=2)
    make_trainer([callback], epochs=3, metrics=metrics_of_the_recording()).fit()
    callback.to_yaml()
    callback.to_yaml(tmp_path / "x.yaml")
    expected = {path: score.item() for path, score in callback.best_k_models.items()}
    assert yaml.safe_load(Path(callback.dirpath, "best_k_models.yaml").read_text()) == expected
    assert yaml.safe_load((tmp_path / "x.yaml").read_text()) == expected


def test_metric_that_is_overwritten_in_place_keeps_its_old_rank(make_trainer):
    shared = torch.tensor(0.0)

    class Overwriting(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            shared.fill_(LOSSES[trainer.current_epoch])
            trainer.callback_metrics["val"] = shared

    callback = ModelCheckpoint(monitor="val", save_top_k=2)
    make_trainer([Overwriting(), callback], epochs=4).fit()
    assert sorted(number(score) for score in callback.best_k_models.values()) == [0.3, 0.5]


# K1 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("save_last", [True, "link"])
@pytest.mark.parametrize("how", ["normal", "exception", "ctrl-c", "stopped", "exception while validating"])
def test_K1_last_is_the_state_after_the_last_step(how, save_last, async_save, make_trainer):
    callback = ModelCheckpoint(monitor="val", save_last=save_last, every_n_train_steps=5, async_save=async_save)

    def metrics(when, trainer):
        if how == "stopped" and trainer.global_step == 7:
            trainer.should_stop = True
        if how == "exception while validating" and when == "validation" and trainer.global_step == 8:
            raise ZeroDivisionError
        return metrics_by_step(when, trainer)

    trainer = make_trainer([callback], epochs=3, metrics=metrics)
    errors = {"exception": ZeroDivisionError("x"), "ctrl-c": KeyboardInterrupt()}
    if how in errors:
        trainer.fails["batch 7"] = errors[how]
    if how in ("normal", "stopped"):
        trainer.fit()
    else:
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            trainer.fit()
    step = {"normal": 12, "exception while validating": 8}.get(how, 7)
    assert steps_in(callback.dirpath)["last.ckpt"] == step == trainer.global_step
    assert callback.last_model_path == str(Path(callback.dirpath, "last.ckpt"))


def test_K1_a_failing_save_does_not_replace_the_exception(make_trainer):
    callback = ModelCheckpoint(save_last=True)
    trainer = make_trainer([callback])
    trainer.fails = {"batch 2": ZeroDivisionError("mine"), "save last.ckpt": OSError("disk full")}
    with pytest.warns(LeydenWarning, match="disk full"), pytest.raises(ZeroDivisionError, match="mine"):
        trainer.fit()
    assert callback.last_model_path == ""
    assert callback.files == ()


def test_K1_nothing_is_saved_for_an_exception_before_the_first_step(make_trainer):
    trainer = make_trainer([ModelCheckpoint(save_last=True, save_on_exception=True)], sanity=True)
    trainer.fails = {"batch 0": ZeroDivisionError("mine")}
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert trainer.events == ["batch 0"]


def test_K1_one_failing_process_does_not_make_the_others_wait(make_trainer):
    trainer = make_trainer([ModelCheckpoint(save_last=True)])
    trainer.world_size = trainer.strategy.world_size = 2
    trainer.fails = {"batch 2": ZeroDivisionError("mine")}
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    assert trainer.events == ["batch 0", "batch 1", "batch 2"]


@pytest.mark.parametrize("save_last", [None, True, "link"])
def test_save_on_exception(save_last, make_trainer, caplog):
    callback = ModelCheckpoint(save_on_exception=True, save_last=save_last, filename="best")
    trainer = make_trainer([callback])
    trainer.fails = {"batch 6": ZeroDivisionError("mine")}
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    # not over the file that is there: it may be the best one
    expected = {"best.ckpt": 4, "best-v1.ckpt": 6} | ({"last.ckpt": 6} if save_last else {})
    assert steps_in(callback.dirpath) == expected


# K2, K3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("val_check_interval", [1.0, 0.5, 2])
def test_K2_a_step_that_validates_is_ranked_by_that_validation(val_check_interval, make_trainer):
    callback = ModelCheckpoint(monitor="val", every_n_train_steps=2, save_top_k=-1, filename="{step}-{val}")
    seen = {}

    def metrics(when, trainer):
        if when == "validation":
            seen[trainer.global_step] = len(seen) + 0.5
            return {"val": seen[trainer.global_step]}
        return {}

    make_trainer([callback], val_check_interval=val_check_interval, metrics=metrics).fit()
    assert {8: seen[8], 4: seen[4]}.items() <= {
        step: float(name.split("val=")[1].removesuffix(".ckpt")) for name, step in steps_in(callback.dirpath).items()
    }.items()


def test_K3_last_never_links_to_an_older_or_deleted_file(make_trainer, monkeypatch):
    callback = ModelCheckpoint(monitor="val", save_last="link", save_top_k=1)
    trainer = make_trainer([callback], epochs=10, metrics=metrics_of_the_recording())
    happens = trainer.happens

    def checked(event: str) -> None:
        if event.startswith("delete"):
            assert steps_in(callback.dirpath)["last.ckpt"] == trainer.global_step
            deleted = Path(callback.dirpath, event.removeprefix("delete "))
            assert Path(callback.dirpath, "last.ckpt").resolve() != deleted.resolve()
        happens(event)

    monkeypatch.setattr(trainer, "happens", checked)

    class Checks(Callback):
        order, monitors = 101, True

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            last = Path(callback.dirpath, "last.ckpt")
            assert steps_in(callback.dirpath)["last.ckpt"] == trainer.global_step
            in_top = float(callback.current_score) == LOSSES[trainer.current_epoch % 10]
            assert last.is_symlink() or not in_top

    trainer.callbacks.append(Checks())
    trainer.fit()
    assert any(event.startswith("delete") for event in trainer.events)


def test_K3_where_links_cannot_be_made_last_is_a_copy(make_trainer, monkeypatch):
    def refuse(*args: Any) -> None:
        raise OSError("privilege")

    monkeypatch.setattr(os, "symlink", refuse)
    callback = ModelCheckpoint(save_last="link")
    make_trainer([callback]).fit()
    assert steps_in(callback.dirpath) == {"epoch=1-step=8.ckpt": 8, "last.ckpt": 8}
    assert not Path(callback.dirpath, "last.ckpt").is_symlink()


# K4, C3, C4 ----------------------------------------------------------------------------------------------------------

SETUPS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "newest and last": ([{"save_last": True}], {}),
    "top 2 and last": ([{"monitor": "val", "save_top_k": 2, "save_last": True}], {"epochs": 5}),
    "top 2 under one name": (
        [{"monitor": "val", "save_top_k": 2, "filename": "best", "save_last": True}],
        {"epochs": 5},
    ),
    "all under one name": (
        [{"filename": "{epoch}", "every_n_train_steps": 2, "save_top_k": -1, "save_last": True}],
        {},
    ),
    "steps, link": (
        [{"every_n_train_steps": 3, "save_last": "link", "monitor": "val", "save_top_k": 2}],
        {"epochs": 4},
    ),
    "halves": ([{"monitor": "val", "save_last": True}], {"val_check_interval": 0.5}),
    "two in one folder": (
        [{"monitor": "val", "filename": "x", "save_last": True}, {"monitor": "loss", "mode": "max", "filename": "x"}],
        {"epochs": 4},
    ),
}


def newest(folder: Path) -> str | None:
    steps = steps_in(folder)
    # of two with the same step the last checkpoint: it is written after the other
    best = max(steps, key=lambda name: (steps[name], name == "last.ckpt"), default=None)
    return None if best is None else str(folder / best)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("setup", SETUPS)
def test_K4_killed_anywhere_and_resumed_gives_the_same_files(setup, async_save, make_trainer, kill, tmp_path):
    callbacks, arguments = SETUPS[setup]

    def run(fails: str | None = None, resume: bool = False) -> Any:
        built = [ModelCheckpoint(tmp_path / "ckpts", **each, async_save=async_save) for each in callbacks]
        trainer = make_trainer(built, metrics=metrics_by_step, **arguments)
        if fails is not None:
            event, count = fails.rsplit("#", 1)
            happens, seen = trainer.happens, [int(count)]

            def counted(name: str) -> None:
                seen[0] -= name == event
                if seen[0] == 0 and name == event:
                    raise kill
                happens(name)

            trainer.happens = counted
            with pytest.raises(kill):
                trainer.fit()
        else:
            trainer.fit(newest(tmp_path / "ckpts") if resume else None)
        return trainer

    def clear() -> None:
        for path in (tmp_path / "ckpts").iterdir():
            path.unlink()

    events = run().events
    expected = steps_in(tmp_path / "ckpts")
    moments = [f"{event}#{events[: index + 1].count(event)}" for index, event in enumerate(events)]
    moments = [moment for moment in moments if not moment.startswith("batch")]
    assert len(moments) >= 6
    for moment in moments:
        clear()
        run(moment)
        came_from = newest(tmp_path / "ckpts")
        run(resume=came_from is not None)
        actual = steps_in(tmp_path / "ckpts")
        if len(callbacks) == 1:
            assert actual == expected, moment
        # what one callback saved says nothing of what the other would have saved a moment later
        assert set(actual) == set(expected), moment


def test_the_file_that_the_user_named_to_resume_from_stays(make_trainer, tmp_path):
    make_trainer([ModelCheckpoint(tmp_path)], epochs=1).fit()
    make_trainer([ModelCheckpoint(tmp_path)], epochs=3).fit(str(tmp_path / "epoch=0-step=4.ckpt"), named=True)
    assert steps_in(tmp_path) == {"epoch=0-step=4.ckpt": 4, "epoch=2-step=12.ckpt": 12}
    make_trainer([ModelCheckpoint(tmp_path)], epochs=4).fit(str(tmp_path / "epoch=2-step=12.ckpt"))
    assert steps_in(tmp_path) == {"epoch=0-step=4.ckpt": 4, "epoch=3-step=16.ckpt": 16}


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("setup", SETUPS)
def test_C3_a_file_is_deleted_only_after_its_successor_is_written(
    setup, async_save, make_trainer, monkeypatch, tmp_path
):
    callbacks, arguments = SETUPS[setup]
    trainer = make_trainer(
        [ModelCheckpoint(tmp_path / "ckpts", **each, async_save=async_save) for each in callbacks],
        metrics=metrics_by_step,
        **arguments,
    )
    happens = trainer.happens
    complete: list[int] = [0]

    def checked(event: str) -> None:
        happens(event)
        if event.startswith("saved"):
            complete.append(steps_in(tmp_path / "ckpts")[event.removeprefix("saved ")])
        if event.startswith("delete"):
            assert max(complete) in steps_in(tmp_path / "ckpts").values()
            if not async_save:
                assert max(complete) == trainer.global_step

    monkeypatch.setattr(trainer, "happens", checked)
    trainer.fit()


def test_C4_files_of_other_runs_are_left_alone(make_trainer, tmp_path):
    make_trainer([ModelCheckpoint(tmp_path / "ckpts", save_last=True, save_top_k=-1)]).fit()
    before = {path: path.read_bytes() for path in (tmp_path / "ckpts").iterdir()}
    callback = ModelCheckpoint(tmp_path / "ckpts", save_last=True)
    with pytest.warns(LeydenWarning, match=r"holds 3 checkpoint\(s\) of other runs"):
        make_trainer([callback], epochs=3).fit()
    assert {path: path.read_bytes() for path in before} == before
    assert set(steps_in(tmp_path / "ckpts")) - {path.name for path in before} == {
        "epoch=2-step=12.ckpt",
        "last-v1.ckpt",
    }
    assert callback.best_model_path.endswith("epoch=2-step=12.ckpt")


def test_C4_a_resumed_run_leaves_alone_what_others_put_there(make_trainer, kill, tmp_path):
    """Two runs share a folder; one is killed, and the other takes the name that it would have used next."""
    first = make_trainer([ModelCheckpoint(tmp_path, filename="a{epoch}", save_top_k=-1)], epochs=3)
    first.fails = {"batch 4": kill()}
    with pytest.raises(kill):
        first.fit()
    with pytest.warns(LeydenWarning, match="of other runs"):
        make_trainer([ModelCheckpoint(tmp_path, filename="a{epoch}", save_top_k=-1)], epochs=2).fit()
    theirs = tmp_path / "aepoch=1.ckpt"
    content = theirs.read_bytes()
    resumed = make_trainer([ModelCheckpoint(tmp_path, filename="a{epoch}", save_top_k=-1)], epochs=3)
    resumed.fit(str(tmp_path / "aepoch=0.ckpt"))
    assert theirs.read_bytes() == content
    assert set(steps_in(tmp_path)) == {
        "aepoch=0.ckpt",
        "aepoch=0-v1.ckpt",
        "aepoch=1.ckpt",
        "aepoch=1-v1.ckpt",
        "aepoch=2.ckpt",
    }


def test_C4_nothing_outside_the_folder_is_deleted_whatever_a_checkpoint_says(make_trainer, tmp_path):
    precious = tmp_path / "thesis.ckpt"
    torch.save({"global_step": 0}, precious)
    callback = ModelCheckpoint(tmp_path / "ckpts")
    trainer = make_trainer([callback])
    callback.setup(trainer, None, "fit")
    state = callback.state_dict()
    state["run"]["doomed"] = [str(precious), str(tmp_path / "ckpts" / ".." / "thesis.ckpt")]
    state["run"]["files"] = [str(precious)]
    state["best_model_path"] = str(precious)
    callback.load_state_dict(state)
    trainer.fit()
    assert precious.exists()


def test_C4_without_version_counter_files_are_overwritten(make_trainer, tmp_path):
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts" / "x.ckpt").write_bytes(b"theirs")
    with pytest.warns(LeydenWarning, match="of other runs"):
        make_trainer([ModelCheckpoint(tmp_path / "ckpts", "x", enable_version_counter=False)]).fit()
    assert steps_in(tmp_path / "ckpts") == {"x.ckpt": 8}


def test_a_failed_save_is_not_in_the_books(make_trainer):
    callback = ModelCheckpoint(monitor="val", save_top_k=1, save_last=True)
    trainer = make_trainer([callback], metrics=metrics_of_the_recording())
    trainer.fails = {"save epoch=1-step=8.ckpt": OSError("disk full")}
    with pytest.raises(OSError, match="disk full"):
        trainer.fit()
    assert callback.best_model_path.endswith("epoch=0-step=4.ckpt")
    assert Path(callback.best_model_path).exists()
    assert steps_in(callback.dirpath) == {"epoch=0-step=4.ckpt": 4, "last.ckpt": 8}
    saved = torch.load(callback.last_model_path, weights_only=True)["callbacks"][callback.state_key]
    assert saved["best_model_path"] == callback.best_model_path


def test_second_fit_goes_on_with_the_same_names(make_trainer):
    callback = ModelCheckpoint(save_last=True, save_top_k=-1)
    trainer = make_trainer([callback], epochs=1)
    trainer.fit()
    trainer.max_epochs = 2
    trainer.fit()
    assert steps_in(callback.dirpath) == {"epoch=0-step=4.ckpt": 4, "epoch=1-step=8.ckpt": 8, "last.ckpt": 8}


def test_state_in_another_folder(make_trainer, tmp_path):
    first = ModelCheckpoint(tmp_path / "a", monitor="val", save_last=True)
    make_trainer([first], metrics=metrics_of_the_recording()).fit()
    second = ModelCheckpoint(tmp_path / "b", monitor="val", save_last=True)
    with pytest.warns(LeydenWarning, match="has changed"):
        second.load_state_dict(first.state_dict())
    assert second.best_model_path == first.best_model_path
    assert (second.best_k_models, second.last_model_path, second.files) == ({}, "", ())


def test_state_written_by_lightning(make_trainer, tmp_path):
    first = ModelCheckpoint(tmp_path / "a", monitor="val", save_last=True)
    make_trainer([first], metrics=metrics_of_the_recording()).fit()
    state = first.state_dict()
    del state["run"]
    second = ModelCheckpoint(tmp_path / "a", monitor="val", save_last=True)
    second.load_state_dict(state)
    assert set(second.files) == set(first.files)
    assert second.best_k_models == first.best_k_models
    assert (second.kth_value, second.best_model_score) == (first.kth_value, first.best_model_score)


# K5 ------------------------------------------------------------------------------------------------------------------


def log_val(when: str, trainer: Any) -> dict[str, float]:
    return {"val/loss": 1.0} if when == "validation" else {}


@pytest.mark.parametrize("save_on_train_epoch_end", [None, True, False])
@pytest.mark.parametrize("trigger", [{}, {"every_n_train_steps": 1}, {"train_time_interval": timedelta(0)}])
def test_K5_a_monitor_that_is_never_logged(trigger, save_on_train_epoch_end, make_trainer):
    callback = ModelCheckpoint(monitor="val_loss", save_on_train_epoch_end=save_on_train_epoch_end, **trigger)
    trainer = make_trainer([callback], metrics=log_val)
    with pytest.raises(MisconfigurationException, match=r"returned metrics: 'val/loss'. Did you mean 'val/loss'\?"):
        trainer.fit()
    assert (trainer.current_epoch, trainer.events[-1]) == (0, "batch 3")


def test_K5_without_validation_the_end_of_the_first_epoch_tells(make_trainer):
    for trigger in ({}, {"every_n_train_steps": 1}):
        trainer = make_trainer([ModelCheckpoint(monitor="los", **trigger)], val_batches=0)
        with pytest.raises(MisconfigurationException, match="returned metrics: nothing"):
            trainer.fit()
        assert trainer.current_epoch == 0


def test_K5_an_epoch_without_end_and_without_validation(make_trainer):
    trainer = make_trainer([ModelCheckpoint(monitor="loss", every_n_train_steps=3)], val_batches=0, batches=math.inf)
    with pytest.raises(MisconfigurationException, match="never|could not find the monitored key"):
        trainer.fit()
    assert trainer.events[-1] == "batch 2"


def test_K5_waits_for_the_first_validation(make_trainer):
    callback = ModelCheckpoint(monitor="val/loss", save_on_train_epoch_end=True, save_top_k=-1, filename="{epoch}")
    trainer = make_trainer([callback], epochs=4, check_val_every_n_epoch=3, metrics=log_val)
    with pytest.warns(LeydenWarning, match="until a validation has run"):
        trainer.fit()
    assert list(steps_in(callback.dirpath)) == ["epoch=2.ckpt", "epoch=3.ckpt"]


def test_K5_never_in_place_of_an_exception(make_trainer):
    trainer = make_trainer([ModelCheckpoint(monitor="nope", save_last=True, save_on_exception=True)])
    trainer.fails = {"batch 2": ZeroDivisionError("mine")}
    with pytest.raises(ZeroDivisionError, match="mine"):
        trainer.fit()


def test_K5_a_metric_logged_at_the_end_of_the_epoch_is_awaited(make_trainer):
    callback = ModelCheckpoint(monitor="train", every_n_train_steps=4, save_top_k=-1)
    metrics = {"epoch": {"train": 1.0}}
    make_trainer([callback], metrics=lambda when, trainer: metrics.get(when, {})).fit()
    assert list(steps_in(callback.dirpath).values()) == [4, 8]
