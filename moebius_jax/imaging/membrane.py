"""Differences that are known around a hole, continued into it as a stretched membrane would lie.

What is added to a fill so that it meets the image all along the hole's edge (docs/inference.md, "Pasting"):
Pérez, Gangnet and Blake 2003, "Poisson image editing", equation 5.
"""

import numpy as np
from jaxtyping import Bool, Float

from moebius_jax.imaging.pyramid import doubled, halved

SWEEPS = 4  # over the map at every size; with twice as many it moves by a quarter of a grey level

MOST = 32.0  # grey levels a network may be off; what differs by more is something it did not paint


def correction(
    image: Float[np.ndarray, "H W C"], painted: Float[np.ndarray, "H W C"], known: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, "H W C"]:
    """What to add to `painted` so that it meets `image` at the edge of what is known."""
    return membrane(np.clip(image - painted, -MOST, MOST), known)


def membrane(
    difference: Float[np.ndarray, "H W C"], known: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, "H W C"]:
    """`difference` where it is known; elsewhere, nearly, every position the mean of its neighbours.

    Zero where nothing is known. Of float64 and in sums of one order: web/membrane.js repeats it to the bit.
    """
    out = np.where(known[..., None], difference, 0.0)
    if known.all() or not known.any():
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
    H, W, _ = values.shape
    values = np.where(known[..., None], values, doubled(_continued(*halved(values, known)))[:H, :W])
    y, x = np.ogrid[:H, :W]
    neighbours = (4 - (y == 0) - (y == H - 1) - (x == 0) - (x == W - 1))[..., None]
    # The fields of a chessboard, one colour after the other: a field's neighbours are of the other.
    turns = [(~known & ((y + x) % 2 == colour))[..., None] for colour in (0, 1)] * SWEEPS
    for turn in turns:
        around = np.pad(values, ((1, 1), (1, 1), (0, 0)))
        total = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]
        values = np.where(turn, total / neighbours, values)
    return values
