"""Losses, norms, weights and gradients of a distillation step against the release, in both forms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from conftest import TINY_UNET, network_from_synth
from flax import nnx

from moebius_jax import UNetConfig
from moebius_jax.diffusion.denoise import network_input
from moebius_jax.diffusion.noising import Noised, draw_timesteps
from moebius_jax.diffusion.schedule import add_noise
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.gradients import Inputs, balanced_gradients, teacher_bottleneck
from moebius_jax.distillation.imitation import Task
from moebius_jax.distillation.loss import Context, mean_square
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.models import UNet, UNetOutput
from moebius_jax.models.initializers import KeyStream
from moebius_jax.training.config import TrainConfig
from moebius_jax.training.inputs import step_keys
from moebius_jax.weights.names import expected_tensors
from moebius_jax.weights.tensors import Bare, network_tensors, split_tensors

FORMS = ("release", "paper")
GRADIENT = 1e-3  # allowed difference over the largest value, of gradients and whatever is made of them


@pytest.fixture(scope="module")
def vectors():
    return synth.golden("distillation_mini")


@pytest.fixture(scope="module")
def problem(vectors, student_mini, teacher_mini):
    """Everything of the golden step but the form."""
    shape = (2, 4, 32, 32)
    latents, noise, masked = (
        jnp.asarray(synth.nhwc(synth.inputs(f"loss.{n}", shape))) for n in ("latents", "noise", "masked")
    )
    mask = jnp.asarray(synth.nhwc(synth.inputs("loss.mask", (2, 1, 32, 32))) > 0.5, jnp.float32)
    timesteps = jnp.asarray(vectors["timesteps"])
    noisy = add_noise(latents, noise, timesteps)
    inputs = Inputs(
        latents=network_input(noisy, mask, masked),
        timesteps=timesteps,
        input_ids=jnp.tile(jnp.arange(10), (2, 1)),
    )
    student = nnx.clone(student_mini)
    student.train()
    teacher = nnx.jit(lambda net, *arguments: net(*arguments))(
        teacher_mini, inputs.latents, inputs.timesteps, inputs.input_ids
    )
    metric = network_from_synth("elatentlpips_sdxl")
    return SimpleNamespace(
        student=Bare(student),
        tensors=split_tensors(student),
        metric=Bare(metric),
        metric_tensors=network_tensors(metric),
        context=Context(
            noised=Noised(noisy_latents=noisy, noise=noise, timesteps=timesteps),
            hole=mask[..., 0] > 0,
            teacher=teacher,
            bottleneck=teacher.features[teacher_bottleneck(teacher_mini.config)],
        ),
        inputs=inputs,
    )


def balance_options(config, context):
    """What `balanced_gradients` is told of a configuration."""
    bound = [
        {loss.name: lambda x, loss=loss: loss(x, context) for loss in losses}
        for losses in (config.output_losses, config.bottleneck_losses)
    ]
    return {
        "output_losses": bound[0],
        "bottleneck_losses": bound[1],
        "form": config.balance,
        "scales": config.scales,
    }


def run(problem, config, **options):
    """Gradients, statistics and figures of one step; the metric's weights are arguments, not constants."""

    @jax.jit
    def step(params, statistics, metric_tensors):
        context = problem.context.replace(network=problem.metric(metric_tensors))
        return balanced_gradients(
            problem.student,
            params,
            statistics,
            problem.inputs,
            **balance_options(config, context),
            **options,
        )

    return step(*problem.tensors, problem.metric_tensors)


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def step(form, problem):
    config = LossConfig(balance=form, perceptual=Perceptual(augment=False, rescale_inputs=True))
    return run(problem, config, all_norms=form == "paper")  # as many passes more: in one form


@pytest.mark.slow
class TestGoldenStep:
    def test_losses_and_total(self, form, step, vectors):
        losses = step[2].losses
        for term in ("coarse", "fine", "task", "perceptual"):
            assert losses[term] == pytest.approx(vectors[f"loss_{term}"], rel=1e-4), term
        assert losses["total"] == pytest.approx(vectors[f"{form}_total"], rel=GRADIENT)

    def test_seven_norms(self, form, step, vectors):
        norms = step[2].norms
        expected = {f"theta_f/{t}": f"thetaF_{t}" for t in ("task", "fine", "perceptual")}
        expected |= {f"theta_c/{t}": f"thetaC_{t}" for t in ("coarse", "task", "fine", "perceptual")}
        if form == "paper":
            expected["theta_c/output"] = "thetaC_Lout_paper"
        else:  # those that its weights are made of
            del expected["theta_c/fine"], expected["theta_c/perceptual"]
        assert set(norms) == set(expected)
        for ours, theirs in expected.items():
            assert norms[ours] == pytest.approx(vectors[f"gnorm_{theirs}"], rel=GRADIENT), ours

    def test_weights(self, form, step, vectors):
        for name in ("fine", "perceptual", "cross"):
            assert step[2].weights[name] == pytest.approx(vectors[f"{form}_w_{name}"], rel=GRADIENT), name

    def test_gradients(self, form, step, vectors, student_mini):
        slots = expected_tensors(student_mini.config)
        names = [k for k in vectors if k.startswith(f"{form}_grad/")]
        assert len(names) == 4
        for key in names:
            slot = slots[key.removeprefix(f"{form}_grad/")]
            ours = slot.layout.to_torch(np.asarray(step[0][slot.path]))
            assert synth.relative_error(ours, vectors[key]) < GRADIENT, key


WITHOUT_METRIC = ("coarse", "fine", "task")


class SmallProblem:
    """A step of a network that compiles in seconds, without the perceptual term."""

    def __init__(self) -> None:
        student = UNet(TINY_UNET, rngs=KeyStream(jax.random.key(0)))
        self.student, self.tensors = Bare(student), split_tensors(student)
        draw = [jnp.asarray(synth.inputs(f"small.{n}", (2, 8, 8, 13))) for n in ("a", "b")]
        self.inputs = Inputs(
            latents=draw[0][..., :9],
            timesteps=jnp.array([640, 37]),
            input_ids=jnp.tile(jnp.arange(10), (2, 1)),
        )
        self.noise, self.sample = draw[0][..., 9:], draw[1][..., :4]
        self.coarse = jnp.asarray(synth.inputs("small.coarse", (2, 4, 4, 64)))
        self.context = Context(
            noised=Noised(noisy_latents=self.noise, noise=self.noise, timesteps=self.inputs.timesteps),
            hole=jnp.ones((2, 8, 8), bool),
            teacher=UNetOutput(sample=self.sample, features=()),
            bottleneck=self.coarse,
        )

    def step(self, config):
        def step(params, statistics):
            return balanced_gradients(
                self.student, params, statistics, self.inputs, **balance_options(config, self.context)
            )

        return jax.jit(step)

    def plain(self, total):
        """Value and gradient of `total(output)` by autodiff through the whole network."""

        def step(params, statistics):
            def loss(params):
                unet = self.student({**params, **statistics})
                out = unet(self.inputs.latents, self.inputs.timesteps, self.inputs.input_ids)
                return total(out), split_tensors(unet)[1]

            return jax.grad(loss, has_aux=True)(params)

        return jax.jit(step)


@pytest.fixture(scope="module")
def small():
    return SmallProblem()


@pytest.mark.slow
def test_gradients_are_those_of_the_total(small):
    """All of them, not only the four on file: autodiff through the whole network with the weights held."""
    gradients, statistics, balanced = small.step(LossConfig(terms=WITHOUT_METRIC))(*small.tensors)
    weights = {k: float(v) for k, v in balanced.weights.items()}

    def total(out):
        output = mean_square(out.sample, small.noise) + weights["fine"] * mean_square(
            out.sample, small.sample
        )
        return mean_square(out.features[1], small.coarse) + weights["cross"] * output

    expected, expected_statistics = small.plain(total)(*small.tensors)
    assert set(gradients) == set(expected)
    scale = max(float(jnp.abs(g).max()) for g in expected.values())
    for name, theirs in expected.items():
        assert float(jnp.abs(gradients[name] - theirs).max()) < 1e-4 * scale, name
    for name, theirs in expected_statistics.items():
        np.testing.assert_allclose(statistics[name], theirs, rtol=1e-4, atol=1e-6, err_msg=name)
        assert not np.array_equal(theirs, small.tensors[1][name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "balance"), [(("coarse",), "paper"), (("coarse", "fine"), "paper"), (("task",), "release")]
)
def test_subsets_of_the_terms(small, terms, balance):
    config = LossConfig(terms=terms, balance=balance)
    gradients, _, balanced = small.step(config)(*small.tensors)
    output = [loss.name for loss in config.output_losses]
    expected = sum(
        config.scales[t] * balanced.losses[t] * balanced.weights[t] for t in output
    ) * balanced.weights.get("cross", 1.0)
    if "coarse" in terms:
        expected += config.scales["coarse"] * balanced.losses["coarse"]
    assert balanced.losses["total"] == pytest.approx(float(expected), rel=1e-5)
    assert set(balanced.losses) == {*terms, "total"}
    reaches_head = float(jnp.abs(gradients["conv_out.pointwise.kernel"]).max()) > 0
    assert reaches_head == bool(output)
    if terms == ("task",):
        assert balanced.weights == {"task": 1.0}


@pytest.mark.slow
def test_the_cut_costs_no_extra_pass(small):
    """Compiled FLOPs of the balanced step over those of a plain forward and backward pass."""

    def flops(step):
        return step.lower(*small.tensors).compile().cost_analysis()["flops"]

    reference = flops(small.plain(lambda out: mean_square(out.sample, small.noise)))
    assert flops(small.step(LossConfig(terms=WITHOUT_METRIC))) < 1.02 * reference
    # The release's W_C needs the task loss alone at the bottleneck: a second pull through the up half.
    assert flops(small.step(LossConfig(terms=WITHOUT_METRIC, balance="release"))) < 1.32 * reference


def named(name, logged_as="loss_mine"):
    return type("Own", (Task,), {"name": name, "logged_as": logged_as})()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terms": ()}, "expected some of coarse"),
        ({"terms": ("task", "tusk")}, "expected some of coarse"),
        ({"terms": ("task", "task")}, "each once"),
        ({"terms": ("task", named("teacher"))}, "a loss called teacher"),
        ({"terms": ("task", named("mine", "loss_task"))}, "expected different names"),
        ({"balance": "papers"}, "balance is 'papers'; expected 'paper'"),
    ],
)
def test_wrong_loss_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**changes)


def test_a_scale_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"scale is 0\.0; expected more than 0"):
        Perceptual(scale=0.0)


def test_students_without_a_place_for_the_coarse_norm_are_refused():
    with pytest.raises(ValueError, match=r"student\.transformers is .* transformer of the last level"):
        TrainConfig(
            student=UNetConfig.teacher(),
            teacher=UNetConfig.teacher(),
            loss=LossConfig(terms=("coarse", "task")),
        )


def test_timesteps_are_drawn_as_released():
    keys = step_keys(0, jnp.int32(3), jnp.arange(20_000))
    logit = np.asarray(draw_timesteps(keys, "logit_normal"))
    assert logit.min() >= 0
    assert logit.max() < 1000
    expected = 1000 / (1 + np.exp(-np.array([-0.6745, 0.0, 0.6745])))
    np.testing.assert_allclose(np.quantile(logit, [0.25, 0.5, 0.75]), expected, atol=8)
    uniform = np.asarray(draw_timesteps(keys, "uniform"))
    np.testing.assert_allclose(np.quantile(uniform, [0.25, 0.5, 0.75]), [250, 500, 750], atol=15)
    counts = np.unique_counts(np.asarray(draw_timesteps(keys, (999, 499, 999))))
    np.testing.assert_array_equal(counts.values, [499, 999])
    np.testing.assert_allclose(counts.counts / 20_000, [1 / 3, 2 / 3], atol=0.015)


def test_a_samples_draws_do_not_depend_on_its_neighbours():
    step = jnp.int32(7)
    together = draw_timesteps(step_keys(1, step, jnp.arange(8)), "uniform")
    alone = draw_timesteps(step_keys(1, step, jnp.array([5])), "uniform")
    assert together[5] == alone[0]
    later = draw_timesteps(step_keys(1, step + 1, jnp.arange(8)), "uniform")
    assert not np.array_equal(together, later)
