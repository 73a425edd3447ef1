# SPDX-License-Identifier: Apache-2.0
"""Of what an update is made where other processes go on: turns where that is possible, and one line that says what is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from leyden.data.combined import CombinedLoader
from leyden.loops.schedule import step_schedules
from leyden.loops.several.elastic import decide, is_shared


def _session(shares: int, former: dict[str, Any], automatic: bool = True, **config: Any) -> Any:
    config = {"accumulate_grad_batches": 1, "keep_global_batch": True, **config}
    return SimpleNamespace(
        strategy=SimpleNamespace(data_size=shares), config=SimpleNamespace(**config), turns=1, update=None, resized=False,
        module=SimpleNamespace(automatic_optimization=automatic), checkpoint={"leyden": {"progress": {"update": former}}},
        progress=SimpleNamespace(update={}), position=None,
    )  # fmt: skip


def _was(shares: int, size: int | None = 8, accumulate: int = 1) -> dict[str, Any]:
    return {"shares": shares, "accumulate": accumulate, "batch_sizes": [size]}


def _decided(session: Any, size: int = 8) -> Any:
    decide(session, CombinedLoader(DataLoader(list(range(64)), size)))
    return session


@pytest.mark.parametrize(
    ("session", "turns", "said"),
    [
        (_session(2, _was(4)), 2, "each takes 2 batches where it took one, so that an update keeps its 32 samples"),
        (_session(1, _was(4)), 4, "made by 4 processes and are made by 1 process now: each takes 4 batches"),
        (_session(3, _was(4)), 1, "since 4 is no multiple of 3: an update has 24 samples, before 32 samples."),
        (_session(4, _was(2)), 1, "since 2 is no multiple of 4: an update has 32 samples, before 16 samples."),
        (_session(2, _was(4), keep_global_batch=False), 1, "since keep_global_batch=False: an update has 16 samples"),
        (_session(2, _was(4), automatic=False), 1, "since optimization is manual"),
        (_session(2, _was(4, 4, 3)), 1, "since the batch size or accumulate_grad_batches is another one"),
    ],
)
def test_one_line_says_of_what_an_update_is_made(
    session: Any, turns: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert _decided(session).turns == turns
    assert caplog.text.count("The updates of this run were made by") == 1
    assert said in caplog.text
    assert session.resized is (turns == 1)
    decide(session, CombinedLoader([1]))  # loaders that are asked for anew
    assert session.turns == turns


@pytest.mark.parametrize("former", [{}, _was(2), _was(4, 4), _was(1, 8, 2)])
def test_nothing_is_said_where_nothing_changes_or_the_script_sees_to_it(
    former: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    session = _decided(_session(2, former))
    assert (session.turns, session.resized, caplog.text) == (1, False, "")
    assert session.update == _was(2)


def test_what_a_run_began_with_is_not_forgotten_where_it_cannot_be_at_present() -> None:
    assert _decided(_session(3, _was(4))).update == _was(4)
    assert _decided(_session(2, _was(4))).update == _was(4)
    assert _decided(_session(2, _was(4), keep_global_batch=False)).update == _was(2)


def test_one_process_shares_out_where_it_takes_turns_or_others_have_begun_the_epoch() -> None:
    session = _session(1, {})
    assert not is_shared(session, "train")
    session.turns = 4
    assert is_shared(session, "train")
    assert not is_shared(session, "val")
    session.turns = 1
    session.position = SimpleNamespace(data={"train": {"loaders": [{"share": None}, {"share": {"base": 3}}]}})
    assert is_shared(session, "train")


class _Schedule:
    total_steps, last_epoch = 2, 0

    def step(self) -> None:
        self.last_epoch += 1


@pytest.mark.parametrize(("turns", "frequency", "steps"), [(1, 1, 2), (2, 1, 2), (2, 2, 1)])
def test_a_schedule_ends_with_its_total_and_counts_turns_as_one(turns: int, frequency: int, steps: int) -> None:
    schedule = _Schedule()
    config = SimpleNamespace(scheduler=schedule, interval="step", frequency=frequency, reduce_on_plateau=False)
    session: Any = SimpleNamespace(
        turns=turns, strategy=SimpleNamespace(lr_scheduler_configs=[config]), hooks=SimpleNamespace(lr_scheduler_step=None),
        progress=SimpleNamespace(resized=True, scheduler_steps=0),
    )  # fmt: skip
    for update in (1, 2):
        step_schedules(session, "step", False, update * turns)
    assert schedule.last_epoch == steps
    schedule.last_epoch = 2
    with pytest.warns(UserWarning, match="_Schedule was made for 2 steps"):
        step_schedules(session, "step", False, 4 * turns)
    assert schedule.last_epoch == 2
    session.progress.resized = False
    step_schedules(session, "step", False, 4 * turns)
    assert schedule.last_epoch == 3
