# SPDX-License-Identifier: Apache-2.0
"""What may vary in a search (lists, ranges), and the trials that a grid or a random search draws from it."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar, Union, cast

from leyden.errors import MisconfigurationException, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
_STALLED = 1000
"""So many draws in a row that were all seen before: what is left is then listed instead of waited for."""


@dataclass(frozen=True)
class Choices:
    """An option that takes one of ``values``."""

    values: tuple[Any, ...]

    def grid(self) -> Sequence[Any]:
        """Return the values of a grid search: all."""
        return self.values

    def every(self) -> Sequence[Any] | None:
        """Return all values there are."""
        return self.values

    def draw(self, rng: random.Random) -> Any:
        """Return one value, each as likely as any other."""
        return rng.choice(self.values)


@dataclass(frozen=True)
class Range:
    """An option that takes a number from ``low`` to ``high``, both included; with ``log_base``, evenly in its logarithm."""

    low: float
    high: float
    nb_samples: int
    log_base: float | None
    integer: bool

    def grid(self) -> Sequence[float]:
        """Return the values of a grid search: ``nb_samples``, evenly spaced from ``low`` to ``high``."""
        parts = max(self.nb_samples - 1, 1)
        between = (self._at(index / parts) for index in range(1, self.nb_samples - 1))
        # 12 digits: a grid of powers of ten shall show 0.001, not 0.0010000000000000002
        values = [self.low, *(float(f"{value:.12g}") for value in between), self.high][: self.nb_samples]
        return list(dict.fromkeys(self._number(value) for value in values))

    def every(self) -> Sequence[float] | None:
        """Return all values there are; None where they cannot be counted."""
        return range(int(self.low), int(self.high) + 1) if self.integer else None

    def draw(self, rng: random.Random) -> float:
        """Return one value, from the whole range."""
        if self.integer and self.log_base is None:
            return rng.randint(int(self.low), int(self.high))
        return self._number(self._at(rng.random()))

    def _at(self, share: float) -> float:
        if self.log_base is None:
            return self.low + (self.high - self.low) * share
        low, high = math.log(self.low, self.log_base), math.log(self.high, self.log_base)
        return float(self.log_base ** (low + (high - low) * share))

    def _number(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else float(value)


Option = Union[Choices, Range]


def formerly(**names: str) -> Callable[[F], F]:
    """Decorate a function whose arguments had other names in 2019's tool: ``formerly(max_nb_trials="nb_trials")``."""

    def decorate(fn: F) -> F:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            for then, today in names.items():
                if then in kwargs:
                    if today in kwargs:
                        raise TypeError(f"{fn.__name__}() got {then!r} and {today!r}, two names of one argument.")
                    kwargs[today] = kwargs.pop(then)
            return fn(*args, **kwargs)

        return cast("F", call)

    return decorate


def at_least_one(value: object, argument: str) -> None:
    """Raise MisconfigurationException unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MisconfigurationException(f"{argument}={value!r}: must be an integer of at least 1.")


def choices(name: str, values: Any) -> Choices:
    """Check what ``opt_list`` was given for the option ``name`` and return it."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        example = "[1, 2]" if values is None else f"[{values!r}]"
        raise MisconfigurationException(
            f"opt_list({name!r}, options={values!r}): a tunable option needs the list of values to try, such as"
            f" options={example}."
        )
    found = tuple(values)
    if not found:
        raise MisconfigurationException(
            f"opt_list({name!r}, options=[]): there is nothing to choose from. List at least one value, or say"
            " tunable=False."
        )
    return Choices(found)


def _is_number(value: Any) -> bool:
    """Whether ``value`` is a real number, one of numpy too."""
    return isinstance(value, Real) and not isinstance(value, bool)


def number_range(name: str, low: Any, high: Any, nb_samples: int, log_base: Any, integer: bool) -> Range:
    """Check what ``opt_range`` was given for the option ``name`` and return it."""
    call = f"opt_range({name!r}, low={low!r}, high={high!r})"
    for value in (low, high):
        if not _is_number(value) or not math.isfinite(value):
            raise MisconfigurationException(f"{call}: low and high must both be given, as finite numbers.")
    if integer and not (float(low).is_integer() and float(high).is_integer()):
        raise MisconfigurationException(
            f"{call}: type=int needs whole numbers as bounds. Round them, or give type=float."
        )
    if low >= high:
        raise MisconfigurationException(f"{call}: low must be less than high.")
    at_least_one(nb_samples, f"opt_range({name!r}): nb_samples")
    if log_base is not None:
        if not _is_number(log_base) or not log_base > 1:
            raise MisconfigurationException(
                f"opt_range({name!r}, log_base={log_base!r}): must be greater than 1, such as 10; None for a range that"
                " is not logarithmic."
            )
        if low <= 0:
            raise MisconfigurationException(
                f"{call}: low must be greater than 0 where log_base is given; there is no logarithm of {low!r}."
            )
    # numbers of python's own: those of numpy would come out of a search as they are
    plain = int if integer else float
    return Range(plain(low), plain(high), nb_samples, None if log_base is None else float(log_base), integer)


def _grid(options: dict[str, Option], _: random.Random) -> Iterator[tuple[Any, ...]]:
    """Yield every combination, the last option fastest."""
    return itertools.product(*(option.grid() for option in options.values()))


def _at_random(options: dict[str, Option], rng: random.Random) -> Iterator[tuple[Any, ...]]:
    """Yield combinations drawn at random, none twice; the first n do not depend on how many will be asked for."""
    seen: set[str] = set()
    again = 0
    while again < _STALLED:
        values = tuple(option.draw(rng) for option in options.values())
        again += 1
        if repr(values) not in seen:
            seen.add(repr(values))
            again = 0
            yield values
    every = [option.every() for option in options.values()]
    left = [values for values in itertools.product(*(e for e in every if e is not None)) if repr(values) not in seen]
    rng.shuffle(left)
    yield from left


STRATEGIES: dict[str, Callable[[dict[str, Option], random.Random], Iterator[tuple[Any, ...]]]] = {
    "grid_search": _grid,
    "random_search": _at_random,
}
"""Name of a strategy -> the function that yields its combinations of values."""


def check_strategy(strategy: str) -> None:
    """Raise MisconfigurationException if there is no such strategy."""
    if strategy not in STRATEGIES:
        allowed = " or ".join(repr(name) for name in STRATEGIES)
        raise MisconfigurationException(
            f"HyperOptArgumentParser(strategy={strategy!r}): must be {allowed}.{did_you_mean(str(strategy), STRATEGIES)}"
        )


def draw_trials(
    options: dict[str, Option], strategy: str, nb_trials: int | None, seed: int | None
) -> list[dict[str, Any]]:
    """Draw the trials of a search: for each, the value of every option in ``options``.

    Args:
        options: What varies, by name.
        strategy: ``"grid_search"`` takes the combinations in order, ``"random_search"`` at random, none twice.
        nb_trials: How many at most; fewer where there are no more combinations. None: the whole grid.
        seed: Of the generator; the same seed draws the same trials. None draws one from python's global generator,
            so that ``seed_everything`` rules it.

    Raises:
        MisconfigurationException: for an unknown strategy, ``nb_trials`` below 1, or None in a random search.
    """
    check_strategy(strategy)
    if nb_trials is None and strategy == "random_search":
        raise MisconfigurationException(
            "nb_trials=None: a random search has no end of its own. Say how many trials to draw."
        )
    if nb_trials is not None:
        at_least_one(nb_trials, "nb_trials")
    rng = random.Random(random.getrandbits(64) if seed is None else seed)
    combinations = itertools.islice(STRATEGIES[strategy](options, rng), nb_trials)
    return [dict(zip(options, values, strict=True)) for values in combinations]
