"""The VAE against the release, and in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from conftest import TINY_VAE, network_from_synth
from flax import nnx

from moebius_jax.models import VAE, VAEConfig, forms, inference_copy
from moebius_jax.models.initializers import KeyStream


def pictures(pixels: int) -> jax.Array:
    return jnp.asarray(synth.nhwc(np.clip(synth.inputs("vae.x", (1, 3, pixels, pixels)), -1, 1)))


posterior, decode = jax.jit(VAE.posterior), jax.jit(VAE.decode)


def latents(pixels: int) -> jax.Array:
    """Scaled, as `decode` takes them."""
    return 0.13025 * jnp.asarray(synth.nhwc(synth.inputs("vae.z", (1, 4, pixels // 8, pixels // 8))))


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [lambda v: v, inference_copy], ids=["as released", "for inference"])
@pytest.mark.parametrize(("name", "pixels"), [("vae_mini", 64), ("vae", 128)])
def test_posterior_and_decoder(name, pixels, prepare):
    vectors, vae = synth.golden(name), prepare(network_from_synth(name))
    found = posterior(vae, pictures(pixels))
    for key in ("mean", "logvar", "std"):
        assert synth.relative_error(getattr(found, key), synth.nhwc(vectors[key])) < 1e-4
    decoded = decode(vae, latents(pixels))
    assert synth.relative_error(decoded, synth.nhwc(vectors["decoded"])) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pixels"), [("vae_mini", 64), ("vae", 128)])
def test_fewer_multiplications_everywhere(name, pixels, monkeypatch):
    """As a CPU convolves larger maps than these."""
    monkeypatch.setattr(forms, "fewer_multiplications", lambda *_: True)
    vectors, vae = synth.golden(name), inference_copy(network_from_synth(name))
    mean = jax.jit(lambda vae, x: vae.posterior(x).mean)(vae, pictures(pixels))
    assert synth.relative_error(mean, synth.nhwc(vectors["mean"])) < 1e-5
    decoded = jax.jit(lambda vae, z: vae.decode(z))(vae, latents(pixels))
    assert synth.relative_error(decoded, synth.nhwc(vectors["decoded"])) < 1e-5


def test_encode_scales_the_mean_or_a_sample(vae_mini):
    images = pictures(64)
    found = vae_mini.posterior(images)
    np.testing.assert_allclose(vae_mini.encode(images), 0.13025 * found.mean, rtol=1e-6)
    noise = jnp.asarray(synth.inputs("n", (1, 8, 8, 4)))
    sample = 0.13025 * (found.mean + found.std * noise)
    np.testing.assert_allclose(vae_mini.encode(images, noise), sample, rtol=1e-6)


def test_defaults_are_the_released_vae():
    assert network_from_synth("vae").config == VAEConfig()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "error"), [("float16", 0.01), ("bfloat16", 0.1)])
def test_half_precision(vae_mini, dtype, error):
    half = inference_copy(network_from_synth("vae_mini", dtype=jnp.dtype(dtype)))
    decoded = decode(half, latents(64))
    assert decoded.dtype == jnp.float32
    assert 0 < synth.relative_error(decoded, decode(vae_mini, latents(64))) < error
    mean = posterior(half, pictures(64)).mean
    assert 0 < synth.relative_error(mean, posterior(vae_mini, pictures(64)).mean) < error


@pytest.mark.slow
def test_float16_holds_maps_beyond_its_range(vae_mini):
    """As in the released decoder: maps of 10^5 and more."""

    def enlarged(vae: VAE) -> VAE:
        vae = nnx.clone(vae)
        for half in (vae.encoder, vae.decoder):
            for layer in (half.conv_in, half.mid_block.resnets[0].conv1, half.mid_block.attentions[0].to_out):
                layer.kernel.set_value(layer.kernel[...] * 3e4)
                layer.bias.set_value(layer.bias[...] * 3e4)
        return vae

    half = enlarged(network_from_synth("vae_mini", dtype=jnp.float16))
    assert not jnp.isfinite(decode(half, latents(64))).all()
    frozen = inference_copy(half)
    twice = inference_copy(frozen)
    vae = enlarged(vae_mini)
    assert synth.relative_error(decode(frozen, latents(64)), decode(vae, latents(64))) < 0.01
    assert (
        synth.relative_error(posterior(frozen, pictures(64)).mean, posterior(vae, pictures(64)).mean) < 0.01
    )
    np.testing.assert_array_equal(decode(twice, latents(64)), decode(frozen, latents(64)))


def test_carrying_maps_smaller_changes_nothing_but_rounding(vae_mini):
    """In fp32 not even that: 1/64 is a power of two."""
    small = nnx.clone(vae_mini)
    small.dtype = jnp.dtype(jnp.float16)
    small.freeze()
    small.dtype = jnp.dtype(jnp.float32)
    assert small.decoder.scale < 1
    assert synth.relative_error(decode(small, latents(64)), decode(vae_mini, latents(64))) < 1e-6
    means = (posterior(vae, pictures(64)).mean for vae in (small, vae_mini))
    assert synth.relative_error(*means) < 1e-6


@pytest.mark.slow
def test_a_gpus_forms(vae_mini, monkeypatch):
    """What samples on a GPU, its kernels interpreted."""
    monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
    half = network_from_synth("vae_mini", execution={"platform": "gpu"}, dtype=jnp.float16)
    half = inference_copy(half)
    assert "group_norm" in str(jax.make_jaxpr(VAE.decode)(half, latents(64)))
    assert 0 < synth.relative_error(decode(half, latents(64)), decode(vae_mini, latents(64))) < 0.01
    means = (posterior(vae, pictures(64)).mean for vae in (half, vae_mini))
    assert 0 < synth.relative_error(*means) < 0.01


def test_portable_forms(vae_mini):
    """Those of a CPU, which the golden vectors are compared with, differ from them in rounding."""
    portable = network_from_synth("vae_mini", execution={"platform": "portable"})
    assert 0 < synth.relative_error(decode(portable, latents(64)), decode(vae_mini, latents(64))) < 3e-6
    means = (posterior(vae, pictures(64)).mean for vae in (portable, vae_mini))
    assert 0 < synth.relative_error(*means) < 3e-6


def test_platforms_choose_their_forms():
    platforms = ("cpu", "gpu", "tpu", "portable")
    for choice in (forms.channels_averaged_first, forms.softmax_divided_last):
        assert [choice(platform) for platform in platforms] == [True, False, False, False]


def test_large_attention_logits(vae_mini):
    """Whose exponentials alone would be infinite."""
    vae = nnx.clone(vae_mini)
    query = vae.decoder.mid_block.attentions[0].to_q.kernel
    query.set_value(query[...] * 1000)
    assert jnp.isfinite(decode(vae, latents(64))).all()


def test_logvar_stays_in_its_range():
    vae = VAE(TINY_VAE, rngs=KeyStream(jax.random.key(0)))
    vae.quant_conv.bias.set_value(jnp.full(8, 1e3))
    assert vae.posterior(jnp.zeros((1, 8, 8, 3))).logvar.max() == 20
    vae.quant_conv.bias.set_value(jnp.full(8, -1e3))
    assert vae.posterior(jnp.zeros((1, 8, 8, 3))).logvar.min() == -30


def test_bad_config_is_named():
    with pytest.raises(ValueError, match="48 must be a multiple of norm_groups, 32"):
        VAEConfig(channels=(32, 48))
    with pytest.raises(ValueError, match="shift: unknown field"):
        VAEConfig.from_dict({**TINY_VAE.to_dict(), "shift": 0})
