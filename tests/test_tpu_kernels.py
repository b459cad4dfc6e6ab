"""A TPU's kernels are their plain forms: interpreted in fp32, and turned into a TPU's program."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kernel_checks import agree, maps, no_further_off, value_and_gradients

from moebius_jax import fold_batch_norm
from moebius_jax.models import forms
from moebius_jax.models.convolutions import DepthwiseConv
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.kernels.tpu.local_lambda import packed_window, packing
from moebius_jax.models.mixers.interactive_lambda import InteractiveLambda
from moebius_jax.models.mixers.local_lambda import LocalLambda
from moebius_jax.models.norms import LayerNorm
from moebius_jax.models.parts import BlockSizes
from moebius_jax.models.precision import Precision
from moebius_jax.sharding import batch_sharding, make_mesh, with_mesh


def local_lambda(order, *, heads=4, depth=24, window=15, dtype=jnp.float32):
    sizes = BlockSizes(
        channels=heads * depth, map_size=16, num_heads=heads, position_order=order, window=window
    )
    precision = Precision(dtype=dtype, stream_dtype=dtype, platform="tpu")
    module = LocalLambda(sizes, precision=precision, rngs=KeyStream(jax.random.key(0)))
    module.eval()
    return module


def depthwise(channels, *, use_bias=True, dtype=jnp.float32):
    precision = Precision(dtype=dtype, stream_dtype=dtype, platform="tpu")
    return DepthwiseConv(channels, use_bias=use_bias, precision=precision, rngs=KeyStream(jax.random.key(0)))


def run(module, x):
    def fresh(module, x):  # what was traced with another choice of forms is not to be taken again
        return value_and_gradients(module, x)

    return jax.jit(fresh)(module, x)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)


@pytest.fixture
def with_kernel(monkeypatch):
    """Of depthwise convolutions: called with True or False."""
    monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
    return lambda choice: monkeypatch.setattr(forms, "depthwise_kernel", lambda *_: choice)


@pytest.mark.usefixtures("interpreted")
class TestLocalLambda:
    # Whole strips and a ragged one; several programs a map, and rows that no two share; other windows and
    # numbers of heads.
    @pytest.mark.parametrize(
        ("shape", "heads", "depth", "window"),
        [((2, 16, 32), 2, 24, 15), ((1, 7, 20), 4, 40, 15), ((1, 4, 4), 3, 80, 7), ((2, 9, 16), 2, 16, 23)],
    )
    def test_is_the_plain_form(self, shape, heads, depth, window):
        x = maps(*shape, heads * depth)
        fused, plain = (
            local_lambda(order, heads=heads, depth=depth, window=window) for order in ("fused", "conv3d")
        )
        agree(run(fused, x), run(plain, x))

    @pytest.mark.parametrize("width", [16, 20])
    def test_frozen_it_is_the_same(self, width):
        module, x, stream = local_lambda("fused"), maps(1, 8, width, 96), 2 * maps(1, 8, width, 96)
        plain = module(x)
        module.freeze()
        assert module.packed_window is not None
        agree(module.onto(stream, x), plain + stream)

    def test_half_precision_is_no_further_off(self):
        x = maps(1, 12, 12, 96)
        exact, half = run(local_lambda("conv3d"), x), x.astype(jnp.bfloat16)
        found = [run(local_lambda(order, dtype=jnp.bfloat16), half) for order in ("fused", "toeplitz")]
        no_further_off(*found, exact)

    def test_a_sharded_batch_stays_where_it_is(self):
        module, x, mesh = (
            local_lambda("fused", heads=2, depth=16),
            maps(8, 6, 16, 32),
            make_mesh(jax.devices()),
        )
        spread = jax.device_put(x, batch_sharding(mesh))
        program = jax.jit(with_mesh(value_and_gradients, mesh)).lower(module, spread).compile()
        assert "all-gather" not in program.as_text()
        y, (of_module, of_x) = program(module, spread)
        for a in (y, of_x):
            assert a.sharding.is_equivalent_to(batch_sharding(mesh), a.ndim)
        agree((y, (of_module, of_x)), run(module, x), 1e-5)


@pytest.mark.usefixtures("interpreted")
class TestInteractiveLambda:
    def frozen(self, side, depth, monkeypatch):
        """A module of eight heads as the kernel reads it; what norm and plain form make of maps; these."""
        sizes = BlockSizes(channels=8 * depth, map_size=side, num_heads=8)
        precision = Precision(platform="tpu")
        module = InteractiveLambda(sizes, precision=precision, rngs=KeyStream(jax.random.key(0)))
        module.norm_q.mean, module.norm_q.scale = (nnx.Param(maps(8 * depth) + n) for n in (0, 1))
        module = fold_batch_norm(module)
        norm = LayerNorm(8 * depth, precision=precision, rngs=KeyStream(jax.random.key(0)))
        norm.scale, norm.bias = nnx.Param(maps(8 * depth) + 1), nnx.Param(2 * maps(8 * depth))
        stream, x = 2 * maps(2, side, side, 8 * depth), maps(2, side, side, 8 * depth) + 1
        context = maps(2, 10, sizes.context_dim)
        plain = module.onto(stream, norm(x), module.prepare(context))
        monkeypatch.setattr(forms, "fused_interactive_lambda", lambda *_: True)
        assert module.takes_over(norm)
        module.to_q.take_over(norm)
        module.freeze()
        assert module.to_q is None
        return module, plain, (stream, x, context)

    # One program a map and several; a depth that the unrolled sum divides and one that it does not.
    @pytest.mark.parametrize(("side", "depth"), [(16, 8), (24, 6), (32, 20)])
    def test_is_the_plain_form(self, side, depth, monkeypatch):
        module, plain, (stream, x, context) = self.frozen(side, depth, monkeypatch)
        agree(module.onto(stream, x, module.prepare(context)), plain)

    def test_without_a_norm_before_it_it_is_the_plain_form(self, monkeypatch):
        monkeypatch.setattr(forms, "fused_interactive_lambda", lambda *_: True)
        sizes = BlockSizes(channels=64, map_size=16, num_heads=8)
        module = InteractiveLambda(
            sizes, precision=Precision(platform="tpu"), rngs=KeyStream(jax.random.key(0))
        )
        module = fold_batch_norm(module)
        x, context = maps(2, 16, 16, 64), maps(2, 10, sizes.context_dim)
        plain = module(x, module.prepare(context))
        module.freeze()
        assert "pallas_call" not in str(jax.make_jaxpr(module.__call__)(x, module.prepare(context)))
        agree(module(x, module.prepare(context)), plain)

    def test_one_context_is_every_items(self, monkeypatch):
        module, _, (stream, x, context) = self.frozen(16, 8, monkeypatch)
        first = module.onto(stream, x, module.prepare(context[:1]))
        agree(first, module.onto(stream, x, module.prepare(jnp.repeat(context[:1], 2, 0))))

    def test_refuses_another_map(self, monkeypatch):
        module, _, (_, x, context) = self.frozen(16, 8, monkeypatch)
        with pytest.raises(ValueError, match="a 8 x 16 map with 10 context tokens: the position table was"):
            module(x[:, :8], module.prepare(context))
        with pytest.raises(ValueError, match="with 9 context tokens"):
            module(x, module.prepare(context[:, :9]))

    def test_a_sharded_batch_stays_where_it_is(self, monkeypatch):
        module, _, (_, x, context) = self.frozen(16, 8, monkeypatch)
        mesh = make_mesh(jax.devices())
        spread = jax.device_put(jnp.tile(x, (4, 1, 1, 1)), batch_sharding(mesh))
        tokens = module.prepare(context[:1])
        program = jax.jit(with_mesh(module.__call__, mesh)).lower(spread, tokens).compile()
        assert "all-gather" not in program.as_text()
        agree(program(spread, tokens)[:2], module(x, tokens))


def test_every_offset_has_a_lane_of_its_own():
    kernel = maps(15, 15, 3)
    pack = packing(15)
    lanes = packed_window(kernel).reshape(3, -1, pack.span)
    assert lanes.shape[1] == pack.products * pack.rows >= 15
    np.testing.assert_array_equal(lanes[:, :15, :15], jnp.moveaxis(kernel, -1, 0))
    assert not lanes[:, 15:].any()
    assert not lanes[:, :, 15:].any()


class TestDepthwise:
    # One row of registers and several; channels that end within a program; rows that are unrolled or not.
    @pytest.mark.parametrize("shape", [(2, 5, 8, 70), (1, 20, 32, 64), (2, 8, 16, 200)])
    @pytest.mark.parametrize("use_bias", [True, False])
    def test_is_the_plain_form(self, shape, use_bias, with_kernel):
        conv, x = depthwise(shape[-1], use_bias=use_bias), maps(*shape)
        found = []
        for choice in (True, False):
            with_kernel(choice)
            found.append(run(conv, x))
        agree(*found)

    def test_half_precision_is_no_further_off(self, with_kernel):
        """Sums are in fp32, and what comes out is rounded once."""
        x = maps(2, 12, 16, 32)
        with_kernel(False)
        exact, found = run(depthwise(32), x), []
        conv, half = depthwise(32, dtype=jnp.bfloat16), x.astype(jnp.bfloat16)
        for choice in (True, False):
            with_kernel(choice)
            found.append(run(conv, half))
        no_further_off(*found, exact)

    def test_a_sharded_batch_is_summed_over_devices(self, with_kernel):
        with_kernel(True)
        conv, x, mesh = depthwise(16), maps(8, 6, 8, 16), make_mesh(jax.devices())
        spread = jax.device_put(x, batch_sharding(mesh))
        program = jax.jit(with_mesh(value_and_gradients, mesh)).lower(conv, spread).compile()
        assert "all-gather" not in program.as_text()
        agree(program(conv, spread), run(conv, x), 1e-5)


class TestChoice:
    def test_of_local_lambda(self):
        def order(shape, dtype=jnp.bfloat16, heads=8):
            return forms.position_order(shape, heads, 40, 15, dtype, "tpu")

        assert order((64, 64)) == order((9, 250)) == order((64, 64), heads=6) == "fused"
        assert order((64, 64), jnp.float32) == order((64, 64), jnp.float16) == "toeplitz"
        assert forms.position_order((64, 64), 8, 1, 15, jnp.bfloat16, "tpu") == "toeplitz"
        assert forms.position_order((64, 64), 8, 40, 15, jnp.bfloat16, "tpu-v4") == "toeplitz"
        assert order((512, 512)) == "toeplitz"  # its values are more than a core's memory,
        assert order((64, 64), heads=512) == "toeplitz"  # as are its rows at work

    def test_of_interactive_lambda(self):
        def chosen(positions, heads, dtype=jnp.bfloat16, platform="tpu"):
            return forms.fused_interactive_lambda(dtype, positions, heads, platform)

        assert chosen(4096, 8)
        assert not chosen(400, 8)  # no whole registers
        assert not chosen(4096, 4)
        assert not chosen(4096, 8, jnp.float32)
        assert not chosen(4096, 8, platform="tpu-v4")
        assert chosen(400, 4, platform="gpu")
        assert not chosen(400, 6, platform="gpu")

    def test_of_depthwise_convolutions(self):
        def chosen(H, W, dtype=jnp.bfloat16, platform="tpu"):
            return forms.depthwise_kernel((2, H, W, 320), dtype, dtype, platform)

        assert chosen(64, 64)
        assert chosen(9, 8)
        assert not chosen(64, 60)  # no whole registers
        assert not chosen(512, 512)
        assert not chosen(64, 64, jnp.float32)
        assert not chosen(64, 64, jnp.float16)  # which a TPU does not load
        assert not any(chosen(64, 64, platform=name) for name in ("cpu", "gpu", "tpu-v4"))


def test_a_kernel_asked_for_where_there_is_none():
    sizes = BlockSizes(channels=32, map_size=8, num_heads=2, position_order="fused")
    with pytest.raises(ValueError, match="a TPU of v5 or later"):
        LocalLambda(sizes, precision=Precision(platform="tpu-v4"), rngs=KeyStream(jax.random.key(0))).freeze()


def test_upsampling_in_phases_wants_the_kernel_on_a_tpu():
    def chosen(dtype, platform="tpu", *, has_gradient=False):
        return forms.upsampling_in_phases(dtype, platform, has_gradient=has_gradient)

    assert [chosen(dtype) for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)] == [True, False, False]
    assert not chosen(jnp.bfloat16, "tpu-v4")
    assert not chosen(jnp.bfloat16, has_gradient=True)
    assert chosen(jnp.bfloat16, "gpu", has_gradient=True)


def test_old_tpus_are_told_from_recent_ones():
    def platform(kind):
        return forms.platform_of(types.SimpleNamespace(device_kind=kind, platform="tpu"))

    assert platform("TPU v4") == platform("TPU v2") == "tpu-v4"
    assert (
        platform("TPU v5 lite") == platform("TPU v5") == platform("TPU v6 lite") == platform("TPU7x") == "tpu"
    )


@pytest.mark.parametrize("size", [16, 20, 64])
def test_they_are_programs_for_a_tpu(size):
    """As far as this goes without one: benchmarks/compiled.py goes on to the chip's own instructions."""
    half = jnp.bfloat16
    lamb, conv = local_lambda("auto", dtype=half), depthwise(96, dtype=half)
    x = jax.ShapeDtypeStruct((2, size, size, 96), half)

    def called(module):
        return (
            jax.jit(value_and_gradients)
            .trace(module, x)
            .lower(lowering_platforms=("tpu",))
            .as_text()
            .count("tpu_custom_call")
        )

    kernels = [called(module) for module in (lamb, conv)]
    assert kernels[0] >= 2
    assert kernels[1] == 0 if size % 8 else kernels[1] >= 2


def test_rolling_lanes_is_turning_offsets_into_columns():
    """What the kernel rests on, in numpy."""
    pack = packing(15)
    for x, (d, e) in itertools.product((0, 7, 15), itertools.product(range(pack.rows), (0, 14))):
        lane = (d * pack.span + e + x) % pack.lanes
        assert divmod(lane, pack.span) == (d, e + x)
