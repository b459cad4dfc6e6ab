"""The release's own preprocessing and pasting, to the bit (docs/inference.md)."""

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFilter

from moebius_jax.imaging.color import color_shift
from moebius_jax.imaging.masks import THRESHOLD, dilate

Rgb = UInt8[np.ndarray, "S S 3"]

BLUR_RADIUS = 3
COMPENSATION = 1.1


def prepare(
    rgb: UInt8[np.ndarray, "H W 3"], grey: UInt8[np.ndarray, "h w"], size: int, dilation: int
) -> tuple[Rgb, Bool[np.ndarray, "S S"]]:
    """Image and hole squashed to size x size, as the release's folder tool does: bicubic and nearest."""
    if rgb.shape[:2] != (size, size):
        rgb = np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC))
    if grey.shape != (size, size):
        grey = np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.NEAREST))
    return rgb, dilate(grey > THRESHOLD, dilation)


def paste(original: Rgb, result: Rgb, hole: Bool[np.ndarray, "S S"], *, compensate: bool) -> Rgb:
    """The result over the original, weighted by PIL's blur of the 8-bit hole, in float64, truncated.

    Args:
        original, result: at the model's resolution.
        hole: binarised, resized and dilated.
        compensate: add 1.1 times the colour difference around the hole to the result first.
    """
    mask = Image.fromarray(hole.astype(np.uint8) * 255)
    weight = (
        np.asarray(mask.filter(ImageFilter.GaussianBlur(BLUR_RADIUS))).astype(np.float64)[..., None] / 255
    )
    r, o = result.astype(np.float64), original.astype(np.float64)
    if compensate:
        r = r + COMPENSATION * color_shift(o, r, hole)
    blend = 255 * ((r / 255) * weight + (o / 255) * (1 - weight))
    return np.clip(blend, 0, 255).astype(np.uint8)
