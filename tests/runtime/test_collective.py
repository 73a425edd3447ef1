# SPDX-License-Identifier: Apache-2.0
"""Copies of a process begin when all of them are made."""

from __future__ import annotations

import os
import time

from leyden.runtime.collective import Gate


def test_copies_wait_until_all_are_made_or_nobody_makes_them_any_more() -> None:
    gate, children = Gate(), []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            gate.wait()
            os._exit(7)
        children.append(pid)
    time.sleep(0.2)
    assert [os.waitpid(pid, os.WNOHANG) for pid in children] == [(0, 0)] * 3
    gate.open()
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [7] * 3
