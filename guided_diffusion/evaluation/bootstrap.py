"""Means with intervals that say how far other images of the same kind could move them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEED, BLOCKS, BLOCK = 0, 100, 100  # 10,000 resamples, a block in memory at a time
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over images, and the interval in which it lies with 95 % confidence."""

    mean: float
    low: float
    high: float
    number: int  # of values that are finite; the others do not count

    def describe(self, places: int) -> str:
        """`4.14 [3.98, 4.31]`; a single value has no interval."""
        if self.number < 2:
            return f"{self.mean:.{places}f}"
        return f"{self.mean:.{places}f} [{self.low:.{places}f}, {self.high:.{places}f}]"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of the finite values, with a percentile bootstrap interval (Efron 1979).

    The same values in the same order always give the same interval. If none is finite, all three
    are infinite, and if there is only one, all three are that one.
    """
    finite = np.array([value for value in values if math.isfinite(value)])
    if not finite.size:
        return Estimate(math.inf, math.inf, math.inf, 0)
    rng = np.random.default_rng(SEED)
    blocks = [rng.choice(finite, (BLOCK, finite.size)).mean(axis=1) for _ in range(BLOCKS)]
    low, high = np.quantile(blocks, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(finite.mean()), float(low), float(high), finite.size)
