# SPDX-License-Identifier: Apache-2.0
"""Where each value of a config comes from: the command line, a line of a file, the environment, a checkpoint, a default."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from leyden.errors import did_you_mean

_STEPS = ("init_args", "dict_kwargs")
_FILES = (".yaml", ".yml", ".json", ".jsonnet")


class Place(NamedTuple):
    """Something that somebody wrote: the key, in the short form, and where it stands."""

    key: str
    where: str


def plain(key: str) -> str:
    """Return the short form of a key: ``model.lr`` for ``model.init_args.lr``, ``model`` for ``model.class_path``."""
    parts = [part.rstrip("+") for part in key.split(".") if part not in _STEPS]
    return ".".join(parts[:-1] if parts[-1] == "class_path" and len(parts) > 1 else parts)


class Origins:
    """What was given to a parser, word by word and line by line; read when somebody asks.

    Args:
        parser: The parser at the top.
        given: The words of a command line, None for those of the process, or settings in a dict or namespace.
    """

    def __init__(self, parser: Any, given: Any) -> None:
        self._parser = parser
        words = sys.argv[1:] if given is None else given
        self._given = words if isinstance(words, Mapping) or hasattr(words, "as_dict") else list(words)
        self._places: list[Place] | None = None
        self._last: dict[str, int] = {}
        self._files: list[str] = []
        self._checkpoint: dict[str, str] = {}

    @property
    def places(self) -> list[Place]:
        """All that was written, the later ones win."""
        if self._places is None:
            self._places = []
            self._read_defaults()
            self._read_environment()
            if isinstance(self._given, list):
                self._read_words(self._given)
            else:
                given = self._given if isinstance(self._given, Mapping) else self._given.as_dict()
                self._note_value("", given, "args")
        return self._places

    def where(self, key: str) -> str | None:
        """Return where ``key`` was written last; indices of lists may be left out of it."""
        wanted = _without_indices(plain(key))
        for place in reversed(self.places):
            found = _without_indices(place.key)
            if found == wanted or found.endswith("." + wanted):
                return place.where
        return None

    def wrote(self, key: str) -> bool:
        """Whether ``key`` or something below it was written by anybody."""
        key = plain(key)
        return any(place.key == key or place.key.startswith(f"{key}.") for place in self.places)

    def unreadable(self) -> list[str]:
        """Return, for each config file that is no YAML, the file and the line where it breaks off."""
        found, _ = [], self.places
        for path in self._files:
            try:
                yaml.compose(Path(path).expanduser().read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            except yaml.MarkedYAMLError as error:
                line = error.problem_mark.line + 1 if error.problem_mark else 1
                found.append(f"It is {path}:{line}: {error.problem}.")
        return found

    def from_checkpoint(self, key: str, names: Iterable[str], path: str) -> None:
        """Note that values below ``key`` came from a checkpoint."""
        self._checkpoint.update({plain(f"{key}.{name}"): f"checkpoint {path}" for name in names})

    def of(self, key: str) -> str:
        """Return the origin of a value of the finished config."""
        key = plain(key)
        for place in reversed(self.places):
            if place.key == key:
                return self._checkpoint.get(key, place.where)
        return self._checkpoint.get(key, "default")

    # ------------------------------------------------------------------ reading

    def _note(self, key: str, where: str, replaces: bool = False) -> None:
        assert self._places is not None
        if key.rpartition(".")[2] in _STEPS:
            return  # a step on the way, no setting
        key = plain(key)
        if replaces:
            self._places = [place for place in self._places if not place.key.startswith(f"{key}.")]
        self._places.append(Place(key, where))

    def _note_value(self, key: str, value: Any, where: str) -> None:
        """Note a value and all that is in it."""
        if key:
            self._note(key, where, replaces=isinstance(value, list))
        items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, Mapping) else ()
        for name, item in items:
            self._note_value(f"{key}.{name}" if key else str(name), item, where)

    def _read_defaults(self) -> None:
        parsers = {"": self._parser, **{f"{name}.": sub for name, sub in self._parser.subcommand_parsers.items()}}
        for prefix, parser in parsers.items():
            for pattern in parser.default_config_files or []:
                for path in sorted(glob.glob(os.path.expanduser(str(pattern)))):
                    self._read_file(path, prefix)

    def _read_environment(self) -> None:
        if not self._parser.default_env:
            return
        prefix = f"{self._parser.env_prefix}_"
        for name, value in os.environ.items():
            if not name.startswith(prefix):
                continue
            key = name.removeprefix(prefix).lower().replace("__", ".")
            head, _, last = key.rpartition(".")
            if last == "config":
                self._read_file(value, f"{head}." if head else "", f"environment {name}")
            else:
                self._note(key, f"environment {name}")

    def _read_words(self, words: Sequence[str]) -> None:
        prefix, index = "", 0
        while index < len(words):
            word, index = words[index], index + 1
            if not word.startswith("-"):
                if not prefix and word in self._parser.subcommand_parsers:
                    prefix = f"{word}."
                continue
            option, equals, value = word.partition("=")
            if not equals and index < len(words) and not words[index].startswith("--"):
                value, index = words[index], index + 1
            name = option.lstrip("-").replace("-", "_")
            if name in ("c", "config"):
                self._read_file(value, prefix, "command line (--config)")
            elif option.startswith("--"):
                self._read_option(prefix + name, value, f"command line ({option})")

    def _read_option(self, key: str, value: str, where: str) -> None:
        appended, key = key.endswith("+"), key.rstrip("+")
        for part in [key[:at] for at, letter in enumerate(key) if letter == "."]:
            if part in self._last:  # --trainer.callbacks.patience: of the last callback that was named
                self._note(f"{part}.{self._last[part]}{key.removeprefix(part)}", where)
        self._last[key] = self._last.get(key, self._length(key) - 1) + 1 if appended else 0
        self._note(key, where, replaces=not appended and self._length(key) > 0)
        self._note(f"{key}.{self._last[key]}", where)
        if Path(value).suffix in _FILES and os.path.isfile(value):
            self._read_file(value, f"{key}.", where)
        elif value[:1] in ("{", "["):
            self._read_text(value, f"{key}.{self._last[key]}." if appended else f"{key}.", where, None)

    def _length(self, key: str) -> int:
        """How many items of the list ``key`` are written by now."""
        depth = plain(key).count(".") + 1
        below = (place.key.split(".") for place in self.places if place.key.startswith(f"{plain(key)}."))
        return max((int(parts[depth]) + 1 for parts in below if parts[depth].isdigit()), default=0)

    def _read_file(self, path: str, prefix: str, otherwise: str = "") -> None:
        if os.path.isfile(os.path.expanduser(path)):
            self._files.append(path)
            text = Path(path).expanduser().read_text(encoding="utf-8")
            self._read_text(text, prefix, otherwise, str(path))
        elif "://" in path:
            import fsspec  # noqa: PLC0415  # only for remote files

            with fsspec.open(path, "r") as file:
                self._read_text(file.read(), prefix, otherwise, path)
        else:
            self._read_text(path, prefix, otherwise, None)  # the config itself, in the place of a path

    def _read_text(self, text: str, prefix: str, where: str, path: str | None) -> None:
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return  # jsonnet, or broken: the parser itself says what is wrong
        for key, line, replaces in _keys(node, prefix):
            self._note(key, where if path is None else f"{path}:{line}", replaces)


def _keys(node: Any, prefix: str) -> Iterator[tuple[str, int, bool]]:
    """Yield the keys of a YAML document, each with its line, and whether a list is there."""
    items: Iterable[tuple[str, Any, Any]] = ()
    if isinstance(node, yaml.MappingNode):
        items = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(str(index), value, value) for index, value in enumerate(node.value)]
    for name, place, value in items:
        yield prefix + name, place.start_mark.line + 1, isinstance(value, yaml.SequenceNode)
        yield from _keys(value, f"{prefix}{name}.")


def _without_indices(key: str) -> str:
    return ".".join(part for part in key.split(".") if not part.isdigit())


def annotated(text: str, origins: Origins, prefix: str) -> str:
    """Return the YAML of a config with the origin of each value as a comment behind it.

    Args:
        text: The YAML.
        origins: What was given.
        prefix: What stands ahead of its keys: ``"fit."``, or nothing.
    """
    lines = text.splitlines()
    notes: dict[int, str] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, yaml.MappingNode) and node.value:
            for name, value in node.value:
                walk(value, f"{key}.{name.value}" if key else str(name.value))
        elif isinstance(node, yaml.SequenceNode) and node.value:
            for index, value in enumerate(node.value):
                walk(value, f"{key}.{index}")
        elif node is not None and node.start_mark.line == (node.end_mark.line if node.end_mark.column else -1):
            notes[node.start_mark.line] = origins.of(prefix + key)
        elif node is not None:
            notes.setdefault(node.start_mark.line, origins.of(prefix + key))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    width = min(max((len(lines[at]) for at in notes), default=0), 60)
    return "\n".join(f"{line:<{width}}  # {notes[at]}" if at in notes else line for at, line in enumerate(lines)) + "\n"


# ---------------------------------------------------------------------------------------------- errors

_KEY = re.compile(r'Parser key "([^"]+)"')
_GROUP = re.compile(r"Group '([^']*)' does not accept (?:option|nested key) '([^']*)'")
_SUBCOMMAND = re.compile(r"Subcommand '([^']*)' does not accept (?:option|nested key) '([^']*)'")
_OPTION = re.compile(r"given class_path '([^']+)':\s+(?:Group '[^']*' does not accept option|Option) '([^']+)'")
_WORDS = re.compile(r"unrecognized arguments: (.+)")
_CHOICE = re.compile(r"invalid choice: '([^']*)'")
_UNEXPECTED = re.compile(r"(?:Option|[Kk]ey) ['\"]([^'\"]+)['\"] is not (?:accepted|expected)")
_ATTRIBUTE = re.compile(r"module '([^']+)' has no attribute '([^']+)'")
_PATH = re.compile(r"Expected a dot import path string: (\S+)|given class_path '([^']+)'|No module named '([^']+)'")


def explain(message: str, root: Any, parser: Any) -> str:
    """Return an error of the parser with where the value is written, and the closest name that exists.

    Args:
        message: What jsonargparse says: the key, what is expected there, and the value.
        root: The parser at the top, which knows what was given.
        parser: The parser that complains: that of a subcommand, perhaps.
    """
    origins: Origins | None = root.origins
    if origins is None:
        return message
    if "Problems parsing config" in message:
        return "\n  ".join([message, *origins.unreadable()])
    key, hint = _what_is_wrong(message, parser)
    added = []
    if key and (where := origins.where(key)):
        added.append(f"{plain(key)} is {'written in' if ':' in where else 'from the'} {where}.")
    if hint and hint.strip() not in message:
        added.append(hint.strip())
    return message if not added else f"{message}\n  " + " ".join(added)


def _what_is_wrong(message: str, parser: Any) -> tuple[str, str]:
    """Return the key that an error is about, and what was perhaps meant."""
    if found := _OPTION.search(message):
        holder = _KEY.search(message)
        return f"{holder[1]}.{found[2]}" if holder else found[2], did_you_mean(found[2], _parameters(found[1]))
    if found := _SUBCOMMAND.search(message):
        return found[2], _closest_key(found[2], parser.subcommand_parsers.get(found[1], parser).destinations)
    if found := _GROUP.search(message):
        key = f"{found[1]}.{found[2]}"
        return key, _closest_key(key, parser.destinations)
    if found := _WORDS.search(message):
        given = [word.partition("=")[0] for word in found[1].split() if word.startswith("--")]
        return "", " ".join(did_you_mean(word, parser.options).strip() for word in given).strip()
    if found := _CHOICE.search(message):
        return "", did_you_mean(found[1], parser.subcommand_parsers)
    if found := _KEY.search(message):
        return found[1], _closest_class(message, parser.classes_for(found[1]))
    if found := _UNEXPECTED.search(message):
        return found[1], _closest_key(found[1], parser.destinations)
    return "", ""


def _closest_key(key: str, known: Iterable[str]) -> str:
    """Return what was meant by a key: part for part, so that a misspelt group does not hide behind a long name."""
    *parents, last = key.split(".")
    below, done = list(known), ""
    for part in [*parents, last]:
        names = {name.removeprefix(done).partition(".")[0] for name in below if name.startswith(done)}
        if part not in names:
            return did_you_mean(part, names)
        done += f"{part}."
    return ""


def _closest_class(message: str, known: Iterable[str]) -> str:
    if found := _ATTRIBUTE.search(message):
        names = dir(sys.modules.get(found[1]))
        same = next((name for name in names if name.lower() == found[2].lower()), None)
        return did_you_mean(same or found[2], names)
    if found := _PATH.search(message):
        return did_you_mean(next(part for part in found.groups() if part).rpartition(".")[2], known)
    return ""


def _parameters(class_path: str) -> list[str]:
    """Return what the constructor of an imported class takes."""
    from jsonargparse import ArgumentParser  # noqa: PLC0415  # who asks has it loaded

    home, _, name = class_path.rpartition(".")
    cls = getattr(sys.modules.get(home), name, None)
    if not isinstance(cls, type):
        return []
    probe = ArgumentParser(exit_on_error=False)
    return [str(name).removeprefix("x.") for name in probe.add_class_arguments(cls, "x", fail_untyped=False)]
