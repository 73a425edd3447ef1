# SPDX-License-Identifier: Apache-2.0
"""Reads the arguments of a class off the environment, as ``Trainer`` reads its own."""

from __future__ import annotations

import inspect
import os
from argparse import Namespace
from ast import literal_eval
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def parse_env_variables(cls: type, template: str = "PL_%(cls_name)s_%(cls_argument)s") -> Namespace:
    """Return the arguments of ``cls`` that the environment has, as python reads them; as text where it cannot."""
    found: dict[str, Any] = {}
    for name in inspect.signature(cls).parameters:
        text = os.environ.get(template % {"cls_name": cls.__name__.upper(), "cls_argument": name.upper()})
        if text:
            try:
                found[name] = literal_eval(text)
            except (ValueError, SyntaxError):
                found[name] = text
    return Namespace(**found)


def defaults_from_env_vars(fn: F) -> F:
    """Decorate a constructor: what the environment has stands in for arguments that are not given."""

    @wraps(fn)
    def with_environment(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(inspect.signature(type(self)).parameters, args, strict=False)), **kwargs}
        return fn(self, **{**vars(parse_env_variables(type(self))), **given})

    return with_environment  # type: ignore[return-value]
