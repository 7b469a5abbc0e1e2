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


# Levels of 255 from black and white that still mean them: video has 16 and 235, or 234 where
# 16 bits, 256 times as much, became 8.
NEAR = 21


def levels_near(mask: Image.Image, convention: str) -> tuple[int, int] | None:
    """The levels of a mask, of 255, that stand for black and white; None: these themselves do.

    mask: as decoded, white = keep. A black that is merely near counts only where white is, too, or
    where the file's white, inverted, gave it.
    """
    lows, highs = zip(*mask.getextrema(), strict=True)
    low, high = min(lows), max(highs)
    is_white, is_black = 255 - NEAR <= high < 255, 0 < low <= NEAR < high
    if is_white or (is_black and high == 255 and convention == "fill"):
        return low if is_black else 0, high
    return None


def stretch_mask(mask: Image.Image, convention: str = "keep") -> Image.Image:
    """A mask whose white is nearly white, with all values scaled so that it is white (255).

    Else nothing would be known. 254 comes from conversions of colour ranges, 235 from video, 65,280
    of 65,535 from 8 bits that became 16. mask: RGB, as decoded.
    """
    near = levels_near(mask, convention)
    if near is None:
        return mask
    low, high = near
    levels = (np.arange(256) - low) * 255 / (high - low)
    return mask.point([*np.rint(levels.clip(0, 255)).astype(int)] * 3)


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
