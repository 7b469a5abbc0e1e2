"""Inpainting with the quick sampler, see `langevin`."""

from collections.abc import Sequence
from typing import Any

import torch

from guided_diffusion.denoiser import Denoiser
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inpainter import PixelInpainter
from guided_diffusion.langevin import langevin
from guided_diffusion.repaint import Denoise
from guided_diffusion.scheduler import Level
from guided_diffusion.streams import AfterEvaluation, Known, SamplerState, Streams, begin


class LangevinInpainter(PixelInpainter):
    """The network sees the pixels themselves, at noise levels of all steps."""

    def __init__(
        self,
        denoiser: Denoiser,
        diffusion: GaussianDiffusion,
        levels: Sequence[Level],
        image_size: int,
        attraction: float,
        **options: Any,
    ):
        """diffusion: the base process, all its steps. levels: see `scheduler.langevin_levels`.
        attraction: see `langevin`. options: of `PixelInpainter`; known pixels always come out
        exactly.
        """
        times = [level.step for level in levels]
        super().__init__(denoiser, diffusion, times, image_size, paste_known=True, **options)
        self.levels = levels
        self.attraction = attraction

    @property
    def noise_words(self) -> list[str]:
        """See `Inpainter.noise_words`."""
        abar = self.diffusion.alphas_cumprod
        return [f"sigma {sigma:.2g}" for sigma in ((1 - abar) / abar) ** 0.5]

    def first_step(self) -> "LangevinInpainter":
        """See `Inpainter.first_step`."""
        shortened = super().first_step()
        shortened.levels = (self.levels[0], self.levels[-1])
        return shortened

    def _draw(
        self,
        denoise: Denoise,
        known: Known,
        streams: Streams,
        start_picture: torch.Tensor | None,
        resume: SamplerState | None,
        after_evaluation: AfterEvaluation | None,
    ) -> torch.Tensor:
        """See `PixelInpainter._draw`."""
        if not self.merge_known:
            known = Known(known.pixels, torch.zeros_like(known.mask))
        z, position = begin(streams, known.pixels, resume)
        x0_before = resume.x0_before.to(z.device) if resume else None
        if resume is None:  # noise around what is there to begin with
            unknown = torch.zeros_like(z) if start_picture is None else start_picture
            mean = known.mask * known.pixels + (1 - known.mask) * unknown
            z = mean + self.levels[0].sigma * z
        return langevin(
            lambda x_t, t: denoise(x_t, t).pred_x0,
            self.levels,
            z,
            streams,
            known=known,
            attraction=self.attraction,
            x0_before=x0_before,
            position=position,
            after_evaluation=after_evaluation,
        )
