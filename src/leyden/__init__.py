# SPDX-License-Identifier: Apache-2.0
"""Leyden: a trainer for PyTorch."""

__version__ = "0.1.0"
