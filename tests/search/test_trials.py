# SPDX-License-Identifier: Apache-2.0
"""The trials that a grid and a random search draw."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from leyden.errors import MisconfigurationException
from leyden.search.trials import Choices, Range, choices, draw_trials, number_range


def a_range(low: Any, high: Any, nb_samples: int = 10, log_base: Any = None, integer: bool = False) -> Range:
    return number_range("--x", low, high, nb_samples, log_base, integer)


def test_grid_search_takes_every_combination_the_last_option_fastest() -> None:
    options = {"a": Choices((1, 2)), "b": Choices(("x", "y", "z"))}
    trials = draw_trials(options, "grid_search", None, seed=None)
    assert [tuple(trial.values()) for trial in trials] == [(a, b) for a in (1, 2) for b in "xyz"]
    assert draw_trials(options, "grid_search", 2, seed=None) == trials[:2]
    assert len(draw_trials(options, "grid_search", 99, seed=None)) == 6


def test_a_huge_grid_is_not_built_to_take_its_first_points() -> None:
    options: dict[str, Any] = {f"x{index}": Choices(tuple(range(100))) for index in range(20)}
    assert len(draw_trials(options, "grid_search", 3, seed=None)) == 3


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (a_range(0.0, 1.0, 5), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (a_range(1e-5, 1e-1, 5, log_base=10), [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
        (a_range(1, 64, 7, log_base=2, integer=True), [1, 2, 4, 8, 16, 32, 64]),
        (a_range(1, 3, 10, integer=True), [1, 2, 3]),
        (a_range(2.5, 3.0, 1), [2.5]),
        (a_range(2.5, 3.0, 2), [2.5, 3.0]),
    ],
)
def test_a_grid_over_a_range_is_evenly_spaced_and_includes_both_ends(option: Range, expected: list[float]) -> None:
    assert option.grid() == expected
    assert {type(value) for value in option.grid()} == {int if option.integer else float}


def test_bounds_may_be_numbers_of_numpy() -> None:
    grid = a_range(np.int64(1), np.float32(2), 3).grid()
    assert grid == [1.0, 1.5, 2.0]
    assert {type(value) for value in grid} == {float}
    assert a_range(np.int64(1), np.int32(2), integer=True).grid() == [1, 2]


def test_random_search_draws_from_the_whole_range_and_stays_in_it() -> None:
    options = {"x": a_range(2.0, 3.0, nb_samples=2), "n": a_range(1, 4, integer=True)}
    trials = draw_trials(options, "random_search", 200, seed=0)
    assert len({trial["x"] for trial in trials}) == 200
    assert {trial["n"] for trial in trials} == {1, 2, 3, 4}
    assert all(2.0 <= trial["x"] <= 3.0 for trial in trials)
    assert min(trial["x"] for trial in trials) < 2.05
    assert max(trial["x"] for trial in trials) > 2.95


def test_log_base_spreads_evenly_over_the_powers() -> None:
    trials = draw_trials({"x": a_range(1e-4, 1.0, log_base=10)}, "random_search", 2000, seed=1)
    decades = [math.floor(math.log10(trial["x"])) for trial in trials]
    for decade in (-4, -3, -2, -1):
        assert 400 < decades.count(decade) < 600


def test_random_search_draws_no_trial_twice_and_finds_all_there_are() -> None:
    options = {"a": Choices(tuple(range(7))), "b": a_range(1, 3, integer=True)}
    trials = draw_trials(options, "random_search", 1000, seed=3)
    assert len(trials) == 21
    assert len({tuple(trial.values()) for trial in trials}) == 21


def test_rare_values_are_listed_rather_than_waited_for() -> None:
    # nearly every draw is small, and all 3000 values are wanted
    option = a_range(1, 3000, log_base=10, integer=True)
    assert len(draw_trials({"n": option}, "random_search", 3000, seed=0)) == 3000


def test_equal_options_and_values_without_a_hash_do_no_harm() -> None:
    options: dict[str, Any] = {"a": Choices(([1], [1], [2]))}
    assert sorted(trial["a"] for trial in draw_trials(options, "random_search", 9, seed=0)) == [[1], [2]]


def test_the_same_seed_draws_the_same_trials_and_more_of_them_begin_alike() -> None:
    options = {"x": a_range(0.0, 1.0), "a": Choices((1, 2, 3))}
    first = draw_trials(options, "random_search", 6, seed=7)
    assert draw_trials(options, "random_search", 6, seed=7) == first
    assert draw_trials(options, "random_search", 20, seed=7)[:6] == first
    assert draw_trials(options, "random_search", 6, seed=8) != first


def test_without_a_seed_the_global_generator_rules() -> None:
    options = {"x": a_range(0.0, 1.0)}
    random.seed(5)
    first, second = (draw_trials(options, "random_search", 3, seed=None) for _ in range(2))
    random.seed(5)
    assert draw_trials(options, "random_search", 3, seed=None) == first != second


@pytest.mark.parametrize("nb_trials", [0, -1, 2.0, True, "3"])
def test_a_number_of_trials_below_one_is_refused(nb_trials: Any) -> None:
    with pytest.raises(MisconfigurationException, match="nb_trials=.*at least 1"):
        draw_trials({}, "grid_search", nb_trials, seed=None)


def test_a_random_search_needs_a_number() -> None:
    with pytest.raises(MisconfigurationException, match="nb_trials=None.*how many"):
        draw_trials({}, "random_search", None, seed=None)


@pytest.mark.parametrize(
    ("values", "words"), [([], "nothing to choose"), (None, "list of values"), ("abc", "list of v")]
)
def test_empty_options_are_refused(values: Any, words: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"--x.*{words}"):
        choices("--x", values)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 1.0, "high": 1.0}, "low must be less than high"),
        ({"low": 2.0, "high": 1.0}, "low must be less than high"),
        ({"low": None, "high": 1.0}, "must both be given"),
        ({"low": 0.0, "high": math.inf}, "finite"),
        ({"low": 0.5, "high": 2, "integer": True}, "whole numbers"),
        ({"low": 0.0, "high": 1.0, "log_base": 10}, "low must be greater than 0"),
        ({"low": 0.1, "high": 1.0, "log_base": 1}, "log_base=1.*greater than 1"),
        ({"low": 0.1, "high": 1.0, "log_base": "10"}, "log_base='10'.*greater than 1"),
        ({"low": 0.1, "high": 1.0, "nb_samples": 0}, "nb_samples=0"),
    ],
)
def test_an_impossible_range_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"--x.*{words}"):
        a_range(**arguments)
