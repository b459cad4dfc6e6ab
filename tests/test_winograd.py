"""Winograd's convolutions are the convolutions, and run where they are chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from jax import lax

from moebius_jax.models import forms, winograd
from moebius_jax.models.blocks import Downsample, Upsample
from moebius_jax.models.convolutions import Conv3x3
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.precision import Precision

SAME = ((1, 1), (1, 1))


def operands(side, shape, channels=24, outputs=40):
    x = synth.inputs("x", (*shape, channels))
    return jnp.asarray(x), jnp.asarray(synth.inputs("kernel", (side, side, channels, outputs)))


def convolved(x, kernel, padding):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("padding", [SAME, ((0, 0), (0, 0)), ((0, 1), (2, 0)), ((3, 2), (1, 4))])
@pytest.mark.parametrize("shape", [(1, 8, 16), (2, 13, 9), (1, 3, 5)])
@pytest.mark.parametrize("side", [2, 3])
def test_is_the_convolution(side, shape, padding):
    x, kernel = operands(side, shape)
    ours, theirs = winograd.convolved(x, kernel, padding), convolved(x, kernel, padding)
    assert ours.shape == theirs.shape
    assert synth.relative_error(ours, np.asarray(theirs)) < 3e-6


@pytest.mark.parametrize(("side", "off"), [(2, 4e-7), (3, 1.2e-6)])
def test_rounding(side, off):
    """Root mean square of the error, of the result's: the usual points of a 3x3 kernel would give 2.3e-6."""
    x, kernel = operands(side, (2, 24, 24), channels=64)
    with jax.enable_x64():
        exact = convolved(x.astype(jnp.float64), kernel.astype(jnp.float64), SAME)
    error = np.asarray(winograd.convolved(x, kernel)) - np.asarray(exact)
    assert np.sqrt(np.mean(error**2) / np.mean(np.square(exact))) < off


def test_gradients_are_the_convolutions():
    x, kernel = operands(3, (1, 6, 9))
    weights = jnp.asarray(synth.inputs("weights", (1, 6, 9, 40)))
    ours, theirs = (
        jax.grad(lambda *args, call=call: jnp.sum(call(*args, SAME) * weights), argnums=(0, 1))(x, kernel)
        for call in (winograd.convolved, convolved)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert synth.relative_error(a, np.asarray(b)) < 1e-5


def test_chosen_for_large_maps_and_kernels_of_cpus():
    def chosen(side, channels, outputs, *, kernel=3, dtype=jnp.float32, platform="cpu"):
        shapes = (1, side, side, channels), (kernel, kernel, channels, outputs)
        return forms.fewer_multiplications(*shapes, dtype, platform)

    assert chosen(64, 512, 512)
    assert chosen(512, 256, 128)
    assert chosen(128, 512, 2048, kernel=2)
    assert not chosen(16, 1280, 1280)  # the kernel alone would take longer
    assert not chosen(512, 3, 128)
    assert not chosen(32, 640, 2560, kernel=2)
    assert not any(chosen(64, 512, 512, platform=name) for name in ("gpu", "tpu", "portable"))
    assert not chosen(64, 512, 512, dtype=jnp.bfloat16)


def layer_of(kind, platform, *, freeze, **options):
    layer = kind(precision=Precision(platform=platform), rngs=KeyStream(jax.random.key(0)), **options)
    if freeze:
        getattr(layer, "conv", layer).freeze()
        if isinstance(layer, Upsample):
            layer.freeze()
    return layer


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (Conv3x3, {"in_channels": 384, "out_channels": 416}),
        (Conv3x3, {"in_channels": 416, "out_channels": 384, "padding": ((0, 1), (2, 0))}),
        (Upsample, {"channels": 512}),
    ],
)
def test_frozen_layers_take_it(kind, sizes):
    width = sizes.get("in_channels", sizes.get("channels"))
    x = jnp.asarray(synth.inputs("x", (1, 64, 64, width)))

    def run(platform, freeze):
        layer = layer_of(kind, platform, freeze=freeze, **sizes)
        program = jax.jit(layer).lower(x)
        return np.asarray(program.compile()(x)), "convolution" in program.as_text()

    exact, _ = run("portable", True)
    for platform, freeze, convolves in (("cpu", True, False), ("cpu", False, True), ("portable", True, True)):
        out, has_convolution = run(platform, freeze)
        assert has_convolution == convolves
        assert synth.relative_error(out, exact) < 1e-5


def test_not_at_stride_two():
    layer = layer_of(Downsample, "cpu", freeze=True, channels=512)
    assert layer(jnp.ones((1, 64, 64, 512))).shape == (1, 32, 32, 512)


@pytest.mark.parametrize("side", [2, 3])
def test_does_not_see_the_batch(side):
    x, kernel = operands(side, (3, 67, 49), channels=64)
    call = jax.jit(lambda x: winograd.convolved(x, kernel))
    whole = np.asarray(call(x))
    np.testing.assert_array_equal(call(jnp.roll(x, 1, axis=0)), np.roll(whole, 1, axis=0))
    np.testing.assert_array_equal(call(x[:1]), whole[:1])
