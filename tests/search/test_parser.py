# SPDX-License-Identifier: Apache-2.0
"""HyperOptArgumentParser: what it parses, and the trials that come of it. The rows of 2019, one test each."""

from __future__ import annotations

import argparse
import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leyden
from leyden.errors import LeydenWarning, MisconfigurationException
from leyden.runtime.seed import seed_everything
from leyden.search import HyperOptArgumentParser


def make(strategy: str = "grid_search", **kwargs: Any) -> HyperOptArgumentParser:
    parser = HyperOptArgumentParser(strategy, **kwargs)
    parser.add_argument("--epochs", default=3, type=int)
    parser.opt_list("--units", default=8, type=int, tunable=True, options=[8, 16])
    parser.opt_list("--name", default="net", type=str, tunable=False, options=["net", "other"])
    parser.opt_range("--learning-rate", "-l", default=0.02, type=float, tunable=True, low=0.1, high=0.3, nb_samples=3)
    return parser


@pytest.fixture
def config(tmp_path: Path) -> Callable[[Any], str]:
    def write(content: Any) -> str:
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def test_hyperoptargumentparser_is_an_argumentparser_and_a_top_level_name() -> None:
    assert issubclass(HyperOptArgumentParser, argparse.ArgumentParser)
    assert leyden.HyperOptArgumentParser is HyperOptArgumentParser
    parser = HyperOptArgumentParser(prog="train", description="d")
    assert (parser.prog, parser.strategy) == ("train", "grid_search")


def test_parse_args_gives_the_defaults_and_what_the_command_line_says() -> None:
    hparams = make().parse_args(["--units", "32", "-l", "0.5"])
    assert vars(hparams) == {"epochs": 3, "units": 32, "name": "net", "learning_rate": 0.5}
    assert isinstance(hparams, argparse.Namespace)


@pytest.mark.parametrize("strategy", ["bayes", "grid", None])
def test_strategy_must_be_one_of_two(strategy: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"strategy=.*'grid_search' or 'random_search'"):
        HyperOptArgumentParser(strategy)


def test_strategy_grid_search() -> None:
    trials = make("grid_search").parse_args([]).generate_trials()
    assert [(t.units, t.learning_rate) for t in trials] == [(u, x) for u in (8, 16) for x in (0.1, 0.2, 0.3)]


def test_strategy_random_search_is_seedable() -> None:
    def draw(**kwargs: Any) -> list[Any]:
        return make("random_search", **kwargs).parse_args([]).generate_trials(5)

    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    seed_everything(4, verbose=False)
    first = draw()
    seed_everything(4, verbose=False)
    assert draw() == first


def test_opt_list() -> None:
    parser = HyperOptArgumentParser()
    parser.opt_list("--a", default=1, type=int, tunable=True, options=[5, 6])
    parser.opt_list("--b", default=2, type=int, options=[7, 8])
    trials = parser.parse_args(["--a", "9"]).generate_trials()
    assert [vars(trial) for trial in trials] == [{"a": 5, "b": 2}, {"a": 6, "b": 2}]


def test_opt_range() -> None:
    parser = HyperOptArgumentParser()
    parser.opt_range("--a", default=1, type=int, tunable=True, low=1, high=9, nb_samples=3)
    parser.opt_range("--b", default=0.5, tunable=False, low=0.0, high=1.0)
    hparams = parser.parse_args(["--b", "0.25"])
    assert [vars(trial) for trial in hparams.generate_trials()] == [{"a": a, "b": 0.25} for a in (1, 5, 9)]


def test_opt_range_nb_samples_defaults_to_ten() -> None:
    parser = HyperOptArgumentParser()
    parser.opt_range("--a", tunable=True, low=0.0, high=9.0)
    assert [t.a for t in parser.parse_args([]).generate_trials()] == [float(a) for a in range(10)]


def test_opt_range_log_base() -> None:
    parser = HyperOptArgumentParser()
    parser.opt_range("--a", type=float, tunable=True, low=0.001, high=10, nb_samples=5, log_base=10)
    assert [t.a for t in parser.parse_args([]).generate_trials()] == [0.001, 0.01, 0.1, 1.0, 10.0]


def test_opt_range_low_and_high_are_checked_when_they_are_given() -> None:
    with pytest.raises(MisconfigurationException, match=r"--lr.*low=1.*high=0.*less than"):
        HyperOptArgumentParser().opt_range("--lr", default=0.1, type=float, low=1.0, high=0.1, tunable=True)


def test_tunable_without_options_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="--lr.*list of values"):
        HyperOptArgumentParser().opt_list("--lr", tunable=True)


def test_trials_yields_namespaces_with_the_tunable_values_replaced() -> None:
    hparams = make().parse_args(["--epochs", "7"])
    trials = hparams.trials(4)
    assert iter(trials) is trials
    assert [t.epochs for t in trials] == [7] * 4
    assert hparams.units == 8


def test_opt_trials_is_the_same() -> None:
    hparams = make("random_search", seed=0).parse_args([])
    assert list(hparams.opt_trials(4)) == list(hparams.trials(4)) == hparams.generate_trials(4)


def test_generate_trials_returns_a_list_of_independent_namespaces() -> None:
    parser = make()
    parser.add_argument("--sizes", nargs="*", default=[1, 2])
    trials = parser.parse_args([]).generate_trials(2)
    trials[0].sizes.append(3)
    assert isinstance(trials, list)
    assert trials[1].sizes == [1, 2]


def test_values_outside_a_search_stay_the_defaults() -> None:
    for trial in make("random_search").parse_args([]).trials(5):
        assert (trial.epochs, trial.name) == (3, "net")


def test_a_grid_with_fewer_points_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="leyden"):
        assert len(make().parse_args([]).generate_trials(50)) == 6
    assert "6 trials instead of 50" in caplog.text


def test_a_search_over_nothing_warns() -> None:
    with pytest.warns(LeydenWarning, match="tunable=True"):
        (trial,) = HyperOptArgumentParser().parse_args([]).generate_trials(4)
    assert vars(trial) == {}


def test_nb_trials_is_checked_at_once_and_not_at_the_first_trial() -> None:
    with pytest.raises(MisconfigurationException, match="nb_trials=0"):
        make().parse_args([]).trials(0)


def test_the_search_is_no_part_of_the_values() -> None:
    hparams = make().parse_args([])
    assert pickle.loads(pickle.dumps(hparams)) == hparams == copy.deepcopy(hparams)
    assert set(vars(hparams)) == {"epochs", "units", "name", "learning_rate"}
    with pytest.raises(MisconfigurationException, match=r"parse_args\(\) returned"):
        hparams.generate_trials(2)[0].trials(2)


def test_an_option_cannot_hide_the_search() -> None:
    parser = HyperOptArgumentParser()
    parser.add_argument("--trials", type=int)
    with pytest.raises(MisconfigurationException, match="--trials.*Rename"):
        parser.parse_args([])


def test_parents_hand_on_what_they_search_over() -> None:
    parent = make("random_search", add_help=False, seed=3)
    child = HyperOptArgumentParser(strategy=parent.strategy, parents=[parent])
    child.opt_list("--depth", default=1, type=int, options=[1, 2], tunable=True)
    assert set(child.opt_args) == {"units", "learning_rate", "depth"}
    assert child.parse_args([]).generate_trials(4) == child.parse_args([]).generate_trials(4)


# ---------------------------------------------------------------------- json_config


def test_a_command_is_searched_over_with_its_own_options() -> None:
    parser = HyperOptArgumentParser()
    parser.opt_list("--seed", type=int, default=0, options=[0, 1], tunable=True)
    commands = parser.add_subparsers(dest="command")
    for name, options in (("train", [0.1, 0.2]), ("tune", [0.3])):
        commands.add_parser(name).opt_list("--lr", type=float, default=1.0, options=options, tunable=True)
    train, tune, none = (parser.parse_args(given) for given in (["train"], ["tune"], []))
    drawn = [(trial.command, trial.seed, trial.lr) for trial in train.trials()]
    assert drawn == [("train", 0, 0.1), ("train", 0, 0.2), ("train", 1, 0.1), ("train", 1, 0.2)]
    assert [trial.lr for trial in tune.trials()] == [0.3, 0.3]
    assert none.tunable_names() == ["seed"]


def test_an_option_that_takes_the_place_of_a_tunable_one() -> None:
    parent = HyperOptArgumentParser(add_help=False)
    parent.opt_list("--lr", type=float, default=0.1, options=[0.1, 0.2], tunable=True)
    parser = HyperOptArgumentParser(parents=[parent], conflict_handler="resolve")
    parser.opt_list("--lr", type=float, default=0.5, tunable=False)
    assert parser.parse_args([]).tunable_names() == []


def test_json_config_replaces_defaults_and_yields_to_the_command_line(config: Callable[[Any], str]) -> None:
    parser = make()
    parser.json_config("--config", default=config({"units": 64, "learning-rate": 1, "epochs": 9}))
    hparams = parser.parse_args(["--epochs", "2"])
    assert (hparams.units, hparams.learning_rate, hparams.epochs, hparams.name) == (64, 1.0, 2, "net")
    assert isinstance(hparams.learning_rate, float)


def test_json_config_named_on_the_command_line_leaves_the_parser_as_it_was(config: Callable[[Any], str]) -> None:
    parser = make()
    parser.json_config("--config", default=None)
    assert parser.parse_args(["--config", config({"epochs": 9})]).epochs == 9
    assert parser.parse_args([]).epochs == 3


def test_json_config_can_give_what_is_required(config: Callable[[Any], str], capsys: Any) -> None:
    parser = HyperOptArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.json_config("--config")
    assert parser.parse_args(["--config", config({"folder": "a"})]).folder == "a"
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "--folder" in capsys.readouterr().err


def test_json_config_keeps_lists_booleans_and_null(config: Callable[[Any], str]) -> None:
    parser = HyperOptArgumentParser()
    parser.add_argument("--sizes", nargs="+", type=float)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--top", type=int, default=4)
    parser.json_config("--config", default=config({"sizes": [1, 2], "fast": True, "top": None}))
    assert vars(parser.parse_args([])) | {"config": None} == {
        "sizes": [1.0, 2.0], "fast": True, "top": None, "config": None,
    }  # fmt: skip


def test_json_config_survives_parents(config: Callable[[Any], str]) -> None:
    parent = make(add_help=False)
    parent.json_config("--config", default=config({"epochs": 9}))
    assert HyperOptArgumentParser(parents=[parent]).parse_args([]).epochs == 9


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"unit": 8}, "key 'unit'.*Did you mean 'units'.*Allowed: epochs"),
        ("{", "not valid JSON: .*line 1"),
        ([1], "holds a list"),
        ({"epochs": 1.5}, "'epochs'.*invalid int value: '1.5'"),
        ({"epochs": True}, "'epochs'.*invalid int value"),
        ({"mode": "c"}, "'mode'.*'c' is not one of 'a', 'b'"),
    ],
)
def test_json_config_with_a_mistake_in_it(config: Callable[[Any], str], content: Any, words: str) -> None:
    parser = make()
    parser.add_argument("--mode", choices=["a", "b"])
    parser.json_config("--config", default=config(content))
    with pytest.raises(MisconfigurationException, match=f"(?s)config.json.*{words}"):
        parser.parse_args([])


def test_json_config_that_is_not_there(tmp_path: Path) -> None:
    parser = make()
    parser.json_config("--config", default="nowhere.json")
    with pytest.raises(MisconfigurationException, match=r"'nowhere.json' does not exist"):
        parser.parse_args([])
    with pytest.raises(MisconfigurationException, match="cannot be read"):
        parser.parse_args(["--config", str(tmp_path)])
    with pytest.raises(MisconfigurationException, match="has one already"):
        parser.json_config("--second")
