# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from leyden.errors import SIGTERMException
from leyden.signals import STOPS, AnswersSignals, Interrupt


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_is_noted_and_its_exception_stands_for_it() -> None:
    for number in STOPS:
        with Interrupt() as interrupt:
            assert (interrupt.received, interrupt.number) == (False, None)
            send(number)
            assert (interrupt.received, interrupt.number) == (True, number)
            assert interrupt.terminates == (number != signal.SIGINT)
            expected = KeyboardInterrupt if number == signal.SIGINT else SIGTERMException
            assert not interrupt.answered
            with pytest.raises(expected) as caught:
                interrupt.answer()
            assert type(caught.value) is expected
            assert interrupt.answered


def test_a_strategy_decides_when_what_was_asked_is_received() -> None:
    asked: list[Interrupt] = []
    with Interrupt(asked.append) as interrupt:
        send(signal.SIGTERM)
        assert asked == [interrupt]
        assert interrupt.asked
        assert not interrupt.received


def test_an_error_of_another_thread_is_raised_and_the_first_one_counts() -> None:
    error = ValueError("first")
    interrupt = Interrupt()
    for each in (error, KeyError("second")):
        thread = threading.Thread(target=interrupt.fail, args=(each,))
        thread.start()
        thread.join()
    assert interrupt.received
    with pytest.raises(ValueError, match="first") as caught:
        interrupt.answer()
    assert caught.value is error


def test_a_second_ctrl_c_raises_where_the_program_stands() -> None:
    with Interrupt() as interrupt:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert interrupt.forced


def test_one_that_answers_for_itself_keeps_its_signals() -> None:
    class Own(AnswersSignals):
        def __init__(self) -> None:
            self.noted: list[int] = []

        def note(self, number: int, frame: Any) -> None:
            self.noted.append(number)

    own = Own()
    before = signal.signal(signal.SIGUSR1, own.note)
    try:
        with Interrupt() as interrupt:
            send(signal.SIGUSR1)
            assert not interrupt.received
            assert own.noted == [signal.SIGUSR1]
            send(signal.SIGTERM)
            assert interrupt.received
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_whoever_chained_the_handler_gets_the_former_one_after_the_run() -> None:
    noted: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: noted.append(number))
    try:
        with Interrupt():
            ours: Any = signal.getsignal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, lambda number, frame: ours(number, frame))
        send(signal.SIGUSR1)
        assert noted == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_first_process_of_a_container_ends_too() -> None:
    # there the system does nothing by default, so that the signal that a process sends itself comes back to no effect
    code = (
        "import os, signal; from leyden.signals import Interrupt; os.kill = lambda *_: None\n"
        "with Interrupt(): [signal.raise_signal(signal.SIGTERM) for _ in range(2)]"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 143
