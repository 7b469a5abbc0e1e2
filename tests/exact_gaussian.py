"""How far samples are from the truth, where the truth is known.

The data are small Gaussian images, so the ideal network and the distribution of the hidden pixels
given the known ones have closed forms. Prints a table for some r (walks over each stretch) and
j (steps in a stretch) of RePaint, the paper's being r = j = 10, and for the quick sampler:

    python tests/exact_gaussian.py
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

if __package__ is None or __package__ == "":  # run by path: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from guided_diffusion.config import LangevinConfig, ScheduleConfig
from guided_diffusion.gaussian_diffusion import Ddim, GaussianDiffusion, ReverseStep, beta_schedule
from guided_diffusion.langevin import PredictX0, langevin
from guided_diffusion.repaint import Denoise, repaint
from guided_diffusion.respace import respaced_process
from guided_diffusion.scheduler import count_evaluations, jump_times, langevin_levels
from guided_diffusion.streams import Known, Streams

SIDE = 4
PIXELS = SIDE * SIDE
STEPS = 250


@dataclass(frozen=True)
class Gaussian:
    """N(mean, cov) over n pixels, row by row; float64."""

    mean: np.ndarray  # (n,)
    cov: np.ndarray  # (n, n)

    def marginal(self, pixels: np.ndarray) -> "Gaussian":
        """The distribution of the pixels where this mask (n,) is true."""
        return Gaussian(self.mean[pixels], self.cov[np.ix_(pixels, pixels)])

    def given(self, known: np.ndarray, values: np.ndarray) -> "Gaussian":
        """The other pixels' distribution, if those where known (n,) is true have these values."""
        gain = np.linalg.solve(self.cov[np.ix_(known, known)], self.cov[np.ix_(known, ~known)]).T
        return Gaussian(
            self.mean[~known] + gain @ (values - self.mean[known]),
            self.cov[np.ix_(~known, ~known)] - gain @ self.cov[np.ix_(known, ~known)],
        )


@dataclass(frozen=True)
class Distance:
    """How far a Gaussian is from the true one."""

    mean: float  # root mean square error of the means, in true standard deviations
    cov: float  # Frobenius norm of the difference of the covariances, over that of the true one
    kl: float  # KL(found ‖ true) in nats


def distance(found: Gaussian, true: Gaussian) -> Distance:
    """All three measures of `found`, a Gaussian over the same pixels as `true`."""
    shift = found.mean - true.mean
    ratio = np.linalg.solve(true.cov, found.cov)
    mahalanobis = shift @ np.linalg.solve(true.cov, shift)
    return Distance(
        mean=float(np.sqrt(np.mean(shift**2 / np.diag(true.cov)))),
        cov=float(np.linalg.norm(found.cov - true.cov) / np.linalg.norm(true.cov)),
        kl=float(np.trace(ratio) - len(shift) - np.linalg.slogdet(ratio)[1] + mahalanobis) / 2,
    )


def symmetric_images() -> Gaussian:
    """Images that resemble faces in two ways: neighbours are alike, and so are mirrored pixels."""
    rows, columns = np.divmod(np.arange(PIXELS), SIDE)

    def likeness(other_columns: np.ndarray) -> np.ndarray:
        return np.exp(-np.hypot(rows[:, None] - rows, columns[:, None] - other_columns) / 2)

    cov = likeness(columns) + 0.8 * likeness(SIDE - 1 - columns)
    std = 0.4 / np.sqrt(np.diag(cov))
    return Gaussian(0.2 * np.cos(rows + columns), cov * np.outer(std, std))


DATA = symmetric_images()
KNOWN = np.arange(PIXELS) % SIDE < SIDE // 2  # the left half
IMAGE = np.random.default_rng(0).multivariate_normal(DATA.mean, DATA.cov)
TRUTH = DATA.given(KNOWN, IMAGE[KNOWN])


def new_diffusion(steps: int = STEPS) -> GaussianDiffusion:
    """The published networks' process in so many steps."""
    return respaced_process(beta_schedule("linear", 1000), str(steps)).diffusion


def ideal_network(data: Gaussian, diffusion: GaussianDiffusion) -> Denoise:
    """What training with learned variances tends to, for Gaussian data.

    x_t ~ N(√ᾱ μ, C) with C = ᾱ Σ + (1 − ᾱ) I, so that E[ε | x_t] = √(1 − ᾱ) C⁻¹ (x_t − √ᾱ μ)
    and Cov(x_0 | x_t) = (1 − ᾱ) Σ C⁻¹. The variance of x_{t−1}, as of any such network, is given
    pixel by pixel: the diagonal of the true one.
    """
    abar = diffusion.alphas_cumprod[:, None, None]
    eye = np.eye(len(data.mean))
    inverse = np.linalg.inv(abar * data.cov + (1 - abar) * eye)  # C⁻¹, (T, n, n)
    to_eps = np.sqrt(1 - abar) * inverse

    x0_variance = np.diagonal((1 - abar) * (data.cov @ inverse), axis1=1, axis2=2)
    c0 = diffusion.posterior_mean_coef_x0[:, None]
    variance = diffusion.posterior_variance[:, None] + c0**2 * x0_variance
    lower = diffusion.posterior_log_variance_clipped[:, None]
    upper = np.log(diffusion.betas)[:, None]
    v = 2 * (np.log(variance) - lower) / (upper - lower) - 1

    weights, centres, v = (
        torch.from_numpy(table.astype(np.float32))
        for table in (to_eps, np.sqrt(abar[:, 0]) * data.mean, v)
    )

    def denoise(x: torch.Tensor, t: int) -> ReverseStep:
        eps = (x.flatten(1) - centres[t]) @ weights[t]
        output = torch.stack([eps, v[t].expand_as(eps)], dim=1).view(len(x), 2, SIDE, SIDE)
        return diffusion.reverse_step(output, x, t, clip_denoised=False)

    return denoise


def ddim_steps(denoise: Denoise, diffusion: GaussianDiffusion, eta: float) -> Denoise:
    """DDIM's steps with the same network."""
    steps = Ddim(diffusion, eta)
    return lambda x, t: steps.step(denoise(x, t).pred_x0, x, t)


class BalancedNoise:
    """Noise in place of `Streams` by which a small batch has exact moments.

    Over the batch it has mean 0 and covariance I, and it is uncorrelated with the state and with
    the noise drawn before it: all as in an infinite batch. Where every step is affine, so are
    then the mean and the covariance of the result, whatever the seed.
    """

    BATCH = 1 + 3 * PIXELS  # directions: the mean's, the state's, the last noise's, the new one's

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.previous = np.zeros((self.BATCH, PIXELS))

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """like: the state, (BATCH, 1, SIDE, SIDE)."""
        state = like.flatten(1).numpy().astype(np.float64)
        fresh = self.rng.standard_normal(state.shape)
        basis, _ = np.linalg.qr(np.hstack([np.ones((len(state), 1)), state, self.previous, fresh]))
        self.previous = basis[:, -PIXELS:] * np.sqrt(len(state))
        return torch.from_numpy(self.previous.astype(np.float32)).view_as(like)


def sample(
    times: list[int],
    streams: Streams | BalancedNoise,
    batch: int,
    *,
    merge_known: bool = True,
    eta: float | None = None,
) -> Gaussian:
    """The moments over all pixels of what the loop draws, given the known half of IMAGE.

    times: from the process's last step on. eta: of DDIM; None: the ancestral sampler.
    """
    diffusion = new_diffusion(times[0] + 1)
    shape = (batch, 1, SIDE, SIDE)
    gt, keep_mask = (
        torch.from_numpy(row.astype(np.float32)).expand(batch, PIXELS).reshape(shape)
        for row in (np.where(KNOWN, IMAGE, 0), KNOWN)
    )
    denoise = ideal_network(DATA, diffusion)
    if eta is not None:
        denoise = ddim_steps(denoise, diffusion, eta)
    known = Known(gt, keep_mask) if merge_known else None
    drawn = repaint(denoise, diffusion, times, streams.normal(gt), streams, known=known)
    rows = drawn.flatten(1).numpy().astype(np.float64)
    return Gaussian(rows.mean(axis=0), np.cov(rows.T, bias=True))


def times_for(r: int, j: int = 10, steps: int = STEPS) -> list[int]:
    """The paper's schedule: jumps of j steps, each stretch walked r times."""
    return jump_times(ScheduleConfig(t_T=steps, n_sample=1, jump_length=j, jump_n_sample=r))


@cache
def inpainted(r: int, j: int = 10, steps: int = STEPS, eta: float | None = None) -> Gaussian:
    """The moments over all pixels of what the loop draws, without sampling error."""
    return sample(times_for(r, j, steps), BalancedNoise(0), BalancedNoise.BATCH, eta=eta)


def inpainting_error(r: int, j: int = 10, steps: int = STEPS, eta: float | None = None) -> Distance:
    """How far the hidden pixels that the loop draws are from the truth."""
    return distance(inpainted(r, j, steps, eta).marginal(~KNOWN), TRUTH)


# ---- The quick sampler -----------------------------------------------------------------------


def ideal_x0(data: Gaussian, alphas_cumprod: np.ndarray) -> PredictX0:
    """E[x_0 | x_t] = μ + Σ (Σ + σ² I)⁻¹ (z − μ), z = x_t / √ᾱ, σ² = 1/ᾱ − 1."""
    mean = torch.from_numpy(data.mean.astype(np.float32))

    @cache
    def gain(t: int) -> torch.Tensor:
        variance = 1 / alphas_cumprod[t] - 1
        inverse = np.linalg.inv(data.cov + variance * np.eye(len(data.mean)))
        return torch.from_numpy((inverse @ data.cov).astype(np.float32))

    def predict_x0(x: torch.Tensor, t: int) -> torch.Tensor:
        z = x.flatten(1) / float(np.sqrt(alphas_cumprod[t]))
        return (mean + (z - mean) @ gain(t)).view_as(x)

    return predict_x0


class Impulses:
    """Noise in place of `Streams` from which the moments of an affine sampler can be read.

    Row 0 of the batch has no noise, and each other row has one number, 1, in one pixel of one
    draw. The result in row 0 is then the mean; what the other rows add to it are the columns of
    a square root of the covariance.
    """

    def __init__(self, draws: int):
        self.draw, self.batch = 0, 1 + draws * PIXELS

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        """like: (batch, 1, SIDE, SIDE)."""
        noise = torch.zeros(self.batch, PIXELS)
        first = 1 + self.draw * PIXELS
        noise[first : first + PIXELS] = torch.eye(PIXELS)
        self.draw += 1
        return noise.view_as(like)


def langevin_samples(
    evaluations: int, streams: Streams | Impulses, batch: int, **options: float
) -> np.ndarray:
    """What the quick sampler draws, given the known half of IMAGE: (batch, PIXELS), float64."""
    alphas_cumprod = np.cumprod(1 - beta_schedule("linear", 1000))
    gt, keep_mask = (
        torch.from_numpy(row.astype(np.float32)).expand(batch, PIXELS).reshape(-1, 1, SIDE, SIDE)
        for row in (np.where(KNOWN, IMAGE, 0), KNOWN)
    )
    levels = langevin_levels(LangevinConfig(evaluations=evaluations), alphas_cumprod)
    predict_x0 = ideal_x0(DATA, alphas_cumprod)
    z = gt * keep_mask + levels[0].sigma * streams.normal(gt)
    drawn = langevin(predict_x0, levels, z, streams, known=Known(gt, keep_mask), **options)
    return drawn.flatten(1).numpy().astype(np.float64)


@cache
def langevin_inpainted(evaluations: int, **options: float) -> Gaussian:
    """The moments over all pixels of what the quick sampler draws, without sampling error."""
    impulses = Impulses(1 + evaluations)
    rows = langevin_samples(evaluations, impulses, impulses.batch, **options)
    root = rows[1:] - rows[0]
    return Gaussian(rows[0], root.T @ root)


def langevin_error(evaluations: int) -> Distance:
    """How far the hidden pixels that the quick sampler draws are from the truth."""
    return distance(langevin_inpainted(evaluations).marginal(~KNOWN), TRUTH)


def main() -> None:
    print("| r | j | evaluations | error of the mean (std) | error of the covariance | KL (nats) |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for r, j in ((1, 10), (5, 10), (10, 10), (10, 5), (10, 1)):
        _print_row(str(r), str(j), count_evaluations(times_for(r, j)), inpainting_error(r, j))
    alphas_cumprod = np.cumprod(1 - beta_schedule("linear", 1000))
    for evaluations in (16, 32, 48, 100, 200):
        cost = len(langevin_levels(LangevinConfig(evaluations=evaluations), alphas_cumprod)) - 1
        _print_row("Langevin", "–", cost, langevin_error(evaluations))


def _print_row(r: str, j: str, cost: int, error: Distance) -> None:
    print(f"| {r} | {j} | {cost:,} | {error.mean:.3f} | {error.cov:.1%} | {error.kl:.3f} |")


if __name__ == "__main__":
    main()
