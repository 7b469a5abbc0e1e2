"""Tables of a Gaussian diffusion, q(x_t | x_0), its posterior, and p(x_{t-1} | x_t).

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (DDPM); Nichol & Dhariwal 2021,
"Improved DDPM"; Song et al. 2021, "Denoising Diffusion Implicit Models" (DDIM). Symbols: β_t,
α_t = 1 − β_t, ᾱ_t = α_1 ⋯ α_t; t counts from 0.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


def beta_schedule(name: str, num_timesteps: int) -> np.ndarray:
    """The variances β_t of the forward process, float64 (num_timesteps,).

    `linear`: DDPM's 1e-4 … 2e-2 over 1000 steps, scaled for another number of steps.
    `cosine`: Improved DDPM, eq. 17. Raises ValueError for another name.
    """
    if name == "linear":
        scale = 1000 / num_timesteps
        return np.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=np.float64)
    if name == "cosine":
        u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        alphas_cumprod = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    raise ValueError(f"noise schedule {name!r} is neither 'linear' nor 'cosine'")


@dataclass(frozen=True)
class ReverseStep:
    """p(x_{t-1} | x_t) = N(mean, variance), and the x_0 that it aims at; each (B, C, H, W)."""

    mean: torch.Tensor
    log_variance: torch.Tensor  # may be broadcastable to the mean's shape; −inf: no noise
    pred_x0: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        return self.log_variance.exp()

    @property
    def sigma(self) -> torch.Tensor:
        return (0.5 * self.log_variance).exp()


@dataclass(frozen=True)
class Tables:
    """The factors of a diffusion that meet tensors: float32 (N,) each, on its device."""

    betas: torch.Tensor
    log_betas: torch.Tensor
    alphas_cumprod: torch.Tensor
    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor
    sqrt_recip_alphas_cumprod: torch.Tensor
    sqrt_recipm1_alphas_cumprod: torch.Tensor
    posterior_mean_coef_x0: torch.Tensor
    posterior_mean_coef_xt: torch.Tensor
    posterior_log_variance_clipped: torch.Tensor
    fixed_log_variance: torch.Tensor


class GaussianDiffusion:
    """The tables of a diffusion, and the distributions that they define.

    Tables are computed in float64 and meet tensors in float32. Times t are an int, or a
    LongTensor (B,) with a time for each image of the batch.
    """

    def __init__(self, betas: np.ndarray, device: torch.device | str = "cpu"):
        """betas: (N,), in (0, 1]. Raises ValueError outside that range."""
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be a row of numbers in (0, 1]")
        self.device = torch.device(device)
        self.betas = betas
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    # DDPM eq. 7: the posterior q(x_{t-1} | x_t, x_0) = N(c_0·x_0 + c_t·x_t, posterior_variance).
    @property
    def posterior_mean_coef_x0(self) -> np.ndarray:
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_mean_coef_xt(self) -> np.ndarray:
        alphas = 1 - self.betas
        return (1 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)

    @property
    def posterior_variance(self) -> np.ndarray:
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Its logarithm; the first entry, log 0, is replaced by the second one."""
        variance = self.posterior_variance
        variance[0] = variance[1] if len(variance) > 1 else 1e-20
        return np.log(variance)

    @property
    def fixed_log_variance(self) -> np.ndarray:
        """log β_t, but for the first step: without learned variances ("fixed large", DDPM 3.2)."""
        return np.append(self.posterior_log_variance_clipped[0], np.log(self.betas[1:]))

    @property
    def largest_ddim_eta(self) -> float:
        """The η up to which σ² ≤ 1 − ᾱ_{t−1} at every step of DDIM; at least 1.

        σ² = η²·β_t·(1 − ᾱ_{t−1}) / (1 − ᾱ_t), and at t = 0 there is no noise, whatever η.
        """
        limits = np.sqrt((1 - self.alphas_cumprod) / self.betas)[1:]
        return max(1.0, float(limits.min(initial=np.inf)))  # 1 always fits, but for rounding

    @cached_property
    def tables(self) -> "Tables":
        """Every factor that meets a tensor."""
        abar = self.alphas_cumprod
        return on_device(
            Tables,
            self.device,
            betas=self.betas,
            log_betas=np.log(self.betas),
            alphas_cumprod=abar,
            sqrt_alphas_cumprod=np.sqrt(abar),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1 - abar),
            sqrt_recip_alphas_cumprod=np.sqrt(1 / abar),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1 / abar - 1),
            posterior_mean_coef_x0=self.posterior_mean_coef_x0,
            posterior_mean_coef_xt=self.posterior_mean_coef_xt,
            posterior_log_variance_clipped=self.posterior_log_variance_clipped,
            fixed_log_variance=self.fixed_log_variance,
        )

    def q_sample(
        self, x0: torch.Tensor, t: int | torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """x_t ~ q(x_t | x_0), for this standard normal noise (DDPM eq. 4)."""
        tables = self.tables
        signal, sigma = tables.sqrt_alphas_cumprod, tables.sqrt_one_minus_alphas_cumprod
        return at(signal, t) * x0 + at(sigma, t) * noise

    def predict_x0(
        self, x_t: torch.Tensor, t: int | torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        """The x_0 from which this noise eps leads to x_t."""
        tables = self.tables
        scale, sigma = tables.sqrt_recip_alphas_cumprod, tables.sqrt_recipm1_alphas_cumprod
        return at(scale, t) * x_t - at(sigma, t) * eps

    def predict_eps(
        self, x_t: torch.Tensor, t: int | torch.Tensor, x0: torch.Tensor
    ) -> torch.Tensor:
        """The noise that leads from this x0 to x_t."""
        tables = self.tables
        scale, sigma = tables.sqrt_recip_alphas_cumprod, tables.sqrt_recipm1_alphas_cumprod
        return (at(scale, t) * x_t - x0) / at(sigma, t)

    def posterior_mean(
        self, x0: torch.Tensor, x_t: torch.Tensor, t: int | torch.Tensor
    ) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        tables = self.tables
        c_0, c_t = tables.posterior_mean_coef_x0, tables.posterior_mean_coef_xt
        return at(c_0, t) * x0 + at(c_t, t) * x_t

    def reverse_step(
        self,
        output: torch.Tensor,
        x_t: torch.Tensor,
        t: int | torch.Tensor,
        *,
        predict_xstart: bool = False,
        clip_denoised: bool = True,
    ) -> ReverseStep:
        """p(x_{t-1} | x_t) from a network's output at x_t.

        output: (B, C or 2·C, H, W): the predicted noise, or x_0 if predict_xstart; with 2·C
        channels the second half v in [-1, 1] places the log variance between its bounds
        (Improved DDPM eq. 15), without it the variance is fixed. clip_denoised clamps the
        predicted x_0 to [-1, 1].
        """
        channels = x_t.shape[1]
        prediction, v = output[:, :channels], output[:, channels:]
        pred_x0 = prediction if predict_xstart else self.predict_x0(x_t, t, prediction)
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
        return ReverseStep(self.posterior_mean(pred_x0, x_t, t), self._log_variance(v, t), pred_x0)

    def _log_variance(self, v: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """v: (B, C or 0, H, W): no channels, no learned variance."""
        tables = self.tables
        if v.shape[1] == 0:
            return at(tables.fixed_log_variance, t)
        fraction = (v + 1) / 2
        lower, upper = at(tables.posterior_log_variance_clipped, t), at(tables.log_betas, t)
        return fraction * upper + (1 - fraction) * lower


@dataclass(frozen=True)
class DdimTables:
    """The factors of DDIM's steps: float32 (N,) each."""

    sqrt_abar_prev: torch.Tensor
    eps_factor: torch.Tensor
    log_variance: torch.Tensor


class Ddim:
    """The steps of DDIM through a diffusion (Song et al. 2021, eq. 12)."""

    def __init__(self, diffusion: GaussianDiffusion, eta: float = 0.0):
        """eta: 0 adds no noise, 1 the posterior's. Raises ValueError if x_{t-1} has no room for it.

        See `GaussianDiffusion.largest_ddim_eta`.
        """
        if not 0 <= eta <= diffusion.largest_ddim_eta:
            raise ValueError(f"eta is {eta}, not in [0, {diffusion.largest_ddim_eta}]")
        self.diffusion = diffusion
        abar_prev = diffusion.alphas_cumprod_prev
        variance = (eta * np.sqrt(diffusion.posterior_variance)) ** 2  # σ²
        with np.errstate(divide="ignore"):  # log 0 = −inf
            self.tables = on_device(
                DdimTables,
                diffusion.device,
                sqrt_abar_prev=np.sqrt(abar_prev),
                eps_factor=np.sqrt(np.maximum(1 - abar_prev - variance, 0)),
                log_variance=np.log(variance),
            )

    def step(self, x0: torch.Tensor, x_t: torch.Tensor, t: int | torch.Tensor) -> ReverseStep:
        """p(x_{t-1} | x_t), if x0 is what the network sees in x_t; each (B, C, H, W)."""
        eps = self.diffusion.predict_eps(x_t, t, x0)
        mean = at(self.tables.sqrt_abar_prev, t) * x0 + at(self.tables.eps_factor, t) * eps
        return ReverseStep(mean, at(self.tables.log_variance, t), x0)


def on_device(kind: type[T], device: torch.device, **tables: np.ndarray) -> T:
    """Tables as they meet tensors: float32, on the device, so that no step waits."""
    return kind(
        **{
            name: torch.from_numpy(table.astype(np.float32)).to(device)
            for name, table in tables.items()
        }
    )


def at(table: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
    """What a table (N,) has for time t, shaped to broadcast over (B, C, H, W)."""
    return table[t].view(-1, 1, 1, 1)
