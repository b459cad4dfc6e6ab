"""Differences that are known around a hole, continued into it as a stretched membrane would lie.

What is added to a fill so that it meets the image all along the hole's edge (docs/inference.md, "Pasting"):
Pérez, Gangnet and Blake 2003, "Poisson image editing", equation 5.
"""

import numpy as np
from jaxtyping import Bool, Float

from moebius_jax.imaging.pyramid import doubled, halved

SWEEPS = (
    4  # over the map at every size; twice as many move a hole inside a photo by a quarter of a grey level
)
MOST = 32  # grey levels a network may be off; what differs by more is something it did not paint


def correction(
    image: Float[np.ndarray, "H W C"], painted: Float[np.ndarray, "H W C"], known: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, "H W C"]:
    """What to add to `painted` for it to meet `image` at the edge of what is known; at most MOST levels."""
    return membrane(np.clip(image - painted, -MOST, MOST), known)


def membrane(
    difference: Float[np.ndarray, "H W C"], known: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, "H W C"]:
    """`difference` where it is known; elsewhere, nearly, every position the mean of its neighbours.

    Zero where nothing is known. Of float64 and in sums of one order: web/membrane.js repeats it to the bit.
    """
    out = np.where(known[..., None], difference, 0.0)
    if known.all():
        return out
    box = _box((~known).any(1)), _box((~known).any(0))
    out[box] = _continued(out[box], known[box])
    return out


def _box(unknown: Bool[np.ndarray, " n"]) -> slice:
    """From one before the first to one after the last."""
    found = np.flatnonzero(unknown)
    return slice(max(int(found[0]) - 1, 0), int(found[-1]) + 2)


def _continued(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Cascadic multigrid: the map of half the size, doubled, and a few sweeps over what is unknown."""
    if known.all() or not known.any():
        return values
    H, W, C = values.shape
    around = np.zeros((H + 2, W + 2, C))
    found = around[1:-1, 1:-1]
    found[...] = np.where(known[..., None], values, doubled(_continued(*halved(values, known)))[:H, :W])
    y, x = np.ogrid[:H, :W]
    neighbours = (4 - (y == 0) - (y == H - 1) - (x == 0) - (x == W - 1))[..., None]
    # The fields of a chessboard, one colour after the other: a field's neighbours are of the other.
    for colour, row in [(colour, row) for colour in (0, 1) for row in (0, 1)] * SWEEPS:
        left = (row + colour) % 2
        here = slice(row, None, 2), slice(left, None, 2)
        total = around[row:H:2, left + 1 : W + 1 : 2] + around[row + 2 :: 2, left + 1 : W + 1 : 2]
        total += around[row + 1 : H + 1 : 2, left:W:2]
        total += around[row + 1 : H + 1 : 2, left + 2 :: 2]
        np.divide(total, neighbours[here], out=found[here], where=~known[here][..., None])
    return found
