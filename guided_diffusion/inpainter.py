"""A model ready to inpaint: tensors or pictures in, the same kind out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from PIL import Image

from guided_diffusion.denoiser import Denoiser, FiniteCheck
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import (
    image_to_tensor,
    mask_to_tensor,
    paste_known,
    to_bytes,
)
from guided_diffusion.pictures import prepare
from guided_diffusion.repaint import Evaluation, SamplerState, Streams, repaint
from guided_diffusion.scheduler import count_evaluations

Progress = Callable[[int, int, torch.Tensor], None]  # (done, total, x_0 estimate)


@dataclass(frozen=True)
class Inpainter:
    """Fills in what masks hide. Built by `load_inpainter`; called with images and keep masks."""

    denoiser: Denoiser
    diffusion: GaussianDiffusion
    times: Sequence[int]  # see `scheduler`
    image_size: int
    num_classes: int = 1000
    cond_y: int | None = None  # None: a class drawn for each image
    inject_known: bool = True  # False: free sampling, whatever the image
    time_shift: int = 1
    paste_known: bool = False  # True: known pixels come out exactly as they went in

    @property
    def evaluations(self) -> int:
        """Network evaluations for one batch."""
        return count_evaluations(self.times)

    def evaluations_before(self, state: SamplerState) -> int:
        """Those of all `evaluations` that were done when the sampler had this state."""
        return count_evaluations(self.times[: state.position + 1])

    @overload
    def __call__(
        self,
        images: torch.Tensor,
        keep_masks: torch.Tensor,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        images: Image.Image,
        keep_masks: Image.Image,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Image.Image: ...
    @overload
    def __call__(
        self,
        images: Sequence[Image.Image],
        keep_masks: Sequence[Image.Image],
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Image.Image]: ...
    def __call__(self, images, keep_masks, seed: int = 0, progress: Progress | None = None):
        """Inpaint a batch; image i has the random stream of seed + i.

        images: (B, 3, S, S) in [-1, 1] and keep_masks (B, 1 or 3, S, S) in [0, 1], 1 = keep,
        S = image_size; or a PIL image and its mask of any size, or lists of them, which are
        resized and cropped like files. progress(done, total, x0): called after each evaluation,
        x0 as (B, 3, S, S) on the device. Returns the same kind; tensors as float32 on the CPU.
        Raises ValueError for kinds, shapes or values that do not fit.
        """
        if isinstance(images, torch.Tensor):
            return self._inpaint_tensors(images, keep_masks, seed, progress)
        if isinstance(images, Image.Image):
            return self._inpaint_pictures([images], [keep_masks], seed, progress)[0]
        return self._inpaint_pictures(images, keep_masks, seed, progress)

    def sample(
        self,
        gt: torch.Tensor,
        keep_mask: torch.Tensor,
        seeds: Sequence[int],
        *,
        start: SamplerState | None = None,
        after_evaluation: Callable[[Evaluation], None] | None = None,
    ) -> torch.Tensor:
        """The sampler's own output for a batch, one seed an image; shapes as in `__call__`.

        start: the state in which the same batch was stopped; after_evaluation: see `repaint`.
        Raises NonFiniteError where the network's output is not finite.
        """
        device = self.diffusion.device
        streams = Streams(seeds, device)
        if self.cond_y is None:
            y = streams.classes(self.num_classes)  # drawn for unconditional networks too
        else:
            y = torch.full((len(seeds),), self.cond_y, device=device)
        gt, keep_mask = (
            tensor.to(device).contiguous(memory_format=torch.channels_last)
            for tensor in (gt, keep_mask.expand_as(gt))
        )
        denoise = FiniteCheck(lambda x_t, t: self.denoiser(x_t, t, y))
        x = repaint(
            denoise,
            self.diffusion,
            self.times,
            gt,
            keep_mask,
            streams,
            inject_known=self.inject_known,
            time_shift=self.time_shift,
            start=start,
            after_evaluation=after_evaluation,
        )
        denoise.finish()
        return x.cpu()

    def _sample(
        self, gt: torch.Tensor, keep_mask: torch.Tensor, seed: int, progress: Progress | None
    ) -> torch.Tensor:
        count = progress and _Counter(progress, self.evaluations)
        return self.sample(gt, keep_mask, range(seed, seed + len(gt)), after_evaluation=count)

    def _inpaint_tensors(
        self, images: torch.Tensor, keep_masks: torch.Tensor, seed: int, progress: Progress | None
    ) -> torch.Tensor:
        _check_tensors(images, keep_masks, self.image_size)
        gt, keep_mask = images.float(), keep_masks.float()
        x = self._sample(gt, keep_mask, seed, progress)
        return torch.where(keep_mask.cpu() == 1, gt.cpu(), x) if self.paste_known else x

    def _inpaint_pictures(
        self,
        images: Sequence[Image.Image],
        keep_masks: Sequence[Image.Image],
        seed: int,
        progress: Progress | None,
    ) -> list[Image.Image]:
        _check_pictures(images, keep_masks)
        originals = [prepare(image, self.image_size) for image in images]
        masks = torch.stack([mask_to_tensor(prepare(m, self.image_size)) for m in keep_masks])
        gt = torch.stack([image_to_tensor(original) for original in originals])
        results = to_bytes(self._sample(gt, masks, seed, progress))
        if self.paste_known:
            results = paste_known(results, np.stack(originals), masks)
        return [Image.fromarray(result) for result in results]


class _Counter:
    """Turns the sampler's calls into (done, total, x_0 estimate)."""

    def __init__(self, progress: Progress, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, evaluation: Evaluation) -> None:
        self.done += 1
        self.progress(self.done, self.total, evaluation.pred_x0)


def _check_tensors(images: torch.Tensor, keep_masks: torch.Tensor, size: int) -> None:
    if not isinstance(keep_masks, torch.Tensor):
        raise ValueError("images are a tensor, so the keep masks must be one too")
    shape = images.shape
    if shape[1:] != (3, size, size) or shape[0] == 0:
        raise ValueError(f"images are {tuple(shape)}, not (B, 3, {size}, {size})")
    if keep_masks.shape not in (shape, (shape[0], 1, size, size)):
        raise ValueError(
            f"keep masks are {tuple(keep_masks.shape)}, not ({shape[0]}, 1 or 3, {size}, {size})"
        )
    for name, tensor, low, high in (("images", images, -1, 1), ("keep masks", keep_masks, 0, 1)):
        if not tensor.is_floating_point() or not ((tensor >= low) & (tensor <= high)).all():
            raise ValueError(f"{name} must be float numbers in [{low}, {high}]")


def _check_pictures(images: Sequence[Image.Image], keep_masks: Sequence[Image.Image]) -> None:
    for name, pictures in (("images", images), ("keep masks", keep_masks)):
        is_list = isinstance(pictures, Sequence)
        if not (is_list and all(isinstance(picture, Image.Image) for picture in pictures)):
            raise ValueError(
                f"{name} must be PIL images (PIL.Image.fromarray makes them of arrays) or a "
                "tensor, images and keep masks alike: one each, or two lists, or two tensors"
            )
    if not images or len(images) != len(keep_masks):
        raise ValueError(
            f"{len(images)} images and {len(keep_masks)} keep masks; give each image its mask"
        )
