"""The sampler: Algorithm 1 of RePaint (Lugmayr et al. 2022), and nothing else."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ReverseStep

Denoise = Callable[[torch.Tensor, int], ReverseStep]  # (x_t, t) -> p(x_{t-1} | x_t)


class Streams:
    """Random numbers of a batch, each image from a generator of its own.

    An image's numbers therefore do not depend on its batch, its neighbours or its process.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def classes(self, num_classes: int) -> torch.Tensor:
        """A class for each image, (B,)."""
        return torch.cat(
            [
                torch.randint(0, num_classes, (1,), generator=g, device=g.device)
                for g in self.generators
            ]
        )

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of this shape (B, C, H, W), in this memory format."""
        noise = torch.empty_like(like)
        for image, generator in zip(noise, self.generators, strict=True):
            image.copy_(torch.randn(image.shape, generator=generator, device=generator.device))
        return noise


@torch.no_grad()
def repaint(
    denoise: Denoise,
    diffusion: GaussianDiffusion,
    times: Sequence[int],
    gt: torch.Tensor,
    keep_mask: torch.Tensor,
    streams: Streams,
    *,
    inject_known: bool = True,
    time_shift: int = 1,
    progress: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Draw x_0 ~ p(x_0 | known pixels), approximately.

    denoise: (x_t, t) -> p(x_{t-1} | x_t). times: from t_T − 1 to −1, see `scheduler`.
    gt: (B, C, H, W) in [-1, 1]. keep_mask: the same shape, 1 = known, 0 = to be filled in.
    inject_known: False samples freely, whatever gt. time_shift: re-noising from t takes the β of
    step t + time_shift. progress: called after each evaluation with the x_0 that it predicts.
    Returns (B, C, H, W), about [-1, 1]; known pixels are the network's, close to gt.
    """
    m = keep_mask
    x = streams.normal(gt)  # x_T ~ N(0, I)
    for i, (t, u) in enumerate(pairwise(times)):
        if u > t:  # back in time: x_{t+1} ~ N(sqrt(1 − β) x_t, β I)
            beta = diffusion.at("betas", t + time_shift)
            x = (1 - beta).sqrt() * x + beta.sqrt() * streams.normal(x)
            continue

        n = streams.normal(x)

        if inject_known and i > 0:  # the known region at this noise level (eq. 8a, 8c)
            abar = diffusion.at("alphas_cumprod", t)
            x_known = abar.sqrt() * gt + (1 - abar).sqrt() * streams.normal(x)
            x = m * x_known + (1 - m) * x

        p = denoise(x, t)  # the unknown region, one step less noisy (eq. 8b)
        x = p.mean + p.sigma * n if t > 0 else p.mean

        if progress is not None:
            progress(p.pred_x0)
    return x
