"""Schedule and solvers against the release's DDIM and diffusers' DPM-Solver++(2M)."""

import jax.numpy as jnp
import numpy as np
import pytest
import synth

from moebius_jax import UserError
from moebius_jax.diffusion.denoise import denoise, solver_step, start_latents
from moebius_jax.diffusion.schedule import alphas_cumprod
from moebius_jax.diffusion.solvers import solver_steps, timesteps

SHAPE = (2, 4, 8, 8)
SPREAD = 1.0  # of the data; scaled latents have about this


def draw(name):
    return jnp.asarray(synth.nhwc(synth.inputs(name, SHAPE)))


@pytest.fixture(scope="module")
def vectors():
    return synth.golden("scheduler")


def test_alphas_cumprod(vectors):
    np.testing.assert_allclose(alphas_cumprod(), vectors["alphas_cumprod"], rtol=2e-5)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_ddim_timesteps(vectors, steps):
    np.testing.assert_array_equal(timesteps("ddim", steps), vectors[f"timesteps_{steps}"])
    for strength in (0.5, 0.99, 1.0):
        expected = vectors[f"timesteps_{steps}_strength_{strength}"]
        np.testing.assert_array_equal(timesteps("ddim", steps, strength), expected)


def test_start_adds_noise_below_full_strength(vectors):
    steps = solver_steps("ddim", 20, 0.99)
    started = start_latents(draw("sched.z"), draw("sched.noise"), steps)
    assert synth.relative_error(started, synth.nhwc(vectors["add_noise_900"])) < 1e-5
    pure = start_latents(draw("sched.z"), draw("sched.noise"), solver_steps("ddim", 20, 1.0))
    np.testing.assert_array_equal(pure, draw("sched.noise"))


@pytest.mark.parametrize("t", [900, 0])
def test_ddim_step(vectors, t):
    steps = solver_steps("ddim", 20, 1.0)
    step = steps.at_step(int(np.flatnonzero(np.asarray(steps.timesteps) == t)[0]))
    latents, clean = solver_step(draw("sched.z"), draw("sched.eps"), jnp.zeros((2, 8, 8, 4)), step)
    assert synth.relative_error(latents, synth.nhwc(vectors[f"step_{t}"])) < 1e-5
    if t == 900:
        assert synth.relative_error(clean, synth.nhwc(vectors["step_900_x0"])) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_dpmpp_is_diffusers(count):
    vectors = synth.golden("dpmpp")
    steps = solver_steps("dpmpp_2m", count)
    np.testing.assert_array_equal(steps.timesteps, vectors[f"timesteps_{count}"])
    latents = draw("sched.z")
    before = jnp.zeros_like(latents)
    for i, expected in enumerate(vectors[f"latents_{count}"]):
        noise = jnp.tanh(latents) * 0.7 + 0.1 * latents  # what the vectors were made with
        latents, before = solver_step(latents, noise, before, steps.at_step(i))
        assert synth.relative_error(latents, synth.nhwc(expected)) < 1e-5


def exact_noise(spread):
    """The noise a perfect network predicts when the data are N(0, spread²)."""

    def predict(model_input, ᾱ):
        return model_input[..., :4] * jnp.sqrt(1 - ᾱ) / (ᾱ * spread**2 + 1 - ᾱ)

    return lambda timesteps, _: (jnp.asarray(alphas_cumprod(), jnp.float32)[timesteps], predict)


def solution_error(solver, count):
    """Error of the run against the exact solution, which scales the noise to the data's spread."""
    noise = jnp.asarray(synth.inputs("x", (1, 8, 8, 4)))
    blank = jnp.zeros((1, 8, 8, 1))
    steps = solver_steps(solver, count)
    out = denoise(exact_noise(SPREAD), noise, blank, noise, steps, jnp.float32(1), guided=False)
    ᾱ = alphas_cumprod()[int(steps.timesteps[0])]
    return float(jnp.abs(out - noise * SPREAD / np.sqrt(ᾱ * SPREAD**2 + 1 - ᾱ)).max())


def test_trailing_starts_at_the_noisiest_step_however_few_there_are():
    for count, expected in {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 3: [999, 666, 332]}.items():
        np.testing.assert_array_equal(timesteps("ddim_trailing", count), expected)


@pytest.mark.parametrize("solver", ["ddim", "ddim_trailing", "dpmpp_2m"])
def test_more_steps_come_closer_to_the_exact_solution(solver):
    errors = [solution_error(solver, count) for count in (5, 20, 100)]
    assert errors[0] > errors[1] > errors[2]


def test_second_order_needs_fewer_steps():
    assert solution_error("dpmpp_2m", 10) < solution_error("ddim", 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler", 20), "scheduler is 'euler'"),
        (("ddim", 0), "num_inference_steps is 0"),
        (("ddim", 1001), "expected 1 to 1000"),
        (("dpmpp_2m", 1000), "expected 1 to 999"),
        (("ddim", 20, 0.0), "strength is 0.0"),
        (("ddim", 20, 1.5), "strength is 1.5"),
        (("ddim", 20, 0.01), "leaves none"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        timesteps(*arguments)
