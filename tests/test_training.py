"""The training step: sharded as unsharded, accumulated, BatchNorm per device, numbers gone wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx

from moebius_jax import checkpoints, save_unet
from moebius_jax.data.loader import Loader
from moebius_jax.data.sources import SyntheticSource
from moebius_jax.errors import UserError
from moebius_jax.models import ELatentLPIPS, UNet
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.norms import BatchNorm
from moebius_jax.models.precision import Precision
from moebius_jax.training.encode import latent_batch, to_devices
from moebius_jax.training.networks import load_initial_tensors, load_metric, load_teacher
from moebius_jax.training.program import Program
from moebius_jax.training.sharding import check_batch, make_mesh, tensor_sharding
from moebius_jax.training.step import first_bad_term


def first_batch(config):
    loader = Loader(
        SyntheticSource(config.student.latent_size),
        config.data.loader,
        seed=config.seed,
        global_batch=config.batch_size,
    )
    return next(loader)


def one_step(config, devices, batch=None):
    """New state and figures after a step on a mesh of these devices."""
    mesh = make_mesh(config.fsdp, devices)
    program = Program(
        config,
        mesh,
        teacher=load_teacher(config, mesh, abstract=False),
        metric=load_metric(config, mesh, abstract=False),
    )
    state = program.initial_state()
    places = {name: value.sharding.spec for name, value in state.params.items()}
    arrays = latent_batch(to_devices(batch or first_batch(config), mesh), None)
    state, metrics = program.compile(state)(state, program.frozen, arrays)
    return state, {name: float(value) for name, value in metrics.items()}, places


@pytest.fixture(scope="module")
def alone():
    config = tiny_run.get_config()
    return one_step(config, jax.devices()[:1])


@pytest.mark.parametrize("fsdp", [1, 8, 4], ids=["data 8", "fsdp 8", "data 2 x fsdp 4"])
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


def test_optimizer_state_lies_as_its_parameters():
    config = tiny_run.get_config().replace(fsdp=8)
    mesh = make_mesh(8)
    program = Program(config, mesh, teacher=None, metric=None)
    leaves = jax.tree.leaves(program.abstract_state)
    for leaf in leaves:
        assert leaf.sharding == tensor_sharding(mesh, leaf.shape)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(program.abstract_state)]
    assert any("trace" in n for n in names)
    assert any(".ema" in n for n in names)


def test_accumulation_of_equal_parts_is_one_part():
    """A batch whose two halves are the same, in two parts, gives the step of one half."""
    config = tiny_run.get_config().replace(
        loss=dataclasses.replace(tiny_run.get_config().loss, terms=("task",))
    )
    half = first_batch(config)
    twice = {name: np.repeat(value, 2, axis=0) for name, value in half.items()}
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


def test_a_bad_term_is_named():
    good = {"loss_task": jnp.float32(1), "loss": jnp.float32(2), "gradient_norm": jnp.float32(1)}
    assert first_bad_term(good) is None
    assert (
        first_bad_term({**good, "loss_task": jnp.float32(jnp.nan), "loss": jnp.float32(jnp.nan)})
        == "loss_task"
    )
    assert first_bad_term({**good, "gradient_norm": jnp.float32(jnp.inf)}) == "gradient_norm"


def test_meshes_and_batches_that_do_not_fit():
    with pytest.raises(UserError, match="divisor of the 8 devices"):
        make_mesh(3)
    with pytest.raises(UserError, match="multiple of the 8 devices"):
        check_batch(24, 2, make_mesh(1))


def test_teachers_that_do_not_fit_are_refused():
    config = tiny_run.get_config()
    wrong = config.teacher.replace(channels=(64, 32))
    with pytest.raises(UserError, match="do not fit"):
        load_teacher(config.replace(teacher=wrong), make_mesh(1), abstract=True)


def test_networks_in_folders_are_the_same_networks(tmp_path):
    """Teacher and metric from converted folders, cut over a mesh, predict what the drawn ones do."""
    config = tiny_run.get_config()
    teacher = UNet(config.teacher, rngs=KeyStream(jax.random.key(config.seed + 1)))
    save_unet(tmp_path / "teacher", teacher)
    metric = ELatentLPIPS(config.metric, rngs=KeyStream(jax.random.key(config.seed + 2)))
    checkpoints.save(
        tmp_path / "metric",
        config.metric,
        checkpoints.network_tensors(metric),
        dtype="float32",
        source={},
    )
    mesh = make_mesh(4)
    folders = config.replace(teacher=str(tmp_path / "teacher"), metric=str(tmp_path / "metric"), fsdp=4)
    for load in (load_teacher, load_metric):
        drawn, read = (load(c, mesh, abstract=False) for c in (config, folders))
        assert set(read.tensors) == set(drawn.tensors)
        for name, value in drawn.tensors.items():
            np.testing.assert_allclose(read.tensors[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
            assert read.tensors[name].sharding == tensor_sharding(mesh, value.shape)
    with pytest.raises(UserError, match="is no U-Net"):
        load_teacher(config.replace(teacher=str(tmp_path / "metric")), mesh, abstract=False)


def test_a_start_of_another_architecture_is_refused(tmp_path):
    config = tiny_run.get_config()
    save_unet(tmp_path / "other", UNet(config.student.replace(window=7), rngs=KeyStream(jax.random.key(0))))
    with pytest.raises(UserError, match="differs from the student in window"):
        load_initial_tensors(config.replace(init=str(tmp_path / "other")), make_mesh(1))
