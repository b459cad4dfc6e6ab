"""The metric network against the release, tap by tap."""

import jax
import jax.numpy as jnp
import pytest
import synth
from conftest import network_from_synth

from moebius_jax.distillation.blitting import Draws, inverse_map, transform
from moebius_jax.distillation.perceptual import Perceptual


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_distance_per_tap(normalize):
    vectors = synth.golden("elatentlpips")
    network = network_from_synth("elatentlpips_sdxl")
    a = synth.inputs("el.a", (2, 4, 64, 64))
    b = 0.3 * synth.inputs("el.b", (2, 4, 64, 64)) + 0.9 * a
    scale = 0.13025 if normalize else 1.0
    taps = network(jnp.asarray(synth.nhwc(a)) * scale, jnp.asarray(synth.nhwc(b)) * scale)
    expected = vectors[f"per_layer_normalize_{normalize}"].reshape(5, 2)
    assert synth.relative_error(taps, expected) < 1e-4


def golden_inputs():
    a = synth.inputs("el.a", (2, 4, 64, 64))
    return jnp.asarray(synth.nhwc(a)), jnp.asarray(
        synth.nhwc(0.3 * synth.inputs("el.b", (2, 4, 64, 64)) + 0.9 * a)
    )


@pytest.mark.slow
def test_value_and_gradient():
    vectors = synth.golden("elatentlpips")
    network = network_from_synth("elatentlpips_sdxl")
    a, b = golden_inputs()
    for rescale in (False, True):
        loss = Perceptual(rescale_inputs=rescale, augment=False)
        value = loss.distance(network, a, b)
        assert synth.relative_error(value, vectors[f"value_normalize_{rescale}"].ravel()) < 1e-4
    gradient = jax.grad(lambda a: loss.distance(network, a, b).mean())(a)
    for mine, theirs in ((gradient, vectors["grad_normalize_True"]),):
        assert synth.relative_error(mine, synth.nhwc(theirs)) < 1e-3


def golden_draws(vectors):
    u = {int(k[9:11]): jnp.asarray(v) for k, v in vectors.items() if k.startswith("aug_draw")}
    names = (
        "flip",
        "quarter_turns",
        "shift",
        "scale",
        "rotation",
        "stretch",
        "second_rotation",
        "fractional_shift",
    )
    return Draws(**{name: u[2 * i] for i, name in enumerate(names)})


def test_transform():
    vectors = synth.golden("elatentlpips")
    inverse = inverse_map(golden_draws(vectors), 64)
    for ours, theirs in zip(golden_inputs(), ("aug_a", "aug_b"), strict=True):
        assert synth.relative_error(transform(ours, inverse), synth.nhwc(vectors[theirs])) < 5e-5
