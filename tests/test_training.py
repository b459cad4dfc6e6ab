"""The training step: sharded as unsharded, accumulated, BatchNorm per device, numbers gone wrong."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from conftest import TINY_VAE, network_from_synth, not_as_written
from flax import nnx
from jax.sharding import PartitionSpec
from logged import RELEASED_NAMES

from moebius_jax import save_unet, sharding
from moebius_jax.data.datasets import Source, SyntheticDataset
from moebius_jax.data.samples import LatentSample, PixelSample
from moebius_jax.distillation.config import LossConfig
from moebius_jax.distillation.gradients import Balanced
from moebius_jax.distillation.perceptual import Perceptual
from moebius_jax.errors import UserError
from moebius_jax.inpaint.sampler import SamplingOptions
from moebius_jax.models import VAE, ELatentLPIPS, ELatentLPIPSConfig, UNet
from moebius_jax.models.convolutions import DepthwiseConv
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.precision import Precision
from moebius_jax.sharding import make_mesh, tensor_sharding, tree_shardings, with_mesh
from moebius_jax.training import preview
from moebius_jax.training.batches import (
    abstract_batch,
    check_batch,
    check_encoder,
    encoder_digest,
    to_devices,
)
from moebius_jax.training.halting import HALTED_BY
from moebius_jax.training.inputs import noised_inputs, step_keys
from moebius_jax.training.loading import first_batches
from moebius_jax.training.metrics import balance_metrics, first_bad_metric, with_former_names
from moebius_jax.training.networks import (
    hint_of_range,
    load_frozen,
    load_image_codec,
    load_initial_tensors,
    teacher_dtypes,
)
from moebius_jax.training.optimizer import run_optimizer
from moebius_jax.training.preview import SampleGrids
from moebius_jax.training.state import abstract_state, bare_student, initial_state
from moebius_jax.training.validation import Validation
from moebius_jax.weights.load import save_network
from moebius_jax.weights.tensors import network_tensors
from train import make_update


def first_batch(config):
    dataset = SyntheticDataset(Source(latent_shape=config.student.latent_shape))
    return next(first_batches(config, dataset, seed=config.seed, size=config.batch_size, count=1))


@functools.cache
def drawn(seed, student, optimizer, terms):
    """First state and frozen tensors of the small run, on one device. Drawing takes longer than compiling."""
    config = tiny_run.get_config()
    loss = dataclasses.replace(config.loss, terms=terms)
    config = config.replace(seed=seed, student=student, optimizer=optimizer, loss=loss)
    mesh = make_mesh(jax.devices()[:1])
    frozen = {name: network.tensors for name, network in load_frozen(config, mesh).items()}
    state = initial_state(config, mesh, run_optimizer(optimizer, student, config.steps, mesh))
    return jax.tree.map(np.asarray, (state, frozen))  # a step takes the state's memory over


def first_state(config, mesh):
    """What `drawn` has, where a run on this mesh has it."""
    state, frozen = drawn(config.seed, config.student, config.optimizer, config.loss.terms)
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    networks = load_frozen(config, mesh, abstract=True)
    places = {name: {k: v.sharding for k, v in n.tensors.items()} for name, n in networks.items()}
    state = jax.device_put(state, tree_shardings(mesh, abstract_state(config, mesh, optimizer)))
    return state, jax.device_put(frozen, places), networks, optimizer


def one_step(config, devices, batch=None):
    """New state and figures after a step on a mesh of these devices."""
    mesh = make_mesh(devices, fsdp=config.fsdp)
    state, frozen, networks, optimizer = first_state(config, mesh)
    places = {name: value.sharding.spec for name, value in state.params.items()}
    update = make_update(config, mesh, networks, optimizer)
    update = update.lower(state, frozen, abstract_batch(config, mesh)).compile()
    state, metrics = update(state, frozen, to_devices(batch or first_batch(config), mesh))
    return state, {name: float(value) for name, value in metrics.items()}, places


@pytest.fixture(scope="module")
def alone():
    config = tiny_run.get_config()
    return one_step(config, jax.devices()[:1])


@pytest.mark.slow
def test_a_run_is_born_where_it_lies():
    """Drawn on a mesh, state and frozen networks are those of one device, in the pieces a step expects."""
    config, mesh = tiny_run.get_config().replace(fsdp=4), make_mesh(fsdp=4)
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    networks = load_frozen(config, mesh)
    ours = initial_state(config, mesh, optimizer), {name: n.tensors for name, n in networks.items()}
    theirs = first_state(config, mesh)[:2]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, mine), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.sharding == other.sharding, path
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-7, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fsdp",
    [pytest.param(1, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long), 4],
    ids=["data 8", "fsdp 8", "data 2 x fsdp 4"],
)
def test_sharded_is_unsharded(fsdp, alone):
    """Losses, norms and weights of the global batch, and the parameters after the step."""
    config = tiny_run.get_config().replace(fsdp=fsdp)
    state, metrics, places = one_step(config, jax.devices())
    expected_state, expected, _ = alone
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-4), name
    learning_rate = config.optimizer.learning_rate
    for kind in ("params", "statistics", "ema"):
        for name, theirs in getattr(expected_state, kind).items():
            ours = np.asarray(getattr(state, kind)[name])
            # A step moves a number by about the learning rate; 3 % of that is rounding, sharpened by Adam's
            # division and Newton-Schulz where gradients are next to nothing.
            np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=0.03 * learning_rate, err_msg=name)
    is_cut = {name for name, spec in places.items() if "fsdp" in spec}
    assert bool(is_cut) == (fsdp > 1)
    for name, value in state.params.items():
        assert value.sharding.spec == places[name], "a step moved a tensor"


@pytest.mark.parametrize("remat", [False, True])
def test_weights_in_pieces_are_gathered_where_they_are_read(remat):
    """Inside of what is computed again in the backward pass, so once more there; nothing else reads them."""
    config = tiny_run.get_config()
    config = config.replace(fsdp=8, student=config.student.replace(remat=remat))
    mesh = make_mesh(fsdp=8)
    student = bare_student(config, mesh)
    params, statistics = ({}, {})
    for name, shape in student.shapes.items():
        (statistics if name in student.statistics else params)[name] = shape
    side = config.student.latent_size
    latents = jax.ShapeDtypeStruct((8, side, side, config.student.in_channels), jnp.float32)

    def loss(params, statistics, latents):
        times, ids = jnp.zeros(8, jnp.int32), jnp.zeros((8, 10), jnp.int32)
        return student({**params, **statistics})(latents, times, ids).sample.sum()

    program = jax.make_jaxpr(with_mesh(jax.grad(loss), mesh))(params, statistics, latents)
    inside, outside = [], []

    def walk(jaxpr, into):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                assert equation.params["sharding"].spec == PartitionSpec()
                into.append(equation)
            deeper = inside if equation.primitive.name in ("checkpoint", "remat2", "remat") else into
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                walk(inner, deeper)

    walk(program.jaxpr, outside)
    once = [name for name in params if not re.search(r"resnets\.\d+\.(norm|conv)|attentions\.", name)]
    prepared = [name for name in params if "cross_mixer" in name]  # of the context, or of a timestep
    assert len(inside) + len(outside) >= len(params)
    # Each is gathered there, and its gradient laid out.
    again = 2 * (len(params) - len(once) - len(prepared)) if remat else 0
    assert again <= len(inside) <= 1.2 * again


def test_optimizer_state_lies_as_its_parameters():
    config = tiny_run.get_config().replace(fsdp=8)
    mesh = make_mesh(fsdp=8)
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    state = abstract_state(config, mesh, optimizer)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding == tensor_sharding(mesh, leaf.shape)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("trace" in n for n in names)
    assert any(".ema" in n for n in names)


@pytest.mark.slow
def test_accumulation_of_equal_parts_is_one_part():
    """A batch whose two halves are the same, in two parts, gives the step of one half."""
    config = tiny_run.get_config().replace(
        loss=dataclasses.replace(tiny_run.get_config().loss, terms=("task",))
    )
    half = first_batch(config)
    twice = jax.tree.map(lambda value: np.repeat(value, 2, axis=0), half)
    devices = jax.devices()[:2]
    _, expected, _ = one_step(config, devices, half)
    state, metrics, _ = one_step(config.replace(batch_size=16, accumulation=2), devices, twice)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    assert int(state.step) == 1


def test_batch_norm_per_group_is_the_layer_on_each_part():
    x = jax.random.normal(jax.random.key(0), (6, 4, 4, 8)) * jnp.arange(1, 7)[:, None, None, None]
    grouped = BatchNorm(8, precision=Precision())
    grouped.groups = 3
    y = grouped(x)
    parts, means = [], []
    for part in jnp.split(x, 3):
        layer = BatchNorm(8, precision=Precision())
        parts.append(layer(part))
        means.append((layer.mean[...], layer.var[...]))
    np.testing.assert_allclose(y, jnp.concatenate(parts), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grouped.mean[...], np.mean([m for m, _ in means], 0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grouped.var[...], np.mean([v for _, v in means], 0), rtol=1e-5)
    with pytest.raises(ValueError, match="cannot be cut in 4 equal parts"):
        nnx.clone(grouped).__class__.__call__(_with_groups(grouped, 4), x)


def _with_groups(layer, groups):
    layer.groups = groups
    return layer


@pytest.mark.slow
def test_context_and_latents_of_other_sizes():
    """Eight tokens a category and eight channels, from the batch to the parameters after the step."""
    config = tiny_run.get_config()
    sizes = {"context_length": 8, "vocab_size": 16, "in_channels": 17, "out_channels": 8}
    loss = dataclasses.replace(config.loss, terms=("coarse", "fine", "task"))
    config = config.replace(
        student=config.student.replace(**sizes), teacher=config.teacher.replace(**sizes), loss=loss
    )
    mesh = make_mesh(jax.devices()[:1])
    networks = load_frozen(config, mesh, abstract=True)
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    state = abstract_state(config, mesh, optimizer)
    frozen = {name: network.tensors for name, network in networks.items()}
    after, _ = jax.eval_shape(
        make_update(config, mesh, networks, optimizer), state, frozen, abstract_batch(config, mesh)
    )
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    batch = first_batch(config)
    batch = batch._replace(samples=batch.samples._replace(task=np.arange(len(batch.index)) % 2))
    keys = step_keys(0, jnp.int32(0), jnp.asarray(batch.index))
    _, inputs = noised_inputs(config, keys, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_array_equal(inputs.input_ids[:2], [range(8), range(8, 16)])
    assert inputs.latents.shape[1:] == (8, 8, 17)


def test_a_gpus_teacher_is_in_float16():
    config = tiny_run.get_config()

    def dtypes(platform, **changes):
        student = config.student.replace(platform=platform)
        return tuple(map(str, teacher_dtypes(config.replace(student=student, **changes)).values()))

    assert dtypes("gpu", dtype="bfloat16") == ("float16", "float16")
    assert dtypes("tpu", dtype="bfloat16") == ("bfloat16", "float32")
    assert dtypes("gpu", dtype="float32") == ("float32", "float32")
    assert dtypes("gpu", dtype="bfloat16", teacher_dtype="bfloat16") == ("bfloat16", "bfloat16")

    half = config.replace(dtype="bfloat16", teacher_dtype="float16")
    teacher = load_frozen(half, make_mesh(jax.devices()[:1]), abstract=True)["teacher"]
    blank = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in teacher.bare.shapes.items()}
    assert teacher.bare(blank).precision.dtype == jnp.float16
    assert "try teacher_dtype=bfloat16" in hint_of_range(half)
    assert hint_of_range(config) == ""


def test_networks_and_encoders_of_different_channels_are_refused():
    config = tiny_run.get_config()
    vae = VAE(dataclasses.replace(TINY_VAE, latent_channels=8), rngs=nnx.Rngs(0))
    pictures = SimpleNamespace(blank=PixelSample.blank(64))
    with pytest.raises(UserError, match="latents have 4 channels, the VAE's 8"):
        check_encoder(config, vae, pictures)
    with pytest.raises(UserError, match="pictures of side 32; expected 64"):
        check_encoder(config, vae, SimpleNamespace(blank=PixelSample.blank(32)))
    with pytest.raises(UserError, match="pass vae=FOLDER"):
        check_encoder(config, None, pictures)


def test_cached_latents_of_another_encoder_are_refused():
    config = tiny_run.get_config()
    vae = network_from_synth("vae_mini")
    blank = LatentSample.blank(config.student.latent_shape)
    assert encoder_digest(vae) == "45fcf5cfc9f90a93"
    check_encoder(config, vae, SimpleNamespace(blank=blank, encoder=encoder_digest(vae)))
    check_encoder(config, None, SimpleNamespace(blank=blank, encoder="another"))
    with pytest.raises(UserError, match="latents of another encoder"):
        check_encoder(config, vae, SimpleNamespace(blank=blank, encoder="another"))


def test_batches_are_compiled_for_what_the_data_hold():
    config, mesh = tiny_run.get_config(), make_mesh(jax.devices()[:1])
    for dtype in (np.float16, np.float32):
        data = SimpleNamespace(blank=LatentSample.blank(config.student.latent_shape, dtype))
        assert abstract_batch(config, mesh, data).samples.moments.dtype == dtype


@pytest.mark.slow
def test_validation_is_the_task_loss_of_the_same_noise():
    """Of a network in evaluation mode, and the same figure for the same tensors."""
    config = tiny_run.get_config()
    config = config.replace(
        log=dataclasses.replace(config.log, validation_samples=16),
        student=config.student.replace(prediction_type="v_prediction"),
    )
    mesh = make_mesh(jax.devices()[:1])
    dataset = SyntheticDataset(Source(latent_shape=config.student.latent_shape))
    network = UNet(config.student, rngs=KeyStream(jax.random.key(7)))
    tensors = network_tensors(network)
    measure = Validation(config, mesh, bare_student(config, mesh), None, dataset)
    found = measure(tensors)
    assert measure(tensors) == found
    network.eval()
    losses = []
    batches = first_batches(config, dataset, seed=config.seed + 1, size=8, count=2)
    for number, batch in enumerate(jax.tree.map(jnp.asarray, each) for each in batches):
        keys = step_keys(config.seed, jnp.int32(number), batch.index)
        noised, inputs = noised_inputs(config, keys, batch)
        predicted = network(inputs.latents, inputs.timesteps, inputs.input_ids).sample
        losses.append(jnp.mean((predicted - noised.target) ** 2, axis=(1, 2, 3)))
    assert found == {"validation_loss_task": pytest.approx(float(jnp.concatenate(losses).mean()), rel=1e-4)}


@pytest.mark.slow
def test_grids_are_sampled_as_the_model_is_to_be(monkeypatch):
    """In its own steps from pure noise; and holes of any byte are holes."""
    config = tiny_run.get_config()
    sampling = SamplingOptions(num_inference_steps=2, strength=1.0, scheduler="ddim_trailing")
    config = config.replace(sampling=sampling, log=dataclasses.replace(config.log, grid_images=2))
    mesh = make_mesh(jax.devices()[:1])
    dataset = SyntheticDataset(Source(latent_shape=config.student.latent_shape))
    tensors = network_tensors(UNet(config.student, rngs=KeyStream(jax.random.key(7))))
    vae = VAE(TINY_VAE, rngs=KeyStream(jax.random.key(8)))

    def drawn():
        grids = SampleGrids(config, mesh, bare_student(config, mesh), vae, dataset)
        np.testing.assert_array_equal(grids._steps.timesteps, [999, 499])
        return np.asarray(grids.draw(tensors))

    picture, first = drawn(), preview._first

    def bitmaps(*arguments):
        batch = first(*arguments)
        hole = (np.asarray(batch.samples.hole) * np.uint8(255)).view(bool)  # True as PIL has it
        return batch._replace(samples=batch.samples._replace(hole=hole))

    monkeypatch.setattr(preview, "_first", bitmaps)
    np.testing.assert_array_equal(drawn(), picture)


@pytest.mark.long
def test_balance_of_each_device_is_that_of_its_own_samples():
    """Two devices against two runs of one device with half the batch each: everything is the mean."""
    config = tiny_run.get_config()
    config = config.replace(
        batch_norm="device",
        loss=dataclasses.replace(config.loss, balance="release", balance_over="device", all_norms=True),
        optimizer=dataclasses.replace(config.optimizer, clip_norm=None),
    )
    whole = first_batch(config)
    halves = [jax.tree.map(lambda x, part=part: x[part], whole) for part in (slice(4), slice(4, None))]
    together = one_step(config, jax.devices()[:2], whole)
    alone = [one_step(config.replace(batch_size=4), jax.devices()[:1], half) for half in halves]

    def sums(state):
        """What the first step's gradients have become of themselves: momenta; and statistics."""
        leaves = jax.tree_util.tree_leaves_with_path((state.optimizer, state.statistics))
        names = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
        return {k: v for k, v in names.items() if ".trace" in k or ".mu" in k or k.startswith("[1]")}

    ours, theirs = sums(together[0]), [sums(state) for state, *_ in alone]
    assert len(ours) > 100
    for name, value in ours.items():
        expected = (theirs[0][name] + theirs[1][name]) / 2
        assert np.linalg.norm(value - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-6, name
    for name, value in together[1].items():
        if name not in ("grad_norm", "parameter_norm"):  # of the mean gradient and what it made
            assert value == pytest.approx((alone[0][1][name] + alone[1][1][name]) / 2, rel=1e-4), name
    weights = [metrics["out_weight_outkd"] for _, metrics, _ in alone]
    assert abs(weights[0] - weights[1]) > 1e-3 * weights[0], "else it would not matter"


@pytest.mark.slow
def test_a_step_with_a_stand_in_changes_nothing_and_says_whose_it_is():
    config = tiny_run.get_config()
    batch = first_batch(config)
    number = batch.index.copy()
    number[5:] = -1 - 2  # the third process's
    before, *_ = one_step(config, jax.devices()[:1])
    mesh = make_mesh(jax.devices()[:1])
    _, frozen, networks, optimizer = first_state(config, mesh)
    update = make_update(config, mesh, networks, optimizer)
    kept = jax.tree.map(np.asarray, before)
    after, metrics = update(before, frozen, to_devices(batch._replace(index=number), mesh))
    assert metrics[HALTED_BY] == 3
    assert int(after.step) == int(kept.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), kept)
    after, metrics = update(after, frozen, to_devices(batch, mesh))
    assert metrics[HALTED_BY] == 0
    assert int(after.step) == 2
    changed = jax.tree.map(lambda x, y: bool((np.asarray(x) != y).any()), after.params, kept.params)
    assert sum(changed.values()) > 0.9 * len(changed)


def test_every_figure_of_the_releases_trainer_is_logged_by_its_name():
    """With `all_norms`; of ours are the anchor's weight, and the norm of all output losses together."""
    config = LossConfig(perceptual=Perceptual(network=ELatentLPIPSConfig()))
    losses = [loss.name for loss in config.losses]
    at_output = [loss.name for loss in config.output_losses]
    balanced = Balanced(
        losses=dict.fromkeys([*losses, "total"], jnp.float32(0)),
        weights=dict.fromkeys([*at_output, "cross"], jnp.float32(0)),
        norms={f"theta_f/{n}": jnp.float32(0) for n in at_output}
        | {f"theta_c/{n}": jnp.float32(0) for n in losses},
    )
    names = set(balance_metrics(balanced, config.losses)) | {"grad_norm", "lr"}
    assert names == RELEASED_NAMES | {"out_weight_task"}


def test_former_names_are_logged_as_well():
    now = {"grad_norm": 1.0, "lr": 2.0, "feat_weight_task": 3.0, "out_weight_outkd": 4.0, "loss": 5.0}
    norms = {"out_gnorm_task": 6.0, "feat_gnorm_featkd": 7.0}
    assert with_former_names(now | norms) == now | norms | {
        "gradient_norm": 1.0,
        "learning_rate": 2.0,
        "weight_cross": 3.0,
        "weight_outkd": 4.0,
        "grad_norm_theta_f_task": 6.0,
        "grad_norm_theta_c_featkd": 7.0,
    }


def test_a_bad_term_is_named():
    good = {"loss_task": jnp.float32(1), "loss": jnp.float32(2), "grad_norm": jnp.float32(1)}
    assert first_bad_metric(good) is None
    assert (
        first_bad_metric({**good, "loss_task": jnp.float32(jnp.nan), "loss": jnp.float32(jnp.nan)})
        == "loss_task"
    )
    assert first_bad_metric({**good, "grad_norm": jnp.float32(jnp.inf)}) == "grad_norm"


def test_slices_lie_behind_each_other_on_the_data_axis(monkeypatch):
    """Eight devices that say they are of two slices, in an order that mixes them."""

    class Device:
        def __init__(self, i):
            self.id, self.slice_index, self.process_index = i, i % 2, i % 2
            self.platform = self.device_kind = "cpu"

    seen = {}
    monkeypatch.setattr(sharding, "Mesh", lambda grid, **axes: seen.update(axes, grid=grid))
    make_mesh([Device(i) for i in range(8)], fsdp=2)
    assert seen["axis_names"] == ("data", "fsdp")
    slices = np.vectorize(lambda device: device.slice_index)(seen["grid"])
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    assert len({device.id for device in seen["grid"].flat}) == 8
    with pytest.raises(UserError, match="fsdp is 8; expected a divisor of the 4 devices of each of 2 slices"):
        make_mesh([Device(i) for i in range(8)], fsdp=8)


def test_meshes_and_batches_that_do_not_fit():
    with pytest.raises(UserError, match="divisor of the 8 devices"):
        make_mesh(fsdp=3)
    config = tiny_run.get_config()
    with pytest.raises(UserError, match=r"is 12; expected a multiple of the 8 devices: batch_size 16 or 32"):
        check_batch(config.replace(batch_size=24, accumulation=2), make_mesh())
    with pytest.raises(UserError, match=r"is 6; expected a multiple of the 8 devices: batch_size 8"):
        check_batch(config.replace(batch_size=6), make_mesh())


def test_teachers_that_do_not_fit_are_refused():
    config = tiny_run.get_config()
    wrong = config.teacher.replace(channels=(64, 32))
    with pytest.raises(UserError, match="do not fit"):
        load_frozen(config.replace(teacher=wrong), make_mesh(), abstract=True)


def test_a_teacher_of_another_size_teaches_if_its_mixers_allow():
    """Attention and GLA take latents of any size; Interactive-λ has a table of positions."""
    config, mesh = tiny_run.get_config(), make_mesh()
    larger = config.teacher.replace(latent_size=64)
    assert load_frozen(config.replace(teacher=larger), mesh, abstract=True)["teacher"]
    bound = larger.replace(cross_mixer="interactive_lambda")
    with pytest.raises(UserError, match="do not fit: the student's last down level gives 8 x 8"):
        load_frozen(config.replace(teacher=bound), mesh, abstract=True)


@pytest.mark.slow
def test_networks_in_folders_are_the_same_networks(tmp_path):
    """Teacher and metric from converted folders, cut over a mesh, predict what the drawn ones do."""
    config = tiny_run.get_config()
    teacher = UNet(config.teacher, rngs=KeyStream(jax.random.key(config.seed + 1)))
    save_unet(tmp_path / "teacher", teacher)
    perceptual = config.loss.perceptual
    metric = ELatentLPIPS(perceptual.network, rngs=KeyStream(jax.random.key(config.seed + 2)))
    save_network(tmp_path / "metric", metric)
    mesh = make_mesh(fsdp=4)
    loss = dataclasses.replace(
        config.loss, perceptual=dataclasses.replace(perceptual, network=str(tmp_path / "metric"))
    )
    folders = config.replace(teacher=str(tmp_path / "teacher"), loss=loss, fsdp=4)
    drawn, read = (load_frozen(c, mesh) for c in (config, folders))
    assert set(drawn) == set(read) == {"teacher", "perceptual"}
    for name in drawn:
        assert set(read[name].tensors) == set(drawn[name].tensors)
        for tensor, value in drawn[name].tensors.items():
            ours = read[name].tensors[tensor]
            np.testing.assert_allclose(ours, value, rtol=1e-6, atol=1e-7, err_msg=tensor)
            assert ours.sharding == tensor_sharding(mesh, value.shape)
    with pytest.raises(UserError, match="is no U-Net"):
        load_frozen(config.replace(teacher=str(tmp_path / "metric")), mesh)
    for name in ("metric", "teacher"):
        not_as_written(tmp_path / name / "config.json")
        with pytest.raises(UserError, match=f"{name}/config.json: not what was written"):
            load_frozen(folders, mesh)
    assert load_frozen(folders.replace(verify=False), mesh)
    save_network(tmp_path / "vae", load_image_codec(config, mesh))
    not_as_written(tmp_path / "vae/config.json")
    with pytest.raises(UserError, match=r"vae/config\.json: not what was written"):
        load_image_codec(config.replace(vae=str(tmp_path / "vae")), mesh)
    assert load_image_codec(config.replace(vae=str(tmp_path / "vae"), verify=False), mesh)


def test_a_start_of_another_architecture_is_refused(tmp_path):
    config = tiny_run.get_config()
    save_unet(tmp_path / "other", UNet(config.student.replace(window=7), rngs=KeyStream(jax.random.key(0))))
    with pytest.raises(UserError, match="differs from the student in window"):
        load_initial_tensors(config.replace(init=str(tmp_path / "other")), make_mesh())


def test_programs_are_traced_with_their_mesh(meshes_of):
    """Else kernels in them would have the whole batch on every device."""
    seen = meshes_of(DepthwiseConv)
    config = tiny_run.get_config()
    config = config.replace(
        loss=dataclasses.replace(config.loss, terms=("task",)),
        log=dataclasses.replace(config.log, validation_samples=8, grid_images=2),
    )
    mesh = make_mesh()
    dataset = SyntheticDataset(Source(latent_shape=config.student.latent_shape))
    student, vae = bare_student(config, mesh), VAE(TINY_VAE, rngs=KeyStream(jax.random.key(8)))
    optimizer = run_optimizer(config.optimizer, config.student, config.steps, mesh)
    state, batch = abstract_state(config, mesh, optimizer), abstract_batch(config, mesh)
    update = make_update(config, mesh, load_frozen(config, mesh, abstract=True), optimizer)
    validation, grids = (kind(config, mesh, student, vae, dataset) for kind in (Validation, SampleGrids))
    weights = {**state.params, **state.statistics}
    for program, arguments in (
        (update, (state, {}, batch)),
        (validation._task_loss, (weights, validation._batches[0], jnp.int32(0))),
        (grids._inpaint, (weights, grids._batch, grids._steps)),
    ):
        seen.clear()
        program.trace(*arguments)
        assert seen == {8}
