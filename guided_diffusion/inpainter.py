"""A model ready to inpaint: tensors or pictures in, the same kind out."""

import operator
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from itertools import count
from typing import Literal, TypeVar

import numpy as np
import torch
from PIL import Image

from guided_diffusion.denoiser import Denoiser, FiniteCheck, tiled
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.images.checks import warn_of_given
from guided_diffusion.images.files import prepare, put_upright, resize_and_crop, to_rgb
from guided_diffusion.images.metadata import Metadata
from guided_diffusion.images.tensors import (
    as_grey,
    image_to_tensor,
    luma,
    mask_to_tensor,
    paste_known,
    stretch_mask,
    to_bytes,
)
from guided_diffusion.repaint import Denoise, repaint
from guided_diffusion.scheduler import count_evaluations
from guided_diffusion.streams import (
    AfterEvaluation,
    Evaluation,
    Known,
    SamplerState,
    Streams,
    begin,
)

Progress = Callable[[int, int, torch.Tensor], None]  # (done, total, x_0 estimate)
Images = TypeVar("Images", torch.Tensor, Image.Image, Sequence[Image.Image])
NetworkDoubts = Callable[[torch.Tensor, torch.Tensor], str | None]  # (picture, keep mask)

# What sampling starts from: pure noise, the image itself unless another picture is given, or a
# picture that must be given.
Start = Literal["noise", "image", "picture"]


class Inpainter(ABC):
    """Fills in what masks hide. Built by `load_inpainter`; called with images and keep masks."""

    diffusion: GaussianDiffusion
    times: Sequence[int]  # see `scheduler`
    image_size: int | None  # None: pictures are taken as they are
    channels: int = 3  # of what the network sees; 1: pictures lose their colours
    paste_known: bool  # known pixels come out exactly as they went in
    network_doubts: NetworkDoubts | None = None  # see `doubts`; None: it is not asked
    start_from: Start  # if not noise, times begin where the picture is noised to

    @abstractmethod
    def sample(
        self,
        gt: torch.Tensor,
        keep_mask: torch.Tensor,
        seeds: Sequence[int],
        *,
        start_picture: torch.Tensor | None = None,
        resume: SamplerState | None = None,
        after_evaluation: AfterEvaluation | None = None,
    ) -> torch.Tensor:
        """The sampler's own output for a batch, one seed an image; shapes as in `__call__`.

        start_picture: what sampling starts from, like gt; None: pure noise. resume: the state in
        which the same batch was stopped. after_evaluation: called after each one, see `repaint`.
        Raises NonFiniteError where the network's output is not finite.
        """

    def prepare_mask(self, keep_mask: torch.Tensor) -> torch.Tensor:
        """The keep mask as the model takes it, of the same shape."""
        return keep_mask

    def as_pictures(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """What the sampler's x_t, or an x_0 that it aims at, shows: (B, 3, H, W), about [-1, 1].

        size: (H, W) of the batch.
        """
        return x

    @property
    def noise_words(self) -> list[str]:
        """How noisy x_t is at each time, in words."""
        noise = (1 - self.diffusion.alphas_cumprod) ** 0.5
        return [f"noise {100 * level:.0f} %" for level in noise]

    def doubts(self, gt: torch.Tensor, keep_mask: torch.Tensor) -> str | None:
        """Why the network is likely used with wrong settings; None: it is not.

        gt, keep_mask: (3, H, W), of one picture.
        """
        return None

    def first_step(self) -> "Inpainter":
        """This inpainter with a walk of one evaluation, which needs as much memory as all."""
        shortened = copy(self)
        shortened.times = (self.times[0], self.times[-1])
        return shortened

    @property
    def evaluations(self) -> int:
        """Network evaluations for one batch."""
        return count_evaluations(self.times)

    def evaluations_before(self, state: SamplerState) -> int:
        """Those of all `evaluations` that were done when the sampler had this state."""
        return count_evaluations(self.times[: state.position + 1])

    def __call__(
        self,
        images: Images,
        keep_masks: Images,
        seed: int | None = 0,
        progress: Progress | None = None,
        start_from: Images | None = None,
    ) -> Images:
        """Inpaint a batch; image i has the random stream of seed + i; None draws a seed.

        images: (B, 3, S, S) in [-1, 1] and keep_masks (B, 1 or 3, S, S) in [0, 1], 1 = keep,
        S = image_size, or any (B, ·, H, W) without one; or a PIL image and its mask of any size,
        or lists of them, which are resized and cropped like files. progress(done, total, x0):
        called after each evaluation; x0 is on the device, and `as_pictures` shows it. start_from:
        what the config's `start_from` begins with, of the images' kind and sizes; left out: the
        images themselves, if the config has no path.
        Returns the same kind; tensors as float32 on the CPU. Warns of masks as the command does.
        Raises ValueError for kinds, shapes or values that do not fit.
        """
        seed = _check_seed(seed)
        if isinstance(images, torch.Tensor):
            return self._inpaint_tensors(images, keep_masks, seed, progress, start_from)
        if isinstance(images, Image.Image):
            starts = None if start_from is None else [start_from]
            return self._inpaint_pictures([images], [keep_masks], seed, progress, starts)[0]
        return self._inpaint_pictures(images, keep_masks, seed, progress, start_from)

    def _sample(
        self,
        gt: torch.Tensor,
        keep_mask: torch.Tensor,
        seed: int,
        progress: Progress | None,
        start_picture: torch.Tensor | None,
    ) -> torch.Tensor:
        done = count(1)

        def show(evaluation: Evaluation) -> None:
            progress(next(done), self.evaluations, evaluation.pred_x0)

        seeds = range(seed, seed + len(gt))
        return self.sample(
            gt,
            keep_mask,
            seeds,
            start_picture=start_picture,
            after_evaluation=show if progress else None,
        )

    def _inpaint_tensors(
        self,
        images: torch.Tensor,
        keep_masks: torch.Tensor,
        seed: int,
        progress: Progress | None,
        start_from: torch.Tensor | None,
    ) -> torch.Tensor:
        _check_tensors(images, keep_masks, self.image_size)
        picture = self._choose_start(start_from, images)
        if picture is not None:
            _check_start_tensor(picture, images)
            picture = picture.float()
        gt, keep_mask = images.float(), self.prepare_mask(keep_masks.float())
        if self.channels == 1:
            gt = luma(gt).expand_as(gt)
        sizes = [(gt.shape[3], gt.shape[2])] * len(gt)
        warn_of_given(sizes, sizes, _mask_bytes(keep_masks), _mask_bytes(keep_mask))
        x = self._sample(gt, keep_mask, seed, progress, picture)
        return torch.where(keep_mask.cpu() == 1, gt.cpu(), x) if self.paste_known else x

    def _inpaint_pictures(
        self,
        images: Sequence[Image.Image],
        keep_masks: Sequence[Image.Image],
        seed: int,
        progress: Progress | None,
        start_from: Sequence[Image.Image] | None,
    ) -> list[Image.Image]:
        _check_pictures(images, keep_masks)
        picture = starts = self._choose_start(start_from, images)
        if starts is not None:
            _check_start_pictures(starts, images)
            prepared = [prepare(start, self.image_size) for start in starts]
            picture = torch.stack([image_to_tensor(start) for start in prepared])
        images = [*map(to_rgb, images)]
        keep_masks = [stretch_mask(to_rgb(mask)) for mask in keep_masks]
        originals = [resize_and_crop(image, self.image_size) for image in images]
        if self.channels == 1:
            originals = [as_grey(original) for original in originals]
        values = [resize_and_crop(mask, self.image_size) for mask in keep_masks]
        masks = [*map(mask_to_tensor, values)]
        _check_sizes(originals, masks)
        masks = self.prepare_mask(torch.stack(masks))
        sizes = [[picture.size for picture in pictures] for pictures in (images, keep_masks)]
        warn_of_given(*sizes, np.stack(values), _mask_bytes(masks))
        gt = torch.stack([image_to_tensor(original) for original in originals])
        results = to_bytes(self._sample(gt, masks, seed, progress, picture))
        if self.paste_known:
            results = paste_known(results, np.stack(originals), masks)
        made = [Image.fromarray(result) for result in results]
        if self.image_size is None:  # whole photos look as before
            for picture, image in zip(made, images, strict=True):
                icc = image.info.get("icc_profile") or b""
                picture.info |= {"icc_profile": icc} if Metadata(icc=icc).profile == "RGB" else {}
        return made

    def _choose_start(self, given: Images | None, images: Images) -> Images | None:
        """What to start from; None: pure noise. Raises ValueError if it is missing, or in vain."""
        if given is not None and self.start_from == "noise":
            raise ValueError(
                "start_from was given, but the config has none; with method: pixel, load it with "
                "overrides=['start_from.t=N'], N a time of its schedule"
            )
        if given is None and self.start_from == "picture":
            raise ValueError(
                "the config has start_from.path, for the images of its dataset; give start_from, "
                "pictures for these images, or load it with overrides=['start_from.path=null'] to "
                "start from the images themselves"
            )
        return images if given is None and self.start_from == "image" else given


class PixelInpainter(Inpainter):
    """RePaint: the network sees the pixels themselves."""

    def __init__(
        self,
        denoiser: Denoiser,
        diffusion: GaussianDiffusion,
        times: Sequence[int],
        image_size: int,
        *,
        num_classes: int = 1000,
        channels: int = 3,
        cond_y: int | None = None,
        merge_known: bool = True,
        time_shift: int = 1,
        paste_known: bool = False,
        start_from: Start = "noise",
    ):
        """times: the walk, see `scheduler`. cond_y: the class of all images; None: one drawn for
        each of num_classes. channels: see `Inpainter`. merge_known: False samples freely, whatever
        the image. time_shift: see `repaint`. paste_known: known pixels come out exactly, where the
        inpainter is called.
        """
        self.denoiser = denoiser
        self.diffusion = diffusion
        self.times = times
        self.image_size = image_size
        self.num_classes = num_classes
        self.channels = channels
        self.cond_y = cond_y
        self.merge_known = merge_known
        self.time_shift = time_shift
        self.paste_known = paste_known
        self.start_from = start_from

    def over_windows(self, windows: torch.Tensor) -> "PixelInpainter":
        """This inpainter for one row of pixels, (1, 3, 1, N), seen in windows; see `tiled`."""
        inpainter = copy(self)
        inpainter.denoiser = tiled(self.denoiser, windows.to(self.diffusion.device))
        return inpainter

    def sample(
        self,
        gt: torch.Tensor,
        keep_mask: torch.Tensor,
        seeds: Sequence[int],
        *,
        start_picture: torch.Tensor | None = None,
        resume: SamplerState | None = None,
        after_evaluation: AfterEvaluation | None = None,
    ) -> torch.Tensor:
        """See `Inpainter.sample`."""
        streams = Streams(seeds, self.diffusion.device)
        y = self._classes(streams)
        known = Known(*self._seen(gt, keep_mask))
        if start_picture is not None:
            start_picture = self._on_device(self._in_channels(start_picture))
        denoise = FiniteCheck(lambda x_t, t: self.denoiser(x_t, t, y))
        x = self._draw(denoise, known, streams, start_picture, resume, after_evaluation)
        denoise.finish()
        return self.as_pictures(x, x.shape[2:]).cpu()

    def _draw(
        self,
        denoise: Denoise,
        known: Known,
        streams: Streams,
        start_picture: torch.Tensor | None,
        resume: SamplerState | None,
        after_evaluation: AfterEvaluation | None,
    ) -> torch.Tensor:
        """The sampler's output; all tensors are on the diffusion's device."""
        x, position = begin(streams, known.pixels, resume)
        if start_picture is not None and resume is None:
            x = self.diffusion.q_sample(start_picture, self.times[0], x)
        return repaint(
            denoise,
            self.diffusion,
            self.times,
            x,
            streams,
            known=known if self.merge_known else None,
            merge_first=start_picture is not None,
            time_shift=self.time_shift,
            position=position,
            after_evaluation=after_evaluation,
        )

    def as_pictures(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """See `Inpainter.as_pictures`."""
        return x.expand(-1, 3, -1, -1)

    def doubts(self, gt: torch.Tensor, keep_mask: torch.Tensor) -> str | None:
        """See `Inpainter.doubts`."""
        if self.network_doubts is None:
            return None
        (picture,), (mask,) = self._seen(gt[None], keep_mask[None])
        return self.network_doubts(picture, mask)

    def _seen(self, gt: torch.Tensor, keep_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the network sees of a batch: (B, C, S, S) each, on its device."""
        keep_mask = keep_mask.expand_as(gt)[:, : self.channels]
        return self._on_device(self._in_channels(gt)), self._on_device(keep_mask)

    def _in_channels(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) -> (B, C, S, S)."""
        return luma(pictures) if self.channels == 1 else pictures

    def _classes(self, streams: Streams) -> torch.Tensor:
        """(B,); drawn for unconditional networks too, as the original does."""
        if self.cond_y is None:
            return streams.classes(self.num_classes)
        return torch.full((len(streams.generators),), self.cond_y, device=self.diffusion.device)

    def _on_device(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.to(self.diffusion.device).contiguous(memory_format=torch.channels_last)


def _check_seed(seed: int | None) -> int:
    """The seed, or one drawn afresh. Raises ValueError."""
    if seed is None:
        return secrets.randbelow(2**31 - 1)
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**62:
        shown = repr(seed) if isinstance(seed, int | float | str) else f"a {type(seed).__name__}"
        raise ValueError(
            f"seed is {shown}; accepted: a whole number >= 0 and < 2**62, or None, which draws one "
            "(image i of a batch has random numbers of its own, from seed + i)"
        )
    return number


def _mask_bytes(keep_masks: torch.Tensor) -> np.ndarray:
    """(B, 1 or 3, H, W) in [0, 1] -> uint8 (B, H, W, 3)."""
    levels = (keep_masks.detach().cpu().float() * 255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()


def _check_tensors(images: torch.Tensor, keep_masks: torch.Tensor, size: int | None) -> None:
    if not isinstance(keep_masks, torch.Tensor):
        raise ValueError("images are a tensor, so the keep masks must be one too")
    shape = images.shape
    sides = (size, size) if size else tuple(shape[2:])
    if shape[1:] != (3, *sides) or len(sides) != 2 or 0 in shape:
        shown = "{}, {}".format(*sides) if size else "H, W"
        raise ValueError(f"images are {tuple(shape)}, not (B, 3, {shown})")
    if keep_masks.shape not in (shape, (shape[0], 1, *sides)):
        shown = "{}, {}".format(*sides)
        raise ValueError(
            f"keep masks are {tuple(keep_masks.shape)}, not ({shape[0]}, 1 or 3, {shown})"
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


def _check_sizes(images: Sequence[np.ndarray], keep_masks: Sequence[torch.Tensor]) -> None:
    """images: (H, W, 3) each, prepared; keep_masks: (3, H, W) each."""
    sizes = {image.shape[:2] for image in images} | {tuple(mask.shape[1:]) for mask in keep_masks}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ValueError(
            f"images and keep masks are of several sizes ({shown}) and the config has no "
            "image_size; give each image a mask of its size, and images of other sizes in a call "
            "of their own"
        )


def _check_start_tensor(starts: torch.Tensor, images: torch.Tensor) -> None:
    if not isinstance(starts, torch.Tensor) or starts.shape != images.shape:
        raise ValueError(f"start_from must be a tensor like the images, {tuple(images.shape)}")
    if not starts.is_floating_point() or not (starts.abs() <= 1).all():
        raise ValueError("start_from must be float numbers in [-1, 1]")


def _check_start_pictures(starts: Sequence[Image.Image], images: Sequence[Image.Image]) -> None:
    if not (
        isinstance(starts, Sequence)
        and all(isinstance(start, Image.Image) for start in starts)
        and [*map(_upright_size, starts)] == [*map(_upright_size, images)]
    ):
        raise ValueError(
            "start_from must be PIL images like the images, as many and of their sizes"
        )


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return put_upright(image).size
