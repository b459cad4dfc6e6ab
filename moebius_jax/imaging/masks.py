"""Masks: grey levels to holes, dilation, and warnings about masks that look wrong."""

import warnings

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

Hole = Bool[np.ndarray, "H W"]


THRESHOLD = 127  # grey levels above it are hole (the release: < 127.5 is not)


class MaskWarning(UserWarning):
    """A mask that is probably not what was meant."""


def grey_levels(
    mask: UInt8[np.ndarray, "H W"], *, invert: bool = False, name: str = "mask"
) -> UInt8[np.ndarray, "H W"]:
    """A mask with white = repaint on the scale 0 to 255.

    Args:
        mask: white = repaint.
        invert: black = repaint instead.
        name: for warnings.

    Warns:
        MaskWarning: the mask is all white, all black, or holds only 0 and 1 (read as 0 and 255).
    """
    if mask.max(initial=0) == 1:
        _warn(f"{name}: holds only 0 and 1; read as 0 and 255")
    grey = _upright(mask, invert=invert)
    hole = grey > THRESHOLD
    if hole.all():
        _warn(f"{name}: everything is to be repainted; was black = repaint meant (invert the mask)?")
    elif not hole.any():
        brightest = grey.max(initial=0)
        _warn(
            f"{name}: nothing to repaint, no pixel is brighter than mid-grey (the brightest is {brightest}); "
            "the image is returned unchanged"
        )
    return grey


def to_hole(mask: UInt8[np.ndarray, "H W"], *, invert: bool = False) -> Hole:
    """The hole of a mask, read as `grey_levels` reads it but without its warnings."""
    return _upright(mask, invert=invert) > THRESHOLD


def _upright(mask: UInt8[np.ndarray, "H W"], *, invert: bool) -> UInt8[np.ndarray, "H W"]:
    if mask.max(initial=0) == 1:
        mask = mask * np.uint8(255)
    return np.uint8(255) - mask if invert else mask


def dilate(hole: Hole, size: int) -> Hole:
    """Dilation with a size x size square."""
    size = min(size, 2 * max(hole.shape) + 1)  # by then it is everywhere
    return ndimage.maximum_filter(hole, size=size) if size > 1 else hole


def warn_if_thin(hole: Hole, factor: int, scale: float, name: str) -> None:
    """Warns when most of a hole falls between the samples of the latent grid.

    The network sees a mask at every `factor`-th pixel (docs/inference.md), so a stroke thinner than
    that may hardly exist for it.

    Args:
        hole: at the model's resolution; sides are multiples of `factor`.
        factor: pixels per latent position.
        scale: pixels of the image per pixel of `hole`.
        name: for the warning.
    """
    H, W = hole.shape
    touched = hole.reshape(H // factor, factor, W // factor, factor).any((1, 3)).sum()
    if 2 * hole[::factor, ::factor].sum() < touched:
        _warn(
            f"{name}: strokes thinner than {round(factor * scale)} pixels mostly fall between the positions "
            f"the network sees here; grow the mask (mask dilation {round((2 * factor - 1) * scale)})"
        )


def _warn(message: str) -> None:
    warnings.warn(message, MaskWarning, stacklevel=4)
