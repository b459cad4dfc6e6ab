"""The orders of Local-λ's position term are one function."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth

from moebius_jax.models.forms import position_order
from moebius_jax.models.mixers.position_term import position_term
from moebius_jax.models.parts import PositionOrder

ORDERS = [order for order in get_args(PositionOrder) if order not in ("auto", "fused")]
# A map wider than the window, one smaller than it, one that is not square.
SHAPES = [(2, 18, 18, 2, 4, 15), (1, 6, 6, 3, 5, 15), (2, 5, 9, 2, 3, 7)]


def operands(B, H, W, h, k, p):
    q, val = synth.inputs("q", (B, H, W, h, k)), synth.inputs("val", (B, H, W, k))
    return q, val, synth.inputs("w", (p, p, k)) / p, synth.inputs("b", (k,))


def by_definition(q, val, w, b):
    """Y[h,v,n] = Σ_k q[h,k,n] (Σ_δ w[δ,k] val[v,n+δ] + b[k]), in float64 and without any trick."""
    q, val, w, b = (np.asarray(a, np.float64) for a in (q, val, w, b))
    B, H, W, v = val.shape
    p = w.shape[0]
    padded = np.pad(val, ((0, 0), (p // 2, p // 2), (p // 2, p // 2), (0, 0)))
    lambdas = np.zeros((B, H, W, w.shape[-1], v)) + b[:, None]
    for i in range(p):
        for j in range(p):
            lambdas += w[i, j][:, None] * padded[:, i : i + H, j : j + W, None, :]
    return np.einsum("byxhk,byxkv->byxhv", q, lambdas)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", ORDERS)
def test_order_is_the_definition(order, shape):
    arrays = operands(*shape)
    expected = by_definition(*arrays)
    assert synth.relative_error(position_term(*map(jnp.asarray, arrays), order), expected) < 1e-5


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_agree(order):
    arrays = tuple(map(jnp.asarray, operands(*SHAPES[2])))

    def gradients(name):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(position_term(*a, name))), argnums=(0, 1, 2, 3))(*arrays)

    for ours, reference in zip(gradients(order), gradients("conv3d"), strict=True):
        assert synth.relative_error(ours, np.asarray(reference)) < 1e-5


def test_auto_chooses_by_size_and_platform():
    depths = {64: 40, 32: 80, 16: 160}  # the released student's

    def order(width, platform, dtype=jnp.float32, heads=8, depth=None):
        return position_order((width, width), heads, depth or depths[width], 15, dtype, platform)

    assert order(64, "gpu") == "toeplitz"
    assert order(32, "gpu") == order(16, "cpu") == "banded"
    assert order(32, "cpu") == order(64, "cpu") == "tiles"
    assert order(32, "cpu", depth=8) == order(16, "cpu", depth=16) == "toeplitz"
    assert order(64, "gpu", jnp.float16) == order(16, "gpu", jnp.bfloat16) == "fused"
    assert order(64, "gpu", jnp.float16, heads=6) == "toeplitz"
    assert order(32, "tpu") == "toeplitz"
    assert order(16, "tpu") == "banded"
    assert order(16, "tpu", jnp.bfloat16) == order(64, "tpu", jnp.bfloat16, heads=6) == "fused"
    assert order(64, None) == order(64, jax.default_backend())
