# SPDX-License-Identifier: Apache-2.0
"""``add_default_args``: the options of 2019 with their defaults, which a Trainer and an Experiment take."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import leyden
from leyden.compat.arguments import add_default_args


def parse(tmp_path: Path, *words: str, **more: object) -> argparse.Namespace:
    parser = leyden.HyperOptArgumentParser(add_help=False)
    add_default_args(parser, tmp_path, **more)
    return parser.parse_args(words)


def test_the_defaults_are_those_of_2019(tmp_path: Path) -> None:
    options = parse(tmp_path)
    assert (options.max_nb_epochs, options.min_nb_epochs, options.val_check_interval) == (200, 2, 0.95)
    assert (options.tt_name, options.tt_save_path) == ("pt_test", str(tmp_path / "test_tube_logs"))
    assert (options.enable_early_stop, options.early_stop_metric, options.early_stop_patience) == (True, "val_acc", 3)
    assert (options.gpus, options.use_amp, options.overfit, options.on_cluster) == (None, False, -1, False)
    assert options.model_save_path == f"{tmp_path}/model_weights"
    assert not {"model_name", "random_seed"} & set(vars(options))


def test_the_options_are_read(tmp_path: Path) -> None:
    words = ["--max_nb_epochs", "3", "--disable_early_stop", "--enable_single_run", "-en", "mine", "--random_seed", "7"]
    options = parse(tmp_path, *words, rand_seed=1, possible_model_names=["a", "b"])
    assert (options.max_nb_epochs, options.enable_early_stop, options.single_run) == (3, False, True)
    assert (options.tt_name, options.random_seed, options.model_name) == ("mine", 7, "")


@pytest.mark.parametrize("kind", [argparse.ArgumentParser, leyden.HyperOptArgumentParser])
def test_any_parser_takes_them(kind: type, tmp_path: Path) -> None:
    parser = kind()
    add_default_args(parser, str(tmp_path))
    assert "--nb_hopt_trials" in parser.format_help()
