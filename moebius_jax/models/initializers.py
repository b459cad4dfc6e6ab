"""The release's initial distributions (docs/model.md, "Initial weights")."""

import itertools

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array


def kaiming_uniform(key: Array, shape: tuple[int, ...], dtype: Dtype, *, fan_in: int) -> Array:
    """torch's default for convolutions, Kaiming-uniform with a = √5: U(±1/√fan_in).

    torch draws a convolution's bias from the same interval as its weight.
    """
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


class KeyStream:
    """A new key at every `params()`: what layers use of `nnx.Rngs`, without its counters.

    Inside a traced function those are traced numbers, and reading a thousand of them takes half a minute.
    """

    def __init__(self, key: Array) -> None:
        self._keys = (jax.random.fold_in(key, i) for i in itertools.count())

    def params(self) -> Array:
        return next(self._keys)
