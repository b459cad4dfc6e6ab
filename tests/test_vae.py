"""The VAE adapter against the release."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from conftest import TINY_VAE, network_from_synth

from moebius_jax.models import VAE, VAEConfig
from moebius_jax.models import vae as vae_model


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pixels"), [("vae_mini", 64), ("vae", 128)])
def test_posterior_and_decoder(name, pixels):
    vectors = synth.golden(name)
    vae = network_from_synth(name)
    images = np.clip(synth.inputs("vae.x", (1, 3, pixels, pixels)), -1, 1)
    posterior = jax.jit(VAE.posterior)(vae, jnp.asarray(synth.nhwc(images)))
    for key in ("mean", "logvar", "std"):
        assert synth.relative_error(getattr(posterior, key), synth.nhwc(vectors[key])) < 1e-4
    z = synth.inputs("vae.z", (1, 4, pixels // 8, pixels // 8))
    latents = jnp.asarray(synth.nhwc(z)) * vae.config.scaling_factor
    assert synth.relative_error(jax.jit(VAE.decode)(vae, latents), synth.nhwc(vectors["decoded"])) < 1e-4


def test_encode_scales_the_mean_or_a_sample(vae_mini):
    images = jnp.asarray(synth.nhwc(np.clip(synth.inputs("vae.x", (1, 3, 64, 64)), -1, 1)))
    posterior = vae_mini.posterior(images)
    np.testing.assert_allclose(vae_mini.encode(images), 0.13025 * posterior.mean, rtol=1e-6)
    noise = jnp.asarray(synth.inputs("n", (1, 8, 8, 4)))
    sample = 0.13025 * (posterior.mean + posterior.std * noise)
    np.testing.assert_allclose(vae_mini.encode(images, noise), sample, rtol=1e-6)


def test_defaults_are_the_released_vae():
    assert network_from_synth("vae").config == VAEConfig()


@pytest.mark.slow
def test_own_dtype(vae_mini):
    half = vae_mini.replace(dtype=jnp.bfloat16)
    z = jnp.asarray(synth.nhwc(synth.inputs("vae.z", (1, 4, 8, 8))))
    decoded = np.asarray(half.decode(z))
    assert decoded.dtype == np.float32
    assert 0 < synth.relative_error(decoded, np.asarray(vae_mini.decode(z))) < 0.1


def test_no_deprecation_chatter(caplog):
    config = VAEConfig(channels=(32, 32), layers_per_block=1)  # not built before: its setup would warn
    with caplog.at_level(logging.WARNING):
        vae = VAE(params=vae_model.init_params(config, jax.random.key(0)), config=config)
        vae.decode(jnp.zeros((1, 4, 4, 4)))
    assert not caplog.records


def test_bad_config_is_named():
    with pytest.raises(ValueError, match="shift: unknown field"):
        VAEConfig.from_dict({**TINY_VAE.to_dict(), "shift": 0})
