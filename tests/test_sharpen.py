"""The loss of `tiny`'s last stage: where it is zero, and what it can move."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY_VAE

from examples.tiny import average
from examples.tiny.sharpen import Pixels
from moebius_jax.diffusion.noising import noise_batch
from moebius_jax.diffusion.solvers import solver_steps
from moebius_jax.distillation.loss import Context
from moebius_jax.models import VAE
from moebius_jax.models.initializers import KeyStream
from moebius_jax.training.config_file import load_config
from moebius_jax.weights.folder import load_numpy, read_config, save

B, SIDE, CROP = 2, 8, 4


@pytest.fixture(scope="module")
def loss_and_gradient():
    vae = VAE(TINY_VAE, rngs=KeyStream(jax.random.key(1)))
    keys = jax.random.split(jax.random.key(2), B)
    latents = jax.random.normal(jax.random.key(3), (B, SIDE, SIDE, 4))
    noised = noise_batch(keys, latents, noise_offset=0.0, sampling="uniform", prediction_type="v_prediction")
    loss = Pixels(network=TINY_VAE, crop=CROP)

    @jax.jit
    def run(off, hole):
        context = Context(noised=noised, hole=hole, network=vae, keys=keys)
        return jax.value_and_grad(lambda off: loss(noised.target + off, context))(off)

    return run


def corner():
    """A hole in the upper left, [B, h, w]."""
    return np.zeros((B, SIDE, SIDE), bool) | (np.add.outer(np.arange(SIDE), np.arange(SIDE)) < 2)


@pytest.mark.slow
def test_what_is_right_costs_nothing_and_what_is_wrong_does(loss_and_gradient):
    off = 0.5 * jax.random.normal(jax.random.key(4), (B, SIDE, SIDE, 4))
    assert loss_and_gradient(jnp.zeros_like(off), corner())[0] < 1e-5
    some, more = (loss_and_gradient(s * off, corner())[0] for s in (1, 2))
    assert 0.01 < some < more


@pytest.mark.slow
def test_it_moves_what_is_around_the_hole_alone(loss_and_gradient):
    off = 0.5 * jax.random.normal(jax.random.key(4), (B, SIDE, SIDE, 4))
    gradient = np.abs(loss_and_gradient(off, corner())[1]).max((0, 3))
    assert gradient[:2, :2].min() > 0
    assert gradient[CROP:].max() == gradient[:, CROP:].max() == 0


@pytest.mark.slow
def test_without_a_hole_there_is_nothing_to_say(loss_and_gradient):
    off = jnp.ones((B, SIDE, SIDE, 4))
    loss, gradient = loss_and_gradient(off, np.zeros((B, SIDE, SIDE), bool))
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def test_the_recipe_names_one_autoencoder():
    """As examples/train_tiny.sh calls it: the loss decodes with the run's own."""
    config = load_config("examples/tiny/sharpen.py:work/vae", ["init=work/run/model"])
    assert config.vae == config.loss.losses[1].network == "work/vae"


def test_the_last_stage_is_pure_noise_as_it_is_sampled():
    config = load_config("examples/tiny/one_step.py:work/vae", ["init=work/run/model"])
    assert config.vae == config.loss.losses[1].network == "work/vae"
    steps = solver_steps(config.sampling.scheduler, config.sampling.num_inference_steps, 1.0)
    assert tuple(steps.timesteps) == config.timestep_sampling == (999,)


def test_the_mean_of_two_models(tiny_folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder / "vae", other / "vae")
    shutil.copy(tiny_folder / "pipeline.json", other)
    weights = load_numpy(tiny_folder / "unet")
    architecture = read_config(tiny_folder / "unet").architecture
    save(other / "unet", architecture, {k: v + 1 for k, v in weights.items()}, dtype="float32", source={})
    monkeypatch.setattr("sys.argv", ["average.py", *map(str, (tiny_folder, other, tmp_path / "mean"))])
    assert average.main() == 0
    mean = load_numpy(tmp_path / "mean/unet")
    for key, value in weights.items():
        np.testing.assert_allclose(mean[key], value + 0.5, rtol=1e-6, atol=1e-6, err_msg=key)
    assert read_config(tmp_path / "mean/unet").architecture == architecture
