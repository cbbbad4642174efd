# SPDX-License-Identifier: Apache-2.0
"""Whole numbers of a launch.

Triton's functions of these names serve kernels as well and take microseconds: thirty calls were a third of
what a small loss costs the host.
"""


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()
