# SPDX-License-Identifier: Apache-2.0
"""Tests of LambdaCallback."""

from __future__ import annotations

import inspect

import pytest

from leyden.callbacks import Callback, LambdaCallback
from leyden.hooks import HOOKS, is_written


def test_one_argument_for_each_hook():
    arguments = [name for name in inspect.signature(LambdaCallback).parameters if name != "misspelt"]
    assert set(arguments) == {hook.name for hook in HOOKS if "C" in hook.owners} - {"state_dict", "load_state_dict"}
    assert arguments[:2] == ["setup", "teardown"]


def test_functions_become_hooks(make_trainer):
    calls = []
    callback = LambdaCallback(
        setup=lambda trainer, module, stage: calls.append(stage), on_train_end=lambda *args: calls.append(len(args))
    )
    make_trainer([callback]).fit()
    assert calls == ["fit", 2]
    assert is_written(callback, "on_train_end", Callback)
    assert not is_written(callback, "on_train_start", Callback)


def test_misspelt_hook():
    with pytest.raises(TypeError, match=r"'on_train_ends'. Did you mean 'on_train_end'\?"):
        LambdaCallback(on_train_ends=print)
