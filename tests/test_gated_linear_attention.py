"""The chunk-parallel scan is the recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth

from moebius_jax.models.mixers.gated_linear_attention import gated_linear_attention


def recurrence(q, key, val, log_decay):
    """S_t = diag(α_t) S_{t-1} + k_t v_tᵀ, o_t = q_t·S_t, token by token in float64."""
    q, key, val, alpha = (np.asarray(a, np.float64) for a in (q, key, val, np.exp(np.float64(log_decay))))
    B, N, h, k = q.shape
    state = np.zeros((B, h, k, val.shape[-1]))
    out = np.zeros((B, N, h, val.shape[-1]))
    for t in range(N):
        state = alpha[:, t, :, :, None] * state + key[:, t, :, :, None] * val[:, t, :, None, :]
        out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out


def operands(N, strength):
    shape = (2, N, 2, 4)
    q, key = synth.inputs("q", shape), synth.inputs("k", shape)
    log_decay = -strength * np.abs(synth.inputs("a", shape))
    return q, key, synth.inputs("v", (2, N, 2, 6)), log_decay


@pytest.mark.parametrize("N", [1, 16, 50, 256])
@pytest.mark.parametrize("strength", [0.01, 1.0, 60.0])
def test_scan_is_the_recurrence(N, strength):
    arrays = operands(N, strength)
    ours = gated_linear_attention(*map(jnp.asarray, arrays))
    assert synth.relative_error(ours, recurrence(*arrays)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunk_size_changes_nothing(chunk):
    arrays = tuple(map(jnp.asarray, operands(50, 0.5)))
    reference = np.asarray(gated_linear_attention(*arrays))
    assert synth.relative_error(gated_linear_attention(*arrays, chunk=chunk), reference) < 1e-5


@pytest.mark.slow
def test_gradient_is_finite_under_strong_decay():
    arrays = tuple(map(jnp.asarray, operands(50, 60.0)))
    for gradient in jax.grad(lambda *a: gated_linear_attention(*a).sum(), argnums=(0, 1, 2, 3))(*arrays):
        assert np.isfinite(gradient).all()


def test_causal():
    q, key, val, decay = map(jnp.asarray, operands(50, 0.1))
    changed = gated_linear_attention(q, key.at[:, 30:].add(1.0), val.at[:, 30:].add(1.0), decay)
    before = gated_linear_attention(q, key, val, decay)
    np.testing.assert_array_equal(before[:, :30], changed[:, :30])
    assert not np.allclose(before[:, 30:], changed[:, 30:])
