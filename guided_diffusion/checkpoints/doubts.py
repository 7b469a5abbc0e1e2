"""What shapes cannot tell: settings with which a network runs, but does not do what it has learnt.

The network is asked to take noise away from a picture's known pixels, once with the config's
settings, and once with each setting that it may have been trained with instead. If it does much
better with another one, that is likely the right one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from guided_diffusion.config import DiffusionConfig, NetworkConfig
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, beta_schedule
from guided_diffusion.networks.unet import AttentionBlock, UNet
from guided_diffusion.respace import Process

# Measured: with the right settings, no trained network left more than 1.25 times the error of a
# wrong one at NOISE, even in pictures of a kind that it never saw. Wrong settings mostly leave 1.6
# to 6 times the error of the right ones. At LITTLE_NOISE, trained networks leave at most .8 of the
# noise, whatever the picture (mostly .01 to .15), and those with random weights 1.4 times as much.
BETTER = 0.7  # share of the error up to which another setting counts as the right one
NOISE, LITTLE_NOISE = 3.2, 0.8  # times the signal, √(1 - ᾱ) / √ᾱ
GOOD = 0.003  # error up to which there is no doubt, at NOISE
LEAST_KNOWN = 1 / 8  # share of the picture
EVALUATIONS = 11  # that all questions take, at most

_HEADS: dict[str, Callable[[int], int]] = {  # setting -> heads by channels
    "num_head_channels: 64": lambda channels: channels // 64,
    "num_head_channels: 32": lambda channels: channels // 32,
    "num_head_channels: -1 and num_heads: 4": lambda channels: 4,
    "num_head_channels: -1 and num_heads: 1": lambda channels: 1,
}


@dataclass(frozen=True)
class Setting:
    """How a network is used; what is None is as the config says."""

    name: str = ""
    new_order: bool | None = None
    heads: Callable[[int], int] | None = None  # by channels
    time: Callable[[float], float] | None = None  # that the network is told, by the noise
    predict_xstart: bool | None = None


@dataclass(frozen=True)
class Doubts:
    """Asks a network about a picture, and says what is likely wrong with its settings."""

    network: UNet
    process: Process  # with all steps
    settings: NetworkConfig
    diffusion: DiffusionConfig

    @torch.no_grad()
    def __call__(self, picture: torch.Tensor, keep_mask: torch.Tensor) -> str | None:
        """picture, keep_mask: (C, S, S) as the sampler takes them. None: there is no doubt."""
        known = (keep_mask == 1).expand_as(picture)
        if known.float().mean() < LEAST_KNOWN:
            return None

        def error(noise: float, setting: Setting) -> float:
            return self._error(picture, known, noise, setting)

        own = error(NOISE, Setting())
        if own < GOOD:
            return None
        errors = {other: error(NOISE, other) for other in self._other_settings()}
        best = min(errors, key=errors.__getitem__)
        # A network without any training may well do better as what makes all grey.
        sees = error(LITTLE_NOISE, best) * LITTLE_NOISE**2 < picture[known].var() / 2
        if errors[best] < BETTER * own and sees:
            return (
                "of the known pixels, with noise on them, the network makes a picture that is "
                f"{own / errors[best]:.1f} times as wrong as it would be with {best.name}: set "
                "that, unless you know better; the shapes of its weights do not tell"
            )
        if error(LITTLE_NOISE, Setting()) > 1:
            return (
                "the network makes the known pixels, with a little noise on them, worse, while any "
                "trained one makes them better: take other weights, or look at the settings that "
                "the shapes of its weights do not tell (use_new_attention_order, num_heads, "
                "num_head_channels, noise_schedule, diffusion_steps, predict_xstart)"
            )
        return None

    def _other_settings(self) -> Iterator[Setting]:
        new_order = not self.settings.use_new_attention_order
        yield Setting(f"use_new_attention_order: {_yaml(new_order)}", new_order=new_order)
        channels = {block.qkv.in_channels for block in _attention_blocks(self.network)}
        for name, heads in _HEADS.items():
            if channels and all(heads(c) and c % heads(c) == 0 for c in channels):
                yield Setting(name, heads=heads)
        xstart = not self.diffusion.predict_xstart
        yield Setting(f"predict_xstart: {_yaml(xstart)}", predict_xstart=xstart)
        yield from self._other_times()

    def _other_times(self) -> Iterator[Setting]:
        """Other times that the network may know the same noise by."""
        steps, times = self.diffusion.diffusion_steps, self.process.network_times
        schedule = "cosine" if self.diffusion.noise_schedule == "linear" else "linear"
        other = GaussianDiffusion(beta_schedule(schedule, steps))
        yield Setting(
            f"noise_schedule: {schedule}", time=lambda noise: times[_nearest(other, noise)].item()
        )
        if self.diffusion.rescale_timesteps and steps != 1000:
            yield Setting("rescale_timesteps: false", time=lambda noise: float(self._step(noise)))
        else:
            usual = 4000 if steps == 1000 else 1000
            yield Setting(
                f"diffusion_steps: {usual}",
                time=lambda noise: times[self._step(noise)].item() * usual / steps,
            )

    def _step(self, noise: float) -> int:
        return _nearest(self.process.diffusion, noise)

    def _error(
        self, picture: torch.Tensor, known: torch.Tensor, level: float, setting: Setting
    ) -> float:
        """Mean square of what is wrong in the network's x_0, as a share of the noise's."""
        diffusion, t = self.process.diffusion, self._step(level)
        x0 = picture[None].to(diffusion.device)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        x_t = diffusion.q_sample(x0, t, noise)
        time = setting.time(level) if setting.time else self.process.network_times[t].item()
        inputs = [x_t, torch.full((1,), time, device=x0.device)]
        if self.settings.class_cond:  # any one: with so much of the picture to see, it hardly tells
            inputs.append(torch.zeros(1, dtype=torch.long, device=x0.device))
        with _attending(self.network, setting):
            output = self.network(*inputs)
        flipped = setting.predict_xstart is not None
        xstart = setting.predict_xstart if flipped else self.diffusion.predict_xstart
        pred_x0 = diffusion.reverse_step(
            output, x_t, t, predict_xstart=xstart, clip_denoised=level == NOISE
        ).pred_x0
        alpha = diffusion.alphas_cumprod[t]
        wrong = (pred_x0 - x0)[0][known.to(x0.device)]
        return wrong.square().mean().item() * alpha / (1 - alpha)


@contextmanager
def _attending(network: UNet, setting: Setting) -> Iterator[None]:
    """The network with attention as a setting has it, within the block."""
    blocks = _attention_blocks(network)
    own = [(block.num_heads, block.heads_first) for block in blocks]
    for block in blocks:
        if setting.heads:
            block.num_heads = setting.heads(block.qkv.in_channels)
        if setting.new_order is not None:
            block.heads_first = not setting.new_order
    try:
        yield
    finally:
        for block, (heads, heads_first) in zip(blocks, own, strict=True):
            block.num_heads, block.heads_first = heads, heads_first


def _attention_blocks(network: UNet) -> list[AttentionBlock]:
    return [module for module in network.modules() if isinstance(module, AttentionBlock)]


def _nearest(diffusion: GaussianDiffusion, noise: float) -> int:
    """The step, but the first, at which there is about so much noise, as a share of the signal."""
    alphas = diffusion.alphas_cumprod[1:]
    return 1 + int(abs(np.log((1 - alphas) / alphas) / 2 - np.log(noise)).argmin())


def _yaml(flag: bool) -> str:
    return str(flag).lower()
