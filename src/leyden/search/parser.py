# SPDX-License-Identifier: Apache-2.0
"""An ArgumentParser whose options say what values to try; what it parses can draw trials and run them."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from leyden.errors import LeydenWarning, MisconfigurationException, did_you_mean
from leyden.runtime.ranks import rank_zero_info, rank_zero_warn
from leyden.search import workers
from leyden.search.trials import Option, at_least_one, check_strategy, choices, draw_trials, formerly, number_range
from leyden.search.workers import TrialResult


class HyperOptNamespace(argparse.Namespace):
    """What was parsed, as attributes; and the search over it.

    A trial is another one of these, with other values where an option is tunable. The search is no part of the values:
    ``vars()`` does not show it, and a copy that went through pickle is without it.
    """

    __slots__ = ("_options", "_parser")  # beside __dict__, which holds the values

    hpc_exp_number: int | None = None
    """In a job of ``SlurmCluster``: the number of its trial."""

    _parser: HyperOptArgumentParser | None
    _options: dict[str, Option]

    def __init__(self, parser: HyperOptArgumentParser | None = None, /, **values: Any) -> None:
        super().__init__(**values)
        self._parser = parser
        self._options = {}

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._parser, self._options = None, {}
        vars(self).update(state)

    def replaced(self, values: dict[str, Any]) -> HyperOptNamespace:
        """Return a copy with other ``values``. Lists, dicts and sets are copied too, so that trials are independent."""
        everything = {**vars(self), **values}
        return HyperOptNamespace(
            **{k: copy.deepcopy(v) if isinstance(v, (list, dict, set)) else v for k, v in everything.items()}
        )

    def tunable_names(self) -> list[str]:
        """Return the names of the options that a search replaces."""
        return list(self._options)

    def generate_trials(self, nb_trials: int | None = None) -> list[HyperOptNamespace]:
        """Draw trials: namespaces with the tunable values replaced, all other values as they were parsed.

        Args:
            nb_trials: How many at most; a grid may have fewer points. None takes the whole grid.
        """
        if self._parser is None:
            raise MisconfigurationException(
                "This namespace is a trial or a copy and has no search. Draw trials from what"
                " HyperOptArgumentParser.parse_args() returned."
            )
        drawn = self._parser.draw(self._options, nb_trials)
        if nb_trials is not None and len(drawn) < nb_trials:
            rank_zero_info(
                "The search has %d combinations of values: %d trials instead of %d.", *[len(drawn)] * 2, nb_trials
            )
        return [self.replaced(values) for values in drawn]

    def trials(self, nb_trials: int | None = None) -> Iterator[HyperOptNamespace]:
        """Return an iterator over what :meth:`generate_trials` draws."""
        return iter(self.generate_trials(nb_trials))

    opt_trials = trials

    @formerly(train_function="fn")
    def optimize_parallel(
        self,
        fn: Callable[..., Any],
        nb_trials: int | None,
        nb_parallel: int = 4,
        *,
        monitor: str | None = None,
        mode: str = "min",
    ) -> list[TrialResult]:
        """Run ``fn(trial, place)`` for each trial, ``nb_parallel`` at a time, each in its own process.

        Args:
            fn: A function at the top level of a module. ``place`` (0 to ``nb_parallel`` - 1) says which of the parallel
                runs this is; a function of one argument is called without it.
            nb_trials: How many trials at most; None takes the whole grid.
            nb_parallel: How many run at the same time.
            monitor: The key that is compared, where ``fn`` returns a dict. None: the number itself, ``val_loss`` or ``loss``.
            mode: ``"min"`` or ``"max"``: whether less or more is better, for the "best so far" on the screen.

        Returns:
            One :class:`~leyden.search.workers.TrialResult` for each trial, in their order: a pair of the trial and what
            ``fn`` returned, None if it failed; ``error`` is then its traceback.
        """
        places = workers.places(nb_parallel, "nb_parallel", numbered=True)
        return workers.run_trials(fn, self.generate_trials(nb_trials), places, monitor, mode)

    @formerly(train_function="fn")
    def optimize_parallel_cpu(
        self,
        fn: Callable[..., Any],
        nb_trials: int | None,
        nb_workers: int = 4,
        *,
        monitor: str | None = None,
        mode: str = "min",
    ) -> list[TrialResult]:
        """Run ``fn(trial)`` for each trial on ``nb_workers`` processes. Else as :meth:`optimize_parallel`."""
        places = workers.places(nb_workers, "nb_workers", numbered=False)
        return workers.run_trials(fn, self.generate_trials(nb_trials), places, monitor, mode)

    @formerly(train_function="fn", max_nb_trials="nb_trials")
    def optimize_parallel_gpu(
        self,
        fn: Callable[..., Any],
        gpu_ids: Sequence[str | int],
        nb_trials: int | None = None,
        nb_workers: int | None = None,
        *,
        monitor: str | None = None,
        mode: str = "min",
    ) -> list[TrialResult]:
        """Run ``fn(trial, gpus)`` for each trial, one at a time on each set of GPUs.

        Args:
            fn: As in :meth:`optimize_parallel`; ``gpus`` is its set, as a string.
            gpu_ids: The sets: ``["1", "0, 2"]`` runs two trials at a time, one on GPU 1, one on GPUs 0 and 2. A trial sees
                no others (CUDA_VISIBLE_DEVICES), and calls its own 0, 1, ...
            nb_trials: How many trials at most; None takes the whole grid.
            nb_workers: Use the first so many sets only; None uses all.
            monitor: As in :meth:`optimize_parallel`.
            mode: As in :meth:`optimize_parallel`.
        """
        places = workers.gpu_places(gpu_ids, nb_workers)
        return workers.run_trials(fn, self.generate_trials(nb_trials), places, monitor, mode)

    @formerly(train_function="fn")
    def optimize_trials_parallel_gpu(
        self,
        fn: Callable[..., Any],
        nb_trials: int | None,
        trials: Iterable[argparse.Namespace],
        gpu_ids: Sequence[str | int],
        nb_workers: int | None = None,
        *,
        monitor: str | None = None,
        mode: str = "min",
    ) -> list[TrialResult]:
        """Run the first ``nb_trials`` of ``trials`` (None: all), else as :meth:`optimize_parallel_gpu`."""
        if nb_trials is not None:
            at_least_one(nb_trials, "nb_trials")
        return workers.run_trials(fn, list(trials)[:nb_trials], workers.gpu_places(gpu_ids, nb_workers), monitor, mode)


_TAKEN = frozenset(name for name in vars(HyperOptNamespace) if not name.startswith("_"))


class HyperOptArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser with options to search over.

    Args:
        strategy: ``"grid_search"`` or ``"random_search"``.
        seed: Of the random search: the same seed draws the same trials. None follows ``seed_everything``.
        **kwargs: Those of ArgumentParser. ``parents`` hand on what they search over, and their seed if none is given.

    Raises:
        MisconfigurationException: if there is no such strategy.
    """

    def __init__(self, strategy: str = "grid_search", *, seed: int | None = None, **kwargs: Any) -> None:
        check_strategy(strategy)
        self.strategy = strategy
        self.seed = seed
        self.opt_args: dict[str, Option] = {}
        self._chosen = False
        self._config_dest: str | None = None
        super().__init__(**kwargs)
        for parent in kwargs.get("parents", ()):
            if isinstance(parent, HyperOptArgumentParser):
                self.opt_args.update(parent.opt_args)
                self.seed = parent.seed if self.seed is None else self.seed
                self._config_dest = parent._config_dest or self._config_dest  # noqa: SLF001  # of our own class

    def opt_list(self, *flags: str, options: Any = None, tunable: bool = False, **kwargs: Any) -> argparse.Action:
        """Add an option that a search takes from a list.

        Args:
            *flags: As in ``add_argument``.
            options: The values to try; needed if ``tunable``.
            tunable: False: always the parsed value.
            **kwargs: Those of ``add_argument``: ``default``, ``type``, ``help`` and so on.
        """
        option = choices(flags[-1] if flags else "", options) if tunable else None
        return self._add_option(flags, option, kwargs)

    def opt_range(
        self,
        *flags: str,
        low: float | None = None,
        high: float | None = None,
        nb_samples: int = 10,
        log_base: float | None = None,
        tunable: bool = False,
        **kwargs: Any,
    ) -> argparse.Action:
        """Add an option that a search takes from a range of numbers.

        Args:
            *flags: As in ``add_argument``.
            low: The least value.
            high: The greatest value, included.
            nb_samples: A grid search tries so many values, evenly spaced. A random search draws from the whole range.
            log_base: Spread the values evenly in their logarithm to this base (any base gives the same spread).
            tunable: False: always the parsed value.
            **kwargs: Those of ``add_argument``. ``type`` is ``float`` unless given; with ``int``, all values are integers.
        """
        kind = kwargs.setdefault("type", float)
        option = number_range(flags[-1] if flags else "", low, high, nb_samples, log_base, kind is int)
        return self._add_option(flags, option if tunable else None, kwargs)

    def _add_option(self, flags: tuple[str, ...], option: Option | None, kwargs: dict[str, Any]) -> argparse.Action:
        action = self.add_argument(*flags, **kwargs)
        self.opt_args.pop(action.dest, None)  # with conflict_handler="resolve" it takes the place of an earlier one
        if option is not None:
            self.opt_args[action.dest] = option
        return action

    def json_config(self, *flags: str, default: str | None = None, **kwargs: Any) -> argparse.Action:
        """Add the option that names a JSON file; its values take the place of defaults. The command line beats both.

        The file is one object, its keys are names of options (``batch_size`` or ``batch-size``).
        """
        if self._config_dest is not None:
            raise MisconfigurationException(f"json_config({flags}): this parser has one already.")
        action = self.add_argument(*flags, default=default, **kwargs)
        self._config_dest = action.dest
        return action

    def parse_known_args(  # type: ignore[override]  # typeshed's overloads say the same
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as ArgumentParser does, after what a JSON file says. Without a ``namespace``, make one that can search."""
        for action in self._actions:
            if action.dest in _TAKEN:
                raise MisconfigurationException(
                    f"The option {'/'.join(action.option_strings) or action.dest!r} would hide {action.dest!r} of the"
                    " parsed namespace. Rename it, or give it another dest."
                )
        if namespace is None:
            namespace = HyperOptNamespace(self)
        for command in self._commands():
            command._chosen = False  # noqa: SLF001  # of our own class
        for name, value in self._values_of_config(args).items():
            if not hasattr(namespace, name):
                setattr(namespace, name, value)
        required = [action for action in self._actions if action.required and action.dest in vars(namespace)]
        try:
            for action in required:
                action.required = False
            namespace, rest = super().parse_known_args(args, namespace)
        finally:
            for action in required:
                action.required = True
        self._chosen = True
        if isinstance(namespace, HyperOptNamespace):
            namespace._options = self._searched()  # noqa: SLF001  # of our own class
        return namespace, rest

    def _commands(self) -> Iterator[HyperOptArgumentParser]:
        """Yield the parsers of this one's commands (``add_subparsers``) that know what to search over."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001  # argparse has no public name for it
                yield from (parser for parser in action.choices.values() if isinstance(parser, HyperOptArgumentParser))

    def _searched(self) -> dict[str, Option]:
        """Return what is searched over after the last parse: by this parser, and by the command that was given."""
        found = dict(self.opt_args)
        for command in self._commands():
            if command._chosen:  # noqa: SLF001  # of our own class
                found.update(command._searched())  # noqa: SLF001
        return found

    def draw(self, options: dict[str, Option], nb_trials: int | None) -> list[dict[str, Any]]:
        """Draw trials over ``options``, as dicts of their values. See :meth:`HyperOptNamespace.generate_trials`."""
        if not options:
            rank_zero_warn(
                "No option of this search is tunable, so there is one trial, of the values as they are. Say tunable=True in"
                " opt_list or opt_range.",
                category=LeydenWarning,
            )
        return draw_trials(options, self.strategy, nb_trials, self.seed)

    def _values_of_config(self, args: Sequence[str] | None) -> dict[str, Any]:
        """Return what the JSON file holds that the command line (or a default) names, converted as text would be."""
        if self._config_dest is None:
            return {}
        required = [action for action in self._actions if action.required]
        try:
            for action in required:  # the file may have them
                action.required = False
            path = getattr(super().parse_known_args(args, argparse.Namespace())[0], self._config_dest)
        finally:
            for action in required:
                action.required = True
        return {} if path is None else self._read_config(str(path))

    def _read_config(self, path: str) -> dict[str, Any]:
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MisconfigurationException(
                f"The JSON config {path!r} does not exist (looked in {Path.cwd()}). Give the path of a file, or leave the"
                " option out."
            ) from None
        except OSError as error:
            raise MisconfigurationException(f"The JSON config {path!r} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise MisconfigurationException(f"The JSON config {path!r} is not valid JSON: {error}.") from error
        if not isinstance(found, dict):
            raise MisconfigurationException(
                f"The JSON config {path!r} holds a {type(found).__name__}; it must be one object:"
                ' {"option": value, ...}.'
            )
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", self._config_dest)}
        values = {}
        for key, value in found.items():
            name = key.replace("-", "_")
            if name not in actions:
                raise MisconfigurationException(
                    f"The JSON config {path!r} has the key {key!r}, but there is no such option."
                    f"{did_you_mean(name, actions)} Allowed: {', '.join(sorted(actions))}."
                )
            values[name] = self._converted(actions[name], value, f"The JSON config {path!r}, key {key!r}")
        return values

    def _converted(self, action: argparse.Action, value: Any, where: str) -> Any:
        """Return ``value`` as the option would have it from the command line: of its type, one of its choices."""
        if isinstance(value, list) and action.nargs not in (None, 0, "?"):
            return [self._converted(action, item, where) for item in value]
        is_text = isinstance(value, (str, int, float)) and not (isinstance(value, bool) and action.type is bool)
        if is_text and action.type is not None:
            try:
                value = self._get_value(action, value if isinstance(value, str) else repr(value))
            except argparse.ArgumentError as error:
                raise MisconfigurationException(f"{where}: {error}.") from None
        if action.choices is not None and value is not None and value not in action.choices:
            allowed = ", ".join(repr(choice) for choice in action.choices)
            raise MisconfigurationException(f"{where}: {value!r} is not one of {allowed}.")
        return value
