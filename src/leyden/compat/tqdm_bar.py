# SPDX-License-Identifier: Apache-2.0
"""The class of tqdm's bars that Lightning subclasses, for libraries that make bars of their own of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:

    class _tqdm: ...
else:
    try:
        from tqdm.auto import tqdm as _tqdm
    except ImportError as error:
        raise ImportError("Tqdm of Lightning's progress bars needs tqdm: pip install tqdm.") from error


class Tqdm(_tqdm):
    """tqdm's bar; a number in its text has the same width at each refresh."""

    @staticmethod
    def format_num(n: int | float | str) -> str:
        """Return ``n`` with at least five characters: 0.1 is shown as 0.100."""
        return n if isinstance(n, str) else f"{n:.3f}" if isinstance(n, float) and abs(n) < 100 else str(n)
