"""L1, PSNR and SSIM: how far the values of a picture are from those of the truth.

Pictures are uint8 (H, W, 3). A hole is bool (H, W), True where it is measured, None = everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from guided_diffusion.config import UserError

MARGIN = 5  # pixels of an 11x11 window on each side of its centre
SIDE = 2 * MARGIN + 1


def l1(result: np.ndarray, truth: np.ndarray, hole: np.ndarray | None = None) -> float:
    """Mean absolute error over pixels and channels, in grey levels of 255."""
    return float(np.abs(_difference(result, truth, hole)).mean())


def psnr(result: np.ndarray, truth: np.ndarray, hole: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB, with the peak 255; infinite where nothing differs."""
    mse = np.square(_difference(result, truth, hole)).mean()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def _difference(result: np.ndarray, truth: np.ndarray, hole: np.ndarray | None) -> np.ndarray:
    difference = result.astype(np.float64) - truth
    return difference if hole is None else difference[hole]


def ssim_map(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Structural similarity around each pixel, the mean of the three channels.

    As in Wang et al. 2004: Gaussian windows of 11x11 pixels, sigma = 1.5, K = 0.01 and 0.03, range
    255. Only whole windows count, so that the map has 5 pixels less on each side: (H - 10, W - 10).
    H and W >= 11. Raises UserError if scikit-image is not installed.
    """
    _, similarity = _structural_similarity()(
        truth,
        result,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    return inside(similarity.mean(axis=2))


def inside(area: np.ndarray) -> np.ndarray:
    """The part of a picture, or of a hole, around whose pixels there are whole windows of SSIM."""
    return area[MARGIN:-MARGIN, MARGIN:-MARGIN]


def _structural_similarity() -> Callable:
    try:
        from skimage.metrics import structural_similarity
    except ModuleNotFoundError as error:
        raise UserError("SSIM needs scikit-image: pip install -r requirements-eval.txt") from error
    return structural_similarity
