"""The hybrid objective of Nichol & Dhariwal 2021, "Improved DDPM", and the choice of timesteps."""

import math
from collections.abc import Callable

import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ReverseStep, at

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t) -> output


def training_losses(
    network: Network,
    diffusion: GaussianDiffusion,
    x0: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    *,
    predict_xstart: bool = False,
    use_kl: bool = False,
) -> dict[str, torch.Tensor]:
    """Losses of each image, (B,): `loss` to minimise, and its parts `mse` and `vlb` (bits/dim).

    x0: (B, C, H, W) in [-1, 1]. t: LongTensor (B,), the steps to learn. noise: like x0.
    Improved DDPM eq. 16: mse + λ·vlb, λ = N/1000, where vlb trains only the variance; a network
    without learned variance has mse alone. use_kl: the variational bound N·vlb alone, which then
    trains the mean too.
    """
    x_t = diffusion.q_sample(x0, t, noise)
    output = network(x_t, t).float()
    channels = x0.shape[1]
    prediction, v = output[:, :channels], output[:, channels:]
    target = x0 if predict_xstart else noise
    losses = {"mse": _mean_over_pixels((target - prediction) ** 2)}
    if use_kl or v.shape[1]:
        mean_source = prediction if use_kl else prediction.detach()
        p = diffusion.reverse_step(
            torch.cat([mean_source, v], dim=1),
            x_t,
            t,
            predict_xstart=predict_xstart,
            clip_denoised=False,
        )
        losses["vlb"] = variational_bound(diffusion, p, x0, x_t, t)
    losses["loss"] = _combined(losses, diffusion.num_timesteps, use_kl)
    return losses


def _combined(losses: dict[str, torch.Tensor], steps: int, use_kl: bool) -> torch.Tensor:
    if use_kl:
        return losses["vlb"] * steps
    if "vlb" not in losses:
        return losses["mse"]
    return losses["mse"] + losses["vlb"] * (steps / 1000)


def variational_bound(
    diffusion: GaussianDiffusion,
    p: ReverseStep,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """One term of the variational bound for each image, (B,), in bits per dimension.

    KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) for t > 0, −log p(x_0 | x_1) for t = 0.
    """
    kl = gaussian_kl(
        diffusion.posterior_mean(x0, x_t, t),
        at(diffusion.tables.posterior_log_variance_clipped, t),
        p.mean,
        p.log_variance,
    )
    # Where the likelihood does not count, it is that of x_0 itself: far from it, torch's gradient
    # is infinite, and times 0 not a number.
    is_first = (t == 0).view(-1, 1, 1, 1)
    mean = torch.where(is_first, p.mean, x0)
    nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * p.log_variance)
    return _mean_over_pixels(torch.where(is_first, nll, kl)) / math.log(2)


def gaussian_kl(
    mean1: torch.Tensor,
    log_variance1: torch.Tensor,
    mean2: torch.Tensor,
    log_variance2: torch.Tensor,
) -> torch.Tensor:
    """KL(N(mean1, variance1) ‖ N(mean2, variance2)) of each value, in nats."""
    gap = log_variance1 - log_variance2
    return 0.5 * (gap.exp() - gap - 1 + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_sigma: torch.Tensor
) -> torch.Tensor:
    """Log probability, in nats, of each byte value under a Gaussian (DDPM eq. 13).

    x: bytes scaled to [-1, 1], so that neighbours are 2/255 apart. The outermost bytes own the
    tails.
    """
    upper = (x + 1 / 255 - mean) / log_sigma.exp()
    lower = (x - 1 / 255 - mean) / log_sigma.exp()
    between = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    log_between = between.clamp(min=1e-12).log()
    log_below = torch.special.log_ndtr(upper)
    log_above = torch.special.log_ndtr(-lower)
    return torch.where(x < -0.999, log_below, torch.where(x > 0.999, log_above, log_between))


def _mean_over_pixels(x: torch.Tensor) -> torch.Tensor:
    return x.mean(dim=(1, 2, 3))


class UniformTimesteps:
    """Every step equally often."""

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def sample(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps (count,) from torch's global generator, and their losses' weights (count,)."""
        return torch.randint(0, self.num_timesteps, (count,)), torch.ones(count)

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Nothing to learn from losses."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Nothing to restore."""


class LossSecondMomentTimesteps:
    """Steps in proportion to sqrt(E[loss²]) (Improved DDPM eq. 18), once each has been seen."""

    history = 10  # losses remembered of each step
    uniform_share = 0.001  # so that no step is ever forgotten

    def __init__(self, num_timesteps: int):
        self.losses = torch.zeros(num_timesteps, self.history, dtype=torch.float64)
        self.seen = torch.zeros(num_timesteps, dtype=torch.long)

    def probabilities(self) -> torch.Tensor:
        """Probability of each step, (N,), float64."""
        uniform = torch.full_like(self.losses[:, 0], 1 / len(self.losses))
        if (self.seen < self.history).any():
            return uniform
        weights = self.losses.square().mean(dim=1).sqrt()
        return weights / weights.sum() * (1 - self.uniform_share) + uniform * self.uniform_share

    def sample(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps (count,), and the weights that keep the expected loss what it was."""
        p = self.probabilities()
        t = torch.multinomial(p, count, replacement=True)
        return t, (1 / (len(p) * p[t])).float()

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember the unweighted losses (B,) of steps t (B,)."""
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            self.losses[step, self.seen[step] % self.history] = loss
            self.seen[step] += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"losses": self.losses, "seen": self.seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Raises RuntimeError if they are of another number of steps."""
        self.losses.copy_(state["losses"])
        self.seen.copy_(state["seen"])


TIMESTEP_SAMPLERS = {
    "uniform": UniformTimesteps,
    "loss-second-moment": LossSecondMomentTimesteps,
}
