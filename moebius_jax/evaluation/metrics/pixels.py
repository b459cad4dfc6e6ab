"""Metrics of pixels: L1, PSNR and SSIM, over a picture and inside its hole."""

import math

import numpy as np
from jaxtyping import Bool, UInt8

Rgb = UInt8[np.ndarray, "H W 3"]

SSIM = "scikit-image, Gaussian window of σ 1.5, mean of the channels (Wang et al. 2004)"
_SMALLEST = 11  # side of SSIM's window
_BORDER = 5  # half of it


def l1(result: Rgb, truth: Rgb, hole: Bool[np.ndarray, "H W"]) -> tuple[float, float]:
    """Mean absolute difference of grey levels, as a share of 255; inside an empty hole NaN."""
    difference = np.abs(result.astype(np.float64) - truth) / 255
    return _means(difference, hole)


def psnr(result: Rgb, truth: Rgb, hole: Bool[np.ndarray, "H W"]) -> tuple[float, float]:
    """Peak signal-to-noise ratio in dB; infinite where nothing differs, NaN inside an empty hole."""
    whole, inside = _means(np.square(result.astype(np.float64) - truth), hole)
    return _decibels(whole), _decibels(inside)


def ssim(result: Rgb, truth: Rgb, hole: Bool[np.ndarray, "H W"]) -> tuple[float, float]:
    """Structural similarity: the mean of its map, and of its map inside the hole (NaN if that is empty).

    The map has no whole window within 5 pixels of the edge, and ends there. Both are NaN for pictures smaller
    than the window of 11 pixels.
    """
    from skimage.metrics import structural_similarity

    if min(hole.shape) < _SMALLEST:
        return math.nan, math.nan
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    whole, similarity = structural_similarity(
        truth, result, channel_axis=-1, data_range=255, full=True, **options
    )
    inner = (slice(_BORDER, -_BORDER),) * 2  # as scikit-image's own mean
    return float(whole), _means(similarity[inner], hole[inner])[1]


def _means(values: np.ndarray, hole: Bool[np.ndarray, "H W"]) -> tuple[float, float]:
    return float(values.mean()), float(values[hole].mean()) if hole.any() else math.nan


def _decibels(error: float) -> float:
    return 10 * math.log10(255**2 / error) if error > 0 else math.inf if error == 0 else math.nan
