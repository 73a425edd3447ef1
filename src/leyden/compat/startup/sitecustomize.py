# SPDX-License-Identifier: Apache-2.0
"""Installs the import names when a python starts with this folder on PYTHONPATH; then runs the sitecustomize behind it."""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
# the program is to find what it would find without us
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != _HERE]

if importlib.util.find_spec("leyden") is not None:  # the program may start another python, which has no Leyden
    import leyden.compat

    leyden.compat.install()

_spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
if _spec is not None and _spec.loader is not None:
    sys.modules["sitecustomize"] = _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
