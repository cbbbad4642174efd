# SPDX-License-Identifier: Apache-2.0
"""Weights that change in training: a callable step → number."""

from __future__ import annotations

from collections.abc import Callable

from sslkernels.functional import _checks as checks


def beta_schedule(
    total_steps: int,
    final: float = 1.0,
    *,
    start: float = 0.0,
    cycles: int = 1,
    warm_up: float = 0.5,
) -> Callable[[int], float]:
    """Weight of the KL term of ``vae_loss``: linear warm-up, once or in cycles.

    Each of the cycles takes total_steps / cycles steps: beta rises from start to final in the first
    part, ``warm_up`` of it, and stays there.  One cycle is the warm-up of Bowman et al. 2016.

    Args:
        total_steps: Of all cycles, at least 1; later steps keep final.
        final: Weight at the end of a warm-up.
        start: Weight at its beginning.
        cycles: How often, at least 1; Fu et al. use 4.
        warm_up: Share of a cycle, above 0 and at most 1.

    Returns:
        A callable step → beta; it can be pickled.

    Raises:
        TypeError: If an argument is no number, or total_steps or cycles no integer.
        ValueError: If an argument is out of range.

    Reference:
        Bowman et al., Generating Sentences from a Continuous Space, arXiv:1511.06349; Fu et al.,
        Cyclical Annealing Schedule, arXiv:1903.10145.

    Example:
        >>> from sslkernels import beta_schedule
        >>> beta = beta_schedule(100, cycles=2)
        >>> [beta(step) for step in (0, 10, 25, 49, 50, 100)]
        [0.0, 0.4, 1.0, 1.0, 0.0, 1.0]
    """
    op = "beta_schedule"
    total_steps = checks.integer(op, "total_steps", total_steps, 1)
    cycles = checks.integer(op, "cycles", cycles, 1)
    start, final = checks.number(op, "start", start), checks.number(op, "final", final)
    warm_up = checks.positive(op, "warm_up", warm_up)
    if warm_up > 1:
        raise ValueError(f"{op}: warm_up must be at most 1, got {warm_up}")
    return _BetaSchedule(total_steps, final, start, cycles, warm_up)


class _BetaSchedule:
    """See ``beta_schedule``; a class, so that it can be pickled and copied."""

    def __init__(
        self, total_steps: int, final: float, start: float, cycles: int, warm_up: float
    ) -> None:
        self.total_steps, self.final, self.start = total_steps, final, start
        self.cycles, self.warm_up = cycles, warm_up

    def __call__(self, step: int) -> float:
        if step >= self.total_steps:
            return self.final
        along = max(step, 0) * self.cycles / self.total_steps % 1.0
        return self.start + (self.final - self.start) * min(1.0, along / self.warm_up)

    def __repr__(self) -> str:
        return (
            f"beta_schedule({self.total_steps}, {self.final}, start={self.start}, "
            f"cycles={self.cycles}, warm_up={self.warm_up})"
        )
