"""DDIM beside the ancestral sampler on the Gaussian images, at several numbers of steps.

Prints a table: r is how often each stretch of T/25 steps is walked. A cell has the error of the
mean (in standard deviations), the error of the covariance, and KL in nats, see `exact_gaussian`.

    python tests/exact_samplers.py
"""

import sys
from pathlib import Path

if __package__ is None or __package__ == "":  # run by path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.scheduler import count_evaluations
from tests.exact_gaussian import inpainting_error, times_for

SETTINGS = [(steps, r) for r in (1, 10) for steps in (25, 50, 100, 250)]
ETAS = (None, 0.0, 1.0)  # None: the ancestral sampler


def row(steps: int, r: int) -> str:
    """The line of the table for T = steps."""
    j = steps // 25
    cost = count_evaluations(times_for(r, j, steps))
    errors = [inpainting_error(r, j, steps, eta) for eta in ETAS]
    cells = [f"{error.mean:.2f}, {error.cov:.0%}, {error.kl:.2f}" for error in errors]
    return f"| {r} | {steps} | {cost:,} | {' | '.join(cells)} |"


def main() -> None:
    print("| r | T | evaluations | ancestral | DDIM, η = 0 | DDIM, η = 1 |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for steps, r in SETTINGS:
        print(row(steps, r))


if __name__ == "__main__":
    main()
