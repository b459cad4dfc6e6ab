"""Muon's orthogonalised update, as the release computes it (docs/distillation.md, "Optimiser").

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
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from moebius_jax.models.released import Layout
from moebius_jax.sharding import replicated

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


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
    layouts: Mapping[str, Layout], dtype: Dtype = jnp.bfloat16, spread: NamedSharding | None = None
) -> optax.GradientTransformation:
    """Replaces updates, a dictionary by parameter name, by 0.2·√max(out, in) times their orthogonal factor.

    Matrices of one shape are stacked and iterated together.

    Args:
        layouts: how the release lays each parameter out: what are rows, and the two fans, is said there.
        dtype: of the iteration; the release's is bfloat16.
        spread: a sharding whose first axis the stacks are cut along, so that the devices share the work
            instead of repeating it. None leaves it to the compiler.
    """

    def update(updates: Mapping[str, Array]) -> dict[str, Array]:
        stacks = collections.defaultdict(list)
        for name, value in updates.items():
            if isinstance(value, optax.MaskedNode):  # another optimiser's
                continue
            matrix = _matrix(value, layouts[name])
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            stacks[wide.shape].append((name, wide.astype(dtype)))
        results = {}
        for members in stacks.values():
            stack = jnp.stack([_together(matrix, spread) for _, matrix in members])
            whole = _shared(stack, dtype, spread)
            for (name, _), wide in zip(members, whole, strict=False):
                shape, layout = updates[name].shape, layouts[name]
                scale = 0.2 * max(layout.torch_shape(shape)[:2]) ** 0.5
                results[name] = _tensor(scale * wide.astype(jnp.float32), shape, layout)
        return {name: results.get(name, value) for name, value in updates.items()}

    return optax.stateless(lambda updates, _: update(updates))


def _shared(stack: Array, dtype: Dtype, spread: NamedSharding | None) -> Array:
    """`newton_schulz` with the stack cut over the devices; zeros fill it up to a multiple of them."""
    if spread is None:
        return newton_schulz(stack, dtype)
    missing = -len(stack) % spread.mesh.size
    filled = _together(jnp.pad(stack, ((0, missing), (0, 0), (0, 0))), spread)
    own = newton_schulz(lax.with_sharding_constraint(filled, spread), dtype)
    if missing <= len(stack):
        return _together(own, spread)[: len(stack)]
    # On a large slice most devices have none, and gathering their zeros would grow with the slice.
    of_each = jnp.eye(len(filled), len(stack), dtype=dtype)
    return _together(jnp.einsum("dn,dab->nab", of_each, own, precision=lax.Precision.HIGHEST), spread)


def _together(x: Array, spread: NamedSharding | None) -> Array:
    """Replicated: a stack of pieces cut elsewhere would be put together by many small transfers."""
    return x if spread is None else lax.with_sharding_constraint(x, replicated(spread.mesh))


def _matrix(value: Array, layout: Layout) -> Array:
    """The release's [shape[0], -1], or its transpose: the iteration commutes with transposing and with
    permuting columns."""
    axis = _first_axis(layout)
    if axis == value.ndim - 1:
        return value.reshape(-1, value.shape[-1])
    return jnp.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)


def _tensor(wide: Array, shape: tuple[int, ...], layout: Layout) -> Array:
    """Inverse of `_matrix` and of making it wide."""
    axis = _first_axis(layout)
    rest = (*shape[:axis], *shape[axis + 1 :])
    columns = wide.size // shape[axis]
    is_last = axis == len(shape) - 1
    matrix_shape = (columns, shape[axis]) if is_last else (shape[axis], columns)
    matrix = wide if wide.shape == matrix_shape else wide.T
    return matrix.reshape(shape) if is_last else jnp.moveaxis(matrix.reshape(shape[axis], *rest), 0, axis)


def _first_axis(layout: Layout) -> int:
    """Our axis that is the release's first, its outputs."""
    return layout.order[0] if layout.order else 0
