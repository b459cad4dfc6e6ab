"""How much a result's colours differ from the image's just around the hole, on average, as in the release."""

import numpy as np
from jaxtyping import Bool, Float

BORDER = 10  # pixels by which the box around the hole is larger than the hole, both sides together


def color_shift(
    original: Float[np.ndarray, "H W 3"], result: Float[np.ndarray, "H W 3"], hole: Bool[np.ndarray, "H W"]
) -> Float[np.ndarray, " 3"]:
    """Δ = mean(original) - mean(result) per channel, over the ring around the hole.

    The ring is what lies outside the hole but inside a box around it (docs/inference.md). Zero where
    there is no hole, or no such pixel.
    """
    if not hole.any():
        return np.zeros(3)
    rows, columns = (
        _stretch(np.flatnonzero(hole.any(axis)), n) for axis, n in ((1, hole.shape[0]), (0, hole.shape[1]))
    )
    ring = ~hole[rows, columns]
    if not ring.any():
        return np.zeros(3)
    return original[rows, columns][ring].mean(0) - result[rows, columns][ring].mean(0)


def _stretch(indices: np.ndarray, length: int) -> slice:
    low, high = int(indices[0]), int(indices[-1])
    centre, half = (low + high) // 2, (high - low + 1 + BORDER) // 2
    return slice(max(centre - half, 0), min(centre + half, length - 1) + 1)
