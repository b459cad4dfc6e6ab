"""Maps at half and at twice their size, in sums of one order: web/pyramid.js repeats them to the bit."""

import numpy as np
from jaxtyping import Bool, Float


def halved(
    values: Float[np.ndarray, "H W C"], known: Bool[np.ndarray, "H W"]
) -> tuple[Float[np.ndarray, "h w C"], Bool[np.ndarray, "h w"]]:
    """The mean of what is known of every 2 x 2, 0 where nothing is; `values` are 0 where they are not known.

    Odd sides are rounded up.
    """
    odd = [(0, n % 2) for n in known.shape]
    values, known = np.pad(values, [*odd, (0, 0)]), np.pad(known, odd)
    total = values[::2, ::2] + values[::2, 1::2] + values[1::2, ::2] + values[1::2, 1::2]
    count = known[::2, ::2].astype(int) + known[::2, 1::2] + known[1::2, ::2] + known[1::2, 1::2]
    return total / np.maximum(count, 1)[..., None], count > 0


def doubled(values: Float[np.ndarray, "h w C"]) -> Float[np.ndarray, "2h 2w C"]:
    """Twice the size, linearly."""
    for axis in (0, 1):
        n = values.shape[axis]
        before, after = (values.take(np.clip(np.arange(n) + d, 0, n - 1), axis) for d in (-1, 1))
        pairs = np.stack([(before + 3 * values) / 4, (3 * values + after) / 4], axis + 1)
        values = pairs.reshape(*(m * (1 + (a == axis)) for a, m in enumerate(values.shape)))
    return values


def coarse(values: Float[np.ndarray, "H W C"], halvings: int) -> Float[np.ndarray, "H W C"]:
    """What is left of a map when it was halved so often, at its own size again."""
    sizes, small = [], values
    for _ in range(halvings):
        sizes.append(small.shape[:2])
        small, _all = halved(small, np.ones(small.shape[:2], bool))
    for H, W in reversed(sizes):
        small = doubled(small)[:H, :W]
    return small
