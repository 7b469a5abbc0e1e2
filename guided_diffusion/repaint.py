"""The sampler: Algorithm 1 of RePaint (Lugmayr et al. 2022), and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ReverseStep
from guided_diffusion.streams import Streams

Denoise = Callable[[torch.Tensor, int], ReverseStep]  # (x_t, t) -> p(x_{t-1} | x_t)


@dataclass(frozen=True)
class SamplerState:
    """All that the sampler has between two transitions; from it, it goes on to the same pixels."""

    position: int  # of the next transition, among the pairs of neighbouring times
    x: torch.Tensor  # (B, C, H, W)
    streams: list[torch.Tensor]  # see `Streams.state`


@dataclass(frozen=True)
class Evaluation:
    """What the sampler shows after each evaluation of the network."""

    position: int  # of the next transition
    x: torch.Tensor  # (B, C, H, W), noisy
    pred_x0: torch.Tensor  # (B, C, H, W), the x_0 that the network predicts
    streams: Streams

    def state(self) -> SamplerState:
        """What to go on from later."""
        return SamplerState(self.position, self.x, self.streams.state())


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
    picture: torch.Tensor | None = None,
    start: SamplerState | None = None,
    after_evaluation: Callable[[Evaluation], None] | None = None,
) -> torch.Tensor:
    """Draw x_0 ~ p(x_0 | known pixels), approximately.

    denoise: (x_t, t) -> p(x_{t-1} | x_t). times: from t_T − 1, or with a picture from any
    time, to −1, see `scheduler`.
    gt: (B, C, H, W) in [-1, 1]. keep_mask: the same shape, 1 = known, 0 = to be filled in.
    inject_known: False samples freely, whatever gt. time_shift: re-noising from t takes the β of
    step t + time_shift. picture: complete, of gt's shape and range, to be noised to the first of
    the times; None: pure noise. start: where an earlier run was stopped; None: at the beginning.
    after_evaluation: called after each one; what it raises stops the sampler.
    Returns (B, C, H, W), about [-1, 1]; known pixels are the network's, close to gt.
    """
    m = keep_mask
    if start is not None:
        first, x = start.position, start.x.to(gt.device)
        streams.set_state(start.streams)
    elif picture is None:
        first, x = 0, streams.normal(gt)  # x_T ~ N(0, I)
    else:  # x_t ~ q(x_t | picture)
        first, x = 0, diffusion.q_sample(picture, times[0], streams.normal(gt))

    first_merge = 1 if picture is None else 0  # pure noise is the same everywhere

    for i, (t, u) in islice(enumerate(pairwise(times)), first, None):
        if u > t:  # back in time: x_{t+1} ~ N(sqrt(1 − β) x_t, β I)
            beta = diffusion.at("betas", t + time_shift)
            x = (1 - beta).sqrt() * x + beta.sqrt() * streams.normal(x)
            continue

        n = streams.normal(x)

        if inject_known and i >= first_merge:  # the known region at this noise level (eq. 8a, 8c)
            abar = diffusion.at("alphas_cumprod", t)
            x_known = abar.sqrt() * gt + (1 - abar).sqrt() * streams.normal(x)
            x = m * x_known + (1 - m) * x

        p = denoise(x, t)  # the unknown region, one step less noisy (eq. 8b)
        x = p.mean + p.sigma * n if t > 0 else p.mean

        if after_evaluation is not None:
            after_evaluation(Evaluation(i + 1, x, p.pred_x0, streams))
    return x
