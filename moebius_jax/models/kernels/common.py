"""What several kernels need."""

from collections.abc import Callable

from jaxtyping import Array

Elementwise = Callable[[Array], Array]  # an activation


def power_of_two(n: int) -> int:
    """The least that is not below n: what Triton's tiles are made of."""
    return 1 << (n - 1).bit_length()
