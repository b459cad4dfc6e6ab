"""Counting of compiled programs, and that a block does not suddenly take more kernels."""

import collections

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY_UNET
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import hlo, mosaic
from benchmarks.scale import link_seconds
from moebius_jax import UNet
from moebius_jax.models import inference_copy
from moebius_jax.models.initializers import KeyStream
from moebius_jax.sharding import make_mesh, replicated

CUDA = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: f16[64,32], p1: f16[4,64,16]) -> f16[32,16] {
  %p0 = f16[64,32]{1,0} parameter(0)
  %p1 = f16[4,64,16]{2,1,0} parameter(1)
  %row = f16[1,64,16]{2,1,0} slice(%p1), slice={[1:2], [0:64], [0:16]}
  %flat = f16[64,16]{1,0} bitcast(%row)
  ROOT %dot = f16[32,16]{1,0} dot(%p0, %flat), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%body (carry: (s32[], f16[64,32], f16[4,64,16])) -> (s32[], f16[64,32], f16[4,64,16]) {
  %carry = (s32[], f16[64,32]{1,0}, f16[4,64,16]{2,1,0}) parameter(0)
  %x = f16[64,32]{1,0} get-tuple-element(%carry), index=1
  %w = f16[4,64,16]{2,1,0} get-tuple-element(%carry), index=2
  %i = s32[] get-tuple-element(%carry), index=0
  %y = f16[32,16]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused, metadata={op_name="jit(f)/Block/Linear/dot_general"}
  ROOT %next = (s32[], f16[64,32]{1,0}, f16[4,64,16]{2,1,0}) tuple(%i, %x, %w)
}

ENTRY %main (x: f16[64,32], w: f16[4,64,16], image: f32[1,8,8,3], kernel: f32[3,3,3,5]) -> f16[64,32] {
  %x = f16[64,32]{1,0} parameter(0)
  %w = f16[4,64,16]{2,1,0} parameter(1)
  %image = f32[1,8,8,3]{3,2,1,0} parameter(2)
  %kernel = f32[3,3,3,5]{3,2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %conv = (f32[1,8,8,5]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), custom_call_target="__cudnn$convForward", dim_labels=b01f_01io->b01f
  %start = (s32[], f16[64,32]{1,0}, f16[4,64,16]{2,1,0}) tuple(%zero, %x, %w)
  %loop = (s32[], f16[64,32]{1,0}, f16[4,64,16]{2,1,0}) while(%start), condition=%add, body=%body
  ROOT %out = f16[64,32]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


class TestHlo:
    def test_kernels_bytes_and_flops(self):
        conv, product = hlo.kernels(CUDA)
        assert (conv.in_loop, product.in_loop) == (False, True)
        assert conv.flops == {"tf32": 2 * 8 * 8 * 5 * 27}
        assert (conv.read, conv.written) == (4 * (8 * 8 * 3 + 27 * 5), 4 * 8 * 8 * 5)
        assert product.flops == {"f16": 2 * 32 * 16 * 64}
        # Of the second operand one of four slices is read.
        assert (product.read, product.written) == (2 * (64 * 32 + 64 * 16), 2 * 32 * 16)

    @pytest.mark.parametrize(
        ("call", "result", "operands"),
        [
            ("Forward", "f32[2,4,4,5]", ("f32[2,8,8,3]", "f32[3,3,3,5]")),
            ("BackwardInput", "f32[2,8,8,3]", ("f32[2,4,4,5]", "f32[3,3,3,5]")),
            ("BackwardFilter", "f32[3,3,3,5]", ("f32[2,8,8,3]", "f32[2,4,4,5]")),
        ],
    )
    def test_a_convolution_and_its_gradients_are_as_many_flops(self, call, result, operands):
        a, b = operands
        text = (
            f"ENTRY %main (a: {a}, b: {b}) -> {result} {{\n  %a = {a} parameter(0)\n  %b = {b} parameter(1)\n"
            f'  ROOT %y = {result} custom-call(%a, %b), custom_call_target="__cudnn$conv{call}", '
            "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f\n}"
        )
        (kernel,) = hlo.kernels(text)
        assert kernel.flops == {"tf32": 2 * (2 * 4 * 4) * (3 * 3) * 3 * 5}

    def test_module_of_a_kernel(self):
        scope = hlo.kernels(CUDA)[1].instruction.scope
        assert hlo.module_of(scope, frozenset({"Block", "Linear"})) == "Block/Linear"
        assert hlo.module_of(scope, frozenset({"Other"})) == "other"

    def test_what_is_on_chip_is_not_traffic(self):
        line = "  %x = bf16[8,128]{1,0:T(8,128)S(1)} copy(%y)"
        computations, _ = hlo.parse("ENTRY %main (y: bf16[8,128]) -> bf16[8,128] {\n" + line + "\n}")
        assert computations["main"]["x"].nbytes == 0

    def test_a_real_program(self):
        def run(x, w):
            return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0]

        text = jax.jit(run).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().as_text()
        flops = [sum(k.flops.values()) for k in hlo.kernels(text) if k.in_loop]
        assert sum(flops) == 2 * 64**3


def primitives(jaxpr, found):
    """How often each operation is done, our kernels by name."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found[str(equation.params["name"])] += 1
            continue
        found[equation.primitive.name] += 1
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, tuple) else (parameter,):
                if isinstance(inner, jax.extend.core.ClosedJaxpr):
                    primitives(inner.jaxpr, found)
                elif isinstance(inner, jax.extend.core.Jaxpr):
                    primitives(inner, found)
    return found


def sampling(layers, *, platform, dtype):
    """A frozen network's function of latents, and its arguments' shapes."""
    config = TINY_UNET.replace(layers_per_block=layers, platform=platform)

    def build():
        return inference_copy(
            UNet(config, dtype=dtype, stream_dtype=dtype, rngs=KeyStream(jax.random.key(0)))
        )

    graphdef, weights = nnx.split(nnx.eval_shape(build))
    latents = jax.ShapeDtypeStruct((1, 8, 8, 9), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 10), jnp.int32)
    conditions = jax.eval_shape(
        lambda w, t, ids: nnx.merge(graphdef, w).conditions(t, ids), weights, jnp.zeros(1), ids
    )
    return lambda w, x, c: nnx.merge(graphdef, w).predict(x, c).sample, (weights, latents, conditions)


def test_kernels_of_a_unit_on_a_gpu():
    def counts(layers):
        function, arguments = sampling(layers, platform="gpu", dtype=jnp.float16)
        return primitives(jax.make_jaxpr(function)(*arguments).jaxpr, collections.Counter())

    one, two = counts(1), counts(2)
    units = 4  # two levels down and two up have one more each
    grown = {name: (two[name] - one[name]) / units for name in two if two[name] != one[name]}
    # Residual block: two norms, two products. Transformer: norm, products in and out, of all three parts.
    assert grown["group_sums"] == grown["group_norm"] == 3
    assert grown["product"] == 2 + 2 + 4
    assert grown["content"] == grown["local_lambda"] == grown["interactive_lambda"] == 1
    # One of XLA's: the queries on the window. No norm, no shortcut and no cast of a weight is left.
    assert grown["dot_general"] == 1
    assert "rsqrt" not in grown


def test_kernels_of_a_unit_on_a_cpu():
    def count(layers):
        function, arguments = sampling(layers, platform="cpu", dtype=jnp.float32)
        return len(hlo.kernels(jax.jit(function).lower(*arguments).compile().as_text()))

    assert (count(2) - count(1)) / 4 < 90  # 82 with jax 0.10.2


class TestCollectives:
    def test_counts_and_bytes(self):
        """A sum over four devices and a gathering of what they hold."""
        mesh = make_mesh(jax.devices()[:4])
        x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))

        def program(x):
            return x.sum(0), 2 * x

        text = jax.jit(program, out_shardings=replicated(mesh)).lower(x).compile().as_text()
        assert hlo.collectives(text) == {"all-reduce": (1, 32 * 4), "all-gather": (1, 8 * 32 * 4)}

    def test_what_is_started_is_counted_once(self):
        line = (
            "%{0} = (f32[2,4]{{1,0}}, f32[8,4]{{1,0}}) all-gather-start(%x), channel_id={1}, dimensions={{0}}"
        )
        body = "\n".join("  " + line.format(f"s{i}", channel) for i, channel in enumerate((7, 7, 9)))
        text = f"ENTRY %main (x: f32[2,4]) -> f32[8,4] {{\n  %x = f32[2,4]{{1,0}} parameter(0)\n{body}\n}}"
        assert hlo.collectives(text) == {"all-gather": (2, 2 * 8 * 4 * 4)}

    def test_time(self):
        found = {"all-reduce": (10, 10**9), "all-gather": (5, 10**9)}
        moving, hopping = link_seconds(found, "v5e:4x8")
        assert moving == pytest.approx(3e9 * 31 / 32 / 200e9)
        assert hopping == pytest.approx(25 * 6e-6)


SCHEDULE = """
     0   :  { %s1_s0 = inlined_call_operand.vmem [shape: bf16[2,64,64,320], index: 0, kind: input] }
   0x1   :  { %s1_s1 = inlined_call_operand.hbm [shape: bf16[2,64,64,320], index: 1, kind: output] }
   0x2 LB: > { %s9 = sphi 0 /* iteration index, stage = 0 */ }
   0x3   : > { %s2 = sadd.s32 1, %s9 }
   0x4 LB: >> { %s7 = sphi 0 }
   0x5   : >> { %s3_s4 = sadd.s32 4, %s7 ;; %v1 = vld [vmem:[%s1]] }
   0x6   : >> { %p1 = scmp.ge.s32.totalorder %s3_s4, 64 /* loop exit test */ ;; %v2 = vadd.f32 %v1, %v1 }
   0x7   : > { %p2 = scmp.ge.s32.totalorder %s2, 28 /* loop exit test */ }
   0x8   :  { }
"""


class TestSchedules:
    def test_a_loop_in_a_grid_of_programs(self):
        # Three bundles outside; 26 programs of three and of sixteen turns of three.
        assert mosaic.cycles_of(SCHEDULE) == 3 + 26 * (3 + 16 * 3)

    def test_no_loop(self):
        flat = "\n".join(line for line in SCHEDULE.splitlines() if ">>" not in line)
        assert mosaic.cycles_of(flat) == 3 + 26 * 3

    def test_what_is_built_otherwise_is_refused(self):
        twice = SCHEDULE.replace(
            "   0x7", SCHEDULE[SCHEDULE.index("   0x4") : SCHEDULE.index("   0x7")] + "   0x7"
        )
        with pytest.raises(ValueError, match="no grid of programs with one loop each"):
            mosaic.cycles_of(twice)

    def test_one_program(self):
        """Of a grid of one there is no loop, and nothing is counted off the loop in it."""
        alone = [line.replace(">>", ">") for line in SCHEDULE.splitlines() if ": >> " in line]
        assert mosaic.cycles_of("\n".join(["     0   :  { }", *alone])) == 1 + 16 * 3

    def test_kernels_of_ours_are_priced(self, tmp_path):
        """By the longer of two schedules, and by main memory where that takes longer still."""
        shape = "bf16[2,64,64,320]{3,2,1,0:T(8,128)(2,1)%s}"
        call = (
            'custom-call(%%x), custom_call_target="tpu_custom_call", '
            'metadata={op_name="jit(f)/Block/depthwise/pallas_call"}'
        )
        program = "ENTRY %%main (x: bf16[2,64,64,320]) -> bf16[2,64,64,320] {\n  %%x = {0} parameter(0)\n"
        program = (program + "  ROOT %%depthwise.3 = {0} " + call + "\n}").replace("%%", "%")
        near, far = (hlo.kernels(program.replace("{0}", shape % place)) for place in ("S(1)", ""))
        schedules = SCHEDULE, SCHEDULE.replace("28 /* loop", "102 /* loop")
        moved = 2 * 2 * 64 * 64 * 320 * 2  # bytes, in and out
        for kernels, expected in ((near, 3 + 100 * 51), (far, round(moved / 819e9 * 1.5e9))):
            for number, text in enumerate(schedules):
                (tmp_path / f"{number}-depthwise.3-01-final_bundles.txt").write_text(text)
            (kernel,) = mosaic.scheduled(kernels, tmp_path, "v5e")
            assert kernel.cycles == expected
            assert not list(tmp_path.iterdir()), "the next program's are others"

    def test_are_found_by_name_and_shapes(self, tmp_path):
        (tmp_path / "17-depthwise.3-01-final_bundles.txt").write_text(SCHEDULE)
        (tmp_path / "17-fusion.4-01-final_bundles.txt").write_text("of XLA's own")
        array = hlo.Array(dtype="bf16", dims=(2, 64, 64, 320), layout="")
        found = mosaic.cycles(tmp_path, {"depthwise"})
        assert found == {mosaic.shapes_of([array, array]): mosaic.cycles_of(SCHEDULE)}
