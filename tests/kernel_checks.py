"""What tests of kernels, a GPU's and a TPU's, have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import synth


def maps(*shape, scale=1.0):
    return scale * jnp.asarray(synth.inputs("x", shape))


def value_and_gradients(module, *maps):
    """Of a map, or a stream and a map; gradients of all, by a loss that takes no two positions alike."""
    weights = jnp.asarray(synth.inputs("weights", maps[0].shape[:-1]))[..., None]

    def loss(module, *maps):
        y = module(*maps) if len(maps) == 1 else module.onto(*maps)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)) * weights), y

    # One program, compiled as a whole; `loss` is new each time, so what a test changes is traced anew.
    gradients = jax.jit(jax.grad(loss, argnums=tuple(range(1 + len(maps))), has_aux=True))
    found, y = gradients(module, *maps)
    return y, found


def agree(ours, reference, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert synth.relative_error(a, np.asarray(b)) < tolerance


def no_further_off(ours, plain, exact):
    for a, b, reference in zip(*map(jax.tree.leaves, (ours, plain, exact)), strict=True):
        off, allowed = (synth.relative_error(x, np.asarray(reference)) for x in (a, b))
        assert off < 1.3 * allowed + 1e-3
