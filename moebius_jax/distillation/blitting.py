"""The random geometric transform E-LatentLPIPS applies to both its inputs ("bg": pixel blitting, geometry).

All operations of a sample compose to one affine map G_inv from output to input coordinates, so the transform
is: widen by reflection, double the resolution, sample once, halve it. Widening and doubling are one constant
matrix per axis and so is halving: shapes are static and nothing but the sampling depends on the draws.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Key

# Low-pass filter of the symlet with six vanishing moments, normalised to sum 1 below.
_SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_MARGIN = 12  # output positions beyond the size, for the filter to run out over


@struct.dataclass
class Draws:
    """One sample's random numbers in the order they enter; u uniform on [0, 1), n standard normal.

    Attributes:
        flip, quarter_turns: u.
        shift: u, x and y.
        scale: n.
        rotation: u.
        stretch: n.
        second_rotation: u.
        fractional_shift: n, x and y.
    """

    flip: Float[Array, " B"]
    quarter_turns: Float[Array, " B"]
    shift: Float[Array, "B 2"]
    scale: Float[Array, " B"]
    rotation: Float[Array, " B"]
    stretch: Float[Array, " B"]
    second_rotation: Float[Array, " B"]
    fractional_shift: Float[Array, "B 2"]


def draw_transform(keys: Key[Array, " B"]) -> Draws:
    """The draws of each sample, from its key."""

    def one(key: Key[Array, ""]) -> Draws:
        keys = jax.random.split(key, 8)
        uniform, normal = jax.random.uniform, jax.random.normal
        return Draws(
            flip=uniform(keys[0]),
            quarter_turns=uniform(keys[1]),
            shift=uniform(keys[2], (2,)),
            scale=normal(keys[3]),
            rotation=uniform(keys[4]),
            stretch=normal(keys[5]),
            second_rotation=uniform(keys[6]),
            fractional_shift=normal(keys[7], (2,)),
        )

    return jax.vmap(one)(keys)


def inverse_map(draws: Draws, size: int) -> Float[Array, "B 3 3"]:
    """G_inv: output to input pixels in centred coordinates (x, y, 1) (docs/distillation.md)."""

    def one(d: Draws) -> Float[Array, "3 3"]:
        shift = jnp.round((2 * d.shift - 1) * 0.125 * size)
        scale, stretch = jnp.exp2(0.2 * d.scale), jnp.exp2(0.2 * d.stretch)
        operations = (
            _scaling(1 / (1 - 2 * jnp.floor(2 * d.flip)), 1.0),
            _rotation(jnp.pi / 2 * jnp.floor(4 * d.quarter_turns)),
            _translation(-shift[0], -shift[1]),
            _scaling(1 / scale, 1 / scale),
            _rotation((2 * d.rotation - 1) * jnp.pi),
            _scaling(1 / stretch, stretch),
            _rotation((2 * d.second_rotation - 1) * jnp.pi),
            _translation(*(-0.125 * size * d.fractional_shift)),
        )
        # HIGHEST: in TF32 or bfloat16 a coordinate would be off by up to a pixel.
        multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return functools.reduce(multiply, operations)

    return jax.vmap(one)(draws)


def transform(images: Float[Array, "B S S C"], inverse: Float[Array, "B 3 3"]) -> Float[Array, "B S S C"]:
    """Resamples square maps, reflected beyond their edges, through `inverse_map`'s result."""
    size = images.shape[1]
    up, down = _widen_and_double(size), _halve(size)
    fine = _resized(images.astype(jnp.float32), up)
    sampled = jax.vmap(functools.partial(_sample, out=down.shape[1]))(fine, inverse)
    return _resized(sampled, down)


def _resized(images: Float[Array, "B S S C"], matrix: Float[Array, "T S"]) -> Float[Array, "B T T C"]:
    """`matrix` along the columns, then along the rows."""
    # In two steps: as one einsum, XLA's compiler for GPUs fails on the first (jax 0.10.2, without a device).
    multiply = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return multiply("ys,bsxc->byxc", matrix, multiply("xr,bsrc->bsxc", matrix, images))


def _sample(image: Float[Array, "N N C"], inverse: Float[Array, "3 3"], *, out: int) -> Float[Array, "M M C"]:
    """Bilinear sampling at twice the resolution, zeros outside; `inverse` is in undoubled pixels."""
    # Doubled samples of an even filter lie half a fine pixel off the grid, on both sides.
    centred = jnp.arange(out) + 0.5 - out / 2 + 0.5
    x, y = jnp.meshgrid(centred, centred)
    rows = inverse[:2]
    sampled_x, sampled_y = (2 * (r[0] * x / 2 + r[1] * y / 2 + r[2]) - 0.5 for r in rows)
    half = image.shape[0] / 2 - 0.5
    coordinates = (sampled_y + half, sampled_x + half)
    return jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, coordinates, order=1, mode="constant"),
        in_axes=-1,
        out_axes=-1,
    )(image)


@functools.cache
def _widen_and_double(size: int) -> np.ndarray:
    """[2·(3·size - 2), size]: reflects size-1 positions on either side, inserts zeros, convolves (gain 2)."""
    widened = np.pad(np.eye(size), ((size - 1, size - 1), (0, 0)), mode="reflect")
    n = len(widened)
    spread = np.zeros((2 * n + 11, size))
    spread[6 : 6 + 2 * n : 2] = widened
    taps = 2 * _filter()[::-1]
    doubled = sum(taps[k] * spread[k : k + 2 * n] for k in range(12))
    return doubled.astype(np.float32)


@functools.cache
def _halve(size: int) -> np.ndarray:
    """[size, 2·(size + 12)]: correlates and keeps every second position of the middle."""
    matrix = np.zeros((size, 2 * (size + _MARGIN)))
    for i in range(size):
        matrix[i, _MARGIN - 5 + 2 * i :][:12] = _filter()
    return matrix.astype(np.float32)


def _filter() -> np.ndarray:
    return np.array(_SYM6) / np.sum(_SYM6)


def _rotation(angle: Array) -> Float[Array, "3 3"]:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _scaling(x: Array | float, y: Array | float) -> Float[Array, "3 3"]:
    return jnp.array([[x, 0, 0], [0, y, 0], [0, 0, 1]])


def _translation(x: Array, y: Array) -> Float[Array, "3 3"]:
    return jnp.array([[1, 0, x], [0, 1, y], [0, 0, 1]])
