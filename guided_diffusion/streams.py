"""Random numbers, one stream an image; and where a sampler stands among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class Streams:
    """Random numbers of a batch, each image from a generator of its own.

    An image's numbers therefore do not depend on its batch, its neighbours or its process.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [
            torch.Generator(device).manual_seed(_generator_seed(seed, torch.device(device)))
            for seed in seeds
        ]

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

    def state(self) -> list[torch.Tensor]:
        """Where each image's stream is; `set_state` goes on from there."""
        return [generator.get_state() for generator in self.generators]

    def set_state(self, state: Sequence[torch.Tensor]) -> None:
        for generator, position in zip(self.generators, state, strict=True):
            generator.set_state(position)


def _generator_seed(seed: int, device: torch.device) -> int:
    """The seed itself, but for long ones on a CPU, of which torch's generator takes 32 bits only.

    The samples of an image are 2**32 apart, so that all would be the same.
    """
    if device.type == "cuda" or seed < 2**32:
        return seed
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


class Known(NamedTuple):
    """What is known of the pictures."""

    pixels: torch.Tensor  # (B, C, H, W) in [-1, 1]
    mask: torch.Tensor  # the same shape, in [0, 1]: 1 = known, 0 = to be filled in


@dataclass(frozen=True)
class SamplerState:
    """All that a sampler has between two transitions; from it, it goes on to the same pixels."""

    position: int  # of the next transition
    x: torch.Tensor  # (B, C, H, W)
    streams: list[torch.Tensor]  # see `Streams.state`
    x0_before: torch.Tensor | None = None  # of the evaluation before, for a sampler that needs it


@dataclass(frozen=True)
class Evaluation:
    """What a sampler shows after each evaluation of the network."""

    position: int  # of the next transition
    x: torch.Tensor  # (B, C, H, W), noisy
    pred_x0: torch.Tensor  # (B, C, H, W), the x_0 that the network predicts
    streams: Streams
    signal: float = 1.0  # √ᾱ, if x is x_t divided by that
    needs_x0: bool = False  # to go on

    @property
    def x_t(self) -> torch.Tensor:
        """The noisy picture, √ᾱ x_0 and noise."""
        return self.x * self.signal

    def state(self) -> SamplerState:
        """What to go on from later."""
        x0_before = self.pred_x0 if self.needs_x0 else None
        return SamplerState(self.position, self.x, self.streams.state(), x0_before)


AfterEvaluation = Callable[[Evaluation], None]


def begin(
    streams: Streams, like: torch.Tensor, resume: SamplerState | None
) -> tuple[torch.Tensor, int]:
    """Where a walk begins, and its first transition: at a saved state, or else at pure noise.

    like: a tensor of the noise's shape (B, C, H, W) and device.
    """
    if resume is None:
        return streams.normal(like), 0  # x_T ~ N(0, I)
    streams.set_state(resume.streams)
    return resume.x.to(like.device), resume.position
