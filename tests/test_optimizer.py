"""Muon, AdamW, schedules and the moving average against the release's own figures."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import synth

from moebius_jax import UNetConfig
from moebius_jax.models import released
from moebius_jax.models.mixers.interactive_lambda import POSITION_TABLE
from moebius_jax.models.mixers.local_lambda import POSITION_CONV
from moebius_jax.sharding import batch_sharding, make_mesh
from moebius_jax.training.muon import _shared, newton_schulz
from moebius_jax.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    ema_update,
    learning_rate_schedule,
)
from moebius_jax.weights.names import Counterpart, counterparts, expected_tensors

# Golden name → ours, and how it lies in torch.
TENSORS = {
    "linear": ("a.kernel", released.LINEAR),
    "tall": ("b.kernel", released.LINEAR),
    "conv1x1": ("c.kernel", released.POINTWISE),
    "depthwise": ("d.depthwise.kernel", released.DEPTHWISE),
    "conv3x3": ("e.kernel", released.CONV),
    "pos_conv": ("f.position.kernel", POSITION_CONV),
    "rel_pos_emb": ("g.position_table", POSITION_TABLE),
    "bias": ("h.bias", released.SAME),
    "conv_in.w": ("conv_in.kernel", released.POINTWISE),
}
NOT_MUON = ("bias", "conv_in.w")


def golden_run(vectors, dtype, spread=None):
    """Our parameters before, and after each of three steps."""
    config = OptimizerConfig(schedule="constant", clip_norm=None, newton_schulz_dtype=dtype)
    table = {
        ours: Counterpart(names=(name,), layout=layout, muon=name not in NOT_MUON)
        for name, (ours, layout) in TENSORS.items()
    }
    optimizer = build_optimizer(config, 3, table, spread)

    def draw(prefix):
        return {
            ours: jnp.asarray(layout.to_jax(synth.inputs(f"{prefix}.{name}", vectors[f"step0/{name}"].shape)))
            for name, (ours, layout) in TENSORS.items()
        }

    params = draw("muon.p")
    state = optimizer.init(params)
    history = [params]
    step = jax.jit(optimizer.update)
    for i in range(3):
        updates, state = step(draw(f"muon.g{i}"), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


@pytest.mark.parametrize(
    ("file", "dtype", "tolerance"), [("muon_fp32", "float32", 1e-4), ("muon", "bfloat16", 5e-2)]
)
@pytest.mark.parametrize("spread", [False, True])
def test_three_steps_of_the_release(file, dtype, tolerance, spread):
    vectors = synth.golden(file)
    mesh = make_mesh(jax.local_devices())
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")) if spread else None
    history = golden_run(vectors, dtype, sharding)
    for name, (ours, layout) in TENSORS.items():
        before = layout.to_torch(np.asarray(history[0][ours]))
        theirs_before = synth.inputs(f"muon.p.{name}", before.shape)
        for i in range(3):
            after = layout.to_torch(np.asarray(history[i + 1][ours]))
            theirs = vectors[f"step{i}/{name}"]
            difference = np.linalg.norm((after - before) - (theirs - theirs_before))
            allowed = 1e-3 if name in NOT_MUON else tolerance
            # Parameters near 1 move by 4e-5 a step: their own rounding (the release decays, rounds, then
            # moves; optax rounds once) is part of what is compared.
            rounding = np.linalg.norm(np.spacing(np.abs(theirs)))
            assert difference < allowed * np.linalg.norm(theirs - theirs_before) + rounding, (name, i)
            before, theirs_before = after, theirs


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_eps_is_added_where_the_release_adds_it(name):
    """Gradients of 1e-9, where eps = 1e-8 decides: the release's rule beside Muon, PyTorch's without it."""
    config = OptimizerConfig(name=name, schedule="constant", clip_norm=None, weight_decay=0.0)
    table = {"bias": Counterpart(names=("bias",), layout=released.SAME, muon=False)}
    optimizer = build_optimizer(config, 3, table)
    params = {"bias": jnp.zeros(4)}
    state = optimizer.init(params)
    m = v = np.zeros(4)
    for t in range(1, 4):
        gradient = 1e-9 * synth.inputs(f"eps.{t}", (4,)).astype(float)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        unbiased = 1 - 0.95**t
        eps = 1e-8 / (np.sqrt(unbiased) if name == "muon" else 1)
        expected = -2e-4 * (m / (1 - 0.9**t)) / (np.sqrt(v / unbiased) + eps)
        updates, state = optimizer.update({"bias": jnp.float32(gradient)}, state, params)
        np.testing.assert_allclose(updates["bias"], expected, rtol=1e-4)


def test_newton_schulz_makes_singular_values_one():
    x = synth.inputs("ns", (3, 20, 50))
    values = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(x), jnp.float32)), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize(
    ("count", "exchanged"),
    [
        (2, "f32[2,4,6] all-reduce"),
        (3, "f32[3,4,6] all-reduce"),
        (4, "f32[8,4,6] all-gather"),
        (7, "f32[8,4,6] all-gather"),
    ],
)
def test_few_matrices_on_many_devices_are_not_gathered_with_zeros(count, exchanged):
    """Eight devices: where most have nothing to do, what there is is exchanged alone."""
    stack = jax.random.normal(jax.random.key(0), (count, 4, 6))
    spread = batch_sharding(make_mesh())
    shared = jax.jit(lambda x: _shared(x, jnp.float32, spread)).lower(stack).compile()
    found = re.findall(r"= (\w+\[[\d,]*\])\S* (all-reduce|all-gather)\(", shared.as_text())
    assert [" ".join(one) for one in found] == [exchanged]
    np.testing.assert_allclose(shared(stack), newton_schulz(stack, jnp.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [UNetConfig.student(), UNetConfig.ablation(1)])
def test_muon_takes_the_releases_parameters(config):
    """The release's rule on its own names and ranks, ours on ours."""
    table = counterparts(config)
    for name, slot in expected_tensors(config).items():
        excluded = any(part in name for part in ("embedding_layer", "conv_in", "conv_out"))
        assert table[slot.path].muon == (len(slot.shape) >= 2 and not excluded), name


def test_ema():
    vectors = synth.golden("ema")
    draw = [jnp.asarray(synth.inputs(f"ema.{i}", (2, 3))) for i in range(5)]
    average = {"x": draw[0]}
    for n in range(1, 5):
        average = ema_update(average, {"x": draw[n]}, jnp.int32(n), 0.9999)
        np.testing.assert_allclose(average["x"], vectors[f"after_{n}"], rtol=1e-6, atol=1e-7)


def test_schedules():
    paper = learning_rate_schedule(OptimizerConfig(), 138_000)
    assert [float(paper(s)) for s in (0, 110_999, 111_001, 128_999, 129_001)] == pytest.approx(
        [2e-4, 2e-4, 2e-5, 2e-5, 2e-6]
    )
    cosine = learning_rate_schedule(
        OptimizerConfig(schedule="cosine", warmup_steps=10, learning_rate=1.0), 110
    )
    assert [float(cosine(s)) for s in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
    # A warm-up does not move the steps at which it falls.
    step = learning_rate_schedule(OptimizerConfig(warmup_steps=10, learning_rate=1.0, decay_at=(0.5,)), 100)
    assert [float(step(s)) for s in (5, 10, 49, 51)] == pytest.approx([0.5, 1, 1, 0.1])
    assert float(learning_rate_schedule(OptimizerConfig(schedule="constant"), 10)(9)) == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "name is 'sgd'"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"decay_at": (0.9, 0.5)}, "decay_at"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_wrong_optimizers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)
