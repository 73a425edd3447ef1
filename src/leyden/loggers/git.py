# SPDX-License-Identifier: Apache-2.0
"""Call git, for an Experiment that marks the commit of its code with a tag."""

from __future__ import annotations

import os
import subprocess

from leyden.errors import MisconfigurationException


def git(*args: str) -> None:
    """Run git in the current directory.

    Raises:
        MisconfigurationException: if there is no git, or it fails; with what it said.
    """
    try:
        done = subprocess.run(["git", *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise MisconfigurationException(
            "Experiment(create_git_tag=True) needs git, which is not on the path. Install it, or set create_git_tag=False."
        ) from error
    if done.returncode != 0:
        raise MisconfigurationException(
            f"Experiment(create_git_tag=True): `git {' '.join(args)}` in {os.getcwd()!r} said: {done.stderr.strip()}. "
            "Start the program inside a git repository that has a commit and no such tag yet, or set create_git_tag=False."
        )
