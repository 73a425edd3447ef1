# SPDX-License-Identifier: Apache-2.0
"""Names of checkpoint files: templates with fields, such as ``"{epoch}-{val_loss:.2f}"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_FIELD = re.compile(r"\{([^{}:!]+)((?:![rsa])?(?::[^{}]*)?)\}")


def fill_fields(template: str, values: Mapping[str, Any], label: str | None) -> str:
    """Replace each ``{name:format}`` in ``template`` by the value of that name, 0 if there is none.

    With a ``label``, such as ``"="``, ``{epoch}`` becomes ``epoch=3``. Names may contain what Python's own fields
    cannot have, dots and slashes.
    """

    def fill(field: re.Match[str]) -> str:
        name, form = field.groups()
        value = f"{{0{form}}}".format(values.get(name, 0))
        return value if label is None else f"{name}{label}{value}"

    return _FIELD.sub(fill, template)
