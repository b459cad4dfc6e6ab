"""Muon's orthogonalised update, as the release computes it (spec "Optimiser").

`optax.contrib.muon` is another recipe: it corrects the momentum's bias, takes its scale from the reshaped
fans, rounds the coefficients to bfloat16, and keeps a second momentum we would not use. Momentum, decay and
learning rate around this transformation are optax's.
"""

import collections
from collections.abc import Mapping

import jax.numpy as jnp
import optax
from flax.typing import Dtype
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
_NOT_MUON = ("embedding", "conv_in", "conv_out")


def uses_muon(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of ours is Muon's: rank ≥ 2, and not of the embedding, `conv_in` or `conv_out`."""
    return len(shape) >= 2 and name.split(".", maxsplit=1)[0] not in _NOT_MUON


def newton_schulz(x: Float[Array, "n a b"], dtype: Dtype = jnp.bfloat16) -> Float[Array, "n a b"]:
    """Five steps towards the nearest orthogonal matrix of each in the stack; a ≤ b is cheapest.

    Products are in `dtype`, their coefficients are not rounded to it.
    """
    a, b, c = COEFFICIENTS

    def times(factor: float, matrix: Array) -> Array:
        return (factor * matrix.astype(jnp.float32)).astype(dtype)

    x = x.astype(jnp.float32)
    x = (x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)).astype(dtype)
    for _ in range(STEPS):
        gram = jnp.einsum("nab,ncb->nac", x, x)
        polynomial = times(b, gram) + jnp.einsum("nab,nbc->nac", times(c, gram), gram)
        x = times(a, x) + jnp.einsum("nab,nbc->nac", polynomial, x)
    return x


def orthogonalize(
    dtype: Dtype = jnp.bfloat16, spread: NamedSharding | None = None
) -> optax.GradientTransformation:
    """Replaces updates, a dictionary by parameter name, by 0.2·√max(out, in) times their orthogonal factor.

    Matrices of one shape are stacked and iterated together.

    Args:
        dtype: of the iteration; the release's is bfloat16.
        spread: a sharding whose first axis the stacks are cut along, so that the devices share the work
            instead of repeating it. None leaves it to the compiler.
    """

    def update(updates: Mapping[str, Array]) -> dict[str, Array]:
        stacks = collections.defaultdict(list)
        for name, value in updates.items():
            if isinstance(value, optax.MaskedNode):  # another optimiser's
                continue
            matrix = value.reshape(_matrix_shape(name, value.shape))
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            stacks[wide.shape].append((name, wide.astype(dtype)))
        results = {}
        for shape, members in stacks.items():
            stack = jnp.stack([_together(matrix, spread) for _, matrix in members])
            whole = _shared(stack, dtype, spread)
            for (name, _), wide in zip(members, whole, strict=False):
                value = updates[name]
                rows, columns = _matrix_shape(name, value.shape)
                matrix = wide if shape == (rows, columns) else wide.T
                scale = 0.2 * max(_torch_fans(name, value.shape)) ** 0.5
                results[name] = (scale * matrix.astype(jnp.float32)).reshape(value.shape)
        return {name: results.get(name, value) for name, value in updates.items()}

    return optax.stateless(lambda updates, _: update(updates))


def _shared(stack: Array, dtype: Dtype, spread: NamedSharding | None) -> Array:
    """`newton_schulz` with the stack cut over the devices; zeros fill it up to a multiple of them."""
    if spread is None:
        return newton_schulz(stack, dtype)
    missing = -len(stack) % spread.mesh.size
    filled = _together(jnp.pad(stack, ((0, missing), (0, 0), (0, 0))), spread)
    own = newton_schulz(lax.with_sharding_constraint(filled, spread), dtype)
    return _together(own, spread)[: len(stack)]


def _together(x: Array, spread: NamedSharding | None) -> Array:
    """Replicated: a stack of pieces cut elsewhere would be put together by many small transfers."""
    return (
        x if spread is None else lax.with_sharding_constraint(x, NamedSharding(spread.mesh, PartitionSpec()))
    )


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The release's [shape[0], -1], or its transpose: the iteration commutes with both transposing and
    permuting columns."""
    if name.endswith("position_table"):
        return shape[0], shape[1] * shape[2]
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows, shape[-1]


def _torch_fans(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """The first two axes of the tensor as torch keeps it."""
    if name.endswith("position_table"):
        return shape[0], shape[1]
    if len(shape) == 3:  # depthwise [c, 1, h, w] and position kernels [k, 1, 1, p, p]
        return shape[-1], 1
    return shape[-1], shape[-2]
