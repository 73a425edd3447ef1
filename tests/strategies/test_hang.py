# SPDX-License-Identifier: Apache-2.0
"""What a hang is, and what is none; who is behind, and who waits."""

from __future__ import annotations

from typing import Any

import pytest

from leyden.strategies.board import ranks_in_words
from leyden.strategies.hang import is_timeout, verdict_on


def _stands(at: int = 5, exchange: str = "", still: float = 60.0, **more: Any) -> dict[str, Any]:
    event = f"waits in the exchange {exchange!r}" if exchange else "in training_step()"
    found = {"at": [0, 3, at], "exchange": exchange, "still": still, "event": event, "patient": False, "error": None}
    return {**found, **more}


def _verdict(answers: list[dict[str, Any] | None], gone: tuple[int, ...] = (), late: bool = False) -> str | None:
    there = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
    return verdict_on(there, set(gone), len(answers), 60.0, 0, late)


def test_d5_the_one_in_no_exchange_is_behind() -> None:
    found = _verdict([_stands(6, "barrier"), _stands(), _stands(6, "barrier")])
    assert found is not None
    head, *lines = found.splitlines()
    assert head == "rank 1 of 3 hangs, and ranks 0 and 2 wait: nothing has happened for 60 s."
    assert lines[1] == "  rank 1 is behind: in training_step(), for 60 s"
    assert lines[2] == "  rank 2 waits: waits in the exchange 'barrier', for 60 s"


def test_d5_where_nobody_stands_in_an_exchange_the_count_of_them_tells() -> None:
    found = _verdict([_stands(6), _stands(5), _stands(6)])  # in backward, say, whose frames are not Python's
    assert found is not None
    assert found.startswith("rank 1 of 3 hangs, and ranks 0 and 2 wait")


def test_d5_exchanges_that_do_not_fit_together() -> None:
    found = _verdict([_stands(5, "broadcast"), _stands(5, "all_gather")])
    assert found is not None
    assert found.startswith("all 2 ranks wait in exchanges that do not fit together")
    found = _verdict([_stands(5, "broadcast"), _stands(4, "barrier")])
    assert found is not None
    assert found.startswith("rank 1 of 2 hangs, and rank 0 waits")


def test_d5_one_that_has_left_or_does_not_answer_is_behind() -> None:
    found = _verdict([_stands(6, "barrier"), None], gone=(1,))
    assert found is not None
    assert "rank 1 is behind: it has left the run" in found
    found = _verdict([_stands(6, "barrier"), None])
    assert found is not None
    assert "rank 1 is behind: it does not answer" in found


@pytest.mark.parametrize(
    "answers",
    [
        [_stands(), _stands()],  # both compute
        [_stands(6, "barrier"), _stands(still=2.0)],  # one has just done something
        [_stands(6, "barrier"), _stands(patient=True)],  # one waits for what may take its time
    ],
)
def test_d5_what_is_no_hang(answers: list[dict[str, Any] | None]) -> None:
    assert _verdict(answers) is None


def test_d5_an_exchange_whose_time_is_up_is_told_whatever_the_others_do() -> None:
    late = _stands(6, "barrier", 1e9, error="rank 0 waits in the exchange 'barrier', whose time was up")
    found = _verdict([late, _stands(still=1.0)], late=True)
    assert found is not None
    assert found.startswith(
        "rank 1 of 2 does not come, and rank 0 waits: rank 0 waits in the exchange 'barrier', whose"
    )


def test_the_errors_of_an_exchange_whose_time_is_up() -> None:
    assert is_timeout(RuntimeError("[unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"))
    assert is_timeout(RuntimeError("Application timeout caused pair closure"))
    assert not is_timeout(RuntimeError("Connection closed by peer"))
    assert not is_timeout(ValueError("Timed out waiting"))


def test_ranks_in_words() -> None:
    assert [ranks_in_words(r) for r in ([3], [1, 3], [1, 2, 3], [0, 2, 3])] == [
        "rank 3", "ranks 1 and 3", "ranks 1 to 3", "ranks 0, 2 and 3",
    ]  # fmt: skip
