# SPDX-License-Identifier: Apache-2.0
"""Which hooks lead to which drawings, how often, and that nothing is left behind."""

from __future__ import annotations

import pytest

from leyden.callbacks.progress.engine import LONGEST_PAUSE_S, DrawnProgressBar
from leyden.types import TrainerFn

INF = float("inf")


class Recorder:
    """A display that remembers what it was told as ``(verb, [(description, done, total), ...])``."""

    draws_at_start = True

    def __init__(self, keeps=False, interval_s=0.1):
        self.keeps, self.interval_s = keeps, interval_s
        self.events = []
        self.on_draw = lambda: None

    @staticmethod
    def _text(row):
        return row.description, row.done, row.finite_total

    def draw(self, rows):
        self.events.append(("draw", [self._text(row) for row in rows]))
        self.last_metrics = dict(rows[0].metrics)
        self.on_draw()

    def keep(self, row):
        self.events.append(("keep", [self._text(row)]))
        self.last_metrics = dict(row.metrics)

    def print(self, *args, **kwargs):
        self.events.append(("print", args))

    def close(self):
        self.events.append(("close", []))


class Bar(DrawnProgressBar):
    def __init__(self, display, **kwargs):
        super().__init__(**kwargs)
        self.display = display

    def make_display(self, trainer):
        return self.display


def passing(clock, seconds):
    def after_batch():
        clock.now += seconds

    return after_batch


def test_slow_batches_are_all_drawn(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=3, max_epochs=1, val=[2])
    trainer.after_batch = passing(clock, 1.0)
    trainer.metrics = {"loss": 1.0}
    trainer.fit(Bar(display))
    sanity, epoch, validation = "Sanity Checking", "Epoch 1/1", "Validation"
    assert display.events == [
        ("draw", [(sanity, 0, 2)]),
        ("draw", [(sanity, 1, 2)]),
        ("draw", [(sanity, 2, 2)]),
        ("draw", [(epoch, 1, 3)]),
        ("draw", [(epoch, 2, 3)]),
        ("draw", [(epoch, 3, 3)]),
        ("draw", [(epoch, 3, 3), (validation, 1, 2)]),
        ("draw", [(epoch, 3, 3), (validation, 2, 2)]),
        ("draw", [(epoch, 3, 3)]),
        ("close", []),
    ]
    assert display.last_metrics == {"loss": 1.0}


def test_J2_fast_batches_are_drawn_ten_times_a_second_and_metrics_read_no_more_often(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=20_000, max_epochs=1)
    trainer.after_batch = passing(clock, 1e-4)  # 10 000 batches a second, for two seconds
    clock.reads = 0
    trainer.fit(Bar(display))
    draws = [event for event in display.events if event[0] == "draw"]
    assert 15 <= len(draws) <= 22
    assert trainer.asked == len(draws)
    assert clock.reads < 20_000 / 25  # most steps do not even look at the clock
    assert draws[-1] == ("draw", [("Epoch 1/1", 20_000, 20_000)])


def test_J2_slow_drawings_are_made_more_seldom(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=1000, max_epochs=1)
    trainer.after_batch = passing(clock, 0.01)

    def draw_slowly():
        clock.now += 0.003

    display.on_draw = draw_slowly
    trainer.fit(Bar(display))
    assert len(display.events) == pytest.approx(10 / 0.3, abs=5)  # one hundredth of the time is spent on drawing


def test_J2_no_drawing_is_so_slow_that_the_bar_stands_still(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=1000, max_epochs=1)
    trainer.after_batch = passing(clock, 0.01)

    def hang():
        clock.now += 0.2

    display.on_draw = hang
    trainer.fit(Bar(display))
    assert len(display.events) == pytest.approx(10 / (LONGEST_PAUSE_S - 0.2), abs=5)


def test_short_epochs_are_not_all_drawn_but_the_last_state_is(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=2, max_epochs=500)
    trainer.after_batch = passing(clock, 1e-3)
    trainer.fit(Bar(display))
    assert len(display.events) < 15
    assert display.events[-2:] == [("draw", [("Epoch 500/500", 2, 2)]), ("close", [])]


def test_a_display_that_keeps_gets_each_epoch_once(fake_trainer, clock):
    display, trainer = Recorder(keeps=True, interval_s=10.0), fake_trainer(batches=2, max_epochs=3, val=[1])
    display.draws_at_start = False
    trainer.fit(Bar(display))
    assert display.events == [("keep", [(f"Epoch {epoch}/3", 2, 2)]) for epoch in (1, 2, 3)] + [("close", [])]
    assert trainer.asked == 3


def test_a_long_epoch_of_plain_lines(fake_trainer, clock):
    display, trainer = Recorder(keeps=True, interval_s=10.0), fake_trainer(batches=50, max_epochs=1)
    display.draws_at_start = False
    trainer.after_batch = passing(clock, 0.5)
    trainer.fit(Bar(display))
    assert [event[1][0][1] for event in display.events[:-1]] == [20, 40, 50]


def test_time_of_validation_is_not_time_of_training(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=2, max_epochs=1, val=[2])
    bar = Bar(display)
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    clock.now += 1.0
    bar.on_train_batch_end(trainer, None, None, None, 0)
    trainer.after_batch = passing(clock, 100.0)
    trainer.evaluate(bar)
    clock.now += 1.0
    bar.on_train_batch_end(trainer, None, None, None, 1)
    assert (bar._row.done, bar._row.elapsed, bar._row.rate) == (2, 2.0, 1.0)


def test_a_resumed_epoch_counts_only_what_ran(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=10)
    trainer.after_batch = passing(clock, 1.0)
    bar = Bar(display)
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    for index in (6, 7):
        clock.now += 1.0
        bar.on_train_batch_end(trainer, None, None, None, index)
    assert (bar._row.done, bar._row.rate) == (8, 1.0)


def test_an_epoch_without_a_start(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=10)
    bar = Bar(display)
    bar.setup(trainer, None, "fit")
    bar.on_train_batch_end(trainer, None, None, None, 6)
    clock.now += 1
    bar.on_train_batch_end(trainer, None, None, None, 7)
    assert display.events[-1] == ("draw", [("Epoch 1/2", 8, 10)])
    assert bar._row.skipped == 6


@pytest.mark.parametrize(
    ("fn", "stage", "label"),
    [
        (TrainerFn.VALIDATING, "validation", "Validation"),
        (TrainerFn.TESTING, "test", "Testing"),
        (TrainerFn.PREDICTING, "predict", "Predicting"),
    ],
)
def test_evaluation_on_its_own(fn, stage, label, fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(val=[2, 1])
    trainer.after_batch = passing(clock, 1.0)
    trainer.run(Bar(display), fn, stage)
    first, second = f"{label} DataLoader 0", f"{label} DataLoader 1"
    assert display.events == [
        ("draw", [(first, 0, 2)]),
        ("draw", [(first, 1, 2)]),
        ("draw", [(first, 2, 2)]),
        ("draw", [(second, 0, 1)]),
        ("draw", [(second, 1, 1)]),
        ("close", []),
    ]
    keeping = Recorder(keeps=True)
    trainer.run(Bar(keeping), fn, stage)
    assert [event for event in keeping.events if event[0] == "keep"] == [
        ("keep", [(first, 2, 2)]),
        ("keep", [(second, 1, 1)]),
    ]
    assert trainer.asked == 0


def test_unknown_totals(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=INF, max_epochs=1, val=[INF])
    trainer.after_batch = passing(clock, 1.0)
    trainer.fit(Bar(display))
    assert ("draw", [("Epoch 1/1", 5, None), ("Validation", 3, None)]) in display.events


def test_refresh_by_batches(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=10, max_epochs=1)
    trainer.after_batch = passing(clock, 1.0)
    trainer.fit(Bar(display, batches_per_look=4))
    assert [event[1][0][1] for event in display.events[:-1]] == [0, 1, 5, 9, 10, 10]


def test_an_exception_closes_the_display_once(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer()
    bar = Bar(display)
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    bar.on_exception(trainer, None, KeyError())
    bar.teardown(trainer, None, "fit")
    assert display.events[1:] == [("close", [])]
    assert bar._display is None


def test_several_fits(fake_trainer, clock):
    display = Recorder()
    bar = Bar(display)
    for _ in range(2):
        fake_trainer(batches=1, max_epochs=1).fit(bar)
    assert [verb for verb, _ in display.events].count("close") == 2


def test_disabled_bars_do_nothing(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(val=[2, 2])
    trainer.is_global_zero = False
    bar = Bar(display)
    trainer.fit(bar)
    trainer.run(bar, TrainerFn.TESTING, "test")
    assert display.events == []
    assert trainer.asked == 0
    assert bar.is_disabled
    bar.enable()
    trainer.is_global_zero = True
    trainer.run(bar, TrainerFn.TESTING, "test")
    assert display.events


def test_disable_and_enable_in_the_middle(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=3, max_epochs=1)
    bar = Bar(display)
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    bar.disable()
    clock.now += 1
    bar.on_train_batch_end(trainer, None, None, None, 0)
    assert display.events[1:] == [("close", [])]
    bar.enable()
    bar.on_train_batch_end(trainer, None, None, None, 1)
    clock.now += 1
    bar.on_train_batch_end(trainer, None, None, None, 2)
    assert display.events[-1] == ("draw", [("Epoch 1/1", 3, 3)])
    bar.on_train_end(trainer, None)
    assert display.events[-1] == ("close", [])


def test_a_terminal_that_is_gone_does_not_end_the_run(fake_trainer, clock):
    display, trainer = Recorder(), fake_trainer(batches=3, max_epochs=1, val=[1])
    trainer.after_batch = passing(clock, 1.0)

    def gone():
        raise BrokenPipeError

    display.on_draw = gone
    bar = Bar(display)
    trainer.fit(bar)
    assert [verb for verb, _ in display.events] == ["draw", "close"]
    assert bar.is_disabled


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), ValueError("I/O operation on closed file")])
@pytest.mark.parametrize("verb", ["draw", "keep", "close"])
def test_no_verb_of_a_display_that_is_gone_ends_the_run(fake_trainer, clock, verb, error):
    def gone(*args):
        raise error

    display, trainer = Recorder(keeps=True), fake_trainer(batches=2, max_epochs=2)
    trainer.after_batch = passing(clock, 1.0)
    setattr(display, verb, gone)
    bar = Bar(display)
    trainer.fit(bar)
    assert bar.is_disabled


def test_other_errors_of_a_display_come_out(fake_trainer, clock):
    display, trainer = Recorder(keeps=True), fake_trainer(batches=2, max_epochs=2)
    display.keep = lambda row: int("x")
    with pytest.raises(ValueError, match="invalid literal"):
        trainer.fit(Bar(display))


def test_errors_in_metrics_are_the_users(fake_trainer, clock):
    class Mine(Bar):
        def get_metrics(self, trainer, pl_module):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fake_trainer().fit(Mine(Recorder()))


def test_print_goes_through_the_display(fake_trainer, clock, capsys):
    display, trainer = Recorder(), fake_trainer()
    bar = Bar(display)
    bar.print("before")
    bar.setup(trainer, None, "fit")
    bar.on_train_epoch_start(trainer, None)
    bar.print("during")
    bar.on_train_end(trainer, None)
    bar.print("after")
    assert capsys.readouterr().out == "before\nafter\n"
    assert ("print", ("during",)) in display.events


def test_a_display_is_required(fake_trainer):
    with pytest.raises(NotImplementedError, match="make_display"):
        fake_trainer().fit(DrawnProgressBar())
