"""From prepared pictures to tensors, and back to bytes.

An image's tensor is in [-1, 1], a keep mask's in [0, 1] (1 = keep, 0 = fill in); both have three
channels. "Prepared" means uint8 RGB, (S, S, 3), S = image_size; (H, W, 3) where that is None.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageOps

from guided_diffusion.images.files import InputFile


def decode_mask(file: InputFile, convention: str = "keep") -> Image.Image:
    """A mask in RGB, white = keep whatever its convention ("keep" or "fill"). Raises UserError."""
    mask = file.rgb()
    return ImageOps.invert(mask) if convention == "fill" else mask


def as_grey(prepared: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same picture without colours, all three channels its luma."""
    return np.asarray(Image.fromarray(prepared).convert("L").convert("RGB"))


def luma(x: torch.Tensor) -> torch.Tensor:
    """Float (B, 3, H, W) -> (B, 1, H, W), as `as_grey`; what is grey stays so to the bit."""
    red, green, blue = x.split(1, dim=1)
    return green + 0.299 * (red - green) + 0.114 * (blue - green)


def image_to_tensor(prepared: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return _channels_first(prepared.astype(np.float32) / 127.5 - 1)


def mask_to_tensor(prepared: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1], not thresholded."""
    return _channels_first(prepared.astype(np.float32) / 255)


def flip_decision(seed: int, index: int) -> bool:
    """Whether `random_flip` mirrors image `index`: true for half of all (seed, index).

    The decision has a generator of its own, so that the image's sampling noise stays the same.
    """
    return random.Random(f"flip {seed} {index}").random() < 0.5


def _channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))  # (3, H, W)


def to_bytes(x: torch.Tensor) -> np.ndarray:
    """Float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), values outside clamped.

    Truncated, not rounded, as the original does: 63 of the 256 levels that `image_to_tensor` maps
    come back one lower.
    """
    levels = ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def paste_known(results: np.ndarray, originals: np.ndarray, keep_masks: torch.Tensor) -> np.ndarray:
    """The results with the original bytes wherever the mask is exactly 1.

    results, originals: uint8 (B, H, W, 3). keep_masks: (B, 1 or 3, H, W).
    """
    keep = keep_masks.cpu().permute(0, 2, 3, 1).numpy() == 1
    return np.where(keep, originals, results)
