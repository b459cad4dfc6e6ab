"""What several kernels need."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Elementwise = Callable[[Array], Array]  # an activation


def power_of_two(n: int) -> int:
    """The least that is not below n: what Triton's tiles are made of."""
    return 1 << (n - 1).bit_length()


def dot(a: Array, b: Array, over: tuple[int, int] = (1, 0)) -> Array:
    """Product of two matrices in fp32, summed over one axis of each."""
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)
