"""From a network to p(x_{t-1} | x_t): what varies wraps the network here, so the loop stays plain.

A denoiser is a function (x_t, t, y) -> ReverseStep; y: (B,) classes, which it may ignore.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from guided_diffusion.gaussian_diffusion import ReverseStep
from guided_diffusion.respace import Process

Denoiser = Callable[[torch.Tensor, int, torch.Tensor], ReverseStep]
Network = Callable[..., torch.Tensor]  # (x_t, network's time) or (x_t, network's time, y)


def network_denoiser(
    network: Network,
    process: Process,
    *,
    class_cond: bool = False,
    predict_xstart: bool = False,
    clip_denoised: bool = True,
) -> Denoiser:
    """The denoiser that a network is; class_cond: it is told the class."""

    def denoise(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        time = process.network_times[t].expand(len(x_t))
        output = network(x_t, time, y) if class_cond else network(x_t, time)
        return process.diffusion.reverse_step(
            output, x_t, t, predict_xstart=predict_xstart, clip_denoised=clip_denoised
        )

    return denoise


def guided(denoiser: Denoiser, classifier: Network, process: Process, scale: float) -> Denoiser:
    """The denoiser, its mean moved towards images that the classifier takes for class y.

    mean + σ²·scale·∇ log p(y | x_t) (Dhariwal & Nichol 2021, algorithm 1).
    """

    def log_likelihood_gradient(x_t: torch.Tensor, t: int, y: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            logits = classifier(x, process.network_times[t].expand(len(x)))
            log_likelihood = F.log_softmax(logits, dim=-1).gather(1, y[:, None]).sum()
            return torch.autograd.grad(log_likelihood, x)[0]

    def denoise(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        p = denoiser(x_t, t, y)
        mean = p.mean + p.variance * scale * log_likelihood_gradient(x_t, t, y)
        return ReverseStep(mean, p.log_variance, p.pred_x0)

    return denoise
