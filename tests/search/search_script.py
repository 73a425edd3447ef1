# SPDX-License-Identifier: Apache-2.0
"""A search that waits for ever, to be interrupted: python search_script.py <folder> <kind of wait>."""

from __future__ import annotations

import sys

import trial_functions

from leyden import HyperOptArgumentParser

if __name__ == "__main__":
    parser = HyperOptArgumentParser()
    parser.opt_list("--x", type=int, default=0, options=[0, 1, 2], tunable=True)
    parser.add_argument("folder")
    parser.add_argument("wait")
    parser.parse_args(sys.argv[1:]).optimize_parallel_cpu(trial_functions.leaves_a_process_and_waits, None, 2)
