"""Inpainting in the latents of an autoencoder, with a network that was trained for masks.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 4.5.
The network sees, beside the noisy latent, the latent of the picture under its mask, and the mask;
so nothing is merged and nothing resampled, and DDIM's steps down are all there is.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from guided_diffusion.denoiser import FiniteCheck, Network, NonFiniteError, ddim, network_denoiser
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.inpainter import Inpainter, Start
from guided_diffusion.networks.autoencoder import Autoencoder
from guided_diffusion.repaint import Denoise, repaint
from guided_diffusion.respace import Process, process_of_steps
from guided_diffusion.streams import AfterEvaluation, SamplerState, Streams, begin

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey (ITU-R BT.601)


def latent_process(steps: Sequence[int], device: torch.device | str = "cpu") -> Process:
    """The published model's diffusion of latents, at these of its 1000 steps."""
    betas = np.linspace(0.0015**0.5, 0.0205**0.5, 1000, dtype=np.float64) ** 2
    return process_of_steps(betas, steps, device=device)


class LatentInpainter(Inpainter):
    """Fills in what masks hide by latent diffusion.

    A hole is where a keep mask is at most one half; when called, all else comes out as it went in.
    Pictures whose sides are no multiples of `multiple` are continued by their mirror image while
    they are worked on. What `progress` and `after_evaluation` get are latents, (B, C, h, w), of
    which `as_pictures` makes pictures.
    """

    paste_known = True
    start_from: Start = "noise"

    def __init__(
        self,
        network: Network,
        autoencoder: Autoencoder,
        process: Process,
        times: Sequence[int],
        multiple: int,
        *,
        eta: float = 0.0,
        image_size: int | None = None,
    ):
        """network: (B, 2·C + 1, h, w), (B,) -> the predicted noise, (B, C, h, w). times: see
        `scheduler.ddim_times`. multiple: pixels, by which the sides divide that autoencoder and
        network take. eta: see `Ddim`. image_size: None: pictures are taken as they are.
        """
        self.network = network
        self.autoencoder = autoencoder
        self.process = process
        self.times = times
        self.multiple = multiple
        self.eta = eta
        self.image_size = image_size

    @property
    def diffusion(self) -> GaussianDiffusion:
        return self.process.diffusion

    def prepare_mask(self, keep_mask: torch.Tensor) -> torch.Tensor:
        """The keep mask in zeros and ones; (B, 1 or 3, H, W), its colours taken as grey."""
        if keep_mask.shape[1] == 1:
            return (keep_mask > 0.5).to(keep_mask)
        luma = keep_mask.new_tensor(LUMA).view(3, 1, 1)
        grey = (keep_mask * luma).sum(dim=1, keepdim=True)
        return (grey > 0.5).to(keep_mask).expand_as(keep_mask)

    @torch.no_grad()
    def sample(
        self,
        gt: torch.Tensor,
        keep_mask: torch.Tensor,
        seeds: Sequence[int],
        *,
        start_picture: None = None,
        resume: SamplerState | None = None,
        after_evaluation: AfterEvaluation | None = None,
    ) -> torch.Tensor:
        """See `Inpainter.sample`; start_picture: None, since sampling starts from noise."""
        device, size = self.diffusion.device, gt.shape[2:]
        keep = self.prepare_mask(keep_mask)[:, :1]
        condition = self._condition(*(self._padded(each.to(device)) for each in (gt, keep)))
        denoise = FiniteCheck(self._denoiser(condition))
        streams = Streams(seeds, device)
        z, position = begin(streams, condition[:, :-1], resume)
        z = repaint(  # without known pixels: the network is told what is known
            denoise,
            self.diffusion,
            self.times,
            z,
            streams,
            position=position,
            after_evaluation=after_evaluation,
        )
        denoise.finish()
        pictures = self.as_pictures(z, size).cpu()
        _check_finite(pictures)
        return pictures

    @torch.no_grad()
    def as_pictures(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """See `Inpainter.as_pictures`; x: latents of pictures of this size, else ValueError."""
        factor, multiple = self.autoencoder.factor, self.multiple
        if [(side + -side % multiple) // factor for side in size] != [*x.shape[2:]]:
            raise ValueError(f"pictures of {size[0]} rows and {size[1]} columns have other latents")
        z = x.contiguous(memory_format=torch.channels_last)
        return self.autoencoder.decode(z)[..., : size[0], : size[1]].clamp(-1, 1)

    def _padded(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W), below and on the right continued by their mirror image."""
        rows, columns = (_mirrored(side, self.multiple) for side in pictures.shape[2:])
        padded = pictures[:, :, rows.to(pictures.device)][..., columns.to(pictures.device)]
        return padded.contiguous(memory_format=torch.channels_last)

    def _condition(self, gt: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """What the network is told: the latent of the masked picture, and its hole.

        gt: (B, 3, H, W); keep: (B, 1, H, W). Returns (B, C + 1, h, w); the hole is 1, the rest −1.
        """
        z = self.autoencoder.encode(gt * keep - (1 - keep))  # holes are black
        hole = F.interpolate(1 - 2 * keep, size=z.shape[2:], mode="nearest")
        return torch.cat([z, hole], dim=1)

    def _denoiser(self, condition: torch.Tensor) -> Denoise:
        def network(z_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.network(torch.cat([z_t, condition], dim=1), time)

        denoiser = network_denoiser(network, self.process, clip_denoised=False)
        return partial(ddim(denoiser, self.process, self.eta), y=None)


def _mirrored(side: int, multiple: int) -> torch.Tensor:
    """Which of so many rows come one after the other, up to the next multiple: 0 1 2 3 2 1 …"""
    rows = torch.arange(side + -side % multiple)
    period = max(2 * (side - 1), 1)
    return torch.minimum(rows % period, -rows % period)


def _check_finite(pictures: torch.Tensor) -> None:
    """Raises NonFiniteError."""
    wrong = ~pictures.isfinite().flatten(1).all(dim=1)
    if wrong.any():
        raise NonFiniteError(wrong.nonzero().flatten().tolist(), step=0)
