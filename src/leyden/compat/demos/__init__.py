# SPDX-License-Identifier: Apache-2.0
"""Small models and data for tests and demonstrations: the shapes that test suites written for Lightning know by heart."""
