"""The sampler: RePaint (Lugmayr et al. 2022, Algorithm 1), and nothing else."""

from collections.abc import Callable, Sequence
from itertools import islice, pairwise

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ReverseStep, at
from guided_diffusion.streams import AfterEvaluation, Evaluation, Known, Streams

Denoise = Callable[[torch.Tensor, int], ReverseStep]  # (x_t, t) -> p(x_{t-1} | x_t)


@torch.no_grad()
def repaint(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    times: Sequence[int],
    x: torch.Tensor,
    streams: Streams,
    *,
    known: Known | None = None,
    merge_first: bool = False,
    time_shift: int = 1,
    position: int = 0,
    after_evaluation: AfterEvaluation | None = None,
) -> torch.Tensor:
    """Draw x_0 ~ p(x_0 | known pixels), approximately; without known pixels, x_0 ~ p(x_0).

    denoise: (x_t, t) -> p(x_{t-1} | x_t). times: the walk, down to −1, see `scheduler`.
    x: (B, C, H, W), where the walk begins: pure noise, a picture noised to the first time, or the
    x of a saved state. position: of the first transition to make; above 0 after a saved state.
    merge_first: the known pixels enter before the first evaluation too. Pure noise needs none,
    since it is the same everywhere; a noised picture does.
    time_shift: re-noising from t takes the β of step t + time_shift.
    after_evaluation: called after each one; what it raises stops the sampler.
    Returns (B, C, H, W), about [-1, 1]; known pixels are the network's, close to the given ones.

    Algorithm 1 merges after each step down, at the noise level that the step has reached. Here, as
    in the published code, the merge comes before the next evaluation, at that evaluation's level.
    So steps up re-noise the network's own pixels, and nothing is merged into the result. The
    published pixels require this order, and that n is drawn before the noise of the known pixels.
    """
    for i, (t, u) in islice(enumerate(pairwise(times)), position, None):
        if u > t:  # back in time: x_{t+1} ~ N(√(1 − β) x_t, β I)
            beta = at(diffusion.tables.betas, t + time_shift)
            x = (1 - beta).sqrt() * x + beta.sqrt() * streams.normal(x)
            continue

        z = streams.normal(x)

        if known and (i > 0 or merge_first):  # the known pixels at this noise level (eq. 8a, 8c)
            abar, m = at(diffusion.tables.alphas_cumprod, t), known.mask
            x_known = abar.sqrt() * known.pixels + (1 - abar).sqrt() * streams.normal(x)
            x = m * x_known + (1 - m) * x

        p = denoise(x, t)  # all pixels, one step less noisy (eq. 8b)
        x = p.mean + p.sigma * z if t > 0 else p.mean

        if after_evaluation is not None:
            after_evaluation(Evaluation(i + 1, x, p.pred_x0, streams))
    return x
