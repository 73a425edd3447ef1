# SPDX-License-Identifier: Apache-2.0
"""The loops: training, evaluation, prediction, and what they are made of."""
