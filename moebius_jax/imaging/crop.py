"""Cutting a window out at the model's size, and pasting the result back at full resolution."""

import math

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage

from moebius_jax.imaging.membrane import correction
from moebius_jax.imaging.regions import Window

Rgb = UInt8[np.ndarray, "H W 3"]
Hole = Bool[np.ndarray, "H W"]


def cut(
    rgb: Rgb, hole: Hole, window: Window, size: int
) -> tuple[UInt8[np.ndarray, "S S 3"], Bool[np.ndarray, "S S"]]:
    """The window's pixels and hole at size x size.

    Beyond the image's edge both continue as their mirror image. A pixel of a shrunken hole is a hole if any
    of the pixels it stands for is.
    """
    return resized(_extract(rgb, window), size), resized_hole(_extract(hole, window), size)


def resized_hole(hole: Hole, size: int) -> Bool[np.ndarray, "S S"]:
    """A square hole at another size; a pixel is a hole if any of those it stands for is.

    Of a shrunken hole these are the pixels whose centres lie in it: each in one, so that none is lost.
    """
    side = hole.shape[0]
    if side <= size:
        enlarged = Image.fromarray(hole.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
        return np.asarray(enlarged) > 0
    starts = (2 * side * np.arange(size) + size) // (2 * size)
    return np.logical_or.reduceat(np.logical_or.reduceat(hole, starts, axis=0), starts, axis=1)


def paste(
    rgb: Rgb, result: UInt8[np.ndarray, "S S 3"], window: Window, *, blur: float, match_color: bool
) -> Rgb:
    """A copy of `rgb` with the window's part of the hole filled from `result`.

    The hole is replaced whole; around it the result fades out over `blur` pixels (measured at the model's
    resolution: a window that was shrunk three times fades over three times as many). Pixels farther away
    keep their exact values. With no fade and matched colours there is no edge to hide: docs/inference.md,
    "Pasting".

    Args:
        rgb: the image.
        result: the model's picture of the window, S x S.
        window: where it was cut.
        blur: width of the fade in pixels, 0 for none.
        match_color: add to the result how much the image differs from it where the result ends (membrane.py).
    """
    inside, hole = window.inside, window.hole
    filled = resized(result, window.side)[window.covered]
    # A fade that ended at the window's edge before it is at zero would show as a square.
    width = min(blur * max(1.0, window.side / result.shape[0]), _room(hole, window) + 1)
    weight = feather(hole, width)[..., None]
    original = rgb[inside].astype(np.float64)
    fill = filled.astype(np.float64)
    if match_color:
        fill = fill + correction(original, fill, weight[..., 0] == 0)
    blended = rounded(fill * weight + original * (1 - weight))
    out = rgb.copy()
    out[inside] = np.where(weight > 0, blended, rgb[inside])
    return out


def feather(hole: Hole, width: float) -> Float[np.ndarray, "H W"]:
    """1 in the hole, falling to 0 at `width` pixels from it along a half cosine."""
    if width <= 0 or hole.all():
        return hole.astype(np.float64)
    distance = ndimage.distance_transform_edt(~hole)
    return np.where(distance < width, 0.5 + 0.5 * np.cos(math.pi * np.minimum(distance / width, 1.0)), 0.0)


def rounded(levels: Float[np.ndarray, "H W 3"]) -> Rgb:
    """The nearest grey levels."""
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _room(hole: Hole, window: Window) -> int:
    """Pixels between the hole and the nearest edge of the window that lies inside the image."""
    room = window.side
    for axis, (start, part, length) in enumerate(
        zip((window.top, window.left), window.inside, window.labels.shape, strict=True)
    ):
        filled = np.flatnonzero(hole.any(1 - axis))
        if start > 0:
            room = min(room, int(filled[0]))
        if part.stop < length:
            room = min(room, part.stop - part.start - 1 - int(filled[-1]))
    return room


def _extract(array: np.ndarray, window: Window) -> np.ndarray:
    """The window of an image, mirrored at the edges where it reaches beyond them."""
    H, W = array.shape[:2]
    rows = _mirror(np.arange(window.top, window.top + window.side), H)
    columns = _mirror(np.arange(window.left, window.left + window.side), W)
    return array[rows[:, None], columns]


def _mirror(index: np.ndarray, length: int) -> np.ndarray:
    """Reflection without repeating the edge, as often as needed."""
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    folded = np.mod(index, period)
    return np.where(folded < length, folded, period - folded)


def resized(rgb: Rgb, size: int) -> Rgb:
    """A square picture at another size."""
    if rgb.shape[0] == size:
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.LANCZOS))
