"""What a network's output means: noise or velocity, in the loop, in the losses, in a folder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
import tiny_run
from conftest import TINY_UNET

from moebius_jax.data.samples import Batch, LatentSample
from moebius_jax.diffusion.denoise import unet_network
from moebius_jax.diffusion.noising import Noised
from moebius_jax.diffusion.prediction import clean_of, noise_of, target_of
from moebius_jax.diffusion.schedule import add_noise, alphas_cumprod, levels
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.imitation import Task
from moebius_jax.distillation.loss import Context
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.errors import UserError
from moebius_jax.models import UNet, UNetConfig
from moebius_jax.models.initializers import KeyStream
from moebius_jax.sharding import make_mesh
from moebius_jax.training.inputs import noised_inputs, step_keys
from moebius_jax.training.networks import load_frozen
from moebius_jax.weights import export_file
from moebius_jax.weights.load import save_network

KINDS = ("epsilon", "v_prediction")


def drawn(name, *shape):
    return jnp.asarray(synth.inputs(name, shape))


@pytest.fixture
def noised():
    """Clean latents, and the noisy ones at both ends of the schedule and between them."""
    clean, noise = drawn("clean", 3, 4, 4, 4), drawn("noise", 3, 4, 4, 4)
    timesteps = jnp.array([0, 500, 999])
    return clean, Noised(noisy_latents=add_noise(clean, noise, timesteps), noise=noise, timesteps=timesteps)


@pytest.mark.parametrize("kind", KINDS)
def test_right_answer_amounts_to_its_noise_and_latents(noised, kind):
    clean, noised = noised
    level = levels(noised.timesteps)
    target = target_of(kind, noised.noisy_latents, noised.noise, *level)
    np.testing.assert_allclose(noise_of(kind, target, noised.noisy_latents, *level), noised.noise, atol=1e-5)
    np.testing.assert_allclose(clean_of(kind, target, noised.noisy_latents, *level), clean, atol=2e-4)


def test_velocity(noised):
    """v = α n - σ z, Salimans and Ho (2022), section 4."""
    clean, noised = noised
    bars = alphas_cumprod()[np.asarray(noised.timesteps)][:, None, None, None]
    expected = np.sqrt(bars) * noised.noise - np.sqrt(1 - bars) * clean
    ours = noised.replace(prediction_type="v_prediction")
    np.testing.assert_allclose(ours.target, expected, atol=2e-5)
    np.testing.assert_array_equal(noised.target, noised.noise)
    np.testing.assert_allclose(ours.clean(ours.target), clean, atol=2e-5)


class Says:
    """Stands in for a U-Net: what it says depends on what it sees."""

    def __init__(self, kind):
        self.config = UNetConfig(prediction_type=kind, channels=(32,), transformers=(False,), latent_size=4)

    def conditions(self, timesteps, _):
        @dataclasses.dataclass
        class Half:
            shifts: jax.Array

            def replace(self, shifts):
                return Half(shifts)

        return (Half(timesteps.astype(jnp.float32)[:, None]),)

    def predict(self, inputs, now):
        self.sample = jnp.tanh(inputs[..., :4]) + now[0].shifts.reshape(()) / 1000
        return self


def test_loop_is_given_noise_at_every_step():
    noisy = drawn("noisy", 2, 4, 4, 9)
    timesteps = jnp.array([999, 500, 0])
    for kind in KINDS:
        rows, predict = unet_network(Says(kind))(timesteps, jnp.zeros(2, jnp.int32))
        for i, t in enumerate((999, 500, 0)):
            said = jnp.tanh(noisy[..., :4]) + t / 1000
            bar = alphas_cumprod()[t]
            noise = said if kind == "epsilon" else np.sqrt(bar) * said + np.sqrt(1 - bar) * noisy[..., :4]
            ours = predict(noisy, jax.tree.map(lambda row, i=i: row[i], rows))
            np.testing.assert_allclose(ours, noise, atol=1e-5)


def test_training_asks_for_what_the_student_predicts():
    config = tiny_run.get_config()
    config = config.replace(student=config.student.replace(prediction_type="v_prediction"))
    side = config.student.latent_size
    moments = drawn("moments", 2, side, side, 8)
    batch = Batch(
        samples=LatentSample(moments, moments, jnp.zeros((2, side, side), bool), jnp.zeros(2, jnp.int32)),
        index=jnp.arange(2),
    )
    noised, _ = noised_inputs(config, step_keys(0, jnp.int32(0), batch.index), batch)
    assert noised.prediction_type == "v_prediction"
    assert not np.allclose(noised.target, noised.noise)
    context = type("Context", (), {"noised": noised})
    assert Task()(noised.target, context) == 0
    assert Task()(noised.noise, context) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_perceptual_loss_sees_clean_latents(noised, monkeypatch, kind):
    clean, noised = noised
    seen = []
    monkeypatch.setattr(Perceptual, "distance", lambda *arguments: seen.extend(arguments[2:4]) or clean)
    ours = noised.replace(prediction_type=kind)
    Perceptual(network="somewhere")(ours.target, Context(noised=ours, hole=None))
    for latents in seen:
        np.testing.assert_allclose(latents, clean, atol=2e-4)


def test_released_file_would_not_say_it(tmp_path):
    unet = UNet(TINY_UNET.replace(prediction_type="v_prediction"), rngs=KeyStream(jax.random.key(0)))
    save_network(tmp_path / "unet", unet)
    with pytest.raises(UserError, match="its prediction_type is v_prediction; a released file does not say"):
        export_file(tmp_path / "unet", tmp_path / "unet.safetensors")


class TestTeacher:
    def config(self, *losses):
        config = tiny_run.get_config()
        student = config.student.replace(prediction_type="v_prediction")
        return config.replace(student=student, loss=LossConfig(terms=losses))

    def test_of_another_kind_is_no_match_for_outputs(self):
        with pytest.raises(
            UserError, match="teacher's prediction_type is epsilon, the student's v_prediction"
        ):
            load_frozen(self.config("task", "fine"), make_mesh(jax.devices()[:1]), abstract=True)

    def test_of_another_kind_lends_its_features(self):
        networks = load_frozen(self.config("task", "coarse"), make_mesh(jax.devices()[:1]), abstract=True)
        assert networks["teacher"].bare.config.prediction_type == "epsilon"


class TestFolder:
    def test_without_the_field_predicts_noise(self):
        stored = UNetConfig.student().to_dict()
        del stored["prediction_type"]
        assert UNetConfig.from_dict(stored) == UNetConfig.student()

    def test_keeps_it(self):
        config = UNetConfig.student(prediction_type="v_prediction")
        assert UNetConfig.from_dict(config.to_dict()) == config

    def test_of_another_kind_is_refused(self):
        with pytest.raises(ValueError, match=r"prediction_type.*'sample'"):
            UNetConfig.from_dict(UNetConfig.student().to_dict() | {"prediction_type": "sample"})
