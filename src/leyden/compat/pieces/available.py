# SPDX-License-Identifier: Apache-2.0
"""Which packages are installed, in which versions: the flags that programs written for Lightning look at."""

from __future__ import annotations

import importlib
import importlib.util
import operator
import platform
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from leyden.runtime.ranks import rank_zero_warn

_SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at the end: ``2.10.0+cpu`` is (2, 10)."""
    found = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in found.group().split(".")] if found else [0]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


class Requirement:
    """Whether a package is installed as a requirement asks: ``bool`` says it, ``str`` in words.

    Args:
        requirement: A name, with bounds if any: ``"torch>=2.6,<3"``; None if only ``module`` counts.
        module: What to import, where the package has another name.
    """

    def __init__(self, requirement: str | None = None, module: str | None = None) -> None:
        self.requirement, self.module = requirement, module
        self.message = ""

    def check_available(self) -> bool:
        """Whether it is, looked up anew."""
        name, bounds = _parts(self.requirement or "")
        module = self.module or name.replace("-", "_")
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            self.message = f"{module!r} is not installed: pip install {(self.requirement or module)!r}."
            return False
        if bounds:
            try:
                installed = version(name)
            except PackageNotFoundError:
                self.message = f"The package {name!r} is not installed: pip install {self.requirement!r}."
                return False
            if not all(_SIGNS[sign](_release(installed), _release(bound)) for sign, bound in bounds):
                self.message = f"{name} {installed} is installed, {self.requirement!r} is needed."
                return False
        self.message = f"{self.requirement or module!r} is installed."
        return True

    def __bool__(self) -> bool:
        return self.check_available()

    def __str__(self) -> str:
        self.check_available()
        return self.message

    __repr__ = __str__


def _parts(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    name = re.split(r"[<>=!\[ ]", requirement, maxsplit=1)[0]
    return name, re.findall(r"(>=|<=|==|!=|>|<)\s*([\w.+]+)", requirement)


def package_available(package_name: str) -> bool:
    """Whether a package of that import name is installed."""
    return importlib.util.find_spec(package_name) is not None


def module_available(module_path: str) -> bool:
    """Whether a module can be imported, the packages that it is in included."""
    try:
        importlib.import_module(module_path)
    except ImportError:
        return False
    return True


def compare_version(
    package: str,
    op: Callable[[Any, Any], bool],
    version: str,
    use_base_version: bool = False,  # noqa: ARG001  # only release numbers are compared anyway
) -> bool:
    """Whether the installed version of a package stands in a relation (``operator.ge`` …) to ``version``.

    False if the package is not installed. Only release numbers count: ``2.6.0+cpu`` is 2.6.0.
    """
    from importlib.metadata import version as installed  # noqa: PLC0415  # the argument has the name of the function

    try:
        return bool(op(_release(installed(package)), _release(version)))
    except PackageNotFoundError:
        return False


@lru_cache(maxsize=128)
def try_import_module(module_name: str) -> bool:
    """Whether a module can be imported; a failure other than its absence is said in a warning."""
    try:
        importlib.import_module(module_name)
    except (ImportError, AttributeError) as error:
        rank_zero_warn(f"{module_name} cannot be imported: {error}")
        return False
    return True


_WORDS = {"GREATER_EQUAL": operator.ge, "LESS_EQUAL": operator.le, "EQUAL": operator.eq}
_FIXED: dict[str, Callable[[], Any]] = {
    "_IS_WINDOWS": lambda: platform.system() == "Windows",
    "_IS_INTERACTIVE": lambda: hasattr(sys, "ps1") or bool(sys.flags.interactive),
    "_TORCH_EQUAL_2_8": lambda: Requirement("torch>=2.8.0,<2.9.0"),
    "_TORCH_EQUAL_2_9": lambda: Requirement("torch>=2.9.0,<2.10.0"),
    "_NUMPY_AVAILABLE": lambda: Requirement("numpy"),
    "_OMEGACONF_AVAILABLE": lambda: package_available("omegaconf"),
    "_RICH_AVAILABLE": lambda: Requirement("rich>=10.2.2"),
    "_TORCHVISION_AVAILABLE": lambda: Requirement("torchvision"),
    "_JSONARGPARSE_SIGNATURES_AVAILABLE": lambda: Requirement("jsonargparse[signatures]>=4.39.0"),
    "_REQUESTS_AVAILABLE": lambda: Requirement("requests"),
}


def __getattr__(name: str) -> Any:
    """Answer the flags: ``_TORCH_GREATER_EQUAL_2_6``, ``_PYTHON_GREATER_EQUAL_3_11_0``, ``_OMEGACONF_AVAILABLE`` …"""
    if name in _FIXED:
        return _FIXED[name]()
    found = re.fullmatch(r"_(TORCH|TORCHMETRICS|PYTHON)_(GREATER_EQUAL|LESS_EQUAL|EQUAL)_(\d+(?:_\d+)*)", name)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, word, digits = found.groups()
    bound = digits.replace("_", ".")
    if package == "PYTHON":
        return bool(_WORDS[word](sys.version_info[: bound.count(".") + 1], tuple(map(int, bound.split(".")))))
    return compare_version(package.lower(), _WORDS[word], bound)
