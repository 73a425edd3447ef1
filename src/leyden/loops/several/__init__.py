# SPDX-License-Identifier: Apache-2.0
"""What the loops need when there are several processes, or others than before: agreements, shares, and what is put together."""
