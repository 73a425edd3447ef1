# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: which layers of a module are split over devices, in what way, and how they then compute."""
