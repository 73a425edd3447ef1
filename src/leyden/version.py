# SPDX-License-Identifier: Apache-2.0
"""The version of Leyden, where every floor can read it."""

__version__ = "0.1.0"
