"""Kernels are their plain forms. Interpreted, in fp32: compiled ones multiply fp32 in fewer bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synth
from flax import nnx
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec
from kernel_checks import agree, maps, no_further_off, value_and_gradients

from moebius_jax.models import forms
from moebius_jax.models.convolutions import DepthwiseConv
from moebius_jax.models.initializers import KeyStream
from moebius_jax.models.kernels.gpu.gated_linear_attention import gated_linear_attention as fused_attention
from moebius_jax.models.kernels.gpu.group_norm import group_norm
from moebius_jax.models.kernels.gpu.product import product
from moebius_jax.models.kernels.wrapped import split_over_batch
from moebius_jax.models.linear import Linear, Product
from moebius_jax.models.mixers.gated_linear_attention import GatedLinearAttention, gated_linear_attention
from moebius_jax.models.mixers.interactive_lambda import InteractiveLambda
from moebius_jax.models.mixers.local_lambda import LocalLambda
from moebius_jax.models.norms import GroupNorm, LayerNorm
from moebius_jax.models.parts import BlockSizes
from moebius_jax.models.precision import Precision
from moebius_jax.sharding import batch_sharding, make_mesh, with_mesh


@pytest.fixture(autouse=True)
def within_bounds(monkeypatch):
    """What a kernel reads or writes outside of an array is NaN, not the nearest element as interpreted."""
    load, store = triton.load, triton.store

    def outside(view, mask):
        indices = view.transforms[-1].indices
        inside = [(i >= 0) & (i < n) for i, n in zip(indices, view.ref.shape, strict=True)]
        shape = np.broadcast_shapes(*(jnp.shape(i) for i in indices))
        assert all(size & (size - 1) == 0 for size in shape)  # or Triton refuses it
        return jnp.broadcast_to(
            ~functools.reduce(jnp.logical_and, inside) & (True if mask is None else mask), shape
        )

    def checked_load(view, *, mask=None, **options):
        return jnp.where(outside(view, mask), jnp.nan, load(view, mask=mask, **options))

    def checked_store(view, value, *, mask=None):
        store(view, jnp.where(outside(view, mask), jnp.nan, value).astype(value.dtype), mask=mask)

    monkeypatch.setattr(triton, "load", checked_load)
    monkeypatch.setattr(triton, "store", checked_store)


def local_lambda(order, *, heads=4, depth=24, window=15, dtype=jnp.float32):
    sizes = BlockSizes(
        channels=heads * depth, map_size=16, num_heads=heads, position_order=order, window=window
    )
    precision = Precision(dtype=dtype, stream_dtype=dtype)
    module = LocalLambda(sizes, precision=precision, rngs=KeyStream(jax.random.key(0)))
    module.eval()
    return module


class TestLocalLambda:
    # A row of several tiles and a ragged one; depths of one and of several blocks; large keys.
    @pytest.mark.parametrize(
        ("shape", "heads", "depth", "scale"),
        [((2, 6, 20), 4, 24, 1), ((1, 34, 33), 8, 40, 1), ((1, 4, 4), 2, 80, 1), ((1, 18, 18), 2, 16, 300)],
    )
    def test_is_the_plain_form(self, shape, heads, depth, scale):
        x = maps(*shape, heads * depth, scale=scale)
        fused, plain = (
            jax.jit(local_lambda(order, heads=heads, depth=depth))(x) for order in ("fused", "conv3d")
        )
        assert synth.relative_error(fused, np.asarray(plain)) < 1e-5

    # Whole tiles and a ragged one; all heads at once and half of them; one block of values and two; windows
    # with padding, a wide one without, and one larger than the map.
    @pytest.mark.parametrize(
        ("shape", "heads", "depth", "window"),
        [((2, 6, 20), 4, 24, 15), ((1, 5, 16), 8, 40, 15), ((1, 4, 4), 2, 80, 7), ((1, 17, 18), 2, 16, 17)],
    )
    def test_gradients_are_the_plain_ones(self, shape, heads, depth, window):
        x, stream = maps(*shape, heads * depth), 2 * maps(*shape, heads * depth)
        modules = (
            local_lambda(order, heads=heads, depth=depth, window=window) for order in ("fused", "conv3d")
        )
        agree(*(value_and_gradients(module, stream, x) for module in modules))

    @pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
    def test_half_precision_is_no_further_off(self, dtype):
        x = maps(1, 12, 12, 96)
        exact = np.asarray(jax.jit(local_lambda("conv3d"))(x))
        fused, plain = (
            synth.relative_error(jax.jit(local_lambda(order, dtype=dtype))(x.astype(dtype)), exact)
            for order in ("fused", "banded")
        )
        assert fused < 1.2 * plain

    def test_half_precision_gradients_are_no_further_off(self):
        x = maps(1, 12, 20, 96)
        exact = value_and_gradients(local_lambda("conv3d"), x)
        half = x.astype(jnp.bfloat16)
        found = (
            value_and_gradients(local_lambda(order, dtype=jnp.bfloat16), half)
            for order in ("fused", "toeplitz")
        )
        no_further_off(*found, exact)

    def test_sharded_batch_stays_where_it_is(self):
        module, x = local_lambda("fused", heads=2, depth=16), maps(8, 6, 6, 32)
        mesh = make_mesh(jax.devices())

        spread = jax.device_put(x, batch_sharding(mesh))
        run = jax.jit(with_mesh(value_and_gradients, mesh)).lower(module, spread).compile()
        y, (_, of_x) = found = run(module, spread)
        for a in (y, of_x):
            assert a.sharding.is_equivalent_to(batch_sharding(mesh), a.ndim)
        assert "all-gather" not in run.as_text()
        agree(found, value_and_gradients(module, x))


def test_other_numbers_of_heads_are_refused():
    with pytest.raises(ValueError, match="power of two of heads; num_heads is 6"):
        local_lambda("fused", heads=6)(maps(1, 4, 4, 144))


def test_split_kernel_gathers_what_is_not_the_batch():
    mesh = make_mesh(jax.devices())
    run = split_over_batch(lambda x, w: x * w.sum(), batched=(True, False))
    x, w = jnp.arange(16.0).reshape(8, 2), jnp.arange(8.0)
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    run = jax.jit(with_mesh(run, mesh))
    out = run(jax.device_put(x, spread), jax.device_put(w, spread))
    np.testing.assert_array_equal(out, x * 28)
    few = jax.device_put(x[:3], NamedSharding(mesh, PartitionSpec()))  # which eight devices do not divide
    np.testing.assert_array_equal(run(few, jax.device_put(w, spread)), x[:3] * 28)


class TestProduct:
    # Ragged in rows, columns and depth; of one and of several tiles.
    @pytest.mark.parametrize("shape", [(2, 5, 7, 40, 24), (1, 16, 9, 320, 96), (3, 1, 1, 8, 200)])
    @pytest.mark.parametrize("then", [None, jax.nn.silu])
    @pytest.mark.parametrize("with_add", [False, True])
    def test_is_the_plain_form(self, shape, then, with_add):
        *lead, K, N = shape
        x, kernel, bias = maps(*lead, K), maps(K, N), maps(N)
        rows = lead[0], *(1 for _ in lead[1:])
        add = (maps(*lead, N), 2 * maps(*rows, N)) if with_add else ()
        plain = x @ kernel + bias
        plain = sum(add, then(plain) if then else plain)
        out = product(x, kernel, bias, *add, has_bias=True, then=then, dtype=jnp.float32, interpret=True)
        assert synth.relative_error(out, np.asarray(plain)) < 1e-6

    def test_refuses_rows_of_another_batch(self, monkeypatch):
        monkeypatch.setattr(forms, "fused_products", lambda *_: True)
        linear = Linear(40, 24, precision=Precision(), rngs=KeyStream(jax.random.key(0)))
        linear.freeze()
        with pytest.raises(ValueError, match=r"cannot add \(2, 1, 1, 24\) to the product of \(4, 5, 5, 40\)"):
            linear(maps(4, 5, 5, 40), add=(maps(2, 1, 1, 24),))

    def test_takes_another_product_along(self, monkeypatch):
        monkeypatch.setattr(forms, "fused_products", lambda *_: True)
        common = {"precision": Precision(), "rngs": KeyStream(jax.random.key(0))}
        first, second = Linear(40, 24, **common), Linear(72, 24, **common)
        first.bias, second.bias = nnx.Param(maps(24)), nnx.Param(2 * maps(24))
        x, other, stream = maps(2, 5, 5, 40), maps(2, 5, 5, 72), maps(2, 5, 5, 24)
        plain = first(x) + second(other) + stream
        first.freeze()
        out = first(x, add=(Product(other, second), stream))
        assert synth.relative_error(out, np.asarray(plain)) < 1e-6

    def test_takes_a_norm_over(self, monkeypatch):
        monkeypatch.setattr(forms, "fused_products", lambda *_: True)
        common = {"precision": Precision(), "rngs": KeyStream(jax.random.key(0))}
        norm, linear = LayerNorm(40, **common), Linear(40, 24, **common)
        norm.scale, norm.bias = nnx.Param(maps(40) + 1), nnx.Param(maps(40))
        linear.bias = nnx.Param(maps(24))
        x = 3 * maps(2, 5, 5, 40) + 2
        plain = linear(norm(x))
        linear.take_over(norm)
        linear.freeze()
        assert synth.relative_error(linear(x), np.asarray(plain)) < 1e-5


class TestInteractiveLambda:
    # One tile and several, a ragged one; a depth that is a power of two and one that is not.
    @pytest.mark.parametrize(("side", "heads", "depth"), [(4, 8, 24), (9, 2, 64), (6, 4, 160)])
    def test_is_the_plain_form(self, side, heads, depth, monkeypatch):
        sizes = BlockSizes(channels=heads * depth, map_size=side, num_heads=heads)
        module = InteractiveLambda(sizes, precision=Precision(), rngs=KeyStream(jax.random.key(0)))
        module.eval()
        x, stream = maps(2, side, side, heads * depth), 2 * maps(2, side, side, heads * depth)
        tokens = module.prepare(maps(1, 10, sizes.context_dim))  # one context for both maps
        plain = module.onto(stream, x, tokens)
        monkeypatch.setattr(forms, "fused_interactive_lambda", lambda *_: True)
        module.freeze()
        assert synth.relative_error(module.onto(stream, x, tokens), np.asarray(plain)) < 1e-5


class TestGatedLinearAttention:
    # One segment and several, whole chunks and ragged ones, of the last segment too; depths of one block and
    # of several; gates from open to nearly shut.
    @pytest.mark.parametrize(
        ("tokens", "heads", "k", "v", "strength"),
        [(49, 2, 20, 40, 1), (256, 1, 8, 16, 0), (600, 2, 20, 40, 3), (300, 1, 40, 80, 100)],
    )
    def test_is_the_plain_form(self, tokens, heads, k, v, strength):
        shape = 2, tokens, heads
        q, key, gate = (jnp.asarray(synth.inputs(name, (*shape, k))) for name in ("q", "key", "gate"))
        arguments = q, key, jnp.asarray(synth.inputs("val", (*shape, v))), -strength * jnp.abs(gate) / 16
        out = fused_attention(*arguments, interpret=True)
        plain = jax.jit(gated_linear_attention)(*arguments)
        assert synth.relative_error(out, np.asarray(plain)) < 1e-5

    def test_the_module_takes_it_gradients_included(self, monkeypatch):
        sizes = BlockSizes(channels=64, map_size=6, num_heads=2)
        module = GatedLinearAttention(sizes, precision=Precision(), rngs=KeyStream(jax.random.key(0)))
        x = maps(2, 6, 6, 64)
        plain = value_and_gradients(module, x)
        monkeypatch.setattr(forms, "fused_gated_linear_attention", lambda *_: True)
        agree(value_and_gradients(module, x), plain)

    def test_a_sharded_batch_stays_where_it_is(self, monkeypatch):
        monkeypatch.setattr(forms, "fused_gated_linear_attention", lambda *_: True)
        sizes = BlockSizes(channels=32, map_size=4, num_heads=2)
        module = GatedLinearAttention(sizes, precision=Precision(), rngs=KeyStream(jax.random.key(0)))
        x, mesh = maps(8, 4, 4, 32), make_mesh(jax.devices())
        spread = jax.device_put(x, batch_sharding(mesh))
        program = jax.jit(with_mesh(module.__call__, mesh)).lower(spread).compile()
        assert "all-gather" not in program.as_text()
        assert synth.relative_error(program(spread), np.asarray(module(x))) < 1e-5

    @pytest.mark.parametrize("dtypes", [(jnp.float16, jnp.float16), (jnp.bfloat16, jnp.float32)])
    def test_half_precision_is_no_further_off(self, dtypes, monkeypatch):
        monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
        half = dict(zip(("dtype", "stream_dtype"), dtypes, strict=True))
        no_further_off(*(self.found(*case) for case in (("gpu", half), ("cpu", half), ("cpu", {}))))

    def test_sums_beyond_float16s_range_reach_the_norm(self, monkeypatch):
        monkeypatch.setattr(forms, "kernels_interpreted", lambda _: True)
        half = {"dtype": jnp.float16, "stream_dtype": jnp.float16}
        ours, _ = self.found("gpu", half, scale=60)
        exact, _ = self.found("cpu", {}, scale=60)
        assert synth.relative_error(ours, np.asarray(exact)) < 1e-2

    def found(self, platform, dtypes, *, scale=1):
        """Value and gradients; `scale`: of keys and values."""
        sizes = BlockSizes(channels=64, map_size=6, num_heads=2)
        precision = Precision(platform=platform, **dtypes)
        module = GatedLinearAttention(sizes, precision=precision, rngs=KeyStream(jax.random.key(0)))
        for layer in (module.k_proj, module.v_proj):
            layer.kernel = nnx.Param(scale * layer.kernel[...])
        return value_and_gradients(module, 3 * maps(2, 6, 6, 64).astype(precision.stream_dtype))

    def test_is_what_a_gpu_takes_in_half_precision(self):
        chosen = forms.fused_gated_linear_attention
        assert chosen(jnp.float16, "gpu")
        assert not any(
            chosen(*a) for a in ((jnp.float32, "gpu"), (jnp.bfloat16, "tpu"), (jnp.bfloat16, "cpu"))
        )


class TestGroupNorm:
    # Groups of 2 and of 80 channels, several in a block and one; whole pieces, ragged ones and very many.
    @pytest.mark.parametrize(
        "shape", [(2, 9, 9, 64), (1, 8, 8, 320), (2, 5, 5, 960), (1, 4, 4, 2560), (1, 96, 90, 64)]
    )
    @pytest.mark.parametrize("then", [None, jax.nn.silu])
    def test_is_the_plain_form(self, shape, then):
        norm = GroupNorm(shape[-1], eps=1e-5, precision=Precision(), rngs=KeyStream(jax.random.key(0)))
        norm.scale, norm.bias = (nnx.Param(maps(shape[-1]) + shift) for shift in (1, 0))
        x = 3 * maps(*shape) + 2
        options = {"groups": 32, "eps": 1e-5, "then": then, "dtype": jnp.float32, "interpret": True}
        out = group_norm(x, norm.scale[...], norm.bias[...], **options)
        plain = jax.jit(functools.partial(norm, then=then))(x)
        assert synth.relative_error(out, np.asarray(plain)) < 1e-5

    def test_a_large_mean_does_not_swallow_the_variance(self):
        x, ones, zeros = maps(1, 8, 8, 64), jnp.ones(64), jnp.zeros(64)
        options = {"groups": 32, "eps": 1e-5, "dtype": jnp.float32, "interpret": True}
        far, near = (group_norm(x + mean, ones, zeros, **options) for mean in (1000.0, 0.0))
        assert synth.relative_error(far, np.asarray(near)) < 1e-3  # x + 1000 has been rounded to 6e-5


class TestDepthwiseGradient:
    # Ragged pieces and channels; several pieces of an image.
    @pytest.mark.parametrize("shape", [(2, 5, 7, 70), (1, 20, 33, 64)])
    @pytest.mark.parametrize("form", ["kernel", "convolution", "scan"])
    def test_is_the_plain_form(self, shape, form, monkeypatch):
        conv = DepthwiseConv(
            shape[-1], use_bias=True, precision=Precision(), rngs=KeyStream(jax.random.key(0))
        )

        def gradients():
            gradient = jax.grad(lambda conv, x: jnp.sum(jnp.sin(conv(x))), argnums=(0, 1))
            return jax.jit(gradient)(conv, maps(*shape))

        monkeypatch.setattr(forms, "depthwise_gradient", lambda *_: "autodiff")
        plain, y = gradients(), conv(maps(*shape))
        monkeypatch.setattr(forms, "depthwise_gradient", lambda *_: form)
        assert synth.relative_error(conv(maps(*shape)), np.asarray(y)) < 1e-5
        for a, b in zip(jax.tree.leaves(gradients()), jax.tree.leaves(plain), strict=True):
            assert synth.relative_error(a, np.asarray(b)) < 1e-5

    @pytest.mark.parametrize("form", ["kernel", "scan"])
    def test_a_sharded_batch_is_summed_over_devices(self, form, monkeypatch):
        monkeypatch.setattr(forms, "depthwise_gradient", lambda *_: form)
        conv = DepthwiseConv(16, use_bias=False, precision=Precision(), rngs=KeyStream(jax.random.key(0)))
        x, mesh = maps(8, 6, 5, 16), make_mesh(jax.devices())
        gradient = jax.grad(lambda conv, x: jnp.sum(jnp.sin(conv(x))))
        alone = jax.jit(gradient)(conv, x).kernel[...]
        spread = jax.device_put(x, batch_sharding(mesh))
        program = jax.jit(with_mesh(gradient, mesh)).lower(conv, spread).compile()
        assert "all-gather" not in program.as_text()
        shared = program(conv, spread).kernel[...]
        np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("form", ["kernel", "convolution", "scan"])
    def test_half_precision_is_no_further_off(self, form, monkeypatch):
        """The sums over a map are in fp32."""
        weights = KeyStream(jax.random.key(0))
        half = Precision(dtype=jnp.bfloat16)
        conv = DepthwiseConv(32, use_bias=True, precision=half, rngs=weights)

        def gradient():
            x = maps(4, 24, 24, 32).astype(jnp.bfloat16)
            return jax.jit(jax.grad(lambda conv: jnp.sum(jnp.square(conv(x)))))(conv)

        monkeypatch.setattr(forms, "depthwise_gradient", lambda *_: "autodiff")
        plain = gradient()
        monkeypatch.setattr(forms, "depthwise_gradient", lambda *_: form)
        ours = gradient()
        assert ours.kernel.dtype == jnp.float32
        assert synth.relative_error(ours.kernel[...], np.asarray(plain.kernel[...])) < 1e-4

    def test_choice(self):
        def chosen(platform, dtype=jnp.bfloat16):
            return forms.depthwise_gradient(dtype, platform)

        assert [chosen(platform) for platform in ("cpu", "gpu", "tpu")] == [
            "scan",
            "kernel",
            "convolution",
        ]
        full = [chosen(platform, jnp.float32) for platform in ("cpu", "gpu", "tpu")]
        assert full == ["scan", "autodiff", "autodiff"]
