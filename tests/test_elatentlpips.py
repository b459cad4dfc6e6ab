"""The metric network against the release, tap by tap."""

import jax.numpy as jnp
import pytest
import synth
from conftest import network_from_synth


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
