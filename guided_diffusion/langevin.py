"""The quick sampler: Langevin steps whose known pixels pull the unknown ones, and nothing else.

It works on z = x_t / √ᾱ_t = x_0 + σ n, with σ = √((1 − ᾱ_t) / ᾱ_t). Its parts are those of Karras
et al. 2022 (EDM), Wang et al. 2022 (DDNM), Zheng et al. 2025 (LanPaint, arXiv 2502.03491) and Lu et
al. 2022 (DPM-Solver++). Their combination and the constants are this project's.
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice, pairwise

import torch

from guided_diffusion.scheduler import Level
from guided_diffusion.streams import AfterEvaluation, Evaluation, Known, Streams

PredictX0 = Callable[[torch.Tensor, int], torch.Tensor]  # (x_t, t) -> x_0

FADE = 1.5  # power of σ by which the offset of the known pixels shrinks, see `langevin`


@torch.no_grad()
def langevin(
    predict_x0: PredictX0,
    levels: Sequence[Level],
    z: torch.Tensor,
    streams: Streams,
    *,
    known: Known | None = None,
    attraction: float = 1.6,
    x0_before: torch.Tensor | None = None,
    position: int = 0,
    after_evaluation: AfterEvaluation | None = None,
) -> torch.Tensor:
    """Draw x_0 ~ p(x_0 | known pixels), approximately; without known pixels, x_0 ~ p(x_0).

    predict_x0: (x_t, t) -> the x_0 that the network sees in x_t, clamped; t: a step of the base
    process. levels: see `scheduler.langevin_levels`; each pair of neighbours is one evaluation.
    z: (B, C, H, W), as noisy as the first level, or that of a saved state. What a mask leaves
    between known and unknown blends the two. attraction: how far z moves where the network's x_0 is
    not the known one, from 0 (known pixels do not pull) to 2 (beyond, it grows).
    x0_before, position: of a saved state; None and 0 at the beginning. after_evaluation: called
    after each one; what it raises stops the sampler.
    Returns (B, C, H, W), about [-1, 1]; known pixels are the given ones.
    """
    y, m = known or Known(torch.zeros_like(z), torch.zeros_like(z))
    x0 = x0_before

    for i, (level, lower) in islice(enumerate(pairwise(levels)), position, None):
        sigma, x0_before = level.sigma, x0
        x0 = predict_x0(z / math.sqrt(1 + sigma**2), level.step)

        # Known pixels move until the network sees y there, and pull the others with them
        # (LanPaint's guided score, for λ → ∞).
        pulled = z + attraction * (y - x0)

        if lower == level:  # one step of Langevin dynamics at this noise level (LanPaint)
            z_known = pulled
            z_hole = x0 + math.exp(-level.step_size) * (z - x0) + level.noise * streams.normal(z)
        else:  # down to the next level; at known pixels x_0 is y (DDNM eq. 13)
            ahead = x0
            if i > 0 and levels[i - 1] != level and lower.sigma > 0:  # DPM-Solver++ 2M
                r = math.log(levels[i - 1].sigma / sigma) / math.log(sigma / lower.sigma)
                ahead = x0 + (x0 - x0_before) / (2 * r)
            shrink = lower.sigma / sigma
            z_known = y + shrink**FADE * (pulled - y)
            z_hole = ahead + shrink * (z - ahead)
        z = m * z_known + (1 - m) * z_hole

        if after_evaluation is not None:
            signal = 1 / math.sqrt(1 + lower.sigma**2)  # √ᾱ
            after_evaluation(Evaluation(i + 1, z, x0, streams, signal, needs_x0=True))
    return z
