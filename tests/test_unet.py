"""Whole networks against the release (parity pyramid, second floor), and what must not change them."""

import gc
import os
import subprocess
import sys
import types
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from conftest import TINY_UNET, network_from_synth
from flax import nnx
from jax import lax

from moebius_jax import UNet, fold_batch_norm
from moebius_jax.errors import UserError
from moebius_jax.models import forms, inference_copy
from moebius_jax.models.blocks import Upsample
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.mixers.interactive_lambda import InteractiveLambda
from moebius_jax.models.parts import PositionOrder
from moebius_jax.models.precision import Precision, auto_dtype
from moebius_jax.weights.tensors import abstract_network, fill, network_tensors

TOLERANCE = 1e-4


def jitted(network):
    graphdef, state = nnx.split(network)
    call = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    return lambda *args: call(state, *args)


def arguments(name, shape, vectors):
    return (
        jnp.asarray(synth.nhwc(synth.inputs(name, shape))),
        jnp.asarray(vectors["timesteps"]),
        jnp.asarray(vectors["input_ids"]),
    )


def mini_arguments():
    return arguments("student_mini.x", (2, 9, 32, 32), synth.golden("teacher_mini_eval"))


def test_student_mini(student_mini):
    vectors = {k.removeprefix("eval/"): v for k, v in synth.golden("student_mini_eval").items()}
    out = jitted(student_mini)(*arguments("student_mini.x", (2, 9, 32, 32), vectors))
    assert synth.relative_error(out.sample, synth.nhwc(vectors["sample"])) < TOLERANCE
    assert len(out.features) == 6
    for i, feature in enumerate(out.features):
        assert synth.relative_error(feature, synth.nhwc(vectors[f"block{i}"])) < TOLERANCE


@pytest.mark.parametrize(
    ("platform", "stream"), [("gpu", jnp.bfloat16), ("gpu", jnp.float32), ("tpu", jnp.bfloat16)]
)
def test_an_accelerators_forms_in_half_precision(platform, stream, monkeypatch):
    """Interpreted, no further from fp32 than the plain forms."""
    monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
    # Interactive-λ's kernel for TPUs wants eight heads, and registers full of positions.
    heads, side = (4, 8) if platform == "gpu" else (8, 32)
    latents = jnp.asarray(synth.inputs("x", (1, side, side, 9)))

    def noise(platform, **dtypes):
        sizes = {"transformers": (False, True), "num_heads": heads, "latent_size": side}
        unet = UNet(
            TINY_UNET.replace(platform=platform, **sizes), rngs=KeyStream(jax.random.key(0)), **dtypes
        )
        unet.eval()
        unet = inference_copy(unet)
        packed = {
            m.packed_queries is not None
            for _, m in nnx.iter_modules(unet)
            if isinstance(m, InteractiveLambda)
        }
        assert packed == {platform == "tpu"}
        return np.asarray(jitted(unet)(latents, jnp.array([7]), jnp.arange(10)[None]).sample)

    exact, half = noise("cpu"), {"dtype": jnp.bfloat16, "stream_dtype": stream}
    plain, fused = (np.linalg.norm(noise(name, **half) - exact) for name in ("cpu", platform))
    assert 0 < fused < 1.3 * plain


@pytest.mark.long
def test_student_mini_in_a_gpus_forms(monkeypatch):
    """As a GPU samples, but in fp32 and with interpreted kernels."""
    monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
    for choice in ("fused_products", "fused_group_norm", "fused_interactive_lambda"):  # in fp32 too
        monkeypatch.setattr(forms, choice, lambda *_: True)
    vectors = {k.removeprefix("eval/"): v for k, v in synth.golden("student_mini_eval").items()}
    network = network_from_synth("student_mini", execution={"platform": "gpu", "position_order": "fused"})
    first = [a[:1] for a in arguments("student_mini.x", (2, 9, 32, 32), vectors)]
    out = jitted(inference_copy(network))(*first)
    assert synth.relative_error(out.sample, synth.nhwc(vectors["sample"][:1])) < TOLERANCE


def test_teacher_mini(teacher_mini):
    vectors = synth.golden("teacher_mini_eval")
    out = jitted(teacher_mini)(*mini_arguments())
    assert synth.relative_error(out.sample, synth.nhwc(vectors["sample"])) < TOLERANCE
    assert len(out.features) == 9
    for i, feature in enumerate(out.features):
        assert synth.relative_error(feature, synth.nhwc(vectors[f"block{i}"])) < TOLERANCE


def check_full(out, vectors):
    assert synth.relative_error(out.sample, synth.nhwc(vectors["sample"])) < TOLERANCE
    for i, feature in enumerate(out.features):
        tap = np.asarray(feature, np.float64)
        assert synth.relative_error(tap.mean((1, 2)), vectors[f"block{i}_mean"]) < TOLERANCE
        assert synth.relative_error(tap[:, :4, :4, :16], synth.nhwc(vectors[f"block{i}_corner"])) < TOLERANCE
        if f"block{i}_std" in vectors:
            std = tap.std((1, 2), ddof=1)
            assert synth.relative_error(std, vectors[f"block{i}_std"]) < TOLERANCE


@pytest.mark.slow
def test_student_full_in_fp32_and_bf16():
    vectors = synth.golden("student_full")
    args = arguments("student_full.x", (2, 9, 64, 64), vectors)
    network = network_from_synth("student")
    out = jitted(network)(*args)
    check_full(out, vectors)
    half = network_from_synth("student", dtype=jnp.bfloat16)
    expected = out.sample[:1]
    for variant in (half, inference_copy(half)):
        noise = np.asarray(jitted(variant)(*(a[:1] for a in args)).sample)
        assert noise.dtype == np.float32
        assert np.linalg.norm(noise - expected) / np.linalg.norm(expected) <= 0.02


@pytest.mark.long
def test_teacher_full():
    gc.collect()  # 3.4 GB of weights
    vectors = synth.golden("teacher_full")
    out = jitted(network_from_synth("teacher"))(
        *arguments(str(vectors["input_name"]), (1, 9, 64, 64), vectors)
    )
    check_full(out, vectors)


@pytest.fixture(scope="module")
def step():
    """One training step of the small student: loss, output, running statistics, gradients."""
    network = network_from_synth("student_mini")
    network.train()
    vectors = synth.golden("student_mini_train")
    noise = jnp.asarray(synth.nhwc(synth.inputs("student_mini.noise", (2, 4, 32, 32))))
    graphdef, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)
    evaluation = {k.removeprefix("eval/"): v for k, v in synth.golden("student_mini_eval").items()}
    args = arguments("student_mini.x", (2, 9, 32, 32), evaluation)

    def loss(params, statistics):
        # Merging takes over the variables it is given; a copy keeps the caller's out of the trace.
        network = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, statistics))
        out = network(*args)
        return jnp.mean(jnp.square(out.sample - noise)), (out, nnx.state(network, nnx.BatchStat))

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (out, statistics)), gradients = step(params, statistics)
    return vectors, value, out, statistics, gradients


@pytest.mark.slow
class TestTraining:
    """The small student in training mode: batch statistics, gradients, running statistics."""

    def slots(self):
        from moebius_jax.weights.names import expected_tensors

        return expected_tensors(network_from_synth("student_mini").config)

    def released(self, state, name, slots):
        flat = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(state)}
        return slots[name].layout.to_torch(np.asarray(flat[slots[name].path]))

    def test_forward(self, step):
        vectors, value, out, *_ = step
        assert abs(value / vectors["loss"] - 1) < TOLERANCE
        assert synth.relative_error(out.sample, synth.nhwc(vectors["sample"])) < TOLERANCE
        for i, feature in enumerate(out.features):
            assert synth.relative_error(feature, synth.nhwc(vectors[f"block{i}"])) < TOLERANCE

    def test_gradients(self, step):
        vectors, *_, gradients = step
        slots = self.slots()
        names = [key for key in vectors if key.startswith("grad/")]
        assert len(names) == 13
        for key in names:
            ours = self.released(gradients, key.removeprefix("grad/"), slots)
            assert synth.relative_error(ours, vectors[key]) < 1e-3, key
        norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradients)))
        assert abs(norm / vectors["grad_global_norm"] - 1) < 1e-3

    def test_running_statistics(self, step):
        vectors, _, _, statistics, _ = step
        slots = self.slots()
        names = [key for key in vectors if key.startswith("buffer_after/")]
        assert names
        for key in names:
            ours = self.released(statistics, key.removeprefix("buffer_after/"), slots)
            assert synth.relative_error(ours, vectors[key]) < TOLERANCE, key


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    """Neither gradients nor the running statistics a step leaves behind."""
    latents = jnp.asarray(synth.inputs("x", (2, 8, 8, 9)))
    one_level = TINY_UNET.replace(channels=(32,), transformers=(True,), layers_per_block=1)

    def results(remat):
        network = UNet(one_level.replace(remat=remat), rngs=KeyStream(jax.random.key(0)))
        graphdef, params, statistics = nnx.split(network, nnx.Param, nnx.BatchStat)

        def loss(params, statistics):
            network = nnx.merge(graphdef, params, jax.tree.map(lambda x: x, statistics))
            out = network(latents, jnp.array([900, 37]), jnp.tile(jnp.arange(10), (2, 1)))
            return jnp.mean(jnp.square(out.sample)), nnx.state(network, nnx.BatchStat)

        step = jax.jit(jax.grad(loss, has_aux=True))
        return step(params, statistics), step.lower(params, statistics).as_text()

    (stored, stored_program), (remat, remat_program) = results(False), results(True)
    assert remat_program.count("stablehlo.exponential") > stored_program.count("stablehlo.exponential")
    for ours, reference in zip(jax.tree.leaves(remat), jax.tree.leaves(stored), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_position_order_can_be_forced(student_mini):
    vectors, programs = synth.golden("student_mini_eval"), set()
    orders = set(get_args(PositionOrder)) - {"auto"}
    for order in orders:
        network = abstract_network(student_mini.config.replace(position_order=order))
        network = fill(network, network_tensors(student_mini))
        network.eval()
        graphdef, state = nnx.split(network)
        program = jax.jit(lambda s, *a, graphdef=graphdef: nnx.merge(graphdef, s)(*a).sample)
        programs.add(program.lower(state, *mini_arguments()).as_text())
        noise = program(state, *mini_arguments())
        assert synth.relative_error(noise, synth.nhwc(vectors["eval/sample"])) < TOLERANCE
    assert len(programs) == len(orders)


@pytest.mark.slow
def test_folded_network_is_the_same_function(student_mini):
    folded = fold_batch_norm(student_mini)
    reference = jitted(student_mini)(*mini_arguments()).sample
    assert synth.relative_error(jitted(folded)(*mini_arguments()).sample, np.asarray(reference)) < 1e-5
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    assert jax.tree.leaves(nnx.state(student_mini, nnx.BatchStat)), "the original was changed"


@pytest.mark.slow
def test_folding_a_network_without_batch_norm_changes_nothing(teacher_mini):
    reference = jitted(teacher_mini)(*mini_arguments()).sample
    np.testing.assert_array_equal(jitted(fold_batch_norm(teacher_mini))(*mini_arguments()).sample, reference)


def test_parameters_and_computation_have_dtypes_of_their_own():
    for stream in (jnp.float32, jnp.bfloat16):

        def call(stream=stream):
            network = UNet(
                TINY_UNET, dtype=jnp.bfloat16, stream_dtype=stream, rngs=KeyStream(jax.random.key(0))
            )
            out = network(jnp.zeros((1, 8, 8, 9)), jnp.array([1]), jnp.arange(10)[None])
            return out, nnx.state(network)

        out, state = jax.eval_shape(call)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
        assert out.sample.dtype == jnp.float32
        assert {f.dtype for f in out.features} == {jnp.dtype(stream)}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 8, 8), r"expected \[B, H, W, 9\]"),
        ((1, 7, 8, 9), "multiples of 2"),
        ((1, 4, 4, 9), "4 x 4 map"),
    ],
)
def test_wrong_maps_are_refused(shape, message):
    network = UNet(TINY_UNET, rngs=KeyStream(jax.random.key(0)))
    with pytest.raises(ValueError, match=message):
        network(jnp.zeros(shape), jnp.array([1]), jnp.arange(10)[None])


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_freezing_twice_changes_nothing(platform, monkeypatch):
    monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
    config = TINY_UNET.replace(platform=platform, channels=(32, 64), layers_per_block=1)
    dtype = auto_dtype(platform)
    half = {"dtype": dtype, "stream_dtype": dtype}
    once = inference_copy(UNet(config, rngs=KeyStream(jax.random.key(0)), **half))
    twice = inference_copy(once)
    ours, theirs = (jax.tree.leaves(nnx.split(network)[1]) for network in (twice, once))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_old_gpus_run_the_plain_forms(monkeypatch):
    def chosen(capability):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(forms, "_or_running", lambda _: "gpu")
        monkeypatch.setattr(forms.jax, "local_devices", lambda: [device])
        forms._runs_ampere.cache_clear()
        try:
            named = isinstance(forms.thin_products(None), lax.DotAlgorithmPreset)
            assert named == forms.fused_products(jnp.float16, None)
            return named
        finally:
            forms._runs_ampere.cache_clear()

    assert [chosen(c) for c in ("7.5", "8.0", "9.0", "12.0", "gfx90a")] == [False, True, True, True, False]


def test_kernels_can_be_switched_off(monkeypatch):
    def forms_of(platform):
        depth = forms.position_order((16, 16), 8, 160, 15, jnp.bfloat16, platform)
        return depth, forms.fused_products(jnp.bfloat16, platform)

    assert [forms_of(p) for p in ("gpu", "tpu")] == [("fused", True), ("fused", False)]
    monkeypatch.setenv("MOEBIUS_KERNELS", "off")
    assert [forms_of(p) for p in ("gpu", "tpu")] == [("banded", False), ("banded", False)]
    monkeypatch.setenv("MOEBIUS_KERNELS", "no")
    with pytest.raises(UserError, match="MOEBIUS_KERNELS=no: expected on or off"):
        forms_of("cpu")


@pytest.mark.parametrize(
    ("platform", "dtype", "stream", "off"),
    [
        ("gpu", jnp.float32, jnp.float32, 1e-6),
        ("tpu", jnp.bfloat16, jnp.bfloat16, 6e-3),
        ("tpu", jnp.bfloat16, jnp.float32, 6e-3),
    ],
)
def test_frozen_upsampling_is_the_doubled_map(platform, dtype, stream, off, monkeypatch):
    monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
    plain, frozen = (
        Upsample(8, precision=Precision(**options), rngs=KeyStream(jax.random.key(0)))
        for options in ({"platform": "tpu"}, {"platform": platform, "dtype": dtype, "stream_dtype": stream})
    )
    frozen.freeze()
    plain.freeze()
    assert frozen.phases is not None
    assert plain.phases is None
    x = jnp.asarray(synth.inputs("x", (2, 5, 6, 8)))
    out = frozen(x.astype(dtype))
    assert out.dtype == stream
    assert synth.relative_error(out, np.asarray(plain(x.astype(dtype)))) < off


def test_gradients_of_upsampling_in_phases_are_those_of_the_doubled_map():
    x, weights = (jnp.asarray(synth.inputs(name, (2, side, side, 8))) for name, side in (("x", 5), ("w", 10)))

    def gradients(platform):
        layer = Upsample(8, precision=Precision(platform=platform), rngs=KeyStream(jax.random.key(0)))
        return jax.grad(lambda layer, x: jnp.sum(layer(x) * weights), argnums=(0, 1))(layer, x)

    phases, doubled = (gradients(platform) for platform in ("cpu", "tpu"))
    for a, b in zip(*map(jax.tree.leaves, (phases, doubled)), strict=True):
        assert synth.relative_error(a, np.asarray(b)) < 1e-5


def test_upsampling_on_a_tpu_can_be_trained():
    """Its kernel has no gradient."""
    precision = Precision(platform="tpu", dtype=jnp.bfloat16, stream_dtype=jnp.bfloat16)
    layer = Upsample(8, precision=precision, rngs=KeyStream(jax.random.key(0)))
    gradient = jax.grad(lambda x: jnp.sum(layer(x).astype(jnp.float32)))(jnp.ones((1, 4, 4, 8), jnp.bfloat16))
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


@pytest.mark.slow
def test_upsampling_does_not_see_the_place_in_the_batch():
    """Under AVX2, where 17 x 17 positions an item were not the same in every place."""
    code = """
import jax, numpy as np
from moebius_jax.models.blocks import Upsample
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.precision import Precision
layer = Upsample(64, precision=Precision(), rngs=KeyStream(jax.random.key(0)))
layer.freeze()
assert layer.phases is not None
x = np.random.default_rng(0).normal(size=(8, 16, 16, 64)).astype(np.float32)
call = jax.jit(layer)
assert (np.roll(call(x), 1, axis=0) == call(np.roll(x, 1, axis=0))).all()
"""
    flags = {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | flags)
