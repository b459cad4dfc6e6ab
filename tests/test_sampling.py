"""The sampling core: the release's trajectory, guidance, keys, compilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from conftest import TINY_UNET
from flax import nnx

from moebius_jax import UserError
from moebius_jax.diffusion.denoise import (
    branch_categories,
    denoise,
    guided_noise,
    inpaint_latents,
    single_step,
    start_latents,
    unet_network,
)
from moebius_jax.diffusion.draws import draw_noise, sample_keys
from moebius_jax.diffusion.solvers import solver_steps
from moebius_jax.inpaint.latents import decode, encode
from moebius_jax.inpaint.sampler import Sampler, SamplingOptions
from moebius_jax.inpaint.stream import InpaintOptions, Item, inpaint_stream
from moebius_jax.models import inference_copy
from moebius_jax.models.convolutions import Conv3x3, DepthwiseConv
from moebius_jax.sharding import make_mesh
from moebius_jax.weights.tensors import abstract_network, fill, network_tensors


@pytest.fixture(scope="module")
def run(vae_mini):
    """The golden run's inputs, encoded with its own draws."""
    vectors = synth.golden("pipeline_mini")

    def normal(i, *shape):
        return jnp.asarray(synth.nhwc(synth.inputs(f"pipe.draw.{i}", shape)))

    images = np.stack([vectors["image_0"], vectors["image_1"]])
    holes = np.stack([vectors["mask_0"], vectors["mask_1"]]) > 127
    conditions = encode(vae_mini, images, holes, normal(0, 2, 4, 32, 32), normal(1, 2, 4, 32, 32))
    noise = normal(2, 2, 4, 32, 32) + 0.0357 * normal(3, 2, 4, 1, 1)
    steps = solver_steps("ddim", 5, 0.99)
    return vectors, conditions, start_latents(conditions.image_latents, noise, steps), steps


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [lambda u: u, inference_copy], ids=["as released", "folded"])
def test_trajectory_and_images(run, prepare, student_mini, vae_mini):
    vectors, conditions, latents, steps = run
    graphdef, params = nnx.split(prepare(student_mini))
    before = jnp.zeros_like(latents)
    for i, expected in enumerate(vectors["latents"]):
        latents, before = single_step(
            graphdef,
            params,
            latents,
            before,
            conditions.mask,
            conditions.masked_latents,
            steps.at_step(i),
            jnp.float32(2.0),
            guided=True,
        )
        assert synth.relative_error(latents, synth.nhwc(expected)) < 1e-4
    images, finite = decode(vae_mini, latents, truncate=True)
    assert finite.all()
    for i in (0, 1):
        difference = np.abs(np.asarray(images[i], int) - vectors[f"plain_{i}"])
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999


@pytest.mark.slow
def test_scan_is_the_steps(run, student_mini):
    vectors, conditions, latents, steps = run
    graphdef, params = nnx.split(student_mini)

    @jax.jit
    def loop(params, latents):
        network = unet_network(nnx.merge(graphdef, params))
        return denoise(network, latents, conditions.mask, conditions.masked_latents, steps, jnp.float32(2.0))

    assert synth.relative_error(loop(params, latents), synth.nhwc(vectors["latents"][-1])) < 1e-4


def toy_predict(categories, calls):
    """A network whose noise depends on everything it is given; notes the batch it was called with."""

    def predict(inputs):
        calls.append(inputs.shape[0])
        return (
            jnp.tanh(inputs[..., :4] + inputs[..., 5:]) * inputs[..., 4:5]
            + 0.1 * categories[:, None, None, None]
        )

    return predict


class TestGuidance:
    def noise(self, scale, guided, calls):
        latents, masked = (jnp.asarray(synth.inputs(n, (3, 8, 8, 4))) for n in ("a", "b"))
        mask = jnp.ones((3, 8, 8, 1))
        predict = toy_predict(branch_categories(3, guided=guided), calls)
        return guided_noise(predict, latents, mask, masked, jnp.float32(scale), guided=guided)

    def test_formula(self):
        calls = []
        conditional, unconditional = self.noise(1, True, calls), self.noise(0, True, calls)
        expected = unconditional + 2.5 * (conditional - unconditional)
        np.testing.assert_allclose(self.noise(2.5, True, calls), expected, atol=1e-5)
        # Background (0) is the condition, foreground (1) is not.
        np.testing.assert_allclose(unconditional - conditional, 0.1, atol=1e-5)

    def test_scale_one_takes_one_pass(self):
        calls = []
        single = self.noise(1, False, calls)
        assert calls == [3]
        np.testing.assert_allclose(single, self.noise(1, True, calls), atol=1e-6)
        assert calls == [3, 6]


def test_keys_depend_on_own_numbers_only():
    keys = sample_keys(jnp.array([[7, 3, 0], [7, 4, 0], [8, 3, 0], [7, 3, 1]], jnp.uint32))
    alone = sample_keys(jnp.array([[8, 3, 0]], jnp.uint32))
    noise = draw_noise(keys, (8, 8, 4), jnp.float32(0.0357))
    np.testing.assert_array_equal(noise[2], draw_noise(alone, (8, 8, 4), jnp.float32(0.0357))[0])
    assert len(np.unique(np.asarray(noise[:, 0, 0, 0]))) == 4


def test_noise_offset_moves_whole_channels():
    keys = sample_keys(jnp.arange(30, dtype=jnp.uint32).reshape(10, 3))
    plain, offset = (draw_noise(keys, (16, 16, 4), jnp.float32(x)) for x in (0.0, 2.0))
    moved = np.asarray(offset - plain)
    assert np.ptp(moved, axis=(1, 2)).max() < 1e-5
    assert moved[:, 0, 0].std() > 1


@pytest.fixture(scope="module")
def sampler(tiny_pipeline):
    return tiny_pipeline.sampler


def batch(n):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 64, 64, 3), np.uint8)
    holes = np.zeros((n, 64, 64), bool)
    holes[:, 16:40, 24:48] = True
    return images, holes, np.array([(5, i, 0) for i in range(n)])


@pytest.mark.slow
def test_item_in_batch_is_item_alone(sampler):
    images, holes, seeds = batch(4)
    options = SamplingOptions(num_inference_steps=3)
    together = np.asarray(sampler(images, holes, seeds, options)[0])
    for i in range(4):
        # In the same batch shape nothing at all may differ ...
        shuffled = np.roll(np.arange(4), i)
        moved = np.asarray(sampler(images[shuffled], holes[shuffled], seeds[shuffled], options)[0])
        np.testing.assert_array_equal(moved[i], together[0])
        # ... in another, matrix products are split differently and may round differently.
        alone = np.asarray(sampler(images[i : i + 1], holes[i : i + 1], seeds[i : i + 1], options)[0])
        assert np.abs(alone[0].astype(int) - together[i]).max() <= 1


@pytest.mark.slow
def test_holes_of_any_byte_are_holes(sampler):
    images, holes, seeds = batch(1)
    options = SamplingOptions(num_inference_steps=3)
    bitmaps = (holes * np.uint8(255)).view(bool)  # True as PIL has it
    results = [np.asarray(sampler(images, h, seeds, options)[0]) for h in (holes, bitmaps)]
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
def test_seed_and_index_change_the_result(sampler):
    images, holes, _ = batch(1)
    options = SamplingOptions(num_inference_steps=3)
    results = [
        np.asarray(sampler(images, holes, np.array([numbers]), options)[0])
        for numbers in ((5, 0, 0), (6, 0, 0), (5, 1, 0), (5, 0, 1))
    ]
    for i in range(4):
        for j in range(i):
            assert (results[i] != results[j]).any()


def test_image_and_masked_image_have_draws_of_their_own(sampler, monkeypatch):
    images, holes, seeds = batch(2)
    seen = []

    def encode(*arguments):
        seen.extend(arguments[-2:])
        raise StopIteration

    monkeypatch.setattr(sampler, "_encode", encode)
    with pytest.raises(StopIteration):
        sampler(images, holes, seeds, SamplingOptions())
    image, masked = map(np.asarray, seen)
    assert image.shape == masked.shape == (2, 8, 8, 4)
    assert len(np.unique(np.concatenate([image, masked]))) == 2 * image.size


@pytest.mark.slow
def test_guidance_seed_and_start_do_not_recompile(sampler):
    images, holes, seeds = batch(2)
    sampler(images, holes, seeds, SamplingOptions(num_inference_steps=4, strength=0.75))
    compiled = inpaint_latents._cache_size()
    for changed in (
        SamplingOptions(num_inference_steps=4, strength=0.75, guidance_scale=4.5),
        SamplingOptions(num_inference_steps=4, strength=0.75, noise_offset=0.1),
        SamplingOptions(num_inference_steps=3, strength=1.0),
        SamplingOptions(num_inference_steps=3, strength=1.0, scheduler="dpmpp_2m"),
    ):
        sampler(images[::-1].copy(), holes, seeds + 1, changed)
    assert inpaint_latents._cache_size() == compiled
    sampler(images, holes, seeds, SamplingOptions(num_inference_steps=4, strength=0.75, guidance_scale=1.0))
    assert inpaint_latents._cache_size() == compiled + 1


@pytest.mark.slow
def test_callback_sees_and_changes_latents(sampler):
    images, holes, seeds = batch(1)
    options = SamplingOptions(num_inference_steps=4)
    seen = []

    def watch(index, timestep, latents):
        seen.append((index, timestep, latents.shape))
        return latents

    watched = sampler(images, holes, seeds, options, watch)[0]
    assert seen == [(0, 500, (1, 8, 8, 4)), (1, 250, (1, 8, 8, 4)), (2, 0, (1, 8, 8, 4))]
    scanned = np.asarray(sampler(images, holes, seeds, options)[0]).astype(int)
    assert np.abs(np.asarray(watched) - scanned).max() <= 1
    changed = sampler(images, holes, seeds, options, lambda *_: jnp.zeros((1, 8, 8, 4)))[0]
    assert np.abs(np.asarray(changed) - scanned).max() > 1


def test_nan_is_reported_per_item(sampler):
    images, holes, seeds = batch(2)

    def poison(_index, _timestep, latents):
        return latents.at[1].set(jnp.nan)

    _, finite = sampler(images, holes, seeds, SamplingOptions(num_inference_steps=2), poison)
    np.testing.assert_array_equal(finite, [True, False])


@pytest.mark.parametrize(
    ("platform", "dtype", "chosen", "precision"),
    [
        ("tpu", jnp.float32, None, "HIGH"),
        ("tpu", jnp.float32, "highest", "HIGHEST"),
        ("tpu", jnp.bfloat16, None, "None"),
        ("gpu", jnp.float32, None, "None"),
    ],
)
def test_float32_is_multiplied_as_float32(platform, dtype, chosen, precision, tiny_pipeline, monkeypatch):
    """A TPU would take one pass of bfloat16, unless the user has said what to do; step by step too."""
    found = []

    def multiplied() -> None:
        product = jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 2)), jnp.ones((2, 2))).jaxpr.eqns[-1]
        found.append(str(product.params["precision"] and product.params["precision"][0]))

    def whole_loop(_graphdef, _params, latents, *_, **__):
        multiplied()
        return latents

    def one_step(_graphdef, _params, latents, before, *_, **__):
        multiplied()
        return latents, before

    monkeypatch.setattr("moebius_jax.inpaint.sampler.inpaint_latents", whole_loop)
    monkeypatch.setattr("moebius_jax.inpaint.sampler.single_step", one_step)
    config = dataclasses.replace(TINY_UNET, platform=platform)
    unet = fill(
        abstract_network(config, dtype=dtype, stream_dtype=dtype), network_tensors(tiny_pipeline.unet)
    )
    sampler, options = Sampler(unet, tiny_pipeline.vae), SamplingOptions(num_inference_steps=2)
    with jax.default_matmul_precision(chosen):
        sampler(*batch(8), options)
        sampler(*batch(8), options, lambda *step: step[-1])
    assert found == [precision] * 2


@pytest.mark.slow
def test_sharded_is_unsharded(tiny_pipeline, meshes_of):
    images, holes, seeds = batch(8)
    options = SamplingOptions(num_inference_steps=3)
    one = np.asarray(tiny_pipeline.sampler(images, holes, seeds, options)[0]).astype(int)
    sampler = Sampler(tiny_pipeline.unet, tiny_pipeline.vae, make_mesh(jax.devices("cpu")))
    assert sampler.batch_size(3) == 8
    for program in (encode, inpaint_latents, single_step, decode):
        program.clear_cache()  # another test may have traced them: nothing would be seen of it
    of_unet, of_both = meshes_of(DepthwiseConv), meshes_of(Conv3x3)
    result, _ = sampler(images, holes, seeds, options)
    assert of_unet == of_both == {8}, "kernels would have the whole batch on every device"
    of_unet.clear()
    sampler(images, holes, seeds, SamplingOptions(num_inference_steps=2), lambda *step: step[-1])
    assert of_unet == {8}
    assert [shard.data.shape[0] for shard in result.addressable_shards] == [1] * 8
    assert np.abs(np.asarray(result) - one).max() <= 1


@pytest.fixture
def device_says(monkeypatch):
    """Called with what a device's error says that all sampling is to end in from then on."""

    def end_in(said):
        def fails(*_args):
            raise jax.errors.JaxRuntimeError(said)

        monkeypatch.setattr(Sampler, "__call__", fails)

    return end_in


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory", "a batch of 1 squares does not fit in the device's memory"),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm\nMosaic: 2 G", "does not fit"),
        # Of less than a batch: a smaller one would be of no help.
        ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded", "a kernel of ours .*MOEBIUS_KERNELS=off"),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem", "a kernel of ours"),
        ("FAILED_PRECONDITION: Triton support is only enabled for", "a kernel of ours"),
        ("INTERNAL: Mosaic failed to compile TPU kernel", "a kernel of ours"),
    ],
)
def test_what_is_too_much_for_a_device_is_named(said, message, tiny_pipeline, device_says):
    device_says(said)
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(UserError, match=message):
        tiny_pipeline(image, np.eye(64) > 0)


def test_other_errors_of_a_device_stay_what_they_are(tiny_pipeline, device_says):
    device_says("INTERNAL: CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(jax.errors.JaxRuntimeError, match="LAUNCH_FAILED"):
        tiny_pipeline(np.zeros((64, 64, 3), np.uint8), np.eye(64) > 0)


def test_finished_items_are_handed_on_at_once(tiny_pipeline):
    """A long folder of images with nothing to repaint must not pile up in memory."""
    pulled = []

    def items():
        for i in range(50):
            pulled.append(i)
            yield Item(rgb=np.zeros((64, 64, 3), np.uint8), mask=np.zeros((64, 64), np.uint8))

    stream = inpaint_stream(tiny_pipeline.sampler, items(), InpaintOptions(), SamplingOptions(), batch_size=1)
    with pytest.warns(UserWarning, match="nothing to repaint"):
        next(stream)
    assert len(pulled) == 1
