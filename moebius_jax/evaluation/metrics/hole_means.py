"""Means of a network's maps inside a hole: every position counts by its share of the hole."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def hole_share(holes: Bool[Array, "B H W"], shape: tuple[int, int]) -> Float[Array, "B h w"]:
    """The share of every cell of a coarser grid that is hole; cells need not be whole numbers of pixels."""
    rows, columns = (_cells(n, m) for n, m in zip(holes.shape[1:], shape, strict=True))
    return jnp.einsum("byx,hy,wx->bhw", holes.astype(jnp.float32), rows, columns, precision="highest")


def _cells(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """[i, j]: share of pixel j, of n, in cell i, of m equal ones."""
    edges = np.arange(m + 1) * (n / m)
    overlap = np.minimum(edges[1:, None], np.arange(1, n + 1)) - np.maximum(edges[:-1, None], np.arange(n))
    return (np.maximum(overlap, 0) * (m / n)).astype(np.float32)


def weighted_mean(maps: Float[Array, "B h w C"], weights: Float[Array, "B h w"]) -> Float[Array, "B C"]:
    """Mean over positions with weights; 0 where they are all 0."""
    total = weights.sum((1, 2))[:, None]
    return jnp.einsum("byxc,byx->bc", maps, weights, precision="highest") / jnp.where(total > 0, total, 1)
