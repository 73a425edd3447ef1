# SPDX-License-Identifier: Apache-2.0
"""Answers to questions about a fit before it is run: what it needs, what would make it faster, whether it can be resumed."""
