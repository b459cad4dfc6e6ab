"""Two whole training steps, from pictures and holes to new weights and averages, against plain functions.

The networks are taken as they are (the golden vectors hold them to the release); everything around them is
written down once more here: encoding, draws, noising, what each network sees, losses, balance, gradients by
plain differentiation, AdamW and the moving average.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from conftest import TINY_VAE

from moebius_jax.data.samples import Batch, PixelSample
from moebius_jax.distillation.balance import cross_weight, output_weights
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.models import VAE, ELatentLPIPSConfig
from moebius_jax.models.initializers import KeyStream
from moebius_jax.sharding import batch_sharding, make_mesh, tensor_sharding
from moebius_jax.training.batches import encoded, to_devices
from moebius_jax.training.networks import load_frozen
from moebius_jax.training.optimizer import OptimizerConfig, run_optimizer
from moebius_jax.training.state import bare_student, initial_state
from moebius_jax.weights.tensors import split_tensors
from train import make_update

SEED, OFFSET, BATCH, SIDE, FACTOR = 11, 0.3, 4, 64, 8
RATE, DECAY, EPS, CLIP = 0.1, 0.1, 1.0, 0.7  # with an eps this large a step is as long as its gradient


def configuration():
    metric = ELatentLPIPSConfig(groups=((8,), (8,), (8,), (8,), (8,)))
    return tiny_run.get_config().replace(
        seed=SEED,
        noise_offset=OFFSET,
        batch_size=BATCH,
        loss=LossConfig(perceptual=Perceptual(network=metric, augment=False, rescale_inputs=True)),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=RATE,
            weight_decay=DECAY,
            eps=EPS,
            clip_norm=CLIP,
            schedule="constant",
        ),
    )


def pictures(step):
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
    holes = np.zeros((BATCH, SIDE, SIDE), bool)
    for hole in holes:
        y, x = rng.integers(0, SIDE // 2, 2)
        hole[y : y + 30, x : x + 20] = True
    return images, holes, np.arange(BATCH, dtype=np.int32) % 2


@pytest.fixture(scope="module")
def setting():
    """Networks and the state before the first step."""
    config, mesh = configuration(), make_mesh(jax.devices()[:1])
    networks = load_frozen(config, mesh)
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    vae = VAE(TINY_VAE, rngs=KeyStream(jax.random.key(1)))
    return config, mesh, networks, optimizer, vae, initial_state(config, mesh, optimizer)


@pytest.fixture(scope="module")
def packages(setting):
    """State and figures after each of two steps, as the package takes them."""
    config, mesh, networks, optimizer, vae, state = setting
    state = jax.tree.map(jnp.copy, state)
    update = make_update(config, mesh, networks, optimizer)
    frozen = {name: network.tensors for name, network in networks.items()}
    history = []
    for step in (0, 1):
        images, holes, tasks = pictures(step)
        bitmaps = (holes * np.uint8(255)).view(bool)  # True as PIL has it
        batch = Batch(samples=PixelSample(images, bitmaps, tasks), index=np.arange(BATCH, dtype=np.int32))
        state, metrics = update(state, frozen, encoded(to_devices(batch, mesh), vae))
        history.append((jax.device_get(state), {k: float(v) for k, v in metrics.items()}))
    return history


class Reference:
    """The same two steps in plain functions."""

    def __init__(self, setting):
        config, mesh, networks, _, self.vae, state = setting
        self.student = bare_student(config, mesh)
        self.teacher = networks["teacher"].bare(networks["teacher"].tensors)
        self.metric = networks["perceptual"].bare(networks["perceptual"].tensors)
        params, statistics = jax.device_get((state.params, state.statistics))
        self.params, self.statistics, self.ema = params, statistics, {**params, **statistics}
        self.m = self.v = {k: np.zeros_like(p) for k, p in params.items()}
        self.losses_and_gradients = jax.jit(self._losses_and_gradients)
        self.inputs = jax.jit(self._inputs)

    def step(self, number):
        noisy, noise, mask, masked, t, ids = self.inputs(*pictures(number), number)
        seen = jnp.concatenate([noisy, mask, masked], axis=-1)
        losses, gradients, statistics = self.losses_and_gradients(
            self.params, self.statistics, seen, noisy, noise, t, ids
        )
        losses, gradients = jax.device_get((losses, gradients))
        norms, weights, total, gradient = self._balanced(losses, gradients)
        length = np.sqrt(sum(np.sum(g.astype(float) ** 2) for g in gradient.values()))
        self._adamw({k: g * min(1, CLIP / length) for k, g in gradient.items()}, number + 1)
        self.statistics = jax.device_get(statistics)
        share = (1 + number + 1) / (10 + number + 1)
        now = {**self.params, **self.statistics}
        self.ema = {k: share * self.ema[k] + (1 - share) * now[k] for k in now}
        return losses, norms, weights, total, length

    def _inputs(self, images, holes, tasks, number):
        """Everything of one step before the networks."""
        keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), number), i) for i in range(BATCH)]

        def draw(what, *shape):
            return jnp.stack([jax.random.normal(jax.random.fold_in(key, what), shape) for key in keys])

        grid = (SIDE // FACTOR, SIDE // FACTOR, 4)
        pixels = images / 127.5 - 1
        visible = jnp.where(holes[..., None], 0, pixels)
        image, outside = (self.vae.posterior(x.astype(jnp.float32)) for x in (pixels, visible))
        scale = TINY_VAE.scaling_factor
        latents = scale * (image.mean + image.std * draw(0, *grid))
        masked = scale * (outside.mean + outside.std * draw(1, *grid))
        noise = draw(2, *grid) + OFFSET * draw(3, 1, 1, 4)
        t = jnp.floor(1000 / (1 + jnp.exp(-draw(4)))).astype(jnp.int32)
        kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
        kept = jnp.asarray(kept, jnp.float32)[t][:, None, None, None]
        noisy = jnp.sqrt(kept) * latents + jnp.sqrt(1 - kept) * noise
        mask = holes[:, ::FACTOR, ::FACTOR, None].astype(jnp.float32)
        ids = 10 * tasks[:, None] + np.arange(10)
        return noisy, noise, mask, masked, t, ids

    def _losses_and_gradients(self, params, statistics, seen, noisy, noise, t, ids):
        """The four losses, and each one's gradient through the whole network."""
        kept = jnp.asarray(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2), jnp.float32)
        kept = kept[t][:, None, None, None]
        teacher = self.teacher(seen, t, ids)

        def losses(params):
            student = self.student({**params, **statistics})
            out = student(seen, t, ids)
            target = (noisy - jnp.sqrt(1 - kept) * noise) / jnp.sqrt(kept)
            ours = (noisy - jnp.sqrt(1 - kept) * out.sample) / jnp.sqrt(kept)
            a, b = 0.13025 * ours, 0.13025 * target
            values = {
                "task": jnp.mean((out.sample - noise) ** 2),
                "fine": jnp.mean((out.sample - teacher.sample) ** 2),
                "perceptual": jnp.mean(self.metric(a, b).sum(0) + jnp.abs(a - b).mean((1, 2, 3))),
                # The student's only down level; the teacher has two, no mid block, and then its up levels.
                "coarse": jnp.mean((out.features[0] - teacher.features[self.first_up]) ** 2),
            }
            return values, split_tensors(student)[1]

        values, pull, new = jax.vjp(losses, params, has_aux=True)
        one = jnp.float32(1)
        gradients = {name: pull({k: one if k == name else 0 * one for k in values})[0] for name in values}
        return values, gradients, new

    @property
    def first_up(self):
        return 2 + self.teacher.config.mid_block

    def _balanced(self, losses, gradients):
        """Norms, weights, total and its gradient; paper, equations 4 and 5."""

        def norm(gradient, name):
            return np.sqrt(np.sum(gradient[name].astype(float) ** 2))

        f, c = "conv_out.pointwise.kernel", "down_blocks.0.attentions.0.proj_out.kernel"
        norms = {f"theta_f_{n}": norm(gradients[n], f) for n in ("task", "fine", "perceptual")}
        weights = {n: (norms["theta_f_task"] / norms[f"theta_f_{n}"]) ** 2 for n in ("fine", "perceptual")}
        factors = {"task": 1, **weights}

        def joined(name):
            return sum(factor * gradients[loss][name] for loss, factor in factors.items())

        output = {name: joined(name) for name in self.params}
        norms["theta_c_coarse"], norms["theta_c_output"] = norm(gradients["coarse"], c), norm(output, c)
        weights["cross"] = (norms["theta_c_coarse"] / norms["theta_c_output"]) ** 2
        total = losses["coarse"] + weights["cross"] * sum(w * losses[n] for n, w in factors.items())
        gradient = {k: gradients["coarse"][k] + weights["cross"] * output[k] for k in self.params}
        return norms, weights, total, gradient

    def _adamw(self, gradient, t):
        self.m = {k: 0.9 * self.m[k] + 0.1 * g for k, g in gradient.items()}
        self.v = {k: 0.95 * self.v[k] + 0.05 * g**2 for k, g in gradient.items()}
        for k, p in self.params.items():
            m, v = self.m[k] / (1 - 0.9**t), self.v[k] / (1 - 0.95**t)
            self.params[k] = p - RATE * (m / (np.sqrt(v) + EPS) + DECAY * p)


@pytest.mark.slow
def test_two_steps_from_pictures_to_averages(setting, packages):
    logged = {"task": "task", "fine": "outkd", "perceptual": "elatentlpips", "coarse": "featkd"}
    reference = Reference(setting)
    before = dict(reference.ema)
    for number, (state, metrics) in enumerate(packages):
        losses, norms, weights, total, length = reference.step(number)
        expected = {f"loss_{logged[n]}": value for n, value in losses.items()}
        expected["feat_weight_task"] = weights.pop("cross")
        expected |= {f"out_weight_{logged[n]}": value for n, value in weights.items()}
        for path, value in norms.items():
            where, name = path.rsplit("_", 1)
            kind = {"theta_f": "out_gnorm", "theta_c": "feat_gnorm"}[where]
            expected[f"{kind}_{logged.get(name, name)}"] = value
        expected |= {"loss": total, "grad_norm": length, "lr": RATE}
        squares = sum(np.sum(p.astype(float) ** 2) for p in reference.params.values())
        expected["parameter_norm"] = np.sqrt(squares)
        assert metrics.pop("out_weight_task") == 1  # the anchor's
        assert metrics.pop("halted_by") == 0
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=2e-3), (number, name)
        assert int(state.step) == number + 1
        now = {**reference.params, **reference.statistics}
        for kind, theirs in (("params", now), ("statistics", now), ("ema", reference.ema)):
            ours = getattr(state, kind)
            assert ours
            for name, value in ours.items():
                moved = np.linalg.norm(theirs[name] - before[name])
                error = np.linalg.norm(value - theirs[name])
                # Some gradients (biases before a BatchNorm) are zero but for rounding.
                assert error <= 2e-3 * moved + 1e-6 * np.sqrt(value.size), (number, kind, name)


def test_the_release_clips_its_weights():
    """At 10^6 and 10^4 (docs/distillation.md, "Balance")."""
    one, tiny, huge = jnp.float32(1), jnp.float32(1e-12), jnp.float32(1e9)
    assert output_weights("release", {"task": huge, "fine": tiny})["fine"] == 1e6
    assert output_weights("release", {"task": one, "fine": one})["fine"] == pytest.approx(1, rel=1e-5)
    assert cross_weight("release", huge, tiny) == 1e4
    assert cross_weight("release", one, one) == pytest.approx(1 / 1.0001, rel=1e-6)


def test_where_arrays_lie():
    """A batch is cut over all devices, a tensor along its longest axis over those that share one copy."""
    mesh = make_mesh(jax.devices(), fsdp=4)
    batch = jax.device_put(np.zeros((16, 8, 8, 9)), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 8, 8, 9)}
    assert len({shard.index[0].start for shard in batch.addressable_shards}) == 8
    for shape, piece in {
        (64, 512): (64, 128),
        (512, 64): (128, 64),
        (3, 3, 64, 128): (3, 3, 64, 32),
        (7, 5000): (7, 1250),
        (7, 4001): (7, 4001),  # no axis that four divides
        (64,): (64,),  # small
    }.items():
        tensor = jax.device_put(np.zeros(shape), tensor_sharding(mesh, shape))
        pieces = {shard.data.shape for shard in tensor.addressable_shards}
        assert pieces == {piece}, shape
        if piece != shape:
            assert len({str(shard.index) for shard in tensor.addressable_shards}) == 4
