"""Convolutions at stride 1 with fewer multiplications: Winograd's minimal filtering.

The outputs of a tile of m x m positions are coefficients of a product of polynomials, which its values at
n = m + r - 1 points determine, along rows and along columns. With an r x r kernel w and what a tile sees, x,

    y = A·[(G·w·Gᵀ) ⊙ (B·x·Bᵀ)]·Aᵀ

where ⊙ is a product over the channels for each of the n² points (Lavin and Gray 2016, "Fast Algorithms for
Convolutional Neural Networks"): 36 of them where a 3x3 convolution makes 144, 16 for 36 of a 2x2 one. What is
saved there is paid in maps that are read and written more often: `forms.fewer_multiplications` weighs it.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# By r: m, and the points but ∞. With the usual 0, ±1, ±2 a 3x3 kernel's result would be twice as far off.
TILES = {2: (3, (0, 1, -1)), 3: (4, (0, 3 / 4, -3 / 4, 3 / 2, -3 / 2))}


def sizes(side: int) -> tuple[int, int]:
    """m and n, of a kernel with this many positions a side."""
    tile, points = TILES[side]
    return tile, len(points) + 1


@functools.partial(jax.jit, static_argnames="padding")  # traced once for all layers of a size
def convolved(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "r r C D"],
    padding: tuple[tuple[int, int], ...] = ((1, 1), (1, 1)),
) -> Float[Array, "B h w D"]:
    """Cross-correlation of the padded map, as `lax.conv_general_dilated` without a bias; r is 2 or 3.

    Rounding, of the result's root mean square: 1e-6 for 3x3 kernels of 64 channels, 2e-6 of 512; for 2x2
    kernels 3e-7.
    """
    r = len(kernel)
    tile, points = TILES[r]
    outputs, kernels, inputs = _matrices(tile, points)
    n = len(inputs)
    height, width = (side + sum(more) - r + 1 for side, more in zip(x.shape[1:3], padding, strict=True))
    rows, columns = (-(-side // tile) for side in (height, width))
    filled = [
        (before, tile * count + r - 1 - before - side)
        for side, count, (before, _) in zip(x.shape[1:3], (rows, columns), padding, strict=True)
    ]
    padded = jnp.pad(x, [(0, 0), *filled, (0, 0)])
    seen = _combined(inputs, [padded[:, i : i + tile * rows : tile] for i in range(n)])
    seen = jnp.stack(seen)  # i B y W C
    seen = _combined(inputs, [seen[:, :, :, j : j + tile * columns : tile] for j in range(n)])
    weights = jnp.stack(_combined(kernels, kernel))  # i r C D
    weights = _combined(kernels, jnp.moveaxis(weights, 1, 0))
    # A product for each column of points: one of all takes longer to run, one a point longer to compile.
    y = [jnp.einsum("iByxc,icd->iByxd", s, w) for s, w in zip(seen, weights, strict=True)]
    y = jnp.stack(_combined(outputs, y), axis=-2)  # i B y x m D
    y = jnp.stack(_combined(outputs, y), axis=2)  # B y m x m D
    return y.reshape(len(x), tile * rows, tile * columns, -1)[:, :height, :width]


def _combined(matrix: np.ndarray, parts: Iterable[Array]) -> list[Array]:
    # Not a product: so few summands would be multiplied at a tenth of a product's speed.
    parts = list(parts)
    return [
        sum(float(factor) * part for factor, part in zip(row, parts, strict=True) if factor) for row in matrix
    ]


@functools.cache
def _matrices(tile: int, points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A [m, n], G [n, r], B [n, n]; exact but for G's rounding, with points that are short in binary."""
    n = len(points) + 1
    of_others = [np.poly([p for p in points if p != point])[::-1] for point in points]  # ascending powers
    inputs = np.zeros((n, n))
    inputs[:-1, :-1] = of_others
    inputs[-1] = np.poly(points)[::-1]
    scale = [np.polyval(others[::-1], point) for others, point in zip(of_others, points, strict=True)]

    def powers(count: int) -> np.ndarray:
        values = np.vander(points, count, increasing=True)
        return np.vstack([values, np.eye(count)[-1]])  # at ∞ the leading coefficient

    kernels = powers(n - tile + 1) / np.array([*scale, 1])[:, None]
    return powers(tile).T, kernels, inputs
