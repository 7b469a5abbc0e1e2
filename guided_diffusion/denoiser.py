"""From a network to p(x_{t-1} | x_t): what varies wraps the network here, so the loop stays plain.

A denoiser is a function (x_t, t, y) -> ReverseStep; y: (B,) classes, which it may ignore.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from guided_diffusion.gaussian_diffusion import Ddim, ReverseStep, at
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
        # Clipping would make an innocent number of infinity; NaN comes through, and is found.
        output = output.masked_fill(output.isinf(), torch.nan)
        return process.diffusion.reverse_step(
            output, x_t, t, predict_xstart=predict_xstart, clip_denoised=clip_denoised
        )

    return denoise


def guided(denoiser: Denoiser, classifier: Network, process: Process, scale: float) -> Denoiser:
    """The denoiser, its mean moved towards images that the classifier takes for class y.

    mean + σ²·scale·∇ log p(y | x_t) (Dhariwal & Nichol 2021, algorithm 1).
    """

    def denoise(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        p = denoiser(x_t, t, y)
        gradient = _log_likelihood_gradient(classifier, process, x_t, t, y)
        mean = p.mean + p.variance * scale * gradient
        return ReverseStep(mean, p.log_variance, p.pred_x0)

    return denoise


def guided_x0(denoiser: Denoiser, classifier: Network, process: Process, scale: float) -> Denoiser:
    """The denoiser, its x_0 moved towards images that the classifier takes for class y.

    The noise that leads from x_0 to x_t becomes ε − √(1 − ᾱ)·scale·∇ log p(y | x_t), and x_0 is
    what lies below that (Dhariwal & Nichol 2021, algorithm 2). It is not clamped: then it, ε and
    x_t would not belong together any more.
    """
    diffusion = process.diffusion

    def denoise(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        p = denoiser(x_t, t, y)
        gradient = _log_likelihood_gradient(classifier, process, x_t, t, y)
        eps = diffusion.predict_eps(x_t, t, p.pred_x0)
        eps = eps - at(diffusion.tables.sqrt_one_minus_alphas_cumprod, t) * scale * gradient
        x0 = diffusion.predict_x0(x_t, t, eps)
        return ReverseStep(diffusion.posterior_mean(x0, x_t, t), p.log_variance, x0)

    return denoise


def _log_likelihood_gradient(
    classifier: Network, process: Process, x_t: torch.Tensor, t: int, y: torch.Tensor
) -> torch.Tensor:
    """∇ log p(y | x_t), (B, C, H, W)."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        logits = classifier(x, process.network_times[t].expand(len(x)))
        log_likelihood = F.log_softmax(logits, dim=-1).gather(1, y[:, None]).sum()
        return torch.autograd.grad(log_likelihood, x)[0]


def ddim(denoiser: Denoiser, process: Process, eta: float = 0.0) -> Denoiser:
    """The denoiser, taking DDIM's steps towards its x_0 in place of its own; eta: see `Ddim`."""
    steps = Ddim(process.diffusion, eta)

    def denoise(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        return steps.step(denoiser(x_t, t, y).pred_x0, x_t, t)

    return denoise


AT_A_TIME = 2**17  # pixels of windows: 32 windows of 64x64, 2 of 256x256


def tiled(denoiser: Denoiser, windows: torch.Tensor) -> Denoiser:
    """The denoiser over overlapping windows: what they see of a pixel becomes one estimate.

    windows: int (K, S, S), where the pixels of each window are in the row x_t, (1, C, 1, N); each
    of the N is in one window at least. The denoiser gets the windows in batches of one size.
    Estimates are averaged with weights that fall to the edges of a window and sum to one. A mean is
    linear in x_0, so that the average of the means is the mean for the average x_0.
    """
    side = windows.shape[-1]
    windows = windows.flatten(1)  # (K, S·S)
    weight = _window_weight(side).to(windows.device)  # (S·S, 1)
    total = weight.new_zeros(int(windows.max()) + 1, 1)
    _add_windows(total, windows, weight.expand(len(windows), -1, -1))

    def denoise(x_t: torch.Tensor, t: int, y: torch.Tensor) -> ReverseStep:
        row = x_t[0, :, 0].T  # (N, C)
        sums = [torch.zeros_like(row) for _ in range(3)]
        for places, count in _equal_batches(windows, AT_A_TIME // side**2):
            x = row[places.flatten()].view(len(places), side, side, -1).permute(0, 3, 1, 2)
            p = denoiser(x, t, y.expand(len(x)))
            for each, of in zip(
                sums, (p.mean, p.log_variance.expand_as(x), p.pred_x0), strict=True
            ):
                values = of.flatten(2).transpose(1, 2)  # (k, S·S, C)
                _add_windows(each, places[:count], values * weight)
        return ReverseStep(*(each.div_(total).T[None, :, None] for each in sums))

    return denoise


def _window_weight(side: int) -> torch.Tensor:
    """Of each pixel of a window, (S·S, 1): 1 in the middle, falling to nearly 0 as sin²."""
    profile = torch.sin(torch.pi * (torch.arange(side) + 0.5) / side) ** 2
    return torch.outer(profile, profile).flatten()[:, None]


def _add_windows(sums: torch.Tensor, windows: torch.Tensor, values: torch.Tensor) -> None:
    """Add the values of each window, (K, S·S, C), to the sums, (N, C), in a fixed order."""
    for places, of_window in zip(windows, values, strict=False):
        sums[places] += of_window


def _equal_batches(windows: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Windows in batches of one size, and how many of each count: the others fill up the last.

    Layers and graphs would be made ready anew for another size.
    """
    rounds = math.ceil(len(windows) / max(1, most))
    size = math.ceil(len(windows) / rounds)
    for first in range(0, len(windows), size):
        batch = windows[first : first + size]
        yield torch.cat([batch, windows[: size - len(batch)]]), len(batch)


class NonFiniteError(ArithmeticError):
    """The network put out what is no number, as after an overflow."""

    def __init__(self, images: Sequence[int], step: int):
        super().__init__(f"not finite at step {step}, in images {list(images)} of the batch")
        self.images = images  # indices in the batch
        self.step = step  # t


class FiniteCheck:
    """A denoiser that raises NonFiniteError soon after the first value that is not finite.

    On a GPU, waiting for each answer would leave it idle, so that answers are looked at when they
    have come, up to `late` evaluations later, and the rest by `finish`.
    """

    late = 2

    def __init__(self, denoiser: Callable[[torch.Tensor, int], ReverseStep]):
        self.denoiser = denoiser
        self.answers: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def __call__(self, x_t: torch.Tensor, t: int) -> ReverseStep:
        p = self.denoiser(x_t, t)
        finite = torch.isfinite(p.mean + p.sigma).flatten(1).all(dim=1)  # (B,)
        self.answers.append((t, *_fetch(finite)))
        self._look(self.late if finite.is_cuda else 0)
        return p

    def finish(self) -> None:
        """Look at all answers."""
        self._look(0)

    def _look(self, left: int) -> None:
        while len(self.answers) > left:
            step, finite, arrival = self.answers.popleft()
            if arrival is not None:
                arrival.synchronize()
            if not finite.all():
                raise NonFiniteError((~finite).nonzero().flatten().tolist(), step)


def _fetch(answer: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """A copy on the CPU, and on CUDA the event after which it is there."""
    if not answer.is_cuda:
        return answer.cpu(), None
    copy = torch.empty_like(answer, device="cpu", pin_memory=True)
    copy.copy_(answer, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return copy, arrival
