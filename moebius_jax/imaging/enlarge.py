"""A window that was painted smaller than it is, painted again in tiles: at growing sizes, up to its own.

Each size starts from the one before, enlarged. Its tiles overlap by a quarter or more, fade into each other
and add what is fine alone: colours would drift from tile to tile.
"""

import dataclasses
import itertools
import math

import numpy as np
from jaxtyping import Bool, UInt8

from moebius_jax.imaging.crop import cut, resized, resized_hole, rounded
from moebius_jax.imaging.membrane import correction
from moebius_jax.imaging.pyramid import coarse
from moebius_jax.imaging.regions import Window

Rgb = UInt8[np.ndarray, "H W 3"]
Square = UInt8[np.ndarray, "S S 3"]

LEAST_FACTOR = 1.25  # a picture that is enlarged by less is sharp enough
STRIDE = 0.75  # of a tile: from one to the next
FINE = 3  # 2³ = 8 pixels: a tile adds what is finer
GRAIN = 3.0  # grey levels: what a tile adds is less by so much, and nothing below, or skies would be grainy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """A square of the model's size in a picture of the window; in `image` the hole is painted already.

    `number` counts all tiles of the window, of whatever size, from 1.
    """

    number: int
    top: int
    left: int
    image: Square
    hole: Bool[np.ndarray, "S S"]


class Enlargement:
    """One window on its way to its full size.

    Args:
        rgb: the image.
        window: in it.
        image, hole: the window as the model saw it.
        painted: as it painted it.

    Attributes:
        painted: the window at the size that was painted last.
    """

    def __init__(
        self, rgb: Rgb, window: Window, image: Square, hole: Bool[np.ndarray, "S S"], painted: Square
    ) -> None:
        self._rgb, self._window, self._size = rgb, window, painted.shape[0]
        self._sides = sides(window.side, self._size)
        self._number = 0
        # With match_color=False, too: tiles go on from the fill, and would paint the edge.
        self.painted = rounded(painted + correction(image.astype(np.float64), painted, ~hole))

    def next_tiles(self) -> list[Tile]:
        """Goes on to the next size; no tiles when the picture is as large as the window."""
        if not self._sides:
            return []
        side = self._sides.pop(0)
        known, hole = cut(self._rgb, self._window.labels > 0, self._window, side)
        self.painted = np.where(hole[..., None], resized(self.painted, side), known)
        self._sum = np.zeros((side, side, 3), np.float32)
        self._weight = np.zeros((side, side, 1), np.float32)
        own, tiles = _own_hole(self._window, side), []
        for top, left in itertools.product(starts(side, self._size), repeat=2):
            here = slice(top, top + self._size), slice(left, left + self._size)
            if own[here].any():
                self._number += 1
                tiles.append(
                    Tile(number=self._number, top=top, left=left, image=self.painted[here], hole=hole[here])
                )
        self._missing = len(tiles)
        return tiles

    def put(self, tile: Tile, painted: Square) -> bool:
        """Takes a tile back; True when it was the last of its size, which is then in `self.painted`."""
        size = self._size
        here = slice(tile.top, tile.top + size), slice(tile.left, tile.left + size)
        ramp = np.minimum(np.arange(size) + 1, size - np.arange(size))
        weight = np.minimum.outer(ramp, ramp)[..., None] / size
        self._sum[here] += weight * (tile.image + _fine(painted.astype(np.float64) - tile.image))
        self._weight[here] += weight
        self._missing -= 1
        if self._missing:
            return False
        mean = rounded(self._sum / np.maximum(self._weight, np.finfo(np.float32).tiny))
        self.painted = np.where(self._weight > 0, mean, self.painted)
        del self._sum, self._weight  # as large as the window, four times
        return True


def _fine(change: np.ndarray) -> np.ndarray:
    """What a tile adds to the picture it began from, of what it changed."""
    detail = change - coarse(change, FINE)
    return np.sign(detail) * np.maximum(np.abs(detail) - GRAIN, 0)


def sides(side: int, size: int) -> list[int]:
    """Sizes to paint a window of `side` pixels at, after `size`, growing evenly by a factor of 2 or less."""
    if side < LEAST_FACTOR * size:
        return []
    steps = math.ceil(math.log2(side / size) - 1e-6)
    return [round(size * (side / size) ** (k / steps)) for k in range(1, steps + 1)]


def starts(side: int, size: int) -> list[int]:
    """Where tiles begin along one side, evenly spread."""
    number = math.ceil((side - size) / (STRIDE * size)) + 1
    return [round(start) for start in np.linspace(0, side - size, number)]


def _own_hole(window: Window, side: int) -> Bool[np.ndarray, "side side"]:
    """The part of the hole that the window fills, over all of it."""
    own = np.zeros((window.side, window.side), bool)
    own[window.covered] = window.hole
    return resized_hole(own, side)
