"""Random numbers without state: every draw is a function of numbers that say what it is for."""

import enum
import functools

import jax
from jaxtyping import Array, Float, Key, UInt32


class Draw(enum.IntEnum):
    """What a sample's random draws are folded from its key with, in sampling and in training."""

    IMAGE_POSTERIOR = 0
    MASKED_POSTERIOR = 1
    NOISE = 2
    NOISE_OFFSET = 3
    TIMESTEP = 4
    LOSS = 5


@jax.jit
def sample_keys(numbers: UInt32[Array, "B n"]) -> Key[Array, " B"]:
    """One key per sample, from numbers of its own only: its place in a batch or on devices does not matter.

    Args:
        numbers: the seed, and what is folded into its key after it: in sampling the image's index and the
            window's number, in training the step and the sample's place in the global batch.
    """

    def key(numbers: UInt32[Array, " n"]) -> Key[Array, ""]:
        key = jax.random.key(numbers[0])
        for number in numbers[1:]:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(key)(numbers)


@functools.partial(jax.jit, static_argnames=("draw", "shape"))
def draw_normal(keys: Key[Array, " B"], draw: Draw, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Standard-normal numbers for each sample."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, draw), shape))(keys)


def draw_noise(
    keys: Key[Array, " B"], shape: tuple[int, int, int], noise_offset: Float[Array, ""] | float
) -> Float[Array, "B h w c"]:
    """n = N(0,1) + noise_offset · N(0,1) per sample and channel (docs/inference.md, "Start")."""
    offset = draw_normal(keys, Draw.NOISE_OFFSET, (1, 1, shape[-1]))
    return draw_normal(keys, Draw.NOISE, shape) + noise_offset * offset
